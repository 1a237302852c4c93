"""What every Mixtral recipe is: NeMo's four functions, made once for each entry of the catalog."""

import inspect
import types
from collections.abc import Callable
from typing import Any

import nemo_run as run
import torch

from mixtral_recipes import api
from mixtral_recipes.data.modules.mock import MockDataModule
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.config import MixtralConfig, MixtralModel
from mixtral_recipes.recipes import catalog, defaults, finetune_default
from mixtral_recipes.recipes.catalog import Layout, RecipeEntry
from mixtral_recipes.recipes.log.default import default_log, default_resume, tensorboard_logger
from mixtral_recipes.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing
from mixtral_recipes.recipes.outline import Question, default_layout
from mixtral_recipes.settings.objects import returns_config
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.training.watch.callbacks import (
    GarbageCollectionCallback,
    MegatronCommOverlapCallback,
    MegatronTokenDropCallback,
)

LORA_LR = 1e-4  # NeMo 2.0: LoRA and DoRA
FULL_LR = 5e-6  # NeMo 2.0: full fine-tuning
# Instruct models whose vocabulary is not the base model's. Source: their config.json.
INSTRUCT_VOCABULARY = {"mistralai/Mixtral-8x22B-Instruct-v0.1": 32768}
# Stands for a default that a recipe takes from its entry in the catalog; `inspect.signature` of its function has that.
FROM_CATALOG: Any = None


class Recipe:
    """One recipe: NeMo's four functions, with the layouts, lengths and precisions of its entry in the catalog.

    A recipe's module creates one and re-exports its functions. Each is a `run.cli.factory` under the recipe's name.

    Attributes:
        name: The recipe's name, which is its module's.
        entry: Its entry in the catalog.
        config: The class of its model's configuration.
    """

    def __init__(self, module: str, config: type[MixtralConfig]) -> None:
        """Make a recipe.

        Args:
            module: The recipe's module, its ``__name__``.
            config: The class of its model's configuration.
        """
        self.name = module.rpartition(".")[2]
        self.entry = catalog.entry(self.name)
        self.config = config
        for function, target in _TARGETS.items():
            own = self._own(function, module)
            setattr(self, function, run.cli.factory(own, target=target, name=self.name))

    def _own(self, name: str, module: str) -> types.MethodType:
        """A method as a function of the recipe's module, with this recipe's defaults in its signature."""
        shared = getattr(type(self), name)
        defaults = self._defaults(name)
        own = types.FunctionType(shared.__code__, shared.__globals__, name)
        parameters = [p for p in inspect.signature(shared).parameters.values() if p.default is not p.empty]
        values = {p.name: defaults.get(p.name, p.default) for p in parameters}
        keyword_only = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        own.__defaults__ = tuple(value for key, value in values.items() if key not in keyword_only)
        own.__kwdefaults__ = {key: value for key, value in values.items() if key in keyword_only}
        own.__annotations__, own.__doc__, own.__module__ = shared.__annotations__, shared.__doc__, module
        return types.MethodType(returns_config(own), self)

    def _defaults(self, function: str) -> dict[str, Any]:
        """The values that replace `FROM_CATALOG` in one of the functions."""
        if function != "trainer":
            return {"precision": self.entry.precisions[0]}
        layout = self.entry.layout("pretrain")
        sizes = layout.topology
        return {
            "tensor_parallelism": sizes.tensor_model_parallel_size,
            "pipeline_parallelism": sizes.pipeline_model_parallel_size,
            "pipeline_parallelism_type": torch.bfloat16 if self.entry.precisions[0] == "bf16" else None,
            "virtual_pipeline_parallelism": sizes.virtual_pipeline_model_parallel_size,
            "context_parallelism": sizes.context_parallel_size,
            "sequence_parallelism": sizes.sequence_parallel,
            "expert_parallelism": sizes.expert_model_parallel_size,
            "expert_tensor_parallelism": sizes.expert_tensor_parallel_size,
            "num_nodes": layout.num_nodes,
            "num_gpus_per_node": layout.num_gpus_per_node,
            "max_steps": self.entry.pretrain_steps if self.entry.needs_gpu else self.entry.finetune_steps,
        }

    def adjust_trainer(self, config: run.Config[Trainer]) -> None:
        """Change the trainer of every task; the large recipes leave it as it is."""

    def adjust_pretraining(self, recipe: run.Partial[Any]) -> None:
        """Change the pretraining recipe; the large recipes leave it as it is."""

    def adjust_finetuning(self, recipe: run.Partial[Any]) -> None:
        """Change the fine-tuning recipe; the large recipes leave it as it is."""

    def model(self) -> run.Config[MixtralModel]:
        """The recipe's model, with positions for its sequence length."""
        config: Any = run.Config(self.config)
        if self.entry.seq_length > config.max_position_embeddings:
            config.seq_length = config.max_position_embeddings = self.entry.seq_length
        return run.Config(MixtralModel, config=config)

    def trainer(
        self,
        tensor_parallelism: int = FROM_CATALOG,
        pipeline_parallelism: int = FROM_CATALOG,
        pipeline_parallelism_type: torch.dtype | None = FROM_CATALOG,
        virtual_pipeline_parallelism: int | None = FROM_CATALOG,
        context_parallelism: int = FROM_CATALOG,
        sequence_parallelism: bool = FROM_CATALOG,
        expert_parallelism: int = FROM_CATALOG,
        num_nodes: int = FROM_CATALOG,
        num_gpus_per_node: int = FROM_CATALOG,
        max_steps: int = FROM_CATALOG,
        callbacks: list[Any] | None = None,
        expert_tensor_parallelism: int | None = FROM_CATALOG,
    ) -> run.Config[Trainer]:
        """The pretraining trainer, in the pretraining layout for H100; `catalog` says where that comes from.

        Args:
            tensor_parallelism: Ranks that share each matrix.
            pipeline_parallelism: Consecutive groups of layers.
            pipeline_parallelism_type: Dtype sent between pipeline stages.
            virtual_pipeline_parallelism: Interleaved chunks per pipeline rank.
            context_parallelism: Ranks that share each sequence.
            sequence_parallelism: Whether tensor-parallel ranks split the sequence.
            expert_parallelism: Ranks the experts are spread over.
            num_nodes: Nodes.
            num_gpus_per_node: Processes per node.
            max_steps: Optimizer steps.
            callbacks: Callback configs; None uses `TimingCallback`.
            expert_tensor_parallelism: Ranks that share each expert's matrices; None means the tensor-parallel size.
        """
        topology = Topology(
            num_nodes * num_gpus_per_node,
            tensor_parallelism,
            pipeline_parallelism,
            virtual_pipeline_parallelism,
            context_parallelism,
            expert_parallelism,
            expert_tensor_parallelism,
            sequence_parallelism,
        )
        config = defaults.trainer(
            topology,
            num_nodes=num_nodes,
            num_gpus_per_node=num_gpus_per_node,
            max_steps=max_steps,
            pipeline_dtype=pipeline_parallelism_type,
            callbacks=callbacks,
        )
        self.adjust_trainer(config)
        return config

    def pretrain_recipe(
        self,
        dir: str | None = None,
        name: str = "default",
        num_nodes: int | None = None,
        num_gpus_per_node: int | None = None,
        performance_mode: bool = False,
        fn: Callable[..., Any] = api.pretrain,
        *,
        precision: str = FROM_CATALOG,
        hardware: str = "h100",
    ) -> run.Partial[Any]:
        """NeMo's pretraining; set ``data`` to train on anything but the recipe's own.

        Args:
            dir: Folder of runs.
            name: Run name.
            num_nodes: Nodes; None uses the layout's.
            num_gpus_per_node: Processes per node; None uses the layout's.
            performance_mode: Whether to trade exact routing for speed (`pretrain_performance_optimizations`).
            fn: What the recipe calls.
            precision: One of the recipe's precisions: ``bf16`` or ``fp8``, and ``fp32`` for the tiny model.
            hardware: A card's name, such as ``h200``, whose default layout is used (`layout/cards.py`).

        Raises:
            RecipeError: a precision that the recipe does not support, or unknown hardware.
        """
        gpus = (num_nodes, num_gpus_per_node)
        layout = default_layout(
            Question(self.name, "pretrain", hardware, *gpus, precision, performance_mode=performance_mode)
        )
        recipe = run.Partial(
            fn,
            model=self.model(),
            trainer=defaults.trainer(
                layout.topology,
                num_nodes=layout.num_nodes,
                num_gpus_per_node=layout.num_gpus_per_node,
                max_steps=self.entry.pretrain_steps,
            ),
            data=run.Config(
                MockDataModule,
                seq_length=self.entry.seq_length,
                global_batch_size=self.entry.pretrain_batch,
                micro_batch_size=self.entry.micro_batch,
            ),
            log=default_log(dir=dir, name=name, tensorboard_logger=tensorboard_logger(name=name)),
            optim=distributed_fused_adam_with_cosine_annealing(max_lr=3e-4),
            resume=default_resume(),
        )
        recompute(recipe, layout)
        defaults.set_precision(recipe, precision, self.entry.precisions, hardware)
        if performance_mode:
            trade_exactness_for_speed(recipe)
        self.adjust_trainer(recipe.trainer)
        self.adjust_pretraining(recipe)
        return recipe

    @returns_config
    def pretrain_performance_optimizations(self, recipe: run.Partial[Any]) -> run.Partial[Any]:
        """Turn a pretraining recipe into one in performance mode: its layout, and `trade_exactness_for_speed`.

        Args:
            recipe: The recipe to change.

        Returns:
            The same recipe.
        """
        for name, value in self.entry.layout("performance").topology.settings().items():
            setattr(recipe.trainer.strategy, name, value)
        trade_exactness_for_speed(recipe)
        return recipe

    def finetune_recipe(
        self,
        dir: str | None = None,
        name: str = "default",
        num_nodes: int | None = None,
        num_gpus_per_node: int | None = None,
        peft_scheme: str | None = "lora",
        packed_sequence: bool = False,
        *,
        precision: str = FROM_CATALOG,
        hardware: str = "h100",
        instruct: bool = False,
    ) -> run.Partial[Any]:
        """NeMo's fine-tuning on SQuAD; set ``data`` to train on something else.

        Args:
            dir: Folder of runs.
            name: Run name.
            num_nodes: Nodes; None uses the layout's, which differs between adapters and all weights.
            num_gpus_per_node: Processes per node; None uses the layout's.
            peft_scheme: ``lora``, ``dora``, ``qlora``, or ``none`` (or None) for full fine-tuning.
            packed_sequence: Whether samples are packed into full sequences.
            precision: One of the recipe's precisions: ``bf16`` or ``fp8``, and ``fp32`` for the tiny model.
            hardware: A card's name, such as ``h200``, whose default layout is used (`layout/cards.py`).
            instruct: Whether to start from the Instruct variant, where there is one.

        Raises:
            RecipeError: an unknown scheme, precision or hardware, or no Instruct variant.
        """
        peft = finetune_default.is_peft(peft_scheme)
        model = self.model()
        if instruct and self.entry.instruct in INSTRUCT_VOCABULARY:
            model.config.vocab_size = INSTRUCT_VOCABULARY[self.entry.instruct]
        gpus, scheme = (num_nodes, num_gpus_per_node), str(peft_scheme or "none").lower()
        layout = default_layout(Question(self.name, "finetune", hardware, *gpus, precision, scheme, packed_sequence))
        recipe = finetune_default.default_finetune_recipe(
            model, starting_weights(self.entry, instruct), dir, name, packed_sequence=packed_sequence
        )
        recipe.trainer = finetune_default.default_finetune_trainer(
            topology=layout.topology,
            num_nodes=layout.num_nodes,
            num_gpus_per_node=layout.num_gpus_per_node,
            max_steps=self.entry.finetune_steps,
        )
        recipe.data = finetune_default.squad(
            self.entry.finetune_seq_length,
            packed=packed_sequence,
            global_batch_size=self.entry.packed_batch if packed_sequence else self.entry.finetune_batch,
            micro_batch_size=1 if packed_sequence else self.entry.micro_batch,
        )
        recipe.optim.config.lr = LORA_LR if peft else FULL_LR
        recipe.peft = finetune_default.adapter(peft_scheme)
        recompute(recipe, layout)
        defaults.set_precision(recipe, precision, self.entry.precisions, hardware)
        self.adjust_trainer(recipe.trainer)
        self.adjust_finetuning(recipe)
        return recipe


# A recipe's functions, and what each is registered for with nemo_run's command line (None: what it returns).
_TARGETS: dict[str, Any] = {
    "model": None,
    "trainer": None,
    "pretrain_recipe": api.pretrain,
    "finetune_recipe": api.finetune,
}


def starting_weights(entry: RecipeEntry, instruct: bool) -> str | None:
    """Where fine-tuning starts: ``nemo://ID`` (imported beforehand, as in NeMo), or the embedded model.

    None if the model is not published.

    Raises:
        RecipeError: there is no Instruct variant.
    """
    if not instruct:
        if entry.base is None:
            return None
        return entry.base if "://" in entry.base else f"nemo://{entry.base}"
    if entry.instruct is None:
        raise RecipeError(f"instruct=True: {entry.name} has no Instruct variant; use instruct=False.")
    return f"nemo://{entry.instruct}"


def recompute(recipe: run.Partial[Any], layout: Layout) -> None:
    """Recompute every layer in the backward pass where the layout's memory needs it."""
    if layout.recompute:
        recipe.model.config.recompute_granularity = "full"
        recipe.model.config.recompute_method = "uniform"
        recipe.model.config.recompute_num_layers = 1


def trade_exactness_for_speed(recipe: run.Partial[Any]) -> None:
    """What NeMo's performance mode adds to its layout.

    Token drop, which changes the result: tokens beyond an expert's even share skip it. Communication overlap, scheduled
    garbage collections, gradients reduced in bf16.

    Args:
        recipe: The pretraining recipe to change.
    """
    recipe.trainer.callbacks = [
        *(recipe.trainer.callbacks or []),
        run.Config(MegatronTokenDropCallback, moe_expert_capacity_factor=1.0),
        run.Config(GarbageCollectionCallback, gc_interval_train=100, gc_interval_val=100),
        # NeMo leaves the overlap with the optimizer step off because of checkpointing.
        run.Config(MegatronCommOverlapCallback, overlap_param_gather_with_optimizer_step=False),
    ]
    recipe.trainer.plugins.grad_reduce_in_fp32 = False

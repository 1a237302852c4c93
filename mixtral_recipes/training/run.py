"""From settings to a run that can step: weights, tokenizer, data, model, optimizer, the checkpoint to resume from."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from mixtral_recipes.checkpoints.checkpointer import Checkpointer, Position
from mixtral_recipes.checkpoints.fp8 import forget_first_values
from mixtral_recipes.checkpoints.lineage import record, told
from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.checkpoints.load import find_checkpoint, load_model
from mixtral_recipes.checkpoints.quantized_cache import cache_folder
from mixtral_recipes.checkpoints.shards import parts_of
from mixtral_recipes.data.batches.batch import DataParallelPlace
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.tokenizer_choice import chosen_tokenizer, described
from mixtral_recipes.data.tokenizers import tokenizer_identity, vocabulary_size
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.agreement import Vocabulary
from mixtral_recipes.layout.shapes import BatchShape, ModelShape
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models import kernels
from mixtral_recipes.models.acceleration import accelerated, refuse_without
from mixtral_recipes.models.builder import build_model
from mixtral_recipes.models.config import MixtralConfig, MixtralModel, with_topology
from mixtral_recipes.models.kernels import Kernels
from mixtral_recipes.peft import attach, count
from mixtral_recipes.peft.busiest import with_experts_named
from mixtral_recipes.peft.quantized.layers import base_format
from mixtral_recipes.settings import changes as recipe_changes
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.log import NeMoLogger
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.peft import LoRA, QLoRA, recorded
from mixtral_recipes.settings.resume import AutoResume
from mixtral_recipes.settings.trainer import Trainer
from mixtral_recipes.training import precision, user_buffers
from mixtral_recipes.training.model import agreed_model, megatron_settings
from mixtral_recipes.training.optimizer import build_optimizer, build_scheduler, connect, ddp_config, wrap
from mixtral_recipes.training.origin import Origin, context_folder
from mixtral_recipes.training.states import check_states


@dataclass
class TrainingRun:
    """Everything a step needs, on this rank.

    Attributes:
        trainer: The recipe's trainer.
        topology: The layout.
        config: The model's configuration with parallel sizes and precision filled in.
        model: Model chunks as built (no DDP).
        ddp: The same chunks wrapped by Megatron's DDP.
        optimizer: Megatron's optimizer; None where nothing is trained.
        scheduler: Megatron's schedule; likewise.
        data: The data module, set up.
        device: Where tensors live.
        forward_backward: Megatron's schedule for this layout.
        batch: Batch shape.
        computed_by: The kernels it runs on; None on a CPU.
    """

    trainer: Trainer
    topology: Topology
    config: MixtralConfig
    model: list[Any]
    ddp: list[Any]
    optimizer: Any
    scheduler: Any
    data: DataModule
    device: torch.device
    forward_backward: Any
    batch: BatchShape
    computed_by: Kernels | None = None

    def gather_parameters(self) -> None:
        """Bring all weights on this rank up to date, for whatever looks at them between two steps.

        With ``ddp.overlap_param_gather`` a rank holds what it updated itself, and gets the rest in its next forward
        pass.
        """
        if self.optimizer is None or not self.ddp[0].ddp_config.overlap_param_gather:
            return
        with torch.no_grad():
            self.optimizer.prepare_model_params_for_param_sync()
            for chunk in self.ddp:
                chunk.start_param_sync(force_sync=True)

    def take_up_main_weights(self) -> None:
        """Quantize weights kept in FP8 from the optimizer's fp32 ones, as the step before a checkpoint did.

        A checkpoint has such weights in bf16, which quantized again need not give the same bits. An optimizer that
        keeps its weights in two halves has set its share of the model's; the ranks gather the others'.
        """
        if self.optimizer is None:
            return
        how = self.ddp[0].ddp_config
        halves = any(part.config.use_precision_aware_optimizer for part in parts_of(self.optimizer))
        if not (how.fp8_param_gather or halves):
            return
        with torch.no_grad():
            for part in parts_of(self.optimizer):
                if how.reuse_grad_buf_for_mxfp8_param_ag:
                    part._copy_main_params_to_param_buffer()
                else:
                    part._copy_main_params_to_model_params()
            for chunk in self.ddp:
                chunk.start_param_sync(force_sync=True)

    @property
    def data_place(self) -> DataParallelPlace:
        """Which share of each global batch this rank reads."""
        return DataParallelPlace(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())

    @property
    def loader_shape(self) -> dict[str, Any]:
        """How long microbatches are: a multiple of what splits them; fixed where one shape is needed."""
        t = self.topology
        # FP8 products want a multiple of 16 tokens on each rank, MXFP8 of 32.
        tokens = self.trainer.plugins.token_multiple * t.context_parallel_size * t.tensor_model_parallel_size
        return {
            "multiple": math.lcm(8, tokens, t.context_slices * t.tensor_model_parallel_size),
            # Context parallelism splits each sequence of a pack, not the pack.
            "sequence_multiple": t.context_slices,
            # Pipeline stages exchange tensors of one shape, and so do user buffers.
            "fixed": t.pipeline_model_parallel_size > 1 or self.config.tp_comm_overlap,
        }


class Parts:
    """A recipe's parts, defaults filled in; attributes as `api.finetune`'s arguments."""

    def __init__(
        self,
        model: MixtralModel,
        data: DataModule,
        trainer: Trainer,
        log: NeMoLogger | None,
        optim: MegatronOptimizerModule | None,
        resume: AutoResume | None,
        peft: LoRA | None,
        tokenizer: Any,
    ) -> None:
        self.model = dataclasses.replace(model, optim=None, model_transform=None)
        self.data = data
        self.trainer = trainer
        self.log = log or NeMoLogger()
        self.optim = optim or model.optim or MegatronOptimizerModule()
        self.resume = resume or AutoResume()
        self.peft = peft or model.model_transform
        self.tokenizer = tokenizer

    @property
    def checkpoints(self) -> Path:
        """The run's folder of checkpoints."""
        return self.log.run_dir / "checkpoints"

    @property
    def asked(self) -> dict[str, recipe_changes.Plain]:
        """Every setting as it was asked for: nothing is read to fill any in, unlike `Ready.recipe`'s."""
        return recipe_changes.asked(
            self.model, self.trainer, self.data, self.optim, self.peft, self.resume, self.tokenizer
        )


@dataclass
class Ready:
    """A run that can step, and how it came to be.

    Attributes:
        run: Model, optimizer, schedule, data.
        checkpointer: Saves it.
        position: Where it starts.
        found: The run's own checkpoint that it resumes from; None for a new run.
        origin: Otherwise, what its weights come from.
        lineage: What the run's checkpoints record of where they come from.
        recipe: Every setting by its path.
        changed: What differs from the settings ``found`` was written with.
        trained: With adapters, how many parameters are trained, by kind of module.
    """

    run: TrainingRun
    checkpointer: Checkpointer
    position: Position
    found: Path | None
    origin: Origin
    lineage: Lineage
    recipe: dict[str, recipe_changes.Plain]
    changed: list[recipe_changes.Change]
    trained: dict[str, int]

    @property
    def restored_from(self) -> str:
        """Where the weights come from."""
        return str(self.found or self.origin.named or "random weights")

    @property
    def opening(self) -> str:
        """How the run starts, in words."""
        where = f"starting from {self.restored_from}"
        if self.found:
            where = f"resuming from {self.found} at step {self.position.step}"
        return where + (f"; training {count.told(self.trained)}" if self.trained else "")

    def facts(self) -> dict[str, Any]:
        """What a run's log says at its start."""
        topology = self.run.topology
        return {
            "step": self.position.step,
            "restored_from": self.restored_from,
            "changed": [str(change) for change in self.changed],
            "topology": topology.describe(),
            "world_size": topology.world_size,
            "trained_parameters": self.trained,
            "recipe": self.recipe,
            "lineage": told.rows(self.lineage),
        }


def prepare(parts: Parts, device: torch.device, say: Callable[[str], None], *, for_training: bool = True) -> Ready:
    """Build a run and restore its checkpoint. torch.distributed and Megatron's groups must exist; all ranks call it.

    Args:
        parts: The recipe.
        device: Where tensors live.
        say: Called with what the reader should know.
        for_training: Whether the run may write its folder.

    Raises:
        CheckpointError: a checkpoint is damaged, or of another model.
        RecipeError: a setting changed that must not.
    """
    origin = Origin.of(parts.resume, parts.peft)
    base, parts.peft = origin.base, origin.scheme
    if parts.peft is not None:
        config = parts.model.config
        parts.peft = with_experts_named(parts.peft, config.num_layers, config.num_moe_experts or 1)
    named = parts.tokenizer or parts.model.tokenizer
    from_where = named or base or parts.model.config.default_tokenizer
    loaded = chosen_tokenizer(from_where, error=CheckpointError)
    restore = parts.resume.restore_config
    tokenizer = parts.data.tokenizer_for(loaded, grow=bool(restore and restore.resize_vocab))
    vocabulary = Vocabulary(described(from_where), vocabulary_size(tokenizer)) if tokenizer else None
    agreed = agreed_model(
        parts.model.config, parts.trainer, parts.resume, parts.peft, base and base / "context", vocabulary
    )
    model = dataclasses.replace(parts.model, config=agreed.config)
    parts.data.setup(tokenizer)
    recipe = recipe_changes.describe(
        model=model, trainer=parts.trainer, data=parts.data, optim=parts.optim, peft=parts.peft
    )
    recipe |= origin.settings(parts.peft) | {"tokenizer": tokenizer_identity(tokenizer) if tokenizer else None}
    found = find_checkpoint(parts.resume, parts.checkpoints, say)
    changed = _compare_with(found, recipe, say if for_training else lambda text: None)  # what trains is no concern then
    start = origin
    if found is not None:  # the run's own checkpoint has its adapters, or all its weights
        start = Origin(base if parts.peft is not None else None)
    start.verify()
    run = build_run(
        model,
        parts.trainer,
        parts.data,
        parts.optim,
        device=device,
        peft=parts.peft,
        weights=start.base,
        new_rows=agreed.new_rows,
        adapters=start.adapters,
    )
    writes = torch.distributed.get_rank() == 0
    context = None
    if for_training:
        context = context_folder(
            base,
            parts.log.run_dir,
            agreed.published,
            tokenizer,
            named=bool((named and tokenizer) or tokenizer is not loaded),
            writes=writes,
        )
    lineage = origin.lineage(recipe, parts.peft, parts.data)
    checkpointer = Checkpointer(
        parts.checkpoints,
        parts.log.ckpt or ModelCheckpoint(),
        model_name=parts.log.name,
        model=run.model,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        adapters_only=parts.peft is not None,
        context=context,
        facts=_facts(run, parts.peft) | {"recipe": recipe},
        lineage=lineage,
        asynchronous=parts.trainer.strategy.ckpt_async_save,
    )
    position = checkpointer.load(found) if found else Position()
    if found:
        run.take_up_main_weights()
    if origin.named is not None and not found and restore and restore.load_optim_state:
        checkpointer.load_optimizer(origin.named)
        run.take_up_main_weights()
    lineage = dataclasses.replace(lineage, run={"name": parts.log.name, "step": position.step})
    trained = count.trained_parameters(parts.peft, ModelShape.of(agreed.config)) if parts.peft is not None else {}
    return Ready(run, checkpointer, position, found, origin, lineage, recipe, changed, trained)


def _compare_with(
    found: Path | None, recipe: dict[str, recipe_changes.Plain], say: Callable[[str], None]
) -> list[recipe_changes.Change]:
    """Say what changed in the recipe since a checkpoint was written; refuse what may not change.

    Raises:
        RecipeError: names what may not change.
    """
    written = record.read_or_none(found) if found else None
    before = written.recipe if written else None
    if not before:
        return []
    changed = recipe_changes.changes(before, recipe)
    recipe_changes.refuse_fixed(changed)
    for change in changed:
        say(f"changed since that checkpoint: {change}")
    return changed


def _facts(run: TrainingRun, peft: LoRA | None) -> dict[str, Any]:
    """What a checkpoint's run.json says about the run that wrote it."""
    facts: dict[str, Any] = {"topology": run.topology.describe(), "kind": "adapter" if peft else "training"}
    if peft is not None:
        facts["peft"] = recorded(peft)
    if isinstance(peft, QLoRA):
        # What its values depend on beside the scheme (`peft/quantized/nf4.py`).
        facts["trained_over"] = {"device": run.device.type, "dtype": str(run.config.params_dtype).split(".")[-1]}
    return facts


def build_run(
    model: MixtralModel,
    trainer: Trainer,
    data: DataModule,
    optim: MegatronOptimizerModule,
    *,
    device: torch.device,
    peft: LoRA | None = None,
    weights: Path | None = None,
    new_rows: range = range(0),
    adapters: Path | None = None,
) -> TrainingRun:
    """Build this rank's part of a run. Megatron's groups must exist.

    Args:
        model: What to train.
        trainer: How.
        data: On what; already set up.
        optim: Optimizer and schedule.
        device: Where.
        peft: Adapters to train instead of the weights.
        weights: Checkpoint folder to take the model's weights from; None keeps the random start.
        new_rows: Tokens that checkpoint has no row for (`load_model`).
        adapters: Adapter checkpoint to take the adapters from, likewise.
    """
    topology = trainer.topology()
    trainer = dataclasses.replace(
        trainer, plugins=precision.decided(trainer.plugins, topology, frozen=peft is not None)
    )
    settings = megatron_settings(trainer, topology, device, frozen=peft is not None)
    precision.check_device(trainer.plugins)
    base = base_format(peft)
    fast: dict[str, Any] = {}
    on_transformer_engine = kernels.transformer_engine_usable()
    if on_transformer_engine:
        fast = accelerated(
            model.config,
            adapters=peft is not None,
            quantized=base is not None,
            dtype=settings["model"]["params_dtype"],
        )
    if not on_transformer_engine or base is not None:  # quantised experts are not Transformer Engine's
        refuse_without(model.config, grouped_only=on_transformer_engine)
    config = with_topology(model.config, topology, **(settings["model"] | fast))
    if isinstance(peft, QLoRA):
        peft.check_base(trainer.plugins, ModelShape.of(config), topology)
    batch = BatchShape.of(data, fp8=bool(trainer.plugins.fp8))
    if config.tp_comm_overlap:
        user_buffers.start(config, batch)
    computed_by = kernels.in_use(config, length=batch.seq_length, packed=batch.packed)
    if base is not None and weights is not None:  # no random weights are drawn where others are quantised
        config = dataclasses.replace(config, perform_initialization=False)
    chunks = build_model(config, adapters=peft is not None, base=base)
    if weights is not None:
        cache = cache_folder(weights, base, device) if isinstance(peft, QLoRA) and peft.cache and base else None
        load_model(chunks, weights, new_rows=new_rows, cache=cache)
    if peft is not None:
        attach.apply(peft, chunks)
        forget_first_values(chunks)
    if adapters is not None:
        load_model(chunks, adapters, adapters_only=True)
    check_states(optim, trainer.plugins, frozen=peft is not None)
    ddp = wrap(chunks, config, ddp_config(trainer.strategy.ddp, optim, settings["ddp"]))
    settings["optimizer"]["overlap_param_gather"] = ddp[0].ddp_config.overlap_param_gather
    optim = dataclasses.replace(optim, config=dataclasses.replace(optim.config, **settings["optimizer"]))
    optimizer = build_optimizer(optim, ddp, trainer.plugins, peft)
    connect(config, ddp, optimizer)
    return TrainingRun(
        trainer=trainer,
        topology=topology,
        config=config,
        model=chunks,
        ddp=ddp,
        optimizer=optimizer,
        scheduler=build_scheduler(optim, optimizer, trainer.max_steps),
        data=data,
        device=device,
        forward_backward=get_forward_backward_func(),
        batch=batch,
        computed_by=computed_by,
    )

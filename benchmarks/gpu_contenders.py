"""Who takes part in `gpu_step.py`: ours, as a recipe gives it, and transformers with peft."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from step_contenders import CLIP, LEARNING_RATE, RANK, RandomData, Step, our_step, transformers_step, with_adapters

from mixtral_recipes.data.batches.batch import DataParallelPlace
from mixtral_recipes.layout import cards
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.planner import weights
from mixtral_recipes.system import machine

SAME_WEIGHTS_BYTES = 8e9  # two layers of 8x7B: what is written and read twice for both sides to start alike
FP8 = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3"}
NO_BACKWARD = {"deepgemm": "its products are written into tensors that autograd does not follow: no backward pass"}


@dataclass(frozen=True)
class Size:
    """A model and what is measured of it where nothing else is asked for."""

    recipe: str
    layers: int
    sequence: int
    precisions: tuple[str, ...]


SIZES = {
    "8x7b": Size("mixtral_8x7b", 4, 4096, ("bf16", "fp8")),
    "tiny": Size("mixtral_tiny", 2, 64, ("fp32",)),
}
MODES = ("lora", "lora-attention", "full")


@dataclass
class Contender:
    """Something that can be stepped.

    Attributes:
        name: Its name in the result.
        build: Builds it on the device.
        ours: Whether it is this project's.
        exact: Whether its first loss is that of the model as it is; FP8's is not.
    """

    name: str
    build: Callable[[], Step]
    ours: bool = False
    exact: bool = True


class Bench:
    """One mode of training: who takes part, and what they are measured on."""

    def __init__(self, options: argparse.Namespace, mode: str, device: torch.device, scratch: Path) -> None:
        self.options, self.mode, self.device = options, mode, device
        self.size = SIZES[options.size]
        self.precisions = options.precisions or self.size.precisions
        self.layers, self.sequence = options.layers or self.size.layers, options.sequence or self.size.sequence
        self.config = self.parts(self.precisions[0], options.recompute[0])["model"].config
        self.tokens = options.micro_batch * options.microbatches * self.sequence
        self.folder = self._weights(scratch) if self._same_weights() else None

    @property
    def dtype(self) -> torch.dtype:
        """The other side's."""
        return torch.float32 if self.precisions[0] == "fp32" else torch.bfloat16

    def recipe(self, precision: str, recompute: str) -> Any:
        """Our recipe, changed to what is measured."""
        from mixtral_recipes.overrides import loading, paths

        card = cards.named(machine.gpu_name()) or "h100"
        recipe = loading.load(
            self.size.recipe,
            "finetune",
            num_nodes=1,
            num_gpus_per_node=1,
            peft_scheme={"full": "none", "qlora": "qlora"}.get(self.mode, "lora"),
            precision="bf16" if precision in FP8 else precision,
            hardware=card,
        )
        settings = {
            "model.config.num_layers": self.layers,
            "model.config.seq_length": self.sequence,
            "model.config.max_position_embeddings": self.sequence,
            "trainer.max_steps": 10_000,
            "optim.config.clip_grad": CLIP,
            "optim.config.lr": LEARNING_RATE,
        }
        if precision in FP8:
            settings |= {"trainer.plugins.fp8": FP8[precision], "trainer.plugins.fp8_recipe": precision}
            settings["trainer.plugins.fp8_param_gather"] = None  # as in the FP8 recipes: where it pays
        if self.mode != "full":
            settings |= {"peft.dim": RANK, "peft.alpha": RANK}
        if self.mode == "lora-attention":
            settings["peft.target_modules"] = "attention"
        for path, value in (settings | _recomputed(recompute)).items():
            paths.set_value(recipe, path, value)
        paths.apply(recipe, self.options.settings)
        return recipe

    def parts(self, precision: str, recompute: str) -> dict[str, Any]:
        """The recipe's parts, built."""
        import fiddle

        built: Any = fiddle.build(self.recipe(precision, recompute))
        return dict(built.keywords)

    def data(self) -> RandomData:
        """Its data, from the beginning."""
        each = self.options.micro_batch
        data = RandomData(
            seq_length=self.sequence,
            micro_batch_size=each,
            global_batch_size=each * self.options.microbatches,
            vocab_size=self.config.vocab_size,
        )
        data.setup(None)
        return data

    def _their_config(self) -> Any:
        from transformers import MixtralConfig

        own = self.config
        return MixtralConfig(
            vocab_size=own.vocab_size, hidden_size=own.hidden_size, intermediate_size=own.ffn_hidden_size,
            num_hidden_layers=own.num_layers, num_attention_heads=own.num_attention_heads, head_dim=own.kv_channels,
            num_key_value_heads=own.num_query_groups, num_local_experts=own.num_moe_experts, sliding_window=None,
            num_experts_per_tok=own.moe_router_topk, max_position_embeddings=self.sequence, router_aux_loss_coef=0.0,
            rms_norm_eps=own.layernorm_epsilon, rope_parameters={"rope_type": "default", "rope_theta": own.rotary_base},
            initializer_range=own.init_method_std,
        )  # fmt: skip

    def _same_weights(self) -> bool:
        size = weights.parameters(ModelShape.of(self.config)) * self.dtype.itemsize
        asked = self.options.same_weights  # None: never, as where nobody is compared
        return asked is not None and (asked or size <= SAME_WEIGHTS_BYTES)

    def _weights(self, scratch: Path) -> Path:
        """A random model as transformers writes it, and beside it imported."""
        from transformers import MixtralForCausalLM

        from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint

        folder = scratch / "transformers"
        if not folder.exists():
            torch.manual_seed(1)
            with self.device:
                model: Any = MixtralForCausalLM._from_config(self._their_config(), dtype=self.dtype)
            model.save_pretrained(folder)
            import_checkpoint(str(folder), scratch / "imported", progress=False)
        return folder

    def ours(self, precision: str, recompute: str) -> Step:
        """Our step."""
        parts = self.parts(precision, recompute)
        imported = self.folder and self.folder.with_name("imported")
        chosen = {name: parts[name] for name in ("model", "trainer", "optim", "peft")}
        return our_step(data=self.data(), device=self.device, weights=imported, **chosen)

    def theirs(self, way: str, adapters: str) -> Step:
        """transformers' step, and peft's; ``way`` computes experts, ``adapters`` is their dtype."""
        from transformers import MixtralForCausalLM

        if way in NO_BACKWARD:
            raise NotImplementedError(NO_BACKWARD[way])
        kinds = {"experts_implementation": way, "attn_implementation": "sdpa", "dtype": self.dtype}
        if self.folder:
            model: Any = MixtralForCausalLM.from_pretrained(self.folder, **kinds)
            model.to(self.device)
        else:
            torch.manual_seed(1)
            with self.device:
                model = MixtralForCausalLM._from_config(self._their_config(), **kinds)
        if self.mode != "full":
            model = with_adapters(model, experts=self.mode == "lora", in_fp32=adapters == "fp32")
        if self.options.recompute[0].startswith("full"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if self.mode != "full":
                model.enable_input_require_grads()
        batches = self.data().train_batches(DataParallelPlace())
        return transformers_step(model, batches, microbatches=self.options.microbatches)

    def contenders(self) -> list[Contender]:
        """Everyone asked for: our first, the other side, the rest of ours, since time may run out."""
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        asked, several = self.options.contenders, len(self.options.recompute) > 1
        found = [
            Contender(
                f"ours {precision}" + (f", recompute {recompute}" if several else ""),
                partial(self.ours, precision, recompute),
                ours=True,
                exact=precision in ("fp32", "bf16"),
            )
            for precision in self.precisions
            for recompute in self.options.recompute
            if "ours" in asked
        ]
        ways = [way for way in asked if way not in ("ours", "transformers")]
        if "transformers" in asked:
            ways = sorted({*ways, *ALL_EXPERTS_FUNCTIONS.keys()})
        # peft keeps adapters of a bf16 model in fp32 unless it is told not to; the faster counts.
        adapters = ["fp32"] if self.mode == "full" or self.dtype is torch.float32 else ["fp32", "bf16"]
        return (
            found[:1]
            + [
                Contender(
                    f"transformers {way}" + (", bf16 adapters" if kind == "bf16" else ""),
                    partial(self.theirs, way, kind),
                )
                for way in ways
                for kind in adapters
            ]
            + found[1:]
        )


def _recomputed(text: str) -> dict[str, Any]:
    """Settings for ``none``, ``full``, ``full:8`` (that many layers), or modules such as ``moe_act,layernorm``."""
    kind, _, layers = text.partition(":")
    if kind == "none":
        return {"model.config.recompute_granularity": None}
    if kind != "full":
        modules = text.split(",")
        return {"model.config.recompute_granularity": "selective", "model.config.recompute_modules": modules}
    return {
        "model.config.recompute_granularity": "full",
        "model.config.recompute_method": "block" if layers else "uniform",
        "model.config.recompute_num_layers": int(layers or 1),
    }

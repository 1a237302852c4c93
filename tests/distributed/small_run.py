"""A tiny training run under any layout, and its weights put together again: what the layout tests compare.

Every layout starts from the same weights and sees the same sequences. Its weights are cut and joined by the places
Megatron's own sharded state dict gives them.
"""

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor
from torch.utils.data import Dataset

from mixtral_recipes.checkpoints.shards import model_state, quantized_weights
from mixtral_recipes.data.batches.batch import Sample
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.config import MixtralConfig, MixtralModel
from mixtral_recipes.peft.quantized.layers import quantize_into
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.peft import LoRA
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.trainer import MegatronStrategy, Trainer
from mixtral_recipes.training import distributed
from mixtral_recipes.training.run import TrainingRun, build_run
from mixtral_recipes.training.step import train_step
from tests.distributed.sabotage import leave_out
from tests.torch_dist import window


@dataclass(frozen=True)
class Case:
    """One run to make.

    Attributes:
        layout: Topology's sizes; the world is all processes.
        peft: Adapters to train; None trains all weights.
        model: Fields of MixtralConfig that differ from `small_config`.
        ddp: Fields of Megatron's DDP config.
        data: Fields of `SmallData`.
        trainer: Fields of Trainer.
        precision: Fields of MegatronMixedPrecision.
        steps: Optimizer steps.
        optimizer: Fields of OptimizerConfig.
        without: A reduction to leave out (`tests/distributed/sabotage.py`); None leaves the code as it is.
    """

    layout: dict[str, Any] = field(default_factory=dict)
    peft: LoRA | None = None
    model: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    steps: int = 5
    optimizer: dict[str, Any] = field(default_factory=dict)
    without: str | None = None


@dataclass
class Outcome:
    """What one rank saw of a run.

    Attributes:
        losses: Per step.
        grad_norms: Per step, before clipping.
        weights: This rank's pieces after the last step: key -> [(offset, piece), ...].
        shapes: Whole shape of each key.
        router_losses: Megatron's aux and z losses of the last step, summed over layers, by name.
    """

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, list[tuple[tuple[int, ...], Tensor]]]
    shapes: dict[str, tuple[int, ...]]
    router_losses: dict[str, float]


def small_config(**changes: Any) -> MixtralConfig:
    """4 layers, 8 experts, grouped-query attention, a vocabulary that needs padding; fp32."""
    fields: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "vocab_size": 101,
        "seq_length": 32,
        "max_position_embeddings": 64,
        "make_vocab_size_divisible_by": 8,
        "rotary_base": 1e4,
        "init_method_std": 0.1,
        "bf16": False,
        "params_dtype": torch.float32,
    }
    return MixtralConfig(**(fields | changes))


class _Sequences(Dataset[Sample]):
    """Random sequences of different lengths; labels count on the last two thirds of each."""

    def __init__(self, length: int, vocab_size: int, *, full: bool) -> None:
        self.length, self.vocab_size, self.full = length, vocab_size, full

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        n = self.length if self.full else int(torch.randint(self.length // 2, self.length + 1, (), generator=generator))
        tokens = torch.randint(0, self.vocab_size, (n + 1,), generator=generator).tolist()
        return Sample(tokens=tokens, loss_mask=[0.0] * (n // 3) + [1.0] * (n - n // 3))


@dataclass
class SmallData(DataModule):
    """The sequences every layout sees."""

    seq_length: int = 32
    micro_batch_size: int = 2
    global_batch_size: int = 8
    vocab_size: int = 101
    full: bool = False

    def datasets(self, tokenizer: Any) -> tuple[Dataset[Sample], Dataset[Sample] | None]:
        return _Sequences(self.seq_length, self.vocab_size, full=self.full), None


def build(case: Case) -> TrainingRun:
    """This rank's part of a case, on the weights all layouts start from."""
    world = torch.distributed.get_world_size()
    precision = MegatronMixedPrecision(**({"precision": "32"} | case.precision))
    strategy = MegatronStrategy(**case.layout)
    for name, value in case.ddp.items():
        setattr(strategy.ddp, name, value)
    trainer = Trainer(devices=world, max_steps=case.steps, strategy=strategy, plugins=precision, **case.trainer)
    data = SmallData(**case.data)
    data.setup(None)
    model = MixtralModel(small_config(**case.model))
    settings: dict[str, Any] = {
        "lr": 3e-3,
        "weight_decay": 0.1,
        "adam_eps": 1e-5,  # Mixtral's recipes'; also keeps rounding noise in vanishing gradients out of the update
        "clip_grad": 1.0,
        "use_distributed_optimizer": True,
    }
    optim = MegatronOptimizerModule(OptimizerConfig(**(settings | case.optimizer)))
    _initialize(trainer.topology())
    run = build_run(model, trainer, data, optim, device=torch.device("cpu"), peft=case.peft)
    fill(run.model, adapters=False)
    if case.peft is not None:
        fill(run.model, adapters=True)
    run.optimizer.reload_model_params()
    return run


def _initialize(topology: Topology) -> None:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    place = distributed.ProcessPlace.from_environment()
    distributed.initialize(topology, place, torch.device("cpu"), seed=1234)


def train(case: Case) -> Outcome:
    """Train a case and report what this rank has."""
    if case.without is not None:
        leave_out(case.without)
    run = build(case)
    batches = run.data.train_batches(run.data_place, **run.loader_shape)
    losses, norms, router_losses = [], [], {}
    for _ in range(case.steps):
        result = train_step(run, batches)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        router_losses = read_router_losses(run)
    pieces = list(shards(run.model, adapters=case.peft is not None))
    weights: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
    for piece in pieces:
        weights.setdefault(piece.key, []).append((piece.global_offset, _data(piece).clone()))
    return Outcome(losses, norms, weights, {p.key: tuple(p.global_shape) for p in pieces}, router_losses)


def read_router_losses(run: TrainingRun) -> dict[str, float]:
    """Megatron's router losses of the step just made: mean over layers and microbatches, reduced over ranks."""
    found: dict[str, Any] = {}
    get_moe_metrics_tracker().report(
        loss_scale=1 / run.topology.num_microbatches(run.batch),
        iteration=0,
        num_layers=run.config.num_layers,
        total_loss_dict=found,
    )
    return {name: float(value) for name, value in found.items()}


def shards(model: list[Any], *, adapters: bool) -> Iterator[ShardedTensor]:
    """A model's (or its adapters') tensors with their place in the whole."""
    state = model_state(model, adapters_only=adapters)
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value


def _data(piece: ShardedTensor) -> Tensor:
    assert piece.data is not None
    return piece.data.detach()


def fill(model: list[Any], *, adapters: bool) -> None:
    """Overwrite weights with values that depend on the key and the place only: norms near 1, the rest small."""
    with torch.no_grad():
        for piece in shards(model, adapters=adapters):
            whole = start_weight(piece.key, tuple(piece.global_shape))
            _data(piece).copy_(whole[_place(piece)].view(_data(piece).shape))
    if not adapters:
        for weight in quantized_weights(model):
            memory, pieces = weight.allocated(torch.float32)
            for piece in pieces:
                start = start_weight(piece.key, piece.whole)[window(piece.offsets, piece.sizes)]
                piece.tensor.copy_(start.view(piece.tensor.shape))
            quantize_into(weight.layer, memory)


def _place(piece: ShardedTensor) -> tuple[slice, ...]:
    ends = [1] * piece.prepend_axis_num + list(piece.local_shape)
    return window(piece.global_offset, ends)


def assemble(outcomes: list[Outcome]) -> dict[str, Tensor]:
    """Whole weights from all ranks' pieces.

    Raises:
        AssertionError: two ranks hold different copies of one piece, or a piece is missing.
    """
    whole = {key: torch.full(shape, torch.nan) for o in outcomes for key, shape in o.shapes.items()}
    for rank, outcome in enumerate(outcomes):
        for key, pieces in outcome.weights.items():
            for offset, piece in pieces:
                shape = (1,) * (len(offset) - piece.dim()) + tuple(piece.shape)
                place = whole[key][window(offset, shape)]
                if not place.isnan().all():
                    assert torch.equal(place, piece.view(shape)), f"rank {rank} holds another copy of {key}"
                place.copy_(piece.view(shape))
    missing = [key for key, value in whole.items() if value.isnan().any()]
    assert not missing, f"no rank holds {missing}"
    return whole


@functools.cache
def start_weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """The value every layout starts from, to be read only. Vocabulary rows do not depend on how many pad them."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    rows = 256 if is_vocabulary(key) else shape[0]
    whole = torch.randn(rows, *shape[1:], generator=generator)[: shape[0]] * 0.1
    return whole + 1.0 if "norm" in key or key.endswith("magnitude") else whole


def is_vocabulary(key: str) -> bool:
    """Whether a weight has one row per token of the vocabulary."""
    return key.startswith(("embedding.word_embeddings", "output_layer"))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())

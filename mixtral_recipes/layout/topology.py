"""Every parallel size of a run and its arithmetic.

Nothing else in this package computes ``world_size // (tp * pp * cp)``; ask a `Topology`.
"""

from dataclasses import dataclass, fields
from typing import Any

from mixtral_recipes.layout.shapes import BatchShape

EXPERTS = 8  # of every Mixtral


@dataclass(frozen=True)
class Topology:
    """How a run's processes are laid out over Megatron's parallel axes.

    Attributes:
        world_size: Processes, one per GPU.
        tensor_model_parallel_size: Ranks that share each matrix outside the experts.
        pipeline_model_parallel_size: Consecutive groups of layers.
        virtual_pipeline_model_parallel_size: Interleaved model chunks per pipeline rank; None for one.
        context_parallel_size: Ranks that share each sequence.
        expert_model_parallel_size: Ranks the experts are spread over.
        expert_tensor_parallel_size: Ranks that share each expert's matrices; None means the tensor-parallel size.
        sequence_parallel: Whether tensor-parallel ranks split the sequence outside matrix products.
    """

    world_size: int = 1
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False

    @staticmethod
    def of(trainer: Any) -> "Topology":
        """The layout a trainer asks for, whether already built or still a `run.Config` of one."""
        strategy = trainer.strategy
        sizes = {field.name: getattr(strategy, field.name) for field in fields(Topology) if field.name != "world_size"}
        return Topology(world_size=trainer.num_nodes * trainer.devices, **sizes)

    def settings(self) -> dict[str, Any]:
        """The layout as arguments of `MegatronStrategy`, the inverse of `of`."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "world_size"}

    @property
    def expert_tp(self) -> int:
        """The expert tensor-parallel size with its default filled in."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the dense weights: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold one copy of all experts: ETP x EP x PP."""
        return self.expert_tp * self.expert_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model that read different data."""
        return self.world_size // self.model_ranks

    @property
    def expert_data_parallel_size(self) -> int:
        """Copies of each expert."""
        return self.world_size // self.expert_ranks

    @property
    def context_slices(self) -> int:
        """Slices context parallelism cuts each sequence into: two for each rank, for balance; 1 without it."""
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1

    def megatron_sizes(self) -> dict[str, Any]:
        """Every parallel size under its name in Megatron's config and in `initialize_model_parallel`."""
        found = self.settings() | {"expert_tensor_parallel_size": self.expert_tp}
        return {name: size for name, size in found.items() if name != "sequence_parallel"}

    def num_microbatches(self, batch: BatchShape) -> int:
        """Forward passes per optimizer step on each data-parallel rank."""
        return batch.global_batch_size // (batch.micro_batch_size * self.data_parallel_size)

    def describe(self) -> str:
        """One line, in the order people write it: ``TP1 PP4 VPP8 CP1 EP8 DP16``."""
        parts = {
            "TP": self.tensor_model_parallel_size,
            "PP": self.pipeline_model_parallel_size,
            "VPP": self.virtual_pipeline_model_parallel_size,
            "CP": self.context_parallel_size,
            "EP": self.expert_model_parallel_size,
            "ETP": self.expert_tensor_parallel_size,
            "DP": self.data_parallel_size,
        }
        return " ".join(f"{k}{v}" for k, v in parts.items() if v) + (" SP" if self.sequence_parallel else "")


def fp8_weights_pay(layout: Topology, *, frozen: bool) -> bool:
    """Whether it pays to keep weights in FP8 rather than to cast bf16 ones for their products.

    For frozen ones it does: they are cast once, when they are read. For trained ones where several ranks gather the
    same experts, which are nearly all of a Mixtral. On one rank there is nothing to gather, and casting every weight in
    the optimizer's step cost a quarter of the speed (one H200, three layers of 8x7B, delayed scaling: 45,800 tokens/s;
    62,200 without).

    Args:
        layout: The run's.
        frozen: Whether only adapters are trained.
    """
    return frozen or layout.expert_data_parallel_size > 1


def sizes(layout: Topology) -> list[tuple[str, int]]:
    """Every parallel size by its name, defaults filled in."""
    return [
        ("tensor_model_parallel_size", layout.tensor_model_parallel_size),
        ("pipeline_model_parallel_size", layout.pipeline_model_parallel_size),
        ("virtual_pipeline_model_parallel_size", _value(layout.virtual_pipeline_model_parallel_size)),
        ("context_parallel_size", layout.context_parallel_size),
        ("expert_model_parallel_size", layout.expert_model_parallel_size),
        ("expert_tensor_parallel_size", _value(layout.expert_tensor_parallel_size, layout.tensor_model_parallel_size)),
    ]


def _value(size: int | None, default: int = 1) -> int:
    return default if size is None else size


def divisors(number: int) -> list[int]:
    """Every divisor, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def token_slices(layout: Topology) -> int:
    """Slices each sequence is cut into: 2 x CP under context parallelism, times TP under sequence parallelism."""
    return layout.context_slices * (layout.tensor_model_parallel_size if layout.sequence_parallel else 1)

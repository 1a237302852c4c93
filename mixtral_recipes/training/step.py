"""One training step, and one validation. `train_step` reads top to bottom; everything it calls is Megatron's.

Shape suffixes: b sequences of a microbatch, s tokens per sequence.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor

from mixtral_recipes.checkpoints.fp8 import unmoved_fp8_state
from mixtral_recipes.data.batches.batch import Batch
from mixtral_recipes.data.batches.context_parallel import this_ranks_share
from mixtral_recipes.training.guards.anomalies import Update, checked_step, where_not_finite
from mixtral_recipes.training.run import TrainingRun


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step.

    Attributes:
        loss: Mean over the global batch's label tokens.
        label_tokens: How many those were.
        tokens: Real tokens processed, padding aside.
        grad_norm: Before clipping.
        updated: False when the weights stayed as they were (fp16 overflow, or ``trouble``).
        num_zeros_in_grad: Of the gradient's entries; None where they are not counted.
        trouble: What was not finite, and on which rank; None when all was.
        by_source: The loss of each source of a mixture that had a label token in the batch.
        data_wait: Seconds until the batches were there.
        host_wait: Seconds the host waited for the device, and for other ranks, once all was asked of them.
    """

    loss: float
    label_tokens: int
    tokens: int
    grad_norm: float
    updated: bool
    num_zeros_in_grad: int | None = None
    trouble: str | None = None
    by_source: dict[str, float] = field(default_factory=dict)
    data_wait: float = 0.0
    host_wait: float = 0.0


class Losses(NamedTuple):
    """Losses per label token: of all, and of each source of a mixture that had one."""

    loss: float
    by_source: dict[str, float]

    @classmethod
    def of(cls, sums: list[float], names: list[str]) -> "Losses":
        """From what `reduce_sums` gave."""
        per_source = zip(names, sums[3 : 3 + len(names)], sums[3 + len(names) :], strict=True)
        return cls(sums[0] / max(sums[1], 1.0), {name: total / count for name, total, count in per_source if count})


def train_step(run: TrainingRun, batches: Iterator[Batch]) -> StepResult:
    """One optimizer step over one global batch.

    Args:
        run: This rank's run.
        batches: Microbatches of this rank.
    """
    for chunk in run.ddp:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    # MXFP8 weights that are gathered during the forward pass lie in the gradients' memory until then.
    run.optimizer.prepare_model_params_for_param_sync()

    # Forward and backward of all microbatches; gradients end as sums over ranks, divided by all label tokens.
    started = time.perf_counter()
    microbatches = _next_microbatches(batches, run)
    given = time.perf_counter()
    run.config.moe_grad_scale_func = partial(run.optimizer.scale_loss, learned_share(microbatches, run.device))
    sums = _forward(run, microbatches, backward=True)

    # Look before updating: a loss or a gradient that is not finite must not reach the weights. To look is to wait.
    launched = time.perf_counter()
    totals = reduce_sums(sums, run.device, len(run.data.source_names))
    host_wait = time.perf_counter() - launched
    loss, by_source = Losses.of(totals, run.data.source_names)

    # Clips over all parallel groups, updates this rank's shard, gathers the parameters.
    update = checked_step(run.optimizer) if math.isfinite(loss) else Update(updated=False, grad_norm=math.nan)
    if update.updated:
        run.scheduler.step(increment=1)

    grad_norm = update.grad_norm
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    return StepResult(
        loss=loss,
        label_tokens=int(totals[1]),
        tokens=int(totals[2]),
        **update._asdict(),
        by_source=by_source,
        data_wait=given - started,
        host_wait=host_wait,
        trouble=None
        if finite
        else where_not_finite(run.model, sums, loss, grad_norm, partial(_forward, run, microbatches, backward=False)),
    )


def _next_microbatches(batches: Iterator[Batch], run: TrainingRun) -> list[Batch]:
    return list(islice(batches, run.topology.num_microbatches(run.batch)))


def learned_share(microbatches: list[Batch], device: torch.device) -> Tensor:
    """What part of the global batch's real tokens are labels: a scalar on the device.

    Megatron weighs a microbatch's router losses by its real tokens, and the division by all label tokens is theirs too.
    Without this factor a coefficient would count for many times what it says where few tokens are learned.

    Args:
        microbatches: This rank's.
        device: Where the model is.
    """
    counts = torch.zeros(2)
    for batch in microbatches:
        padding = batch.get("padding_mask")
        real = batch["tokens"].numel() - (padding.sum() if padding is not None else 0)
        counts += torch.stack([batch["loss_mask"].sum(), torch.as_tensor(real)])
    counts = to_device(device, counts)
    group: Any = parallel_state.get_data_parallel_group()
    torch.distributed.all_reduce(counts, group=group)
    return counts[0] / counts[1]


def _forward(run: TrainingRun, microbatches: list[Batch], *, backward: bool) -> list[Tensor]:
    """All microbatches through the model, and back where that is asked for; `sum_losses`' last for each."""
    # Megatron wants one iterator per interleaved chunk; they all see the same microbatches.
    iterators = [iter(microbatches) for _ in run.ddp]
    with contextlib.nullcontext() if backward else torch.no_grad():
        return run.forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=run.ddp,
            num_microbatches=run.topology.num_microbatches(run.batch),
            seq_length=run.batch.seq_length,
            micro_batch_size=run.batch.micro_batch_size,
            forward_only=not backward,
        )


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """Megatron's forward-step function: one microbatch through one model chunk.

    Returns:
        Per-token losses [b, s] (or activations on an earlier pipeline stage), and the function that sums them.
    """
    batch = this_ranks_share(
        next(batches), parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    )
    device = next(model.parameters()).device
    on_device = {name: to_device(device, tensor) for name, tensor in batch.items()}  # pyright: ignore[reportArgumentType]
    output = model(
        on_device["tokens"],
        on_device["position_ids"],
        None,  # the attention mask: causal, made inside the attention kernel
        labels=on_device["labels"],
        packed_seq_params=_packed(batch.get("cu_seqlens"), device),
        padding_mask=on_device.get("padding_mask"),
    )
    masks = on_device["loss_mask"], on_device.get("padding_mask"), on_device.get("sources")
    return output, partial(sum_losses, *masks)


def sum_losses(
    loss_mask: Tensor, padding: Tensor | None, sources: Tensor | None, losses: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the losses of label tokens; Megatron divides by the global batch's count of them.

    Args:
        loss_mask: [b, s], 1.0 where the loss counts.
        padding: [b, s], True where there is no token; None without padding.
        sources: [b, s, sources], which source each token is of; None where there is one.
        losses: [b, s], float32.

    Returns:
        The sum, the count (int), and [sum, count, real tokens] detached, for the log, followed by each source's sum and
        each source's count.
    """
    mask = loss_mask.flatten().float()
    total = (losses.flatten().float() * mask).sum()
    count = mask.sum()
    # Made on the device: to bring a number there is to wait for it.
    real = padding.logical_not().sum().to(total) if padding is not None else torch.full_like(count, losses.numel())
    logged = torch.stack([total.detach(), count, real])
    if sources is not None:
        of = sources.flatten(0, 1).float()
        logged = torch.cat([logged, (losses.detach().flatten().float() * mask) @ of, mask @ of])
    return total, count.int(), logged


def reduce_sums(sums: list[Tensor], device: torch.device, num_sources: int) -> list[float]:
    """Add up [loss sum, label tokens, real tokens] over microbatches, data ranks and to every pipeline stage.

    Behind these three are the loss sums and the label tokens of each source of a mixture.
    """
    total = torch.stack(sums).sum(0) if sums else torch.zeros(3 + 2 * num_sources, device=device)
    groups: list[Any] = [
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_group(),
    ]
    for group in groups:
        torch.distributed.all_reduce(total, group=group)
    return total.tolist()


def to_device(device: torch.device, tensor: Tensor) -> Tensor:
    """A copy on the device; the host does not wait, as it would for more than 64 KB of memory that is not pinned."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _packed(cu_seqlens: Tensor | None, device: torch.device) -> PackedSeqParams | None:
    """A pack's borders, described on the device; its longest sample is found on the host, where they come from."""
    if cu_seqlens is None:
        return None
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    borders = to_device(device, cu_seqlens)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def validate(run: TrainingRun, alive: Callable[[], None] = lambda: None) -> Losses | None:
    """Mean losses over the validation set's label tokens; None without one.

    Args:
        run: This rank's run.
        alive: Called before each batch.
    """
    batches = run.data.validation_batches(
        run.data_place, limit_batches=run.trainer.limit_val_batches, **run.loader_shape
    )
    if batches is None:
        return None
    run.gather_parameters()
    for chunk in run.ddp:
        chunk.eval()
    names = run.data.source_names
    totals = [0.0] * (3 + 2 * len(names))
    multiple = run.loader_shape["sequence_multiple"]
    with unmoved_fp8_state(run.model):
        for _ in range(run.data.num_validation_batches(run.trainer.limit_val_batches, sequence_multiple=multiple)):
            alive()
            sums = _forward(run, _next_microbatches(batches, run), backward=False)
            totals = [a + b for a, b in zip(totals, reduce_sums(sums, run.device, len(names)), strict=True)]
    for chunk in run.ddp:
        chunk.train()
    get_moe_metrics_tracker().clear()
    return Losses.of(totals, names)

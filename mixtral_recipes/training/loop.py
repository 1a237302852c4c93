"""The training loop. `train_step` reads top to bottom; everything it calls is Megatron's.

Shape suffixes: b sequences of a microbatch, s tokens per sequence.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor

from mixtral_recipes.data.batch import Batch
from mixtral_recipes.data.context_parallel import this_ranks_share
from mixtral_recipes.errors import Preempted, RecipeError
from mixtral_recipes.models import cpu_device
from mixtral_recipes.training import callbacks
from mixtral_recipes.training.checkpoint import Checkpointer, ModelCheckpoint, Position
from mixtral_recipes.training.metrics import RunLog
from mixtral_recipes.training.router_health import RouterHealth, imbalance
from mixtral_recipes.training.setup import TrainingRun
from mixtral_recipes.training.signals import StopRequest, watching


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave.

    Attributes:
        loss: Mean over the global batch's label tokens.
        label_tokens: How many those were.
        tokens: Real tokens processed, padding aside.
        grad_norm: Before clipping.
        updated: False when the optimizer skipped the step (fp16 overflow).
    """

    loss: float
    label_tokens: int
    tokens: int
    grad_norm: float
    updated: bool


def train_step(run: TrainingRun, batches: Iterator[Batch]) -> StepResult:
    """One optimizer step over one global batch.

    Args:
        run: This rank's run.
        batches: Microbatches of this rank.
    """
    for chunk in run.ddp:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()

    # Forward and backward of all microbatches; gradients end as sums over ranks, divided by all label tokens.
    sums = run.forward_backward(
        forward_step_func=forward_step,
        data_iterator=_per_chunk(batches, run),
        model=run.ddp,
        num_microbatches=run.topology.num_microbatches(run.batch),
        seq_length=run.batch.seq_length,
        micro_batch_size=run.batch.micro_batch_size,
        forward_only=False,
    )

    # Clips over all parallel groups, updates this rank's shard, gathers the parameters.
    with cpu_device.cuda_type_names():
        updated, grad_norm, _ = run.optimizer.step()
    if updated:
        run.scheduler.step(increment=1)

    loss_sum, label_tokens, tokens = reduce_sums(sums, run.device)
    return StepResult(
        loss=loss_sum / max(label_tokens, 1.0),
        label_tokens=int(label_tokens),
        tokens=int(tokens),
        grad_norm=float(grad_norm if grad_norm is not None else 0.0),
        updated=bool(updated),
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
    on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}  # pyright: ignore[reportAttributeAccessIssue]
    output = model(
        on_device["tokens"],
        on_device["position_ids"],
        None,  # the attention mask: causal, made inside the attention kernel
        labels=on_device["labels"],
        packed_seq_params=_packed(on_device.get("cu_seqlens")),
        padding_mask=on_device.get("padding_mask"),
    )
    return output, partial(sum_losses, on_device["loss_mask"], on_device.get("padding_mask"))


def sum_losses(loss_mask: Tensor, padding: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the losses of label tokens; Megatron divides by the global batch's count of them.

    Args:
        loss_mask: [b, s], 1.0 where the loss counts.
        padding: [b, s], True where there is no token; None without padding.
        losses: [b, s], float32.

    Returns:
        The sum, the count (int), and [sum, count, real tokens] detached, for the log.
    """
    mask = loss_mask.flatten().float()
    total = (losses.flatten().float() * mask).sum()
    count = mask.sum()
    real = padding.logical_not().sum() if padding is not None else torch.tensor(losses.numel())
    return total, count.int(), torch.stack([total.detach(), count, real.to(total)])


def reduce_sums(sums: list[Tensor], device: torch.device) -> tuple[float, float, float]:
    """Add up [loss sum, label tokens, real tokens] over microbatches, data ranks and to every pipeline stage."""
    total = torch.stack(sums).sum(0) if sums else torch.zeros(3, device=device)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    loss_sum, label_tokens, tokens = total.tolist()
    return loss_sum, label_tokens, tokens


def _packed(cu_seqlens: Tensor | None) -> PackedSeqParams | None:
    if cu_seqlens is None:
        return None
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _per_chunk(batches: Iterator[Batch], run: TrainingRun) -> Any:
    """Megatron wants one iterator per interleaved chunk; they all see the same microbatches."""
    if len(run.ddp) == 1:
        return batches
    count = run.topology.num_microbatches(run.batch)
    step = [next(batches) for _ in range(count)]
    return [iter(step) for _ in run.ddp]


def validate(run: TrainingRun) -> float | None:
    """Mean loss over the validation set's label tokens; None without one."""
    batches = run.data.validation_batches(
        run.data_place, limit_batches=run.trainer.limit_val_batches, **run.loader_shape
    )
    if batches is None:
        return None
    for chunk in run.ddp:
        chunk.eval()
    totals = [0.0, 0.0]
    multiple = run.loader_shape["sequence_multiple"]
    for _ in range(run.data.num_validation_batches(run.trainer.limit_val_batches, sequence_multiple=multiple)):
        with torch.no_grad():
            sums = run.forward_backward(
                forward_step_func=forward_step,
                data_iterator=_per_chunk(batches, run),
                model=run.ddp,
                num_microbatches=run.topology.num_microbatches(run.batch),
                seq_length=run.batch.seq_length,
                micro_batch_size=run.batch.micro_batch_size,
                forward_only=True,
            )
        loss_sum, label_tokens, _ = reduce_sums(sums, run.device)
        totals[0] += loss_sum
        totals[1] += label_tokens
    for chunk in run.ddp:
        chunk.train()
    get_moe_metrics_tracker().clear()
    return totals[0] / max(totals[1], 1.0)


def fit(run: TrainingRun, position: Position, checkpointer: Checkpointer, log: RunLog) -> dict[str, Any]:
    """Train from a position to ``trainer.max_steps``, validating and saving on the way.

    Returns:
        first_loss, last_loss, val_loss, steps, tokens_per_second, seconds, checkpoint.

    Raises:
        Preempted: a stop signal arrived; the run saved first.
        RecipeError: the loss or the gradient became NaN or infinite.
    """
    signals = ["SIGTERM", *_extra_signals(run)]
    with watching(*signals) as stop:
        loop = _Loop(run, position, checkpointer, log, stop)
        callbacks.call(run.trainer.callbacks, "on_train_start", run)
        while position.step < run.trainer.max_steps:
            loop.one_step()
        callbacks.call(run.trainer.callbacks, "on_train_end", run)
        return loop.finish()


def _extra_signals(run: TrainingRun) -> list[str]:
    return [c.sig for c in run.trainer.callbacks or [] if getattr(c, "sig", None)]


class _Loop:
    """What happens around `train_step`: metrics, validation, checkpoints, stopping."""

    def __init__(
        self, run: TrainingRun, position: Position, checkpointer: Checkpointer, log: RunLog, stop: StopRequest
    ) -> None:
        self.run = run
        self.position = position
        self.checkpointer = checkpointer
        self.log = log
        self.stop = stop
        self.batches = run.data.train_batches(
            run.data_place, consumed_samples=position.consumed_samples, **run.loader_shape
        )
        self.health = RouterHealth(run.model, run.config.num_layers, run.config.num_moe_experts or 1, run.device)
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.val_loss: float | None = None
        self.start_step = position.step
        self.tokens = 0
        self.seconds = 0.0
        self.last_save = time.monotonic()
        self.saved_step = position.step if position.step else -1
        self.checkpoint = None

    def one_step(self) -> None:
        """One optimizer step and all that follows from it."""
        run, position = self.run, self.position
        started = time.monotonic()
        lr = run.optimizer.param_groups[0]["lr"]
        result = train_step(run, self.batches)
        elapsed = time.monotonic() - started
        position.step += 1
        position.consumed_samples += run.batch.global_batch_size
        self._check_finite(result)
        self.tokens += result.tokens
        self.seconds += elapsed
        self.first_loss = result.loss if self.first_loss is None else self.first_loss
        self.last_loss = result.loss
        self._report(result, lr, elapsed)
        if self._due(run.trainer.val_check_interval) and position.step < run.trainer.max_steps:
            self._validate()
        self._save_or_stop()

    def _check_finite(self, result: StepResult) -> None:
        if not (math.isfinite(result.loss) and (math.isfinite(result.grad_norm) or not result.updated)):
            raise RecipeError(
                f"step {self.position.step}: loss {result.loss}, gradient norm {result.grad_norm}; last good checkpoint: "
                f"{self.checkpoint or 'none'}. Lower optim.config.lr or look at the data of this step."
            )

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.position.step % interval == 0  # pyright: ignore[reportOperatorIssue]

    def _report(self, result: StepResult, lr: float, elapsed: float) -> None:
        run, step = self.run, self.position.step
        metrics: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "label_tokens": result.label_tokens,
            "tokens": result.tokens,
            "tokens_per_second": result.tokens / elapsed,
            "eta_seconds": (run.trainer.max_steps - step) * self.seconds / max(1, self._steps_here()),
            "updated": result.updated,
        }
        show = self._due(run.trainer.log_every_n_steps) or step == run.trainer.max_steps or self._steps_here() == 1
        load = self.health.read()
        metrics["expert_imbalance"] = imbalance(load)
        if show:
            metrics["expert_load"] = load.int().tolist()
        get_moe_metrics_tracker().clear()
        callbacks.call(run.trainer.callbacks, "on_step_end", run, metrics)
        self.log.training(metrics, show=show)

    def _steps_here(self) -> int:
        """Steps since this process started."""
        return self.position.step - self.start_step

    def _validate(self) -> None:
        self.val_loss = validate(self.run)
        if self.val_loss is not None:
            metrics = {"step": self.position.step, "val_loss": self.val_loss}
            callbacks.call(self.run.trainer.callbacks, "on_validation_end", self.run, metrics)
            self.log.validation(metrics)

    def _save_or_stop(self) -> None:
        policy: ModelCheckpoint = self.checkpointer.policy
        interval = policy.train_time_interval
        # Clocks and signals differ between ranks: rank 0's clock and anyone's signal count, the same for all.
        due = interval is not None and time.monotonic() - self.last_save >= interval.total_seconds()
        wishes = torch.tensor(
            [float(self.stop.received is not None), float(due and torch.distributed.get_rank() == 0)],
            device=self.run.device,
        )
        torch.distributed.all_reduce(wishes, op=torch.distributed.ReduceOp.MAX)
        stop, due = wishes.bool().tolist()
        last = self.position.step >= self.run.trainer.max_steps
        if stop or due or (self._due(policy.every_n_train_steps) and not last):
            self._save()
        if stop and not last:
            raise Preempted(
                f"stopped by {self.stop.received or 'a signal on another rank'} at step {self.position.step}; saved "
                f"{self.checkpoint}; start the same command again to go on."
            )

    def _save(self) -> None:
        if self.saved_step == self.position.step:
            return
        metrics = {"val_loss": self.val_loss} if self.val_loss is not None else {}
        metrics |= {"loss": self.last_loss} if self.last_loss is not None else {}
        self.checkpoint = self.checkpointer.save(self.position, metrics)
        self.saved_step, self.last_save = self.position.step, time.monotonic()
        self.log.say(f"step {self.position.step}/{self.run.trainer.max_steps}  saved {self.checkpoint}")

    def finish(self) -> dict[str, Any]:
        """Validate and save at the end, and say how it went."""
        if self.last_loss is not None:
            self._validate()
            self._save()
        return {
            "steps": self.position.step,
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "val_loss": self.val_loss,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else None,
            "train_seconds": round(self.seconds, 2),
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
        }

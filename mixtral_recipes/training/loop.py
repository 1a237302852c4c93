"""The training loop: `train_step` until the last step, and what happens around each one.

Around a step: metrics, validation, checkpoints, stopping.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from mixtral_recipes.checkpoints.checkpointer import Checkpointer, Position
from mixtral_recipes.errors import CheckpointError, EnvironmentProblem, Preempted, RecipeError
from mixtral_recipes.peft.attach import adapters_of
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.system.files import write_json
from mixtral_recipes.system.ranks import rank_and_size
from mixtral_recipes.training.guards.anomalies import SpikeWatch
from mixtral_recipes.training.guards.signals import StopRequest, name_of, watching
from mixtral_recipes.training.guards.watchdog import Watchdog
from mixtral_recipes.training.precision import in_words
from mixtral_recipes.training.prepare import Ready
from mixtral_recipes.training.run import TrainingRun
from mixtral_recipes.training.step import StepResult, to_device, train_step, validate
from mixtral_recipes.training.watch import callbacks, throughput
from mixtral_recipes.training.watch.environment import describe_environment
from mixtral_recipes.training.watch.log import RunLog, speed_line
from mixtral_recipes.training.watch.router_health import CollapseWatch, RouterHealth, read_aux_losses


def fit(ready: Ready, log: RunLog) -> dict[str, Any]:
    """Train from where a run starts to ``trainer.max_steps``, validating and saving on the way.

    Returns:
        steps, first_loss, last_loss, val_loss, what `Speed.result` gives, skipped_steps, checkpoint, world_size,
        expert_model_parallel_size, topology, run_dir; also in RUN/result.json.

    Raises:
        Preempted: a stop signal arrived; the run saved first.
        RecipeError: the loss or the gradient became NaN or infinite; nothing was updated.
        EnvironmentProblem: a checkpoint could not be written.
    """
    run, position, topology = ready.run, ready.position, ready.run.topology
    log.say(f"{topology.world_size} process(es), {topology.describe()}; {ready.opening}")
    if in_fp8 := in_words(run.trainer.plugins):
        log.say(in_fp8)
    if run.computed_by is not None:
        log.say(str(run.computed_by))
        for note in run.computed_by.notes:
            log.say(f"warning: {note}")
    log.event("start", ready.facts() | {"environment": describe_environment(run.device, run.computed_by)})
    hooks = run.trainer.callbacks
    rank, _ = rank_and_size()
    watchdog = Watchdog(run.trainer.hang_timeout_seconds, log.run_dir / "stacks", rank)
    more = [name_of(hook.sig) for hook in hooks or [] if getattr(hook, "sig", None)]
    with watching(*more) as stop, watchdog.watching():
        loop = _Loop(run, position, ready.checkpointer, log, stop, watchdog)
        callbacks.call(hooks, "on_train_start", run)
        try:
            while position.step < run.trainer.max_steps:
                loop.one_step()
            result = loop.finish()
        finally:
            callbacks.call(hooks, "on_train_end", run)
            loop.health.close()
    result |= {
        "checkpoint": result["checkpoint"] or (str(ready.found) if ready.found else None),
        "world_size": topology.world_size,
        "expert_model_parallel_size": topology.expert_model_parallel_size,
        "topology": topology.describe(),
        "run_dir": str(log.run_dir),
    }
    log.event("end", result)
    if log.is_writer:
        write_json(log.run_dir / "result.json", result)
    return result


class _Loop:
    """One run from its position to its end, step by step."""

    def __init__(
        self,
        run: TrainingRun,
        position: Position,
        checkpointer: Checkpointer,
        log: RunLog,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self.run = run
        self.position = position
        self.checkpointer = checkpointer
        self.log = log
        self.stop = stop
        self.watchdog = watchdog
        checkpointer.prepare()
        self.batches = run.data.train_batches(
            run.data_place, consumed_samples=position.consumed_samples, **run.loader_shape
        )
        self.health = RouterHealth(run.model, run.config.num_layers, run.config.num_moe_experts or 1, run.device)
        self.collapse = CollapseWatch()
        self.spikes = SpikeWatch()
        self.adapters_only = bool(adapters_of(run.model))
        self.peak = throughput.peak_tflops(run.device, fp8=bool(run.trainer.plugins.fp8))
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.val_loss: float | None = None
        self.start_step = position.step
        self.speed = throughput.Speed()
        self.last_save = time.monotonic()
        self.saved_step = position.step if position.step else -1
        self.checkpoint: str | None = None
        self.saves = run.trainer.enable_checkpointing
        self.save_due = False

    def one_step(self) -> None:
        """One optimizer step and all that follows from it."""
        run, position = self.run, self.position
        self.watchdog.alive(f"step {position.step + 1}")
        callbacks.call(run.trainer.callbacks, "on_step_start", run, position.step + 1)
        started = time.monotonic()
        lr = run.optimizer.param_groups[0]["lr"]
        result = train_step(run, self.batches)
        elapsed = time.monotonic() - started
        if result.trouble is not None:
            self._skip_or_stop(result.trouble)
        position.step += 1
        position.consumed_samples += run.batch.global_batch_size
        spent = self._spent(result, elapsed)
        self.speed.add(spent)
        if result.trouble is None:
            self.first_loss = result.loss if self.first_loss is None else self.first_loss
            self.last_loss = result.loss
        self._report(result, lr, spent)
        if self._due(run.trainer.val_check_interval) and position.step < run.trainer.max_steps:
            self._validate()
        self._save_or_stop()

    def _skip_or_stop(self, trouble: str) -> None:
        """Count a step that was not finite, or end the run; the weights are as before the step either way."""
        step, allowed = self.position.step + 1, self.run.trainer.max_skipped_steps
        if self.position.skipped_steps < allowed:
            self.position.skipped_steps += 1
            self.log.say(
                f"WARNING: step {step} skipped: {trouble}; skipped {self.position.skipped_steps} of at most {allowed} "
                "(trainer.max_skipped_steps)."
            )
            return
        self._finish_save()
        skipped = f" {allowed} step(s) had already been skipped." if allowed else ""
        # Before the first update of this process the learning rate has had no say.
        first = "Lower optim.config.lr, check" if self._steps_here() else "Check the starting weights and"
        raise RecipeError(
            f"step {step}: {trouble}; nothing was updated.{skipped} Last good checkpoint: {self.checkpoint or 'none'}. "
            f"{first} this step's data, or set trainer.max_skipped_steps."
        )

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.position.step % interval == 0  # pyright: ignore[reportOperatorIssue]

    def _report(self, result: StepResult, lr: float, spent: throughput.Spent) -> None:
        run, step = self.run, self.position.step
        show = self._due(run.trainer.log_every_n_steps) or step == run.trainer.max_steps or self._steps_here() == 1
        metrics: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "label_tokens": result.label_tokens,
            "tokens": result.tokens,
            "seconds": spent.seconds,
            "data_wait_seconds": spent.data_wait,
            "host_wait_seconds": spent.host_wait,
            "tokens_per_second": result.tokens / spent.seconds,
            "eta_seconds": (run.trainer.max_steps - step) * self.speed.seconds_per_step,
            "updated": result.updated,
            "skipped_steps": self.position.skipped_steps,
        }
        metrics |= throughput.memory(run.device)
        metrics |= {f"loss/{name}": loss for name, loss in result.by_source.items()}
        if result.num_zeros_in_grad is not None:
            metrics["num_zeros_in_grad"] = result.num_zeros_in_grad
        metrics |= self._tflops(spent)
        metrics |= self._routing(show)
        if result.trouble is None and self.spikes.is_spike(result.loss):
            metrics["loss_spike"] = True
            self.log.say(f"WARNING: step {step}: the loss spiked to {result.loss:.4f}.")
        callbacks.call(run.trainer.callbacks, "on_step_end", run, metrics)
        self.log.training(metrics, show=show)

    def _spent(self, result: StepResult, seconds: float) -> throughput.Spent:
        sequence = result.tokens / self.run.batch.global_batch_size
        flops = throughput.flops_per_token(self.run.config, sequence, adapters_only=self.adapters_only) * result.tokens
        return throughput.Spent(result.tokens, flops, seconds, result.data_wait, result.host_wait)

    def _tflops(self, spent: throughput.Spent) -> dict[str, float]:
        tflops = spent.flops / spent.seconds / self.run.topology.world_size / 1e12
        return {"tflops_per_process": tflops} | ({"share_of_peak": tflops / self.peak} if self.peak else {})

    def _routing(self, show: bool) -> dict[str, Any]:
        """Router health of this step; per layer on the steps that are shown."""
        routing = self.health.read()
        for warning in self.collapse.look(routing):
            self.log.say(warning)
        found: dict[str, Any] = {
            "expert_imbalance": routing.imbalance,
            "router_entropy": float(routing.entropy.min()),
            "dropped_share": routing.dropped_share,
        }
        if show:
            found["expert_load"] = routing.load.int().tolist()
            found["dropped_tokens"] = routing.dropped.int().tolist()
            found["router_losses"] = read_aux_losses(
                self.run.config.num_layers, self.run.topology.num_microbatches(self.run.batch)
            )
        get_moe_metrics_tracker().clear()
        return found

    def _steps_here(self) -> int:
        """Steps since this process started."""
        return self.position.step - self.start_step

    def _validate(self) -> None:
        found = validate(self.run, lambda: self.watchdog.alive(f"the validation after step {self.position.step}"))
        if found is not None:
            self.val_loss = found.loss
            metrics = {"step": self.position.step, "val_loss": found.loss}
            metrics |= {f"val_loss/{name}": loss for name, loss in found.by_source.items()}
            callbacks.call(self.run.trainer.callbacks, "on_validation_end", self.run, metrics)
            self.log.validation(metrics)

    def _save_or_stop(self) -> None:
        policy: ModelCheckpoint = self.checkpointer.policy
        interval = policy.train_time_interval
        # Clocks, signals and disks differ between ranks: rank 0's clock, anyone's signal, and an asynchronous save
        # when the last rank has heard how it ended count, the same for all.
        late = interval is not None and time.monotonic() - self.last_save >= interval.total_seconds()
        rank_0s = late and torch.distributed.get_rank() == 0
        here = [self.stop.received is not None, rank_0s, self.checkpointer.unfinished()]
        wishes = to_device(self.run.device, torch.tensor(here, dtype=torch.float32))
        torch.distributed.all_reduce(wishes, op=torch.distributed.ReduceOp.MAX)
        stop, late, saving = wishes.bool().tolist()
        if not saving:
            self._finish_save()
        last = self.position.step >= self.run.trainer.max_steps
        self.save_due = late or self._due(policy.every_n_train_steps)
        if stop or (self.save_due and not last):  # the last step's is validated first
            self._save()
        if stop and not last:
            self._finish_save()
            by = self.stop.received or "a signal on another rank"
            saved = f"saved {self.checkpoint}; run the same command again to continue"
            nothing = "nothing was saved (trainer.enable_checkpointing=False)"
            raise Preempted(f"stopped by {by} at step {self.position.step}; {saved if self.saves else nothing}.")

    def _save(self) -> None:
        if self.saved_step == self.position.step or not self.saves:
            return
        self._finish_save()
        metrics = {"val_loss": self.val_loss} if self.val_loss is not None else {}
        metrics |= {"loss": self.last_loss} if self.last_loss is not None and math.isfinite(self.last_loss) else {}
        self.watchdog.alive(f"the save after step {self.position.step}")
        started = time.monotonic()
        self.run.gather_parameters()
        with self._last_checkpoint_named():
            path = self.checkpointer.save(self.position, metrics)
        self.log.event("save", {"step": self.position.step, "stall_seconds": time.monotonic() - started})
        self.saved_step, self.last_save = self.position.step, time.monotonic()
        if not self.checkpointer.saving():
            self._saved(str(path))

    def _finish_save(self) -> None:
        """Take note of an asynchronous save that has ended, waiting for it if it has not."""
        self.watchdog.alive(f"the save before step {self.position.step + 1}")
        with self._last_checkpoint_named():
            path = self.checkpointer.wait()
        if path is not None:
            self._saved(str(path))

    @contextlib.contextmanager
    def _last_checkpoint_named(self) -> Iterator[None]:
        """Say in a failed save's error which checkpoint is still there."""
        try:
            yield
        except (EnvironmentProblem, CheckpointError) as error:
            last = f"the run's last checkpoint is {self.checkpoint}" if self.checkpoint else "the run has no checkpoint"
            raise type(error)(f"{error} {last[0].upper()}{last[1:]}.") from error

    def _saved(self, path: str) -> None:
        self.checkpoint = path
        self.log.say(f"step {self.position.step}/{self.run.trainer.max_steps}  saved {path}")

    def finish(self) -> dict[str, Any]:
        """Validate and save at the end, and say how it went."""
        if self._steps_here():
            self._validate()
            if self.save_due or self.checkpointer.policy.save_last:
                self._save()
        self._finish_save()
        speed = self.speed.result(self.run.topology.world_size, self.peak)
        if self._steps_here():
            self.log.say(speed_line(speed, throughput.memory(self.run.device)))
        return {
            "steps": self.position.step,
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "val_loss": self.val_loss,
            **speed,
            "skipped_steps": self.position.skipped_steps,
            "checkpoint": self.checkpoint,
        }

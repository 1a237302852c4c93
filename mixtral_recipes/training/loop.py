"""The training loop: `train_step` (`step.py`) until the last step, and what happens around each one (`upkeep.py`)."""

from typing import Any

from mixtral_recipes.checkpoints.checkpointer import Checkpointer, Position
from mixtral_recipes.system.ranks import rank_and_size
from mixtral_recipes.training.guards.signals import watching
from mixtral_recipes.training.guards.watchdog import Watchdog
from mixtral_recipes.training.run import TrainingRun
from mixtral_recipes.training.step import StepResult, train_step, validate
from mixtral_recipes.training.upkeep import Upkeep
from mixtral_recipes.training.watch import callbacks
from mixtral_recipes.training.watch.log import RunLog

__all__ = ["StepResult", "fit", "train_step", "validate"]


def fit(run: TrainingRun, position: Position, checkpointer: Checkpointer, log: RunLog) -> dict[str, Any]:
    """Train from a position to ``trainer.max_steps``, validating and saving on the way.

    Returns:
        steps, first_loss, last_loss, val_loss, tokens_per_second, train_seconds, skipped_steps, checkpoint.

    Raises:
        Preempted: a stop signal arrived; the run saved first.
        RecipeError: the loss or the gradient became NaN or infinite; nothing was updated.
        EnvironmentProblem: a checkpoint could not be written.
    """
    hooks = run.trainer.callbacks
    rank, _ = rank_and_size()
    watchdog = Watchdog(run.trainer.hang_timeout_seconds, log.run_dir / "stacks", rank)
    with watching(*_more_signals(hooks)) as stop, watchdog.watching():
        upkeep = Upkeep(run, position, checkpointer, log, stop, watchdog)
        callbacks.call(hooks, "on_train_start", run)
        try:
            while position.step < run.trainer.max_steps:
                upkeep.one_step()
        finally:
            callbacks.call(hooks, "on_train_end", run)
            upkeep.health.close()
        return upkeep.finish()


def _more_signals(hooks: list[Any] | None) -> list[str]:
    return [hook.sig for hook in hooks or [] if getattr(hook, "sig", None)]

"""When checkpoints are written and which are kept, in NeMo's spelling."""

import re
from dataclasses import dataclass
from datetime import timedelta

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments

_VAL_LOSS = re.compile(r"(?:val_loss=?)?\{val_loss[^}]*\}[-_]?")


@takes_nemos_arguments
@dataclass
class ModelCheckpoint:
    """When checkpoints are written and which are kept, in NeMo's spelling.

    Attributes:
        monitor: Metric that ranks checkpoints.
        mode: ``"min"`` or ``"max"``.
        save_last: Whether the run's end is saved whatever else is due; a stop always is.
        save_top_k: How many of the best are kept besides the newest; -1 keeps all, 0 none.
        every_n_train_steps: Steps between checkpoints; None: by time, or at the end only.
        train_time_interval: Time between checkpoints.
        filename: Folder name; ``{model_name}``, ``{val_loss}``, ``{step}`` and ``{consumed_samples}`` are filled in.
        max_disk_gb: Most the run's checkpoints may take together, in 1e9 bytes; the worst go first. None: no limit.
    """

    monitor: str = "val_loss"
    mode: str = "min"
    save_last: bool | str = True
    save_top_k: int = 3
    every_n_train_steps: int | None = None
    train_time_interval: timedelta | None = None
    filename: str = "{model_name}--{val_loss:.2f}-{step}-{consumed_samples}"
    max_disk_gb: float | None = None

    def folder_name(self, model_name: str, step: int, consumed_samples: int, val_loss: float | None) -> str:
        """The name of a checkpoint's folder; without a loss where nothing was held out, or nothing validated yet.

        Raises:
            RecipeError: ``filename`` asks for something else.
        """
        filename = self.filename if val_loss is not None else _VAL_LOSS.sub("", self.filename)
        known = {"model_name": model_name, "val_loss": val_loss, "step": step, "consumed_samples": consumed_samples}
        try:
            return filename.format(**known)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            names = ", ".join(f"{{{name}}}" for name in known)
            raise RecipeError(f"log.ckpt.filename={filename!r} cannot be filled in; use {names}.") from error

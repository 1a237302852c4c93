"""Where a run starts: from the newest checkpoint of its own, from other weights, or from scratch."""

from dataclasses import dataclass
from pathlib import Path

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.training.checkpoint import list_checkpoints


@dataclass
class RestoreConfig:
    """Weights to start from.

    Attributes:
        path: ``hf://org/name[@revision]``, ``nemo://ID``, ``embedded://mixtral_tiny``, or a folder (a checkpoint, or a
            Hugging Face model, which is imported first).
        load_model_state: Must be True.
        load_optim_state: Whether the optimizer's state is taken too (not from imported models).
    """

    path: str | None = None
    load_model_state: bool = True
    load_optim_state: bool = False


@dataclass
class AutoResume:
    """Where to start, in NeMo's spelling.

    Attributes:
        restore_config: Weights to start from when the run has no checkpoint of its own.
        resume_if_exists: Whether the run's own newest checkpoint is taken up.
        resume_ignore_no_checkpoint: Whether it is fine that there is none.
        resume_from_path: A checkpoint to take up instead of searching.
    """

    restore_config: RestoreConfig | None = None
    resume_if_exists: bool = True
    resume_ignore_no_checkpoint: bool = True
    resume_from_path: str | None = None

    def find(self, checkpoints: Path) -> Path | None:
        """The checkpoint to take up, or None to start anew.

        Raises:
            CheckpointError: one was required and there is none.
        """
        if self.resume_from_path is not None:
            path = Path(self.resume_from_path)
            if not path.is_dir():
                raise CheckpointError(f"resume.resume_from_path={path}: no such checkpoint.")
            return path
        found = list_checkpoints(checkpoints) if self.resume_if_exists else []
        if found:
            return found[-1]
        if self.resume_if_exists and not self.resume_ignore_no_checkpoint:
            raise CheckpointError(f"resume.resume_ignore_no_checkpoint=False, and {checkpoints} holds no checkpoint.")
        return None

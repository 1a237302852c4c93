"""Where a run starts: from the newest whole checkpoint of its own, from other weights, or from scratch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mixtral_recipes.checkpoints.checkpointer import list_checkpoints
from mixtral_recipes.checkpoints.format.integrity import damage_together, verify_together
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.system.ranks import first


@dataclass
class RestoreConfig:
    """Weights to start from.

    Attributes:
        path: ``hf://org/name[@revision]``, ``nemo://ID``, ``embedded://mixtral_tiny``, or a folder (a checkpoint, or a
            Hugging Face model, which is imported first).
        load_model_state: Must be True.
        load_optim_state: Whether the optimizer's moments and step count are taken too (from a training checkpoint).
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

    def find(self, checkpoints: Path, say: Callable[[str], None] = print) -> Path | None:
        """The checkpoint to take up, its files verified, or None to start anew. All ranks call it together.

        Args:
            checkpoints: The run's folder of checkpoints.
            say: Told which checkpoints were passed over, and why.

        Raises:
            CheckpointError: one was required and there is none, or all there are are damaged.
        """
        if self.resume_from_path is not None:
            path = Path(self.resume_from_path)
            if not path.is_dir():
                raise CheckpointError(f"resume.resume_from_path={path}: no such checkpoint.")
            verify_together(path)
            return path.resolve()
        found = first(lambda: list_checkpoints(checkpoints)) if self.resume_if_exists else []
        for path in reversed(found):
            damage = damage_together(path)
            if damage is None:
                return path
            say(f"WARNING: passing over {path.name}: {damage}")
        if found:
            raise CheckpointError(
                f"{checkpoints}: none of its {len(found)} checkpoint(s) is whole; start a run of another --name, or "
                "set resume.resume_if_exists=False to begin anew here."
            )
        if self.resume_if_exists and not self.resume_ignore_no_checkpoint:
            raise CheckpointError(f"resume.resume_ignore_no_checkpoint=False, and {checkpoints} holds no checkpoint.")
        return None

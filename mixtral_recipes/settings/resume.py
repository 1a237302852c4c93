"""Where a run starts, in NeMo's spelling."""

from dataclasses import dataclass

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments


@takes_nemos_arguments
@dataclass
class RestoreConfig:
    """Weights to start from.

    Attributes:
        path: ``hf://org/name[@revision]``, ``nemo://ID``, ``embedded://mixtral_tiny``, a folder (a checkpoint, or a
            Hugging Face model, which is imported first), or a run's name or folder: its newest complete checkpoint.
        load_model_state: Must be True.
        load_optim_state: Whether the optimizer's moments and step count are restored (from a training checkpoint).
        resize_vocab: Whether the vocabulary may grow, to ``model.config.vocab_size`` or else to what the tokenizer
            needs; each new token's rows start from the mean of the checkpoint's.
        adapter_path: An adapter checkpoint, or a run that made one, whose adapters are trained further. ``path`` then
            is where its base is now, which is compared by content; None uses the adapters of ``path`` itself, if it has
            any.
    """

    path: str | None = None
    load_model_state: bool = True
    load_optim_state: bool = False
    resize_vocab: bool = False
    adapter_path: str | None = None


@takes_nemos_arguments
@dataclass
class AutoResume:
    """Where to start, in NeMo's spelling.

    Attributes:
        restore_config: Weights to start from when the run has no checkpoint yet.
        resume_if_exists: Whether to resume from the run's own newest checkpoint.
        resume_ignore_no_checkpoint: Whether the run may start without one.
        resume_from_path: A checkpoint to resume from instead of searching, of all weights or of adapters; or a run.
        resume_from_directory: A folder of checkpoints, or of a run; its newest complete checkpoint is used if the
            run has none of its own.
    """

    restore_config: RestoreConfig | None = None
    resume_if_exists: bool = True
    resume_ignore_no_checkpoint: bool = True
    resume_from_path: str | None = None
    resume_from_directory: str | None = None


def refuse_without_start(resume: AutoResume | None) -> None:
    """Refuse to fine-tune random weights.

    Raises:
        RecipeError: ``resume.restore_config.path`` is not set.
    """
    if resume is None or resume.restore_config is None or not resume.restore_config.path:
        raise RecipeError("resume.restore_config.path is not set: fine-tuning needs a checkpoint (--restore-from).")

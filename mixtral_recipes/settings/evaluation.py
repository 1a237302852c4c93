"""How a trained model is evaluated, in NeMo's spelling."""

from dataclasses import dataclass, field
from typing import Any

from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments


@takes_nemos_arguments
@dataclass
class ApiEndpoint:
    """The model, in the place where NeMo names a server.

    Attributes:
        nemo_checkpoint_path: A checkpoint, or a Hugging Face folder.
    """

    nemo_checkpoint_path: str | None = None


@takes_nemos_arguments
@dataclass
class EvaluationTarget:
    """The model to evaluate.

    Attributes:
        api_endpoint: The model.
    """

    api_endpoint: ApiEndpoint


@takes_nemos_arguments
@dataclass
class ConfigParams:
    """How the model is evaluated.

    Attributes:
        limit_samples: Maximum number of questions; None asks all.
        max_new_tokens: Maximum tokens of an answer.
        batch_size: Questions answered together.
        extra: Other arguments of the task: ``data`` names SQuAD's file, folder or Hub id; ``include_path`` a folder of
            further task files, ``num_fewshot`` how many examples come before each question.
    """

    limit_samples: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 32
    extra: dict[str, Any] = field(default_factory=dict)


@takes_nemos_arguments
@dataclass
class EvaluationConfig:
    """Which tasks are run.

    Attributes:
        type: ``squad``: exact match and F1 on held-out questions; else tasks of lm-evaluation-harness (``a,b``).
        output_dir: Folder for ``results.json``; None writes no file.
        params: Further settings.
    """

    type: str = "squad"
    output_dir: str | None = None
    params: ConfigParams = field(default_factory=ConfigParams)

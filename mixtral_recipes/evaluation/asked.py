"""What is asked of a model. Loads no torch: a command looks at it before it starts processes."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mixtral_recipes.errors import EnvironmentProblem

NO_HARNESS = "--tasks runs lm-evaluation-harness: pip install 'mixtral-recipes[eval]'."


@dataclass(frozen=True)
class Asked:
    """What is measured. Without ``data``, ``text`` and ``tasks``, the data set that the model's run held out.

    Attributes:
        data: A data set, as ``--data`` takes it: the loss, held-out questions and, of SQuAD, the scores.
        loss: Whether the loss on a data set is measured.
        questions: Most questions of SQuAD that are scored; None is all, 0 none.
        text: A text file whose perplexity is measured.
        window: Tokens looked at together for that; None takes 2,048 at most.
        stride: By how many it moves on; None takes half a window.
        tasks: Tasks of lm-evaluation-harness.
        include_path: A folder of further task files.
        few_shot: Examples before each of their questions; None takes the task's number.
        limit: Most documents of each task.
        batch_size: Sequences a data-parallel rank takes at once.
        max_new_tokens: Longest answer.
        compare: Whether what training started from is measured too.
    """

    data: str | None = None
    loss: bool = True
    questions: int | None = None
    text: Path | None = None
    window: int | None = None
    stride: int | None = None
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    few_shot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int = 24
    compare: bool = False

    def __post_init__(self) -> None:
        if self.tasks and importlib.util.find_spec("lm_eval") is None:
            raise EnvironmentProblem(NO_HARNESS)

    @property
    def wants_data(self) -> bool:
        """Whether a data set is looked at."""
        return self.data is not None or not (self.text or self.tasks)

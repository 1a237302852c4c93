"""What is measured of a model."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_recipes.cli.options.groups import field

if TYPE_CHECKING:
    from mixtral_recipes.evaluation.evaluate import Asked

what = functools.partial(field, rich_help_panel="What is measured")
how = functools.partial(field, rich_help_panel="How")


@dataclass
class EvaluationOptions:
    """What is measured, and how."""

    data: str | None = what("--data DATA", "Loss on a data set, and SQuAD's scores; default: what its run held out.")
    questions: int | None = what(
        "--questions N", "At most this many of SQuAD's held-out questions; default: all, 0: none.", min=0
    )
    loss: bool = what("--loss/--no-loss", "Measure the loss on the data set.", True)
    perplexity: Path | None = what("--perplexity FILE", "Perplexity of a text: .txt, .md, or records with text.")
    tasks: str | None = what("--tasks A,B", "Tasks of lm-evaluation-harness (needs the extra `eval`).")
    include_path: Path | None = what("--include-path DIR", "A folder with more task files (YAML).")
    compare: bool = what("--compare", "Also measure what its training started from: before, after, base.")
    few_shot: int | None = how("--few-shot N", "Examples before a question; default: the task's.", min=0)
    limit: int | None = how("--limit N", "Maximum documents per task.", min=1)
    window: int | None = how("--window N", "Tokens in the perplexity window; default: 2048.")
    stride: int | None = how("--stride N", "Tokens the window moves by; default: half of it.")
    batch_size: int = how("--batch-size N", "Prompts continued together in a process.", 8, min=1)
    max_new_tokens: int = how("--max-new-tokens N", "Maximum tokens of an answer.", 24, min=1)

    def asked(self) -> "Asked":
        """The same for `evaluation.evaluate`.

        Raises:
            RecipeError: an option that has no effect without another.
        """
        from mixtral_recipes.errors import RecipeError
        from mixtral_recipes.evaluation.asked import Asked

        tasks = tuple(filter(None, (self.tasks or "").split(",")))
        on_data = bool(self.data) or not (tasks or self.perplexity)
        data = "--data (--tasks and --perplexity do not read it)"
        tokens = None if self.max_new_tokens == EvaluationOptions.max_new_tokens else self.max_new_tokens
        for option, given, needed, there in (
            ("--questions", self.questions, data, on_data),
            ("--no-loss", None if self.loss else False, data, on_data),
            ("--max-new-tokens", tokens, data, on_data),
            ("--include-path", self.include_path, "--tasks", tasks),
            ("--few-shot", self.few_shot, "--tasks", tasks),
            ("--limit", self.limit, "--tasks (SQuAD's questions have --questions)", tasks),
            ("--window", self.window, "--perplexity", self.perplexity),
            ("--stride", self.stride, "--perplexity", self.perplexity),
        ):
            if given is not None and not there:
                raise RecipeError(f"{option} has no effect without {needed}; leave it out.")
        if self.perplexity is not None and not self.perplexity.is_file():
            raise RecipeError(f"--perplexity {self.perplexity}: no such file.")
        if self.include_path is not None and not self.include_path.is_dir():
            raise RecipeError(f"--include-path {self.include_path}: no such folder.")
        asked: dict[str, Any] = {**vars(self), "tasks": tasks}
        return Asked(text=asked.pop("perplexity"), **asked)

"""What is measured of a model."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mixtral_recipes.evaluation.evaluate import Asked

what = functools.partial(typer.Option, rich_help_panel="What is measured")
how = functools.partial(typer.Option, rich_help_panel="How")


@dataclass
class EvaluationOptions:
    """What is measured, and how."""

    data: Annotated[
        str | None,
        what("--data", metavar="DATA", help="Loss on a data set, and SQuAD's scores; default: what its run held out."),
    ] = None
    questions: Annotated[
        int | None,
        what("--questions", metavar="N", min=0, help="Most of SQuAD's held-out questions; default: all, 0: none."),
    ] = None
    loss: Annotated[bool, what("--loss/--no-loss", help="Measure the loss on the data set.")] = True
    perplexity: Annotated[
        Path | None, what("--perplexity", metavar="FILE", help="Perplexity of a text: .txt, .md, or records with text.")
    ] = None
    tasks: Annotated[
        str | None, what("--tasks", metavar="A,B", help="Tasks of lm-evaluation-harness (the extra `eval`).")
    ] = None
    include_path: Annotated[
        Path | None, what("--include-path", metavar="DIR", help="A folder of further task files (YAML).")
    ] = None
    compare: Annotated[
        bool, what("--compare", help="Measure what its training started from, too: before, after, base.")
    ] = False
    few_shot: Annotated[
        int | None, how("--few-shot", metavar="N", min=0, help="Examples before a question; default: the task's.")
    ] = None
    limit: Annotated[int | None, how("--limit", metavar="N", min=1, help="Most documents of each task.")] = None
    window: Annotated[
        int | None, how("--window", metavar="N", help="Tokens that perplexity looks at together; default: 2048.")
    ] = None
    stride: Annotated[
        int | None, how("--stride", metavar="N", help="Tokens the window moves on by; default: half of it.")
    ] = None
    batch_size: Annotated[
        int, how("--batch-size", metavar="N", min=1, help="Prompts continued together on a process.")
    ] = 8
    max_new_tokens: Annotated[int, how("--max-new-tokens", metavar="N", min=1, help="Most tokens of an answer.")] = 24

    def asked(self) -> "Asked":
        """The same for `evaluation.evaluate`.

        Raises:
            RecipeError: an option that has no effect without another.
        """
        from mixtral_recipes.errors import RecipeError
        from mixtral_recipes.evaluation.asked_for import Asked

        tasks = tuple(filter(None, (self.tasks or "").split(",")))
        on_data = bool(self.data) or not (tasks or self.perplexity)
        data = "--data (--tasks and --perplexity read none)"
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

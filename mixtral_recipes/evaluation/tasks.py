"""lm-evaluation-harness on our engine: its tasks, its prompts and its metrics; the model under any layout.

Every rank runs the harness alike and asks the same questions in the same order; the engine shares them out.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mixtral_recipes.errors import DataError, MixtralRecipesError, RecipeError, in_short, nearest
from mixtral_recipes.evaluation.likelihood import Ending, likelihoods
from mixtral_recipes.inference.chat import text_of
from mixtral_recipes.inference.generate import generate, shortened
from mixtral_recipes.inference.model import InferenceModel
from mixtral_recipes.inference.sampling import Sampling
from mixtral_recipes.system.ranks import gathered

_NEW_TOKENS = 256  # as lm_eval's `hf`, where a task does not say
# Of a task's generation_kwargs: those that are read, and the others with what is done without them.
_READ = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}
_AS_IT_IS = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
_RESAMPLES = 1000  # for the error of metrics that have no formula; lm_eval's own 100,000 start processes of their own


@dataclass(frozen=True)
class Tasks:
    """Tasks that the harness knows.

    Attributes:
        manager: Its index of tasks.
        names: Those asked for.
    """

    manager: TaskManager
    names: list[str]

    @classmethod
    def find(cls, asked: Sequence[str], include_path: Path | None = None) -> "Tasks":
        """Look tasks up; the harness's own thousands are read where they are needed.

        Args:
            asked: Names of tasks or groups; ``*`` stands for anything.
            include_path: A folder with task files (YAML) besides the harness's own.

        Raises:
            RecipeError: there is no such folder, a task is not known, or its file may be one that is no YAML.
        """
        if include_path is not None and not include_path.is_dir():
            raise RecipeError(f"--include-path {include_path}: no such folder.")
        manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
        if manager is None or not all(manager.match_tasks([task]) for task in asked):
            manager = TaskManager(include_path=include_path)
        for task in asked:
            if not manager.match_tasks([task]):
                if include_path:
                    _refuse_broken(include_path)
                hint = "" if include_path else " Pass --include-path FOLDER to use your own task files."
                raise RecipeError(f"--tasks: {task!r} is not a known task.{nearest(task, manager.all_tasks)}{hint}")
        return cls(manager, manager.match_tasks(list(asked)))


def _refuse_broken(folder: Path) -> None:
    """Refuse a folder with a task file that cannot be read: the harness skips it silently."""
    for file in sorted(folder.rglob("*.yaml")):
        try:
            with file.open("rb") as content:
                yaml.compose(content)
        except (OSError, yaml.YAMLError) as error:
            mark: Any = getattr(error, "problem_mark", None)
            what = f", line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else f": {in_short(error)}"
            raise RecipeError(f"--include-path {folder}: {file.relative_to(folder)} is not YAML{what}.") from error


def run_tasks(
    model: InferenceModel,
    tasks: Tasks,
    *,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Scores of a model on tasks of lm-evaluation-harness; all ranks call it together.

    Args:
        model: The model.
        tasks: What it is asked.
        few_shot: Examples before each question; None takes the task's number.
        limit: Most documents of each task.
        batch_size: Sequences a data-parallel rank takes at once.

    Returns:
        Task -> metric -> value. Metrics of a filter have its name in brackets; ``..._stderr`` is the standard error.

    Raises:
        DataError: a task's data cannot be read.
    """
    # A rank must not fork; and the commit of the folder one happens to be in says nothing here.
    alone = mock.patch.dict(os.environ, DISABLE_MULTIPROC="1")
    try:
        with alone, mock.patch.object(evaluator, "get_git_commit_hash", return_value=None):
            found: Any = evaluator.simple_evaluate(
                model=MegatronLM(model, batch_size),
                tasks=[*tasks.names],
                num_fewshot=few_shot,
                limit=limit,
                task_manager=tasks.manager,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
            )
    except (MixtralRecipesError, RuntimeError):  # the engine's own
        raise
    except Exception as error:  # a task file has templates and code, which raise what they like
        what = type(error).__name__
        raise DataError(
            f"--tasks {','.join(tasks.names)}: lm-evaluation-harness cannot run them ({what}: {in_short(error)})."
        ) from error
    results = gathered(found)[0]["results"]  # the harness gives them to the first process of a machine
    return {task: _numbers(values) for task, values in results.items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    found = {}
    for key, value in values.items():
        if isinstance(value, bool | str) or not hasattr(value, "__float__"):
            continue
        name, _, chosen = key.partition(",")
        found[name if chosen in ("", "none") else f"{name} ({chosen})"] = float(value)
    return found


class MegatronLM(TemplateLM):
    """A model on Megatron as lm-evaluation-harness sees it; tokens and windows as its ``hf`` makes them."""

    def __init__(self, model: InferenceModel, batch_size: int = 8) -> None:
        """Wrap a model.

        Args:
            model: The model; all ranks make one each, and call its methods together.
            batch_size: Sequences a data-parallel rank takes at once.
        """
        super().__init__()
        self.model = model
        self.tokenizer = model.tokenizer
        self.batch_size = batch_size
        self.max_length = model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """What prepared requests are kept under."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text.

        Raises:
            DataError: the tokenizer has no chat template.
        """
        return text_of(self.tokenizer, chat_history, answer=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, as the tokenizer has it: with its first token, unless the text begins with it."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, and whether each is what would have been said."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        endings = [
            Ending((context + continuation)[-(self.max_length + 1) :], min(len(continuation), self.max_length))
            for _, context, continuation in requests
        ]
        return [(found.total, found.greedy) for found in likelihoods(self.model, endings, self.batch_size)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap."""
        endings: list[Ending] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, judged in map(make_disjoint_window, windows):
                endings.append(Ending(context + judged, len(judged)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, likelihoods(self.model, endings, self.batch_size), strict=True):
            totals[owner] += found.total
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text; requests that are alike in how they sample go together."""
        answers: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        for numbers in alike.values():
            given: dict[str, Any] = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], _NEW_TOKENS))
            for name in given.keys() - _READ:
                if name not in _AS_IT_IS or given[name] != _AS_IT_IS[name]:
                    raise RecipeError(f"generation_kwargs.{name}={given[name]!r} of a task is not supported.")
            ends = handle_stop_sequences(given["until"], eos=self.tokenizer.decode([self.eot_token_id]))
            new = given["max_gen_toks"]
            prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            prompts = shortened(self.model, prompts, new, asked_by="max_gen_toks")
            sampling = Sampling(
                new,
                temperature=given["temperature"] if given["do_sample"] else 0.0,
                top_k=given.get("top_k", 0),
                top_p=given.get("top_p", 1.0),
                repetition_penalty=given.get("repetition_penalty", 1.0),
                stop=tuple(filter(None, ends)),
            )
            found = generate(self.model, prompts, sampling, batch_size=self.batch_size)
            texts = [postprocess_generated_text(one.text, list(sampling.stop), None) for one in found]
            answers |= dict(zip(numbers, texts, strict=True))
        return [answers[number] for number in range(len(requests))]

"""Held-out questions, answered by a model and scored as SQuAD scores them."""

from collections.abc import Sequence
from typing import Any

from mixtral_recipes.data.modules.squad import NO_ANSWER, SquadDataModule
from mixtral_recipes.data.records.squad import Question
from mixtral_recipes.errors import DataError
from mixtral_recipes.evaluation.squad_scores import normalized, squad_scores
from mixtral_recipes.inference.generate import generate, shortened
from mixtral_recipes.inference.model import InferenceModel
from mixtral_recipes.inference.sampling import Sampling


def held_out_questions(data: SquadDataModule, limit: int | None = None) -> list[Question]:
    """The validation questions of a SQuAD source, spread evenly over its passages when there are more than ``limit``.

    Args:
        data: Where they are.
        limit: The maximum number of questions; None takes all.

    Raises:
        DataError: the source has no validation questions.
    """
    questions = list(data.questions("validation"))
    if not questions:
        raise DataError(f"{data.dataset_root}: no held-out questions, because the file has a single passage.")
    if limit is None or len(questions) <= limit:
        return questions
    return [questions[i * len(questions) // limit] for i in range(limit)]


def evaluate_squad(
    model: InferenceModel,
    questions: Sequence[Question],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 24,
    no_answer: str = NO_ANSWER,
) -> dict[str, Any]:
    """Exact match and F1 of greedily generated answers to held-out questions; all ranks call it together.

    Of a question that the model has no room for, the end of the passage is read.

    Args:
        model: The model.
        questions: What is asked.
        batch_size: Questions a data-parallel rank answers at once.
        max_new_tokens: Longest answer.
        no_answer: The answer that says there is none (SQuAD 2.0).

    Returns:
        ``exact_match`` and ``f1`` in percent, ``exact_match_of_first_line`` (what the former would be if the model
        were cut off at its first line break: a base model may find the answer and not stop), ``count``, and
        ``predictions`` by question id. Where questions are unanswerable, also the scores `squad_scores` gives of either
        kind.

    Raises:
        RecipeError: the model has no room for so long an answer.
    """
    # Control tokens that a passage spells out are text, as in training.
    prompts = [model.tokenizer(question.prompt(), split_special_tokens=True)["input_ids"] for question in questions]
    prompts = shortened(model, prompts, max_new_tokens, head=1)
    found = generate(model, prompts, Sampling(max_new_tokens), batch_size=batch_size)
    answers = [one.text.strip() for one in found]
    whole = _scores(questions, answers, no_answer)
    first_lines = _scores(questions, [answer.split("\n")[0] for answer in answers], no_answer)
    return {
        **whole,
        "exact_match_of_first_line": first_lines["exact_match"],
        "count": len(questions),
        "predictions": {q.id: answer for q, answer in zip(questions, answers, strict=True)},
    }


def _scores(questions: Sequence[Question], answers: Sequence[str], no_answer: str) -> dict[str, float]:
    """SQuAD's scores; the words that say there is no answer count as none."""
    said = ["" if normalized(answer) == normalized(no_answer) else answer for answer in answers]
    return squad_scores(said, [question.answers for question in questions])

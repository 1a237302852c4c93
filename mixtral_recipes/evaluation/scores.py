"""Answering questions by generation, scored as SQuAD scores them.

Works on a Hugging Face folder with transformers' own `generate`: what is measured is what users of the exported model
will get, not what the training code would have said.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mixtral_recipes.data.modules.squad import Question, SquadDataModule
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.errors import CheckpointError, DataError


def held_out_questions(data: str | Path | None, limit: int | None = None) -> list[Question]:
    """The validation questions of a SQuAD source, spread evenly over its passages when there are more than ``limit``.

    Args:
        data: As `SquadDataModule.dataset_root`.
        limit: Most questions; None takes all.

    Raises:
        DataError: the source has no validation questions.
    """
    _, questions = SquadDataModule(dataset_root=data).questions()
    if not questions:
        raise DataError(f"{data}: no held-out questions: the file has a single passage.")
    if limit is None or len(questions) <= limit:
        return questions
    return [questions[i * len(questions) // limit] for i in range(limit)]


def evaluate_squad(
    model_folder: Path,
    data: str | Path | None,
    *,
    limit: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 24,
) -> dict[str, Any]:
    """Exact match and F1 of greedily generated answers to held-out questions.

    Args:
        model_folder: A Hugging Face model with its tokenizer.
        data: As `SquadDataModule.dataset_root`; its validation questions are asked.
        limit: Most questions.
        batch_size: Questions generated together.
        max_new_tokens: Longest answer.

    Returns:
        ``exact_match`` and ``f1`` in percent, ``exact_match_of_first_line`` (what the former would be if the model
        were cut off at its first line break: a base model may find the answer and not stop), ``count``, and
        ``predictions`` by question id.

    Raises:
        CheckpointError: the folder cannot be loaded.
        DataError: there are no held-out questions.
    """
    questions = held_out_questions(data, limit)
    answers = list(generate(model_folder, [q.prompt() for q in questions], batch_size, max_new_tokens))
    whole = _scores(questions, answers)
    first_lines = _scores(questions, [answer.split("\n")[0] for answer in answers])
    return {
        "exact_match": whole["exact_match"],
        "f1": whole["f1"],
        "exact_match_of_first_line": first_lines["exact_match"],
        "count": len(questions),
        "predictions": {q.id: answer for q, answer in zip(questions, answers, strict=True)},
    }


def _scores(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """SQuAD's exact match and F1, in percent."""
    from torchmetrics.functional.text import squad

    predicted = [{"id": q.id, "prediction_text": answer} for q, answer in zip(questions, answers, strict=True)]
    expected = [{"id": q.id, "answers": {"text": q.answers, "answer_start": [0] * len(q.answers)}} for q in questions]
    scores = squad(predicted, expected)  # pyright: ignore[reportArgumentType]
    return {name: round(float(value), 2) for name, value in scores.items()}


def generate(
    model_folder: Path, prompts: Sequence[str], batch_size: int = 32, max_new_tokens: int = 24
) -> Iterator[str]:
    """Greedy continuations of prompts, in their order, up to the end the model gives them.

    Prompts of like length are generated together, so that little is spent on padding.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto").eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model_folder}: cannot be loaded ({str(error).splitlines()[0]}).") from error
    tokenizer = load_tokenizer(model_folder, error=CheckpointError)
    tokenizer.padding_side = "left"
    if torch.cuda.is_available():
        model.to("cuda")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True).to(model.device)
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            output = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[i] = text.strip()
    yield from (texts[i] for i in range(len(prompts)))

"""SQuAD's exact match and F1, as the official evaluation scripts of versions 1.1 and 2.0 compute them."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction is one of the answers. Without an answer, the right prediction is empty."""
    return max(float(normalized(prediction) == normalized(answer)) for answer in _scored(answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best overlap in words with an answer. Without an answer, 1.0 where the prediction is empty."""
    return max(_overlap(normalized(prediction).split(), normalized(answer).split()) for answer in _scored(answers))


def squad_scores(predictions: Iterable[str], answers: Iterable[Sequence[str]]) -> dict[str, float]:
    """The scores of a file of predictions, in percent.

    Args:
        predictions: An answer to each question; empty for "there is none".
        answers: The accepted answers of each; empty for an unanswerable question.

    Returns:
        ``exact_match`` and ``f1``; where questions are unanswerable, also ``has_answer_exact``, ``has_answer_f1``,
        ``no_answer_exact``, ``no_answer_f1`` and how many there are of each, ``has_answer_count`` and
        ``no_answer_count``.

    Source: `evaluate-v2.0.py` of rajpurkar.github.io/SQuAD-explorer, which scores version 1.1 alike.
    """
    pairs = zip(predictions, answers, strict=True)
    scored = [(bool(right), exact_match(said, right), f1(said, right)) for said, right in pairs]
    found = {"exact_match": _percent(s[1] for s in scored), "f1": _percent(s[2] for s in scored)}
    if all(answerable for answerable, _, _ in scored):
        return found
    for name, kind in (("has_answer", True), ("no_answer", False)):
        some = [score for score in scored if score[0] is kind]
        found[f"{name}_exact"] = _percent(score[1] for score in some)
        found[f"{name}_f1"] = _percent(score[2] for score in some)
        found[f"{name}_count"] = len(some)
    return found


def _scored(answers: Sequence[str]) -> list[str]:
    """The answers that are more than an article or a punctuation mark; an empty one where there is none."""
    return [answer for answer in answers if normalized(answer)] or [""]


def _overlap(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    same = sum((Counter(said) & Counter(right)).values())
    return 2 * same / (len(said) + len(right))


def _percent(scores: Iterable[float]) -> float:
    found = list(scores)
    return round(100 * sum(found) / len(found), 2) if found else 0.0

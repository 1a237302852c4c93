"""How likely a model finds sequences of tokens: shared out over data-parallel ranks, batches of similar length."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mixtral_recipes.inference.model import InferenceModel, no_numbers
from mixtral_recipes.system.progress import progress_bar
from mixtral_recipes.system.ranks import gathered, launched_rank


class Ending(NamedTuple):
    """Tokens whose last ones are judged, given those before them.

    Attributes:
        tokens: All of them.
        judged: How many at the end are judged; at least one token stands before them.
    """

    tokens: Sequence[int]
    judged: int


class Likelihood(NamedTuple):
    """What a model finds of judged tokens.

    Attributes:
        total: The sum of their log-probabilities (natural logarithm).
        greedy: Whether each of them was the likeliest one.
    """

    total: float
    greedy: bool


def likelihoods(model: InferenceModel, endings: Sequence[Ending], batch_size: int) -> list[Likelihood]:
    """How likely a model finds endings; all ranks call it together with the same ones, and all get every answer.

    Args:
        model: The model.
        endings: What is judged.
        batch_size: The most sequences a data-parallel rank takes at once.

    Raises:
        CheckpointError: the model makes no numbers of one.
    """
    # Longest first: where memory is short it shows at once.
    mine = sorted(model.share(len(endings)), key=lambda number: -len(endings[number].tokens))
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    found: dict[int, Likelihood] = {}
    turns = max(gathered(len(batches)))  # experts' ranks work together, so each takes as many as the busiest one
    with progress_bar("likelihoods", turns, unit="steps", shown=launched_rank() == 0) as done:
        for turn in range(turns):
            numbers = batches[turn] if turn < len(batches) else []
            rows = [endings[number] for number in numbers] or [Ending([0, 0], 1)]
            found |= dict(zip(numbers, _batch(model, rows), strict=False))
            done(1)
    everyone = {number: one for part in gathered(found) for number, one in part.items()}
    if not all(math.isfinite(one.total) for one in everyone.values()):
        raise no_numbers("likelihoods")
    return [everyone[number] for number in range(len(endings))]


def _batch(model: InferenceModel, rows: Sequence[Ending]) -> list[Likelihood]:
    longest = max(len(row.tokens) for row in rows)
    padded = torch.zeros(len(rows), longest, dtype=torch.long)  # behind a sequence's end nothing looks back at it
    for number, row in enumerate(rows):
        padded[number, : len(row.tokens)] = torch.tensor(row.tokens)
    log_probabilities, greedy = model.likelihoods(padded)
    judged = [slice(len(row.tokens) - 1 - row.judged, len(row.tokens) - 1) for row in rows]
    return [
        Likelihood(float(log_probabilities[number, part].double().sum()), bool(greedy[number, part].all()))
        for number, part in enumerate(judged)
    ]

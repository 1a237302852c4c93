"""Continuations of prompts: as many at a time as there is room for, all ranks in step."""

from collections.abc import Callable, Sequence

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.inference.batch import Batch, Continuation, Row, fit
from mixtral_recipes.inference.model import InferenceModel
from mixtral_recipes.inference.sampling import Sampling

OnText = Callable[[int, str], None]  # a prompt's number, and what its continuation grew by


def generate(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    on_text: OnText | None = None,
) -> list[Continuation]:
    """Continue prompts; all ranks call it together with the same prompts, and all get every continuation.

    Args:
        model: The model.
        prompts: Token ids of each, at least one.
        sampling: How tokens are chosen.
        batch_size: The most prompts that are continued together on a data-parallel rank.
        on_text: Called with text as it comes.

    Raises:
        RecipeError: a prompt is empty, or longer than the model's positions leave room for.
        CheckpointError: the model makes no numbers of a prompt.
    """
    longest = model.config.max_position_embeddings
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise RecipeError(f"prompt {number + 1} has no tokens; it must not be empty.")
        if len(prompt) + sampling.max_new_tokens > longest:
            raise RecipeError(
                f"prompt {number + 1} has {len(prompt)} tokens and asks for {sampling.max_new_tokens} new ones, but "
                f"the model has max_position_embeddings={longest}; shorten it or lower --max-new-tokens."
            )
    watched = on_text is not None
    rows = [Row(model, prompt, sampling, number=n, watched=watched) for n, prompt in enumerate(prompts)]
    numbers = {id(row): number for number, row in enumerate(rows)}
    waiting = sorted(rows, key=lambda row: len(row.tokens), reverse=True)
    room = max((len(row.tokens) for row in rows), default=0) + sampling.max_new_tokens
    batch = Batch(model, min(batch_size, len(rows)), room)
    while waiting or len(batch):
        grown = []
        if count := fit(waiting, batch.free):
            grown += batch.add(waiting[:count])
            del waiting[:count]
        if len(batch):
            grown += batch.step()
        if failure := next((row.failure for row, _ in grown if row.failure), None):
            raise failure
        if on_text is not None:
            for row, text in filter(lambda pair: pair[1], grown):
                on_text(numbers[id(row)], text)
    return [row.done for row in rows if row.done]


def shortened(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    head: int = 0,
    asked_by: str = "--max-new-tokens",
) -> list[list[int]]:
    """The ends of prompts, as much as a model has room for before so many new tokens.

    Args:
        model: The model.
        prompts: Token ids of each.
        new_tokens: How many may follow.
        head: How many of a prompt's first tokens stay, where there is room for more; training keeps the bos.
        asked_by: What asked for so many, for the message.

    Raises:
        RecipeError: there is no room.
    """
    room = model.config.max_position_embeddings - new_tokens
    if room < 1:
        raise RecipeError(
            f"{asked_by} {new_tokens}: the model has {model.config.max_position_embeddings} positions in total; lower "
            "it."
        )
    head = min(head, room - 1)
    return [list(prompt if len(prompt) <= room else (*prompt[:head], *prompt[head - room :])) for prompt in prompts]

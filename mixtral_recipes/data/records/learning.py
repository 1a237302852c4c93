"""Which turns of a conversation are learned: a setting, and the fields that say so turn by turn.

`train`, `training`, `loss` and `train_detail` decide for any turn, as axolotl and ms-swift have them. `weight` (OpenAI,
mistral-finetune) and `mask` only take an assistant's turn out.
"""

from collections.abc import Mapping
from typing import Any

from mixtral_recipes.data.records.record import is_filled
from mixtral_recipes.errors import DataError, nearest

Span = tuple[int, int]
# Whether a turn is learned; or the stretches of its text that are.
Learned = bool | tuple[Span, ...]

LEARN = {
    "all": "all of the assistant's turns",
    "last": "the assistant's last turn",
    "completion": "the completion: what follows the prompt",
}
DECIDING = ("train", "training", "loss")
EXCLUDING = ("weight", "mask")
FIELDS = (*DECIDING, *EXCLUDING, "train_detail")
_WORDS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}  # as tables write them


def check_learn(learn: str | None) -> None:
    """Refuse another word than those in `LEARN`.

    Raises:
        DataError: it is another.
    """
    if learn is not None and learn not in LEARN:
        raise DataError(f"data.learn={learn!r} is not a known choice.{nearest(learn, tuple(LEARN))}")


def yes_or_no(value: Any) -> bool | None:
    """What true, false, 0, 1, or a table's text of one of them says; None where it is something else."""
    if isinstance(value, str):
        return _WORDS.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def said(fields: Mapping[str, Any], at: str, where: object) -> bool | None:
    """What a turn's or record's fields say about learning it: True, False, or None where they say nothing.

    `weight` and `mask` never say True: they leave a turn as it would be without them.

    Raises:
        DataError: a value that is not yes or no, or two fields that disagree.
    """
    answers: dict[str, bool] = {}
    for name in (*DECIDING, *EXCLUDING):
        value = fields.get(name)
        if not is_filled(value) or (name == "mask" and str(value).lower() == "user"):  # NeMo: whose are not learned
            continue
        answer = yes_or_no(value)
        if answer is None:
            raise DataError(f"{where}: {at}{name!r} is {value!r}; it must be 0 or 1, true or false.")
        answers[name] = answer != (name == "mask")
    if len(set(answers.values())) > 1:
        told = ", ".join(f"{name}={fields[name]!r}" for name in answers)
        raise DataError(f"{where}: {at}says both that it is learned and that it is not ({told}); keep one of them.")
    if False in answers.values():
        return False
    return True if any(name in DECIDING for name in answers) else None


def stretches(details: Any, length: int, at: str, where: object) -> tuple[Span, ...]:
    """The learned stretches of a text, from axolotl's `train_detail`: what no entry takes out is learned.

    Args:
        details: A list of ``begin_offset``, ``end_offset`` (of the last character) and ``train``.
        length: Characters of the text.
        at: The turn, for errors.
        where: The record, for errors.

    Raises:
        DataError: not such a list, or offsets outside the text.
    """
    wanted = [True] * length
    for entry in details if isinstance(details, list) else [details]:
        if not isinstance(entry, dict):
            raise DataError(f"{where}: {at}'train_detail' must be a list of begin_offset, end_offset and train.")
        begin, end, train = (entry.get(name) for name in ("begin_offset", "end_offset", "train"))
        if not isinstance(begin, int) or not isinstance(end, int) or not isinstance(train, bool):
            raise DataError(f"{where}: {at}'train_detail' needs begin_offset, end_offset and train (true or false).")
        if not 0 <= begin <= end < length:
            raise DataError(
                f"{where}: {at}'train_detail' says {begin} to {end}, but the text has only characters 0 to "
                f"{length - 1}."
            )
        wanted[begin : end + 1] = [train] * (end + 1 - begin)
    found: list[Span] = []
    for position, is_wanted in enumerate(wanted):
        if not is_wanted:
            continue
        if found and found[-1][1] == position:
            found[-1] = (found[-1][0], position + 1)
        else:
            found.append((position, position + 1))
    return tuple(found)

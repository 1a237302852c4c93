"""Conversations: the forms they come in, brought to one list of messages."""

from typing import Any

from mixtral_recipes.data.records.pairs import text_of
from mixtral_recipes.data.records.record import Record
from mixtral_recipes.errors import DataError

Message = dict[str, str]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}


def conversation(record: Record, columns: dict[str, str] | None = None) -> list[Message]:
    """The messages of a record: role ``system`` (first, optional), then ``user`` and ``assistant`` in turn.

    It reads ``messages`` (``role``, ``content``), sharegpt's ``conversations`` (``from``, ``value``), alpaca's
    ``instruction``, ``input``, ``output``, TRL's ``prompt`` and ``completion`` lists, and pairs of texts. Neighbours
    of one role are joined by a blank line, as mistral-common joins them.

    Args:
        record: The record.
        columns: Names used here -> names in the record, e.g. ``{"messages": "dialog"}``.

    Raises:
        DataError: names the place and what is wrong.
    """
    value, where, _ = record
    columns = columns or {}
    found = {name: value.get(columns.get(name, name)) for name in _NAMES}
    if found["messages"] is not None:
        raw = _turns(found["messages"], "role", "content", columns.get("messages", "messages"), where)
    elif found["conversations"] is not None:
        raw = _turns(found["conversations"], "from", "value", columns.get("conversations", "conversations"), where)
    elif found["instruction"] is not None:
        raw = _alpaca(found, value, where)
    elif isinstance(found["prompt"], list) and isinstance(found["completion"], list):
        raw = _turns(found["prompt"] + found["completion"], "role", "content", "prompt", where)
    elif _pair_names(found) is not None:
        prompt, answer = _pair_names(found) or ("", "")
        raw = [
            ("user", text_of(found[prompt], prompt, where)),
            ("assistant", text_of(found[answer], answer, where)),
        ]
    else:
        names = ", ".join(map(str, value)) or "nothing"
        raise DataError(f"{where}: no conversation: needs 'messages', 'conversations' or 'instruction', has {names}.")
    return _in_turn(raw, where)


_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("input", "output"), ("question", "answer"))
_NAMES = (
    "messages",
    "conversations",
    "instruction",
    "system",
    *dict.fromkeys(name for pair in _PAIRS for name in pair),
)


def _pair_names(found: dict[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if found[pair[0]] is not None and found[pair[1]] is not None), None)


def _alpaca(found: dict[str, Any], value: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """Instruction and input in one user message, a blank line between; ``history`` holds earlier turns."""
    raw: list[tuple[str, str]] = []
    if found["system"]:
        raw.append(("system", text_of(found["system"], "system", where)))
    for turn in value.get("history") or []:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise DataError(f"{where}: 'history' must hold pairs of texts.")
        raw += [("user", text_of(turn[0], "history", where)), ("assistant", text_of(turn[1], "history", where))]
    prompt = text_of(found["instruction"], "instruction", where)
    if found["input"]:
        prompt += "\n\n" + text_of(found["input"], "input", where)
    return [*raw, ("user", prompt), ("assistant", text_of(found["output"], "output", where))]


def _turns(turns: Any, role_name: str, text_name: str, name: str, where: str) -> list[tuple[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{where}: {name!r} must be a list of messages, and is {'empty' if turns == [] else 'not one'}."
        )
    raw = []
    for number, turn in enumerate(turns):
        at = f"{name}[{number}]"
        if not isinstance(turn, dict):
            raise DataError(f"{where}: {at} is not an object.")
        # Either spelling: people rename one of the two.
        role = turn.get(role_name, turn.get("role", turn.get("from")))
        text = turn.get(text_name, turn.get("content", turn.get("value")))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise DataError(f"{where}: {at} has the role {role!r}; known are {', '.join(ROLES)}.")
        if isinstance(text, list):  # OpenAI's parts
            text = _joined_parts(text, at, where)
        raw.append(
            (ROLES[role.lower()], text_of(text, f"{at}.{text_name}", where, empty=ROLES[role.lower()] == "system"))
        )
    return raw


def _joined_parts(parts: list[Any], at: str, where: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{where}: {at} holds something else than text.")
    return "".join(part["text"] for part in parts)


def _in_turn(raw: list[tuple[str, str]], where: str) -> list[Message]:
    messages: list[Message] = []
    for role, text in raw:
        if role == "system" and not text:
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text
        elif role == "system" and messages:
            raise DataError(f"{where}: a system message stands behind the first {messages[-1]['role']} message.")
        else:
            messages.append({"role": role, "content": text})
    talk = [message["role"] for message in messages if message["role"] != "system"]
    if not talk or talk[0] != "user":
        raise DataError(f"{where}: the conversation must start with the user, not {talk[0] if talk else 'nobody'}.")
    if "assistant" not in talk:
        raise DataError(f"{where}: the conversation has no assistant message to learn.")
    return messages

"""Conversations: the forms they come in, brought to one list of messages and to what of it is learned."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mixtral_recipes.data.records.forms import (
    BESIDE_A_PROMPT,
    ROLES,
    Form,
    are_exchanges,
    form_of,
    holds_turns,
    is_preference,
    pair_names,
)
from mixtral_recipes.data.records.learning import FIELDS, Learned, said, stretches
from mixtral_recipes.data.records.pairs import text_of
from mixtral_recipes.data.records.record import Record, is_filled
from mixtral_recipes.data.records.tools import calls_of, identify, result_of, tools_of, without_absent
from mixtral_recipes.errors import DataError

# What chat templates take: role and content; of an assistant's call also tool_calls; of a tool's result also
# tool_call_id, name and `result`, the content as JSON.
Message = dict[str, Any]
_CALLS = ("function_call", "tool_call")  # sharegpt's roles of a turn that is a call
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_TEXT_PARTS = ("text", "input_text", "output_text")  # OpenAI's kinds of them


@dataclass(frozen=True)
class Conversation:
    """A conversation, ready for a chat template.

    Attributes:
        messages: ``system`` (first, optional), then ``user``, ``assistant`` and ``tool``.
        learned: For each message, whether it is learned, or the stretches of its text that are.
        tools: What the model may call, in OpenAI's form.
        left_alone: Assistant's turns that are not learned, by the reason.
        unused: Fields of the record and of its turns that say nothing here.
    """

    messages: list[Message]
    learned: list[Learned]
    tools: list[dict[str, Any]] = field(default_factory=list)
    left_alone: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)

    @property
    def left_out(self) -> str:
        """Why nothing is learned from it; empty where something is."""
        return "" if any(self.learned) else "no turn to learn from"

    def texts(self, *, learned: bool) -> Iterator[str]:
        """The texts that are learned, or those that are not."""
        for message, is_learned in zip(self.messages, self.learned, strict=True):
            if bool(is_learned) is learned:
                yield message["content"]
                if message.get("tool_calls"):
                    yield json.dumps(message["tool_calls"], ensure_ascii=False)


@dataclass
class _Turn:
    """One turn as it was found."""

    role: str
    text: str
    at: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    fields: Mapping[str, Any] = field(default_factory=dict)
    read: tuple[str, ...] = ()  # those of them that were
    completion: bool = False

    @property
    def unused(self) -> Iterator[str]:
        """Names of the fields that say nothing here."""
        return (name for name, value in self.fields.items() if name not in (*self.read, *FIELDS) and is_filled(value))


def conversation(
    record: Record, columns: Mapping[str, str | None] | None = None, learn: str | None = None
) -> Conversation:
    """The conversation of a record.

    It reads ``messages`` (``role``, ``content``), sharegpt's ``conversations`` (``from``, ``value``), alpaca's
    ``instruction``, ``input``, ``output`` and Dolly's ``context`` and ``response``, TRL's ``prompt`` and
    ``completion`` (either may be a list of turns), and pairs of texts, each with ``system`` and ``tools`` beside it.
    Neighbours of one role are joined by a blank line, as mistral-common joins them, where both are learned or neither
    is.

    Args:
        record: The record.
        columns: Names used here -> names in the record, e.g. ``{"messages": "dialog"}``; None leaves a field unread.
        learn: A word of `LEARN`; None takes the form's own: the completion where there is one, and all otherwise.

    Raises:
        DataError: names the place and what is wrong.
    """
    where = record.where
    # A table's row has all entries of its structs: arguments that a call does not have would be encoded as null.
    value = without_absent(record.value) if record.text is None else record.value
    value, names = renamed(value, columns or {})
    if not columns and is_preference(value):
        raise DataError(f"{where}: is a preference pair or a labelled answer, which cannot be learned as it is.")
    turns, used = _turns_of(value, names, where)
    system_name, tools_name = (_first_filled(value, some) for some in (_SYSTEM, _TOOLS))
    if is_filled(system := value.get(system_name)):
        name = names[system_name]
        turn = _Turn("system", text_of(_joined_parts(system, name, where), name, where), name)
        first = turns[0]
        if (first.role, first.text.strip()) != (turn.role, turn.text.strip()):  # some tables hold it in both places
            turns.insert(0, turn)
    tools = tools_of(value.get(tools_name), names[tools_name], where)
    used |= {system_name, tools_name, *FIELDS}
    unused = Counter(names[name] for name, found in value.items() if name not in used and is_filled(found))
    for turn in turns:
        unused.update(f"{name!r} of a turn" for name in turn.unused)
    learned, left_alone = _what_is_learned(turns, learn, where)
    if said(value, "", where) is False:
        learned, left_alone = [False] * len(turns), Counter({"excluded by the record": sum(map(bool, learned))})
    messages, learned = _joined(turns, learned)
    identify(messages, where)
    _check(messages, learned, tools, where)
    return Conversation(messages, learned, tools, left_alone, unused)


def _first_filled(fields: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if is_filled(fields.get(name))), names[0])


def renamed(value: Mapping[str, Any], columns: Mapping[str, str | None]) -> tuple[dict[str, Any], dict[str, str]]:
    """The record under the names used here, and the record's own name for each."""
    taken = {theirs: ours for ours, theirs in columns.items()}
    found, names = {}, {name: name for name in (*_SYSTEM, *_TOOLS)}
    for name, content in value.items():
        ours = taken.get(name, name)
        if name in columns and name not in taken:
            continue  # another column stands for it, or none
        found[ours], names[ours] = content, name
    return found, names


def _turns_of(value: dict[str, Any], names: dict[str, str], where: str) -> tuple[list[_Turn], set[str]]:
    """The turns of a record, and the names of the fields they were read from."""
    form = form_of(value)
    if form in (Form.messages, Form.sharegpt):
        name = "messages" if form is Form.messages else "conversations"
        return list(_turns(value[name], names[name], where)), {name}
    if form is Form.prompt_completion:
        first, second = pair_names(value) or ("prompt", "completion")
        prompt = list(_turns(value[first], names[first], where, role="user"))
        completion = list(_turns(value[second], names[second], where, role="assistant"))
        for turn in completion:
            turn.completion = True
        return prompt + completion, {first, second}
    pair = ("instruction", "output" if form is Form.alpaca else "response")
    if form not in (Form.alpaca, Form.dolly):
        pair = pair_names(value)
    if pair is None:
        there = ", ".join(names.get(name, name) for name, found in value.items() if found is not None) or "nothing"
        raise DataError(
            f"{where}: not a conversation: needs 'messages', 'conversations' or 'instruction', but has {there}."
        )
    return _asked_and_answered(value, names, where, pair, completion=form is Form.pairs)


def _asked_and_answered(
    value: dict[str, Any], names: dict[str, str], where: str, pair: tuple[str, str], *, completion: bool
) -> tuple[list[_Turn], set[str]]:
    """A prompt, with what else is its own in one message, a blank line between; ``history`` holds earlier turns."""
    turns: list[_Turn] = []
    history = value.get("history") or []
    if not isinstance(history, list | tuple) or any(not isinstance(e, list | tuple) or len(e) != 2 for e in history):
        raise DataError(f"{where}: 'history' must be a list of pairs of texts.")
    for earlier in history:
        for role, text in zip(("user", "assistant"), earlier, strict=True):
            turns.append(_Turn(role, text_of(text, "history", where), "history"))
    prompt, answer = pair
    asked = [prompt, *(n for n in BESIDE_A_PROMPT if n not in (*pair, "history") and is_filled(value.get(n)))]
    text = "\n\n".join(text_of(value[name], names[name], where) for name in asked)
    turns.append(_Turn("user", text, names[prompt]))
    completion = completion and len(turns) == 1  # else all of the answers are learned
    turns.append(_Turn("assistant", text_of(value[answer], names[answer], where), names[answer], completion=completion))
    return turns, {*pair, *BESIDE_A_PROMPT}


def _turns(turns: Any, name: str, where: str, *, role: str | None = None) -> Iterator[_Turn]:
    """The turns of a list, of JSON text of one or of columns (as tables hold it); with a role, also of a text."""
    if role is not None and isinstance(turns, str) and not holds_turns(turns):
        turns = [{"role": role, "content": turns}]
    elif isinstance(turns, str) and turns.lstrip()[:1] in ("[", "{"):
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise DataError(f"{where}: {name!r} is text that is not JSON ({error}).") from error
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):  # LIMA's
        turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]
    if isinstance(turns, dict) and turns and all(isinstance(column, list) for column in turns.values()):
        lengths = {len(column) for column in turns.values()}
        if len(lengths) == 1:  # a sequence of structs, as some tables hold it
            turns = [dict(zip(turns, row, strict=True)) for row in zip(*turns.values(), strict=True)]
    elif role is not None and isinstance(turns, dict):
        turns = [turns]
    if isinstance(turns, list) and turns and are_exchanges(turns):
        names = {"input": "user", "output": "assistant"}
        turns = [{"role": names[name], "content": turn[name]} for turn in turns for name in names]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{where}: {name!r} must be a list of messages, but is {'empty' if turns == [] else 'not one'}."
        )
    for number, turn in enumerate(turns):
        at = f"{name}[{number}]"
        if not isinstance(turn, dict):
            raise DataError(f"{where}: {at} is not an object.")
        # Either spelling: people rename one of the two.
        role_name = turn.get("role", turn.get("from"))
        if not isinstance(role_name, str) or role_name.lower() not in ROLES:
            raise DataError(f"{where}: {at} has the unknown role {role_name!r}; use one of {', '.join(ROLES)}.")
        yield _turn(turn, role_name.lower(), at, where)


def _turn(turn: dict[str, Any], role_name: str, at: str, where: str) -> _Turn:
    text_name = "value" if "value" in turn and not is_filled(turn.get("content")) else "content"
    role, text = ROLES[role_name], turn.get(text_name)
    read = ("role" if "role" in turn else "from", text_name)
    if role_name in _CALLS:
        return _Turn(role, "", at, calls_of(text, at, where), turn, read)
    text = _joined_parts(text, at, where)
    if role == "tool":
        if text is not None and not isinstance(text, str):
            text = json.dumps(text, ensure_ascii=False)
        text = text_of(text or "", f"{at}.{text_name}", where, empty=True)
        return _Turn(role, text, at, [], turn, (*read, "tool_call_id", "name"))
    calls_name = _first_filled(turn, ("tool_calls", "function_call"))
    called = turn.get(calls_name)
    if is_filled(called) and role != "assistant":
        raise DataError(f"{where}: {at} has tool calls, but its role is {role}; only the assistant can call tools.")
    calls = calls_of(called, f"{at}.{calls_name}", where) if is_filled(called) else []
    empty = role == "system" or bool(calls)
    text = text_of("" if empty and text is None else text, f"{at}.{text_name}", where, empty=empty)
    return _Turn(role, text, at, calls, turn, (*read, calls_name))


def _joined_parts(parts: Any, at: str, where: str) -> Any:
    """OpenAI's parts of a content as one text; anything else as it is."""
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        return parts
    if not all("type" in part or "text" in part for part in parts):
        return parts
    for part in parts:
        kind = part.get("type") or "text"
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise DataError(f"{where}: {at} has a part of type {kind!r}, but only text can be learned.")
    return joined_texts(part["text"] for part in parts)


def joined_texts(texts: Iterable[str]) -> str:
    """Texts of one message, or of neighbours, as mistral-common joins them: what is empty is left out."""
    return "\n\n".join(filter(None, texts))


def _what_is_learned(turns: list[_Turn], learn: str | None, where: str) -> tuple[list[Learned], Counter[str]]:
    """What of each turn is learned, and the assistant's turns that are not, by the reason."""
    answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    if learn == "last" or (learn == "completion" and not any(turn.completion for turn in turns)):
        chosen = set(answers[-1:])
    elif learn == "all" or not any(turn.completion for turn in turns):
        chosen = set(answers)
    else:
        chosen = {number for number in answers if turns[number].completion}
    learned: list[Learned] = []
    left_alone: Counter[str] = Counter()
    for number, turn in enumerate(turns):
        at = f"{turn.at}: "
        answer = said(turn.fields, at, where)
        wanted: Learned = answer if answer is not None else number in chosen
        details = turn.fields.get("train_detail")
        if details is not None and answer is not False:
            wanted = stretches(details, len(turn.text), at, where)
        learned.append(wanted)
        if number in answers and not wanted:
            left_alone["excluded by the turn" if answer is False or details is not None else "an earlier turn"] += 1
    return learned, left_alone


def _joined(turns: Iterable[_Turn], learned: Iterable[Learned]) -> tuple[list[Message], list[Learned]]:
    """Messages for a template; neighbours of one role become one where both are learned, or neither is."""
    messages: list[Message] = []
    kept: list[Learned] = []
    for turn, wanted in zip(turns, learned, strict=True):
        if turn.role == "system" and not is_filled(turn.text):
            continue
        last: Message = messages[-1] if messages else {"role": ""}
        same = last["role"] == turn.role != "tool" and wanted is kept[-1] and bool(turn.calls) is ("tool_calls" in last)
        if same and turn.calls:
            last["tool_calls"] += turn.calls
        elif same:
            last["content"] += "\n\n" + turn.text
        else:
            message: Message = {"role": turn.role, "content": turn.text}
            if turn.calls:
                message["tool_calls"] = turn.calls
            if turn.role == "tool":
                message |= {"result": result_of(turn.text), "tool_call_id": turn.fields.get("tool_call_id") or ""}
            messages.append(message)
            kept.append(wanted)
    return messages, kept


def _check(messages: list[Message], learned: list[Learned], tools: list[dict[str, Any]], where: str) -> None:
    for number, message in enumerate(messages):
        if message["role"] == "system" and number:
            before = messages[number - 1]["role"]
            raise DataError(f"{where}: a system message comes after the first {before} message.")
    talk = [message["role"] for message in messages if message["role"] != "system"]
    if not talk or talk[0] != "user":
        raise DataError(f"{where}: the conversation must start with the user, not {talk[0] if talk else 'nobody'}.")
    if "assistant" not in talk and not any(learned):
        raise DataError(f"{where}: the conversation has no assistant message to learn.")
    if not tools and not any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        return
    try:
        json.dumps([tools, messages], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise DataError(f"{where}: a tool or a call contains half of a UTF-16 pair (\\u{code:04x}).") from error

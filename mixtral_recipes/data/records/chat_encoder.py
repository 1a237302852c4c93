"""Conversations through a chat template to tokens, and which of them are learned."""

import bisect
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from mixtral_recipes.data.batches.fit import Encoded
from mixtral_recipes.data.records.chat_templates import template_for
from mixtral_recipes.data.records.conversations import Conversation, Message
from mixtral_recipes.data.records.learning import Span
from mixtral_recipes.data.records.template_sandbox import render
from mixtral_recipes.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Characters nobody writes: two stand around each message while a template is looked through, one pair around the number
# of a control token that is spelled out, and one before a part of a text that does not begin as a text does.
_OPEN, _CLOSE, _LITERAL, _BEFORE = "\U000f5a0a", "\U000f5a0b", "\U000f5a0c", "\U000f5a0d"
_MARK = re.compile(f"({_OPEN}\\d+{_OPEN}|{_CLOSE})")
_PLACEHOLDER = re.compile(f"{_LITERAL}(\\d+){_LITERAL}")
_RESERVED = re.compile(f"[{_OPEN}{_CLOSE}{_LITERAL}{_BEFORE}]")


class _Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: The text.
        turns: The learned stretches of it, turn by turn.
        literal: Where control tokens are spelled out that are text.
        start: Where the first message of the user begins; asked only of what is too long.
    """

    text: str
    turns: list[list[Span]]
    literal: list[Span]
    start: Callable[[], int]


class ChatEncoder:
    """Tokenizes conversations through a chat template, and finds the tokens to learn.

    A template that marks what the assistant says (``{% generation %}``) is trusted. With any other the conversation is
    rendered a second time with marks around each message's text: what lies between an assistant's marks is learned, and
    what the template puts after an answer (the end of the turn). Of a turn that calls tools all is learned that it adds
    to the conversation before it.

    A control token spelled out inside a message, a tool or a call is encoded as the text it is.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None, *, limit: int | None = None) -> None:
        """Choose the template.

        Args:
            tokenizer: A fast transformers tokenizer.
            chat_template: A template, its name, or a file with one; None takes the tokenizer's, or Mixtral-Instruct's.
            limit: Tokens from which on the beginning that is never cut is looked for; None never does.

        Raises:
            DataError: the tokenizer gives no offsets.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} does not provide offsets; use a fast tokenizer (tokenizer.json)."
            )
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        self.tokenizer = tokenizer
        self.limit = limit
        self.template: str = template_for(tokenizer, chat_template)
        self._marks_answers = bool(_GENERATION.search(self.template))
        # Those that JSON would write in another way never appear in it as they are.
        plain = [token for token in added if json.dumps(token, ensure_ascii=False) == f'"{token}"']
        self._plain = plain
        self._control = re.compile("|".join(map(re.escape, sorted(plain, key=len, reverse=True))) or r"(?!)")

    def encode_some(self, some: Sequence[tuple[Conversation, object]]) -> Iterator[Encoded | DataError]:
        """Tokenize conversations with their places; what cannot be tokenized gives its error in its place."""
        rendered: list[_Rendered | DataError] = []
        for talk, where in some:
            try:
                rendered.append(self._render(talk, where))
            except DataError as error:
                rendered.append(error)
        encoded = self._tokenize([item for item in rendered if isinstance(item, _Rendered)])
        for item in rendered:
            yield next(encoded) if isinstance(item, _Rendered) else item

    def prompt(self, messages: Sequence[Message], where: object) -> list[int]:
        """The tokens that an answer to a conversation follows, as they stand before it in training.

        Raises:
            DataError: the template refuses the conversation.
        """
        replaced, spelled = self._with_placeholders(Conversation(list(messages), [False] * len(messages)), where)
        text, _ = self._apply(replaced.messages, where, prompt=True)
        plain, _, literal = _restored(text, spelled)
        return next(self._tokenize([_Rendered(plain, [], literal, lambda: 0)])).tokens

    def settings(self) -> str:
        """What the tokens depend on besides the tokenizer."""
        return self.template

    def _render(self, talk: Conversation, where: object) -> _Rendered:
        self._check_tools(talk, where)
        replaced, spelled = self._with_placeholders(talk, where)
        text, answers = self._apply(replaced.messages, where, replaced.tools)
        plain, moved, literal = _restored(text, spelled)

        def spans_of_messages() -> dict[int, Span]:
            found = self._message_spans(replaced, text, where)
            return {number: (moved(start), moved(end)) for number, (start, end) in found.items()}

        def start() -> int:
            user = next(number for number, message in enumerate(talk.messages) if message["role"] == "user")
            return spans_of_messages().get(user, (0, 0))[0]

        numbers = [number for number, message in enumerate(talk.messages) if message["role"] == "assistant"]
        marked: dict[int, Span] = {}
        if len(answers) == len(numbers):
            marked = {n: (moved(a), moved(b)) for n, (a, b) in zip(numbers, answers, strict=True)}
        wanted = [number for number, learned in enumerate(talk.learned) if learned]
        for number in wanted:
            if number not in marked and "tool_calls" in talk.messages[number]:
                first, last = self._calls_span(replaced, text, number, where)
                marked[number] = (moved(first), moved(last))
        if all(talk.learned[number] is True and number in marked for number in wanted):
            turns = [[marked[number]] for number in wanted]
        else:
            spans = spans_of_messages()
            turns = [self._turn(plain, talk, number, spans.get(number), marked.get(number)) for number in wanted]
        return _Rendered(plain, turns, literal, start)

    def _check_tools(self, talk: Conversation, where: object) -> None:
        called = any("tool_calls" in message or message["role"] == "tool" for message in talk.messages)
        for word, there in (("tools", bool(talk.tools)), ("tool_calls", called)):
            if there and not re.search(rf"\b{word}\b", self.template):
                what = "tools" if word == "tools" else "tool calls"
                raise DataError(
                    f"{where}: has {what}, which this chat template cannot encode (version 1 tokenizers, such as "
                    f"Mixtral 8x7B's, do not support them); use --chat-template mistral-v3 with Mixtral 8x22B's "
                    f"tokenizer, or leave them "
                    "out with data.columns={'tools': None}."
                )

    def _with_placeholders(self, talk: Conversation, where: object) -> tuple[Conversation, list[str]]:
        """The conversation with each control token that is spelled out replaced by its number."""
        spelled: list[str] = []

        def replaced(value: Any) -> Any:
            if isinstance(value, str):
                if mark := _RESERVED.search(value):
                    raise DataError(
                        f"{where}: has the character U+{ord(mark[0]):X}, of Unicode's private use, which is reserved "
                        "here for marks; remove it."
                    )
                return self._control.sub(number, value)
            if isinstance(value, dict):
                return {replaced(key): replaced(element) for key, element in value.items()}
            return [replaced(element) for element in value] if isinstance(value, list) else value

        def number(found: re.Match[str]) -> str:
            spelled.append(found[0])
            return f"{_LITERAL}{len(spelled) - 1}{_LITERAL}"

        messages = [{**replaced(message), "role": message["role"]} for message in talk.messages]
        tools = replaced(talk.tools)
        return (Conversation(messages, talk.learned, tools) if spelled else talk), spelled

    def _apply(
        self, messages: list[Message], where: object, tools: Any = None, *, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        text, spans = render(
            self.template, self.tokenizer.special_tokens_map, messages, where, tools=tools or None, prompt=prompt
        )
        return text, spans if self._marks_answers else []

    def _message_spans(self, talk: Conversation, text: str, where: object) -> dict[int, Span]:
        """Where each message's text is in the rendered conversation."""
        marked: list[Message] = []
        for number, message in enumerate(talk.messages):
            core = message["content"].strip()
            # Marks stand inside the outer spaces, so that a template that strips messages does as it always does.
            before, _, behind = message["content"].partition(core) if core else ("", "", "")
            marks = f"{before}{_OPEN}{number}{_OPEN}{core}{_CLOSE}{behind}" if core else message["content"]
            marked.append({**message, "content": marks})
        with_marks, _ = self._apply(marked, where, talk.tools)
        spans: dict[int, Span] = {}
        plain, start, number = "", 0, -1
        for piece in _MARK.split(with_marks):
            if piece.startswith(_OPEN):
                start, number = len(plain), int(piece.strip(_OPEN))
            elif piece == _CLOSE:
                spans[number] = (start, len(plain))
            else:
                plain += piece
        wanted = {n for n, m in enumerate(talk.messages) if talk.learned[n] and m["content"].strip()}
        if plain != text or not wanted <= spans.keys():
            raise DataError(
                f"{where}: this chat template changes the messages' text, so the assistant's part cannot be found; "
                "mark it in the template with {% generation %}."
            )
        return spans

    def _calls_span(self, talk: Conversation, text: str, number: int, where: object) -> Span:
        """Where a turn that calls tools is in the rendered conversation: what it adds to the conversation before it.

        It is looked for behind the message before it, since what stands further ahead (tools, a system prompt) may
        move as a conversation grows.
        """
        before = talk.messages[:number]
        prompt, _ = self._apply(before, where, talk.tools, prompt=True)
        grown, _ = self._apply(talk.messages[: number + 1], where, talk.tools)
        added = grown[len(prompt) :].rstrip() if grown.startswith(prompt) else ""
        if all(call["function"]["name"] in added for call in talk.messages[number]["tool_calls"]):
            earlier, _ = self._apply(before, where, talk.tools)
            ends = [
                self._message_spans(some, whole, where).get(number - 1, (0, 0))[1]
                for some, whole in (
                    (Conversation(before, [False] * number, talk.tools), earlier),
                    (Conversation(talk.messages, [False] * len(talk.messages), talk.tools), text),
                )
            ]
            behind = prompt[ends[0] :] + added
            if all(ends) and prompt[: ends[0]] == earlier[: ends[0]] and text.startswith(behind, ends[1]):
                end = ends[1] + len(behind)
                return end - len(added), end
        raise DataError(
            f"{where}: has tool calls, and this chat template does not show where they begin and end; mark the "
            "assistant's part with {% generation %}, or use --chat-template mistral-v3."
        )

    def _turn(self, text: str, talk: Conversation, number: int, span: Span | None, marked: Span | None) -> list[Span]:
        """The learned stretches of one turn."""
        message, wanted = talk.messages[number], talk.learned[number]
        if span is None:  # of calls, which a template marks
            return [marked] if marked else []
        is_answer = message["role"] == "assistant"
        content = message["content"]
        start, end = marked or (self._whole_turn(text, span, content) if is_answer else span)
        if isinstance(wanted, bool):
            return [(start, end)]
        offset = span[0] - (len(content) - len(content.lstrip()))
        found: list[Span] = []
        for a, b in wanted:
            begin = start if not content[:a].strip() else offset + a
            stop = end if not content[b:].strip() else offset + b
            found.append((begin, stop))
        return found

    @functools.cached_property
    def _around_answer(self) -> tuple[str, str, str]:
        """What the template puts around an answer.

        Returns:
            The space between the generation prompt and an answer; that with what stands before it, up to the last
            character that is no space; and what comes after an answer.
        """
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text, _ = self._apply(talk, "chat_template")
            prompt, _ = self._apply(talk[:1], "chat_template", prompt=True)
            start, end = self._message_spans(Conversation(talk, [False, True]), text, "chat_template")[1]
        except DataError:
            return "", "", ""
        before = text[len(prompt) : start] if text.startswith(prompt) else ""
        edge = text[max(len(text[:start].rstrip()) - 1, 0) : start]
        return "" if before.strip() else before, edge, text[end:].rstrip()

    @property
    def end_of_turn(self) -> str:
        """What the template puts after an answer, without spaces."""
        return self._around_answer[2].strip()

    def _whole_turn(self, text: str, span: Span, content: str) -> Span:
        """All that is generated in a turn: the answer with its own outer spaces, those before it, what ends the turn.

        A template may strip an answer or not: its spaces are where the template's own text begins behind them.
        """
        start, end = span
        before, edge, behind = self._around_answer
        core = content.strip()
        leading, _, trailing = content.partition(core)
        if edge:
            sizes = range(len(leading), -1, -1)
            kept = (n for n in sizes if text[:start].endswith(edge + leading[len(leading) - n :]))
            start -= next(kept, 0)
        if before and text[:start].endswith(before):
            start -= len(before)
        ends = [end + n for n in range(len(trailing), -1, -1) if text.startswith(trailing[:n], end)]
        if behind:
            for stop in ends:
                if text.startswith(behind, stop):
                    return start, stop + len(behind)
        for stop in ends:
            if token := self._control.match(text, stop):
                return start, token.end()
        return start, span[1]

    def _tokenize(self, rendered: list[_Rendered]) -> Iterator[Encoded]:
        if not rendered:
            return
        texts = [item.text for item in rendered]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for item, ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if item.literal:
                ids, offsets = self._with_literal(item.text, item.literal)
            learned = _inside(offsets, [span for turn in item.turns for span in turn])
            head = 0
            if self.limit is not None and len(ids) > self.limit:
                start = item.start()
                head = sum(end <= start for _, end in offsets)
            yield Encoded(ids, learned, head, _first_tokens(offsets, [turn[0][0] for turn in item.turns if turn]))

    @functools.cached_property
    def _before_parts(self) -> str:
        """What makes the tokenizer encode a part of a text as it does behind a control token.

        Some begin each part as they begin a text (SentencePiece's with its leading space), some only the text
        (Metaspace with ``prepend_scheme="first"``).
        """
        alone = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        behind = self.tokenizer(self._plain[0] + "a", add_special_tokens=False)["input_ids"]
        return "" if behind[1:] == alone else _BEFORE

    def _with_literal(self, text: str, literal: list[Span]) -> tuple[list[int], list[Span]]:
        """Encode with the template's control tokens as tokens, and those spelled out as text."""
        ids: list[int] = []
        offsets: list[Span] = []
        start = 0
        spelled = iter(literal)
        following = next(spelled, None)
        borders: list[re.Match[str]] = []
        for token in self._control.finditer(text):
            while following is not None and following[1] <= token.start():
                following = next(spelled, None)
            if following is None or token.end() <= following[0]:
                borders.append(token)
        for token in [*borders, None]:
            end = token.start() if token else len(text)
            if end > start:
                before = self._before_parts if start else ""
                part = self.tokenizer(
                    before + text[start:end],
                    add_special_tokens=False,
                    split_special_tokens=True,
                    return_offsets_mapping=True,
                )
                moved = start - len(before)
                for number, (a, b) in zip(part["input_ids"], part["offset_mapping"], strict=True):
                    if b > len(before):
                        ids.append(number)
                        offsets.append((max(a + moved, start), b + moved))
            if token:
                ids.append(self.tokenizer.convert_tokens_to_ids(token[0]))
                offsets.append(token.span())
                start = token.end()
        return ids, offsets


def _restored(text: str, spelled: list[str]) -> tuple[str, Callable[[int], int], list[Span]]:
    """The text with control tokens in place of their numbers, where its positions have moved, and where they are."""
    if not spelled:
        return text, lambda position: position, []
    literal: list[Span] = []
    pieces: list[str] = []
    ends, shifts = [0], [0]
    last = 0
    for found in _PLACEHOLDER.finditer(text):
        token = spelled[int(found[1])]
        pieces += [text[last : found.start()], token]
        last = found.end()
        ends.append(last)
        literal.append((found.start() + shifts[-1], found.start() + shifts[-1] + len(token)))
        shifts.append(shifts[-1] + len(token) - len(found[0]))
    return "".join([*pieces, text[last:]]), lambda p: p + shifts[bisect.bisect_right(ends, p) - 1], literal


def _first_tokens(offsets: list[Span], positions: list[int]) -> tuple[int, ...]:
    """The first token that reaches behind each position; both are in order."""
    found: list[int] = []
    token = 0
    for position in sorted(positions):
        while token < len(offsets) and offsets[token][1] <= position:
            token += 1
        found.append(token)
    return tuple(found)


def _inside(offsets: list[Span], learned: list[Span]) -> list[bool]:
    """Whether each token reaches into a learned span; both are in order of position."""
    mask: list[bool] = []
    spans = iter(sorted(learned))
    current = next(spans, None)
    for start, end in offsets:
        while current is not None and current[1] <= start:
            current = next(spans, None)
        mask.append(current is not None and start < current[1] and end > current[0])
    return mask

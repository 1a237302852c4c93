"""Fine-tuning on conversations, with the loss on the assistant's turns."""

import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Dataset

from mixtral_recipes.data.batches.samples import Encoded
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.modules.finetuning import bad_record_policy, need_tokenizer, store_splits
from mixtral_recipes.data.records.bad_records import BadRecord, stop
from mixtral_recipes.data.records.chat_templates import default_template, template_of
from mixtral_recipes.data.records.conversations import Message, conversation
from mixtral_recipes.data.records.open import open_source
from mixtral_recipes.data.records.record import Record
from mixtral_recipes.errors import DataError
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Two private-use characters stand around each message while a template is looked through.
_OPEN, _CLOSE = "\ue00a", "\ue00b"
_AT_ONCE = 256

Span = tuple[int, int]


@takes_nemos_arguments
@dataclass
class ChatDataModule(DataModule):
    """Conversations in a file, a folder with a file per split, or a Hub data set.

    Attributes:
        dataset_root: Where they are. ``messages``, sharegpt's ``conversations``, alpaca and pairs are recognised.
        tokenizer: Unused here; the model's tokenizer is given to `setup`.
        chat_template: A Jinja template, or a file with one; None takes the tokenizer's, or Mixtral-Instruct's.
        columns: Names used here -> names in the records, e.g. ``{"messages": "dialog"}``.
        dataset_kwargs: Accepted for NeMo's recipes.
        val_proportion: Share of the conversations held out for validation if there is no validation split.
        on_bad_record: ``stop`` at the first record that cannot be used, or ``skip`` such records and say how many.
    """

    dataset_root: str | Path | None = None
    tokenizer: Any = None
    chat_template: str | None = None
    columns: dict[str, str] | None = None
    dataset_kwargs: dict[str, Any] | None = None
    val_proportion: float = 0.05
    on_bad_record: str = "stop"

    fixed_length = False
    form = "conversations"

    def datasets(self, tokenizer: Any) -> dict[str, Dataset[Any]]:
        """Read and tokenize the splits, once."""
        need_tokenizer(self, tokenizer)
        encoder = ChatEncoder(tokenizer, self.chat_template)
        source = open_source(self.dataset_root)
        made_from = {
            "chat": source.identity(),
            "template": encoder.template,
            "columns": self.columns,
            "on_bad_record": self.on_bad_record,
        }

        def splits() -> dict[str, Iterable[Encoded]]:
            bad = bad_record_policy(self.on_bad_record)
            return {name: encoder(source.records(name, bad), self.columns, bad) for name in source.splits}

        return store_splits(self, tokenizer, made_from, splits, keep_end=False)

    def check_records(self) -> None:
        """Read every conversation; what only the chat template refuses (an order of roles) shows when it is applied."""
        source, bad = open_source(self.dataset_root), bad_record_policy(self.on_bad_record)
        for name in source.splits:
            for record in source.records(name, bad):
                try:
                    conversation(record, self.columns)
                except DataError as error:
                    bad(error)


class ChatEncoder:
    """Tokenizes conversations through a chat template, and finds the tokens the assistant says.

    A template that marks them (``{% generation %}``) is trusted. With any other the conversation is rendered a
    second time with marks around each message's text: what lies between an assistant's marks is learned, and what the
    template puts after an answer (the end of the turn).

    A control token spelled out inside a message is encoded as the text it is.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        """Choose the template.

        Args:
            tokenizer: A fast transformers tokenizer.
            chat_template: A template or a file with one; None takes the tokenizer's, or Mixtral-Instruct's.

        Raises:
            DataError: the tokenizer gives no offsets.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"{type(tokenizer).__name__} gives no offsets; use a fast tokenizer (tokenizer.json).")
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        if chat_template is not None and "{" not in chat_template:
            chat_template = Path(chat_template).read_text()
        self.tokenizer = tokenizer
        self.template: str = chat_template or template_of(tokenizer) or default_template(set(added))
        self._control = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")

    def __call__(
        self, records: Iterable[Record], columns: dict[str, str] | None = None, bad: BadRecord = stop
    ) -> Iterator[Encoded]:
        """Tokenize records; bad ones are reported and left out."""
        rendered = self._rendered(records, columns, bad)
        while some := list(itertools.islice(rendered, _AT_ONCE)):
            yield from self._encode(some)

    def encode(self, messages: list[Message], where: str = "conversation") -> Encoded:
        """Tokenize one conversation."""
        return next(self._encode([self._render(messages, where)]))

    def _rendered(
        self, records: Iterable[Record], columns: dict[str, str] | None, bad: BadRecord
    ) -> Iterator[tuple[str, list[Span], list[Span]]]:
        for record in records:
            try:
                rendered = self._render(conversation(record, columns), record.where)
            except DataError as error:
                bad(error, record.value)
                continue
            yield rendered

    def _render(self, messages: list[Message], where: str) -> tuple[str, list[Span], list[Span]]:
        """The conversation as text, its learned spans, and the messages' own spans where they spell control tokens."""
        text, learned = self._apply(messages, where)
        believed = bool(_GENERATION.search(self.template))
        suspicious = any(self._control.search(message["content"]) for message in messages)
        if believed and not suspicious:
            return text, learned, []
        spans = self._message_spans(messages, text, where)
        if not believed:
            learned = [self._whole_turn(text, span) for role, span in spans if role == "assistant"]
        return text, learned, [span for _, span in spans] if suspicious else []

    def _apply(self, messages: list[Message], where: str, *, prompt: bool = False) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],  # pyright: ignore[reportArgumentType]
                chat_template=self.template,
                return_assistant_tokens_mask=bool(_GENERATION.search(self.template)),
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError) as error:
            raise DataError(f"{where}: the chat template refuses this conversation ({error}).") from error
        return str(texts[0]), cast(list[Span], spans[0]) if spans else []

    def _message_spans(self, messages: list[Message], text: str, where: str) -> list[tuple[str, Span]]:
        """Where each message's text is in the rendered conversation."""
        marked, roles = [], []
        for number, message in enumerate(messages):
            content = message["content"]
            core = content.strip()
            # Marks stand inside the outer spaces, so that a template that strips messages does as it always does.
            around = content.partition(core)
            marked.append({**message, "content": f"{around[0]}{_OPEN}{number}{_OPEN}{core}{_CLOSE}{around[2]}"})
            roles.append(message["role"])
        with_marks, _ = self._apply(marked, where)
        spans: dict[int, Span] = {}
        plain, start, number = "", 0, -1
        for piece in re.split(f"({_OPEN}\\d+{_OPEN}|{_CLOSE})", with_marks):
            if piece.startswith(_OPEN):
                start, number = len(plain), int(piece.strip(_OPEN))
            elif piece == _CLOSE:
                spans[number] = (start, len(plain))
                number = -1
            else:
                plain += piece
        answers = {number for number, role in enumerate(roles) if role == "assistant"}
        if plain != text or not answers <= spans.keys():
            raise DataError(
                f"{where}: this chat template changes the messages' text, so what the assistant says cannot be found; "
                "mark it in the template with {% generation %}."
            )
        return [(roles[number], span) for number, span in spans.items() if number >= 0]

    @functools.cached_property
    def _around_answer(self) -> tuple[str, str]:
        """What the template puts between the generation prompt and an answer, and after an answer."""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text, _ = self._apply(talk, "chat_template")
            prompt, _ = self._apply(talk[:1], "chat_template", prompt=True)
            start, end = dict(self._message_spans(talk, text, "chat_template"))["assistant"]
        except DataError:
            return "", ""
        before = text[len(prompt) : start] if text.startswith(prompt) else ""
        return "" if before.strip() else before, text[end:].rstrip()

    def _whole_turn(self, text: str, span: Span) -> Span:
        """All that is generated in a turn: the answer, the space before it, and what ends the turn."""
        start, end = span
        before, behind = self._around_answer
        if before and text[:start].endswith(before):
            start -= len(before)
        while end < len(text) and text[end] == " ":  # of the answer itself
            end += 1
        if behind and text.startswith(behind, end):
            return start, end + len(behind)
        token = self._control.match(text, end)
        return start, token.end() if token else span[1]

    def _encode(self, rendered: list[tuple[str, list[Span], list[Span]]]) -> Iterator[Encoded]:
        texts = [text for text, _, _ in rendered]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        rows = zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for (text, learned, contents), ids, offsets in rows:
            if contents:
                ids, offsets = self._with_literal_contents(text, contents)
            yield Encoded(ids, _inside(offsets, learned))

    def _with_literal_contents(self, text: str, contents: list[Span]) -> tuple[list[int], list[Span]]:
        """Encode with the template's control tokens as tokens, and those inside messages as text."""
        ids: list[int] = []
        offsets: list[Span] = []
        start = 0
        borders = [
            m for m in self._control.finditer(text) if not any(a < m.end() and m.start() < b for a, b in contents)
        ]
        for token in [*borders, None]:
            end = token.start() if token else len(text)
            if end > start:
                part = self.tokenizer(
                    text[start:end], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
                )
                ids += part["input_ids"]
                offsets += [(a + start, b + start) for a, b in part["offset_mapping"]]
            if token:
                ids.append(self.tokenizer.convert_tokens_to_ids(token[0]))
                offsets.append(token.span())
                start = token.end()
        return ids, offsets


def _inside(offsets: list[Span], learned: list[Span]) -> list[bool]:
    """Whether each token reaches into a learned span; both are in order of position."""
    mask = []
    spans = iter(sorted(learned))
    current = next(spans, None)
    for start, end in offsets:
        while current is not None and current[1] <= start:
            current = next(spans, None)
        mask.append(current is not None and start < current[1] and end > current[0])
    return mask

"""Prompts with answers: from records, through a template and a column map, to tokens with the loss on the answer."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mixtral_recipes.data.batches.fit import Encoded
from mixtral_recipes.data.records.learning import FIELDS, said
from mixtral_recipes.data.records.record import Record, is_filled
from mixtral_recipes.errors import DataError

_FIELD = re.compile(r"\{(\w+)\}")


class Pair(NamedTuple):
    """A prompt and the answer to learn, e.g. ``("... Answer:", " Paris")``: the texts are joined as they are.

    Attributes:
        prompt: What is asked.
        answer: What is learned.
        left_out: Why nothing is learned from it; empty where it is.
        unused: The record's fields that say nothing here.
    """

    prompt: str
    answer: str
    left_out: str = ""
    unused: tuple[str, ...] = ()

    def texts(self, *, learned: bool) -> Iterator[str]:
        """The text that is learned, or the one that is not."""
        yield self.answer if learned else self.prompt


def text_of(value: Any, name: str, where: object, *, empty: bool = False) -> str:
    """A text of a record.

    Raises:
        DataError: it is missing, not text, empty (unless allowed), or holds half of a UTF-16 pair.
    """
    if not isinstance(value, str):
        what = "is missing" if value is None else f"is {type(value).__name__}, not text"
        raise DataError(f"{where}: {name!r} {what}.")
    if not empty and not value.strip():
        raise DataError(f"{where}: {name!r} is empty.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {name!r} contains half of a UTF-16 pair (\\u{ord(value[error.start]):04x})."
        ) from error
    return value


@dataclass(frozen=True)
class PairTemplate:
    """How a record becomes a pair.

    Attributes:
        template: Text with ``{name}`` for fields; it must end with the answer's. NeMo's default joins with a space.
        answer: Name of the answer's field.
        columns: Names used in the template -> names in the records.
    """

    template: str = "{input} {output}"
    answer: str = "output"
    columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = _FIELD.findall(self.template)
        if self.answer not in names or not self.template.endswith("{" + self.answer + "}"):
            raise DataError(f"prompt_template {self.template!r} must end with the answer's field, {{{self.answer}}}.")
        unknown = set(self.columns) - set(names)
        if unknown:
            raise DataError(f"columns: {sorted(unknown)} are not in prompt_template {self.template!r}.")

    def pair(self, record: Record) -> Pair:
        """Fill in a record; the spaces before the answer belong to it, as they do when it is generated.

        Raises:
            DataError: a field is missing, not text, or the answer is empty.
        """
        value, where, _ = record
        texts = {}
        for name in map(str, _FIELD.findall(self.template)):
            column = self.columns.get(name, name)
            texts[name] = text_of(value.get(column), column, where, empty=name != self.answer)
        before = self.template.removesuffix("{" + self.answer + "}")
        prompt = before.rstrip()
        filled = _FIELD.sub(lambda match: texts[match[1]], prompt)
        read = {self.columns.get(name, name) for name in texts}
        unused = tuple(name for name, found in value.items() if name not in read and is_filled(found))
        unused = tuple(name for name in unused if name not in FIELDS)
        left_out = "excluded by the record" if said(value, "", where) is False else ""
        return Pair(filled, before[len(prompt) :] + texts[self.answer], left_out, unused)


@dataclass(frozen=True)
class PairEncoder:
    """Tokenizes pairs: ``<bos> prompt answer <eos>``, loss on the answer and ``<eos>``.

    The joined text is tokenized once, so the training tokens are those that generation will see; a token counts as
    answer when it ends after the prompt.

    Attributes:
        tokenizer: A transformers tokenizer.
        add_bos: Whether sequences start with the tokenizer's bos, if it has one.
        add_eos: Whether they end with its eos.
        answer_only: Whether the loss is on the answer only.
    """

    tokenizer: Any
    add_bos: bool = True
    add_eos: bool = True
    answer_only: bool = True

    def settings(self) -> list[bool]:
        """What the tokens depend on besides the tokenizer."""
        return [self.add_bos, self.add_eos, self.answer_only]

    def encode_some(self, some: Sequence[tuple[Pair, object]]) -> Iterator[Encoded]:
        """Tokenize pairs with their places."""
        tokenizer = self.tokenizer
        bos = [tokenizer.bos_token_id] if self.add_bos and tokenizer.bos_token_id is not None else []
        eos = [tokenizer.eos_token_id] if self.add_eos and tokenizer.eos_token_id is not None else []
        for ids, is_answer in self._split([pair for pair, _ in some]):
            learned = [False] * len(bos) + (is_answer if self.answer_only else [True] * len(ids)) + [True] * len(eos)
            yield Encoded(
                [*bos, *ids, *eos], learned, max(len(bos), 1), (learned.index(True),) if True in learned else ()
            )

    def _split(self, pairs: list[Pair]) -> Iterator[tuple[list[int], list[bool]]]:
        texts = [pair.prompt + pair.answer for pair in pairs]
        if not getattr(self.tokenizer, "is_fast", False):
            for pair, text in zip(pairs, texts, strict=True):
                yield _split_by_prefix(self.tokenizer, pair.prompt, text)
            return
        # split_special_tokens: "</s>" inside a text is text, as Mistral's own tokenizer has it.
        encoded = self.tokenizer(
            texts, return_offsets_mapping=True, add_special_tokens=False, split_special_tokens=True
        )
        for pair, ids, offsets in zip(pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield ids, [end > len(pair.prompt) for _, end in offsets]


def _split_by_prefix(tokenizer: Any, prompt: str, text: str) -> tuple[list[int], list[bool]]:
    """For a tokenizer without offsets: the answer begins where its tokens differ from the prompt's alone."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    alone = tokenizer.encode(prompt, add_special_tokens=False)
    same = next((n for n, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), min(len(ids), len(alone)))
    return ids, [False] * same + [True] * (len(ids) - same)

"""Fine-tuning on conversations, with the loss on the assistant's turns."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_recipes.data.batches.fit import Fit
from mixtral_recipes.data.chat_tokenizer import with_template
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.modules.pipeline import Example, RecordPipeline
from mixtral_recipes.data.records.bad_records import BadRecord
from mixtral_recipes.data.records.chat_encoder import ChatEncoder
from mixtral_recipes.data.records.chat_templates import template_for, template_of
from mixtral_recipes.data.records.conversations import conversation
from mixtral_recipes.data.records.learning import check_learn
from mixtral_recipes.data.records.open import check_named
from mixtral_recipes.data.records.record import Record
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments


@takes_nemos_arguments
@dataclass
class ChatDataModule(DataModule):
    """Conversations in a file, a folder with a file per split, or a Hub data set.

    Attributes:
        dataset_root: Where they are. ``messages``, sharegpt's ``conversations``, alpaca and pairs are recognised.
        tokenizer: The tokenizer if the recipe's tokenizer is ``"data"``; otherwise the model's is used.
        chat_template: A Jinja template, a file with one, ``mixtral``, ``mistral-v3`` or ``chatml``; None takes the
            tokenizer's, or Mixtral-Instruct's.
        columns: Names this class uses -> names in the records, e.g. ``{"messages": "dialog"}``; None leaves one unread.
        learn: ``all`` of the assistant's turns, the ``last`` one, or the ``completion`` only; None takes the form's
            own: the completion of records with ``prompt`` and ``completion``, all turns otherwise.
        dataset_kwargs: Accepted for NeMo's recipes.
        val_proportion: Share of the conversations held out for validation if there is no validation split.
        on_bad_record: ``stop`` at the first record that cannot be used, or ``skip`` such records, count them and write
            them to a file.
        truncation: How samples longer than ``seq_length`` are cut: ``prompt`` (as much of the first message's start as
            the first answer needs, down to ``prompt_floor``, then the end), ``end``, ``drop`` or ``stop``.
        prompt_floor: Tokens of the prompt that are never cut; None takes a quarter of ``seq_length``.
        streaming: Read and tokenize while training, and keep nothing on disk; for padded samples.
    """

    dataset_root: str | Path | None = None
    tokenizer: Any = None
    chat_template: str | None = None
    columns: dict[str, str | None] | None = None
    learn: str | None = None
    dataset_kwargs: dict[str, Any] | None = None
    val_proportion: float = 0.05
    on_bad_record: str = "stop"
    truncation: str = "prompt"
    prompt_floor: int | None = None
    streaming: bool = False

    fixed_length = False
    form = "conversations"

    def tokenizer_for(self, tokenizer: Any, *, grow: bool) -> Any:
        """As the base says: with the chat template it learns, and, where it may grow, the tokens for it."""
        if tokenizer is None or (self.chat_template is None and template_of(tokenizer)):
            return tokenizer
        return with_template(tokenizer, template_for(tokenizer, self.chat_template), grow=grow)

    def check_places(self) -> None:
        """As the base says."""
        check_named(self.dataset_root)

    def pipeline(self) -> RecordPipeline:
        """The pipeline from its records to samples."""
        check_learn(self.learn)
        limit = self.sample_length + 1
        return RecordPipeline(
            self.opened(self.dataset_root),
            self._read,
            lambda tokenizer: ChatEncoder(tokenizer, self.chat_template, limit=limit),
            Fit(self.sample_length, self.truncation, self.prompt_floor),
            {"chat": [self.columns, self.learn]},
            self.val_proportion,
            self.on_bad_record,
        )

    def _read(self, record: Record, bad: BadRecord) -> Iterator[Example]:
        yield Example(conversation(record, self.columns, self.learn), record.where, record.value)

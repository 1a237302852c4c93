"""SQuAD: question answering over passages, from the Hub or from a file in any of its usual forms."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_recipes.data.batches.fit import Fit
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.modules.pipeline import Example, RecordPipeline
from mixtral_recipes.data.records.bad_records import BadRecord
from mixtral_recipes.data.records.open import Source, check_named
from mixtral_recipes.data.records.pairs import Pair, PairEncoder
from mixtral_recipes.data.records.record import Record
from mixtral_recipes.data.records.squad import Question, questions_of
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments

HUB_ID = "rajpurkar/squad"
NO_ANSWER = "unanswerable"
SKIP = "skip"


@takes_nemos_arguments
@dataclass
class SquadDataModule(DataModule):
    """SQuAD in NeMo's prompt, loss on the answer.

    Attributes:
        dataset_root: A SQuAD v1.1 or v2.0 JSON, JSONL or parquet file; a folder with a file per split; None takes
            ``rajpurkar/squad`` from the Hub. A single file gives 5 % of its passages to validation.
        tokenizer: The tokenizer if the recipe's tokenizer is ``"data"``; otherwise the model's is used.
        dataset_kwargs: Accepted for NeMo's recipes.
        val_proportion: Share of a single file's passages held out for validation.
        no_answer: What is learned as the answer to v2.0's unanswerable questions; ``skip`` leaves them out.
        force_redownload: Whether the Hub is asked again although its files are cached.
        delete_raw: Accepted for NeMo's recipes; the Hub's cache is kept.
        on_bad_record: ``stop`` at the first record that cannot be used, or ``skip`` such records, count them and write
            them to a file.
        truncation: How samples longer than ``seq_length`` are cut: ``prompt`` (its start, down to ``prompt_floor``,
            then the answer's end), ``end``, ``drop`` or ``stop``.
        prompt_floor: Tokens of the prompt that are never cut; None takes a quarter of ``seq_length``.
        streaming: Read and tokenize while training, and keep nothing on disk; for padded samples.
    """

    dataset_root: str | Path | None = None
    tokenizer: Any = None
    dataset_kwargs: dict[str, Any] | None = None
    val_proportion: float = 0.05  # NeMo's
    no_answer: str = NO_ANSWER
    force_redownload: bool = False
    delete_raw: bool = True
    on_bad_record: str = "stop"
    truncation: str = "prompt"
    prompt_floor: int | None = None
    streaming: bool = False

    fixed_length = False
    form = "SQuAD"

    def check_places(self) -> None:
        """As the base says."""
        if self.dataset_root is not None:
            check_named(self.dataset_root)

    def pipeline(self) -> RecordPipeline:
        """The way of its records to samples; no passage is in two splits."""
        return RecordPipeline(
            self._source(),
            self._read,
            PairEncoder,
            Fit(self.sample_length, self.truncation, self.prompt_floor),
            {"squad": self.no_answer},
            self.val_proportion,
            self.on_bad_record,
        )

    def questions(self, split: str = "validation") -> Iterator[Question]:
        """The questions of a split.

        Raises:
            DataError: names the file and line of the first record that cannot be used.
        """
        pipeline = self.pipeline()
        if split in pipeline.splits:
            yield from (example.value for example in pipeline.examples(split))

    def _source(self) -> Source:
        if self.dataset_root is None and self.force_redownload:
            import datasets

            datasets.load_dataset(HUB_ID, download_mode="force_redownload")
        return self.opened(HUB_ID if self.dataset_root is None else self.dataset_root)

    def _read(self, record: Record, bad: BadRecord) -> Iterator[Example]:
        for question, where in questions_of(record, bad):
            answer = question.answers[0] if question.answers else self.no_answer
            left_out = "unanswerable (data.no_answer=skip)" if not question.answers and answer == SKIP else ""
            pair = Pair(question.prompt(), f" {answer}", left_out, question.unused)
            yield Example(pair, where, question, question.context)

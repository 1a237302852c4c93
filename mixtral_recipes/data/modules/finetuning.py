"""Fine-tuning on prompt and answer pairs, with the loss on the answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_recipes.data.batches.fit import Fit
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.modules.pipeline import Example, RecordPipeline
from mixtral_recipes.data.records.bad_records import BadRecord
from mixtral_recipes.data.records.open import check_named
from mixtral_recipes.data.records.pairs import PairEncoder, PairTemplate
from mixtral_recipes.data.records.record import Record
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments


@takes_nemos_arguments
@dataclass
class FineTuningDataModule(DataModule):
    """Records with a prompt and an answer: a file, a folder with a file per split, or a Hub data set.

    Attributes:
        dataset_root: JSONL, JSON, parquet or CSV; a folder with such files named ``training``, ``validation``,
            ``test``; or a Hub id.
        tokenizer: The tokenizer if the recipe's tokenizer is ``"data"``; otherwise the model's is used.
        columns: Names in the template -> names in the records, e.g. ``{"input": "prompt", "output": "completion"}``.
        prompt_template: Text around the fields; it ends with the answer's.
        dataset_kwargs: NeMo's: ``prompt_template``, ``label_key``, ``answer_only_loss``, ``add_bos``, ``add_eos``.
        val_proportion: Share of the records held out for validation if there is no validation split.
        on_bad_record: ``stop`` at the first record that cannot be used, or ``skip`` such records, count them and write
            them to a file.
        truncation: How samples longer than ``seq_length`` are cut: ``prompt`` (its start, down to ``prompt_floor``,
            then the answer's end), ``end``, ``drop`` or ``stop``.
        prompt_floor: Tokens of the prompt that are never cut; None takes a quarter of ``seq_length``.
        streaming: Read and tokenize while training, and keep nothing on disk; for padded samples.
    """

    dataset_root: str | Path | None = None
    tokenizer: Any = None
    columns: dict[str, str] | None = None
    prompt_template: str = "{input} {output}"
    dataset_kwargs: dict[str, Any] | None = None
    val_proportion: float = 0.05  # NeMo's
    on_bad_record: str = "stop"
    truncation: str = "prompt"
    prompt_floor: int | None = None
    streaming: bool = False

    fixed_length = False
    form = "prompts and answers"

    def check_places(self) -> None:
        """As the base says."""
        check_named(self.dataset_root)

    def pipeline(self) -> RecordPipeline:
        """The pipeline from its records to samples."""
        kwargs = self.dataset_kwargs or {}
        template = PairTemplate(
            kwargs.get("prompt_template", self.prompt_template), kwargs.get("label_key", "output"), self.columns or {}
        )

        def encoder(tokenizer: Any) -> PairEncoder:
            return PairEncoder(
                tokenizer,
                add_bos=kwargs.get("add_bos", True),
                add_eos=kwargs.get("add_eos", True),
                answer_only=kwargs.get("answer_only_loss", True),
            )

        def read(record: Record, bad: BadRecord) -> Iterator[Example]:
            yield Example(template.pair(record), record.where, record.value)

        return RecordPipeline(
            self.opened(self.dataset_root),
            read,
            encoder,
            Fit(self.sample_length, self.truncation, self.prompt_floor),
            {"pairs": [template.template, template.answer, template.columns]},
            self.val_proportion,
            self.on_bad_record,
        )

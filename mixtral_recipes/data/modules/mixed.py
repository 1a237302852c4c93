"""Fine-tuning on several data sets in one run, in given shares."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mixtral_recipes.data.batches.batch import EpochOrder
from mixtral_recipes.data.batches.mixture import MixedRows, Mixture
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.modules.pipeline import RecordPipeline
from mixtral_recipes.data.records.record import SPLITS
from mixtral_recipes.errors import DataError


@dataclass
class MixedDataModule(DataModule):
    """Several fine-tuning modules at once; the loss of each is logged next to the overall loss.

    Weights are shares of rows (of packs, if samples are packed): with 0.7 and 0.3, seven of ten rows come from the
    first. Validation takes each source's own validation rows, one source after the other.

    Attributes:
        sources: The modules: pairs, SQuAD, chat. Their lengths and packing are those of the mixture.
        weights: The share of each; None takes each source's rows once per epoch.
    """

    sources: list[Any] = field(default_factory=list)
    weights: list[float] | None = None

    fixed_length = False
    form = "a mixture"

    @property
    def source_names(self) -> list[str]:
        """A name for each source: the end of its path, numbered where two are the same."""
        names = [Path(str(getattr(source, "dataset_root", None) or source.form)).name for source in self.sources]
        names = [name.partition(".")[0] or name for name in names]
        return [f"{name}_{n}" if names.count(name) > 1 else name for n, name in enumerate(names)]

    @property
    def sources_set_up(self) -> Sequence[DataModule]:
        """The sources, with the mixture's lengths, batches and packing."""
        return self._parts

    def pipelines(self) -> list[RecordPipeline]:
        """Those of all sources."""
        return [pipeline for source in self._modules() for pipeline in source.pipelines()]

    def places(self) -> list[str]:
        """Those of all sources."""
        return [place for source in self._modules() for place in source.places()]

    def tokenizer_for(self, tokenizer: Any, *, grow: bool) -> Any:
        """As the base says: that of the sources.

        Raises:
            DataError: two of them name different chat templates.
        """
        conversations = [source for source in self.sources if hasattr(source, "chat_template")]
        named = {source.chat_template for source in conversations if source.chat_template}
        if len(named) > 1:
            raise DataError(
                f"data.sources: {len(named)} different chat templates, but a model learns only one; set the same for "
                "all."
            )
        for source in sorted(conversations, key=lambda source: not source.chat_template):
            tokenizer = source.tokenizer_for(tokenizer, grow=grow)
        return tokenizer

    def setup(self, tokenizer: Any) -> None:
        """Set every source up.

        Raises:
            DataError: there is no source, a weight is not positive, or a source cannot be used.
        """
        modules = self._modules()
        for module in modules:
            module.setup(tokenizer)
        self._parts = modules
        self.made_from = {"weights": self.weights, "sources": [module.identity() for module in modules]}
        self._sets: dict[str, Any] = {name: modules for name in SPLITS if self._having(name)}
        self._pad_id = modules[0]._pad_id

    def rows(self, split: str, sequence_multiple: int = 1) -> MixedRows:
        """The rows of all sources that have the split."""
        having = self._having(split)
        return MixedRows([self._parts[n].rows(split, sequence_multiple) for n in having], having, len(self._parts))

    def make_collate(self, rows: MixedRows, *, length: int | None, multiple: int, sequence_multiple: int) -> Any:
        """As for one source; where packs need the same number of borders, that of the fullest pack of all."""
        made = [
            self._parts[0].make_collate(part, length=length, multiple=multiple, sequence_multiple=sequence_multiple)
            for part in rows.parts
        ]
        sizes = [size for collate in made if (size := getattr(collate, "cu_seqlens_size", None)) is not None]
        return replace(made[0], cu_seqlens_size=max(sizes)) if sizes else made[0]

    def train_order(self, rows: MixedRows) -> EpochOrder:
        """The sources in turn, by their shares."""
        sizes = tuple(len(part) for part in rows.parts)
        return Mixture(sizes, tuple(self.weights or sizes), self.seed)

    def _having(self, split: str) -> list[int]:
        return [number for number, module in enumerate(self._parts) if split in module._sets]

    def _modules(self) -> Sequence[Any]:
        if not self.sources:
            raise DataError("data.sources is empty; a mixture needs data sets (--data A:0.7 --data B:0.3).")
        if self.weights is not None and (len(self.weights) != len(self.sources) or min(self.weights) <= 0):
            raise DataError(f"data.weights={self.weights} must have one positive number for each source.")
        for source in self.sources:
            if not isinstance(source, DataModule) or source.pipeline() is None:
                raise DataError(
                    f"data.sources: {type(source).__name__} cannot be mixed; pairs, SQuAD and conversations can. "
                    "Corpora are mixed in paths: PreTrainingDataModule(paths=[30, 'a', 70, 'b'])."
                )
            if source.streaming:
                raise DataError("data.sources: a mixture cannot be streamed; leave streaming out of its sources.")
        own = {
            name: getattr(self, name)
            for name in ("seq_length", "micro_batch_size", "global_batch_size", "seed", "packed_sequence_specs")
        }
        return [replace(source, **own) for source in self.sources]

"""Fine-tuning on prompt and answer pairs, with the loss on the answer."""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mixtral_recipes.data.batches.samples import Encoded, Fit, tokenized_splits
from mixtral_recipes.data.cache import tokenizer_hash
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.records.bad_records import BadRecord, stop
from mixtral_recipes.data.records.open import open_source
from mixtral_recipes.data.records.pairs import PairEncoder, PairTemplate
from mixtral_recipes.errors import DataError, MixtralRecipesWarning
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments


@takes_nemos_arguments
@dataclass
class FineTuningDataModule(DataModule):
    """Records with a prompt and an answer: a file, a folder with a file per split, or a Hub data set.

    Attributes:
        dataset_root: JSONL, JSON, parquet or CSV; a folder with such files named ``training``, ``validation``,
            ``test``; or a Hub id.
        tokenizer: Unused here; the model's tokenizer is given to `setup`.
        columns: Names in the template -> names in the records, e.g. ``{"input": "prompt", "output": "completion"}``.
        prompt_template: Text around the fields; it ends with the answer's.
        dataset_kwargs: NeMo's: ``prompt_template``, ``label_key``, ``answer_only_loss``, ``add_bos``, ``add_eos``.
        val_proportion: Share of the records held out for validation if there is no validation split.
        on_bad_record: ``stop`` at the first record that cannot be used, or ``skip`` such records and say how many.
    """

    dataset_root: str | Path | None = None
    tokenizer: Any = None
    columns: dict[str, str] | None = None
    prompt_template: str = "{input} {output}"
    dataset_kwargs: dict[str, Any] | None = None
    val_proportion: float = 0.05  # NeMo's
    on_bad_record: str = "stop"

    fixed_length = False
    form = "prompts and answers"

    def datasets(self, tokenizer: Any) -> dict[str, Dataset[Any]]:
        """Read and tokenize the splits, once."""
        need_tokenizer(self, tokenizer)
        kwargs = self.dataset_kwargs or {}
        template = self._template()
        encoder = PairEncoder(
            tokenizer,
            add_bos=kwargs.get("add_bos", True),
            add_eos=kwargs.get("add_eos", True),
            answer_only=kwargs.get("answer_only_loss", True),
        )
        source = open_source(self.dataset_root)
        made_from = {
            "pairs": source.identity(),
            "template": [template.template, template.answer, template.columns],
            "encoder": [encoder.add_bos, encoder.add_eos, encoder.answer_only],
            "on_bad_record": self.on_bad_record,
        }

        def splits() -> dict[str, Iterable[Encoded]]:
            bad = bad_record_policy(self.on_bad_record)
            return {name: encoder(template.pairs(source.records(name, bad), bad)) for name in source.splits}

        return store_splits(self, tokenizer, made_from, splits, keep_end=True)

    def check_records(self) -> None:
        """Fill every record into the template."""
        source, template, bad = open_source(self.dataset_root), self._template(), bad_record_policy(self.on_bad_record)
        for name in source.splits:
            exhaust(template.pairs(source.records(name, bad), bad))

    def _template(self) -> PairTemplate:
        kwargs = self.dataset_kwargs or {}
        return PairTemplate(
            kwargs.get("prompt_template", self.prompt_template), kwargs.get("label_key", "output"), self.columns or {}
        )


def exhaust(stream: Iterable[Any]) -> None:
    """Read a stream to its end and keep nothing of it."""
    deque(stream, maxlen=0)


def need_tokenizer(module: DataModule, tokenizer: Any) -> None:
    """Refuse to continue without a tokenizer.

    Raises:
        DataError: there is none.
    """
    if tokenizer is None:
        raise DataError(f"{type(module).__name__} needs a tokenizer; the checkpoint has none in its context folder.")


def store_splits(
    module: Any,
    tokenizer: Any,
    made_from: dict[str, Any],
    splits: Callable[[], dict[str, Iterable[Encoded]]],
    *,
    keep_end: bool,
    hold_out: bool = True,
) -> dict[str, Dataset[Any]]:
    """The tokenized splits of a fine-tuning module, with a validation set held out where there is none.

    Args:
        module: The data module: its ``sample_length`` and ``val_proportion`` are used.
        tokenizer: What tokenizes.
        made_from: All that the samples depend on besides tokenizer and length.
        splits: Gives the tokenized records of each split.
        keep_end: Whether samples that are too long lose their start, or their end.
        hold_out: Whether a missing validation set is taken from the end of the training set.
    """
    module.made_from = made_from
    key = {**made_from, "tokenizer": tokenizer_hash(tokenizer)}
    fit = Fit(module.sample_length, keep_end)
    stores = tokenized_splits(key, splits, fit, vocab_size=len(tokenizer))
    if hold_out and "validation" not in stores and module.val_proportion:
        stores["train"], held_out = stores["train"].split_off(module.val_proportion)
        if held_out is not None:
            stores["validation"] = held_out
    return {name: store for name, store in stores.items() if len(store) or name == "train"}


def bad_record_policy(name: str) -> BadRecord:
    """``stop``, or ``skip``: the first ten are named, and after that only counted.

    Raises:
        DataError: another word.
    """
    if name not in ("stop", "skip"):
        raise DataError(f"data.on_bad_record={name!r} is not known; use 'stop' or 'skip'.")
    if name == "stop":
        return stop
    seen: Counter[str] = Counter()

    def skip(error: DataError, record: Any = None) -> None:
        seen["bad"] += 1
        if seen["bad"] <= 10:
            warnings.warn(f"left out: {error}", MixtralRecipesWarning, stacklevel=3)
        elif seen["bad"] == 11:
            text = "more records are left out; `mixtral-recipes data check` names them all."
            warnings.warn(text, MixtralRecipesWarning, stacklevel=3)

    return skip

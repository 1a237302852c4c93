"""Pretraining on Megatron's indexed corpora: documents run together and cut into full sequences."""

import contextlib
import errno
import math
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_recipes.data.batches.batch import Batch, Samples
from mixtral_recipes.data.cache import content_hash, preparing, sampled_hash
from mixtral_recipes.data.corpus_paths import check_place, corpora, own_splits
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.records.open import check_trains
from mixtral_recipes.data.records.record import SPLITS, to_judge_on
from mixtral_recipes.errors import DataError
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments
from mixtral_recipes.system.json_files import finite_number
from mixtral_recipes.system.ranks import first

Blend = tuple[list[str], list[float] | None]


class CorpusTokenizer:
    """The part of a tokenizer Megatron's GPTDataset asks for.

    Attributes:
        vocab_size: Tokens.
        eod: End of a document.
        pad: -1: corpora hold no padding, so no token is ever taken for it.
    """

    pad = -1

    def __init__(self, tokenizer: Any) -> None:
        self.vocab_size = len(tokenizer)
        self.eod = self.eos = tokenizer.eos_token_id
        self.special_tokens_dict = {"eos_token": self.eos}
        self.unique_identifiers = {"class": type(tokenizer).__name__, "vocab_size": self.vocab_size, "eod": self.eod}


@takes_nemos_arguments
@dataclass
class PreTrainingDataModule(DataModule):
    """Indexed corpora (``.bin`` and ``.idx``), blended, under NeMo's name and arguments.

    Attributes:
        paths: A corpus (its path with or without ``.bin``), a list of corpora, a list of weights and corpora in turn
            (``[30, "a", 70, "b"]``), or a dict with such lists under ``train``, ``validation`` and ``test``. A text
            file (JSONL with ``text``, parquet, CSV, txt), a folder of such files or ``hf://org/name`` in a corpus's
            place is tokenized once into the cache. If a folder or Hub data set with a validation split is the only
            entry, its own splits are used; in a list, its training split is.
        tokenizer: The tokenizer if the recipe's tokenizer is ``"data"``; otherwise the model's is used.
        split: Shares of train, validation and test documents; not used with a dict of paths.
        text_key: The field or column that holds the text.
        on_bad_record: ``stop`` at the first record of a text file that has no text or cannot be read, or ``skip`` such
            records, count them and write them to a file.
        reset_position_ids: Start positions at 0 again after each end of document.
        reset_attention_mask: Keep each document from seeing the others (needs micro_batch_size 1).
        eod_mask_loss: Leave ends of documents out of the loss.
        create_attention_mask: Accepted for NeMo's recipes; the causal mask is made inside the attention.
        index_mapping_dir: Where index maps are cached; None takes ``$MIXTRAL_RECIPES_HOME/data``.
        num_dataset_builder_threads: Threads that build the corpora of a blend.
        num_train_samples: Sequences to draw, in Megatron's order; None takes one pass over the corpus (over all
            corpora of a blend), in a new order each epoch.
        num_val_samples: As above, for validation.
        num_test_samples: As above, for the test split.
    """

    paths: Any = None
    seq_length: int = 2048
    tokenizer: Any = None
    micro_batch_size: int = 4
    global_batch_size: int = 8
    split: str = "900,50,50"
    text_key: str = "text"
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    create_attention_mask: bool = False
    index_mapping_dir: str | None = None
    num_dataset_builder_threads: int = 1
    num_train_samples: int | None = None
    num_val_samples: int | None = None
    num_test_samples: int | None = None
    on_bad_record: str = "stop"

    packs = False
    form = "corpora"

    @property
    def shuffles(self) -> bool:
        """Whether each epoch has its own order; Megatron's order is kept where it counts the samples."""
        return self.num_train_samples is None

    def check_places(self) -> None:
        """As the base says, and what the shares of the splits are."""
        _check_split(self.split)
        if not self.paths:
            raise DataError("data.paths is not set; set it to a corpus made by `mixtral-recipes data prepare`.")
        for name in self.places():
            check_place(name)

    def places(self) -> list[str]:
        """Its corpora, of all splits."""
        found: list[str] = []
        for given in self.paths.values() if isinstance(self.paths, dict) else [self.paths]:
            names, _ = split_weights([given] if isinstance(given, str | Path) else list(given or ()))
            found += map(str, names)
        return found

    def datasets(self, tokenizer: Any) -> dict[str, Samples]:
        """Open the corpora, building the index maps once."""
        if self.pack_size is not None:
            raise DataError(
                "PreTrainingDataModule does not support packed_sequence_specs: its sequences are already full."
            )
        if tokenizer is None:
            raise DataError("PreTrainingDataModule needs a tokenizer (model.tokenizer, or the checkpoint's).")
        _check_split(self.split)
        if self.reset_attention_mask and self.micro_batch_size != 1:
            raise DataError(f"reset_attention_mask needs micro_batch_size=1, not {self.micro_batch_size}.")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Could not determine rank")  # one process, no torchrun
            splits = self._build(tokenizer)
        found = {name: split for name, split in zip(SPLITS, splits, strict=True) if split is not None and len(split)}
        if "train" not in found and not self.judges:
            raise DataError(f"{self.paths}: fewer than seq_length + 1 = {self.seq_length + 1} tokens to train on.")
        return found

    def make_collate(self, rows: Any, *, length: int | None, multiple: int, sequence_multiple: int) -> Any:
        """Sequences are full: they only need stacking."""
        return stack

    def _build(self, tokenizer: Any) -> list[Any]:
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        blends = self._blends(tokenizer)
        self.made_from = _content(blends)
        config = GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.seq_length,
            tokenizer=CorpusTokenizer(tokenizer),  # pyright: ignore[reportArgumentType]
            reset_position_ids=self.reset_position_ids,
            reset_attention_mask=False,
            eod_mask_loss=self.eod_mask_loss,
            create_attention_mask=False,
            inter_document_masking=self.reset_attention_mask,
            num_dataset_builder_threads=self.num_dataset_builder_threads,
            **blends,
        )
        sizes = [self.num_train_samples, self.num_val_samples, self.num_test_samples]
        sizes = self._sizes_of_weighted(config, sizes)
        builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)  # pyright: ignore[reportArgumentType]
        made_from = {"blends": blends, "of": self.made_from, "sizes": sizes, "length": self.seq_length}
        kind = str(Path(self.index_mapping_dir).absolute()) if self.index_mapping_dir else "index_maps"
        with contextlib.ExitStack() as stack:
            folder, empty = first(lambda: stack.enter_context(preparing(kind, made_from | {"seed": self.seed})))
            if empty is not None:
                self._built(builder, empty)
                first(lambda: _check_maps(empty))
            first(stack.close)
        return self._built(builder, folder)

    def _built(self, builder: Any, maps: Path) -> list[Any]:
        """The splits; rank 0 writes the index maps where they are missing, behind a barrier the others read them."""
        builder.config.path_to_cache = str(maps)
        try:
            return builder.build()
        except (AssertionError, IndexError) as error:
            raise DataError(f"{self.paths}: Megatron cannot build this blend ({error}).") from error
        except Exception as error:
            if isinstance(error.__cause__, OSError):  # Megatron advises to change a setting of its own
                raise error.__cause__ from None
            raise

    def _blends(self, tokenizer: Any) -> dict[str, Any]:
        """``blend`` or ``blend_per_split`` of Megatron's config."""
        if not self.paths:
            raise DataError("data.paths is not set; set it to a corpus made by `mixtral-recipes data prepare`.")
        if not isinstance(self.paths, dict):
            paths = [self.paths] if isinstance(self.paths, str | Path) else list(self.paths)
            own = own_splits(str(paths[0])) if len(paths) == 1 else ["train"]
            if self.judges:
                return {"blend": self._blend(paths, tokenizer, to_judge_on(own)), "split": "0,1,0"}
            check_trains(paths[0], own)
            if "validation" not in own:
                return {"blend": self._blend(paths, tokenizer), "split": self.split}
            blends = [
                (corpora(str(paths[0]), tokenizer, self.text_key, name, self.on_bad_record), None) for name in own
            ]
            return {"blend_per_split": [dict(zip(own, blends, strict=True)).get(name) for name in SPLITS]}
        unknown = set(self.paths) - set(SPLITS)
        if unknown:
            raise DataError(f"data.paths: {sorted(unknown)} is not a split; use {', '.join(SPLITS)}.")
        given = [self.paths.get(name) for name in SPLITS]
        return {"blend_per_split": [self._blend(paths, tokenizer) if paths else None for paths in given]}

    def _blend(self, paths: Any, tokenizer: Any, split: str = "train") -> Blend:
        if isinstance(paths, str | Path):
            paths = [paths]
        names, weights = split_weights(list(paths))
        found = [corpora(name, tokenizer, self.text_key, split, self.on_bad_record) for name in names]
        several = next((name for name, prefixes in zip(names, found, strict=True) if len(prefixes) > 1), None)
        if weights is not None and several is not None:
            raise DataError(f"data.paths: {several} has several corpora; give each of them its own weight.")
        return [prefix for prefixes in found for prefix in prefixes], weights

    def _sizes_of_weighted(self, config: Any, sizes: list[int | None]) -> list[int | None]:
        """Megatron wants a size where there are weights: as many sequences as the corpora hold in all."""
        whole = config.blend is not None
        for number in range(len(SPLITS)):
            blend = config.blend if whole else config.blend_per_split[number]
            if blend is None or blend[1] is None or sizes[number] is not None:
                continue
            share = config.split_matrix[number] if whole else (0.0, 1.0)
            sizes[number] = max(1, _tokens(blend[0], share) // self.seq_length) if share else 0
        return sizes


def _check_split(text: str) -> None:
    """Refuse shares that Megatron would accept: negative ones, NaN, too many, or none above 0."""
    try:
        shares = [finite_number(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= len(SPLITS) or min(shares) < 0 or not 0 < sum(shares) < math.inf:
        raise DataError(
            f"data.split={text!r}: must be the shares of {', '.join(SPLITS)}, separated by commas, e.g. 900,50,50; "
            "none may be negative, and at least one must be more than 0."
        )


def _check_maps(folder: Path) -> None:
    """Refuse index maps that are cut off: Megatron writes them with `numpy.save`, which may not tell of a full disk."""
    for file in folder.glob("*.npy"):
        try:
            np.load(file, mmap_mode="r")
        except (ValueError, EOFError):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from None


def _content(blends: dict[str, Any]) -> dict[str, Any]:
    """What a blend holds: each corpus by the content of its documents' lengths and of its tokens, and the weights."""
    every: list[Blend] = (
        [blends["blend"]] if "blend" in blends else [each for each in blends["blend_per_split"] if each]
    )
    blended = [
        [[[content_hash(Path(prefix + ".idx")), sampled_hash(Path(prefix + ".bin"))] for prefix in names], weights]
        for names, weights in every
    ]
    return {"blend": blended, "split": blends.get("split")}


def stack(samples: Sequence[dict[str, Any]]) -> Batch:
    """Stack GPTDataset's samples; document borders, where they are asked for, become ``cu_seqlens``."""
    import torch

    batch = Batch(
        tokens=torch.stack([s["tokens"] for s in samples]),
        labels=torch.stack([s["labels"] for s in samples]),
        loss_mask=torch.stack([s["loss_mask"] for s in samples]),
        position_ids=torch.stack([s["position_ids"] for s in samples]),
    )
    if "cu_seqlens" in samples[0]:
        batch["cu_seqlens"] = torch.unique_consecutive(samples[0]["cu_seqlens"])
    return batch


def split_weights(paths: list[Any]) -> tuple[list[str], list[float] | None]:
    """``[30, "a", 70, "b"]`` as names and weights; no weights when there are only names."""
    numbers = [_as_number(item) for item in paths]
    if len(paths) >= 2 and len(paths) % 2 == 0 and all(n is not None for n in numbers[::2]):
        weights = [n for n in numbers[::2] if n is not None]
        if min(weights) <= 0:
            raise DataError(f"data.paths: weights must be positive, but are {weights}.")
        return [str(name) for name in paths[1::2]], weights
    return [str(name) for name in paths], None


def _as_number(item: Any) -> float | None:
    if isinstance(item, int | float):
        return float(item)
    return float(item) if isinstance(item, str) and re.fullmatch(r"\d+(\.\d*)?|\.\d+", item) else None


def _tokens(prefixes: list[str], share: tuple[float, float]) -> int:
    """Tokens of a share of the documents of several corpora."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    total = 0
    for prefix in prefixes:
        corpus = IndexedDataset(prefix)  # the lengths live in its memory map: keep it until they are read
        lengths = corpus.sequence_lengths
        first, last = (round(edge * len(lengths)) for edge in share)
        total += int(lengths[first:last].sum(dtype=np.int64))
    return total

"""What `PreTrainingDataModule.paths` may name: corpora, text files, folders of either, and Hub data sets.

Text is tokenized once into the cache. Finished parts stay there, so that a run that was stopped meanwhile continues
after them.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_recipes.data.cache import content_hash, is_prepared, prepared, remembered
from mixtral_recipes.data.corpus_index import check_index
from mixtral_recipes.data.records.files import suffix_of
from mixtral_recipes.data.records.folders import by_split, files_in, is_about_the_folder
from mixtral_recipes.data.records.json_stream import json_splits
from mixtral_recipes.data.records.open import check_trains, open_source
from mixtral_recipes.data.records.parse import is_json_lines
from mixtral_recipes.data.records.record import SPLIT_NAMES
from mixtral_recipes.data.records.text_parts import TEXT_SUFFIXES
from mixtral_recipes.embedded import resolve
from mixtral_recipes.errors import DataError
from mixtral_recipes.system.files import read_json, replacing
from mixtral_recipes.system.home import data_home
from mixtral_recipes.system.pointers import refuse_pointer
from mixtral_recipes.system.progress import progress_bar
from mixtral_recipes.system.ranks import launched_rank

HUB = "hf://"


def corpora(
    name: str, tokenizer: Any, text_key: str = "text", split: str = "train", on_bad_record: str = "stop"
) -> list[str]:
    """The prefixes of the corpora that an entry of ``paths`` names; text is tokenized into the cache first.

    Args:
        name: A corpus (with or without ``.bin``), a text file, a folder of corpora or of text files, ``hf://org/name``.
        tokenizer: What tokenizes, and what finished corpora must have been made with.
        text_key: The field or column of the text.
        split: Which split of a folder, JSON file or Hub data set that has several.
        on_bad_record: What becomes of records without text: ``stop`` or ``skip``.

    Raises:
        DataError: there is no such thing, or its tokens are not this tokenizer's.
    """
    if name.startswith(HUB):
        return [_tokenized_rows(name, tokenizer, text_key, split, on_bad_record)]
    path = resolve(name).expanduser()
    prefix = corpus_at(path)
    if prefix is None and path.is_dir():
        found = folder_files(path)
        if split == "train":
            check_trains(name, found)
        files = found[split]
        if files[0].suffix != ".idx":
            return [_tokenized_files(name, files, tokenizer, text_key, split, on_bad_record)]
        prefixes = [file.with_suffix("") for file in files]
    elif prefix is None and path.is_file():
        return [_tokenized_files(name, [path], tokenizer, text_key, split, on_bad_record)]
    else:
        check_place(name)
        assert prefix is not None
        prefixes = [prefix]
    for one in prefixes:
        check_index(one)
        _check_tokenizer(one, tokenizer)
    return list(map(str, prefixes))


def check_place(name: str) -> None:
    """Check that an entry of ``paths`` exists, without reading files or asking the Hub.

    Raises:
        DataError: it is not, or half of it, or the folder holds neither corpora nor text.
    """
    path = resolve(name).expanduser() if not name.startswith(HUB) else None
    if path is None or corpus_at(path) is not None:
        return
    if path.is_dir():
        check_trains(name, folder_files(path))
    elif not path.exists():
        raise _not_there(path.with_suffix("") if path.suffix in (".bin", ".idx") else path, ".bin")


def _not_there(prefix: Path, ending: str) -> DataError:
    return DataError(
        f"{prefix}{ending}: no such file; create it with `mixtral-recipes data prepare TEXT --output {prefix}` (for a "
        "data set on the Hub, use hf://org/name)."
    )


def own_splits(name: str) -> list[str]:
    """The splits that a folder, JSON file or Hub data set has by itself; any other name has ``train`` only."""
    if name.startswith(HUB):
        return open_source(name).splits
    path = resolve(name).expanduser()
    if corpus_at(path) is None and path.is_dir():
        return list(folder_files(path))
    inside = json_splits(path) if suffix_of(path) == ".json" and path.is_file() and not is_json_lines(path) else []
    return [SPLIT_NAMES[name.lower()] for name in inside] or ["train"]


def corpus_at(path: Path) -> Path | None:
    """The prefix of the corpus at a path (with or without ``.bin`` or ``.idx``); None if there is none.

    Raises:
        DataError: one half of it is not there.
    """
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if not prefix.name:  # this folder, or the root
        return None
    files = [prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx")]
    for file in files:
        refuse_pointer(file, DataError)
    there = [file for file in files if file.is_file()]
    if len(there) == 1 and (path in there or not path.exists()):
        raise _not_there(prefix, ".idx" if there == files[:1] else ".bin")
    return prefix if len(there) == 2 else None


def folder_files(folder: Path) -> dict[str, list[Path]]:
    """The corpora (as ``.idx`` files) of a folder, or else its text files, by split.

    A split is told by the name of the file or of the folder it is in; where none is named so, all are ``train``. A
    README and licence files are not documents.

    Raises:
        DataError: there are neither, or one half of a corpus is not there.
    """
    files = files_in(folder, (".idx",))
    for half in (*files, *(files_in(folder, (".bin",)) if files else ())):
        corpus_at(half)
    files = files or [p for p in files_in(folder, TEXT_SUFFIXES) if not is_about_the_folder(p)]
    if not files:
        raise DataError(f"{folder}: has neither corpora (.bin and .idx) nor text files ({', '.join(TEXT_SUFFIXES)}).")
    found = by_split(folder, files)
    if list(found) == [""]:
        return {"train": files}
    return {name: some for name, some in found.items() if name}


def _tokenized_files(
    name: str, files: list[Path], tokenizer: Any, text_key: str, split: str, on_bad_record: str
) -> str:
    hashes = [content_hash(file) for file in files]
    content: dict[str, Any] = {"file": hashes[0] if len(files) == 1 else hashes}
    if any(suffix_of(file) == ".json" for file in files):
        content["split"] = split
    return _tokenized(name, content, lambda: files, tokenizer, text_key, split, on_bad_record)


def _tokenized_rows(name: str, tokenizer: Any, text_key: str, split: str, on_bad_record: str) -> str:
    source = open_source(name)
    if split == "train":
        check_trains(name, source.splits)
    rows = source.hub[split]
    if text_key not in rows.column_names:
        raise DataError(
            f"{name}: no column {text_key!r}; it has {', '.join(rows.column_names)}; set data.text_key to one of them."
        )
    text = data_home() / "corpora" / f".{rows._fingerprint}.{text_key}.parquet"

    def files() -> list[Path]:
        if not text.is_file():
            with replacing(text) as staging:
                rows.select_columns([text_key]).to_parquet(staging)
        return [text]

    corpus = _tokenized(name, {"rows": rows._fingerprint}, files, tokenizer, text_key, split, on_bad_record)
    text.unlink(missing_ok=True)
    return corpus


def _tokenized(
    name: str,
    content: dict[str, Any],
    files: Callable[[], list[Path]],
    tokenizer: Any,
    text_key: str,
    split: str,
    on_bad_record: str,
) -> str:
    """The prefix of the cached corpus made of text files; the first process that asks makes it."""
    from mixtral_recipes.data.corpus import Encoder, prepare_corpus

    encoder = Encoder.of(tokenizer)
    made_from = {**content, "text_key": text_key, "encoder": encoder.fingerprint()}
    if on_bad_record != "stop":
        made_from["on_bad_record"] = on_bad_record
    home = data_home() / "corpora"

    made: list[Any] = []

    def build(folder: Path) -> None:
        inputs = files()
        with progress_bar("tokenizing", sum(file.stat().st_size for file in inputs)) as advance:
            made.append(
                prepare_corpus(
                    inputs,
                    folder / "corpus",
                    encoder,
                    text_key=text_key,
                    split=split,
                    on_bad_record=on_bad_record,
                    parts_folder=home,
                    progress=advance,
                )
            )

    # The reader sees what rank 0 says, and any process of the job may be the one that makes it.
    says = launched_rank() == 0 and not is_prepared("corpora", made_from)
    if says:
        print(f"data: tokenizing {name} once, into {home}", file=sys.stderr, flush=True)
    prefix = prepared("corpora", made_from, build) / "corpus"
    if says:
        reused = f", {made[0].reused_parts} parts reused from an earlier run" if made and made[0].reused_parts else ""
        left_out = dataclasses.replace(made[0], prefix=prefix).left_out() if made else ""
        print(f"data: {name}: {_size_of(prefix)}{left_out}{reused}", file=sys.stderr, flush=True)
    return str(prefix)


def _size_of(prefix: Path) -> str:
    """A corpus in a few words."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    corpus = IndexedDataset(str(prefix))
    lengths = corpus.sequence_lengths
    return f"{len(lengths):,} documents, {int(lengths.sum(dtype=np.int64)):,} tokens"


def _check_tokenizer(prefix: Path, tokenizer: Any) -> None:
    """Refuse a corpus that another tokenizer made; where nothing says which one did, tokens this one does not have."""
    from mixtral_recipes.data.corpus import record_of
    from mixtral_recipes.data.tokenizers import text_identity

    bin_file = prefix.with_name(prefix.name + ".bin")
    record = read_json(record_of(prefix)) or {}
    recorded = record.get("tokenizer")
    if isinstance(recorded, str) and record.get("bytes") == bin_file.stat().st_size:  # else it is of an earlier corpus
        own = text_identity(tokenizer)
        if recorded != own:
            raise DataError(
                f"{prefix}.bin was prepared with another tokenizer ({recorded[:12]}; this run's is {own[:12]}): "
                "prepare it again with this model's tokenizer (--tokenizer), or set model.tokenizer to the other one."
            )
        return
    largest = int(remembered("largest_tokens", bin_file, lambda file: str(_largest_token(prefix, file))))
    if largest >= len(tokenizer):
        raise DataError(
            f"{bin_file} contains token {largest}, but the tokenizer has only {len(tokenizer)} tokens; prepare it "
            "again with this model's tokenizer."
        )


def _largest_token(prefix: Path, bin_file: Path) -> int:
    """The largest token of a corpus; -1 where it is empty."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dtype = np.dtype(IndexedDataset(str(prefix)).index.dtype)
    if not (count := bin_file.stat().st_size // dtype.itemsize):
        return -1
    tokens = np.memmap(bin_file, mode="r", dtype=dtype, shape=(count,))
    step = 1 << 26
    return max(int(tokens[start : start + step].max()) for start in range(0, len(tokens), step))

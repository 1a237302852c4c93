"""From text to Megatron's indexed corpus: ``NAME.bin`` (tokens) and ``NAME.idx`` (where documents start).

``NAME.prepared.json`` beside them says which tokenizer made it, by content; training with another one is refused.

Input is cut into parts that processes tokenize one by one; finished parts stay, so that a stopped run continues there,
and memory does not grow with the input. Nothing here loads torch or transformers: worker processes start fast.
"""

import array
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_recipes.data.cache import code_version, save_array
from mixtral_recipes.data.corpus_index import HEADER, VERSION
from mixtral_recipes.data.records.bad_records import Skipped, check_policy, stop
from mixtral_recipes.data.records.text_parts import TextPart, documents, split_into_parts
from mixtral_recipes.errors import DataError, is_panic, of_the_machine
from mixtral_recipes.system.files import naming, replacing, sibling, sync, write_json
from mixtral_recipes.system.locks import held
from mixtral_recipes.system.remembered import state_of

# Megatron-Core `datasets/indexed_dataset.py`: the codes of the token types used here.
_TYPE_CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}
_DOCUMENTS_AT_ONCE = 512


@dataclass(frozen=True)
class Encoder:
    """Turns documents into token arrays; small enough to be sent to worker processes.

    Attributes:
        tokenizer: A ``tokenizers.Tokenizer``, or an object with ``encode_batch(texts) -> list of lists``.
        bos: Put in front of each document; None puts nothing.
        eos: Put after each document; None puts nothing.
        vocab_size: Decides whether tokens take two bytes or four.
        identity: The tokenizer's `text_identity`, which the corpus records.
    """

    tokenizer: Any
    bos: int | None
    eos: int | None
    vocab_size: int
    identity: str

    @classmethod
    def of(cls, tokenizer: Any, *, bos: bool = True, eos: bool = True) -> "Encoder":
        """The encoder of a transformers tokenizer (or of one from `mixtral_recipes.data.tokenizers`)."""
        from mixtral_recipes.data.tokenizers import text_identity

        return cls(
            getattr(tokenizer, "backend_tokenizer", tokenizer),
            tokenizer.bos_token_id if bos else None,
            tokenizer.eos_token_id if eos else None,
            len(tokenizer),
            text_identity(tokenizer),
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 where the vocabulary fits (as Megatron's ``DType.optimal_dtype``), else int32."""
        return np.dtype(np.uint16 if self.vocab_size < 65500 else np.int32)

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize documents; a control token that one spells out is text, or its end would be found in its middle.

        Returns:
            All tokens one after the other, and the length of each document in tokens.
        """
        if hasattr(self.tokenizer, "encode_batch_fast"):
            self.tokenizer.encode_special_tokens = True  # not in the file: the last call decides
            encoded = (e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        else:
            encoded = iter(self.tokenizer.encode_batch(texts))
        code = self.dtype.char
        front, back = (array.array(code, [] if i is None else [i]) for i in (self.bos, self.eos))
        tokens, lengths = array.array(code), np.empty(len(texts), np.int32)
        for number, ids in enumerate(encoded):
            row = front + array.array(code, ids) + back  # made from a list at once: far faster than extending by one
            tokens += row
            lengths[number] = len(row)
        return np.frombuffer(tokens, self.dtype), lengths

    def fingerprint(self) -> str:
        """What the tokens depend on."""
        definition = self.tokenizer.to_str() if hasattr(self.tokenizer, "to_str") else self.tokenizer.fingerprint()
        text = json.dumps([definition, self.bos, self.eos, str(self.dtype)])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Prepared:
    """What `prepare_corpus` made.

    Attributes:
        prefix: Path of the corpus without ``.bin`` and ``.idx``.
        documents: How many.
        tokens: How many, special ones included.
        reused_parts: Parts taken over from a run that was stopped.
        empty: Texts that hold nothing, which are left out.
        skipped: Records that could not be used; they stand in `skipped_of`.
    """

    prefix: Path
    documents: int
    tokens: int
    reused_parts: int
    empty: int
    skipped: int

    def left_out(self) -> str:
        """What is not in the corpus, in a few words; empty where all is."""
        told = [f", {self.empty:,} empty texts left out"] if self.empty else []
        if self.skipped:
            told.append(f", {self.skipped:,} record(s) skipped, see {skipped_of(self.prefix)}")
        return "".join(told)


def prepare_corpus(
    inputs: list[Path],
    prefix: Path,
    encoder: Encoder,
    *,
    text_key: str = "text",
    num_workers: int = 1,
    part_bytes: int = 32 << 20,
    overwrite: bool = False,
    split: str = "train",
    on_bad_record: str = "stop",
    parts_folder: Path | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Prepared:
    """Tokenize text files into ``prefix.bin`` and ``prefix.idx``.

    Args:
        inputs: JSONL, parquet, CSV or text files (documents of a text file are separated by blank lines).
        prefix: Where to write.
        encoder: How to tokenize.
        text_key: The field or column that holds the text.
        num_workers: Processes; 1 tokenizes here.
        part_bytes: Input bytes per part.
        overwrite: Whether an existing corpus is replaced.
        split: Which split of a JSON file that holds several.
        on_bad_record: ``stop`` at the first record without text, or ``skip`` and keep such records in `skipped_of`.
        parts_folder: Where finished parts wait for the others; None takes the folder of ``prefix``.
        progress: Called with the input bytes of each finished part.

    Raises:
        DataError: names the file and line of a document that cannot be used, or a corpus that exists.
    """
    check_policy(on_bad_record)
    with held(prefix):
        if not overwrite and _named(prefix, ".idx").exists():
            raise DataError(f"{prefix}.idx exists; choose another --output, or pass --overwrite.")
        parts = [part for path in inputs for part in split_into_parts(path, text_key, part_bytes, split)]
        plan = _plan_hash(parts, encoder, on_bad_record)
        staging = (parts_folder or prefix.parent) / f".{prefix.name}.{plan}.parts"
        staging.mkdir(parents=True, exist_ok=True)
        reused = 0
        waiting: list[tuple[TextPart, Path]] = []
        for number, part in enumerate(parts):
            target = staging / f"{number:06d}"
            if target.with_suffix(".npy").is_file():
                reused += 1
                progress(part.size)
            else:
                waiting.append((part, target))
        for part in _encode_all(waiting, encoder, on_bad_record, num_workers):
            progress(part.size)
        made = [staging / f"{number:06d}" for number in range(len(parts))]
        documents, tokens = _join(made, prefix, encoder, inputs)
        counts = [json.loads(part.with_suffix(".json").read_text()) for part in made]
        empty, skipped = (sum(count[what] for count in counts) for what in ("empty", "skipped"))
        if skipped:
            with replacing(skipped_of(prefix)) as file:
                file.write_text("".join(found.read_text() for part in made if (found := _skipped_in(part)).is_file()))
        shutil.rmtree(staging)
        return Prepared(prefix, documents, tokens, reused, empty, skipped)


def skipped_of(prefix: Path) -> Path:
    """The file beside a corpus with the records that could not be used, as `Skipped` writes them."""
    return prefix.with_name(prefix.name + ".skipped.jsonl")


def _skipped_in(part: Path) -> Path:
    return part.with_suffix(".skipped.jsonl")


def _plan_hash(parts: list[TextPart], encoder: Encoder, on_bad_record: str) -> str:
    """Names the staging folder: other input, other tokenizer or other cuts never meet in one."""
    files = sorted({part.path for part in parts})
    plan = [
        code_version(),
        state_of(files),
        [dataclasses.astuple(part)[1:] for part in parts],
        encoder.fingerprint(),
        on_bad_record,
    ]
    return hashlib.sha256(json.dumps(plan, default=str).encode()).hexdigest()[:12]


def _encode_all(
    waiting: list[tuple[TextPart, Path]], encoder: Encoder, on_bad_record: str, num_workers: int
) -> Iterator[TextPart]:
    """Encode parts, here or in processes, and yield each when it is on disk."""
    if num_workers <= 1 or len(waiting) <= 1:
        for part, target in waiting:
            _encode_part(part, target, encoder, on_bad_record)
            yield part
        return
    # Each process is one thread of the tokenizer: the parts are the parallelism.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pool = concurrent.futures.ProcessPoolExecutor(
        min(num_workers, len(waiting)), multiprocessing.get_context("spawn"), _set_encoder, (encoder,)
    )
    try:
        futures = {pool.submit(_encode_with_own, part, target, on_bad_record): part for part, target in waiting}
        for done in concurrent.futures.as_completed(futures):
            done.result()
            yield futures[done]
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


_own_encoder: Encoder | None = None


def _set_encoder(encoder: Encoder) -> None:
    global _own_encoder
    _own_encoder = encoder


def _encode_with_own(part: TextPart, target: Path, on_bad_record: str) -> None:
    assert _own_encoder is not None
    try:
        _encode_part(part, target, _own_encoder, on_bad_record)
    except BaseException as error:
        if is_panic(error):  # no process can tell another of one
            raise of_the_machine(error) from None  # pyright: ignore[reportGeneralTypeIssues]
        raise


def _encode_part(part: TextPart, target: Path, encoder: Encoder, on_bad_record: str) -> None:
    """Write one part's tokens to ``target.bin`` and then, as the mark of success, its lengths to ``target.npy``."""
    lengths: list[np.ndarray] = []
    empty = 0
    _skipped_in(target).unlink(missing_ok=True)
    bad = stop if on_bad_record == "stop" else Skipped(_skipped_in(target))
    with replacing(target.with_suffix(".bin")) as staging, staging.open("wb") as file:
        stream = documents(part, bad)
        while some := list(itertools.islice(stream, _DOCUMENTS_AT_ONCE)):
            texts = [text for text in some if text]
            empty += len(some) - len(texts)
            if not texts:
                continue
            tokens, counts = encoder(texts)
            file.write(tokens.tobytes())
            lengths.append(counts)
    write_json(target.with_suffix(".json"), {"empty": empty, "skipped": getattr(bad, "count", 0)})
    with replacing(target.with_suffix(".npy")) as staging:
        save_array(staging, np.concatenate(lengths) if lengths else np.empty(0, np.int32))


def record_of(prefix: Path) -> Path:
    """The file beside a corpus that says what made it."""
    return _named(prefix, ".prepared.json")


def _named(prefix: Path, ending: str) -> Path:
    return sibling(prefix, prefix.name + ending)


def _join(parts: list[Path], prefix: Path, encoder: Encoder, inputs: list[Path]) -> tuple[int, int]:
    """Append the parts' tokens to one file, and write the index last: a corpus with an index is whole.

    A corpus that is there keeps its files until the new ones are on disk; then it loses its index first, so that no
    index ever stands beside the tokens of another corpus.
    """
    lengths = np.concatenate([np.load(part.with_suffix(".npy")) for part in parts]) if parts else np.empty(0, np.int32)
    if not len(lengths):
        raise DataError(f"{', '.join(map(str, inputs[:3]))}: holds no documents.")
    index, tokens, record = _named(prefix, ".idx"), _named(prefix, ".bin"), record_of(prefix)
    staged = {file: file.with_name(f".{file.name}.partial") for file in (tokens, record, index)}
    try:
        with naming(tokens), staged[tokens].open("wb") as out:
            for part in parts:
                with part.with_suffix(".bin").open("rb") as file:
                    shutil.copyfileobj(file, out, 16 << 20)
        made = {"vocab_size": encoder.vocab_size, "bos": encoder.bos, "eos": encoder.eos}
        made |= {"tokenizer": encoder.identity, "bytes": staged[tokens].stat().st_size}
        write_json(staged[record], made)
        write_index(staged[index], lengths, encoder.dtype)
        sync(staged[tokens])
        index.unlink(missing_ok=True)
        for file, staging in staged.items():
            staging.replace(file)
        sync(prefix.parent)
    finally:
        for staging in staged.values():
            staging.unlink(missing_ok=True)
    return len(lengths), int(lengths.sum(dtype=np.int64))


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype[Any]) -> None:
    """Write Megatron's index of documents that are one sequence each.

    Args:
        path: The ``.idx`` file; it appears whole.
        lengths: Tokens per document, int32.
        dtype: Type of the tokens in the ``.bin`` file, uint16 or int32.

    Source: Megatron-Core `datasets/indexed_dataset.py`, _IndexWriter.
    """
    count = len(lengths)
    pointers = np.zeros(count, np.int64)
    np.cumsum(lengths[:-1], out=pointers[1:], dtype=np.int64)
    with replacing(path) as staging, staging.open("wb") as file:
        file.write(HEADER + struct.pack("<QBQQ", VERSION, _TYPE_CODES[dtype], count, count + 1))
        file.write(lengths.astype(np.int32).tobytes())
        file.write((pointers * dtype.itemsize).tobytes())
        file.write(np.arange(count + 1, dtype=np.int64).tobytes())

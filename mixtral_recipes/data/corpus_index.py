"""A corpus's ``.idx`` file, held against its own size and the ``.bin`` file's before anybody maps it into memory.

Source: Megatron-Core `datasets/indexed_dataset.py`, _IndexReader.
"""

import struct
from pathlib import Path

import numpy as np

from mixtral_recipes.data.cache import remembered
from mixtral_recipes.errors import DataError

HEADER = b"MMIDIDX\x00\x00"
VERSION = 1
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # by the code of a type of whole numbers
_FIELDS = struct.Struct("<QBQQ")
_START = len(HEADER) + _FIELDS.size
_BLOCK = 1 << 22


def check_index(prefix: Path) -> None:
    """Refuse an index that is not one, is truncated, or points outside its ``.bin`` file.

    Args:
        prefix: The corpus, whose two files are there.

    Raises:
        DataError: names the file, what it says, and what is there.
    """
    index, tokens = (prefix.with_name(prefix.name + ending) for ending in (".idx", ".bin"))
    needed = int(remembered("indexes", index, lambda file: str(_bytes_of_tokens(file))))
    if needed > tokens.stat().st_size:
        raise DataError(
            f"{tokens}: has {tokens.stat().st_size} bytes, but {index.name} needs {needed}; it is truncated or belongs "
            "to another corpus: copy both files again, or prepare the corpus again."
        )


def _bytes_of_tokens(index: Path) -> int:
    """How long the ``.bin`` file must be for an index to be true."""
    again = "copy it again, or prepare the corpus again"
    size = index.stat().st_size
    with index.open("rb") as file:
        header, fields = file.read(len(HEADER)), file.read(_FIELDS.size)
    if header != HEADER or len(fields) < _FIELDS.size:
        raise DataError(f"{index}: not a Megatron corpus index (it does not begin with MMIDIDX); {again}.")
    version, code, sequences, documents = _FIELDS.unpack(fields)
    if version != VERSION:
        raise DataError(f"{index}: version {version} is not supported, only {VERSION} is.")
    if code not in _ITEM_BYTES:
        raise DataError(f"{index}: its tokens have type {code}, which is not an integer type; {again}.")
    needed = _START + 12 * sequences + 8 * documents
    if size not in (needed, needed + sequences):  # a multimodal corpus has a byte more for each sequence
        raise DataError(
            f"{index}: has {size} bytes, but {sequences} sequences in {documents - 1} documents need {needed}; {again}."
        )
    lengths = np.memmap(index, "<i4", "r", _START, (sequences,)) if sequences else np.empty(0, np.int32)
    starts = np.memmap(index, "<i8", "r", _START + 4 * sequences, (sequences,)) if sequences else np.empty(0, np.int64)
    ends = np.memmap(index, "<i8", "r", _START + 12 * sequences, (documents,)) if documents else np.empty(0, np.int64)
    last = 0
    for at in range(0, sequences, _BLOCK):
        some, begin = lengths[at : at + _BLOCK], starts[at : at + _BLOCK]
        wrong = np.flatnonzero((some < 0) | (begin < 0) | (begin >= 1 << 62))
        if len(wrong):
            number = int(wrong[0])
            raise DataError(
                f"{index}: sequence {at + number} cannot have {some[number]} tokens from byte {begin[number]} on; "
                f"{again}."
            )
        last = max(last, int((begin + some.astype(np.int64) * _ITEM_BYTES[code]).max()))
    if documents and (ends[0] != 0 or ends[-1] != sequences or _falls(ends)):
        raise DataError(f"{index}: its documents do not cover sequences 0 to {sequences} in order; {again}.")
    return last


def _falls(numbers: np.ndarray) -> bool:
    steps = range(0, len(numbers), _BLOCK)
    return any(bool((np.diff(numbers[at : at + _BLOCK + 1]) < 0).any()) for at in steps)

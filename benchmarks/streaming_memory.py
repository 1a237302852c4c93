"""Peak memory of a process that streams a large file of each form.

    python benchmarks/streaming_memory.py --gb 2 --folder /tmp/streams

Writes one file after the other, has it read by processes of their own, prints the peak resident memory that the
kernel counted, and removes the file. `read` reads every record as `data check` does. `rank` is what a rank of a resumed
run does, whose position is at the end: torch and a tokenizer loaded, everything before the position passed over;
`torch` is what it had taken before the first record.
"""

import argparse
import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "experts", "answer")
PEAK = """
import sys


def peak():  # of this program alone, as ru_maxrss is not
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])


"""
READ = """
from mixtral_recipes.data.modules.finetuning import FineTuningDataModule

FineTuningDataModule(dataset_root=sys.argv[1]).pipeline().check()
print(peak())
"""
TRAIN = """
import torch
from mixtral_recipes.data.batches.batch import DataParallelPlace
from mixtral_recipes.data.modules.finetuning import FineTuningDataModule
from mixtral_recipes.data.tokenizers import load_tokenizer

module = FineTuningDataModule(dataset_root=sys.argv[1], seq_length=512, streaming=True, val_proportion=0.0)
module.setup(load_tokenizer("embedded://mixtral_tiny"))
before = peak()
batches = module.train_batches(DataParallelPlace(), consumed_samples=int(sys.argv[2]))
for _ in range(8):
    next(batches)
print(before, peak())
"""


def rows(size: int) -> Iterator[dict[str, str]]:
    """Records of about a kilobyte, so many that their text has ``size`` bytes."""
    some = [[WORDS[(n * 7 + k * k + n * k) % len(WORDS)] for k in range(170)] for n in range(997)]
    texts = [(" ".join(words[:120]), " ".join(words[120:])) for words in some]
    number, written = 0, 0
    while written < size:
        prompt, answer = texts[number % len(texts)]
        yield {"input": f"{number} {prompt}", "output": answer}
        written += len(prompt) + len(answer) + 36
        number += 1


def _text(opened: Any, before: str, between: str, behind: str, **style: Any) -> Callable[[Path, int], int]:
    def write(path: Path, size: int) -> int:
        count = 0
        with opened(path, "wt") as file:
            file.write(before)
            for count, row in enumerate(rows(size), 1):
                file.write((between if count > 1 else "") + json.dumps(row, **style))
            file.write(behind)
        return count

    return write


def _csv(path: Path, size: int) -> int:
    with path.open("w") as file:
        file.write("input,output\n")
        return sum(bool(file.write(f"{row['input']},{row['output']}\n")) for row in rows(size))


def _table(group: int, **style: Any) -> Callable[[Path, int], int]:
    """Parquet with row groups of so many rows; of all rows where it is 0."""

    def write(path: Path, size: int) -> int:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema({"input": pa.string(), "output": pa.string()})
        count = 0
        with pq.ParquetWriter(path, schema, **style) as writer:
            for some in _chunks(size, group):
                writer.write_table(pa.Table.from_pylist(some, schema), row_group_size=len(some))
                count += len(some)
        return count

    return write


def _arrow(group: int, *, stream: bool) -> Callable[[Path, int], int]:
    def write(path: Path, size: int) -> int:
        import pyarrow as pa

        schema = pa.schema({"input": pa.string(), "output": pa.string()})
        opened = pa.ipc.new_stream if stream else pa.ipc.new_file
        count = 0
        with pa.OSFile(str(path), "wb") as sink, opened(sink, schema) as writer:
            for some in _chunks(size, group):
                writer.write_batch(pa.RecordBatch.from_pylist(some, schema))
                count += len(some)
        return count

    return write


def _chunks(size: int, group: int) -> Iterator[list[dict[str, str]]]:
    held: list[dict[str, str]] = []
    for row in rows(size):
        held.append(row)
        if len(held) == group:
            yield held
            held = []
    if held:
        yield held


def _zstd(path: Path, mode: str) -> Any:
    import io

    import pyarrow as pa

    return io.TextIOWrapper(io.BufferedWriter(pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd"), 1 << 20))


FORMS: dict[str, Callable[[Path, int], int]] = {
    "lines.jsonl": _text(open, "", "\n", "\n"),
    "list.json": _text(open, "[", ",\n", "]"),
    "objects.json": _text(open, "", "\n", "\n", indent=2),
    "data.json": _text(open, '{"version": 1, "data": [', ", ", "]}"),
    "table.csv": _csv,
    "lines.jsonl.gz": _text(partial(gzip.open, compresslevel=1), "", "\n", "\n"),
    "lines.jsonl.zst": _text(_zstd, "", "\n", "\n"),
    "lines.jsonl.bz2": _text(partial(bz2.open, compresslevel=1), "", "\n", "\n"),
    "lines.jsonl.xz": _text(partial(lzma.open, preset=0), "", "\n", "\n"),
    "groups.parquet": _table(10_000),
    "one_group.parquet": _table(1 << 40, compression="none"),
    "one_group_zstd.parquet": _table(1 << 40, compression="zstd"),
    "batches.arrow": _arrow(1000, stream=True),
    "one_batch.arrow": _arrow(1 << 40, stream=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/streams"))
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS), metavar="FORM")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(f"{'form':24} {'GB on disk':>10} {'records':>10} {'read MB':>8} {'torch MB':>8} {'rank MB':>8}")
    for name in arguments.forms:
        path = arguments.folder / name
        count = FORMS[name](path, int(arguments.gb * 1e9))
        (read,) = _peaks(READ, str(path))
        before, rank = _peaks(TRAIN, str(path), str(count - 64))
        size = path.stat().st_size / 1e9
        print(f"{name:24} {size:>10.2f} {count:>10,} {read:>8.0f} {before:>8.0f} {rank:>8.0f}", flush=True)
        path.unlink()


def _peaks(program: str, *arguments: str) -> list[float]:
    """Megabytes that a process prints as kilobytes."""
    command = [sys.executable, "-c", PEAK + program, *arguments]
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [int(kilobytes) * 1024 / 1e6 for kilobytes in made.stdout.split()]


if __name__ == "__main__":
    main()

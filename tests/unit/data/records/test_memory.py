"""Records are read in bounded memory: a few blocks of a file, however large it is."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_recipes.data.records import parse
from mixtral_recipes.data.records.parse import read_records

MEGABYTES = 24
ROW = {"input": "question " * 60, "output": "answer " * 60}
TEXT = json.dumps(ROW)
COUNT = (MEGABYTES << 20) // len(TEXT)


def write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{**ROW, "n": n} for n in range(COUNT)]), path, compression="none")


def write_arrow(path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist([{**ROW, "n": n} for n in range(COUNT)])
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_batch(table.combine_chunks().to_batches()[0])


FORMS: dict[str, Callable[[Path], object]] = {
    "lines.jsonl": lambda path: path.write_text((TEXT + "\n") * COUNT),
    "list.json": lambda path: path.write_text("[" + ",\n".join([TEXT] * COUNT) + "]"),
    "objects.json": lambda path: path.write_text((json.dumps(ROW, indent=1) + "\n") * COUNT),
    "data.json": lambda path: path.write_text('{"version": 1, "data": [' + ",".join([TEXT] * COUNT) + "]}"),
    "table.csv": lambda path: path.write_text("input,output\n" + f"{ROW['input']},{ROW['output']}\n" * COUNT),
    "table.parquet": write_parquet,
    "table.arrow": write_arrow,
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_is_never_in_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    FORMS[name](path)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(path)) == COUNT
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < (MEGABYTES << 20) / 2


def test_what_was_read_of_a_mapped_file_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse, "_MAPPED_AT_ONCE", 1 << 20)
    path = tmp_path / "one_batch.arrow"
    write_arrow(path)
    resident: list[int] = []
    for number, _ in enumerate(read_records(path)):
        if number % (COUNT // 20) == 0:
            smaps = Path("/proc/self/smaps").read_text().partition(str(path))[2]
            resident.append(int(smaps.partition("Rss:")[2].split()[0]) << 10)
    assert max(resident) < (MEGABYTES << 20) / 2

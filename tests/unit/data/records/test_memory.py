"""Records are read in bounded memory: a few blocks of a file, however large it is."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_recipes.data.records.parse import read_records

MEGABYTES = 24
ROW = {"input": "question " * 60, "output": "answer " * 60}
TEXT = json.dumps(ROW)
COUNT = (MEGABYTES << 20) // len(TEXT)


def write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{**ROW, "n": n} for n in range(COUNT)]), path, compression="none")


FORMS: dict[str, Callable[[Path], object]] = {
    "lines.jsonl": lambda path: path.write_text((TEXT + "\n") * COUNT),
    "list.json": lambda path: path.write_text("[" + ",\n".join([TEXT] * COUNT) + "]"),
    "objects.json": lambda path: path.write_text((json.dumps(ROW, indent=1) + "\n") * COUNT),
    "data.json": lambda path: path.write_text('{"version": 1, "data": [' + ",".join([TEXT] * COUNT) + "]}"),
    "table.csv": lambda path: path.write_text("input,output\n" + f"{ROW['input']},{ROW['output']}\n" * COUNT),
    "table.parquet": write_parquet,
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

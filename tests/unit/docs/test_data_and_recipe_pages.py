"""Every command of the pages about data and recipes runs, on small files under the names the pages use."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.cli import main
from tests.unit.docs.documents import ROOT, Place, arguments, command_lines

PAGES = [ROOT / "docs" / "guide" / "data.md", *sorted((ROOT / "docs" / "reference" / "recipes").glob("*.md"))]
LINES = [place for page in PAGES for place in command_lines(page)]
JOBS = ("finetune", "pretrain", "run")
# Download a whole model, or are named in a sentence with an ellipsis: the other docs tests parse them.
NOT_HERE = ("hf://", "--recipe NAME")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages call the reader's own."""
    pairs = [{"prompt": f"Which {n}?", "completion": f"That {n}."} for n in range(20)]
    texts = [{"text": f"It was dark night number {n}. " * 5} for n in range(200)]
    answers = {"text": ["A box"], "answer_start": [0]}
    squad = [{"id": str(n), "context": "A box.", "question": f"What {n}?", "answers": answers} for n in range(4)]
    written: dict[str, list[Any]] = {"wiki.jsonl": texts, "my_texts/a.jsonl": texts}
    written |= dict.fromkeys(("my.jsonl", "other.jsonl", "my_a.jsonl", "my_b.jsonl"), pairs)
    for name, rows in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_squad.json").write_text(json.dumps(squad))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [row["text"] for row in texts]}), tmp_path / "books.parquet")
    clusters = tmp_path / "clusters.toml"
    clusters.write_text('[NAME]\npartition = "gpu"\n')
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MIXTRAL_RECIPES_CLUSTERS", str(clusters))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_some() -> None:
    assert len([place for place in LINES if arguments(place.text)[0] in (*JOBS, "data")]) >= 9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("place", [place for place in LINES if not any(w in place.text for w in NOT_HERE)], ids=str)
def test_it_runs(place: Place) -> None:
    words = shlex.split(place.text.replace("...", "wiki.jsonl"))[1:]
    assert main.run([*words, "--dry-run"] if words[0] in JOBS else words) == 0

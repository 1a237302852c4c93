"""From `mixtral-recipes finetune --peft lora` to `train_step`: a real run, traced, and what the docs say of it."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.docs.test_architecture import PAGE, writer

MOST_FILES = 6


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Per function on the way, the files it was reached through."""
    return writer().walks(tmp_path_factory.mktemp("walk"))


def test_the_way_to_a_step_is_short(traced: dict[str, Any]) -> None:
    walk = writer().trainers(traced)
    for file, functions in walk.items():
        print(file, *functions)
    assert next(iter(walk)) == "executors/rank.py"
    assert {"mixtral_recipes/training/run.py", "mixtral_recipes/training/step.py"} < walk.keys()
    assert len(walk) <= MOST_FILES


def test_the_docs_tell_the_same_way(traced: dict[str, Any]) -> None:
    told = writer().page(PAGE.read_text(), {"walk": writer().walk(traced)})
    assert told == PAGE.read_text(), "run python scripts/write_architecture.py"


def test_a_walk_is_our_files_in_order() -> None:
    module = writer()
    stack = [["/usr/lib/python3/runpy.py", "run"], [str(module.ROOT / ".venv/lib/typer.py"), "main"]]
    stack += [[str(module.ROOT / file), name] for file, name in (("cli/a.py", "<module>"), ("cli/a.py", "f"))]
    stack += [[str(Path(module.ROOT, "executors/b.py")), "g"], [str(module.ROOT / "cli/a.py"), "h"]]
    assert module.files(stack) == {"cli/a.py": ["f", "h"], "executors/b.py": ["g"]}

"""Task files of one's own that cannot be run are refused in a line; what a task asks for is done or refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_recipes import embedded
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.errors import DataError, RecipeError

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install -e '.[eval]'")


@pytest.fixture(scope="module")
def model() -> Any:
    tokenizer = load_tokenizer(embedded.resolve("embedded://mixtral_tiny"))
    return SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(max_position_embeddings=512))


@pytest.mark.parametrize(
    ("rows", "text", "said"),
    [
        ('{"text": "a"}', "'{{question}}'", "UndefinedError: 'question' is undefined"),
        ('{"text": "a"}', "'{{text'", "TemplateSyntaxError: "),
        ('{"text": "a"}', "!function nowhere.text", "ImportError: Cannot import module 'nowhere'"),
        ('{"text": ', "'{{text}}'", "DatasetGenerationError: "),
        ("", "'{{text}}'", "StopIteration: "),
    ],
)
def test_a_task_that_cannot_be_run(
    rows: str, text: str, said: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixtral_recipes.evaluation.tasks import Tasks, run_tasks

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text(rows)
    settings = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_choice": ["b", "c"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    lines = [f"{name}: {json.dumps(value)}" for name, value in settings.items()]
    (tmp_path / "mine.yaml").write_text("\n".join(["task: mine", f"doc_to_text: {text}", *lines]))
    with pytest.raises(DataError, match=f"--tasks mine: lm-evaluation-harness cannot run them \\({said}"):
        run_tasks(model, Tasks.find(["mine"], tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"task: mine\ndataset_path: [json\n", r"mine.yaml is not YAML, line 3: expected ','"),
        (b"task: mine\xff\n", r"mine.yaml is not YAML: "),
    ],
)
def test_a_task_file_that_is_not_yaml_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    from mixtral_recipes.evaluation.tasks import Tasks

    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "mine.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=said):
        Tasks.find(["mine"], tmp_path)


def test_what_a_task_asks_of_generation_and_is_not_done_is_refused(model: Any) -> None:
    from mixtral_recipes.evaluation.tasks import MegatronLM

    asked: Any = [SimpleNamespace(args=("a", {"until": ["."], "num_beams": 4}))]
    with pytest.raises(RecipeError, match=r"generation_kwargs.num_beams=4 of a task is not supported"):
        MegatronLM(model).generate_until(asked)

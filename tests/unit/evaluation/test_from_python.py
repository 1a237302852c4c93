"""What NeMo's SamplingParams ask for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mixtral_recipes as llm
from mixtral_recipes.errors import EnvironmentProblem, RecipeError
from mixtral_recipes.evaluation.from_python import evaluate, sampling_of
from mixtral_recipes.inference.sampling import Sampling


def asked(**given: Any) -> Any:
    return SimpleNamespace(**{"temperature": 1.0, "top_k": 0, "top_p": 0.0, "num_tokens_to_generate": 30} | given)


@pytest.mark.parametrize("given", [None, asked(top_k=1), asked(temperature=0.0)])
def test_the_likeliest_tokens(given: Any) -> None:
    found = sampling_of(given)
    assert (found.temperature, found.max_new_tokens) == (0, 30)


def test_draws() -> None:
    found = sampling_of(asked(temperature=0.7, top_k=5, num_tokens_to_generate=None), 3)
    assert found == Sampling(30, temperature=0.7, top_k=5, top_p=1.0, seed=3)
    assert sampling_of(asked(top_p=0.9)) == Sampling(30, temperature=1.0, top_p=0.9)
    assert sampling_of(found, 4) == found


def test_what_is_neither_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="inference_params is a dict; pass Megatron's SamplingParams"):
        sampling_of({"top_k": 1})
    with pytest.raises(RecipeError, match="eval_cfg is a dict; pass an EvaluationConfig"):
        evaluate(Path("checkpoint"), {"type": "squad"})  # pyright: ignore[reportArgumentType]


def test_probabilities_are_not_returned() -> None:
    with pytest.raises(RecipeError, match="only texts are returned"):
        sampling_of(asked(return_log_probs=True))


def test_questions_that_were_not_asked_have_no_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(scores={"after": {}}, predictions={})
    monkeypatch.setattr("mixtral_recipes.evaluation.from_python.evaluate_model", lambda *given: found)
    monkeypatch.setattr("mixtral_recipes.evaluation.from_python.join", lambda topology: topology)
    config = llm.EvaluationConfig(type="squad", params=llm.ConfigParams(extra={"data": "pairs.jsonl"}))
    with pytest.raises(RecipeError, match=r"but pairs\.jsonl has none"):
        evaluate(tmp_path, config)


@pytest.mark.parametrize(
    ("task", "params", "named"),
    [
        ("squad", {"extra": {"num_fewshot": 3}}, r"extra\['num_fewshot'\]"),
        ("hellaswag", {"extra": {"tokenizer": "theirs"}}, r"extra\['tokenizer'\]"),
        ("hellaswag", {"max_new_tokens": 3}, "max_new_tokens"),
    ],
)
def test_what_has_no_effect_is_refused(task: str, params: dict[str, Any], named: str) -> None:
    config = llm.EvaluationConfig(type=task, params=llm.ConfigParams(**params))
    with pytest.raises(RecipeError, match=rf"params\.{named} has no effect with type='{task}'; leave it out"):
        evaluate(Path("no model"), config)


def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match=f"{tmp_path}/file cannot be created: {tmp_path}/file is a file"):
        llm.generate("no model", prompts=["a prompt"], output_path=tmp_path / "file" / "texts.jsonl")
    with pytest.raises(EnvironmentProblem, match=f"{tmp_path}/file cannot be created: {tmp_path}/file is a file"):
        evaluate(tmp_path / "no model", llm.EvaluationConfig(type="squad", output_dir=str(tmp_path / "file")))


def test_texts_may_go_to_a_folder_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral_recipes.evaluation.from_python.generate", lambda *args, **options: ["a text"])
    monkeypatch.setattr("mixtral_recipes.api.model_checkpoint", lambda path: path)
    llm.generate(tmp_path, prompts=["a prompt"], output_path=tmp_path / "new" / "texts.jsonl")
    assert (tmp_path / "new" / "texts.jsonl").read_text() == '"a text"\n'

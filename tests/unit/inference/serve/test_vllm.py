"""vLLM's command line for models and adapters."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.inference.serve.vllm import VLLM

MODEL = VLLM("mistralai/Mixtral-8x7B-v0.1", "mine", "127.0.0.1", 8000, devices=2, context=None, dtype=None, rows=8)


def adapter(folder: Path, **settings: Any) -> VLLM:
    config = {"base_model_name_or_path": "mistralai/Mixtral-8x7B-v0.1", "r": 20} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return dataclasses.replace(MODEL, model=str(folder))


def test_a_model() -> None:
    assert MODEL.line(with_token=False) == (
        "vllm serve mistralai/Mixtral-8x7B-v0.1 --host 127.0.0.1 --port 8000 --served-model-name mine "
        "--tensor-parallel-size 2 --max-num-seqs 8"
    )
    pinned = dataclasses.replace(MODEL, model=f"{MODEL.model}@main").words()
    assert pinned[2:5] == [MODEL.model, "--revision", "main"]
    more = dataclasses.replace(MODEL, context=4096, dtype="bf16")
    assert more.words()[-4:] == ["--max-model-len", "4096", "--dtype", "bfloat16"]
    assert more.line(with_token=True).startswith('VLLM_API_KEY="$MIXTRAL_RECIPES_TOKEN" vllm serve ')


@pytest.mark.parametrize(
    ("settings", "rank"),
    [({}, "32"), ({"r": 8}, "8"), ({"r": 2}, "8"), ({"rank_pattern": {"q_proj": 100}}, "128"), ({"r": 512}, "512")],
)
def test_an_adapter_and_the_rank_vllm_must_make_room_for(tmp_path: Path, settings: Any, rank: str) -> None:
    words = adapter(tmp_path, **settings).words()
    assert words[2] == "mistralai/Mixtral-8x7B-v0.1"
    assert words[words.index("--served-model-name") + 1] == "mine-base"
    assert words[-5:] == ["--enable-lora", "--max-lora-rank", rank, "--lora-modules", f"mine={tmp_path}"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"r": 1000}, "ranks from 1 to 512"),
        ({"r": "8"}, "ranks from 1 to 512"),
        ({"base_model_name_or_path": None}, "must name the model"),
    ],
)
def test_adapters_that_vllm_does_not_take(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        adapter(tmp_path, **settings).words()

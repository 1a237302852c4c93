"""One object decides the number formats of model, optimizer and gradient reduction, and refuses what cannot run."""

import pytest
import torch

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.training import precision
from mixtral_recipes.training.precision import (
    check_device,
    ddp_fields,
    decided,
    in_words,
    model_fields,
    optimizer_fields,
)

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    """Pretend that this machine has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32", torch.float32), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)]
)
def test_model_and_optimizer_agree(precision: str, dtype: torch.dtype) -> None:
    plugin = MegatronMixedPrecision(precision=precision)
    for fields in (model_fields(plugin), optimizer_fields(plugin)):
        assert fields["params_dtype"] is dtype
        assert fields["bf16"] == (dtype is torch.bfloat16)
        assert fields["fp16"] == (dtype is torch.float16)


def test_loss_scaling_belongs_to_fp16() -> None:
    assert optimizer_fields(MegatronMixedPrecision(precision="16-mixed", loss_scale=8.0))["loss_scale"] == 8.0
    assert "loss_scale" not in optimizer_fields(MegatronMixedPrecision(precision="bf16-mixed", loss_scale=8.0))


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"precision='bf16' is not supported; use '32', 'bf16-mixed', '16-mixed'"):
        MegatronMixedPrecision(precision="bf16").check()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("name", "capability"), [("A100", (8, 0)), ("H100", (9, 0)), ("B200", (10, 0)), ("RTX 5090", (12, 0))]
)
def test_fp8_needs_the_right_generation(
    monkeypatch: pytest.MonkeyPatch, recipe: str, name: str, capability: tuple[int, int]
) -> None:
    gpu(monkeypatch, name, capability)
    plugin = MegatronMixedPrecision(fp8="hybrid", fp8_recipe=recipe)
    needed, words = ((10, 0), "Blackwell") if recipe == "mxfp8" else ((9, 0), "Hopper")
    if capability >= needed:
        monkeypatch.setattr(precision, "transformer_engine_usable", lambda: True)
        check_device(plugin)
        monkeypatch.setattr(precision, "transformer_engine_usable", lambda: False)
        with pytest.raises(RecipeError, match="needs Transformer Engine, which is not installed: pip install"):
            check_device(plugin)
    else:
        with pytest.raises(RecipeError, match=f"needs {words}.*this machine has {name}"):
            check_device(plugin)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_without_a_gpu_says_which_one(monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="there is no GPU"):
        check_device(MegatronMixedPrecision(fp8="e4m3", fp8_recipe=recipe))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fp8": "e5m2"}, "use 'hybrid' or 'e4m3'"),
        ({"fp8": "hybrid", "fp8_recipe": "rowwise"}, "use delayed, tensorwise, blockwise, mxfp8"),
        ({"fp8": "hybrid", "precision": "32"}, "precision='bf16-mixed'"),
        ({"fp8": "hybrid", "fp8_recipe": "delayed", "first_last_layers_bf16": True}, "use tensorwise, blockwise"),
    ],
)
def test_what_no_machine_runs_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        MegatronMixedPrecision(**fields).check()  # pyright: ignore[reportArgumentType]


def test_fp8_reaches_the_model() -> None:
    plugin = MegatronMixedPrecision(
        fp8="hybrid", fp8_recipe="tensorwise", fp8_param_gather=True, first_last_layers_bf16=True
    )
    fields = model_fields(plugin)
    assert (fields["fp8"], fields["fp8_recipe"], fields["fp8_param"]) == ("hybrid", "tensorwise", True)
    assert fields["first_last_layers_bf16"]
    assert fields["params_dtype"] is torch.bfloat16
    assert ddp_fields(plugin)["fp8_param_gather"]


@pytest.mark.parametrize(("recipe", "reused"), [("delayed", False), ("mxfp8", True)])
def test_only_mxfp8_weights_are_gathered_through_the_gradient_buffer(recipe: str, reused: bool) -> None:
    plugin = MegatronMixedPrecision(fp8="e4m3", fp8_recipe=recipe, fp8_param_gather=True)
    assert ddp_fields(plugin)["reuse_grad_buf_for_mxfp8_param_ag"] is reused
    assert optimizer_fields(plugin)["reuse_grad_buf_for_mxfp8_param_ag"] is reused


@pytest.mark.parametrize(
    ("fields", "multiple"),
    [({}, 1), ({"fp8": "hybrid"}, 16), ({"fp8": "hybrid", "fp8_recipe": "mxfp8"}, 32)],
)
def test_how_many_tokens_a_product_wants(fields: dict[str, str], multiple: int) -> None:
    assert MegatronMixedPrecision(**fields).token_multiple == multiple  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("asked", "frozen", "ranks", "kept"),
    [
        (None, True, 1, True),  # cast once
        (None, False, 1, False),  # nothing is gathered
        (None, False, 16, True),  # two ranks have the same experts
        (None, False, 8, False),  # each has its own
        (True, False, 1, True),
        (False, True, 16, False),
    ],
)
def test_weights_are_kept_in_fp8_where_that_pays(asked: bool | None, frozen: bool, ranks: int, kept: bool) -> None:
    plugin = MegatronMixedPrecision(fp8="hybrid", fp8_param_gather=asked)
    topology = Topology(world_size=ranks, expert_model_parallel_size=min(ranks, 8))
    found = decided(plugin, topology, frozen=frozen)
    assert found.fp8_param_gather is kept
    assert model_fields(found)["fp8_param"] is kept
    assert ddp_fields(found)["fp8_param_gather"] is kept
    assert f"their weights in {'FP8' if kept else 'bf16'}" in str(in_words(found))
    assert in_words(MegatronMixedPrecision()) is None
    assert not decided(MegatronMixedPrecision(fp8_param_gather=None), topology, frozen=frozen).fp8_param_gather

"""What a configuration says of kernels holds for its run, and neither the next one nor a CPU sees it."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from megatron.core.transformer.enums import AttnBackend

from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.models import builder, kernel_choice
from mixtral_recipes.models.config import MixtralConfig, MixtralConfigTiny
from mixtral_recipes.training import distributed

KERNELS = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        monkeypatch.delenv(name)
    yield
    kernel_choice.forget()


def seen() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("NVTE_")}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"attention_backend": AttnBackend.flash}, dict(zip(KERNELS, "100", strict=True))),
        ({"attention_backend": AttnBackend.fused}, dict(zip(KERNELS, "010", strict=True))),
        ({"attention_backend": AttnBackend.unfused}, dict(zip(KERNELS, "001", strict=True))),
        ({"flash_attention_version": 3}, {"NVTE_FLASH_ATTN_V2": "0", "NVTE_FLASH_ATTN_V4": "0"}),
    ],
)
def test_variables_are_set_for_one_model(fields: dict[str, Any], expected: dict[str, str]) -> None:
    for _ in range(2):  # as a base and its adapter are
        kernel_choice.apply(MixtralConfigTiny(**fields))
        assert seen() == expected
    distributed.shut_down()
    assert seen() == {}


def test_auto_leaves_the_choice_to_the_users_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    kernel_choice.apply(MixtralConfigTiny())
    assert seen() == {"NVTE_FUSED_ATTN": "0"}


def test_the_users_variables_may_not_say_the_opposite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    with pytest.raises(EnvironmentProblem, match=r"^NVTE_FUSED_ATTN=0 is set .*backend=fused .*need 1; unset"):
        kernel_choice.apply(MixtralConfigTiny(attention_backend=AttnBackend.fused))
    kernel_choice.apply(MixtralConfigTiny(attention_backend=AttnBackend.flash))
    kernel_choice.forget()
    assert seen() == {"NVTE_FUSED_ATTN": "0"}


@pytest.mark.parametrize("before", [None, "1"])
def test_the_next_run_of_a_process_need_not_be_deterministic(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
    if before is not None:
        monkeypatch.setenv(name, before)
    for of_transformer_engine in ("add_in_products", "prepare_none_of_frozen_experts"):
        monkeypatch.setattr(builder, of_transformer_engine, lambda: None)
    monkeypatch.setattr(builder, "_build_chunk", lambda *_, **__: os.environ[name])
    config = MixtralConfig(num_layers=1, hidden_size=8, num_attention_heads=2, deterministic_mode=True)
    for _ in range(2):  # as a base and its adapter are
        assert builder.build_model(config, transformer_engine=True) == ["0"]
    distributed.shut_down()
    assert os.environ.get(name) == before

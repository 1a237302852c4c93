"""Every parallel axis against one process: losses, gradient norms and updated weights of five steps, fp32.

Megatron does most of the reductions; ours are context parallelism's keys and values, the factors of expert adapters
and the auxiliary loss under padding. Each comparison is also made with one reduction left out, and must then fail.
"""

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mixtral_recipes.settings.peft import DoRA, LoRA
from mixtral_recipes.training.step import train_step
from tests.distributed.harness import launch
from tests.distributed.small_run import (
    Case,
    Outcome,
    assemble,
    build,
    is_vocabulary,
    relative_error,
    start_weight,
    train,
)

TOLERANCE = 1e-5  # fp32: the same sums in another order
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
SCHEMES = {
    "full": None,
    "lora": LoRA(dim=4, alpha=8),
    "dora": DoRA(dim=4, alpha=8),
    # Ranks without an adapter: the first pipeline stage, and those with other experts.
    "chosen": LoRA(dim=4, alpha=8, layers="2-", experts="1,6"),
    "whole": LoRA(
        dim=4, alpha=8, target_modules="attention", modules_to_save=["word_embeddings", "output_layer"],
        loraplus_lr_ratio=4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A topology to compare.

    Attributes:
        ranks: Processes.
        sizes: Topology's sizes.
        broken_by: A reduction without which it must differ, for full training and for adapters.
        data: Fields of `SmallData`.
    """

    ranks: int
    sizes: dict[str, Any]
    broken_by: tuple[str, str]
    data: tuple[tuple[str, Any], ...] = ()


_DP, _SP_GRADS, _NORM = "data_parallel_gradients", "sequence_parallel_gradients", "gradient_norm"
_TOKENS, _KV = "token_count", "key_value_gradients"

LAYOUTS = {
    "tp2": Layout(2, SP | {"expert_tensor_parallel_size": 1}, (_SP_GRADS, _SP_GRADS)),
    "pp2": Layout(2, {"pipeline_model_parallel_size": 2}, (_NORM, _NORM)),
    "pp2vpp2": Layout(
        2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, (_TOKENS, _TOKENS)
    ),
    "cp2": Layout(2, {"context_parallel_size": 2}, (_KV, _KV)),
    "ep2": Layout(2, {"expert_model_parallel_size": 2}, (_DP, _DP)),
    "ep4": Layout(4, {"expert_model_parallel_size": 4}, (_NORM, _NORM)),
    "tp2ep2": Layout(
        4,
        SP | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        (_SP_GRADS, _DP),
    ),
    "etp2": Layout(2, SP, ("expert_outputs", "expert_adapter_gradients")),
    "etp2ep2": Layout(4, SP | {"expert_model_parallel_size": 2}, ("expert_outputs", "expert_adapter_gradients")),
    "tp2pp2": Layout(4, SP | {"pipeline_model_parallel_size": 2, "expert_tensor_parallel_size": 1}, (_SP_GRADS, _NORM)),
    "pp2ep2": Layout(4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}, (_TOKENS, _TOKENS)),
    "cp2ep2": Layout(2, {"context_parallel_size": 2, "expert_model_parallel_size": 2}, (_KV, _KV)),
    "cp2dp2": Layout(4, {"context_parallel_size": 2}, (_DP, _DP)),
    "dp2": Layout(2, {}, (_DP, _DP)),
    "dp2-accumulated": Layout(2, {}, (_DP, _DP), data=(("micro_batch_size", 1),)),
}


@functools.cache
def one_process(scheme: str, data: tuple[tuple[str, Any], ...], steps: int) -> tuple[Outcome, dict[str, torch.Tensor]]:
    """The result all layouts are compared with."""
    outcomes = launch(1, train, Case(peft=SCHEMES[scheme], data=dict(data), steps=steps))
    return outcomes[0], assemble(outcomes)


def run(layout: Layout, scheme: str, *, steps: int = 5, without: str | None = None) -> list[Outcome]:
    """Train under a layout."""
    case = Case(layout.sizes, peft=SCHEMES[scheme], data=dict(layout.data), steps=steps, without=without)
    return launch(layout.ranks, train, case)


def check_equal(
    layout: Layout, scheme: str, outcomes: list[Outcome], *, steps: int = 5, moved: float = TOLERANCE
) -> None:
    """Compare with one process.

    Args:
        layout: What the outcomes were trained under.
        scheme: One of SCHEMES.
        outcomes: Of its ranks.
        steps: How many were taken.
        moved: How far weights may be apart; losses and gradient norms keep to TOLERANCE.

    Raises:
        AssertionError: something differs by more than rounding.
    """
    expected, weights = one_process(scheme, layout.data, steps)
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(expected.losses, rel=TOLERANCE)
        assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=TOLERANCE)
        assert outcome.router_losses == pytest.approx(expected.router_losses, rel=TOLERANCE)
    found = assemble(outcomes)
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        rows = slice(0, 101) if is_vocabulary(key) else slice(None)  # the rest pads, as far as the layout needs
        distance = relative_error(value[rows], start_weight(key, tuple(value.shape))[rows])
        assert distance > 1e-3, f"{key} was not trained"
        assert relative_error(found[key][rows], value[rows]) < moved, key


@pytest.mark.parametrize(("name", "scheme"), [("pp2", "chosen"), ("ep4", "chosen"), ("tp2pp2", "whole")])
def test_a_part_of_the_model_trains_as_in_one_process(name: str, scheme: str) -> None:
    check_equal(LAYOUTS[name], scheme, run(LAYOUTS[name], scheme))


@pytest.mark.parametrize("scheme", ["full", "lora"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_process_does(name: str, scheme: str) -> None:
    check_equal(LAYOUTS[name], scheme, run(LAYOUTS[name], scheme))


@pytest.mark.parametrize("name", ["tp2", "etp2", "ep2"])
def test_dora_trains_as_one_process_does(name: str) -> None:
    # Norms of rows are summed over ranks, and Adam's first steps divide tiny gradients by themselves: seen 3.7e-5.
    check_equal(LAYOUTS[name], "dora", run(LAYOUTS[name], "dora"), moved=1e-4)


@pytest.mark.parametrize("scheme", ["full", "lora"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_reduction_left_out_is_noticed(name: str, scheme: str) -> None:
    layout = LAYOUTS[name]
    outcomes = run(layout, scheme, steps=2, without=layout.broken_by[scheme == "lora"])
    with pytest.raises(AssertionError):
        check_equal(layout, scheme, outcomes, steps=2)


def counted_zeros(case: Case) -> list[int | None]:
    """The zeros in the gradient of each step."""
    run = build(case)
    batches = run.data.train_batches(run.data_place, **run.loader_shape)
    return [train_step(run, batches).num_zeros_in_grad for _ in range(2)]


@pytest.mark.parametrize("name", ["ep2", "pp2ep2"])
def test_zeros_in_the_gradient_are_counted_over_all_ranks(name: str) -> None:
    count, layout = {"log_num_zeros_in_grad": True}, LAYOUTS[name]
    expected = launch(1, counted_zeros, Case(optimizer=count))[0]
    assert all(expected)  # rows of tokens that did not occur
    assert launch(layout.ranks, counted_zeros, Case(layout.sizes, optimizer=count)) == [expected] * layout.ranks

"""Router losses, dropping, dispatchers, recomputation, number formats and overlap, each against plain training."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from megatron.core.distributed import param_and_grad_buffer as buffers
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from mixtral_recipes.models import layer_specs
from mixtral_recipes.models.token_dispatcher import OneRankDispatcher
from mixtral_recipes.settings.peft import DoRA, LoRA
from mixtral_recipes.training.step import train_step
from tests.distributed.harness import launch
from tests.distributed.small_run import Case, Outcome, assemble, build, train

FULL = {"full": True}  # sequences without padding
EP2 = {"expert_model_parallel_size": 2}


@functools.cache
def _reference(key: str) -> Outcome:
    return launch(1, train, _CASES[key])[0]


_CASES = {
    "plain": Case(steps=3),
    "lora": Case(steps=3, peft=LoRA(dim=4, alpha=8)),
    "dropping": Case(steps=3, model={"moe_expert_capacity_factor": 0.75}),
}


def identical(found: Outcome, expected: Outcome) -> None:
    """No bit differs."""
    assert found.losses == expected.losses
    assert found.grad_norms == expected.grad_norms
    for key, pieces in expected.weights.items():
        for (_, a), (_, b) in zip(found.weights[key], pieces, strict=True):
            assert torch.equal(a, b), key


RECOMPUTE: dict[str, dict[str, Any]] = {
    "full-uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "full-block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "moe_act-layernorm": {"recompute_granularity": "selective", "recompute_modules": ["moe_act", "layernorm"]},
}


@pytest.mark.parametrize("scheme", ["plain", "lora"])
@pytest.mark.parametrize("kind", [k for k in RECOMPUTE if k != "moe_act-layernorm"])
def test_recomputation_changes_no_bit(kind: str, scheme: str) -> None:
    identical(launch(1, train, dataclasses.replace(_CASES[scheme], model=RECOMPUTE[kind]))[0], _reference(scheme))


def reductions_of_two_runs(first: Case, second: Case) -> list[str]:
    """What reduces the gradients of two runs of one process."""
    found = []
    for case in (first, second):
        train(dataclasses.replace(case, steps=1))
        found.append(buffers.dist_reduce_scatter_func.__name__)
    return found


def test_a_run_reduces_its_gradients_as_it_says_whatever_ran_before_it() -> None:
    in_fp32 = Case(ddp={"reduce_scatter_with_fp32_accumulation": True})
    first, second = launch(1, reductions_of_two_runs, in_fp32, _CASES["plain"])[0]
    assert (first, second) == ("reduce_scatter_with_fp32_accumulation", "reduce_scatter_tensor")


def sorted_again(case: Case, megatrons: bool) -> tuple[int, Outcome]:
    """How often chunks of tokens are sorted by expert, and the run; with Megatron's own dispatcher, if asked for."""
    calls, sort = 0, token_dispatcher.sort_chunks_by_idxs

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return sort(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_dispatcher, "sort_chunks_by_idxs", counted)
        if megatrons:
            patch.setattr(OneRankDispatcher, "instead_of", lambda dispatcher: dispatcher)
        outcome = train(case)
    return calls, outcome


@pytest.mark.parametrize("drops", [False, True], ids=["dropless", "dropping"])
def test_tokens_that_one_rank_sends_itself_are_not_sorted_again(drops: bool) -> None:
    case = _CASES["dropping" if drops else "plain"]
    ours, megatrons = (launch(1, sorted_again, case, own)[0] for own in (False, True))
    assert (ours[0], megatrons[0] > 0) == (0, True)
    identical(ours[1], megatrons[1])


def router_losses_by_hand(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """What Megatron reports for the first microbatches, and the formulas written out on the router's logits."""
    run = build(dataclasses.replace(case, steps=1))
    logits: list[Tensor] = []
    for module in run.model[0].modules():
        if isinstance(module, TopKRouter):
            gating = module.gating
            module.gating = lambda x, gating=gating: logits.append(gating(x)) or logits[-1]  # pyright: ignore
    from tests.distributed.small_run import read_router_losses

    train_step(run, run.data.train_batches(run.data_place, **run.loader_shape))
    balance, z = [], []
    for scores in (each.detach().flatten(0, 1).float() for each in logits):
        experts = scores.shape[1]
        chosen = scores.topk(2, dim=1).indices.flatten().bincount(minlength=experts) / scores.shape[0] / 2
        balance.append(experts * (chosen * scores.softmax(1).mean(0)).sum())
        z.append(scores.logsumexp(1).square().mean())
    by_hand = {"load_balancing_loss": float(torch.stack(balance).mean()), "z_loss": float(torch.stack(z).mean())}
    return read_router_losses(run), by_hand


def test_router_losses_are_the_published_formulas() -> None:
    case = Case(model={"moe_z_loss_coeff": 1e-3}, data=FULL)
    reported, by_hand = launch(1, router_losses_by_hand, case)[0]
    assert reported == pytest.approx(by_hand, rel=1e-5)


def train_with_megatrons_router(case: Case) -> Outcome:
    """Train with Megatron's TopKRouter in place of ours."""
    vars(layer_specs)["Router"] = TopKRouter
    return train(case)


def train_with_kernels(case: Case) -> Outcome:
    """Train under ``moe_router_fusion``, with stand-ins that take and refuse what Transformer Engine's kernels do."""
    from megatron.core.transformer.moe import moe_utils

    from mixtral_recipes.training import run

    def loss(*, probs: Tensor, tokens_per_expert: Tensor, total_num_tokens: Any, coeff: float, **sizes: int) -> Tensor:
        if tokens_per_expert.dtype not in (torch.int32, torch.int64):
            raise RuntimeError("tokens_per_expert must be int32 or int64")
        if isinstance(total_num_tokens, Tensor) and total_num_tokens.dtype != torch.int64:
            raise RuntimeError(f"total_num_tokens must be a 0-dim int64 tensor; got dtype {total_num_tokens.dtype}")
        return plain_loss(
            probs=probs,
            tokens_per_expert=tokens_per_expert,
            total_num_tokens=total_num_tokens,
            moe_aux_loss_coeff=coeff,
            **sizes,
        )

    plain_loss = moe_utils.switch_load_balancing_loss_func
    kernels = {
        "HAVE_TE": True,
        "fused_moe_aux_loss": loss,
        "fused_topk_with_score_function": moe_utils.topk_routing_with_score_function,
        "fused_compute_score_for_moe_aux_loss": moe_utils.compute_routing_scores_for_aux_loss,
    }
    vars(moe_utils).update(kernels)
    vars(run)["refuse_without"] = lambda *_, **__: None  # they are here
    return train(case)


def test_fused_routing_takes_padding() -> None:
    found = launch(1, train_with_kernels, dataclasses.replace(_CASES["lora"], model={"moe_router_fusion": True}))[0]
    identical(found, _reference("lora"))


@pytest.mark.parametrize(
    "fields",
    [
        {"moe_aux_loss_coeff": 0.1},
        {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
        {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
        {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.1},
    ],
    ids=["aux", "seq_aux", "global_aux", "z"],
)
def test_without_padding_the_gradients_are_megatrons(fields: dict[str, Any]) -> None:
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    case = Case(layout, model=fields, data=FULL, steps=2)
    ours = launch(2, train, case)
    for mine, theirs in zip(ours, launch(2, train_with_megatrons_router, case), strict=True):
        identical(mine, theirs)
    plain = Case(
        layout, model={"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}, data=FULL, steps=2
    )
    assert launch(2, train, plain)[0].grad_norms != pytest.approx(ours[-1].grad_norms, rel=1e-4)


def router_gradients(losses: dict[str, Any], every: int) -> dict[str, Tensor]:
    """What the routers' weights get in a step in which one of so many tokens is learned."""
    run = build(Case(model=losses, optimizer={"clip_grad": 0.0}))
    batches = run.data.train_batches(run.data_place, **run.loader_shape)
    train_step(run, ({**b, "loss_mask": b["loss_mask"] * (b["position_ids"] % every == 0)} for b in batches))  # pyright: ignore
    return {name: p.main_grad for name, p in run.model[0].named_parameters() if "router" in name}  # pyright: ignore


@pytest.mark.parametrize("loss", ["moe_aux_loss_coeff", "moe_z_loss_coeff"])
def test_router_losses_count_the_same_however_few_tokens_are_learned(loss: str) -> None:
    off = {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None}
    of_all, of_few = (
        [launch(1, router_gradients, {**off, loss: value}, every)[0] for value in (0.1, 0.0)] for every in (1, 16)
    )
    for name, gradient in of_all[0].items():
        expected = gradient - of_all[1][name]
        assert expected.norm() > 1e-3
        assert torch.allclose(of_few[0][name] - of_few[1][name], expected, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("full", [True, False], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {}),
        (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (4, {"context_parallel_size": 2}),
    ],
    ids=["dp2", "tp2dp2", "cp2dp2"],
)
def test_a_global_loss_does_not_depend_on_the_layout(ranks: int, layout: dict[str, Any], full: bool) -> None:
    losses = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1}
    whole = Case(model=losses, data={"full": full, "micro_batch_size": 8}, steps=2)
    expected = launch(1, train, whole)[0]
    halves = dataclasses.replace(whole, layout=layout, data={"full": full, "micro_batch_size": 4})
    for outcome in launch(ranks, train, halves):
        assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
        assert outcome.router_losses == pytest.approx(expected.router_losses, rel=1e-5)


def test_padded_and_plain_dropping_agree() -> None:
    padded = {"moe_expert_capacity_factor": 0.75, "moe_pad_expert_input_to_capacity": True}
    expected = _reference("dropping")
    found = launch(1, train, Case(steps=3, model=padded))[0]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    assert expected.losses != pytest.approx(_reference("plain").losses, rel=1e-4)


def test_dropping_under_expert_parallelism() -> None:
    case = Case(EP2, steps=3, model={"moe_expert_capacity_factor": 0.75})
    for outcome in launch(2, train, case):
        assert outcome.losses == pytest.approx(_reference("dropping").losses, rel=1e-5)
        assert outcome.grad_norms == pytest.approx(_reference("dropping").grad_norms, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "ddp"),
    [
        ({"moe_token_dispatcher_type": "allgather"}, {}),
        ({}, {"overlap_grad_reduce": True}),
        ({}, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    ],
    ids=["allgather", "overlap_grad_reduce", "overlap_both"],
)
def test_settings_that_change_no_number(model: dict[str, Any], ddp: dict[str, Any]) -> None:
    for outcome in launch(2, train, Case(EP2, steps=3, model=model, ddp=ddp, data=FULL)):
        expected = launch(1, train, Case(steps=3, data=FULL))[0]
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
        assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)


def test_a_frozen_router_stays() -> None:
    frozen = launch(1, train, Case(steps=2, model={"freeze_router": True}))
    longer = launch(1, train, Case(steps=3, model={"freeze_router": True}))
    key = "decoder.layers.mlp.router.weight"
    assert torch.equal(assemble(frozen)[key], assemble(longer)[key])
    other = "decoder.layers.self_attention.linear_proj.weight"
    assert not torch.equal(assemble(frozen)[other], assemble(longer)[other])


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_sixteen_bit_training_follows_fp32(precision: str) -> None:
    case = Case(
        EP2,
        steps=3,
        precision={"precision": precision, "initial_loss_scale": 2.0**10},
        model={"moe_router_dtype": "fp32"},
    )
    for outcome in launch(2, train, case):
        assert outcome.losses == pytest.approx(_reference("plain").losses, rel=1e-2)
        assert outcome.grad_norms == pytest.approx(_reference("plain").grad_norms, rel=5e-2)
        assert outcome.losses != _reference("plain").losses


@pytest.mark.parametrize("peft", [None, LoRA(dim=4, alpha=8), DoRA(dim=4, alpha=8)], ids=["full", "lora", "dora"])
@pytest.mark.parametrize(
    ("layout", "distributed"),
    [({}, True), ({"pipeline_model_parallel_size": 2}, True), ({}, False)],
    ids=["dp", "pp", "without a distributed optimizer"],
)
def test_weights_that_are_gathered_in_the_forward_pass_are_there_when_needed(
    layout: dict[str, Any], distributed: bool, peft: LoRA | None
) -> None:
    settings = {"use_distributed_optimizer": distributed}
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    case = Case(layout, peft, ddp=overlap, steps=3, optimizer=settings)
    ranks = 4 if layout else 2
    expected = launch(ranks, train, dataclasses.replace(case, ddp={}))[0]
    for outcome in launch(ranks, train, case):
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
        assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)


@pytest.mark.parametrize("distributed", [True, False])
def test_adapters_of_a_16_bit_model_may_be_in_32(distributed: bool) -> None:
    scheme = LoRA(dim=4, alpha=8, lora_dtype=torch.float32)
    settings = {"use_distributed_optimizer": distributed}
    for outcome in launch(2, train, Case(EP2, scheme, precision={"precision": "bf16-mixed"}, optimizer=settings)):
        assert {piece.dtype for pieces in outcome.weights.values() for _, piece in pieces} == {torch.float32}
        assert all(
            not piece.equal(piece.bfloat16().float()) for pieces in outcome.weights.values() for _, piece in pieces
        )


@pytest.mark.parametrize("peft", [None, LoRA(dim=4, alpha=8)], ids=["full", "lora"])
def test_loss_curves_of_one_and_two_expert_ranks_agree(peft: LoRA | None) -> None:
    one = launch(1, train, Case(peft=peft, steps=20))[0]
    for two in launch(2, train, Case(EP2, peft=peft, steps=20)):
        assert two.losses == pytest.approx(one.losses, rel=1e-4)
    assert one.losses[-1] < one.losses[0]

"""Packed rows against padded ones under every kind of parallelism: same samples, same loss, same gradients."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.utils.data import Dataset

from mixtral_recipes.data.batches.batch import Sample
from mixtral_recipes.data.batches.packing import PackCollate
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.layout.shapes import BatchShape
from mixtral_recipes.settings.data import PackedSequenceSpecs
from mixtral_recipes.training import step
from mixtral_recipes.training.step import train_step
from tests.distributed.harness import launch
from tests.distributed.small_run import Case, Outcome, _data, assemble, build, is_vocabulary, relative_error, shards

TOLERANCE = 1e-5  # fp32: the same sums in another order
LENGTHS = (32, 31, 30, 27, 24, 20, 18, 17, 13, 11, 9, 7, 5)  # four packs of 64, none of them full
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "dp2": (2, {}),
}


class Sequences(Dataset[Sample]):
    """Random sequences of given lengths; the last two thirds of each are learned."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = np.array(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        n = int(self.lengths[index])
        tokens = np.random.default_rng(index).integers(0, 101, n + 1)
        return Sample(tokens=tokens, loss_mask=np.arange(n) >= n // 3)


@dataclasses.dataclass
class SequenceData(DataModule):
    """The same few sequences, packed or padded."""

    lengths: tuple[int, ...] = LENGTHS
    fixed_length = False
    shuffles = False

    def datasets(self, tokenizer: Any) -> dict[str, Dataset[Any]]:
        return {"train": Sequences(self.lengths)}


def gradients(layout: dict[str, Any], pack_size: int) -> Outcome:
    """Loss and gradients of one step over all sequences (this rank's pieces); ``pack_size`` -1 pads."""
    case = Case(
        layout=layout, model={"moe_aux_loss_coeff": 0.0}, optimizer={"use_distributed_optimizer": False}, steps=2
    )
    run = build(case)
    specs = PackedSequenceSpecs(pack_size) if pack_size > 0 else None
    data = SequenceData(seq_length=32, micro_batch_size=1, packed_sequence_specs=specs)
    data.setup(None)
    data.global_batch_size = len(data.rows("train", run.loader_shape["sequence_multiple"]))
    run = dataclasses.replace(run, data=data, batch=BatchShape.of(data))
    result = train_step(run, data.train_batches(run.data_place, **run.loader_shape))
    assert result.tokens == sum(LENGTHS)
    for chunk in run.model:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    pieces = list(shards(run.model, adapters=False))
    weights: dict[str, list[Any]] = {}
    for piece in pieces:
        weights.setdefault(piece.key, []).append((piece.global_offset, _data(piece).clone()))
    shapes = {p.key: tuple(p.global_shape) for p in pieces}
    return Outcome([result.loss], [result.grad_norm], weights, shapes, {})


@pytest.fixture(scope="module")
def padded() -> list[Outcome]:
    """The reference: one process, one padded sequence per microbatch."""
    return launch(1, gradients, {}, -1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_gradients_equal_the_unpacked_ones(name: str, padded: list[Outcome]) -> None:
    world, layout = LAYOUTS[name]
    packed = launch(world, gradients, layout, 64)
    for outcome in packed:
        assert outcome.losses[0] == pytest.approx(padded[0].losses[0], rel=TOLERANCE)
        assert outcome.grad_norms[0] == pytest.approx(padded[0].grad_norms[0], rel=TOLERANCE)
    expected, found = assemble(padded), assemble(packed)
    assert found.keys() == expected.keys()
    errors = {key: relative_error(_words(key, found[key]), _words(key, expected[key])) for key in expected}
    assert max(errors.values()) < TOLERANCE, max(errors.items(), key=lambda item: item[1])


def _words(key: str, gradient: torch.Tensor) -> torch.Tensor:
    """Without the vocabulary's padding, of which each layout has its own."""
    return gradient[:101] if is_vocabulary(key) else gradient


def router_loads(packed: bool, pack_size: int, padding: int) -> tuple[list[float], float]:
    """Tokens per expert and the aux loss of one microbatch of two sequences, with ``padding`` tokens behind them."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from mixtral_recipes.training.watch.router_health import RouterHealth
    from tests.distributed.small_run import read_router_losses

    run = build(Case(model={"moe_aux_loss_coeff": 0.1}))
    specs = PackedSequenceSpecs(pack_size) if packed else None
    rows = 1 if packed else 2
    data = SequenceData(
        seq_length=32, micro_batch_size=rows, global_batch_size=rows, lengths=(24, 16), packed_sequence_specs=specs
    )
    data.setup(None)
    run = dataclasses.replace(run, data=data, batch=BatchShape.of(data))
    get_moe_metrics_tracker().clear()
    health = RouterHealth(run.model, run.config.num_layers, 8, torch.device("cpu"))
    train_step(run, data.train_batches(run.data_place, multiple=40 + padding if packed else 24 + padding))
    return health.read().load.flatten().tolist(), read_router_losses(run)["load_balancing_loss"]


def test_router_statistics_do_not_count_padding() -> None:
    plain, plain_loss = launch(1, router_loads, True, 64, 0)[0]
    assert sum(plain) == 40 * 2 * 4  # tokens x top-2 x layers
    for packed, padding in ((True, 8), (True, 88), (False, 0), (False, 40)):
        loads, loss = launch(1, router_loads, packed, 128, padding)[0]
        assert loads == plain
        assert loss == pytest.approx(plain_loss, rel=1e-6)


def logits_of_pack(changed: bool) -> tuple[list[torch.Tensor], int]:
    """Logits of each sequence of one pack, and the fewest tokens any expert got.

    Args:
        changed: Replace every token of the second sequence.
    """
    run = build(Case())
    fewest: list[int] = []
    for module in run.model[0].modules():
        if isinstance(module, SequentialMLP):
            module.register_forward_pre_hook(lambda _, args: fewest.append(int(args[1].min())))
    samples = [Sequences((50, 60, 56, 64))[index] for index in range(4)]
    if changed:
        samples[1] = Sample(tokens=(samples[1]["tokens"] + 50) % 101, loss_mask=samples[1]["loss_mask"])
    batch = PackCollate(0, multiple=8)([samples])
    run.model[0].eval()
    with torch.no_grad():
        logits = run.model[0](
            batch["tokens"],
            batch["position_ids"],
            None,
            packed_seq_params=step._packed(batch["cu_seqlens"], torch.device("cpu")),
            padding_mask=batch.get("padding_mask"),
        )
    parts = [logits[0, a:b].clone() for a, b in itertools.pairwise(batch["cu_seqlens"].tolist())]
    return parts, min(fewest)


def test_a_changed_sequence_leaves_the_others_alone_bit_for_bit() -> None:
    (before, few), (after, fewer) = (launch(1, logits_of_pack, changed)[0] for changed in (False, True))
    # Below four rows MKL multiplies in another order, and the last bit of an expert's output depends on its company.
    assert min(few, fewer) >= 4
    for number, (a, b) in enumerate(zip(before[:4], after[:4], strict=True)):
        assert torch.equal(a, b) == (number != 1)


def influence() -> list[list[float]]:
    """Row i, column j: the largest gradient of sequence i's logits with respect to sequence j's embeddings."""
    run = build(Case(model={"moe_aux_loss_coeff": 0.0}))  # that loss is about all tokens of a row
    batch = PackCollate(0, multiple=8)([[Sequences(LENGTHS)[index] for index in (3, 4, 5, 6)]])
    model = run.model[0]
    embedded = model.embedding(batch["tokens"], batch["position_ids"]).detach().requires_grad_()
    logits = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        decoder_input=embedded,
        packed_seq_params=step._packed(batch["cu_seqlens"], torch.device("cpu")),
        padding_mask=batch.get("padding_mask"),
    )
    spans = list(itertools.pairwise(batch["cu_seqlens"].tolist()))
    rows = []
    for start, end in spans:
        (gradient,) = torch.autograd.grad(logits[0, start:end, :101].square().sum(), embedded, retain_graph=True)
        rows.append([float(gradient[a:b].abs().max()) for a, b in spans])
    return rows


def test_sequences_of_a_pack_have_no_influence_on_each_other() -> None:
    rows = launch(1, influence)[0]
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            assert (value > 0) == (i == j), (i, j, value)

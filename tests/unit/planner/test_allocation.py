"""Weights, gradients and optimizer state against what Megatron allocates on the CPU, to the byte.

Each case is a rank of a job whose other ranks do not exist; its model, gradient buffers and Adam's state are real.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from mixtral_recipes.checkpoints.shards import parts_of
from mixtral_recipes.cpu import device as cpu_device
from mixtral_recipes.layout.shapes import BatchShape, ModelShape
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.builder import build_model
from mixtral_recipes.models.config import MixtralConfig, with_topology
from mixtral_recipes.peft import attach
from mixtral_recipes.planner import weights
from mixtral_recipes.planner.memory import weight_bytes
from mixtral_recipes.planner.workload import Workload, adapters_of
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.peft import DoRA, LoRA
from mixtral_recipes.training.optimizer import ddp_config, prepare_adam, wrap
from tests.fake_world import one_of

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size is not set:UserWarning")

# Sizes that divide by little, so that every padding shows.
SHAPE = ModelShape(
    num_layers=8, hidden_size=48, num_attention_heads=4, num_query_groups=4, ffn_hidden_size=72, num_moe_experts=8,
    max_position_embeddings=64, vocab_size=250, kv_channels=16,
)  # fmt: skip


def T(*sizes: Any) -> Topology:
    """A layout of world size, TP, PP, VPP, CP, EP, expert TP."""
    padded: Any = (*sizes, *(1, 1, 1, None, 1, 1, None)[len(sizes) :])
    return Topology(*padded, sequence_parallel=padded[1] > 1)


# layout, what is trained (None: all weights), settings
CASES: list[tuple[Topology, LoRA | None, dict[str, bool]]] = [
    (T(1), None, {}),
    (T(1), None, {"bf16": False}),
    (T(3), None, {"bf16": False}),
    (T(5), None, {}),
    (T(7), LoRA(dim=3), {}),
    (T(4, 4), None, {}),
    (T(8, 1, 8), None, {}),
    (T(6, 1, 2), None, {}),
    (T(12, 1, 1, None, 3, 4), None, {}),
    (T(8, 1, 4, 2, 1, 2), None, {}),
    (T(8, 2, 2, 2, 1, 2, 1), None, {}),
    (T(16, 4, 2, 2, 1, 8, 1), None, {}),
    (T(32, 2, 4, 2, 1, 4, 2), None, {}),
    (T(16, 2, 2, None, 2, 4, 1), None, {}),
    (T(8, 2, 1, None, 2, 2, 2), None, {}),
    (T(8, 1, 2, 4, 1, 4), None, {"overlap": True}),
    (T(4, 1, 1, None, 1, 2), None, {"shared": False}),
    (T(4, 1, 1, None, 1, 4), LoRA(dim=4), {}),
    (T(8, 2, 2, None, 1, 2, 2), LoRA(dim=5, target_modules="attention"), {}),
    (T(8, 4, 1, None, 2, 8, 1), LoRA(dim=2, target_modules=["linear_fc1"]), {}),
    (T(4, 2, 1, None, 1, 2, 1), DoRA(dim=3), {}),
    (T(2, 1, 1, None, 1, 2), LoRA(dim=3, rank_pattern={"linear_fc1": 2}), {}),
    (T(3), LoRA(dim=3, layers="1,4-6"), {}),
    (T(2, 1, 2), DoRA(dim=2, layers="3-", experts=[0, 5, 7]), {}),
    (T(4, 1, 2, 2), LoRA(dim=3, layers=[0, 7], experts={"0": [2], "7": [3]}), {}),
]


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    cpu_device.activate()
    yield
    cpu_device.deactivate()


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Of their memory, shared memory counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def allocated(topology: Topology, peft: LoRA | None, *, bf16: bool, overlap: bool, shared: bool) -> list[int]:
    """Bytes of the base, of adapters, of gradients and of optimizer state."""
    config: Any = MixtralConfig(
        **dataclasses.asdict(SHAPE), bf16=bf16, params_dtype=torch.bfloat16 if bf16 else torch.float32,
        perform_initialization=False,
    )  # fmt: skip
    piped = topology.pipeline_model_parallel_size > 1
    config = with_topology(config, topology, pipeline_dtype=config.params_dtype if piped else None)
    model_parallel_cuda_manual_seed(1)
    chunks = build_model(config, adapters=peft is not None, transformer_engine=False)
    if peft is not None:
        attach.apply(peft, chunks)
    optim = MegatronOptimizerModule(
        OptimizerConfig(optimizer="adam", lr=1e-3, bf16=bf16, use_distributed_optimizer=shared)
    )
    buckets = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    ddp = wrap(chunks, config, ddp_config(buckets, optim, {}))
    with cpu_device.cuda_type_names():
        optimizer = get_megatron_optimizer(optim.config, ddp, use_gloo_process_groups=False)
    prepare_adam(optimizer)
    named = [(name, p.data) for chunk in chunks for name, p in chunk.named_parameters()]
    gradients = [buffer.grad_data for chunk in ddp for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    states = 0
    for part in parts_of(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                states += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes + (parameter.nbytes if bf16 else 0)
    return [
        bytes_of(p for name, p in named if ".adapter." not in name),
        bytes_of(p for name, p in named if ".adapter." in name),
        bytes_of(gradients),
        states,
    ]


@pytest.mark.parametrize(("topology", "peft", "settings"), CASES, ids=lambda value: getattr(value, "describe", str)())
def test_it_is_what_megatron_allocates(topology: Topology, peft: LoRA | None, settings: dict[str, bool]) -> None:
    chosen = {"bf16": True, "overlap": False, "shared": True} | settings
    width = 2 if chosen["bf16"] else 4
    one = Workload(
        SHAPE,
        topology,
        BatchShape(4 * topology.data_parallel_size, 1, 32),
        adapters=adapters_of(peft, SHAPE),
        dtype_bytes=width,
        transformer_engine=False,
        overlap_grad_reduce=chosen["overlap"],
        distributed_optimizer=chosen["shared"],
    )
    for rank in sorted({0, topology.world_size - 1}):
        with one_of(topology, rank):
            found = allocated(topology, peft, **chosen)
            copies = (
                parallel_state.get_data_parallel_rank(with_context_parallel=True),
                parallel_state.get_expert_data_parallel_rank(),
            )
            stage = parallel_state.get_pipeline_model_parallel_rank()
        held = weights.buffers(one, stage, copies)
        assert found == [
            weight_bytes(one, stage),
            sum(b.numel for b in held) * width if peft else 0,
            sum(b.numel for b in held) * 4,
            sum(b.shard for b in held) * (12 if width == 2 else 8),
        ]

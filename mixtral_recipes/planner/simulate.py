"""One rank's real model, built and run without its memory: what the formula says, held against what happens.

The model, its adapters and its gradient buffers are built by the same functions as in training, of fake tensors (shapes
and storages, no numbers), in a process group of the full size whose other ranks do not exist. As many forward passes
are made as the pipeline schedule holds at once, then one backward pass; every storage is counted while it lives.

Layers are our plain ones: Transformer Engine's kernels need a GPU, and have no fake counterpart. The formula is asked
for the same layers.
"""

import contextlib
import dataclasses
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from mixtral_recipes.checkpoints.shards import parts_of
from mixtral_recipes.cpu import device as cpu_device
from mixtral_recipes.layout.cards import Card
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.builder import build_model
from mixtral_recipes.models.config import MixtralConfig, with_topology
from mixtral_recipes.peft import attach
from mixtral_recipes.planner import memory
from mixtral_recipes.planner.workload import Workload
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.peft import DoRA, LoRA
from mixtral_recipes.training.optimizer import ddp_config, prepare_adam, wrap


class Storages(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, while it lives.

    Args:
        topk: Experts per token: how many elements a selection by the router's map has.
        own: The model's tensors, which do not count.
    """

    def __init__(self, topk: int, own: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.topk = topk
        self.making = "activations"
        self.live = {"activations": 0, "logits": 0}
        self.peak = 0
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in own}

    @property
    def now(self) -> int:
        """Bytes that live now."""
        return sum(self.live.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the storages it made."""
        if func is torch.ops.aten.masked_select.default:
            chosen = args[1]  # [experts, tokens], each token in topk rows
            result = args[0].new_empty(chosen.shape[-1] * self.topk)
        else:
            result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, list | tuple) else (result,):
            if isinstance(item, torch.Tensor):
                self._note(item)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        kind = self.making
        self._known[key] = weakref.finalize(storage, self._free, key, kind, size)
        self.live[kind] += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, kind: str, size: int) -> None:
        self._known.pop(key, None)
        self.live[kind] -= size


@contextlib.contextmanager
def _rank(topology: Topology, rank: int) -> Iterator[None]:
    """Be one rank of a job whose other ranks do not exist."""
    torch.distributed.init_process_group("fake", rank=rank, world_size=topology.world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(**topology.megatron_sizes(), create_gloo_process_groups=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def simulate(job: Workload, stage: int) -> dict[str, float]:
    """Memory of a rank of a pipeline stage, by category, in GB.

    Of the ranks that share a sequence the last is taken: on our plain layers the first masks less.

    Args:
        job: The job; ``transformer_engine`` must be off.
        stage: Pipeline stage.

    Returns:
        ``weights``, ``gradients``, ``optimizer``, ``adapters``; ``activations``, kept when the first backward pass
        begins; ``logits``, then; ``peak``, the most that lived at once beside weights and states; ``seconds`` it took.
    """
    started = time.monotonic()
    topology = job.topology
    per_stage = topology.world_size // topology.pipeline_model_parallel_size
    last_slice = topology.tensor_model_parallel_size * (topology.context_parallel_size - 1)
    with (
        _rank(topology, stage * per_stage + last_slice),
        _without_numbers(job),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        model = _Model(job)
        found = model.states()
        with Storages(job.topk, model.own()) as storages:
            kept = model.run(stage, storages)
        found |= {"activations": kept["activations"] / 1e9, "logits": kept["logits"] / 1e9}
        found |= {"peak": storages.peak / 1e9, "seconds": round(time.monotonic() - started, 2)}
    return found


def plain(job: Workload) -> Workload:
    """The same job on our plain layers in 16 or 32 bits: what can be built without a GPU.

    They recompute neither activations nor norms alone.
    """
    adapters = job.adapters and dataclasses.replace(job.adapters, quantized=False)
    recompute = job.recompute
    if recompute.granularity == "selective":
        left = tuple(name for name in recompute.modules if name not in ("moe_act", "layernorm"))
        recompute = dataclasses.replace(recompute, granularity="selective" if left else "", modules=left)
    return dataclasses.replace(
        job,
        transformer_engine=False,
        wgrad_fusion=False,
        fused=False,
        fp8_recipe="",
        fp8_param_gather=False,
        adapters=adapters,
        recompute=recompute,
        batch=dataclasses.replace(job.batch, packed=False, fp8=False),
    )


def compare(job: Workload, card: Card) -> list[dict[str, Any]]:
    """Formula and simulation of a job's first and last pipeline stage, on plain layers.

    Returns:
        For each stage, ``stage``, ``seconds``, and category -> ``formula`` and ``simulated``, GB.
    """
    job, found = plain(job), []
    for stage in sorted({0, job.topology.pipeline_model_parallel_size - 1}):
        real, counted = simulate(job, stage), memory.of_stage(job, card, stage)
        formula = {name: getattr(counted, name) for name in ("weights", "gradients", "optimizer", "adapters")}
        formula["activations"] = memory.kept_activations(job, stage) / 1e9
        formula["peak"] = counted.activations + counted.logits + counted.buffers
        rows = {name: {"formula": round(size, 6), "simulated": round(real[name], 6)} for name, size in formula.items()}
        found.append({"stage": stage, "seconds": real["seconds"], "memory_gb": rows})
    return found


def describe(found: list[dict[str, Any]]) -> str:
    """A comparison in lines."""
    lines = ["simulated on plain layers (GB, formula / simulated):"]
    for one in found:
        shown = ", ".join(
            f"{name} {row['formula']:.3f} / {row['simulated']:.3f}" for name, row in one["memory_gb"].items()
        )
        lines.append(f"  stage {one['stage']}: {shown} ({one['seconds']:.0f} s)")
    return "\n".join(lines)


class _Model:
    """A rank's model chunks, as training builds them."""

    def __init__(self, job: Workload) -> None:
        dtype = torch.float32 if job.dtype_bytes == 4 else torch.bfloat16
        piped = job.topology.pipeline_model_parallel_size > 1
        config = with_topology(
            _config(job, dtype),
            job.topology,
            pipeline_dtype=dtype if piped else None,
            calculate_per_token_loss=True,
            perform_initialization=False,
        )
        with unset_fake_temporarily():
            model_parallel_cuda_manual_seed(1)
        self.job, self.config, self.dtype = job, config, dtype
        scheme = _scheme(job)
        self.chunks: list[Any] = build_model(config, adapters=scheme is not None, transformer_engine=False)
        if scheme is not None:
            attach.apply(scheme, self.chunks)
        self.ddp: list[Any] = []

    def states(self) -> dict[str, float]:
        """GB of weights, gradient buffers and Adam's state, as DDP and the distributed optimizer lay them out."""
        job = self.job
        shared = job.distributed_optimizer
        optim = MegatronOptimizerModule(
            OptimizerConfig(
                optimizer="adam", lr=1e-4, bf16=self.dtype is torch.bfloat16, use_distributed_optimizer=shared
            )
        )
        buckets = DistributedDataParallelConfig(
            grad_reduce_in_fp32=job.grad_bytes == 4, overlap_grad_reduce=job.overlap_grad_reduce
        )
        self.ddp = wrap(self.chunks, self.config, ddp_config(buckets, optim, {}))
        with cpu_device.cuda_type_names():
            optimizer = get_megatron_optimizer(optim.config, self.ddp, use_gloo_process_groups=False)
        prepare_adam(optimizer)
        named = [(name, p) for chunk in self.chunks for name, p in chunk.named_parameters()]
        gradients = sum(b.grad_data.nbytes for d in self.ddp for b in (*d.buffers, *d.expert_parallel_buffers))
        states = 0
        for part in parts_of(optimizer):
            for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
                state = part.optimizer.state[parameter]
                states += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
                states += parameter.nbytes if self.dtype is torch.bfloat16 else 0
        base = _bytes(p for name, p in named if ".adapter." not in name)
        own = _bytes(p for name, p in named if ".adapter." in name)
        if job.trains_all:
            found = {"weights": base, "gradients": gradients, "optimizer": states, "adapters": 0}
        else:
            found = {"weights": base, "gradients": 0, "optimizer": 0, "adapters": own + gradients + states}
        return {name: size / 1e9 for name, size in found.items()}

    def own(self) -> list[torch.Tensor]:
        """Weights, buffers and gradient buffers."""
        found = [tensor for c in self.chunks for tensor in (*c.parameters(), *c.buffers())]
        return found + [b.grad_data for d in self.ddp for b in (*d.buffers, *d.expert_parallel_buffers)]

    def run(self, stage: int, storages: Storages) -> dict[str, int]:
        """All forward passes that a stage holds at once, and one backward pass.

        Returns:
            What lived when the backward pass began.
        """
        job, t = self.job, self.job.topology
        pp = t.pipeline_model_parallel_size
        tokens = job.batch.seq_length // t.context_parallel_size
        outputs = []
        for number in range(memory.in_flight(job, stage)):
            chunk = (number // pp) % len(self.ddp)
            if self.chunks[chunk].post_process:
                layer = self.chunks[chunk].output_layer
                layer.register_forward_pre_hook(lambda *_: setattr(storages, "making", "logits"))
            outputs.append(self._forward(self.ddp[chunk], self.chunks[chunk], job.batch.micro_batch_size, tokens))
        kept = dict(storages.live)
        storages.making = "activations"
        output = outputs.pop()
        gradient = torch.empty_like(output) if output.dim() == 3 else None
        torch.autograd.backward(output.float().sum() if gradient is None else output, gradient)
        return kept

    def _forward(self, ddp: Any, chunk: Any, batch: int, tokens: int) -> torch.Tensor:
        whole = torch.zeros(batch, tokens, dtype=torch.long)
        if not chunk.pre_process:
            t = self.job.topology
            rows = tokens // (t.tensor_model_parallel_size if t.sequence_parallel else 1)
            received = torch.empty(rows, batch, self.config.hidden_size, dtype=self.dtype, requires_grad=True)
            chunk.set_input_tensor(received)
        return ddp(whole, whole, None, labels=whole)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of their storages, shared ones counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _config(job: Workload, dtype: torch.dtype) -> MixtralConfig:
    fields: dict[str, Any] = dataclasses.asdict(job.shape)
    if job.recompute.granularity:
        fields["recompute_granularity"] = job.recompute.granularity
        if job.recompute.granularity == "full":
            fields |= {"recompute_method": job.recompute.method, "recompute_num_layers": job.recompute.num_layers}
        else:
            fields["recompute_modules"] = list(job.recompute.modules)
    if job.capacity_factor:
        fields |= {"moe_expert_capacity_factor": job.capacity_factor, "moe_pad_expert_input_to_capacity": True}
    return MixtralConfig(**fields, moe_router_topk=job.topk, bf16=dtype is torch.bfloat16, params_dtype=dtype)


def _scheme(job: Workload) -> LoRA | None:
    if job.adapters is None:
        return None
    kind = DoRA if job.adapters.magnitudes else LoRA
    return kind(target_modules=list(job.adapters.targets), dim=job.adapters.dim, rank_pattern=dict(job.adapters.ranks))


@contextlib.contextmanager
def _without_numbers(job: Workload) -> Iterator[None]:
    """What needs numbers, or real memory, done without.

    The dispatcher counts as if every expert got as many tokens. Ranks agree on groups of parameters by each having the
    same. Weights, made in their format already, are not converted again, which fake ones cannot be.
    """

    def preprocess(self: Any, routing_map: torch.Tensor) -> Any:
        tokens, local = routing_map.shape[0], self.num_local_experts
        if self.drop_and_pad:
            count(self, routing_map)
            each = self.capacity
        else:
            self.num_out_tokens = tokens * job.topk
            each = self.num_out_tokens // self.num_experts
        if self.ep_size > 1 or self.tp_size > 1:
            self.input_splits = self.output_splits = np.full(self.ep_size, each * local)
            self.output_splits_tp = np.full(self.tp_size, each * local * self.ep_size)
        if local > 1:
            self.num_global_tokens_per_local_expert = np.full((self.tp_size * self.ep_size, local), each)
        return np.full(local, each * self.tp_size * self.ep_size)

    def agree(found: list[Any], mine: Any, group: Any = None) -> None:
        found[:] = [mine] * len(found)

    def sort(tokens: torch.Tensor, sizes: Any, order: torch.Tensor, probs: Any = None, **named: Any) -> Any:
        """Sorted or not, the chunks take as much."""
        return tokens.clone(), None if probs is None else probs.clone()

    with contextlib.ExitStack() as stack:
        if not cpu_device.active():
            cpu_device.activate()
            stack.callback(cpu_device.deactivate)
        count = MoEAlltoAllTokenDispatcher.preprocess
        for holder, name, stand_in in (
            (MoEAlltoAllTokenDispatcher, "preprocess", preprocess),
            (torch.distributed, "all_gather_object", agree),
            (torch.nn.Module, "bfloat16", lambda self: self),
            (token_dispatcher, "sort_chunks_by_idxs", sort),
            (type(get_moe_metrics_tracker()), "record", lambda *args, **named: None),
            (CudaRNGStatesTracker, "fork", lambda self, name="": contextlib.nullcontext()),
        ):
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, stand_in)
        yield

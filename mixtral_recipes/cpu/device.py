"""Megatron-Core on a machine without a GPU: the only file that knows there is none.

Megatron-Core 0.19 is written for CUDA. What stops it on a CPU is small and listed in `_REPLACEMENTS`: no-op streams
and events, the device argument of tensor factories, the CUDA random state, and a few spots in the mixture-of-experts
code. `activate` puts stand-ins there; it refuses where a GPU is usable, so production code never runs on them.

Nothing here is entered per operation: the training step calls torch as it is, except that factories named in
`_FACTORIES` look at their ``device`` argument once per call.
"""

import contextlib
import functools
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

from mixtral_recipes.cpu import lazy_compile
from mixtral_recipes.cpu import speed as cpu_speed
from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.system import late_imports

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "as_tensor", "rand", "randn", "randint")

# (object, attribute, original value) in the order they were replaced; empty while inactive.
_replaced: list[tuple[Any, str, Any]] = []


class _Stream:
    """A stream or event that is always finished: work on a CPU is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


_THE_STREAM = _Stream()


def active() -> bool:
    """Whether the stand-ins are in place."""
    return bool(_replaced)


def activate() -> None:
    """Make Megatron-Core run on this machine's CPU. Idempotent.

    Raises:
        EnvironmentProblem: a CUDA device is usable, so the stand-ins must not be.
    """
    if torch.cuda.is_available():
        raise EnvironmentProblem("the CPU stand-in was asked for, but a CUDA device is available; use the GPU.")
    if active():
        return
    # `with torch.device("meta")` knows factories by identity, from a set it makes when first used: it must hold the
    # originals, or transformers' from_pretrained gets memory nobody has written for what is not in the file.
    _device_constructors()
    # A module of Megatron's that is imported after its neighbour's functions were replaced would take the stand-ins.
    late_imports.complete("megatron")
    for name in _FACTORIES:
        _replace(torch, name, _on_cpu(getattr(torch, name)))
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
    for name, stand_in in _CUDA_NAMES.items():
        _replace(torch.cuda, name, stand_in)
    with warnings.catch_warnings():  # Megatron says at import that Apex and Transformer Engine are absent
        warnings.simplefilter("ignore")
        for module_name, attribute, stand_in in _REPLACEMENTS:
            _replace(importlib.import_module(module_name), attribute, stand_in)
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import mappings
    from megatron.core.utils import local_multi_tensor_applier

    for target, attribute, around in (
        (DistributedOptimizer, "_set_main_param_and_optimizer_states", _step_apart),
        (mappings, "_gather_along_first_dim", _gather_uneven),
        (mappings, "_reduce_scatter_along_first_dim", _reduce_scatter_uneven),
        (param_and_grad_buffer, "dist_all_gather_func", cpu_speed.among_several),
        (param_and_grad_buffer, "dist_reduce_scatter_func", cpu_speed.among_several),
        (rope_utils, "_apply_rotary_pos_emb_bshd", cpu_speed.in_halves),
    ):
        _replace(target, attribute, around(getattr(target, attribute)))
    for module in (clip_grads, optimizer):
        _replace(module, "multi_tensor_applier", local_multi_tensor_applier)
        _replace(module, "multi_tensor_scale_impl", cpu_speed.multi_tensor_scale)
    # Megatron's random tracker warns when the CPU's state moves inside it; here the CPU's state is what it tracks.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_not_about_cpu_state)
    if "transformer_engine" in sys.modules:
        _hide_transformer_engine()
    # Megatron's fusions are compiled when first called; here that would start a C++ compiler in the first step.
    lazy_compile.run_eagerly(True)


def deactivate() -> None:
    """Put every original back (tests)."""
    while _replaced:
        target, attribute, original = _replaced.pop()
        setattr(target, attribute, original)
    logging.getLogger("megatron.core.tensor_parallel.random").removeFilter(_not_about_cpu_state)
    lazy_compile.run_eagerly(False)


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """Let ``tensor.type()`` answer with CUDA's spelling while Megatron's optimizer is built or steps.

    The distributed optimizer sorts parameters by comparing with ``"torch.cuda.FloatTensor"``. Does nothing on a GPU.
    """
    if not active():
        yield
        return
    original = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.Tensor.type = original


def _replace(target: Any, attribute: str, value: Any) -> None:
    _replaced.append((target, attribute, getattr(target, attribute)))
    setattr(target, attribute, value)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that takes a CUDA ``device`` for the CPU, and ignores requests for pinned memory."""

    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and (isinstance(device, int) or str(device).startswith("cuda")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


def _get_rng_state(device: Any = None, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: Any = None, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's own leaves a CPU tensor a tensor; the all-to-all then refuses it where it expects numpy sizes."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_uneven(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Gathering of differently many rows per rank (expert tensor parallelism), which gloo refuses."""

    @functools.wraps(gather)
    def gather_(input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *rest: Any, **named: Any) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, *rest, **named)
        longest = max(output_split_sizes)
        padded = input_.new_zeros(longest, *input_.shape[1:])
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:rows] for part, rows in zip(parts, output_split_sizes, strict=True)])

    return gather_


def _reduce_scatter_uneven(reduce_scatter: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The sum of differently many rows per rank, which gloo refuses."""

    @functools.wraps(reduce_scatter)
    def reduce_scatter_(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, *rest: Any, **named: Any
    ) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, *rest, **named)
        total = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].contiguous()

    return reduce_scatter_


def _step_apart(set_states: Callable[..., None]) -> Callable[..., None]:
    """Let the distributed optimizer read a checkpoint into torch's AdamW, whose state holds ``step`` too.

    Megatron stores ``step`` once per parameter group and not among a parameter's tensors, where it then looks for it.
    """

    @functools.wraps(set_states)
    def with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        set_states(self, model_param, {"step": None, **tensors})

    return with_step


def _not_about_cpu_state(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


_CUDA_NAMES: dict[str, Any] = {
    "Stream": _Stream,
    "Event": _Stream,
    "current_stream": lambda device=None: _THE_STREAM,
    "default_stream": lambda device=None: _THE_STREAM,
    "stream": lambda stream: contextlib.nullcontext(),
    "synchronize": lambda device=None: None,
    "set_device": lambda device: None,
    "current_device": lambda: _CPU,
    "empty_cache": lambda: None,
    "manual_seed": torch.manual_seed,
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "is_current_stream_capturing": lambda: False,
}

_REPLACEMENTS: tuple[tuple[str, str, Any], ...] = (
    ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state", _get_rng_state),
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", _set_rng_state),
    ("megatron.core.transformer.moe.moe_utils", "maybe_move_tensor_to_cpu", _maybe_move_tensor_to_cpu),
    ("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", _maybe_move_tensor_to_cpu),
)


def _hide_transformer_engine() -> None:
    """Where Transformer Engine is installed but has no GPU, give Megatron the pure PyTorch paths back."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.utils import local_multi_tensor_l2_norm

    megatron_optimizer = importlib.import_module("megatron.core.optimizer")
    _replace(moe_utils, "te_general_gemm", None)
    _replace(megatron_optimizer, "Adam", torch.optim.AdamW)
    _replace(megatron_optimizer, "SGD", torch.optim.SGD)
    _replace(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True)
    _replace(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    _replace(clip_grads, "multi_tensor_scale_tensor_impl", None)

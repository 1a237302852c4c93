"""Torch's operators on the card that is not there: its memory is the machine's, so the CPU's kernels compute on it."""

import ctypes
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

# What only makes, describes or reads memory, or has no kernel of its own.
_LEFT = (
    *("aten::empty", "aten::new_empty", "aten::set_", "aten::resize_", "aten::_resize_output", "aten::as_strided"),
    *("aten::view", "aten::_reshape_alias", "aten::unfold", "aten::_pin_memory", "aten::is_pinned", "aten::lift"),
    *("aten::record_stream", "aten::_nested", "aten::_sparse", "aten::_cslt", "aten::_cudnn", "aten::cudnn"),
    *("aten::_use_cudnn", "aten::miopen"),
)
# Indices and what is copied may stand on the other device; as with CUDA, nothing else may.
_FROM_ANYWHERE = ("aten::copy_", "aten::_copy", "aten::index", "aten::_index_put", "aten::_unsafe_index")
_kept: list[torch.library.Library] = []


def on_cpu(tensor: Tensor) -> Tensor:
    """A tensor of the CPU that is the same memory."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    bytes_ = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    same = torch.empty(0, dtype=tensor.dtype)
    return same.set_(bytes_, tensor.storage_offset(), tensor.size(), tensor.stride())


def on_card(tensor: Tensor, card: torch.device | str = "cuda") -> Tensor:
    """A copy on a card, the current one where none is named."""
    copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=card)
    if tensor.numel():
        on_cpu(copy).copy_(tensor)
    return copy


def install() -> None:
    """Put the CPU's kernels in the place of CUDA's, operator by operator."""
    library = torch.library.Library("aten", "IMPL")
    _kept.append(library)
    warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel.*")
    for name in torch._C._dispatch_get_all_op_names():
        if operator := _to_replace(name):
            library.impl(name.removeprefix("aten::"), _computed_by_cpu(operator, name), "CUDA", allow_override=True)
    library.impl("_fused_rms_norm", _rms_norm, "CUDA", allow_override=True)
    library.impl("_fused_rms_norm_backward", _rms_norm_backward, "CUDA", allow_override=True)
    attention = torch.nn.functional.scaled_dot_product_attention

    def plain_attention(*args: Any, **named: Any) -> Tensor:
        with sdpa_kernel([SDPBackend.MATH]):
            return attention(*args, **named)

    torch.nn.functional.scaled_dot_product_attention = plain_attention


def _to_replace(name: str) -> Any:
    """The operator, if CUDA computes it with a kernel, and the CPU can; None otherwise."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if not name.startswith("aten::") or name.startswith(_LEFT) or not (has(name, "CUDA") or name == "aten::copy_"):
        return None
    base, _, overload = name.removeprefix("aten::").partition(".")
    operator = getattr(getattr(torch.ops.aten, base), overload or "default", None)
    if operator is None or not (has(name, "CPU") or has(name, "CompositeExplicitAutograd")):
        return None
    views = any(each.alias_info is not None and not each.alias_info.is_write for each in operator._schema.returns)
    return None if views else operator


def _computed_by_cpu(operator: Any, name: str) -> Callable[..., Any]:
    arguments = operator._schema.arguments
    draws = any(argument.name == "generator" for argument in arguments) or "dropout" in name
    tensors = [str(each.type) in ("Tensor", "Optional[Tensor]") for each in arguments if not each.kwarg_only]

    def compute(*args: Any, **named: Any) -> Any:
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        generator = None

        def here(value: Any) -> Any:
            nonlocal generator
            if isinstance(value, Tensor) and value.is_cuda:
                same = on_cpu(value)
                pairs[id(same)] = same, value
                return same
            if isinstance(value, torch.device):
                return torch.device("cpu")
            if isinstance(value, torch.Generator):
                generator = value
                return None
            return value

        def there(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.device.type != "cpu":
                return value
            if id(value) not in pairs:
                return on_card(value, card)
            same, original = pairs[id(value)]
            if same.shape != original.shape:  # an ``out`` that was made larger
                on_cpu(original.resize_(same.shape)).copy_(same)
            return original

        flat, shape = pytree.tree_flatten((args, named))
        card = _card_of(flat)
        if not name.startswith(_FROM_ANYWHERE):
            _refuse_two_devices(flat, name)
        given, named = pytree.tree_unflatten([here(value) for value in flat], shape)
        # Numbers that torch had wrapped are unwrapped on their way here.
        given = [
            torch.tensor(value) if wanted and isinstance(value, int | float) else value
            for value, wanted in zip(given, tensors + [False] * len(given), strict=False)
        ]
        result = _drawn(operator, generator, given, named) if draws else operator(*given, **named)
        return pytree.tree_map(there, result)

    return compute


def _card_of(values: list[Any]) -> torch.device:
    devices = (value.device if isinstance(value, Tensor) else value for value in values)
    return next(
        (each for each in devices if isinstance(each, torch.device) and each.type == "cuda"), torch.device("cuda")
    )


def _refuse_two_devices(values: list[Any], name: str) -> None:
    devices = {value.device.type for value in values if isinstance(value, Tensor) and value.dim()}
    if len(devices) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {', '.join(devices)}")


def _drawn(operator: Any, generator: torch.Generator | None, args: Any, named: Any) -> Any:
    """Random numbers from the seed and place of the card's generator, which moves on; the CPU's stays where it is."""
    ours = generator or torch.cuda.default_generators[torch.cuda.current_device()]
    at, before = ours.get_offset(), torch.get_rng_state()
    torch.default_generator.manual_seed((ours.initial_seed() * 1_000_003 + at) % 2**62)
    try:
        return operator(*args, **named)
    finally:
        torch.set_rng_state(before)
        ours.set_offset(at + 256)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    wide = on_cpu(x).float()
    scale = (wide.square().mean(-1, keepdim=True) + (eps or sys.float_info.epsilon)).rsqrt()
    normed = wide * scale
    if weight is not None:
        normed = normed * on_cpu(weight).float()
    return on_card(normed.to(x.dtype)), on_card(scale)


def _rms_norm_backward(
    grad: Tensor, x: Tensor, shape: Any, scale: Tensor, weight: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor | None]:
    dx, dweight = rms_norm_gradients(grad, x, on_cpu(scale), None if weight is None else on_cpu(weight).float())
    return on_card(dx.to(x.dtype)), on_card(dweight.to(x.dtype)) if wanted[1] else None


def rms_norm_gradients(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of an RMSNorm's input and weight, in fp32 on the CPU."""
    g, normed = on_cpu(grad).float(), on_cpu(x).float() * scale
    weighted = g if weight is None else g * weight
    dx = scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return dx, (g * normed).flatten(0, -2).sum(0)

"""Transformer Engine's FP8 on the card that is not there: scales and casts as its kernels make them."""

from collections.abc import Callable
from typing import Any

import torch
from card_torch import on_cpu
from torch import Tensor

_formats: dict[int, tuple[torch.dtype, float]] = {}


def learn_formats(types: Any) -> None:
    """Which of Transformer Engine's types is which of torch's, and its largest number."""
    _formats[int(types.kFloat8E4M3)] = torch.float8_e4m3fn, 448.0
    _formats[int(types.kFloat8E5M2)] = torch.float8_e5m2, 57344.0


def quantize_into(value: Tensor, into: Any, quantizer: Any = None) -> None:
    """Fill a tensor that Transformer Engine allocated.

    Args:
        value: Floats on the CPU, of its shape.
        into: The tensor: by tensor (delayed or current scaling) or by blocks.
        quantizer: Its quantizer; None takes the tensor's own.
    """
    quantizer = quantizer if quantizer is not None else into._quantizer
    if not value.numel():
        return
    fill = _by_blocks if "Blockwise" in type(into).__name__ else _by_tensor
    fill(value, into, quantizer, *_formats[int(into._fp8_dtype)])


def _scale(amax: Tensor, quantizer: Any, largest: float) -> Tensor:
    amax = amax.float().clamp(min=getattr(quantizer, "amax_epsilon", 0.0))
    scale = torch.where((amax > 0) & amax.isfinite(), largest / amax.clamp(min=1e-38), torch.ones(()))
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    return scale.log2().floor().exp2() if getattr(quantizer, "force_pow_2_scales", False) else scale


def _cast(value: Tensor, dtype: torch.dtype, largest: float) -> Tensor:
    return value.clamp(-largest, largest).to(dtype).view(torch.uint8)


def _by_tensor(value: Tensor, into: Any, quantizer: Any, dtype: torch.dtype, largest: float) -> None:
    amax = value.abs().max()
    if type(quantizer).__name__ == "Float8Quantizer":  # delayed: the scale is known, the maximum is for the next ones
        scale = on_cpu(quantizer.scale).reshape(()).clone()
        on_cpu(quantizer.amax).clamp_(min=amax.item())
    else:
        scale = _scale(_over_ranks(amax, quantizer), quantizer, largest)
    data = _cast(value * scale, dtype, largest)
    if into._data is not None:
        on_cpu(into._data).copy_(data.reshape(into._data.shape))
    if into._transpose is not None and not into._transpose_invalid:
        on_cpu(into._transpose).copy_(data.flatten(0, -2).T.reshape(into._transpose.shape))
    on_cpu(into._scale_inv).fill_(1 / scale.item())


def _over_ranks(amax: Tensor, quantizer: Any) -> Tensor:
    if not getattr(quantizer, "with_amax_reduction", False):
        return amax
    shared = torch.full((1,), amax.item(), device="cuda")
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    return on_cpu(shared)[0].clone()


def _by_blocks(value: Tensor, into: Any, quantizer: Any, dtype: torch.dtype, largest: float) -> None:
    """By 128 x 128 for weights, by 128 of a row for activations; scales stand as cuBLASLt reads them."""
    rows = value.flatten(0, -2)
    square = into._is_2D_scaled
    for data, scales, source in (
        (into._rowwise_data, into._rowwise_scale_inv, rows),
        (into._columnwise_data, into._columnwise_scale_inv, rows.T),
    ):
        if data is None:
            continue
        height = 128 if square else 1
        padded = torch.nn.functional.pad(source, (0, -source.shape[1] % 128, 0, -source.shape[0] % height))
        blocks = padded.unflatten(0, (-1, height)).unflatten(2, (-1, 128))
        scale = _scale(blocks.abs().amax(dim=(1, 3)), quantizer, largest)
        cast = _cast((blocks * scale[:, None, :, None]).reshape(padded.shape), dtype, largest)
        on_cpu(data).copy_(cast[: source.shape[0], : source.shape[1]].reshape(data.shape))
        inverse = 1 / (scale if square else scale.T)
        on_cpu(scales).zero_()[: inverse.shape[0], : inverse.shape[1]] = inverse


def _floats(tensor: Any) -> Tensor:
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return on_cpu(tensor.detach()).float()
    dtype, _ = _formats[int(tensor._fp8_dtype)]
    scale = on_cpu(tensor._scale_inv)
    if tensor._data is not None:
        return on_cpu(tensor._data).view(dtype).float() * scale
    turned = on_cpu(tensor._transpose).view(dtype).float() * scale
    return turned.permute(*range(1, turned.dim()), 0)


def _put(into: Any, value: Tensor, quantizer: Any) -> None:
    if type(into) is Tensor:
        on_cpu(into).copy_(value.reshape(into.shape))
    else:
        quantize_into(value, into, quantizer)


def _quantize(out: Any, tensor: Any, quantizer: Any, into: Any = None, noop: Tensor | None = None) -> None:
    if noop is None or not on_cpu(noop).item():
        _put(out, _floats(tensor), quantizer)


def _bias_and_quantize(out: Any, tensor: Tensor, quantizer: Any) -> None:
    if isinstance(out[0], Tensor):
        on_cpu(out[0]).copy_(_floats(tensor).flatten(0, -2).sum(0))
    _put(out[1], _floats(tensor), quantizer)


def _split_quantize(out: Any, tensor: Tensor, sizes: list[int], quantizers: Any, *rest: Any) -> None:
    for piece, into, quantizer in zip(_floats(tensor).split(list(sizes)), out, quantizers, strict=True):
        _put(into, piece, quantizer)


def _quantize_all(out: Any, tensors: Any, quantizers: Any) -> None:
    for tensor, into, quantizer in zip(tensors, out, quantizers, strict=True):
        _put(into, _floats(tensor), quantizer)


def _dequantize(out: Tensor, tensor: Any, dtype: Any) -> None:
    on_cpu(out).copy_(_floats(tensor).reshape(out.shape))


def _transpose(out: Tensor, data: Tensor, *rest: Any) -> None:
    on_cpu(out).copy_(on_cpu(data).flatten(0, -2).T.reshape(out.shape))


def _swap_first_dims(out: Tensor, tensor: Tensor, *rest: Any) -> None:
    on_cpu(out).copy_(on_cpu(tensor).transpose(0, 1).reshape(out.shape))


def _amax(out: None, tensor: Tensor, amax: Tensor) -> None:
    on_cpu(amax).fill_(on_cpu(tensor).float().abs().max())


def _scales_of(out: None, chunk: int, noop: Tensor, lists: Any, largest: float, powers: bool, eps: float) -> None:
    class Of:
        amax_epsilon, force_pow_2_scales = eps, powers

    for amax, scale, inverse in zip(*lists, strict=True):
        on_cpu(scale).copy_(_scale(on_cpu(amax), Of, largest))
        on_cpu(inverse).copy_(1 / on_cpu(scale))


def _next_scales(out: None, seen: Tensor, histories: Any, scales: Any, how: str, dtype: Any, margin: float) -> None:
    """Delayed scaling, after a step: the maxima of all ranks enter the histories, and scales follow from those."""
    pieces = on_cpu(seen).flatten().split([scale.numel() for scale in scales])
    for piece, each, scale in zip(pieces, histories, scales, strict=True):
        history = on_cpu(each)
        history[0] = piece
        amax = history.amax(0) if how == "max" else piece
        new = _formats[int(dtype)][1] / amax / 2**margin
        on_cpu(scale).copy_(torch.where((amax > 0) & amax.isfinite() & new.isfinite(), new, on_cpu(scale)))
        history.copy_(history.roll(-1, 0))
        history[0] = 0


FILLED: dict[str, Callable[..., None]] = {
    "quantize": _quantize,
    "bgrad_quantize": _bias_and_quantize,
    "split_quantize": _split_quantize,
    "multi_tensor_quantize": _quantize_all,
    "dequantize": _dequantize,
    "fp8_transpose": _transpose,
    "swap_first_dims": _swap_first_dims,
    "compute_amax": _amax,
    "multi_tensor_compute_scale_and_scale_inv": _scales_of,
    "fused_amax_and_scale_update_after_reduction": _next_scales,
}

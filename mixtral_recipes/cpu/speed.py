"""Work Megatron-Core does for many GPUs that one CPU process can leave out; results stay the same, bit for bit.

`cpu_device.activate` puts these around Megatron's functions; on a GPU none of them exists.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def among_several(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A gather or reduce-scatter that does nothing where one rank would copy a buffer onto itself.

    The distributed optimizer's buffers are as large as the model, and gloo copies them back and forth.
    """

    @functools.wraps(collective)
    def collective_(output: Tensor, input_: Tensor, *args: Any, group: Any = None, **named: Any) -> Any:
        alone = group is not None and group.size() == 1
        if alone and output.data_ptr() == input_.data_ptr() and output.numel() == input_.numel():
            return None
        return collective(output, input_, *args, group=group, **named)

    return collective_


def multi_tensor_scale(chunk_size: Any, overflow: Any, tensors: list[list[Tensor]], scale: Any) -> None:
    """Scale many tensors (clipping): in place and in one call where source and target are the same.

    Args:
        chunk_size: Unused, as in Megatron's own stand-in for Apex's kernel.
        overflow: Unused, likewise.
        tensors: Sources and targets.
        scale: A number, or a tensor of one.
    """
    sources, targets = tensors
    if sources and all(source is target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, scale)  # pyright: ignore[reportPrivateImportUsage]
        return
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source * scale)


def in_halves(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Megatron's rotary embedding; where all of a head is rotated, written half by half with no copies between."""

    @functools.wraps(apply)
    def apply_(
        t: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        mla_rotary_interleaved: bool = False,
        mscale: float = 1.0,
        **named: Any,
    ) -> Tensor:
        if rotary_interleaved or mla_rotary_interleaved or freqs.shape[-1] != t.shape[-1] or t.dim() != 4:
            return apply(t, freqs, rotary_interleaved, mla_rotary_interleaved, mscale, **named)
        cos, sin = (torch.cos(freqs) * mscale).to(t.dtype), (torch.sin(freqs) * mscale).to(t.dtype)
        return _Rotated.apply(t, cos, sin)

    return apply_


class _Rotated(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) on the halves of the last axis of [s, b, heads, d]."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (a, b), (sin_a, sin_b) = t.chunk(2, -1), sin.chunk(2, -1)
        turned = torch.empty_like(t)
        first, second = turned.chunk(2, -1)
        torch.mul(b, sin_a, out=first).neg_()
        torch.mul(a, sin_b, out=second)
        return (t * cos).add_(turned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        (a, b), (sin_a, sin_b) = grad.chunk(2, -1), sin.chunk(2, -1)
        turned = torch.empty_like(grad)
        first, second = turned.chunk(2, -1)
        torch.mul(b, sin_b, out=first)
        torch.mul(a, sin_a, out=second).neg_()
        return (grad * cos).add_(turned), None, None

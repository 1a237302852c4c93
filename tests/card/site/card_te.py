"""Transformer Engine on the card that is not there: its functions run, their checks and allocations with them, and what
their kernels would have written is computed by the CPU.
"""

import itertools
import sys
from collections.abc import Callable
from typing import Any

import card_te_context as context
import card_te_fp8 as fp8
import card_te_routing as routing
import torch
from card_torch import on_cpu, rms_norm_gradients
from torch import Tensor

Function = Callable[..., Any]


def install() -> None:
    """Wrap the functions that training needs."""
    tex = sys.modules["transformer_engine_torch"]
    fp8.learn_formats(tex.DType)
    for name, fill in {**_FILLED, **context.FILLED, **fp8.FILLED, **routing.FILLED}.items():
        setattr(tex, name, filled(getattr(tex, name), fill))
    tex.fused_attn_fwd, tex.fused_attn_bwd = _attention, _attention_backward
    backend = tex.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    tex.get_fused_attn_backend = lambda parameters: (backend, "")


def filled(real: Function, fill: Function) -> Function:
    """A function whose result is written to by another, which gets that result and the arguments."""

    def both(*args: Any, **named: Any) -> Any:
        result = real(*args, **named)
        fill(result, *args, *named.values())
        return result

    return both


def put(into: Any, value: Tensor, quantizer: Any = None) -> None:
    """Write floats into a tensor of the card, or of Transformer Engine's FP8."""
    if type(into) is Tensor:
        on_cpu(into).copy_(value.reshape(into.shape))
    else:
        fp8.quantize_into(value, into, quantizer)


def _rmsnorm_fwd(out: Any, x: Tensor, weight: Tensor, eps: float, *rest: Any) -> None:
    wide = on_cpu(x).float()
    scale = (wide.square().mean(-1) + eps).rsqrt()
    put(out[2], scale)
    put(out[0], wide * scale[..., None] * on_cpu(weight).float())


def _rmsnorm_bwd(out: Any, grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *rest: Any) -> None:
    wide = on_cpu(scale).reshape(*x.shape[:-1], 1)
    for into, value in zip(out, rms_norm_gradients(grad, x, wide, on_cpu(weight).float()), strict=False):
        put(into, value)


def _rmsnorm_bwd_add(out: Any, grad: Tensor, x: Tensor, add: Tensor, scale: Tensor, weight: Tensor, *rest: Any) -> None:
    _rmsnorm_bwd(out, grad, x, scale, weight)
    on_cpu(out[0]).add_(on_cpu(add))


def _angles(t: Tensor, frequencies: Tensor, layout: Any, starts: Tensor | None, ranks: int, rank: int) -> Tensor:
    """Of each row of ``t``, shaped to go with it; with context parallelism a rank has a front and a back piece."""
    angles = on_cpu(frequencies).float().flatten(0, -2)
    if starts is None:
        return angles[: t.shape[0], None, None] if "SBHD" in str(layout) else angles[None, : t.shape[1], None]
    places = []
    ends = on_cpu(starts).tolist()
    for start, end in itertools.pairwise(ends):
        half = torch.arange((end - start) // ranks // 2)
        pieces = [half + rank * len(half), half + (2 * ranks - 1 - rank) * len(half)]
        places.append(torch.cat(pieces) if ranks > 1 else torch.arange(end - start))
    found = torch.cat(places)
    return angles[torch.nn.functional.pad(found, (0, t.shape[0] - len(found))), None]


def _rope(sign: int) -> Function:
    def fill(out: Tensor, t: Tensor, frequencies: Tensor, begin: Any, layout: Any, mixed: bool, *rest: Any) -> None:
        angles, x = _angles(t, frequencies, layout, *rest), on_cpu(t).float()
        turned, left = x.split([angles.shape[-1], x.shape[-1] - angles.shape[-1]], -1)
        first, second = turned.chunk(2, -1)
        sines, low = angles.sin() * sign, angles.shape[-1] // 2
        other = torch.cat([-second * sines[..., :low], first * sines[..., low:]], -1)
        put(out, torch.cat([turned * angles.cos() + other, left], -1))

    return fill


def _sequences(layout: str, q: Tensor, k: Tensor, starts: list[Tensor]) -> list[tuple[Any, Any]]:
    """How q-like and k-like tensors are indexed for one sequence each."""
    if "THD" in layout:
        ends, places = starts[:2], starts[2:] or starts  # lengths, and where they begin if there is room between them
        pieces = []
        for end, place in zip(ends, places, strict=True):
            lengths, first = on_cpu(end).diff().tolist(), on_cpu(place).tolist()
            pieces.append([slice(at, at + length) for at, length in zip(first, lengths, strict=False)])
        return [(i, j) for i, j in zip(*pieces, strict=True) if i.stop > i.start]
    if layout.startswith("NVTE_SBHD"):
        return [((slice(None), n), (slice(None), n)) for n in range(q.shape[1])]
    return [(n, n) for n in range(q.shape[0])]


def _scores(q: Tensor, k: Tensor, scale: float, mask: Any) -> Tensor:
    """[heads, q, k] of one sequence's [q, heads, d] and [k, groups, d]."""
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    if "CAUSAL" not in str(mask):
        return scores
    ahead = scores.shape[2] - scores.shape[1] if "BOTTOM" in str(mask) else 0
    return scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(ahead + 1), float("-inf"))


def _floats(values: tuple[Any, ...], n: int) -> list[Tensor]:
    return [each for each in values if isinstance(each, Tensor) and each.is_floating_point()][:n]


def _whole(values: tuple[Any, ...]) -> list[Tensor]:
    return [each for each in values if isinstance(each, Tensor) and each.dtype == torch.int32][:4]


def _statistics(of: Tensor, layout: str, where: Any, number: int) -> Tensor:
    """A view [heads, q] of the logarithms of a sequence's sums: [t, h, 1] if packed, else [b, h, s, 1]."""
    return on_cpu(of)[where].flatten(1).T if "THD" in layout else on_cpu(of)[number].squeeze(-1)


def _attention(*args: Any) -> list[Tensor]:
    scale, layout, mask = args[3], str(args[6]).rpartition(".")[2], args[10]
    q, k, v = _floats(args, 3)
    heads = q.shape[-2]
    rows = (q.shape[0], heads, 1) if "THD" in layout else (q.shape[1], heads, q.shape[0], 1)
    if layout.startswith("NVTE_BSHD"):
        rows = (q.shape[0], heads, q.shape[1], 1)
    out, sums = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device="cuda"), torch.zeros(rows, device="cuda")
    queries, keys, values = (on_cpu(each).float() for each in (q, k, v))
    for number, (i, j) in enumerate(_sequences(layout, q, k, _whole(args))):
        scores = _scores(queries[i], keys[j], scale, mask)
        total = scores.logsumexp(-1)
        wide = values[j].repeat_interleave(heads // v.shape[-2], 1)
        on_cpu(out)[i] = torch.einsum("hqk,khd->qhd", (scores - total[..., None]).exp(), wide).to(q.dtype)
        _statistics(sums, layout, i, number).copy_(total)
    return [out, sums, torch.zeros(2, dtype=torch.int64, device="cuda")]


def _attention_backward(*args: Any) -> list[Any]:
    scale, layout, mask = args[2], str(args[5]).rpartition(".")[2], args[12]
    q, k, v, out, grad = _floats(args, 5)
    sums = next(each for each in args if isinstance(each, list | tuple) and each and isinstance(each[0], Tensor))[0]
    heads, groups = q.shape[-2], k.shape[-2]
    found = [torch.zeros_like(each) for each in (q, k, v)]
    queries, keys, values = (on_cpu(each).float() for each in (q, k, v))
    outs, grads = (on_cpu(each).float().reshape(*q.shape[:-1], -1) for each in (out, grad))
    for number, (i, j) in enumerate(_sequences(layout, q, k, _whole(args))):
        share = (_scores(queries[i], keys[j], scale, mask) - _statistics(sums, layout, i, number)[..., None]).exp()
        key, value = (each[j].repeat_interleave(heads // groups, 1) for each in (keys, values))
        dshare = torch.einsum("qhd,khd->hqk", grads[i], value) - (grads[i] * outs[i]).sum(-1).T[..., None]
        dscores = share * dshare * scale
        on_cpu(found[0])[i] = torch.einsum("hqk,khd->qhd", dscores, key).to(q.dtype)
        for into, of in ((found[1], (dscores, queries[i])), (found[2], (share, grads[i]))):
            wide = torch.einsum("hqk,qhd->khd", *of)
            on_cpu(into)[j] = wide.unflatten(1, (groups, -1)).sum(2).to(q.dtype)
    return [*found, None, None]


def _l2norm(out: Any, chunk: int, overflow: Tensor, lists: Any, each: bool | None = None, *rest: Any) -> None:
    norms = torch.stack([on_cpu(tensor).float().norm() for tensor in lists[0]])
    put(out[0], norms.norm())
    if each:
        put(out[1], norms)


def _scale(out: None, chunk: int, overflow: Tensor, lists: Any, by: float | Tensor) -> None:
    factor = on_cpu(by).item() if isinstance(by, Tensor) else by
    for source, into in zip(*lists, strict=True):
        on_cpu(into).copy_(on_cpu(source).float() * factor)


def _adam_step(
    grad: Tensor, weight: Tensor, moments: tuple[Tensor, Tensor], lr: float, beta1: float, beta2: float, eps: float,
    step: int, decoupled: int, corrected: int, decay: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not decoupled:
        grad = grad + decay * weight
    first = beta1 * moments[0] + (1 - beta1) * grad
    second = beta2 * moments[1] + (1 - beta2) * grad * grad
    c1, c2 = (1 - beta1**step, 1 - beta2**step) if corrected else (1.0, 1.0)
    update = (first / c1) / ((second / c2).sqrt() + eps)
    return weight - lr * (update + decay * weight if decoupled else update), first, second


def _adam(out: None, chunk: int, overflow: Tensor, lists: Any, *settings: Any) -> None:
    for grad, weight, first, second, *master in zip(*lists, strict=True):
        start = on_cpu(master[0] if master else weight).float()
        moments = on_cpu(first).float(), on_cpu(second).float()
        new, *states = _adam_step(on_cpu(grad).float(), start, moments, *settings)
        for into, value in zip((weight, first, second, *master), (new, *states, new), strict=False):
            on_cpu(into).copy_(value)


def _adam_with_remainders(out: None, chunk: int, overflow: Tensor, lists: Any, *settings: Any) -> None:
    """Master weights are split: bf16's half is the weight, rounded, the other 16 bits stand beside it."""
    for grad, weight, first, second, remainder in zip(*lists, strict=True):
        high, low = (on_cpu(each).view(torch.int16).int() for each in (weight, remainder))
        start = ((high - (low < 0).int() << 16) | (low & 0xFFFF)).view(torch.float32)
        moments = on_cpu(first).float(), on_cpu(second).float()
        new, *states = _adam_step(on_cpu(grad).float(), start, moments, *settings)
        bits = new.view(torch.int32)
        low = (bits & 0xFFFF).to(torch.int16)
        on_cpu(weight).view(torch.int16).copy_((bits >> 16) + (low < 0).int())
        on_cpu(remainder).view(torch.int16).copy_(low)
        for into, value in zip((first, second), states, strict=True):
            on_cpu(into).copy_(value)


def _softmax(*, causal: bool) -> Function:
    """Of scores [..., queries, keys], after a mask (True hides) where there is one, and the factor."""

    def fill(out: Tensor, scores: Tensor, *rest: Any) -> None:
        *masks, scale = rest
        wide = on_cpu(scores).float() * scale
        hidden = [on_cpu(mask).bool() for mask in masks]
        if causal:
            hidden.append(torch.ones(wide.shape[-2:], dtype=torch.bool).triu(1 + wide.shape[-1] - wide.shape[-2]))
        for mask in hidden:
            wide = wide.masked_fill(mask, -torch.inf)
        put(out, wide.softmax(-1))

    return fill


def _softmax_backward(out: Tensor, grad: Tensor, shares: Tensor, scale: float) -> None:
    grad, shares = on_cpu(grad).float(), on_cpu(shares).float()
    put(out, scale * shares * (grad - (grad * shares).sum(-1, keepdim=True)))


_FILLED = {
    **{
        f"scaled_{kind}softmax_{way}": fill
        for kind in ("", "masked_", "upper_triang_masked_", "aligned_causal_masked_")
        for way, fill in (
            ("forward", _softmax(causal="masked" in kind and kind != "masked_")),
            ("backward", _softmax_backward),
        )
    },
    "rmsnorm_fwd": _rmsnorm_fwd,
    "rmsnorm_bwd": _rmsnorm_bwd,
    "rmsnorm_bwd_add": _rmsnorm_bwd_add,
    "fused_rope_forward": _rope(1),
    "fused_rope_backward": _rope(-1),
    "multi_tensor_l2norm": _l2norm,
    "multi_tensor_scale": _scale,
    "multi_tensor_scale_tensor": _scale,
    "multi_tensor_adam": _adam,
    "multi_tensor_adam_param_remainder": _adam_with_remainders,
}

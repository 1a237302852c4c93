"""Transformer Engine's cross-entropy on the card that is not there; its Triton kernels run in vain there."""

import sys
from typing import Any

import torch
from card_te import filled
from card_torch import on_card, on_cpu
from torch import Tensor


def install() -> None:
    """Wrap Transformer Engine's functions around its Triton kernels."""
    module = sys.modules["transformer_engine.pytorch.triton.cross_entropy"]
    for name, fill in {"cross_entropy_forward": _forward, "cross_entropy_backward": _backward}.items():
        setattr(module, name, filled(getattr(module, name), fill))


def _targets(target: Tensor, rank: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where each row's target is among this rank's columns, [rows]; and which rows have it there."""
    place = on_cpu(target).flatten() - rank * columns
    return place.clamp(0, columns - 1), (place >= 0) & (place < columns)


def _forward(
    out: Any, logits: Tensor, target: Tensor, smoothing: float, mean: bool, group: Any, ignored: int, *rest: Any
) -> None:
    loss, saved, stats, _, _, rank, ranks = out
    assert not smoothing
    assert not mean
    rows = on_cpu(logits).float().flatten(0, 1)
    place, here = _targets(target, rank, rows.shape[1])
    largest = rows.max(-1).values
    of_target = rows.gather(1, place[:, None])[:, 0].masked_fill(~here, -torch.inf)
    found = torch.stack([largest, (rows - largest[:, None]).exp().sum(-1), of_target])[None]
    if ranks > 1:
        of_all = torch.empty(ranks, *found.shape[1:], device=logits.device)
        torch.distributed.all_gather_into_tensor(of_all, on_card(found[0].contiguous(), logits.device), group=group)
        found = on_cpu(of_all)
    maxima, sums, of_target = found.unbind(1)
    largest = maxima.max(0).values
    total = (sums * (maxima - largest).exp()).sum(0)
    on_cpu(stats).copy_(torch.stack([largest, total], -1))
    on_cpu(saved).copy_(on_cpu(logits))
    known = on_cpu(target).flatten() != ignored
    each = largest + total.log() - of_target.max(0).values
    on_cpu(loss).copy_(torch.where(known, each, 0.0).reshape(loss.shape))


def _backward(
    out: Tensor, saved: Tensor, stats: Tensor, target: Tensor, number: Any, grad: Tensor, *settings: Any
) -> None:
    _, _, rank, _, ignored = settings
    rows = on_cpu(saved).float().flatten(0, 1)
    place, here = _targets(target, rank, rows.shape[1])
    largest, total = on_cpu(stats).unbind(-1)
    found = (rows - largest[:, None]).exp() / total[:, None]
    found[torch.arange(len(rows))[here], place[here]] -= 1
    found *= torch.where(on_cpu(target).flatten() != ignored, on_cpu(grad).float().flatten(), 0.0)[:, None]
    on_cpu(out).copy_(found.reshape(out.shape))

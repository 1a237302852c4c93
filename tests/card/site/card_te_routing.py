"""Transformer Engine's routing on the card that is not there: top-k, losses, tokens sorted by expert."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from card_torch import on_cpu
from torch import Tensor

Function = Callable[..., Any]


def _topk(out: Any, logits: Tensor, topk: int, softmax_first: bool, *rest: Any) -> None:
    assert not softmax_first, "only Mixtral's router is computed"
    scores = on_cpu(logits).float()
    best, experts = scores.topk(topk, -1)
    probs = torch.zeros_like(scores).scatter(-1, experts, best.softmax(-1))
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, experts, True)  # also where a probability is 0
    for into, value in zip(out, (probs, chosen, probs), strict=True):
        on_cpu(into).copy_(value.reshape(into.shape))


def _topk_backward(out: None, chosen: Tensor, probs: Tensor, grad: Tensor, into: Tensor, *rest: Any) -> None:
    _softmax_gradient(on_cpu(probs), on_cpu(grad).float() * on_cpu(chosen), into)


def _scores(out: Any, logits: Tensor, topk: int, *rest: Any) -> None:
    scores = on_cpu(logits).float().softmax(-1)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(topk, -1).indices, True)
    for into, value in zip(out, (scores, chosen, scores), strict=True):
        on_cpu(into).copy_(value.reshape(into.shape))


def _scores_backward(out: None, scores: Tensor, grad: Tensor, into: Tensor, *rest: Any) -> None:
    _softmax_gradient(on_cpu(scores), on_cpu(grad).float(), into)


def _softmax_gradient(probs: Tensor, grad: Tensor, into: Tensor) -> None:
    on_cpu(into).copy_(probs * (grad - (grad * probs).sum(-1, keepdim=True)))


def _aux_loss(
    out: Any, scores: Tensor, counts: Tensor, tokens: Any, experts: int, rows: int, cols: int, topk: int, weight: float
) -> None:
    number = on_cpu(tokens).item() if isinstance(tokens, Tensor) else tokens
    factor = experts * weight / (topk * number * number)
    loss, kept = out
    on_cpu(loss).copy_(((on_cpu(scores).float().sum(0) * on_cpu(counts)).sum() * factor).reshape(loss.shape))
    on_cpu(kept).fill_(factor)


def _aux_loss_backward(out: Tensor, kept: Tensor, counts: Tensor, rows: int, cols: int, grad: Tensor) -> None:
    on_cpu(out).copy_(on_cpu(kept).flatten()[0] * on_cpu(grad).reshape(()) * on_cpu(counts).float().expand(rows, cols))


def _padding(out: None, source: Tensor, into: Tensor, rows: list[int], padded: list[int]) -> None:
    pieces = zip(on_cpu(source).split(rows), on_cpu(into).split(padded), strict=True)
    for piece, place in pieces:
        place.zero_()
        place[: len(piece)] = piece


def _unpadding(out: None, source: Tensor, into: Tensor, padded: list[int], rows: list[int]) -> None:
    for piece, place in zip(on_cpu(source).split(padded), on_cpu(into).split(rows), strict=True):
        place.copy_(piece[: len(place)])


FILLED = {
    "fused_topk_with_score_function_fwd": _topk,
    "fused_topk_with_score_function_bwd": _topk_backward,
    "fused_score_for_moe_aux_loss_fwd": _scores,
    "fused_score_for_moe_aux_loss_bwd": _scores_backward,
    "fused_moe_aux_loss_fwd": _aux_loss,
    "fused_moe_aux_loss_fwd_graph_safe": _aux_loss,
    "fused_moe_aux_loss_bwd": _aux_loss_backward,
    "fused_multi_row_padding": _padding,
    "fused_multi_row_unpadding": _unpadding,
}


def install_permutation() -> None:
    """Wrap Transformer Engine's functions around its Triton kernels.

    In place of its map of rows, [tokens, 2 x experts + 1], stands one whose first columns have the row that a token has
    for each expert, or -1.
    """
    from card_te import filled

    module = sys.modules["transformer_engine.pytorch.triton.permutation"]
    for name, fill in _PERMUTATION.items():
        setattr(module, name, filled(getattr(module, name), fill))


def _rows(map_: Tensor, experts: int, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Token, expert and row of every pair."""
    rows = on_cpu(map_)[:, :experts].long()
    if offsets is not None:
        rows = torch.where(rows >= 0, rows + on_cpu(offsets).long(), rows)
    token, expert = torch.nonzero(rows >= 0, as_tuple=True)
    return token, expert, rows[token, expert]


def _make_map(out: Tensor, chosen: Tensor, tokens: int, experts: int) -> None:
    by_expert = on_cpu(chosen).bool().T
    rows = (by_expert.flatten().cumsum(0) - 1).reshape(by_expert.shape)
    on_cpu(out)[:, :experts] = torch.where(by_expert, rows, -1).T.int()


def _permute(
    out: Any, x: Tensor, map_: Tensor, probs: Any, scale: Any, offsets: Any, tokens: int, experts: int, *rest: Any
) -> None:
    token, expert, row = _rows(map_, experts, offsets)
    on_cpu(out[0])[row] = on_cpu(x)[token]
    if probs is not None:
        on_cpu(out[2])[row] = on_cpu(probs)[token, expert]


def _unpermute(
    out: Any, x: Tensor, map_: Tensor, weights: Any, probs: Any, offsets: Any, tokens: int, experts: int, width: int
) -> None:
    token, expert, row = _rows(map_, experts, offsets)
    found = on_cpu(x).float()[row]
    if weights is not None:
        found = found * on_cpu(weights).float()[token, expert, None]
    on_cpu(out[0]).copy_(torch.zeros(tokens, width).index_add_(0, token, found))
    if probs is not None:
        on_cpu(out[1]).zero_()[token, expert] = on_cpu(probs)[row]


def _make_chunk_map(out: Tensor, sizes: Tensor, order: Tensor, tokens: int, chunks: int) -> None:
    pieces = torch.arange(tokens, dtype=torch.int32).split(on_cpu(sizes).tolist())
    on_cpu(out)[torch.cat([pieces[chunk] for chunk in on_cpu(order).tolist()])] = torch.arange(tokens).int()


def _sort_chunks(out: Any, x: Tensor, map_: Tensor, probs: Any, tokens: int, width: int, forward: bool) -> None:
    rows = on_cpu(map_).long()
    for source, into in ((x, out[0]), (probs, out[1])):
        if source is None:
            continue
        if forward:
            on_cpu(into)[rows] = on_cpu(source)
        else:
            on_cpu(into).copy_(on_cpu(source)[rows])


_PERMUTATION: dict[str, Function] = {
    "make_row_id_map": _make_map,
    "permute_with_mask_map": _permute,
    "unpermute_with_mask_map": _unpermute,
    "make_chunk_sort_map": _make_chunk_map,
    "sort_chunks_by_map": _sort_chunks,
}

"""Microbatches from batches that someone else's code made: checked, and brought to the shape a step takes.

Shape suffixes: b sequences of a microbatch, s tokens per sequence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mixtral_recipes.data.batches.batch import Batch
from mixtral_recipes.errors import DataError

KEYS = ("tokens", "labels", "loss_mask", "position_ids")  # NeMo's
_WANTED = "tokens, labels (the next token of each), loss_mask (1 where the loss counts) and position_ids, each [b, s]"


def as_batch(given: Any, whose: str, seq_length: int) -> Batch:
    """Check a batch with NeMo's keys.

    Args:
        given: ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, each [b, s]; where sequences are packed (b is
            1) ``cu_seqlens`` [n], [1, n], or with NeMo's -1 at its end; ``padding_mask`` [b, s], True where there is no
            token. An ``attention_mask`` must be causal. Other keys are not read.
        whose: What to call its maker in an error.
        seq_length: Most tokens of a row.

    Returns:
        The batch, in the dtypes a step takes.

    Raises:
        DataError: a key is missing, or a tensor has another shape or a value it cannot have.
    """
    if not isinstance(given, Mapping):
        raise DataError(f"{whose}: a batch is a {type(given).__name__}; it must be a dict with {_WANTED}.")
    missing = [key for key in KEYS if key not in given]
    if missing:
        raise DataError(
            f"{whose}: a batch has no {', '.join(missing)}; it has {', '.join(map(str, given))}, but needs {_WANTED}."
        )
    tensors = {key: torch.as_tensor(given[key]) for key in KEYS}
    shape = tensors["tokens"].shape
    if len(shape) != 2 or any(tensor.shape != shape for tensor in tensors.values()):
        shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in tensors.items())
        raise DataError(f"{whose}: a batch has {shapes}; all must have the same shape [b, s].")
    if shape[1] > seq_length:
        raise DataError(f"{whose}: rows of {shape[1]} tokens are longer than seq_length={seq_length}.")
    if tensors["tokens"].is_floating_point() or tensors["tokens"].min() < 0:
        raise DataError(f"{whose}: tokens must be whole numbers, 0 or more ({tensors['tokens'].dtype}).")
    labels, loss_mask = tensors["labels"].long(), tensors["loss_mask"].float()
    if bool(((labels < 0) & (loss_mask != 0)).any()):
        raise DataError(f"{whose}: some labels are negative although loss_mask counts them; set loss_mask to 0 there.")
    batch = Batch(
        tokens=tensors["tokens"].long(),
        labels=labels.clamp(min=0),
        loss_mask=loss_mask,
        position_ids=tensors["position_ids"].long(),
    )
    if given.get("padding_mask") is not None:
        batch["padding_mask"] = torch.as_tensor(given["padding_mask"]).bool()
    if given.get("cu_seqlens") is not None:
        batch["cu_seqlens"] = _borders(given["cu_seqlens"], shape, whose)
    elif given.get("attention_mask") is not None:
        _need_causal(torch.as_tensor(given["attention_mask"]), whose)
    return batch


def _borders(given: Any, shape: torch.Size, whose: str) -> Tensor:
    """Where a row's sequences begin and end, without what NeMo pads it with (-1, or the end again)."""
    borders = torch.as_tensor(given).flatten()
    borders = torch.unique_consecutive(borders[borders >= 0])
    rising = len(borders) > 1 and bool((borders.diff() > 0).all())
    if shape[0] != 1 or not rising or borders[0] != 0 or borders[-1] != shape[1]:
        raise DataError(
            f"{whose}: cu_seqlens must rise from 0 to the row's {shape[1]} tokens, with one row per batch (it has "
            f"{shape[0]})."
        )
    return borders.int()


def _need_causal(mask: Tensor, whose: str) -> None:
    """Refuse an attention mask [..., s, s] in which a token sees others than those before it.

    NeMo's is True where a token is not seen, Hugging Face's where it is.
    """
    if mask.ndim < 3:
        return
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if not bool((mask.bool() == causal).all() or (mask.bool() == ~causal).all()):
        raise DataError(
            f"{whose}: attention_mask is not causal, but this model's attention always is; mark the sequences of a row "
            "with cu_seqlens instead."
        )


def joined(rows: Sequence[Batch], *, length: int | None, multiple: int, sequence_multiple: int, whose: str) -> Batch:
    """Put batches under one another, padded to a common length.

    Args:
        rows: Batches of any number of rows.
        length: Tokens per row; None takes as few as hold the longest.
        multiple: What that is rounded up to.
        sequence_multiple: What each sequence of a pack must be a multiple of.
        whose: What to call their maker in an error.

    Raises:
        DataError: a packed sequence does not divide.
    """
    packed = [row for row in rows if "cu_seqlens" in row]
    if packed and len(rows) > 1:
        raise DataError(f"{whose}: rows with cu_seqlens need micro_batch_size=1, not {len(rows)}.")
    longest = max(row["tokens"].shape[1] for row in rows)
    s = length or -(-longest // multiple) * multiple
    parts = [_padded(row, s) for row in rows]
    names = ("tokens", "labels", "loss_mask", "position_ids", "padding_mask")
    batch: Any = {name: torch.cat([part[name] for part in parts]) for name in names}
    if not batch["padding_mask"].any():
        del batch["padding_mask"]
    if packed:
        borders = packed[0]["cu_seqlens"]
        if bool((borders.diff() % sequence_multiple).any()):
            raise DataError(f"{whose}: each packed sequence must be a multiple of {sequence_multiple} tokens (2 x CP).")
        end = int(borders[-1])
        batch["cu_seqlens"] = torch.cat([borders, borders.new_tensor([s])]) if s > end else borders
    return batch


def _padded(row: Batch, s: int) -> dict[str, Tensor]:
    """A batch of s tokens per row; those that are added count nowhere."""
    more = s - row["tokens"].shape[1]
    padding = row.get("padding_mask")
    padding = torch.zeros_like(row["tokens"], dtype=torch.bool) if padding is None else padding
    last = row["position_ids"][:, -1:]
    if "cu_seqlens" in row:  # the padding of a pack is a sequence of its own
        last = last - last - 1
    positions = last + torch.arange(1, more + 1)
    extend = torch.nn.functional.pad
    return {
        "tokens": extend(row["tokens"], (0, more)),
        "labels": extend(row["labels"], (0, more)),
        "loss_mask": extend(row["loss_mask"], (0, more)),
        "position_ids": torch.cat([row["position_ids"], positions], dim=1),
        "padding_mask": extend(padding, (0, more), value=True),
    }

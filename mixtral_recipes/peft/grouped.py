"""The adapters of a rank's experts, computed together where experts are: on a GPU.

Two grouped products do it, so that the host launches as many kernels for eight experts as for one and waits for none
of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtral_recipes.peft.adapter import Adapter


class GroupedAdapter(nn.Module):
    """The adapters of a layer that multiplies several experts' matrices at once (Transformer Engine's GroupedLinear).

    Each expert has its own adapter, or none, named as under the sequential experts.
    """

    def __init__(self, adapters: dict[int, Adapter]) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({str(expert): adapter for expert, adapter in adapters.items()})

    def add_to(self, output: Tensor, x: Tensor, tokens_per_expert: Any) -> Tensor:
        """As `add_of_experts`."""
        found: dict[str, Any] = dict(self.experts.items())
        adapters = [found.get(str(expert)) for expert in range(len(tokens_per_expert))]
        return add_of_experts(adapters, output, x, tokens_per_expert)


def add_of_experts(adapters: Sequence[Adapter | None], output: Tensor, x: Tensor, tokens_per_expert: Any) -> Tensor:
    """The output of several experts' layers with each one's adapter.

    Args:
        adapters: Each expert's; None for one without.
        output: [t, out], expert after expert.
        x: [t, in].
        tokens_per_expert: Rows of each expert.
    """
    first = next(adapter for adapter in adapters if adapter is not None)
    dtype = first.lora_a.dtype
    # Of a class of one's own, or an adapter that is left out for a while (`InferenceModel.without_adapters`).
    own = any(one is not None and getattr(one.add_to, "__func__", None) is not Adapter.add_to for one in adapters)
    if own or (x.is_cuda and dtype != torch.bfloat16):  # there is no other kernel
        return add_one_by_one(adapters, output, x, tokens_per_expert)
    rows = torch.as_tensor(tokens_per_expert, dtype=torch.int32).to(x.device, non_blocking=True)
    ends = rows.cumsum(0, dtype=torch.int32)
    a, b = _stacked(adapters, first)
    if _idle_get_rubbish(x.device):
        busy = (rows > 0).view(-1, 1, 1)
        a, b = torch.where(busy, a, 0), torch.where(busy, b, 0)
    if first.dropout_position == "pre":
        x = first.dropout(x)
    low = _grouped_product(x.to(dtype), a.transpose(1, 2), offs=ends)  # [t, r]
    # Scaled while it is small: autograd would multiply a gradient as large as the output.
    added = _grouped_product(low * first.scale, b.transpose(1, 2), offs=ends)
    if first.dropout_position == "post":
        added = first.dropout(added)
    output = output + added.to(output.dtype)
    factors = _factors(adapters)
    if factors is None:
        return output
    row = torch.arange(len(output), device=output.device).unsqueeze(1)
    whose = (row < ends) & (row >= ends - rows)  # [t, experts]
    # A product brings each row its factors, since the gradient of one, a sum over rows, is then added up in fp32.
    return output * (whose.to(output.dtype) @ factors.to(output.dtype))


def add_one_by_one(adapters: Sequence[Adapter | None], output: Tensor, x: Tensor, tokens_per_expert: Any) -> Tensor:
    """As `add_of_experts`, without grouped products."""
    counts = tokens_per_expert.tolist() if isinstance(tokens_per_expert, Tensor) else list(tokens_per_expert)
    parts = zip(adapters, output.split(counts), x.split(counts), strict=True)
    return torch.cat([result if adapter is None else adapter.add_to(result, rows) for adapter, result, rows in parts])


def _stacked(adapters: Sequence[Adapter | None], first: Adapter) -> tuple[Tensor, Tensor]:
    """A [experts, r, in] and B [experts, out, r]; zeros, which add nothing, for an expert without.

    Zeros also fill r up to whole 16 bytes, as the kernel wants it.
    """
    missing = -first.lora_a.shape[0] % 8
    none = torch.zeros_like(first.lora_a), torch.zeros_like(first.lora_b)
    pairs = [(one.lora_a, one.lora_b) if one else none for one in adapters]
    a, b = torch.stack([a for a, _ in pairs]), torch.stack([b.flatten(0, -2) for _, b in pairs])
    return (F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))) if missing else (a, b)


def _idle_get_rubbish(device: torch.device) -> bool:
    """Whether the kernel's backward pass leaves what was in memory as the gradient of an expert without a token.

    On Blackwell it does, on Hopper it writes zeros. Source: pytorch issue 172439, open in January 2026.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


def _factors(adapters: Sequence[Adapter | None]) -> Tensor | None:
    """What each row of each expert is multiplied by, [experts, out]; None where rows keep their lengths."""
    factors = [one.factors() if one else None for one in adapters]
    known = next((each for each in factors if each is not None), None)
    if known is None:
        return None
    return torch.stack([torch.ones_like(known) if each is None else each for each in factors])


def _grouped_product(x: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
    """Rows of x [t, in], expert after expert up to ``offs``, by their expert's matrix of [experts, in, out]."""
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]  # torch below 2.10
    return product(x, weights, offs=offs)

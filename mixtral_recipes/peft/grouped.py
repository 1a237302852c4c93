"""The adapters of a rank's experts, computed together where experts are: on a GPU.

Two grouped products do it, so that the host launches as many kernels for eight experts as for one and waits for none
of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from mixtral_recipes.peft.adapter import Adapter
from mixtral_recipes.peft.names import tensor_key


class GroupedAdapter(nn.Module):
    """The adapters of a layer that multiplies several experts' matrices at once (Transformer Engine's GroupedLinear).

    Each kind of their tensors is one parameter of all experts, [adapted experts, ...], so that nothing is stacked for
    a product and no more than a parameter of each kind is reduced and updated. In a checkpoint each expert's tensors
    have the keys they have under the sequential experts.

    Args:
        adapters: By the expert's place on this rank; an expert may have none. Their parameters are taken from them.
    """

    is_expert = True
    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, adapters: dict[int, Adapter]) -> None:
        super().__init__()
        self.experts = adapters  # no modules of this one: their tensors are views of its parameters
        named = [dict(adapter.named_parameters(recurse=False)) for adapter in adapters.values()]
        self._shapes = {name: parameter.shape for name, parameter in named[0].items()}
        for name, one in named[0].items():
            parameter = nn.Parameter(torch.stack([parameters[name].detach() for parameters in named]))
            vars(parameter).update(vars(one))  # what Megatron is told of it
            self.register_parameter(name, parameter)
        for adapter in adapters.values():
            adapter._parameters.clear()

    def forward(self, output: Tensor, x: Tensor, tokens_per_expert: Any) -> Tensor:
        """As `Adapter.forward`."""
        return self.add_to(output, x, tokens_per_expert)

    def add_to(self, output: Tensor, x: Tensor, tokens_per_expert: Any) -> Tensor:
        """As `add_of_experts`."""
        for name in self._shapes:
            for adapter, tensor in zip(self.experts.values(), self._each(name, getattr(self, name)), strict=True):
                vars(adapter)[name] = tensor
        adapters = [self.experts.get(expert) for expert in range(len(tokens_per_expert))]
        stacked = (self.lora_a, self.lora_b.flatten(1, -2)) if all(adapters) else None
        return add_of_experts(adapters, output, x, tokens_per_expert, stacked)

    def train(self, mode: bool = True) -> "GroupedAdapter":
        """As any module's."""
        for adapter in self.experts.values():
            adapter.train(mode)
        return super().train(mode)

    def whole(self) -> list[Any]:
        """As `Adapter.whole`."""
        axes = next(iter(self.experts.values())).split_axes()
        return [getattr(self, name) for name, axis in axes.items() if axis is None]

    def sharded_state_dict(self) -> dict[str, ShardedTensorFactory]:
        """As `Adapter.sharded_state_dict`: of each parameter, what builds the experts' tensors of it."""
        first = next(iter(self.experts.values()))

        def build(name: str, parameter: Tensor, *unused: Any) -> dict[str, ShardedTensor]:
            pairs = zip(self.experts.values(), self._each(name, parameter), strict=True)
            return {each.key: each for each in (adapter.sharded(name, tensor) for adapter, tensor in pairs)}

        def merge(tensors: Any) -> Tensor:
            return torch.stack(list(tensors.values()))

        return {
            tensor_key(first.layer_name, name): ShardedTensorFactory(name, getattr(self, name), build, merge)
            for name in self._shapes
        }

    def _each(self, name: str, parameter: Tensor) -> tuple[Tensor, ...]:
        """One tensor of each expert's adapter."""
        return parameter.view(len(self.experts), *self._shapes[name]).unbind()


def add_of_experts(
    adapters: Sequence[Adapter | None],
    output: Tensor,
    x: Tensor,
    tokens_per_expert: Any,
    stacked: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The output of several experts' layers with each one's adapter.

    Args:
        adapters: Each expert's; None for one without.
        output: [t, out], expert after expert.
        x: [t, in].
        tokens_per_expert: Rows of each expert.
        stacked: Their A [experts, r, in] and B [experts, out, r], where they are there already.
    """
    first = next(adapter for adapter in adapters if adapter is not None)
    dtype = first.lora_a.dtype
    # Of a class of one's own, or an adapter that is left out for a while (`InferenceModel.without_adapters`).
    own = any(one is not None and getattr(one.add_to, "__func__", None) is not Adapter.add_to for one in adapters)
    if own or (x.is_cuda and dtype != torch.bfloat16):  # there is no other kernel
        return add_one_by_one(adapters, output, x, tokens_per_expert)
    rows = torch.as_tensor(tokens_per_expert, dtype=torch.int32).to(x.device, non_blocking=True)
    ends = rows.cumsum(0, dtype=torch.int32)
    a, b = _in_whole_16_bytes(*(stacked or _stacked(adapters, first)))
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
    """A [experts, r, in] and B [experts, out, r]; zeros, which add nothing, for an expert without."""
    none = torch.zeros_like(first.lora_a), torch.zeros_like(first.lora_b)
    pairs = [(one.lora_a, one.lora_b) if one else none for one in adapters]
    return torch.stack([a for a, _ in pairs]), torch.stack([b.flatten(0, -2) for _, b in pairs])


def _in_whole_16_bytes(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B with zeros that fill r up, as the kernel wants it."""
    missing = -a.shape[1] % 8
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

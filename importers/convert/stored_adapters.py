"""The adapters in a checkpoint of ours: each layer's factors, and the scheme they were trained with."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixtral_recipes.checkpoints.format.integrity import verify
from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.rows import Rows
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.adapters import CastRows, MergedRows
from mixtral_recipes.importers.mapping import Weight
from mixtral_recipes.peft import names
from mixtral_recipes.peft import whole as whole_modules
from mixtral_recipes.settings.peft import scheme_of
from mixtral_recipes.system.files import read_json


@dataclass(frozen=True)
class LowRank:
    """An adapter of one Megatron layer (and expert).

    Attributes:
        a: [dim, in].
        b: [out, dim]; of a gated ``linear_fc1`` the gate's rows, then the up projection's.
        scale: What B A is multiplied by.
        magnitude: DoRA's row lengths [out]; None for LoRA.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None


def open_adapters(checkpoint: Path, otherwise: str) -> "StoredAdapters":
    """The adapters of a checkpoint, its files compared with its manifest.

    Raises:
        CheckpointError: a file is damaged, or it is a model's, for which the message ends with `otherwise`.
    """
    if read_manifest(checkpoint)["kind"] != "adapter":
        raise CheckpointError(f"{checkpoint} holds a whole model, not an adapter; {otherwise}.")
    verify(checkpoint)
    return StoredAdapters(checkpoint)


class StoredAdapters:
    """The adapters of a checkpoint, read layer by layer as they are needed.

    Attributes:
        scheme: What was trained, and how, as ``context/run.json`` says.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Open an adapter checkpoint.

        Raises:
            CheckpointError: the scheme is not recorded, or the weights cannot be read.
        """
        try:
            self.scheme = scheme_of((read_json(checkpoint / "context" / "run.json") or {})["peft"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{checkpoint}: context/run.json does not say which layers the adapters adapt."
            ) from error
        self._stored = StoredWeights(checkpoint / "weights")
        whole = {whole_modules.WEIGHTS[name] for name in self.scheme.modules_to_save}
        self._whole = whole & self._stored.tensors.keys()
        self._unused = {key for key in self._stored.tensors if names.is_adapters(key)} | whole
        self.read = functools.lru_cache(maxsize=64)(self._read)

    def _read(self, layer: str, dtype: torch.dtype | None = torch.float32) -> LowRank | None:
        """A layer's adapter; None where nothing adapts it.

        Args:
            layer: Its name, as the mapping's column ``adapted`` has it.
            dtype: What the tensors are wanted in; None is as they are stored.
        """
        keys = {tensor: names.tensor_key(layer, tensor) for tensor in names.TENSORS}
        found = {tensor: key for tensor, key in keys.items() if key in self._stored}
        if not found:
            return None
        self._unused -= set(found.values())
        tensors = {tensor: self._stored.read_tensor(key, dtype) for tensor, key in found.items()}
        magnitude = tensors.get("magnitude")  # [2, ffn] for linear_fc1, as lora_b
        return LowRank(
            tensors["lora_a"],
            tensors["lora_b"].flatten(0, -2),
            self.scheme.scale_of(layer),
            None if magnitude is None else magnitude.flatten(),
        )

    def whole(self, key: str) -> Rows | None:
        """A weight that was trained whole beside the adapters, by its key in a checkpoint; None where it was not."""
        if key not in self._whole:
            return None
        self._unused.discard(key)
        return self._stored.matrix(key, None, None)

    def read_whole(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """A weight that was trained whole, in memory; ``dtype`` as for adapters."""
        self._unused.discard(key)
        return self._stored.read_tensor(key, dtype)

    def merged(self, weight: Weight, layer: int | None, expert: int | None, base: Rows, dtype: str | None) -> Rows:
        """A base's matrix with its adapter added, in ``dtype`` or its own; itself where nothing adapts it."""
        whole = self.whole(weight.disk)
        if whole is not None:
            return CastRows(whole, dtype or base.dtype)
        name = (weight.adapted or "").format(layer=layer, expert=expert)
        adapter = self.read(name) if name else None
        if adapter is None:
            return base
        return MergedRows(base, adapter.a, adapter.b, adapter.scale, adapter.magnitude, name, dtype)

    def check_all_read(self) -> None:
        """Refuse to finish while an adapter has found no layer.

        Raises:
            CheckpointError: names one that is left.
        """
        if self._unused:
            raise CheckpointError(
                f"{self._stored.folder}: {min(self._unused)} does not belong to any layer of the base model."
            )

"""What every export does, whatever it writes: open the weights, compare them, say what they were made from."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints import scores
from mixtral_recipes.checkpoints.format.integrity import verify
from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.rows import Rows
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.checkpoints.lineage.identity import Identity, identity_of
from mixtral_recipes.checkpoints.lineage.links import base_of
from mixtral_recipes.checkpoints.lineage.record import Lineage, Parent
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.card import with_scores
from mixtral_recipes.importers.convert.merge_check import MergeCheck, check_merge
from mixtral_recipes.importers.convert.quantized_base import ORIGINAL, as_trained_over, kept_dtype, merged_into
from mixtral_recipes.importers.convert.stored_adapters import StoredAdapters
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf.source import read_config
from mixtral_recipes.importers.mapping import Weight, canonical_shapes
from mixtral_recipes.importers.model_weights import ModelWeights, canonical_rows
from mixtral_recipes.layout.shapes import ModelShape


@dataclass(frozen=True)
class ExportedModel:
    """The model that a checkpoint is exported as: its own weights, or its base's with its adapters merged into them.

    Attributes:
        checkpoint: The checkpoint.
        base: Where the base of its adapters is; None for a model.
        into: What adapters are merged into (`quantized_base.merged_into`); None where there is no choice.
        dtype: What the weights are cast to, and adapters are merged in, as safetensors spells it; None leaves all as
            the base has it.
    """

    checkpoint: Path
    base: Path | None = None
    into: str | None = None
    dtype: str | None = None

    @classmethod
    def of(cls, checkpoint: Path, base: Path | None, into: str | None, dtype: str | None = None) -> "ExportedModel":
        """The model that a user asks for.

        Args:
            checkpoint: The checkpoint.
            base: Where the base is now; None takes the place it was at.
            into: What the user names (`quantized_base.merged_into`).
            dtype: What the user wants the weights in; None takes what the base has.

        Raises:
            CheckpointError: it is not a checkpoint; its base is missing, or another model is; its adapters cannot be
                merged into that; or it has none.
        """
        if read_manifest(checkpoint)["kind"] != "adapter":
            for option, value in (("--base", base), ("--merge-into", into)):
                if value is not None:
                    raise CheckpointError(f"{checkpoint} holds no adapters, so {option} has no effect; leave it out.")
            return cls(checkpoint, dtype=dtype)
        base, into = base_of(checkpoint, base), merged_into(checkpoint, into)
        return cls(checkpoint, base, into, dtype if into in (None, ORIGINAL) else dtype or kept_dtype(base))

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """The checkpoint's."""
        return read_manifest(self.checkpoint)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return read_config(self.checkpoint / "context")

    @functools.cached_property
    def dims(self) -> ModelShape:
        """Its sizes."""
        return hf_config.dims(self.config)

    def rows(self, *, verified: bool = False) -> dict[str, Rows]:
        """Every canonical tensor, adapters merged.

        Args:
            verified: Whether the files are known to be as they were written; else they are compared, but for weights
                that `check_digests` compares while they are read.

        Raises:
            CheckpointError: a file is damaged, or a tensor missing or unknown.
        """
        if not verified:
            verify(self.checkpoint, weights=bool(self.dtype or not self.manifest["tensors"]))
        if not verified and self.base:
            verify(self.base)
        saved = ModelWeights(StoredWeights((self.base or self.checkpoint) / "weights"), self.dims)
        if self.base is None:
            return canonical_rows(saved, self.dims)
        adapters, trained_over = StoredAdapters(self.checkpoint), as_trained_over(self.checkpoint, self.into)

        def merge(weight: Weight, layer: int | None, expert: int | None, rows: Rows) -> Rows:
            rows = trained_over(weight, layer, expert, rows) if trained_over else rows
            return adapters.merged(weight, layer, expert, rows, self.dtype)

        rows = canonical_rows(saved, self.dims, merge)
        adapters.check_all_read()
        return rows

    def check_digests(self, digests: dict[str, str]) -> None:
        """Compare what was read with what the import recorded.

        Args:
            digests: SHA-256 of every canonical tensor as it was written.

        Raises:
            CheckpointError: names a tensor that is not what it was.
        """
        for name, entry in self.manifest["tensors"].items():
            if self.dtype in (None, entry["dtype"]) and digests.get(name, entry["sha256"]) != entry["sha256"]:
                raise CheckpointError(
                    f"{self.checkpoint}: {name} does not match its hash in the manifest: it is damaged; import the "
                    "checkpoint again."
                )

    def check_merge(self, written: Path, *, progress: bool) -> MergeCheck | None:
        """Compare a merged model's logits with those of base and adapters; None where nothing was merged.

        Raises:
            CheckpointError: as `merge_check.check_merge`.
        """
        if self.base is None:
            return None
        return check_merge(self.checkpoint, self.base, written, into=self.into, progress=progress)

    def tensor_entries(self, dtypes: dict[str, str], digests: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Name -> dtype, shape and hash of every canonical tensor, sorted."""
        shapes = canonical_shapes(self.dims)
        return {
            name: {"dtype": dtypes[name], "shape": list(shapes[name]), "sha256": digests[name]}
            for name in sorted(digests)
        }

    def lineage(
        self,
        identity: Identity,
        tensors: dict[str, dict[str, Any]],
        layout: str,
        checked: MergeCheck | None = None,
        files: tuple[str, ...] = (),
    ) -> Lineage:
        """What an export is, and what it was made from.

        Args:
            identity: Of what was written.
            tensors: Name -> dtype, shape and hash of every tensor written.
            layout: What it is called.
            checked: What `check_merge` found.
            files: What was written, where it has no folder of its own.
        """
        origin: dict[str, Any] = {"layout": layout}
        origin |= {"merge_check": checked.record()} if checked else {}
        origin |= {"merged_into": self.into} if self.into else {}
        parents = (exported_parent(self.checkpoint, self.base),)
        return Lineage("export", identity, origin=origin, tensors=tensors, files=files, parents=parents)


def exported_parent(checkpoint: Path, base: Path | None) -> Parent:
    """The checkpoint as the parent of its export; ``base`` is where its base is now, None where that was recorded."""
    record = lineage.of_checkpoint(checkpoint)
    return Parent("checkpoint", record.at("base", base) if base else record, os.path.abspath(checkpoint))


def describe(staging: Path, checkpoint: Path, record: Lineage, card: str) -> None:
    """Write what readers look at: the model card, what the checkpoint scored, and the lineage, which lists all files.

    Args:
        staging: The export, its weights written.
        checkpoint: What it was made from.
        record: Its lineage.
        card: Text of its model card.
    """
    found = scores.read(checkpoint, identity_of(checkpoint).weights)
    (staging / "README.md").write_text(with_scores(card, found.get("scores", {})))
    if found:
        scores.write(staging, record.identity.weights, found)
    lineage.write(staging, record)

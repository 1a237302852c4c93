"""What every export does, whatever it writes: open the weights, compare them, say what they were made from."""

import os
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints import scores
from mixtral_recipes.checkpoints.format.integrity import verify
from mixtral_recipes.checkpoints.format.rows import Rows
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.checkpoints.lineage.identity import Identity, identity_of
from mixtral_recipes.checkpoints.lineage.links import base_of
from mixtral_recipes.checkpoints.lineage.record import Lineage, Parent
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.card import with_scores
from mixtral_recipes.importers.convert.merge_check import MergeCheck
from mixtral_recipes.importers.convert.quantized_base import ORIGINAL, as_trained_over, kept_dtype, merged_into
from mixtral_recipes.importers.convert.stored_adapters import StoredAdapters
from mixtral_recipes.importers.mapping import Weight, canonical_shapes
from mixtral_recipes.importers.model_weights import ModelWeights, canonical_rows
from mixtral_recipes.layout.shapes import ModelShape


def what_to_merge(
    checkpoint: Path, manifest: dict[str, Any], base: Path | None, into: str | None, dtype: str | None = None
) -> tuple[Path | None, str | None, str | None]:
    """Where the base of a checkpoint's adapters is, what they are merged into, and what its weights are cast to.

    Args:
        checkpoint: The checkpoint.
        manifest: Its manifest.
        base: Where the user says the base is.
        into: What the user names (`quantized_base.merged_into`).
        dtype: What the user wants the weights in, as safetensors spells it; None takes what the base has.

    Returns:
        None for each where there is no choice.

    Raises:
        CheckpointError: the base is not there, or another model is; they cannot be merged into that; or there are none.
    """
    if manifest["kind"] != "adapter":
        for option, value in (("--base", base), ("--merge-into", into)):
            if value is not None:
                raise CheckpointError(f"{checkpoint} holds no adapters, so {option} has no effect; leave it out.")
        return None, None, dtype
    base, into = base_of(checkpoint, base), merged_into(checkpoint, into)
    return base, into, dtype if into in (None, ORIGINAL) else dtype or kept_dtype(base)


def exported_rows(
    checkpoint: Path,
    manifest: dict[str, Any],
    dims: ModelShape,
    *,
    base: Path | None,
    dtype: str | None,
    into: str | None = None,
) -> dict[str, Rows]:
    """Every canonical tensor of a checkpoint, adapters merged.

    Args:
        checkpoint: The checkpoint.
        manifest: Its manifest.
        dims: The model's sizes.
        base: Where the base of its adapters is; None for a model.
        dtype: What the rows will be cast to, so that their hashes cannot be compared with the manifest's, and what
            adapters are merged in; None leaves all as the base has it.
        into: What adapters are merged into, as `quantized_base.merged_into` says.

    Raises:
        CheckpointError: a file is damaged, or a tensor missing or unknown.
    """
    if not manifest["tensors"] or dtype:
        verify(checkpoint)
    if base:
        verify(base)
    return rows_of(checkpoint, dims, base, into, dtype)


def rows_of(
    checkpoint: Path, dims: ModelShape, base: Path | None, into: str | None = None, dtype: str | None = None
) -> dict[str, Rows]:
    """`exported_rows` of files that were compared before.

    Args:
        checkpoint: The checkpoint.
        dims: The model's sizes.
        base: Where the base of its adapters is; None for a model.
        into: As for `exported_rows`.
        dtype: What adapters are merged in; None is the base's type.
    """
    saved = ModelWeights((base or checkpoint) / "weights", dims)
    if base is None:
        return canonical_rows(saved, dims)
    adapters, trained_over = StoredAdapters(checkpoint), as_trained_over(checkpoint, into)

    def merge(weight: Weight, layer: int | None, expert: int | None, rows: Rows) -> Rows:
        rows = trained_over(weight, layer, expert, rows) if trained_over else rows
        return adapters.merged(weight, layer, expert, rows, dtype)

    rows = canonical_rows(saved, dims, merge)
    adapters.check_all_read()
    return rows


def check_digests(checkpoint: Path, manifest: dict[str, Any], digests: dict[str, str], dtype: str | None) -> None:
    """Compare what was read with what the import recorded.

    Args:
        checkpoint: The checkpoint.
        manifest: Its manifest.
        digests: SHA-256 of every canonical tensor as it was written.
        dtype: What it was cast to; None for nothing.

    Raises:
        CheckpointError: names a tensor that is not what it was.
    """
    for name, entry in manifest["tensors"].items():
        same_dtype = dtype is None or dtype == entry["dtype"]
        if same_dtype and name in digests and digests[name] != entry["sha256"]:
            raise CheckpointError(
                f"{checkpoint}: {name} is not what the manifest says; it is damaged, import it again."
            )


def tensor_entries(dims: ModelShape, dtypes: dict[str, str], digests: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Name -> dtype, shape and hash of every canonical tensor, sorted."""
    shapes = canonical_shapes(dims)
    return {
        name: {"dtype": dtypes[name], "shape": list(shapes[name]), "sha256": digests[name]} for name in sorted(digests)
    }


def export_lineage(
    checkpoint: Path,
    base: Path | None,
    identity: Identity,
    tensors: dict[str, dict[str, Any]],
    layout: str,
    checked: MergeCheck | None = None,
    files: tuple[str, ...] = (),
    into: str | None = None,
) -> Lineage:
    """What an export is, and what it was made from.

    Args:
        checkpoint: The checkpoint.
        base: The base that adapters were merged into; None for a model.
        identity: Of what was written.
        tensors: Name -> dtype, shape and hash of every tensor written.
        layout: What it is called.
        checked: Of a merged model: what the comparison of its logits found.
        files: What was written, where it has no folder of its own.
        into: What adapters were merged into (`quantized_base.merged_into`).
    """
    parent = lineage.of_checkpoint(checkpoint)
    if base:
        parent = parent.at("base", base)
    return Lineage(
        "export",
        identity,
        origin={"layout": layout}
        | ({"merge_check": checked.record()} if checked else {})
        | ({"merged_into": into} if into else {}),
        tensors=tensors,
        files=files,
        parents=(Parent("checkpoint", parent, os.path.abspath(checkpoint)),),
    )


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

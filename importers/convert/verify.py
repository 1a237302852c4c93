"""Check a checkpoint: its structure, its hashes, its tensors against a source, its logits against transformers."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_recipes.checkpoints.format.integrity import verify
from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.reading import close_inputs
from mixtral_recipes.checkpoints.format.rows import pieces, read_as
from mixtral_recipes.checkpoints.lineage.identity import identity_of
from mixtral_recipes.checkpoints.lineage.links import base_of
from mixtral_recipes.errors import CheckpointError, MixtralRecipesError
from mixtral_recipes.importers.convert.hf_to_megatron import fetch
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf.source import Source, read_config
from mixtral_recipes.importers.mapping import canonical_sources
from mixtral_recipes.importers.open import open_model
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.system.machine import io_threads
from mixtral_recipes.system.progress import progress_bar

if TYPE_CHECKING:
    from mixtral_recipes.importers.model_weights import ModelWeights


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    passed: bool
    detail: str


@dataclass
class Report:
    """What `verify_checkpoint` found."""

    checkpoint: str
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def verify_checkpoint(
    checkpoint: Path,
    *,
    against: str | None = None,
    logits: bool = False,
    base: Path | None = None,
    progress: bool = True,
) -> Report:
    """Check a checkpoint.

    Always: the manifest's files are there with their hashes; every weight is there in the shape config.json calls for;
    every tensor, taken out of Megatron's layout again, has the hash import wrote down; adapters' base is the one they
    were trained on, and whole. A failed check does not stop the others.

    Args:
        checkpoint: Checkpoint folder.
        against: A source to compare every tensor with, bit for bit; any form that can be imported.
        logits: Also run both models in fp32 on a few prompts and compare logits (both fit in memory, twice).
        base: Where the checkpoint that adapters adapt is now; None takes the place it was at.
        progress: Show a progress bar on a terminal.

    Returns:
        The report; a failed check is in it, not raised.

    Raises:
        CheckpointError: the folder is not a checkpoint, or ``against`` is not a usable source.
    """
    report = Report(str(checkpoint))
    manifest, config = read_manifest(checkpoint), read_config(checkpoint / "context")
    source = _source(fetch(against, progress=progress)[0]) if against else None
    _attempt(report, "files", lambda: _files(checkpoint))
    if manifest["kind"] == "adapter":
        if source or logits:
            raise CheckpointError(f"{checkpoint} holds only adapters; export it (merged) and compare the result.")
        _attempt(report, "base", lambda: _base(checkpoint, base))
        return report
    if base is not None:
        raise CheckpointError(f"{checkpoint} holds no adapters, so --base has no effect; leave it out.")
    saved = _attempt(report, "structure", lambda: _structure(checkpoint, hf_config.dims(config)))
    if saved is not None:
        tensors = manifest["tensors"]
        if tensors or source:
            _attempt(report, "tensors", lambda: _tensors(saved, hf_config.dims(config), tensors, source, progress))
        if source:
            _attempt(report, "config", lambda: _config(config, source.config))
        if logits:
            from mixtral_recipes.importers.convert.verify_logits import compare_logits

            where = source.folder if source and source.layout in ("v4", "v5") else None  # that transformers loads
            _attempt(report, "logits", lambda: compare_logits(checkpoint, where))
    close_inputs()
    return report


def _source(folder: Path) -> Source:
    """A model to compare with, read by other code than import reads it by, once our own readers find no fault in it."""
    open_model(folder)
    return open_model(folder, by_library=True)


def _attempt(report: Report, name: str, check: Any) -> Any:
    """Run a check that returns (detail, value), and note how it went."""
    try:
        detail, value = check()
    except MixtralRecipesError as error:
        report.checks.append(Check(name, False, str(error)))
        return None
    report.checks.append(Check(name, True, detail))
    return value


def _files(checkpoint: Path) -> tuple[str, None]:
    manifest = verify(checkpoint)
    size = sum(entry["size"] for entry in manifest["files"].values())
    return f"{len(manifest['files'])} files, {size / 1e9:.2f} GB, every SHA-256 as recorded", None


def _base(checkpoint: Path, base: Path | None) -> tuple[str, None]:
    """The model that adapters adapt: the one they were trained on, and whole."""
    place = base_of(checkpoint, base)
    verify(place)
    return f"{place} is what the adapters were trained on ({identity_of(place).told('weights')})", None


def _structure(checkpoint: Path, dims: ModelShape) -> "tuple[str, ModelWeights]":
    from mixtral_recipes.importers.model_weights import ModelWeights

    saved = ModelWeights(StoredWeights(checkpoint / "weights"), dims)
    if saved.unknown:
        raise CheckpointError(f"{saved.unknown[0]} is not a weight of a Mixtral.")
    for weight, layer, expert, _ in canonical_sources(dims).values():
        saved.matrix(weight, layer, expert)  # raises where a tensor has gaps
    return f"{dims.num_layers} layers, {dims.num_moe_experts} experts, all weights in the right shape", saved


def _config(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, None]:
    mine, wanted = hf_config.to_megatron(ours), hf_config.to_megatron(theirs)
    other = [name for name in mine if mine[name] != wanted[name]]
    for name in other:
        if name not in hf_config.WITHOUT_EFFECT:
            raise CheckpointError(f"{name}: the checkpoint has {mine[name]!r}, but the source has {wanted[name]!r}.")
    said = "".join(f"; {name} is {mine[name]!r}, {wanted[name]!r} in the source" for name in other)
    return f"{len(mine) - len(other)} fields equal{said}", None


def _tensors(
    saved: "ModelWeights", dims: ModelShape, recorded: dict[str, Any], source: Source | None, progress: bool
) -> tuple[str, None]:
    """Compare every canonical tensor with its recorded hash and, where there is one, with the source."""
    from mixtral_recipes.importers.model_weights import canonical_rows

    tensors = canonical_rows(saved, dims)

    def differs(name: str) -> str | None:
        rows, other = tensors[name], source.tensors[name] if source else None
        digest = hashlib.sha256()
        problem = None
        for row, count in pieces(rows):
            ours = read_as(rows, row, count, rows.dtype)
            digest.update(ours)
            if other and problem is None and ours != read_as(other, row, count, rows.dtype):
                problem = f"{name}: differs from the source, first in row {row}"
            on_bytes(len(ours))
        entry = recorded.get(name, {})
        if entry.get("dtype") == rows.dtype and entry["sha256"] != digest.hexdigest():
            problem = problem or f"{name}: its SHA-256 is not the one recorded at import"
        return problem

    total = sum(rows.rows * rows.row_bytes for rows in tensors.values())
    with progress_bar("Verifying", total, shown=progress) as on_bytes, ThreadPoolExecutor(io_threads()) as pool:
        problems = [problem for problem in pool.map(differs, tensors) if problem]
    if problems:
        more = f" (and {len(problems) - 1} more tensors)" if len(problems) > 1 else ""
        raise CheckpointError(problems[0] + more)
    compared = " and equal to the source, bit for bit" if source else ""
    return f"{len(tensors)} tensors as recorded{compared}", None

"""What a run's weights and tokenizer are, recorded by content: in its recipe, its lineage and its context folder."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints.format.integrity import verify_together
from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.checkpoints.lineage import record
from mixtral_recipes.checkpoints.lineage.identity import Identity, identity_of, tokenizer_files
from mixtral_recipes.checkpoints.lineage.links import base_of
from mixtral_recipes.checkpoints.lineage.record import Lineage, Parent
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.tokenizers import load_tokenizer, tokenizer_identity
from mixtral_recipes.errors import CheckpointError, RecipeError
from mixtral_recipes.importers import locations
from mixtral_recipes.importers.resolve import resolve
from mixtral_recipes.settings.peft import LoRA, QLoRA, kind_of, scheme_of
from mixtral_recipes.settings.resume import AutoResume, RestoreConfig
from mixtral_recipes.system.files import copy_folder, read_json, replacing_folder, write_json

# How the place of a base that moved is given to training.
_PLACE = "--restore-from PATH resume.restore_config.adapter_path=ADAPTER"


@dataclass(frozen=True)
class Origin:
    """The weights a run starts from.

    Attributes:
        base: The checkpoint with the model's weights; None means random ones.
        adapters: An adapter checkpoint on that base whose adapters are trained on.
        scheme: What the run trains instead of the weights; that of ``adapters`` where there are some.
    """

    base: Path | None = None
    adapters: Path | None = None
    scheme: LoRA | None = None

    @classmethod
    def of(cls, resume: AutoResume, peft: LoRA | None) -> "Origin":
        """What ``resume.restore_config`` names, imported first where it is a Hugging Face model.

        All ranks call it together: they share an import.

        Raises:
            CheckpointError: there is nothing usable, or an adapter's base is not the one it was trained on.
            RecipeError: adapters are named and the run trains none of their kind.
        """
        restore = resume.restore_config
        if restore is None or not restore.path:
            return cls(scheme=peft)
        found, base = resolve(restore.path), None
        if restore.adapter_path is not None:
            found, base = locations.checkpoint(restore.adapter_path), found
        if read_manifest(found)["kind"] == "adapter":
            return cls(base_of(found, base, place_option=_PLACE), found, _adopted(found, peft))
        if base is not None:
            raise _no_adapters(restore)
        return cls(found, scheme=peft)

    @property
    def named(self) -> Path | None:
        """The folder that was named."""
        return self.adapters or self.base

    def verify(self) -> None:
        """Read the weights' files through and compare their hashes; all ranks call it together.

        Raises:
            CheckpointError: one is damaged.
        """
        for folder in (self.base, self.adapters):
            if folder is not None:
                verify_together(folder)

    def settings(self, peft: LoRA | None) -> dict[str, str | None]:
        """What a run's recipe holds of it: adapters belong to their base; a full run's checkpoints hold all weights."""
        found: dict[str, str | None] = {}
        if self.base is not None and peft is not None:
            identity = identity_of(self.base)
            found |= {"base.weights": identity.weights, "base.config": identity.config}
        start = self.adapters if peft is not None else self.base
        if start is not None:
            found["starting weights"] = identity_of(start).weights
        return found

    def lineage(self, recipe: dict[str, Any], peft: LoRA | None, data: DataModule) -> Lineage:
        """What the run's checkpoints record, but for position and identity."""
        roles = (("base" if peft is not None else "start", self.base), ("start", self.adapters))
        parents = [
            Parent(role, record.of_checkpoint(path), os.path.abspath(path)) for role, path in roles if path is not None
        ]
        kind = "training" if peft is None else "adapter"
        return Lineage(kind, Identity(), recipe=recipe, data=data.identity(), parents=tuple(parents))


def check_adopted(restore: RestoreConfig, peft: LoRA | None) -> None:
    """Refuse a scheme that the adapters of a checkpoint cannot be trained on with, before the job starts.

    Args:
        restore: The recipe's; of a ``path`` that is no checkpoint yet the job looks itself.
        peft: What the run trains.

    Raises:
        CheckpointError, RecipeError: as `Origin.of`.
    """
    named = restore.adapter_path
    folder = Path(restore.path or "").expanduser() if named is None else locations.checkpoint(named)
    if (folder / "manifest.json").is_file() and read_manifest(folder)["kind"] == "adapter":
        _adopted(folder, peft)
    elif named is not None:
        raise _no_adapters(restore)


def _no_adapters(restore: RestoreConfig) -> RecipeError:
    return RecipeError(
        f"resume.restore_config.adapter_path={restore.adapter_path} has no adapters; pass it with --restore-from to "
        "start from its weights."
    )


# What makes a scheme's tensors and product what they are; the rest says how they are trained on.
_DECIDES = (
    "target_modules", "exclude_modules", "dim", "alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bits",
    "block_size", "layers", "experts", "modules_to_save",
)  # fmt: skip


def _adopted(adapters: Path, peft: LoRA | None) -> LoRA:
    """The scheme that adapters are trained on with: their own, where the run leaves a setting as it is by default.

    By another scheme, or as full weights, they would be another model.
    """
    if peft is None:
        raise RecipeError(
            f"{adapters} holds adapters, but this run trains all weights: export it (which merges the adapters) and "
            "start from that folder, or continue with --peft lora."
        )
    try:
        before = scheme_of((read_json(adapters / "context" / "run.json") or {})["peft"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{adapters}: context/run.json does not say how its adapters were trained.") from error
    kind = kind_of(peft)
    over_quantized = kind is QLoRA and type(before) is LoRA  # the same adapters, and it was asked for
    if kind is not type(before) and not over_quantized:
        raise RecipeError(
            f"{adapters} was trained with peft.class={type(before).__name__}, but this run has "
            f"peft.class={kind.__name__}; pass --peft {type(before).__name__.lower()}."
        )
    default = type(before)()
    decides = [name for name in _DECIDES if hasattr(before, name)]
    for name in decides:
        then, now = getattr(before, name), getattr(peft, name)
        if now not in (then, getattr(default, name)):
            raise RecipeError(
                f"{adapters} was trained with peft.{name}={then}, but this run has peft.{name}={now}; leave it out, or "
                "export the adapter (which merges it) and start from that folder."
            )
    return dataclasses.replace(peft, **{name: getattr(before, name) for name in decides})


def context_folder(
    base: Path | None, run_dir: Path, published: dict[str, Any], tokenizer: Any, *, named: bool, writes: bool
) -> Path:
    """The folder whose files every checkpoint of a run carries: config.json and the tokenizer it trains with.

    Args:
        base: The checkpoint the run starts from; its files are taken as they are where nothing in them changes.
        run_dir: Where another folder is made.
        published: config.json of the model that is trained.
        tokenizer: What the run trains with; None where its data needs none.
        named: Whether the recipe names the tokenizer, so that it may be another than the base's.
        writes: Whether this process writes the folder.
    """
    own_tokenizer = base is not None and (not named or tokenizer is None or _has_tokenizer(base, tokenizer))
    if base is not None and own_tokenizer and published == read_json(base / "context" / "config.json"):
        return base / "context"
    folder = run_dir / "context"
    if not writes:
        return folder
    with replacing_folder(folder) as staging:
        if base is not None:
            copy_folder(base / "context", staging)
            (staging / "run.json").unlink(missing_ok=True)
        write_json(staging / "config.json", published)
        if tokenizer is not None and not own_tokenizer:
            for path in tokenizer_files(staging):
                path.unlink()
            tokenizer.save_pretrained(staging)
            _set_special_tokens(staging, tokenizer)
    return folder


def _has_tokenizer(base: Path, tokenizer: Any) -> bool:
    try:
        return tokenizer_identity(load_tokenizer(base, error=CheckpointError)) == tokenizer_identity(tokenizer)
    except CheckpointError:
        return False


def _set_special_tokens(folder: Path, tokenizer: Any) -> None:
    """Let config.json and generation_config.json name the tokenizer's ids: generation stops at them."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            write_json(path, json.loads(path.read_text()) | ids)

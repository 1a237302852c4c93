"""A model's identity by content: hashes that depend neither on where its folder is nor on its name.

Cheap at any size: a checkpoint's manifest holds the hashes of its tensors or files already, and they are hashed once
more; no weight is read. Whether the files still are what the manifest says is `integrity.verify`'s question, and every
reader asks it before it uses the weights.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.data.tokenizers import TOKENIZER_FILES
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.system.files import sha256
from mixtral_recipes.system.json_files import hash_of, read_object

_CONFIGS = ("config.json", "params.json")
_PEFT_CONFIG = "adapter_config.json"
_NEMO_CONFIGS = ("context/io.json", "context/model.yaml")
_PEFT_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")  # what is read of both
_NEMO_ADAPTER = "weights/adapter_metadata.json"
_NEMO_TOKENIZER = "context/nemo_tokenizer"
# Fields of config.json that do not decide what the model computes.
_PASSING = frozenset(
    ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache")
)
# Nor of adapter_config.json; its base is compared by content.
_PASSING_OF_PEFT = frozenset(
    ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")
)
_SHOWN = 12


@dataclass(frozen=True)
class Identity:
    """SHA-256 in hex of each thing that decides a model; None where it is not known, or not there.

    Attributes:
        weights: Of the sorted (name, dtype, shape, hash) of the tensors under Hugging Face's names; of the sorted
            (name, size, hash) of the files under ``weights/`` where tensors have no hashes (what training writes).
        config: Of config.json's fields (in Mistral's own format, params.json's; of a peft folder,
            adapter_config.json's), without those that do not decide what is computed.
        tokenizer: Of the sorted (name, hash) of the tokenizer's files, chat templates included.
    """

    weights: str | None = None
    config: str | None = None
    tokenizer: str | None = None

    @classmethod
    def of(cls, weights: str | None, folder: Path) -> "Identity":
        """Known weights, with the configuration and the tokenizer that are in a folder."""
        return cls(weights, hash_of_config(folder), hash_of_tokenizer(folder))

    def differences(self, other: "Identity") -> list[str]:
        """Names of what both know and is not the same."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [name for name in mine if mine[name] and theirs[name] and mine[name] != theirs[name]]

    def told(self, *names: str) -> str:
        """The named hashes, short, for a message."""
        return ", ".join(f"{name} {short(getattr(self, name))}" for name in names)


def short(digest: str | None) -> str:
    """A hash as messages and tables show it."""
    return digest[:_SHOWN] if digest else "unknown"


def identity_of(checkpoint: Path) -> Identity:
    """What a checkpoint folder holds now, by its manifest and the small files in ``context/``.

    Raises:
        CheckpointError: it is not a finished checkpoint.
    """
    manifest = read_manifest(checkpoint)
    tensors, files = manifest["tensors"], manifest["files"]
    weights = hash_of_tensors(tensors) if tensors else hash_of_files(files)
    return Identity.of(weights, checkpoint / "context")


def hash_of_tensors(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """``Identity.weights`` from name -> {"dtype", "shape", "sha256"}."""
    entries = [[name, entry["dtype"], list(entry["shape"]), entry["sha256"]] for name, entry in tensors.items()]
    return hash_of(sorted(entries))


def hash_of_files(files: Mapping[str, Mapping[str, Any]]) -> str:
    """``Identity.weights`` from a manifest's relative path -> {"size", "sha256" or "pieces"}."""
    return hash_of([[name, files[name]] for name in sorted(files) if name.startswith("weights/")])


def hash_of_adapter(folder: Path) -> str | None:
    """``Identity.weights`` of an adapter in a form of others', peft's or NeMo 2.0's; None where a folder has none."""
    file = adapter_file(folder)
    if file is not None:
        return sha256(file)
    if not (folder / _NEMO_ADAPTER).is_file():
        return None
    return hash_of_files({f"weights/{path.name}": {"sha256": sha256(path)} for path in folder.glob("weights/*.distcp")})


def adapter_file(folder: Path) -> Path | None:
    """The file of a peft folder that holds its tensors; None where there is none."""
    return next((folder / name for name in _PEFT_ADAPTERS if (folder / name).is_file()), None)


def hash_of_config(folder: Path) -> str | None:
    """``Identity.config`` of a folder; None without one.

    It is config.json's; params.json's in Mistral's own format; adapter_config.json's beside peft's tensors; of the
    files of a NeMo 2.0 checkpoint's context.

    Raises:
        CheckpointError: it cannot be read.
    """
    of_peft = adapter_file(folder) is not None
    names = (_PEFT_CONFIG,) if of_peft else _CONFIGS
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        nemo = [[name, sha256(folder / name)] for name in _NEMO_CONFIGS if (folder / name).is_file()]
        return hash_of(nemo) if nemo else None
    try:
        fields = read_object(path, CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}).") from error
    if of_peft:  # its lists are sets, which peft writes in any order
        return hash_of({name: _sorted(value) for name, value in fields.items() if name not in _PASSING_OF_PEFT})
    return hash_of({name: value for name, value in fields.items() if name not in _PASSING})


def _sorted(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value


def hash_of_tokenizer(folder: Path) -> str | None:
    """``Identity.tokenizer`` of a folder; None without a tokenizer, and of a peft folder: its base's is used."""
    if adapter_file(folder) is not None:
        return None
    home = folder / _NEMO_TOKENIZER if (folder / _NEMO_TOKENIZER).is_dir() else folder
    files = [[path.relative_to(home).as_posix(), sha256(path)] for path in tokenizer_files(home)]
    return hash_of(files) if files else None


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in a folder."""
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})

"""Whether the files that a run's settings name are what they were: data, the weights it starts from, the tokenizer."""

import contextlib
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints.lineage.identity import hash_of_tokenizer, identity_of
from mixtral_recipes.data.cache import sampled_hash
from mixtral_recipes.data.contents import contents
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.errors import CheckpointError, DataError
from mixtral_recipes.importers import locations
from mixtral_recipes.settings.changes import FILES
from mixtral_recipes.settings.resume import AutoResume
from mixtral_recipes.settings.tokenizer import AutoTokenizer
from mixtral_recipes.system.json_files import hash_of

_WEIGHTS = ("config.json", "params.json", "adapter_config.json", "*.safetensors", "*.bin", "*.pth")


def named_files(data: DataModule, resume: AutoResume | None, tokenizer: Any) -> dict[str, str]:
    """A hash of what each place holds, by the place's name; nothing for what is elsewhere, as on the Hub.

    No weight is read but of a Hugging Face folder, and there large files in part (`cache.sampled_hash`).

    Args:
        data: The run's data module.
        resume: What it starts from.
        tokenizer: The tokenizer that its recipe names; None for the model's.
    """
    restore = resume and resume.restore_config
    looks = [(place, _weights) for place in (restore.path, restore.adapter_path)] if restore else []
    if isinstance(tokenizer, AutoTokenizer):
        named = (tokenizer.pretrained_model_name, tokenizer.vocab_file, tokenizer.merges_file, tokenizer.chat_template)
        looks += [(place, _tokenizer) for place in named]
    seen: dict[str, list[Any]] = {}  # one folder may be both
    for place, look in ((place, look) for place, look in looks if place):
        with contextlib.suppress(CheckpointError, DataError, OSError):  # nothing here that can be read
            seen.setdefault(place, []).extend(look(place))
    return contents(data.places()) | {f"{FILES}{place}": hash_of(parts)[:12] for place, parts in seen.items() if parts}


def _weights(place: str) -> list[Any]:
    try:
        identity = identity_of(locations.checkpoint(place))
    except CheckpointError:  # another form of weights, or none here
        folder = Path(place.removeprefix("hf://").removeprefix("nemo://")).expanduser()
        files = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern) if path.is_file()})
        return [[path.name, sampled_hash(path)] for path in files]
    return [identity.weights, identity.config, identity.tokenizer]


def _tokenizer(place: str) -> list[Any]:
    path = Path(place).expanduser()
    if path.is_dir():
        return [hash_of_tokenizer(path)]
    return [sampled_hash(path)] if path.is_file() else []

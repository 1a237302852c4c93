"""A Mixtral in Mistral's own format: ``params.json`` and ``consolidated.*``, as Mistral publishes it.

Source: mistral-inference `args.py` (TransformerArgs) and `transformer.py` (from_folder).
"""

import contextlib
import re
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints.format.rows import TORCH_NAMES
from mixtral_recipes.errors import CheckpointError, nearest
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf import safetensors as safetensors_io
from mixtral_recipes.importers.hf.safetensors import StoredTensor
from mixtral_recipes.importers.hf.source import Source, canonical, check_count, check_index, gather
from mixtral_recipes.importers.mapping import mistral_tensors
from mixtral_recipes.layout.shapes import MIXTRAL_8X22B
from mixtral_recipes.system.json_files import read_object
from mixtral_recipes.system.pointers import refuse_pointer

PARAMS = "params.json"
SINGLE, INDEX = "consolidated.safetensors", "consolidated.safetensors.index.json"

# params.json -> config.json. The first release of 8x7B spells some as config.json does.
_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "max_seq_len": "max_position_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "sliding_window": "sliding_window",
    "tied_embeddings": "tie_word_embeddings",
    "num_experts": "num_local_experts",
    "num_experts_per_tok": "num_experts_per_tok",
}
_REQUIRED = ("dim", "n_layers", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size", "num_experts", "norm_eps")
_WITHOUT_EFFECT = ("max_batch_size",)  # memory that mistral-inference sets aside
_USUAL = {"model_type": "transformer", "causal": True}  # what these may say; of others, that they are not there
# In which a config.json beside params.json must agree, in Megatron's spelling.
_SAME = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
         "num_moe_experts", "moe_router_topk", "vocab_size", "rotary_base", "layernorm_epsilon")  # fmt: skip
_ROPE_THETA = 1e6  # what mistral-inference takes where params.json is silent
_POSITIONS, _POSITIONS_8X22B = 32768, 65536  # params.json is silent; as the released config.json files say


def open_mistral(folder: Path, *, by_library: bool = False) -> Source:
    """Open a folder with params.json and consolidated weights.

    Args:
        folder: The folder.
        by_library: As `open_source` takes it.

    Raises:
        CheckpointError: a file, tensor or field is missing, unexpected or wrong; the message names it.
    """
    stored = _stored_tensors(folder, by_library)
    config = read_params(folder)
    dims = hf_config.dims(config)
    of_any = next((tensor.extent.dtype for _, tensor in stored.values()), "BF16")
    config |= {"torch_dtype": TORCH_NAMES[of_any]}
    if (folder / "config.json").is_file():
        config = _agreeing(folder / "config.json", config)
    stacked = any(".block_sparse_moe." in name for name in stored)
    check_count(folder, len(stored), dims, fused=stacked, described_by=PARAMS)
    tensors = canonical(folder, stored, mistral_tensors(dims, stacked=stacked), dims, PARAMS)
    return Source(folder, config, dims, "mistral", tensors, sorted({path for path, _ in stored.values()}))


def read_params(folder: Path) -> dict[str, Any]:
    """params.json as a config.json.

    Raises:
        CheckpointError: it is missing, broken, or describes something other than a Mixtral.
    """
    path = folder / PARAMS
    try:
        refuse_pointer(path, CheckpointError)
        params = read_object(path, CheckpointError)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; it describes the model in the consolidated files.") from error
    if not isinstance(params.get("moe") or {}, dict):
        raise CheckpointError(f"{path}: moe must be a JSON object, as in Mistral's params.json.")
    flat = {key: value for key, value in params.items() if key != "moe"} | (params.get("moe") or {})
    known = {**_FIELDS, **{field: field for field in hf_config.DEFAULTS}}
    fields: dict[str, Any] = {}
    for key, value in flat.items():
        plain = (None, _USUAL[key]) if key in _USUAL else (None, False, {}, [])
        if key in known:
            read = int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,40}", value) else value
            if fields.setdefault(known[key], read) != read:
                raise CheckpointError(f"{path}: {key} is {read!r}, but another name for it has {fields[known[key]]!r}.")
        elif key not in _WITHOUT_EFFECT and value not in plain:
            raise CheckpointError(
                f"{path}: {key}={value!r} is unknown, or not what a Mixtral has, and may change what the model "
                f"computes.{nearest(key, list(known))}"
            )
    for key in _REQUIRED:
        if _FIELDS[key] not in fields:
            what = "; only Mixtrals (with experts) can be converted" if key == "num_experts" else ""
            raise CheckpointError(f"{path}: {key} is missing{what}.")
    return _as_config(fields)


def _as_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Add what config.json says and params.json leaves out."""
    large = (fields["hidden_size"], fields["num_hidden_layers"]) == (
        MIXTRAL_8X22B.hidden_size,
        MIXTRAL_8X22B.num_layers,
    )
    theta = fields.pop("rope_theta", None) or _ROPE_THETA
    with contextlib.suppress(TypeError, ValueError):  # config.json's rules refuse what is no number
        theta = float(theta)
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "max_position_embeddings": _POSITIONS_8X22B if large else _POSITIONS,
        "rope_theta": theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **{key: value for key, value in fields.items() if value is not None},
    }


def _agreeing(path: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """The config.json beside params.json, which says more; refused if it describes another model."""
    published = read_object(path, CheckpointError)
    theirs, wanted = hf_config.to_megatron(published), hf_config.to_megatron(ours)
    for name in _SAME:
        if theirs[name] != wanted[name]:
            raise CheckpointError(
                f"{path}: {name} is {theirs[name]!r}, but {PARAMS} has {wanted[name]!r}; one of them is wrong."
            )
    return published


def _stored_tensors(folder: Path, by_library: bool) -> dict[str, tuple[Path, StoredTensor]]:
    files, indexed = safetensors_io.files_of(folder, INDEX, SINGLE)
    if files and (others := _pickled(folder)):
        raise CheckpointError(f"{folder}: has {files[0].name} and {min(others.values()).name}; remove one of the two.")
    if files:
        stored = gather(files, safetensors_io.read_header, by_library=by_library)
        if indexed:
            check_index(folder, stored, indexed)
        return stored
    from mixtral_recipes.importers.hf import pickle as pickle_io

    return gather(_numbered(folder), pickle_io.read_tensors, by_library=by_library)


def _pickled(folder: Path) -> dict[tuple[int, str], Path]:
    """Its consolidated pickles, by number and ending."""
    return {
        (int(match[1]), match[2]): path
        for path in folder.glob("consolidated.*")
        if (match := re.fullmatch(r"consolidated\.(\d+)\.(pth?)", path.name))
    }


def _numbered(folder: Path) -> list[Path]:
    """consolidated.00.pth and those after it, without a gap."""
    found = _pickled(folder)
    if not found:
        raise CheckpointError(f"{folder} has {PARAMS} but no weights: no {SINGLE}, {INDEX} or consolidated.00.pth.")
    ending = sorted({suffix for _, suffix in found})[0]
    for number in range(max(number for number, suffix in found if suffix == ending) + 1):
        if (number, ending) not in found:
            raise CheckpointError(f"{folder}: consolidated.{number:02d}.{ending} is missing; download it again.")
    return [found[key] for key in sorted(found)]

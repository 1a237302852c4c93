"""A peft folder, opened: each adapted projection's factors, or the reason why this adapter cannot be taken exactly."""

import functools
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from msgspec import Meta
from torch import Tensor

from mixtral_recipes.checkpoints.lineage.identity import adapter_file
from mixtral_recipes.errors import CheckpointError, MixtralRecipesWarning
from mixtral_recipes.importers.hf import library
from mixtral_recipes.importers.hf import pickle as pickle_io
from mixtral_recipes.importers.hf import safetensors as safetensors_io
from mixtral_recipes.importers.mapping import StoredParts, canonical_shapes, hf_tensors
from mixtral_recipes.importers.peft.layouts import unstack
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.settings.peft import HF_WHOLE
from mixtral_recipes.system.json_files import read_object
from mixtral_recipes.system.schema import typed

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?P<kind>A|B|magnitude_vector)(?:\.default)?(?:\.weight)?$"
)
_WHOLE = re.compile(r"(?:base_model\.model\.)?(?P<name>(?:model\.)?(?P<module>embed_tokens|lm_head)\.weight)$")
_OF_WHOLE = re.compile(r"\b(embed_tokens|lm_head)\.(?:base_layer|lora_)")
_EXPERTS = re.compile(r"(?P<layer>model\.layers\.\d+\.)mlp\.experts(?P<inside>\.base_layer)?$")
# Settings that change what is computed, and the values that leave it as plain LoRA or DoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
# What the files' shapes and names say by themselves, what is for training only, and who wrote it.
_WITHOUT_EFFECT = frozenset({
    "auto_mapping", "base_model_class", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "init_lora_weights", "layers_pattern", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core",
    "merge_weights", "parent_library", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "unsloth_fixed",
})  # fmt: skip
# Starts that subtract something from the base, so that the adapter fits no released weights.
_CHANGES_THE_BASE = re.compile(r"pissa|olora|loftq|corda|lora_ga", re.IGNORECASE)


type _Rank = Annotated[int, Meta(ge=1, le=1 << 16)]
type _Alpha = Annotated[float, Meta(gt=0, le=1e9)]


class _Needed(TypedDict):
    r: _Rank
    lora_alpha: _Alpha


class _Settings(_Needed, total=False):
    """adapter_config.json, as far as it is used."""

    rank_pattern: dict[str, _Rank] | None
    alpha_pattern: dict[str, _Alpha] | None
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    layers_to_transform: list[int] | int | None
    target_parameters: list[str] | None
    modules_to_save: list[str] | None
    base_model_name_or_path: str | None
    lora_dropout: Annotated[float, Meta(ge=0, le=1)] | None
    use_dora: bool | None
    use_rslora: bool | None


@dataclass(frozen=True)
class Projection:
    """One adapter of the source, of one projection or of an expert's gate and up projection together.

    Attributes:
        names: The canonical tensors (`importers/mapping.py`) whose rows B has, top to bottom.
        a: [r, in].
        b: [out, r].
        scale: What B A is multiplied by.
        magnitude: DoRA's row lengths [out]; None for LoRA.
    """

    names: tuple[str, ...]
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class PeftFolder:
    """A peft folder's settings and factors.

    Attributes:
        folder: Where it is.
        settings: adapter_config.json.
        projections: Its adapters.
        whole: Weights that were trained whole (``modules_to_save``), by their canonical names.
    """

    folder: Path
    settings: dict[str, Any]
    projections: list[Projection]
    whole: dict[str, Tensor]

    @property
    def dora(self) -> bool:
        return bool(self.settings.get("use_dora"))


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json, if this adapter is plain LoRA or DoRA.

    Raises:
        CheckpointError: it cannot be read, or names the setting that makes it something else.
    """
    path = folder / "adapter_config.json"
    try:
        settings = read_object(path, CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    if "peft_type" not in settings and ("fine_tune_type" in settings or "lora_parameters" in settings):
        raise CheckpointError(
            f"{path}: this is an MLX adapter, and only peft's format is supported: adapter_model.safetensors with "
            "lora_A (MLX's lora_a transposed) and lora_B (lora_b transposed), and in this file r=rank and "
            "lora_alpha=rank * scale."
        )
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":  # others have no r
        raise CheckpointError(f"{path}: peft_type={str(kind)[:80]!r} is not supported; only LORA is, including DoRA.")
    typed(settings, _Settings, path, CheckpointError)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.get(field) or {}:
            _check_pattern(f"{path}: {field}", pattern)
    if isinstance(excluded := settings.get("exclude_modules"), str):
        _check_pattern(f"{path}: exclude_modules", excluded)
    for name, plain in _PLAIN.items():
        value = settings.get(name, plain[0])
        if value not in plain:
            raise CheckpointError(
                f"{path}: {name}={value!r} is not supported; merge the adapter with peft's merge_and_unload and import "
                "the model."
            )
    for name in unknown(settings):
        if settings[name]:
            raise CheckpointError(
                f"{path}: {name}={str(settings[name])[:80]!r} is not a known setting of LoRA; if it does not change "
                "what the adapter computes, remove it from the file, otherwise merge the adapter with peft's "
                "merge_and_unload and import the model."
            )
    for name in settings.get("modules_to_save") or []:
        if str(name).rsplit(".", 1)[-1] not in HF_WHOLE.values():
            raise CheckpointError(
                f"{path}: modules_to_save names {name}, but only {' and '.join(HF_WHOLE.values())} are supported; "
                "merge the adapter with peft's merge_and_unload and import the model."
            )
    start = str(settings.get("init_lora_weights"))
    if _CHANGES_THE_BASE.search(start):
        raise CheckpointError(
            f"{path}: init_lora_weights={start!r} changed the base's weights; convert the adapter with peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...), or merge it and import the model."
        )
    return settings


def unknown(settings: Mapping[str, Any]) -> list[str]:
    """The names in an adapter_config.json of which it is not known whether they change what is computed."""
    known = (*_Settings.__annotations__, *_Needed.__annotations__, *_PLAIN)
    return [name for name in settings if name not in known and name not in _WITHOUT_EFFECT]


def _check_pattern(where: str, pattern: str) -> None:
    """Refuse a regular expression that is invalid, or that can take forever: nested repeats, or many of them."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where} has {pattern[:80]!r}, which is not a valid regular expression.") from error
    if len(pattern) > 500 or re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
        raise CheckpointError(
            f"{where} has {pattern[:80]!r}; patterns of more than 500 characters, with a repeated group or with more "
            "than four repeats are not supported: name the modules instead."
        )


def open_adapter(folder: Path, settings: Mapping[str, Any], dims: ModelShape) -> PeftFolder:
    """Read a peft folder, in the v4 or the v5 layout.

    Args:
        folder: The folder.
        settings: What `read_settings` returned.
        dims: The base model's sizes.

    Raises:
        CheckpointError: names the tensor that is missing, of another shape, not finite, or of a layer that cannot be
            adapted here.
    """
    by_module: dict[str, dict[str, Tensor]] = {}
    shapes = canonical_shapes(dims)
    saved = {str(name).rsplit(".", 1)[-1] for name in settings.get("modules_to_save") or []}
    whole: dict[str, Tensor] = {}
    for key, tensor in _tensors(folder).items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: {key} has values that are not finite.")
        found = _WHOLE.match(key)
        if found is not None and found["module"] in saved:
            saved.discard(found["module"])
            whole[found["name"]] = _of_shape(folder, key, tensor, shapes[found["name"]])
            continue
        found = _KEY.match(key)
        whole_module = _OF_WHOLE.search(key)
        if whole_module is not None:
            raise _no_adapter(folder, whole_module[1])
        if found is None:
            raise CheckpointError(
                f"{folder}: {key} is not a LoRA factor; merge the adapter with peft and import the model."
            )
        factors = by_module.setdefault(found["module"], {})
        if found["kind"] in factors:
            raise CheckpointError(f"{folder}: {key} appears twice, under two spellings of its name.")
        factors[found["kind"]] = tensor
    if not by_module:
        raise CheckpointError(f"{folder}: the adapter has no tensors.")
    if saved:
        raise CheckpointError(f"{folder}: modules_to_save names {min(saved)}, but the adapter has no weights for it.")
    experts = _parameters_by_module(by_module)
    reader = _Reader(folder, settings, dims, shapes)
    projections: list[Projection] = []
    for module, factors in by_module.items():
        if "A" not in factors or "B" not in factors:
            raise CheckpointError(f"{folder}: {module} has only one of lora_A and lora_B.")
        if module in experts:
            projections += reader.fused(experts[module], factors)
        else:
            projections.append(reader.single(module, factors))
    for text in _differences(settings, [name for name in by_module if name not in experts], shapes):
        warnings.warn(f"{folder / 'adapter_config.json'}: {text}", MixtralRecipesWarning, stacklevel=2)
    return PeftFolder(folder, dict(settings), projections, whole)


def _differences(settings: Mapping[str, Any], modules: list[str], shapes: Mapping[str, Any]) -> Iterator[str]:
    """What the settings say is adapted and has no tensors, or has some and is not.

    Args:
        settings: adapter_config.json.
        modules: What has tensors, but for fused experts.
        shapes: Of the base's canonical tensors.
    """
    for setting, some in _left_out(settings, modules).items():
        if some:
            yield (
                f"{setting}={str(settings[setting])[:80]} leaves out {some[0]}, but the adapter has tensors for it "
                f"({len(some)} such layer(s)); all tensors are used."
            )
    targets = settings.get("target_modules")
    if targets and isinstance(targets, list):
        attention = [name.removesuffix(".weight") for name in shapes if re.search(r"\.self_attn\.\w+_proj\.", name)]
        there = {*modules, *itertools.chain(*_left_out(settings, attention).values())}
        if absent := [name for name in attention if name not in there]:
            yield (
                f"target_modules={str(targets)[:80]} includes {absent[0]}, but the adapter has no tensor for it "
                f"({len(absent)} such layer(s)); it is treated as not adapted."
            )


def _left_out(settings: Mapping[str, Any], modules: list[str]) -> dict[str, list[str]]:
    """By setting, the modules that have tensors and that it says are not adapted."""
    targets, excluded = (settings.get(name) or [] for name in ("target_modules", "exclude_modules"))
    layers = settings.get("layers_to_transform")
    chosen = [layers] if isinstance(layers, int) else layers or []

    def named(module: str, names: list[str]) -> bool:
        return any(f".{module}".endswith(f".{name}") for name in names)

    def layer(module: str) -> int | None:
        found = re.match(r"model\.layers\.(\d+)\.", module)
        return int(found[1]) if found else None

    def leaves_out(module: str) -> bool:
        return bool(re.fullmatch(excluded, module)) if isinstance(excluded, str) else named(module, excluded)

    return {
        "target_modules": [m for m in modules if targets and isinstance(targets, list) and not named(m, targets)],
        "exclude_modules": [m for m in modules if leaves_out(m)],
        "layers_to_transform": [m for m in modules if chosen and layer(m) not in chosen],
    }


def _of_shape(folder: Path, key: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{folder}: {key} has shape {list(tensor.shape)}, but the base has {list(shape)}: its vocabulary was "
            "resized, or it belongs to another base model. Merge it with peft's merge_and_unload and import the model."
        )
    return tensor


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = adapter_file(folder)
    if path is None:
        raise CheckpointError(f"{folder} has no adapter_model.safetensors.")
    check = safetensors_io.read_header if path.suffix == ".safetensors" else pickle_io.read_tensors
    check(path)
    return library.load(path)


def _parameters_by_module(modules: Mapping[str, Any]) -> dict[str, str]:
    """Modules of fused experts -> the parameter each adapts: the inner of two is the first one's, a single one says."""
    found = {}
    for module in modules:
        match = _EXPERTS.match(module)
        if match is None:
            continue
        inner = f"{match['layer']}mlp.experts.base_layer"
        both = inner in modules and inner.removesuffix(".base_layer") in modules
        name = "gate_up_proj" if match["inside"] else "down_proj"
        if not both:
            name = ""  # its shapes say which
        found[module] = f"{match['layer']}mlp.experts.{name}"
    return found


@dataclass(frozen=True)
class _Reader:
    """Makes projections of factors, or raises if it cannot."""

    folder: Path
    settings: Mapping[str, Any]
    dims: ModelShape
    shapes: Mapping[str, tuple[int, ...]]  # of canonical tensors

    @functools.cached_property
    def _layout(self) -> dict[str, StoredParts]:
        return hf_tensors(self.dims, fused=True)

    def fused(self, parameter: str, factors: Mapping[str, Tensor]) -> list[Projection]:
        """The experts of one layer."""
        if "magnitude_vector" in factors:
            raise CheckpointError(
                f"{self.folder}: {parameter} has DoRA on fused experts, which neither peft nor mixtral-recipes "
                "supports."
            )
        if parameter.endswith("."):
            targets = [str(name).rsplit(".", 1)[-1] for name in self.settings.get("target_parameters") or []]
            named = [name for name in ("gate_up_proj", "down_proj") if name in targets]
            if len(named) != 1:
                raise CheckpointError(
                    f"{self.folder}: target_parameters={targets} does not say which parameter {parameter}* belongs to."
                )
            parameter += named[0]
        stored = self._layout.get(parameter)
        if stored is None:
            raise _no_adapter(self.folder, parameter)
        a, b = factors["A"], factors["B"]
        experts, rows, columns = stored.shape
        rank, left = divmod(a.shape[0], experts)
        if left or a.dim() != 2 or tuple(a.shape[1:]) != (columns,) or tuple(b.shape) != (rows, a.shape[0]):
            raise CheckpointError(
                f"{self.folder}: {parameter} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; they must be "
                f"[{experts} x r, {columns}] and [{rows}, {experts} x r]."
            )
        scale, each = self._scale(parameter, rank), len(stored.names) // experts
        names = [stored.names[expert * each : (expert + 1) * each] for expert in range(experts)]
        split = unstack(a, b, experts)
        return [Projection(own, a_e.contiguous(), b_e, scale) for own, (a_e, b_e) in zip(names, split, strict=True)]

    def single(self, module: str, factors: Mapping[str, Tensor]) -> Projection:
        """One projection."""
        name = f"{module}.weight"
        if name not in self.shapes or module.endswith((".gate", "embed_tokens", "lm_head", "norm")):
            raise _no_adapter(self.folder, module)
        a, b, magnitude = factors["A"], factors["B"], factors.get("magnitude_vector")
        rows, columns = self.shapes[name]
        if a.dim() != 2 or a.shape[1] != columns or tuple(b.shape) != (rows, a.shape[0]):
            raise CheckpointError(
                f"{self.folder}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; this base needs [r, "
                f"{columns}] and [{rows}, r], so the adapter belongs to another base model."
            )
        if bool(self.settings.get("use_dora")) != (magnitude is not None) or (
            magnitude is not None and magnitude.numel() != rows
        ):
            raise CheckpointError(
                f"{self.folder}: use_dora={self.settings.get('use_dora')} and the tensors of {module} disagree."
            )
        scale = self._scale(module, a.shape[0])
        return Projection((name,), a, b, scale, None if magnitude is None else magnitude.flatten())

    def _scale(self, module: str, rank: int) -> float:
        """alpha / r (or its square root) of a module; a pattern is a regular expression for its name's end."""

        def matching(pattern: str, default: Any) -> Any:
            for key, value in (self.settings.get(pattern) or {}).items():
                if re.match(rf"(.*\.)?({key})$", module):
                    return value
            return default

        said = matching("rank_pattern", self.settings["r"])
        if said != rank:
            raise CheckpointError(f"{self.folder}: {module} has rank {rank}, but adapter_config.json says {said}.")
        alpha = matching("alpha_pattern", self.settings["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


def _no_adapter(folder: Path, module: str) -> CheckpointError:
    what = "the router" if module.endswith(".gate") else "a layer"
    return CheckpointError(
        f"{folder}: it adapts {what} ({module}), which mixtral-recipes does not support; merge it with peft's "
        "merge_and_unload and import the model."
    )

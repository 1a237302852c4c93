"""What the pickles of a checkpoint say, read without running anything in them.

``.metadata`` may name the few classes a torch_dist checkpoint is described with, by their exact names, and a tensor's
description only what ``torch.save`` writes for plain tensors; settings are plain values, and what else they name is not
looked up; `plain_pickle` reads all three. Objects are read by ``torch.load(weights_only=True)``, torch's own restricted
unpickler.
"""

import argparse
import functools
import pathlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed._shard.sharded_tensor import metadata as sharded
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from mixtral_recipes.checkpoints.format.plain_pickle import Maker, read_pickle
from mixtral_recipes.checkpoints.format.rows import MOST_AXES
from mixtral_recipes.errors import CheckpointError

_MOST_METADATA_BYTES = 256 << 20
_LARGEST = 1 << 63

_Rule = Callable[[Any], bool]


def _of(*kinds: type) -> _Rule:
    """Exactly of one of these types: a bool is not a number."""
    return lambda value: type(value) in kinds


def _size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


_NOTHING = type(None)
_PLACE = _of(_NOTHING, str, pathlib.PosixPath)
# class -> attribute -> rule of its value. What stands in lists and dictionaries may still change: `_check` looks there.
_ATTRIBUTES: dict[type, dict[str, _Rule]] = {
    dcp.Metadata: {
        "state_dict_metadata": _of(dict),
        "planner_data": lambda _: True,
        "storage_data": _of(dict),
        "storage_meta": _of(_NOTHING, dcp.StorageMeta),
        "version": _of(_NOTHING, str),
        "mcore_data": lambda _: True,
        "all_local_plans": lambda _: True,
    },
    dcp.MetadataIndex: {"fqn": _of(str), "offset": _of(_NOTHING, torch.Size), "index": _of(_NOTHING, int)},
    dcp.ChunkStorageMetadata: {"offsets": _of(torch.Size), "sizes": _of(torch.Size)},
    dcp.TensorStorageMetadata: {
        "properties": _of(dcp.TensorProperties, sharded.TensorProperties),
        "size": _of(torch.Size),
        "chunks": _of(list),
    },
    dcp.BytesStorageMetadata: {},
    dcp.StorageMeta: {"checkpoint_id": _PLACE, "save_id": _PLACE, "load_id": _PLACE, "modules": _of(list)},
    _StorageInfo: {
        "relative_path": _of(str, pathlib.PosixPath),
        "offset": _size,
        "length": _size,
        "transform_descriptors": _of(_NOTHING, list, tuple),
    },
}


def _instances(kind: type) -> Maker:
    """Instances of a class that get the attributes listed for it and no others."""
    rules = _ATTRIBUTES[kind]

    def build(value: Any, state: Any) -> None:
        if type(state) is not dict:
            raise CheckpointError(f"has a {kind.__name__} without attributes")
        for name, attribute in state.items():
            if name not in rules or not rules[name](attribute):
                raise CheckpointError(f"has a {kind.__name__} whose {name[:80]} is a {type(attribute).__name__}")
        vars(value).update(state)

    return Maker(new=functools.partial(object.__new__, kind), build=build)


def _properties(kind: Any, encoding: type) -> Maker:
    """A tensor's properties, which have a state of their own form.

    From torch 2.15 on it ends with the strides of the tensor that was saved. The file's own description decides how its
    bytes are read, and earlier versions of torch take no more than five values.
    """
    of_each = (_of(torch.dtype), _of(torch.layout), _of(bool), _of(encoding), _of(bool), _strides)

    def build(value: Any, state: Any) -> None:
        fits = type(state) is tuple and len(state) in (5, 6)
        if not fits or not all(rule(one) for rule, one in zip(of_each, state, strict=False)):
            raise CheckpointError("has invalid tensor properties")
        kind.__setstate__(value, state[:5])

    return Maker(new=functools.partial(object.__new__, kind), build=build)


def _sizes(value: Any) -> bool:
    return type(value) in (tuple, list) and len(value) <= MOST_AXES and all(map(_size, value))


def _strides(value: Any) -> bool:
    return value is None or _sizes(value)


def _make_size(sizes: Any) -> torch.Size:
    if not _sizes(sizes):
        raise CheckpointError(f"has a size that is not a list of at most {MOST_AXES} whole numbers")
    return torch.Size(sizes)


def _make_path(*parts: Any) -> pathlib.PosixPath:
    if not all(type(part) is str for part in parts):
        raise CheckpointError("has a path that is not made of names")
    return pathlib.PosixPath(*parts)


def _make_layout(name: Any) -> torch.layout:
    if name != "torch.strided":
        raise CheckpointError("describes a tensor that is not dense")
    return torch.strided


def _make_set(members: Any) -> set[str]:
    if type(members) is not list or not all(type(member) is str for member in members):
        raise CheckpointError("has a set whose members are not all names")
    return set(members)


def _one_of(kind: Any) -> Maker:
    def call(number: Any) -> Any:
        if type(number) is not int:
            raise CheckpointError("has a choice that is not a number")
        return kind(number)

    return Maker(call)


def _keep_no_state(_value: Any, state: Any) -> None:
    """A state dict notes the versions of its modules as an attribute, which nothing here asks for."""
    if type(state) is not dict or any(name != "_metadata" for name in state):
        raise CheckpointError("sets attributes of a dictionary")


def _make_dict() -> OrderedDict[Any, Any]:
    """An empty one: a pickle fills it afterwards. Of what is handed over a copy would be made."""
    return OrderedDict()


_DICT = Maker(_make_dict, build=_keep_no_state)
# Each rank's plan of what to write, which Megatron's strategy leaves in the description for its next save.
_NOTE = Maker(lambda *_: None, object, lambda _value, _state: None)
_METADATA, _SHARDED = "torch.distributed.checkpoint.metadata", "torch.distributed._shard.sharded_tensor.metadata"
_NAMES: dict[tuple[str, str], Maker] = {
    **{
        (_METADATA, kind.__name__): _instances(kind)
        for kind in _ATTRIBUTES if kind is not _StorageInfo
    },
    (_METADATA, "TensorProperties"): _properties(dcp.TensorProperties, dcp._MEM_FORMAT_ENCODING),
    (_METADATA, "_MEM_FORMAT_ENCODING"): _one_of(dcp._MEM_FORMAT_ENCODING),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _instances(_StorageInfo),
    # Checkpoints that Megatron wrote itself.
    (_SHARDED, "TensorProperties"): _properties(sharded.TensorProperties, sharded.MEM_FORMAT_ENCODING),
    (_SHARDED, "MEM_FORMAT_ENCODING"): _one_of(sharded.MEM_FORMAT_ENCODING),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _instances(dcp.Metadata),
    **{
        ("torch.distributed.checkpoint.planner", name): _NOTE
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    },
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): _NOTE,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _NOTE,
    ("builtins", "set"): Maker(_make_set),
    ("torch", "Size"): Maker(_make_size),
    ("torch.serialization", "_get_layout"): Maker(_make_layout),
    ("collections", "OrderedDict"): _DICT,
    ("pathlib", "PosixPath"): Maker(_make_path),
    ("pathlib._local", "PosixPath"): Maker(_make_path),  # Python 3.13's spelling
}  # fmt: skip


def _find_for_metadata(module: str, name: str) -> Any:
    if (module, name) in _NAMES:
        return _NAMES[module, name]
    found = vars(torch).get(name) if module == "torch" else None  # a dtype is pickled by its name
    if isinstance(found, torch.dtype):
        return found
    raise CheckpointError(f"names {module}.{name}, which no checkpoint needs")


def read_metadata(weights: Path) -> Metadata:
    """The ``.metadata`` of a torch_dist folder.

    Args:
        weights: The folder of ``.metadata`` and the ``.distcp`` files.

    Raises:
        CheckpointError: it is missing, damaged, or names anything a checkpoint does not need.
    """
    path = weights / ".metadata"
    try:
        if not path.is_file():  # nor a pipe, which would be waited for
            raise FileNotFoundError
        if path.stat().st_size > _MOST_METADATA_BYTES:
            raise CheckpointError(f"has {path.stat().st_size} bytes; the limit is {_MOST_METADATA_BYTES}")
        return metadata_from(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {weights} is not a finished torch_dist checkpoint.") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: refused, it {error}.") from error


def metadata_from(content: bytes) -> Metadata:
    """Read the bytes of a ``.metadata``.

    Raises:
        CheckpointError: as `read_metadata`; the text goes on after "it".
    """
    try:
        metadata = read_pickle(content, _find_for_metadata, keys=(str, dcp.MetadataIndex))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"cannot be unpickled ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"contains a {type(metadata).__name__}, not a checkpoint's metadata")
    _check(metadata)
    metadata.planner_data = None  # Megatron's notes on how it flattened what it saved
    vars(metadata).pop("all_local_plans", None)
    return metadata


def _check(metadata: Metadata) -> None:
    """Look into every list and dictionary: each member is what it should be, and has all its attributes."""
    _whole(metadata, Metadata)
    seen: set[int] = set()  # lists of chunks, which entries may share
    for key, entry in metadata.state_dict_metadata.items():
        if type(key) is not str:
            raise CheckpointError("describes something without a name")
        if isinstance(entry, dcp.TensorStorageMetadata):
            _whole(entry, dcp.TensorStorageMetadata)
            if not hasattr(entry.properties, "dtype"):
                raise CheckpointError("describes a tensor without its properties")
            new = entry.chunks if id(entry.chunks) not in seen else []
            seen.add(id(entry.chunks))
            for chunk in new:
                _whole(chunk, dcp.ChunkStorageMetadata)
        else:
            _whole(entry, dcp.BytesStorageMetadata)
    for index, info in (metadata.storage_data or {}).items():
        _whole(index, dcp.MetadataIndex)
        _whole(info, _StorageInfo)


def _whole(value: Any, kind: type) -> None:
    if type(value) is not kind or not all(hasattr(value, name) for name in _required(kind)):
        raise CheckpointError(f"has an incomplete {kind.__name__}, or something else in its place")


@functools.cache
def _required(kind: Any) -> list[str]:
    return [name for name in kind.__dataclass_fields__ if not hasattr(kind, name)]


class Described(NamedTuple):
    """What a pickle says of a tensor.

    Attributes:
        record: Name of the record of its archive that holds the elements.
        dtype: Of the elements.
        offset: Elements of the record before the first.
        shape: The tensor's.
        in_order: Whether its elements lie in order, neither transposed nor strided.
    """

    record: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    in_order: bool


class _Storage(NamedTuple):
    record: str
    dtype: torch.dtype


def _find_for_tensors(module: str, name: str) -> Any:
    if (module, name) in _TENSOR_NAMES:
        return _TENSOR_NAMES[module, name]
    found = vars(torch).get(name) if module == "torch" else None
    dtype = getattr(found, "_dtype", None) if isinstance(found, type) else None
    if isinstance(dtype, torch.dtype):  # torch.FloatStorage and its like
        return dtype
    raise CheckpointError(f"names {module}.{name}, which no plain tensor needs and which could run code when loaded")


def _storage(pid: Any) -> _Storage:
    if type(pid) is not tuple or len(pid) != 5:
        raise CheckpointError("names something that is not a storage")
    kind, dtype, record, _, _ = pid
    if kind != "storage" or not isinstance(record, str) or not isinstance(dtype, torch.dtype):
        raise CheckpointError("names something that is not a storage")
    return _Storage(record, dtype)


def _describe(*arguments: Any) -> Described:
    """The arguments of ``torch._utils._rebuild_tensor_v2``."""
    if not 6 <= len(arguments) <= 7 or not isinstance(arguments[0], _Storage):
        raise CheckpointError("describes something that is not a tensor")
    storage, offset, shape, stride, _, hooks, *notes = arguments
    of_shape = type(shape) is tuple and _sizes(shape) and _sizes(stride) and len(shape) == len(stride)
    if not of_shape or not _size(offset):
        raise CheckpointError("describes a tensor with invalid sizes")
    if hooks or any(notes):  # a negated view is one with a note
        raise CheckpointError("describes a tensor with hooks or notes")
    step, in_order = 1, True
    for size, actual in zip(reversed(shape), reversed(stride), strict=True):
        in_order &= size == 1 or actual == step
        step *= size
    return Described(storage.record, storage.dtype, offset, shape, in_order)


def _describe_parameter(tensor: Any, *_: Any) -> Described:
    if not isinstance(tensor, Described):
        raise CheckpointError("describes a parameter that is not a tensor")
    return tensor


_TENSOR_NAMES: Mapping[tuple[str, str], Maker] = {
    ("torch._utils", "_rebuild_tensor_v2"): Maker(_describe),
    ("torch._utils", "_rebuild_parameter"): Maker(_describe_parameter),
    ("collections", "OrderedDict"): _DICT,
}


def described(content: bytes) -> Any:
    """Read the pickle in an archive of ``torch.save``; where it has tensors, the result has `Described`.

    Raises:
        CheckpointError: it holds more than tensors and plain data; the text says what.
    """
    try:
        return read_pickle(content, _find_for_tensors, persistent=_storage)
    except CheckpointError as error:
        raise CheckpointError(f"its pickle {error}") from error


class Unread(Maker):
    """What settings name and is no plain value: an enumeration's member, a function, an array. Equal to nothing else.

    Attributes:
        name: Its class, or its own name, as the pickle has it.
    """

    name: str

    def __init__(self, name: str) -> None:
        super().__init__(lambda *_: self, lambda: self, lambda _value, _state: None)
        object.__setattr__(self, "name", name)

    def __repr__(self) -> str:
        return f"<{self.name}>"


def _set_attributes(value: argparse.Namespace, state: Any) -> None:
    if type(state) is not dict:
        raise CheckpointError("has a namespace without attributes")
    vars(value).update(state)


_NAMESPACE = Maker(new=argparse.Namespace, build=_set_attributes)


def _find_for_settings(module: str, name: str) -> Any:
    if (module, name) == ("argparse", "Namespace"):
        return _NAMESPACE
    found = vars(torch).get(name) if module == "torch" else None
    if isinstance(found, torch.dtype):
        return found
    return Unread(f"{module}.{name}")


def settings_in(content: bytes) -> Any:
    """Read a pickle of settings: plain values, namespaces and dtypes; the rest is `Unread`.

    Raises:
        CheckpointError: it is damaged; the text says how.
    """
    try:
        return read_pickle(content, _find_for_settings, keys=(str, int), persistent=lambda _: Unread("a storage"))
    except CheckpointError as error:
        raise CheckpointError(f"its pickle {error}") from error

"""The weights of a Megatron checkpoint: complete, and in the shapes that the model's sizes require."""

from collections.abc import Callable
from pathlib import Path

from mixtral_recipes.checkpoints.format.matrix import Matrix
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.rows import TORCH_NAMES, Rows, spelled
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.mapping import WEIGHTS, Weight, canonical_sources, disk_shape
from mixtral_recipes.importers.views import RowRanges
from mixtral_recipes.layout.shapes import ModelShape

PREFIX = "module."  # of every tensor of the model: NeMo saves a module that wraps Megatron's
Change = Callable[[Weight, int | None, int | None, Rows], Rows]


class ModelWeights:
    """The weights in a torch_dist folder, checked against a model's sizes.

    Attributes:
        folder: Where they are.
        unknown: Names that look like a model's weights and are in no row of the table.
    """

    def __init__(self, stored: StoredWeights, dims: ModelShape, prefix: str = "") -> None:
        """Look for every weight.

        Args:
            stored: The folder, opened.
            dims: The model's sizes.
            prefix: What stands before every name (`embedding_in`).

        Raises:
            CheckpointError: names the weight that is missing or of another shape.
        """
        self.folder = folder = stored.folder
        self._stored = stored
        self._keys: dict[Weight, str] = {}
        for weight in WEIGHTS:
            key = prefix + weight.disk
            if key not in self._stored.tensors and weight.local and prefix + weight.local in self._stored.tensors:
                key = prefix + weight.local
            if key not in self._stored.tensors:
                raise CheckpointError(f"{folder}: {key} is missing from the checkpoint.")
            _check_shape(folder, weight, key, tuple(self._stored.tensors[key].size), disk_shape(weight, dims))
            self._keys[weight] = key
        known = set(self._keys.values())
        like_weights = tuple(prefix + start for start in ("decoder.", "embedding.", "output_layer."))
        self.unknown = sorted(key for key in self._stored.tensors if key.startswith(like_weights) and key not in known)

    def matrix(self, weight: Weight, layer: int | None, expert: int | None) -> Matrix:
        """One layer's and expert's matrix of a table row.

        Raises:
            CheckpointError: a part of it is missing, or its dtype is not one that weights have.
        """
        return self._stored.matrix(self._keys[weight], layer, expert)


def embedding_in(stored: StoredWeights) -> tuple[str, int, str]:
    """What the embedding tells of a torch_dist folder: a prefix, the padded vocabulary, and the weights' dtype.

    Returns:
        What stands before the names of the model's tensors (``module.``, once per wrapper, or nothing); the embedding's
        rows; its dtype, as torch spells it without ``torch.``.

    Raises:
        CheckpointError: it is not there, or is of a dtype that weights do not have.
    """
    embedding = WEIGHTS[0].disk
    prefixes = [key.removesuffix(embedding) for key in stored.tensors if key.endswith(embedding)]
    found = [prefix for prefix in prefixes if not prefix.replace(PREFIX, "")]
    if not found:
        raise CheckpointError(f"{stored.folder}: {embedding} is missing from the checkpoint.")
    prefix = min(found, key=len)
    described = stored.tensors[prefix + embedding]
    if (dtype := spelled(described.properties.dtype)) is None:
        raise CheckpointError(
            f"{stored.folder}: weights are {described.properties.dtype}; only {', '.join(TORCH_NAMES.values())} can be "
            "read."
        )
    return prefix, described.size[0], TORCH_NAMES[dtype]


def canonical_rows(saved: ModelWeights, dims: ModelShape, change: Change | None = None) -> dict[str, Rows]:
    """Every canonical tensor, as the rows of Megatron's that it consists of.

    Args:
        saved: The checkpoint's weights.
        dims: The model's sizes.
        change: What is done to each of Megatron's matrices on the way (adapters are merged).

    Raises:
        CheckpointError: a part is missing, or a weight is not one of a Mixtral.
    """
    if saved.unknown:
        raise CheckpointError(f"{saved.folder}: {saved.unknown[0]} is not a weight of a Hugging Face Mixtral.")
    found: dict[str, Rows] = {}
    for name, (weight, layer, expert, ranges) in canonical_sources(dims).items():
        matrix: Rows = saved.matrix(weight, layer, expert)
        matrix = change(weight, layer, expert, matrix) if change else matrix
        found[name] = RowRanges([(matrix, start, stop) for start, stop in ranges])
    return found


def _check_shape(folder: Path, weight: Weight, key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    padded = weight.shapes[0].startswith("V") and len(found) == len(expected) and found[0] >= expected[0]
    if found != expected and not (padded and found[1:] == expected[1:]):
        raise CheckpointError(
            f"{folder}: {key} has shape {list(found)}, but the configuration in context requires {list(expected)}."
        )

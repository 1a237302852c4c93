"""The weights of a Megatron checkpoint: complete, and in the shapes that the model's sizes require."""

from collections.abc import Callable
from pathlib import Path

from mixtral_recipes.checkpoints.format.matrix import Matrix
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.rows import Rows
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.mapping import WEIGHTS, Weight, canonical_sources, disk_shape
from mixtral_recipes.importers.views import RowRanges
from mixtral_recipes.layout.shapes import ModelShape

Change = Callable[[Weight, int | None, int | None, Rows], Rows]


class ModelWeights:
    """The weights in a torch_dist folder, checked against a model's sizes.

    Attributes:
        folder: Where they are.
        unknown: Names that look like a model's weights and are in no row of the table.
    """

    def __init__(self, folder: Path, dims: ModelShape, prefix: str = "") -> None:
        """Read what is there.

        Args:
            folder: The folder with ``.metadata``.
            dims: The model's sizes.
            prefix: What stands before every name (``module.`` in NeMo's checkpoints).

        Raises:
            CheckpointError: names the weight that is missing or of another shape.
        """
        self.folder = folder
        self._stored = StoredWeights(folder)
        self._prefix = prefix
        for weight in WEIGHTS:
            key = prefix + weight.disk
            if key not in self._stored.tensors:
                raise CheckpointError(f"{folder}: {key} is missing from the checkpoint.")
            _check_shape(folder, weight, key, tuple(self._stored.tensors[key].size), disk_shape(weight, dims))
        known = {prefix + weight.disk for weight in WEIGHTS}
        like_weights = tuple(prefix + start for start in ("decoder.", "embedding.", "output_layer."))
        self.unknown = sorted(key for key in self._stored.tensors if key.startswith(like_weights) and key not in known)

    def matrix(self, weight: Weight, layer: int | None, expert: int | None) -> Matrix:
        """One layer's and expert's matrix of a table row.

        Raises:
            CheckpointError: a part of it is missing, or its dtype is not one that weights have.
        """
        return self._stored.matrix(self._prefix + weight.disk, layer, expert)


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

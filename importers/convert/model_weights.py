"""The weights of a Megatron checkpoint: all there, in the shapes a model's sizes call for."""

from pathlib import Path

from mixtral_recipes.checkpoints.format.matrix import Matrix
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.mapping import WEIGHTS, Weight, disk_shape
from mixtral_recipes.layout.shapes import ModelShape


class ModelWeights:
    """The weights in a torch_dist folder, checked against a model's sizes.

    Attributes:
        unknown: Names that look like a model's weights and are in no row of the table.
    """

    def __init__(self, folder: Path, dims: ModelShape) -> None:
        """Read what is there.

        Raises:
            CheckpointError: names the weight that is missing or of another shape.
        """
        self._stored = StoredWeights(folder)
        for weight in WEIGHTS:
            if weight.disk not in self._stored.tensors:
                raise CheckpointError(f"{folder}: {weight.disk} is missing from the checkpoint.")
            found = tuple(self._stored.tensors[weight.disk].size)
            _check_shape(folder, weight, found, disk_shape(weight, dims))
        known = {weight.disk for weight in WEIGHTS}
        like_weights = ("decoder.", "embedding.", "output_layer.")
        self.unknown = sorted(key for key in self._stored.tensors if key.startswith(like_weights) and key not in known)

    def matrix(self, weight: Weight, layer: int | None, expert: int | None) -> Matrix:
        """One layer's and expert's matrix of a table row.

        Raises:
            CheckpointError: a part of it is missing, or its dtype is not one that weights have.
        """
        return self._stored.matrix(weight.disk, layer, expert)


def _check_shape(folder: Path, weight: Weight, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    padded = weight.shapes[0].startswith("V") and len(found) == len(expected) and found[0] >= expected[0]
    if found != expected and not (padded and found[1:] == expected[1:]):
        raise CheckpointError(
            f"{folder}: {weight.disk} has shape {list(found)}, context/config.json calls for {list(expected)}."
        )

"""A rank's part of a tensor, as checkpoints know it: a box of the whole, and the memory that holds it."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Shape = tuple[int, ...]


class StandIn(Protocol):
    """What has a shard's memory in place of a tensor that cannot be cut or filled box by box."""

    def take(self) -> None:
        """Take the values, before they are written."""

    def put_back(self) -> None:
        """Give the values on, once they are read."""


@dataclass(frozen=True)
class Shard:
    """A box of a whole tensor, and the memory on this rank that holds it.

    Attributes:
        key: The whole tensor's name in a checkpoint.
        tensor: The box's elements in order, contiguous, of any shape.
        offsets: Where the box starts in the whole tensor.
        sizes: The box's extent; as many axes as the whole tensor has.
        whole: The whole tensor's shape.
        padded: Whether the whole tensor may be longer or shorter in a checkpoint (a vocabulary's padding).
        stand_in: What holds ``tensor``, if it is not the model's own memory.
    """

    key: str
    tensor: Tensor
    offsets: Shape
    sizes: Shape
    whole: Shape
    padded: bool = False
    stand_in: StandIn | None = None

    @property
    def place(self) -> tuple[str, Shape, Shape]:
        """What makes two shards the same piece of the same tensor."""
        return self.key, self.offsets, self.sizes

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.tensor.numel() * self.tensor.element_size()

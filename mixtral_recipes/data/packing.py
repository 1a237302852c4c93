"""Packing: several samples in one sequence."""

from dataclasses import dataclass


@dataclass
class PackedSequenceSpecs:
    """How samples are packed, in NeMo's spelling.

    Attributes:
        packed_sequence_size: Tokens per pack; -1 does not pack.
    """

    packed_sequence_size: int = -1

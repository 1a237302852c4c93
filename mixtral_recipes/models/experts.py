"""A rank's experts without Transformer Engine."""

from megatron.core.transformer.moe.experts import SequentialMLP


class Experts(SequentialMLP):
    """Megatron's sequential experts."""

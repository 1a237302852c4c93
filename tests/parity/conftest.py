"""Megatron is imported before pytest turns warnings into errors."""

from tests.distributed import quiet  # noqa: F401

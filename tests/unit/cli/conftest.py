"""The commands import nemo_run and Megatron; see tests.unit.recipes.quiet."""

import tests.unit.recipes.quiet  # noqa: F401

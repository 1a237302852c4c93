"""Imports nemo_run and the recipes without what third parties say then: pytest takes warnings for errors."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mixtral_recipes.recipes.nemo_run_entry  # noqa: F401

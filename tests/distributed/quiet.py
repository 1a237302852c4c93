"""Imports Megatron without what it says then and on every build: pytest takes warnings for errors."""

import logging
import warnings

logging.getLogger("megatron").setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mixtral_recipes.api
    import mixtral_recipes.training.distributed
    import mixtral_recipes.training.step  # noqa: F401

"""Recipes: one module each, returning configs."""

from mixtral_recipes.system import quiet as _quiet

_quiet.libraries()

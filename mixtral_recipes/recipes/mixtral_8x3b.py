"""Mixtral 8x3B, NeMo's smaller variant (no public checkpoint), at 4096 tokens."""

from mixtral_recipes.models.config import MixtralConfig8x3B
from mixtral_recipes.recipes.family import Recipe

RECIPE = Recipe(__name__, MixtralConfig8x3B)
NAME = RECIPE.name

model = RECIPE.model
trainer = RECIPE.trainer
pretrain_recipe = RECIPE.pretrain_recipe
pretrain_performance_optimizations = RECIPE.pretrain_performance_optimizations
finetune_recipe = RECIPE.finetune_recipe

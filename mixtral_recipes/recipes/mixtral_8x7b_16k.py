"""Mixtral 8x7B at 16,384 tokens: pretraining on 32 GPUs, LoRA fine-tuning on one node."""

from mixtral_recipes.models.config import MixtralConfig8x7B
from mixtral_recipes.recipes.family import Recipe

RECIPE = Recipe(__name__, MixtralConfig8x7B)
NAME = RECIPE.name

model = RECIPE.model
trainer = RECIPE.trainer
pretrain_recipe = RECIPE.pretrain_recipe
pretrain_performance_optimizations = RECIPE.pretrain_performance_optimizations
finetune_recipe = RECIPE.finetune_recipe

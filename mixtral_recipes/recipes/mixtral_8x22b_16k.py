"""Mixtral 8x22B at 16,384 tokens: pretraining on 128 GPUs, LoRA fine-tuning on eight nodes."""

from mixtral_recipes.models.config import MixtralConfig8x22B
from mixtral_recipes.recipes.family import Recipe

RECIPE = Recipe(__name__, MixtralConfig8x22B)
NAME = RECIPE.name

model = RECIPE.model
trainer = RECIPE.trainer
pretrain_recipe = RECIPE.pretrain_recipe
pretrain_performance_optimizations = RECIPE.pretrain_performance_optimizations
finetune_recipe = RECIPE.finetune_recipe

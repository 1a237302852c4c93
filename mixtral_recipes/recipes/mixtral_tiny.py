"""A 4-layer Mixtral that trains on a laptop's CPU: the model embedded in the package, its data, two processes."""

import math
from typing import Any

import nemo_run as run

from mixtral_recipes.data.modules.pretraining import PreTrainingDataModule
from mixtral_recipes.models.config import MixtralConfigTiny
from mixtral_recipes.recipes.family import Recipe
from mixtral_recipes.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing
from mixtral_recipes.settings.trainer import Trainer

# Found by trying (two cores, LoRA of dim 32 on all linear layers): see docs/reference/recipes/mixtral_tiny.md.
PRETRAIN_LR = 3e-3
LORA_LR = 1e-3
FULL_LR = 5e-4
ADAM_EPS = 1e-8  # PyTorch's default, which the trials used; NeMo's 1e-5 is for models a thousand times larger


class TinyRecipe(Recipe):
    """The recipes' functions with settings that suit a model of a few million parameters."""

    def adjust_trainer(self, config: run.Config[Trainer]) -> None:
        """The CPU or GPUs, whichever there are; and no overlap of communication."""
        config.accelerator = "auto"
        config.limit_val_batches = 4
        config.val_check_interval = 100
        config.log_every_n_steps = 10
        config.strategy.pipeline_dtype = None
        config.strategy.ckpt_async_save = config.strategy.ckpt_parallel_load = False
        config.strategy.ddp.overlap_grad_reduce = config.strategy.ddp.overlap_param_gather = False

    def adjust_pretraining(self, recipe: run.Partial[Any]) -> None:
        """The embedded sample's passages."""
        spread_experts(recipe.trainer)
        recipe.data = run.Config(
            PreTrainingDataModule,
            paths="embedded://squad/pretraining.jsonl",
            seq_length=self.entry.seq_length,
            global_batch_size=self.entry.pretrain_batch,
            micro_batch_size=self.entry.micro_batch,
            split="98,2,0",
        )
        recipe.optim = distributed_fused_adam_with_cosine_annealing(max_lr=PRETRAIN_LR, warmup_steps=40)
        recipe.optim.config.adam_eps = ADAM_EPS

    def adjust_finetuning(self, recipe: run.Partial[Any]) -> None:
        """The embedded SQuAD-format sample."""
        spread_experts(recipe.trainer)
        recipe.data.dataset_root = "embedded://squad"
        recipe.optim.config.lr = LORA_LR if recipe.peft is not None else FULL_LR
        recipe.optim.config.adam_eps = ADAM_EPS
        recipe.optim.lr_scheduler.warmup_steps = 20
        recipe.log.ckpt.every_n_train_steps = None  # a run of a few minutes is saved at its end


def spread_experts(trainer: run.Config[Trainer]) -> None:
    """Spread the experts over two processes, or leave them together where the processes are not even in number."""
    strategy, world_size = trainer.strategy, trainer.num_nodes * trainer.devices
    strategy.expert_model_parallel_size = math.gcd(strategy.expert_model_parallel_size, world_size)


RECIPE = TinyRecipe(__name__, MixtralConfigTiny)
NAME = RECIPE.name

model = RECIPE.model
trainer = RECIPE.trainer
pretrain_recipe = RECIPE.pretrain_recipe
pretrain_performance_optimizations = RECIPE.pretrain_performance_optimizations
finetune_recipe = RECIPE.finetune_recipe

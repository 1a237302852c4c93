"""The tiny recipe from Python, as NeMo 2.0's users write it. Run: python examples/from_python.py"""

import nemo_run as run

import mixtral_recipes as llm

if __name__ == "__main__":
    recipe = llm.mixtral_tiny.finetune_recipe(name="from_python", dir="runs", num_gpus_per_node=2, peft_scheme="lora")
    recipe.trainer.max_steps = 100
    recipe.peft.dim = 16
    run.run(recipe, executor=run.LocalExecutor())

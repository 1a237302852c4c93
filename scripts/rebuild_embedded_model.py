"""Rebuilds the embedded model: pretrains mixtral_tiny on the embedded sample's passages with this project's own recipe.

    python scripts/make_sample.py            # passages, questions, pretraining text
    python scripts/make_tokenizer.py         # tokenizer and config.json
    python scripts/rebuild_embedded_model.py # weights; about half an hour on two cores

The weights go to mixtral_recipes/embedded/mixtral_tiny/model.safetensors, beside their tokenizer and config.
The committed weights are a first version from an earlier text and schedule; this script does not reproduce them.
An interrupted run goes on where its last checkpoint was: start it again with the same --dir.
"""

import argparse
import shutil
from pathlib import Path

import nemo_run as run

import mixtral_recipes as llm
from mixtral_recipes import api, embedded, quiet
from mixtral_recipes.data.pretraining import PreTrainingDataModule
from mixtral_recipes.executors.launch import launch

STEPS = 2400
SEQ_LENGTH = 256
GLOBAL_BATCH = 16


def main() -> None:
    """Train, export, put the weights into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="folder of runs")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--lr", type=float, default=None, help="peak learning rate; default: the recipe's")
    parser.add_argument("--name", default="embedded_model")
    parser.add_argument("--no-install", action="store_true", help="leave the package as it is")
    options = parser.parse_args()
    quiet.libraries()

    recipe = llm.mixtral_tiny.pretrain_recipe(dir=str(options.dir), name=options.name, num_gpus_per_node=2)
    recipe.trainer.max_steps = options.steps
    recipe.trainer.val_check_interval = 200
    recipe.log.ckpt.every_n_train_steps = 400
    if options.lr is not None:
        recipe.optim.config.lr = options.lr
    recipe.data = run.Config(
        PreTrainingDataModule,
        paths="embedded://squad/pretraining.jsonl",
        seq_length=SEQ_LENGTH,
        micro_batch_size=GLOBAL_BATCH // 2,
        global_batch_size=GLOBAL_BATCH,
        split="98,2,0",
        eod_mask_loss=False,
    )
    run_dir = options.dir / options.name
    result = launch(recipe, executor="local", name=options.name, run_dir=run_dir)
    exported = api.export_ckpt(result["checkpoint"], output_path=run_dir / "exported", overwrite=True)
    if not options.no_install:
        target = embedded.resolve("embedded://mixtral_tiny") / "model.safetensors"
        shutil.copyfile(exported / "model.safetensors", target)
        print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()

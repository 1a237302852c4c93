"""Rebuilds the embedded model: pretrains mixtral_tiny with this project's own recipe on text of the sample's kind.

    python scripts/make_sample.py            # passages, questions, pretraining text
    python scripts/make_tokenizer.py         # tokenizer and config.json
    python scripts/rebuild_embedded_model.py # weights; about half an hour on two cores

The weights go to mixtral_recipes/embedded/mixtral_tiny/model.safetensors, beside their tokenizer and config.
Three texts are learnt from one after the other (see `corpora` in make_sample.py), each by a run of its own that starts
from the weights of the one before. A finished or interrupted run goes on where its last checkpoint was: start the
script again with the same --dir.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import nemo_run as run

sys.path.insert(0, str(Path(__file__).parent))
import make_sample

import mixtral_recipes as llm
from mixtral_recipes import api, embedded
from mixtral_recipes.data.modules.pretraining import PreTrainingDataModule
from mixtral_recipes.executors.launch import launch
from mixtral_recipes.system import quiet

SEQ_LENGTH = 512
DOCUMENTS = 40_000  # of each text


class Stage(NamedTuple):
    """A run over one of the texts.

    Attributes:
        text: Which.
        steps: Optimizer steps.
        sequences: Sequences of SEQ_LENGTH tokens per step. Few at first: the start takes steps rather than tokens.
        lr: Peak learning rate.
    """

    text: str
    steps: int
    sequences: int
    lr: float


STAGES = (Stage("lists", 1800, 2, 3e-3), Stage("excerpts", 1500, 2, 2e-3), Stage("passages", 1200, 4, 2e-3))


def recipe_of(stage: Stage, folder: Path, start: str | None) -> Any:
    """The tiny model's pretraining recipe, for one stage."""
    recipe = llm.mixtral_tiny.pretrain_recipe(dir=str(folder), name=stage.text, num_gpus_per_node=2)
    recipe.trainer.max_steps = stage.steps
    recipe.trainer.val_check_interval = 300
    recipe.trainer.log_every_n_steps = 50
    recipe.log.ckpt.every_n_train_steps = 600
    recipe.optim.config.lr = stage.lr
    recipe.optim.lr_scheduler.warmup_steps = 50
    recipe.optim.lr_scheduler.min_lr = stage.lr / 4
    recipe.data = run.Config(
        PreTrainingDataModule,
        paths=str(folder / f"{stage.text}.jsonl"),
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        global_batch_size=stage.sequences,
        split="98,2,0",
        reset_attention_mask=True,  # a document sees itself alone
        reset_position_ids=True,
    )
    if start is not None:
        recipe.resume.restore_config = run.Config(llm.RestoreConfig, path=start)
    return recipe


def main() -> None:
    """Train, export, put the weights into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/embedded_model"), help="folder of the runs")
    parser.add_argument("--no-install", action="store_true", help="leave the package as it is")
    options = parser.parse_args()
    quiet.libraries()

    folder = options.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in make_sample.corpora(DOCUMENTS).items():
        (folder / f"{name}.jsonl").write_text(text)
    checkpoint = ""
    for stage in STAGES:
        recipe = recipe_of(stage, folder, checkpoint or None)
        checkpoint = launch(recipe, executor="local", name=stage.text, run_dir=folder / stage.text)["checkpoint"]
    exported = api.export_ckpt(checkpoint, output_path=folder / "exported", overwrite=True, dtype="bf16")
    if not options.no_install:
        target = embedded.resolve("embedded://mixtral_tiny") / "model.safetensors"
        shutil.copyfile(exported / "model.safetensors", target)
        print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()

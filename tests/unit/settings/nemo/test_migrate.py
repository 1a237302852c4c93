"""Scripts in the shape of NeMo's own: what `migrate` says of them, and that its copies pass a dry run."""

import ast
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from mixtral_recipes.errors import MixtralRecipesWarning, RecipeError
from mixtral_recipes.settings.nemo.migrate import MARK, Migrated, migrate, scripts_in
from tests.unit.settings.nemo.test_modules import CASES

FINETUNING = '''
"""Fine-tunes a recipe that is chosen by name on conversations."""
import argparse

import nemo_run as run

from nemo.collections import llm
from nemo.collections.llm.gpt.data.chat import ChatDataModule
from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer
from nemo.utils import logging


def executor_for(devices: int) -> run.LocalExecutor:
    return run.LocalExecutor(ntasks_per_node=devices, launcher="torchrun", env_vars={"NCCL_NVLS_ENABLE": "0"})


parser = argparse.ArgumentParser()
parser.add_argument("--recipe", default="mixtral_8x7b")
parser.add_argument("--data", default="chats")
parser.add_argument("--dry-run", action="store_true")
args = parser.parse_args()
job = getattr(llm, args.recipe).finetune_recipe(name="chat", dir="runs", peft_scheme="lora")
job.tokenizer = "data"
tokenizer = run.Config(get_nmt_tokenizer, library="huggingface", model_name="org/model", use_fast=True)
job.trainer.val_check_interval = 50
job.log.ckpt.save_top_k = 1
job.log.wandb = None
job.data = run.Config(
    ChatDataModule, dataset_root=args.data, seq_length=job.data.seq_length, tokenizer=tokenizer,
    global_batch_size=job.data.global_batch_size, micro_batch_size=1, use_hf_tokenizer_chat_template=True,
)
logging.info("ready")
with run.Experiment("chat") as experiment:
    experiment.add(job, executor=executor_for(job.trainer.devices), name="chat", tail_logs=True)
    if args.dry_run:
        experiment.dryrun(log=False)
    else:
        experiment.run(sequential=True)
'''

PERFORMANCE = '''
"""Measures pretraining."""
import argparse

import nemo_run as run
from nemo.collections.common.tokenizers.huggingface import AutoTokenizer
from nemo.collections.llm.recipes.mixtral_8x7b import pretrain_recipe
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_with_fp8_mixed
from nemo.lightning.pytorch.callbacks.garbage_collection import GarbageCollectionCallback
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback
from nemo.lightning.run.plugins import NsysPlugin, PerfEnvPlugin

parser = argparse.ArgumentParser()
parser.add_argument("--dry-run", action="store_true")
args = parser.parse_args()
recipe = pretrain_recipe(performance_mode=True)
recipe.data.global_batch_size = 256
recipe.data.num_train_samples = 25600
recipe.data.tokenizer = run.Config(AutoTokenizer, pretrained_model_name="org/model", use_fast=True)
recipe.trainer.max_steps = 100
recipe.trainer.strategy.tensor_model_parallel_size = 1
recipe.trainer.strategy.expert_model_parallel_size = 8
recipe.trainer.strategy.sequence_parallel = False
recipe.trainer.strategy.use_te_rng_tracker = False
recipe.trainer.plugins = bf16_with_fp8_mixed()
recipe.trainer.plugins.grad_reduce_in_fp32 = False
recipe.trainer.callbacks.extend([run.Config(GarbageCollectionCallback, gc_interval_train=100, gc_interval_val=100)])
for callback in recipe.trainer.callbacks:
    if callback.__fn_or_cls__ == MegatronCommOverlapCallback:
        callback.overlap_param_gather_with_optimizer_step = False
recipe.log.ckpt = None
recipe.log.tensorboard = None
recipe.trainer.enable_checkpointing = False
recipe.trainer.logger = False
recipe.trainer.val_check_interval = 100
plugins = [PerfEnvPlugin(enable_vboost=True, nccl_pp_comm_chunksize=2097152), NsysPlugin(start_step=5, end_step=6)]
executor = run.LocalExecutor()
with run.Experiment("performance") as experiment:
    experiment.add(recipe, executor=executor, name="performance", plugins=plugins)
    if args.dry_run:
        experiment.dryrun(log=False)
    else:
        experiment.run(sequential=True, detach=True)
'''

LOW_LEVEL = """
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from nemo.collections.llm import MixtralConfig8x3B, MixtralModel, PreTrainingDataModule
from nemo.collections.llm.api import train
from nemo.lightning import MegatronStrategy, NeMoLogger, Trainer
from nemo.lightning.pytorch.optim.megatron import MegatronOptimizerModule as MegatronOptim, OptimizerConfig

strategy = MegatronStrategy(
    expert_model_parallel_size=2, tensor_model_parallel_size=1, sequence_parallel=False,
    params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, autocast_dtype=torch.float32,
    ddp=DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
)
trainer = Trainer(devices=2, max_steps=4, strategy=strategy, num_sanity_val_steps=0, logger=None, limit_val_batches=1)
data = PreTrainingDataModule("corpus", seq_length=512, global_batch_size=2, micro_batch_size=1, split="99,1,0")
optim = MegatronOptim(config=OptimizerConfig(lr=0.01, bf16=True, use_distributed_optimizer=True))
model = MixtralModel(MixtralConfig8x3B(num_layers=2, hidden_size=128), optim=optim, tokenizer=data.tokenizer)
log = NeMoLogger(name="mini", use_datetime_version=False, explicit_log_dir="somewhere/mini")
parts = dict(model=model, resume=None, data=data, trainer=trainer, log=log, tokenizer="data", optim=optim)
"""

OTHER = """
import os

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.gpt.model.llama import LlamaModel

strategy = nl.MegatronStrategy(tensor_model_parallel_size=2, fsdp="megatron", progress_interval=5)
trainer = nl.Trainer(strategy=strategy, max_epochs=3, num_sanity_val_steps=2)
recipe = llm.mixtral_8x7b.pretrain_recipe()
recipe.trainer.strategy.ckpt_save_optimizer = False
recipe.model.config.seq_length = 2048
if os.environ["NEMO_HOME"]:
    llm.deploy(nemo_checkpoint="x")
"""


def read(tmp_path: Path, text: str) -> Migrated:
    (tmp_path / "script.py").write_text(text)
    return migrate(tmp_path / "script.py")


def said(found: Migrated, kind: str) -> list[str]:
    return [finding.text for finding in found.findings if finding.kind == kind]


def run_copy(found: Migrated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, object]:
    """Run a copy with --dry-run, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", "--dry-run"])
    module = ModuleType("migrated")
    exec(compile(found.source, "migrated", "exec"), module.__dict__)
    return module.__dict__


def test_a_fine_tuning_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(tmp_path, FINETUNING)
    assert found.source.startswith('\n"""Fine-tunes')
    assert "import nemo_run as run\n" in found.source
    assert "\nimport mixtral_recipes as llm\n" in found.source
    assert "from mixtral_recipes.collections.llm.gpt.data.chat import ChatDataModule\n" in found.source
    assert [len(said(found, kind)) for kind in ("changed", "warned", "refused", "note")] == [4, 1, 0, 0]
    assert said(found, "warned") == ["ChatDataModule.tokenizer has no effect: the model's tokenizer is used; set "
                                     "model.tokenizer, or tokenizer='data' in the recipe"]  # fmt: skip
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "training.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    run_copy(found, monkeypatch, tmp_path)


def test_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(tmp_path, PERFORMANCE)
    assert (len(said(found, "changed")), said(found, "refused")) == (6, [])
    seen = run_copy(found, monkeypatch, tmp_path)
    names = [callback.__fn_or_cls__.__name__ for callback in seen["recipe"].trainer.callbacks]  # pyright: ignore[reportAttributeAccessIssue]
    assert "MegatronCommOverlapCallback" in names


def test_a_script_without_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixtral_recipes.settings.check import check_settings

    found = read(tmp_path, LOW_LEVEL)
    assert said(found, "refused") == []
    assert [text.partition(" ")[0] for text in said(found, "warned")] == [
        "MegatronStrategy.autocast_dtype",
        "MegatronStrategy.params_dtype",
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = run_copy(found, monkeypatch, tmp_path)
    told = [str(warning.message) for warning in caught if warning.category is MixtralRecipesWarning]
    assert [text.partition("=")[0] for text in told] == [
        "MegatronStrategy.params_dtype",
        "MegatronStrategy.autocast_dtype",
    ]
    assert str(seen["log"].run_dir) == "somewhere/mini"  # pyright: ignore[reportAttributeAccessIssue]
    notices = check_settings(seen["train"], seen["parts"])  # pyright: ignore[reportArgumentType]
    assert all("has no effect" in notice for notice in notices)


def test_every_kind_of_line_is_told(tmp_path: Path) -> None:
    found = read(tmp_path, OTHER)
    assert {(finding.line, finding.kind) for finding in found.findings} == {
        (4, "changed"), (5, "changed"), (6, "changed"), (7, "changed"), (8, "changed"), (8, "refused"), (10, "refused"),
        (10, "warned"), (11, "refused"), (11, "warned"), (13, "refused"), (14, "warned"), (15, "note"), (16, "refused"),
    }  # fmt: skip
    lines = found.source.splitlines()
    at = lines.index('    llm.deploy(nemo_checkpoint="x")')
    assert lines[at - 1].startswith(f"    {MARK} deploy is not available in mixtral-recipes: export the checkpoint")
    assert "from mixtral_recipes.lightning.pytorch.loggers import WandbLogger" in lines
    compile(found.source, "copy", "exec")


NOTEBOOK = """
import lightning.pytorch as pl
import nemo_run as run
from lightning.pytorch.callbacks import Callback
from nemo import lightning as nl
from nemo.collections import llm


class Crash(Callback):
    def __init__(self, step):
        self.step = step


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return []


def data() -> run.Config[pl.LightningDataModule]:
    return run.Config(Data)


def adam() -> run.Config[nl.OptimizerModule]:
    return run.Config(nl.MegatronOptimizerModule)


def lora() -> run.Config[nl.pytorch.callbacks.PEFT]:
    return run.Config(llm.peft.LoRA)


def model() -> run.Config[pl.LightningModule]:
    return run.Config(llm.MixtralModel)


made = data(), adam(), lora(), model()
"""


def test_lightnings_names_are_for_annotations_and_to_derive_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read(tmp_path, NOTEBOOK)
    assert "import mixtral_recipes.lightning.pytorch as pl\n" in found.source
    assert "from mixtral_recipes.lightning.pytorch.callbacks import Callback\n" in found.source
    assert [len(said(found, kind)) for kind in ("changed", "warned", "refused", "note")] == [4, 0, 0, 0]
    assert len(run_copy(found, monkeypatch, tmp_path)["made"]) == 4  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("module", "name"), CASES, ids=[".".join(case) for case in CASES])
def test_nothing_that_is_here_is_refused(tmp_path: Path, module: str, name: str) -> None:
    assert said(read(tmp_path, f"from nemo.{module} import {name}\n"), "refused") == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "from nemo.collections.llm import LlamaModel",
            "LlamaModel is not available in mixtral-recipes: mixtral-recipes has",
        ),
        (
            "from nemo.collections import llm\nllm.llama3_8b.model()",
            "llama3_8b is not available in mixtral-recipes: mixtral-recipes has",
        ),
        (
            "from nemo.export.tensorrt_llm import TensorRTLLM",
            "nemo.export.tensorrt_llm is not available in mixtral-recipes: export the",
        ),
        (
            "from lightning.pytorch.strategies.ddp import DDPStrategy",
            "lightning.pytorch.strategies.ddp is not available",
        ),
        (
            "from lightning.pytorch.callbacks import EarlyStopping",
            "EarlyStopping is not available in mixtral-recipes: set trainer.max_steps",
        ),
        ("recipe.trainer.devices = 'auto'", "Trainer.devices='auto' must be a whole number; set the number of"),
        ("recipe.trainer.val_check_interval = None", "Trainer.val_check_interval=None must be a whole number; set"),
        ("recipe.trainer.max_steps = 0", "Trainer.max_steps=0 is not allowed; it must be a finite number, at least 1"),
        ("recipe.optim.config.lr = '1e-4'", "OptimizerConfig.lr='1e-4' must be null or a number"),
        ("recipe.model.config.num_layers = 2.0", "MixtralConfig.num_layers=2.0 must be a whole number"),
        (
            "from nemo.collections import llm\nmine = llm.MixtralConfig8x7B()\nmine.activation_func_clamp_value = 7.0",
            "MixtralConfig8x7B.activation_func_clamp_value=7.0 is not supported (only None is): the model",
        ),
        (
            "import nemo_run as run\nfrom nemo import lightning as nl\nt = run.Config(nl.Trainer)\nt.max_epochs = 3",
            "Trainer.max_epochs=3 is not supported (only None is): set the length of the run with trainer.max_steps",
        ),
        (
            "from megatron.core.optimizer import OptimizerConfig as Mine\nMine(optimizer='sgd')",
            "OptimizerConfig.optimizer='sgd' is not supported (only 'adam' is)",
        ),
        (
            "from nemo import lightning as nl\nnl.Trainer(limit_val_batches=1.0)",
            "Trainer.limit_val_batches=1.0 must be null or a whole number; use null for the whole set",
        ),
        (
            "from lightning.pytorch import Callback\nclass Mine(Callback):\n    def on_train_batch_end(self, *a): ...",
            "Mine defines on_train_batch_end, which is never called; use on_step_end(self, run, metrics)",
        ),
        (
            "import torch\nfrom nemo.collections.llm import api\napi.generate('x')\ntorch.distributed.get_rank()",
            "torch.distributed.get_rank: no process group is left after generate",
        ),
    ],
)
def test_what_needs_a_change_by_hand_says_which(tmp_path: Path, text: str, told: str) -> None:
    assert any(one.startswith(told) for one in said(read(tmp_path, text + "\n"), "refused"))


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("PackedSequenceSpecs({}packed_train_data_path=None, tokenizer_model_name=None)", False),
        ("PackedSequenceSpecs({}packed_train_data_path='packs.npy')", True),
        ("SquadDataModule({}seq_length=512, delete_raw=True, dataset_kwargs=None, tokenizer=None)", False),
        ("SquadDataModule({}seq_length=512, delete_raw=False)", True),
        ("Trainer({}use_distributed_sampler=False, limit_test_batches=None)", False),
        ("MegatronStrategy({}gradient_as_bucket_view=True, ckpt_parallel_load=False)", False),
        ("MixtralConfig8x7B({}flash_decode=False)", False),
        ("MixtralConfig8x7B({}flash_decode=True)", True),
        ("OptimizerConfig({}fp16=False)", False),
        ("DoRA({}dim=8)", False),
    ],
)
def test_a_value_that_is_the_default_is_not_told(tmp_path: Path, text: str, warned: bool) -> None:
    name = text.partition("(")[0]
    found = read(tmp_path, f"from nemo.collections.llm import {name}\n{text.format('')}\n")
    assert bool(said(found, "warned")) is warned, said(found, "warned")


def test_nothing_of_a_script_is_run_and_a_broken_one_is_named(tmp_path: Path) -> None:
    read(tmp_path, "raise SystemExit(3)\n")
    with pytest.raises(RecipeError, match=r"script\.py:1: not valid Python"):
        read(tmp_path, "from nemo import (\n")
    with pytest.raises(RecipeError, match=r"script\.py:1: not valid Python"):
        read(tmp_path, "import nemo\0")
    with pytest.raises(RecipeError, match="no such file or folder"):
        scripts_in(tmp_path / "none")


def test_a_mark_at_the_beginning_is_no_part_of_the_script(tmp_path: Path) -> None:
    found = read(tmp_path, "\ufefffrom nemo.collections import llm\n")
    assert found.source == "import mixtral_recipes as llm\n"


def test_lines_are_counted_as_python_counts_them(tmp_path: Path) -> None:
    found = read(tmp_path, "a = 1\n\f\nfrom nemo.collections import llm\n")
    assert found.source == "a = 1\n\f\nimport mixtral_recipes as llm\n"


@pytest.mark.parametrize(
    "text",
    [
        "x = '''a\n{}'''.format(llm.gone)\n",
        "x = f'''a\n{llm.gone}'''\n",
        "x = '''a\n'''; y = llm.gone\n",
        "x = 1 + \\\n    2 + \\\n    llm.gone\n",
        "x = [\n    1,\n    llm.gone,\n]\n",
        "if x:\n    pass\nelif llm.gone:\n    pass\n",
    ],
)
def test_a_remark_changes_nothing_of_a_script(tmp_path: Path, text: str) -> None:
    (tmp_path / "script.py").write_text("from nemo.collections import llm\n" + text)
    made = migrate(tmp_path / "script.py")
    assert made.source.count(f"{MARK} gone is not available") == 1
    assert ast.dump(ast.parse(made.source)) == ast.dump(ast.parse("import mixtral_recipes as llm\n" + text))


def test_lines_with_other_alphabets_stay_whole(tmp_path: Path) -> None:
    found = read(tmp_path, 'name = "混合"; from nemo.collections import llm\n')
    assert found.source == 'name = "混合"; import mixtral_recipes as llm\n'


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("recipe.trainer.precision: str = 'bf16'", "refused"),
        ("setattr(recipe.trainer, 'precision', 'bf16')", "refused"),
        ("setattr(recipe.trainer, name, 'bf16')", None),
        ("recipe.trainer.benchmark |= True", "warned"),
        ("recipe.trainer.accumulate_grad_batches *= 2", "note"),
        ("recipe.trainer.max_steps += 1", None),
        ("recipe.trainer.precision: str", None),
        ("recipe.trainer.benchmark = {[]: 1}", "warned"),
    ],
)
def test_a_setting_is_read_however_it_is_assigned(tmp_path: Path, line: str, told: str | None) -> None:
    (tmp_path / "script.py").write_text(f"recipe = make()\n{line}\n")
    assert [(found.line, found.kind) for found in migrate(tmp_path / "script.py").findings] == [(2, told)] * bool(told)


def test_a_search_for_nemos_last_checkpoint_is_noted(tmp_path: Path) -> None:
    (note,) = said(read(tmp_path, "last = [each for each in names if each.endswith('-last')]\n"), "note")
    assert note == "-last: no checkpoint has this name; use the run's name or folder for its newest checkpoint"


def test_an_import_whose_module_is_on_another_line_is_left_to_the_user(tmp_path: Path) -> None:
    found = read(tmp_path, "from \\\n    nemo.collections import llm\n")
    assert said(found, "refused") == ["`from nemo.collections import` spans several lines; join them and migrate again"]


def test_a_variable_of_two_classes_is_not_judged(tmp_path: Path) -> None:
    text = "from nemo import lightning as nl\nx = nl.Trainer()\nx = nl.NeMoLogger()\nx.max_epochs = 3\n"
    assert said(read(tmp_path, text), "refused") == []

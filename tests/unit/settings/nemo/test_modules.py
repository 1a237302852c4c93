"""NeMo's module paths, with ``nemo`` changed to ``mixtral_recipes``, and the names its Mixtral scripts import."""

import importlib
import pickle
import subprocess
import sys
import warnings
from types import ModuleType

import fiddle as fdl
import nemo_run as run
import pytest

import mixtral_recipes as llm
from mixtral_recipes.errors import MixtralRecipesWarning
from mixtral_recipes.settings.nemo.modules import NotHere
from mixtral_recipes.settings.nemo.names import MODULES, NAMES
from mixtral_recipes.settings.nemo.rules import Base, Ignored, Only, Renamed

# What NeMo's Mixtral recipes, their tests, scripts/llm, scripts/performance and the Mixtral pretraining test import.
IMPORTED = """
collections llm
collections.llm MixtralConfig8x3B MixtralConfig8x7B MixtralModel PreTrainingDataModule peft recipes import_ckpt
collections.llm mixtral_8x7b mixtral_8x22b_64k torchrun default_log default_resume adam api
collections.llm.api train pretrain finetune validate generate evaluate import_ckpt export_ckpt
collections.llm.evaluation.api ApiEndpoint ConfigParams EvaluationConfig EvaluationTarget
collections.llm.gpt.data.chat ChatDataModule
collections.llm.gpt.data.fine_tuning FineTuningDataModule
collections.llm.gpt.data.mock MockDataModule
collections.llm.gpt.data.packed_sequence PackedSequenceSpecs
collections.llm.gpt.data.squad SquadDataModule
collections.llm.gpt.model GPTModel
collections.llm.gpt.model.mixtral MixtralConfig MixtralConfig8x3B MixtralConfig8x7B MixtralConfig8x22B MixtralModel
collections.llm.peft LoRA DoRA PEFT_STR2CLS
collections.llm.peft.lora LoRA
collections.llm.recipes mixtral_8x7b mixtral_8x7b_16k mixtral_8x7b_64k mixtral_8x22b mixtral_8x22b_64k adam torchrun
collections.llm.recipes.finetune_default default_finetune_recipe default_finetune_trainer default_finetune_log
collections.llm.recipes.finetune_default nemo_resume hf_resume lora dora
collections.llm.recipes.llama3_8b MegatronCommOverlapCallback
collections.llm.recipes.log.default default_log default_resume tensorboard_logger wandb_logger
collections.llm.recipes.mixtral_8x7b NAME model trainer pretrain_recipe pretrain_performance_optimizations
collections.llm.recipes.mixtral_8x7b finetune_recipe
collections.llm.recipes.optim.adam distributed_fused_adam_with_cosine_annealing
collections.llm.recipes.precision.mixed_precision bf16_mixed fp16_mixed bf16_with_fp8_mixed bf16_with_mxfp8_mixed
collections.llm.recipes.precision.mixed_precision bf16_with_fp8_current_scaling_mixed
collections.llm.recipes.precision.mixed_precision bf16_with_fp8_subchannel_scaling_mixed
collections.llm.recipes.run.executor torchrun
collections.common.tokenizers.huggingface AutoTokenizer
collections.nlp.modules.common.tokenizer_utils get_nmt_tokenizer
lightning AutoResume MegatronMixedPrecision MegatronOptimizerModule MegatronStrategy ModelCheckpoint NeMoLogger
lightning RestoreConfig Trainer lr_scheduler pytorch run
lightning.base DEFAULT_NEMO_CACHE_HOME
lightning.pytorch.callbacks ModelCheckpoint NsysCallback PreemptionCallback MemoryProfileCallback
lightning.pytorch.callbacks.flops_callback FLOPsMeasurementCallback
lightning.pytorch.callbacks.garbage_collection GarbageCollectionCallback
lightning.pytorch.callbacks.megatron_comm_overlap MegatronCommOverlapCallback
lightning.pytorch.callbacks.model_checkpoint ModelCheckpoint
lightning.pytorch.callbacks.moe_token_drop MegatronTokenDropCallback
lightning.pytorch.optim CosineAnnealingScheduler WarmupPolicyScheduler WarmupAnnealingScheduler
lightning.pytorch.optim.megatron MegatronOptimizerModule OptimizerConfig
lightning.run.plugins NsysPlugin PerfEnvPlugin MemoryProfilePlugin PreemptionPlugin WandbPlugin ConfigValidationPlugin
lightning.run.plugins FaultTolerancePlugin
utils logging
utils.exp_manager TimingCallback
"""
CASES = [(line.split()[0], name) for line in IMPORTED.strip().splitlines() for name in line.split()[1:]]


@pytest.mark.parametrize(("module", "name"), CASES, ids=[".".join(case) for case in CASES])
def test_one_changed_word_is_enough(module: str, name: str) -> None:
    found: dict[str, object] = {}
    exec(f"from mixtral_recipes.{module} import {name}", found)
    assert found[name] is not None
    if hasattr(llm, name) and not isinstance(found[name], ModuleType):  # a module of NeMo's path stands for ours
        assert found[name] is getattr(llm, name)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_of_the_table_is_there(module: str) -> None:
    assert importlib.import_module(f"mixtral_recipes.{module}").__name__ == f"mixtral_recipes.{module}"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_the_table_says(name: str) -> None:
    rule = NAMES[name]
    if isinstance(rule, Only):
        with pytest.raises(NotHere, match=f"{name} is not available in mixtral-recipes: ") as refused:
            getattr(llm, name)
        assert rule.why in str(refused.value)
        with pytest.raises(ImportError, match=f"{name} is not available in mixtral-recipes"):
            exec(f"from mixtral_recipes.collections.llm import {name}")
    elif isinstance(rule, Base):
        base = getattr(llm, name)
        assert type("Mine", (base,), {})()
        assert pickle.loads(pickle.dumps(base)) is base
    elif isinstance(rule, Renamed):
        assert getattr(llm, name) is getattr(llm, rule.to)
    else:
        assert isinstance(rule, Ignored)
        with pytest.warns(MixtralRecipesWarning, match=f"{name} has no effect: "):
            made = getattr(llm, name)("anything", of_any="name")
        assert type(pickle.loads(pickle.dumps(made))) is type(made)


def test_a_callback_that_has_nothing_to_do_can_stand_in_a_recipe() -> None:
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    recipe = llm.mixtral_8x7b.pretrain_recipe()
    recipe.trainer.callbacks.append(run.Config(llm.FLOPsMeasurementCallback, model_name="mixtral"))  # pyright: ignore[reportAttributeAccessIssue]
    stored = ZlibJSONSerializer().serialize(recipe.trainer.callbacks[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert type(fdl.build(ZlibJSONSerializer().deserialize(stored))).__name__ == "FLOPsMeasurementCallback"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "import mixtral_recipes.collections.llm.gpt.model.llama",
            r"nemo\.collections\.llm\.gpt\.model\.llama is not available in mixtral-recipes: ",
        ),
        (
            "from mixtral_recipes.collections.llm.recipes import llama3_70b",
            "recipes.llama3_70b is not available in mixtral-recipes: mixtral-recipes has",
        ),
        ("from mixtral_recipes.collections.llm import LlamaModel", "docs/reference/nemo.md lists it"),
        ("from mixtral_recipes.export.tensorrt_llm import TensorRTLLM", "vllm serve FOLDER"),
        ("from mixtral_recipes.deploy import DeployPyTriton", "vllm serve FOLDER"),
        (
            "from mixtral_recipes.collections.llm.tools.auto_configurator import AutoConfigurator",
            "mixtral-recipes plan",
        ),
        ("from mixtral_recipes.collections.llm.modelopt import PruningConfig", "ModelOpt"),
        ("from mixtral_recipes.utils.get_rank import is_global_rank_zero", "torch.distributed.get_rank"),
        ("from mixtral_recipes.lightning.io import load_context", "context folder holds its settings"),
        ("from mixtral_recipes.lightning.pytorch.callbacks.deepep import DeepEPCallback", "moe_enable_deepep"),
    ],
)
def test_what_is_nowhere_is_an_import_error_that_says_what_to_do(line: str, told: str) -> None:
    with pytest.raises(ImportError, match=told):
        exec(line, {})


def test_an_attribute_that_is_nowhere_can_be_asked_for() -> None:
    assert not hasattr(llm, "llama3_70b")  # NeMo's scripts/llm/pretraining.py asks so
    with pytest.raises(AttributeError, match=r"reference/nemo\.md"):
        llm.llama3_70b  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_the_table_of_names_loads_nothing_heavy() -> None:
    code = (
        "import sys, mixtral_recipes.settings.nemo.names, mixtral_recipes.settings.nemo.arguments\n"
        "print([m for m in ('torch', 'nemo_run', 'megatron', 'fiddle') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"

"""Megatron's settings: each is read by what trains a Mixtral, or has a rule that says why it is not."""

import ast
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import fiddle as fdl
import megatron.core
import nemo_run as run
import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.models.config import MixtralConfig
from mixtral_recipes.overrides import paths
from mixtral_recipes.overrides.completion import PATHS
from mixtral_recipes.overrides.loading import load
from mixtral_recipes.settings.check import check_settings
from mixtral_recipes.settings.nemo.arguments import CALLS
from mixtral_recipes.settings.nemo.megatron import DDP, MODEL, OPTIMIZER
from mixtral_recipes.settings.nemo.rules import Rule
from tests.unit.settings.field_reads import sources

MEGATRON = Path(next(iter(megatron.core.__path__)))
# Other models, generating, CUDA graphs, FSDP, the schedule that overlaps the experts' exchange, and layers of which we
# have our own or Transformer Engine's.
NOT_FOR_A_MIXTRAL = (
    "inference", "ssm", "export", "post_training", "datasets", "tokenizers", "distributed/fsdp", "models/T5",
    "models/bert", "models/hybrid", "models/huggingface", "models/mimo", "models/multimodal", "models/vision",
    "transformer/experimental_attention_variant", "transformer/multi_latent_attention.py",
    "transformer/multi_token_prediction.py", "transformer/cuda_graphs.py", "full_cuda_graph.py",
    "optimizer/optimizer_cuda_graph.py", "transformer/moe/shared_experts.py", "transformer/moe/paged_stash.py",
    "models/gpt/gpt_layer_specs.py", "models/gpt/experimental_attention_variant_module_specs.py",
    "models/gpt/moe_module_specs.py", "models/gpt/fine_grained_callables.py",
    "models/common/model_chunk_schedule_plan.py", "pipeline_parallel/combined_1f1b.py",
    "pipeline_parallel/hybrid_cp_schedule.py", "transformer/dot_product_attention.py", "fusions/fused_layer_norm.py",
    "transformer/torch_norm.py", "tensor_parallel/inference_layers.py", "fp4_utils.py", "optimizer/qk_clip.py",
    "transformer/mla_qk_norm_config.py", "transformer/moe/token_dispatcher_inference.py", "parallel_state.py",
    "transformer/moe/upcycling_utils.py", "tensor_parallel/random.py",
    "transformer/transformer_config.py", "model_parallel_config.py", "optimizer/optimizer_config.py",
    "distributed/distributed_data_parallel_config.py",
)  # fmt: skip
# Read where a configuration is made, to set another field: older names, and standard deviations.
SETS_ANOTHER = {
    "enable_cuda_graph", "external_cuda_graph", "cuda_graph_scope", "moe_enable_deepep", "moe_deepep_num_sms",
    "moe_hybridep_num_sms", "moe_router_padding_for_fp8", "init_method_std", "embedding_init_method_std",
    "disable_bf16_reduced_precision_matmul",
}  # fmt: skip
CLASSES: dict[Any, dict[str, Rule]] = {
    MixtralConfig: MODEL,
    DistributedDataParallelConfig: DDP,
    OptimizerConfig: OPTIMIZER,
}


@functools.cache
def read() -> frozenset[str]:
    """Every attribute's name, and every name in quotes, in the files that a Mixtral trains with."""
    found: set[str] = set()
    theirs = [path for path in MEGATRON.rglob("*.py") if not _apart(path.relative_to(MEGATRON).as_posix())]
    ours = [path for path in sources() if "settings/nemo" not in path.as_posix()]
    for path in theirs + ours:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return frozenset(found)


def _apart(path: str) -> bool:
    return any(path == each or path.startswith(f"{each}/") for each in NOT_FOR_A_MIXTRAL)


def without_a_word(cls: Any, rules: dict[str, Rule]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.name not in {*rules, *SETS_ANOTHER} and f.name not in read()]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_setting_is_read_or_has_a_rule(cls: Any) -> None:
    assert without_a_word(cls, CLASSES[cls]) == [], "nothing that trains a Mixtral reads it, and no rule says so"


def test_a_setting_of_a_newer_megatron_is_noticed() -> None:
    @dataclasses.dataclass
    class Newer(OptimizerConfig):
        colour_of_the_gradients: str = "green"

    assert without_a_word(Newer, OPTIMIZER) == ["colour_of_the_gradients"]


def test_a_setting_that_is_named_instead_has_an_effect() -> None:
    told = {
        f"{name}.{argument}": path
        for name, call in CALLS.items()
        for argument, rule in call.rules.items()
        for path in re.findall(r"set ([a-z]+\.[\w.]+\w)", getattr(rule, "why", ""))
    }
    assert len(told) > 10
    assert {where: path for where, path in told.items() if path not in PATHS} == {}


# Setting, value, what is told or refused.
TOLD = [
    ("model.config.mtp_loss_scaling_factor", 0.5, "has no effect: Mixtral has no multi-token prediction"),
    ("model.config.moe_router_quantile_balancing_ema", 0.5, "has no effect: Mixtral's router has no bias"),
    ("model.config.fp8_recipe", "mxfp8", "has no effect: precision is set in trainer.plugins"),
    ("model.config.cuda_graph_warmup_steps", 4, "has no effect: CUDA graphs are not supported"),
    ("trainer.strategy.ddp.keep_fp8_transpose_cache", True, "has no effect: Megatron-FSDP is not used"),
    ("optim.config.overlap_param_gather", True, "set trainer.strategy.ddp.overlap_param_gather"),
    ("optim.config.loss_scale", 1.0, "has no effect: precision is set in trainer.plugins"),
]
REFUSED = [
    ("model.config.qk_clip", True, "is not supported (only False is): training does not clip queries and keys"),
    ("model.config.fp8", "hybrid", "is not supported (only None is): set trainer.plugins.fp8"),
    ("model.config.fp4", "e2m1", "is not supported (only None is): use trainer.plugins.fp8"),
    ("model.config.use_transformer_engine_op_fuser", True, "computed without their adapters"),
    ("model.config.overlap_moe_expert_parallel_comm", True, "does not interleave two microbatches"),
    ("model.config.mlp_chunks_for_training", 4, "padding would count as tokens"),
    ("model.config.hierarchical_context_parallel_sizes", [2, 2], "context parallelism has only one level"),
    ("model.config.num_layers_in_first_pipeline_stage", 4, "every pipeline stage has the same number of layers"),
    ("model.config.account_for_loss_in_pipeline_split", True, "every pipeline stage has the same number of layers"),
    ("model.config.defer_embedding_wgrad_compute", True, "set it in MegatronCommOverlapCallback"),
    ("trainer.strategy.ddp.use_megatron_fsdp", True, "Megatron-FSDP is not used"),
    ("trainer.strategy.ddp.num_distributed_optimizer_instances", 2, "spread over all data-parallel ranks"),
]


def checked(path: str, value: Any) -> list[str]:
    recipe = load("mixtral_8x7b", "pretrain")
    paths.set_value(recipe, path, value)
    assert isinstance(recipe, run.Partial)
    return check_settings(fdl.get_callable(recipe), fdl.ordered_arguments(recipe))


@pytest.mark.parametrize(("path", "value", "told"), TOLD, ids=[case[0] for case in TOLD])
def test_what_has_no_effect_is_told(path: str, value: Any, told: str) -> None:
    (notice,) = checked(path, value)
    assert notice.startswith(f"{path}=")
    assert told in notice


@pytest.mark.parametrize(("path", "value", "why"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_not_carried_out_is_refused(path: str, value: Any, why: str) -> None:
    with pytest.raises(RecipeError) as refused:
        checked(path, value)
    assert str(refused.value).startswith(f"{path}=")
    assert why in str(refused.value)

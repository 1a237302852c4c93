"""A random Hugging Face Mixtral and what transformers computes with it; runs in a rank's process (`harness.launch`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from torch import Tensor

from mixtral_recipes.checkpoints.checkpointer import Checkpointer, Position
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.checkpoints.lineage.identity import Identity
from mixtral_recipes.checkpoints.lineage.record import Lineage, Parent
from mixtral_recipes.cpu import device as cpu_device
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.models.config import MixtralConfig, MixtralModel
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.peft import LoRA, recorded
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.trainer import MegatronStrategy, Trainer
from mixtral_recipes.training import distributed
from mixtral_recipes.training.run import TrainingRun, build_run
from tests.distributed.small_run import SmallData, small_config

LR = 1e-3
CLIP = 1.0


@dataclass(frozen=True)
class Folders:
    """One model twice.

    Attributes:
        hf: As transformers saved it.
        megatron: The same, imported.
    """

    hf: Path
    megatron: Path


def make_model(folder: str) -> Folders:
    """Save a random model (4 layers, 8 experts, grouped-query, 101 tokens) and import it."""
    from transformers import MixtralConfig as HFConfig
    from transformers import MixtralForCausalLM

    cpu_device.deactivate()  # transformers shall find torch as it is
    torch.manual_seed(0)
    config = HFConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        rope_theta=1e4,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    model = MixtralForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # transformers starts them at 1, which would hide a norm that is left out
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    found = Folders(Path(folder) / "hf", Path(folder) / "megatron")
    model.save_pretrained(found.hf)
    import_checkpoint(str(found.hf), found.megatron, progress=False)
    return found


def hf_model(folders: Folders) -> Any:
    """The model in transformers, fp32."""
    from transformers import MixtralForCausalLM

    cpu_device.deactivate()
    return MixtralForCausalLM.from_pretrained(folders.hf, dtype=torch.float32, attn_implementation="eager")


def our_run(
    folders: Folders,
    layout: dict[str, Any] | None = None,
    *,
    peft: LoRA | None = None,
    config: MixtralConfig | None = None,
    data: SmallData | None = None,
) -> TrainingRun:
    """The model in Megatron, ready to train: constant learning rate, no weight decay, no auxiliary loss."""
    world = torch.distributed.get_world_size()
    trainer = Trainer(
        devices=world,
        strategy=MegatronStrategy(**(layout or {})),
        plugins=MegatronMixedPrecision(precision="32"),
    )
    data = data or SmallData()
    data.setup(None)
    optim = MegatronOptimizerModule(
        OptimizerConfig(
            lr=LR, weight_decay=0.0, adam_beta2=0.999, adam_eps=1e-8, clip_grad=CLIP, use_distributed_optimizer=True
        )
    )
    place = distributed.ProcessPlace.from_environment()
    distributed.initialize(trainer.topology(), place, torch.device("cpu"), seed=1)
    model = MixtralModel(config or small_config(moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0))
    return build_run(model, trainer, data, optim, device=torch.device("cpu"), peft=peft, weights=folders.megatron)


def save_adapters(folders: Folders, run: TrainingRun, peft: LoRA, saved: Path) -> Path:
    """Save a run's adapters in a run's folder ``saved``; returns the checkpoint."""
    base = Parent("base", lineage.read(folders.megatron), str(folders.megatron))
    saver = Checkpointer(
        saved,
        ModelCheckpoint(),
        model_name="adapted",
        model=run.model,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        adapters_only=True,
        context=folders.megatron / "context",
        facts={"peft": recorded(peft)},
        lineage=Lineage("adapter", Identity(), parents=(base,)),
    )
    return saver.save(Position(), {})


def tokens(rows: int = 3, length: int = 24) -> Tensor:
    """[rows, length] random tokens, always the same."""
    return torch.randint(0, 101, (rows, length), generator=torch.Generator().manual_seed(7))


def our_logits(run: TrainingRun, ids: Tensor) -> Tensor:
    """[rows, length, vocabulary] of a run in one pipeline stage."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    run.model[0].eval()
    with torch.no_grad():
        return run.model[0](ids, positions, None)[..., :101].float()

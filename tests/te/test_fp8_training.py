"""Training with weights in FP8, as on Blackwell: Megatron's distributed optimizer, buffers and gathering, on the CPU.

MXFP8 weights are gathered through the gradients' memory; here Megatron takes `fp8_on_cpu`'s tensors for such, and
products are computed in bf16.
"""

import contextlib
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig, param_and_grad_buffer
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import OptimizerConfig

from mixtral_recipes import api
from mixtral_recipes.cpu import device as cpu_device
from mixtral_recipes.data.modules.mock import MockDataModule
from mixtral_recipes.models.config import MixtralModel
from mixtral_recipes.settings.checkpoint import ModelCheckpoint
from mixtral_recipes.settings.log import NeMoLogger
from mixtral_recipes.settings.optim import MegatronOptimizerModule
from mixtral_recipes.settings.peft import LoRA
from mixtral_recipes.settings.precision import MegatronMixedPrecision
from mixtral_recipes.settings.resume import AutoResume, RestoreConfig
from mixtral_recipes.settings.trainer import MegatronStrategy, Trainer
from mixtral_recipes.training import optimizer, precision, run
from tests.distributed.tiny_job import tiny_config
from tests.te.fp8_on_cpu import in_fp8, stand_in_for_the_kernel


class Watcher:
    """What a run gave: losses by step, and the optimizer's weights, of those kept in FP8, when it began and ended."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.validations: dict[int, float] = {}
        self.first: dict[str, torch.Tensor] = {}
        self.last: dict[str, torch.Tensor] = {}

    def on_train_start(self, run: Any) -> None:
        self.first = self._main_weights(run)

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        self.losses[metrics["step"]] = metrics["loss"]

    def on_validation_end(self, run: Any, metrics: dict[str, Any]) -> None:
        self.validations[metrics["step"]] = metrics["val_loss"]

    def on_train_end(self, run: Any) -> None:
        self.last = self._main_weights(run)

    def _main_weights(self, run: Any) -> dict[str, torch.Tensor]:
        named = run.model[0].named_parameters()
        return {name: p.main_param.detach().clone() for name, p in named if is_float8tensor(p)}


def gather_as_mxfp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask of optimizer and buffers what MXFP8 weights ask; products stay in bf16."""
    ddp_fields, optimizer_fields = precision.ddp_fields, precision.optimizer_fields
    reuse = {"reuse_grad_buf_for_mxfp8_param_ag": True}
    gather = {"fp8_param_gather": True, **reuse}

    def ddp(plugins: Any, *, frozen: bool = False) -> dict[str, Any]:
        return ddp_fields(plugins, frozen=frozen) | ({} if frozen else gather)

    def optim(plugins: Any, *, frozen: bool = False) -> dict[str, Any]:
        return optimizer_fields(plugins, frozen=frozen) | ({} if frozen else {"fp8_recipe": "mxfp8", **reuse})

    monkeypatch.setattr(precision, "ddp_fields", ddp)
    monkeypatch.setattr(optimizer, "optimizer_fields", optim)


@pytest.fixture(autouse=True)
def attention_in_fp8(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Models whose attention's linear layers keep their weights in FP8."""
    stand_in_for_the_kernel(monkeypatch)
    build = run.build_model

    def build_in_fp8(*args: Any, **named: Any) -> list[Any]:
        chunks = build(*args, **named)
        for layer in chunks[0].decoder.layers:
            for linear in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj):
                attributes = vars(linear.weight)
                linear.weight = in_fp8(linear.weight)
                vars(linear.weight).update(attributes)
        return chunks

    monkeypatch.setattr(run, "build_model", build_in_fp8)
    gather_as_mxfp8(monkeypatch)
    monkeypatch.setattr(param_and_grad_buffer, "is_mxfp8tensor", is_float8tensor)
    yield
    cpu_device.deactivate()


def train(
    folder: Path, name: str, steps: int, *, overlap: bool, base: str | None = None, seed: int = 1, peft: Any = None
) -> tuple[Watcher, str]:
    """A short run; what it gave, and its last checkpoint."""
    watcher = Watcher()
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap
    )
    with contextlib.redirect_stdout(io.StringIO()):
        task = api.pretrain if peft is None else partial(api.finetune, peft=peft)
        run_dir = task(
            model=MixtralModel(tiny_config()),
            data=MockDataModule(
                vocab_size=2000, seq_length=32, micro_batch_size=1, global_batch_size=4, num_train_samples=60,
                num_val_samples=8,
            ),
            trainer=Trainer(
                accelerator="cpu", max_steps=steps, val_check_interval=2, limit_val_batches=1, callbacks=[watcher],
                plugins=MegatronMixedPrecision(precision="bf16-mixed"), strategy=MegatronStrategy(ddp=ddp), seed=seed,
            ),
            log=NeMoLogger(name=name, log_dir=str(folder), ckpt=ModelCheckpoint(every_n_train_steps=2)),
            optim=MegatronOptimizerModule(OptimizerConfig(lr=1e-2, bf16=True, use_distributed_optimizer=True)),
            resume=AutoResume(RestoreConfig(base) if base else None),
            tokenizer="embedded://mixtral_tiny",
        )  # fmt: skip
    return watcher, json.loads((run_dir / "result.json").read_text())["checkpoint"]


def test_casting_a_model_loses_nothing_that_was_said_of_its_weights() -> None:
    layer = torch.nn.Linear(32, 32, bias=False)
    weight: Any = in_fp8(torch.randn(32, 32).bfloat16())
    layer.weight = weight
    weight.allreduce = False
    values = weight.get_high_precision_init_val()
    optimizer.in_16_bits(tiny_config(bf16=True, params_dtype=torch.bfloat16), layer)
    assert layer.weight is weight
    assert is_float8tensor(weight)
    assert weight.allreduce is False
    assert weight.get_high_precision_init_val() is values


def test_gathering_during_the_forward_pass_changes_nothing(tmp_path: Path) -> None:
    plain, _ = train(tmp_path, "plain", 5, overlap=False)
    overlapping, _ = train(tmp_path, "overlapping", 5, overlap=True)
    assert len(plain.first) == 4
    assert overlapping.losses == plain.losses
    assert overlapping.validations == plain.validations
    assert plain.losses[5] < plain.losses[1]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, overlap: bool) -> None:
    whole, _ = train(tmp_path, "whole", 6, overlap=overlap)
    train(tmp_path, "parts", 3, overlap=overlap)
    late, _ = train(tmp_path, "parts", 6, overlap=overlap)
    for name, weight in late.last.items():
        assert torch.equal(weight, whole.last[name]), name


def test_training_starts_from_the_weights_that_were_read(tmp_path: Path) -> None:
    trained, checkpoint = train(tmp_path, "base", 2, overlap=False)
    tuned, _ = train(tmp_path, "tuned", 1, overlap=False, base=checkpoint, seed=2)
    for name, weight in tuned.first.items():
        torch.testing.assert_close(weight, trained.last[name], rtol=2**-3, atol=1e-3, msg=name)


def test_frozen_weights_are_cast_once_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last cast is before the first step; what Transformer Engine keeps for an optimizer is freed."""
    from transformer_engine.pytorch.tensor import float8_tensor

    _, base = train(tmp_path, "base", 2, overlap=False)
    casts: list[int] = []
    quantize = float8_tensor.tex.quantize

    def counted(source: Any, *args: Any, **named: Any) -> Any:
        casts.append(source.numel())
        return quantize(source, *args, **named)

    monkeypatch.setattr(float8_tensor.tex, "quantize", counted)
    seen: list[int] = []

    class Counter(Watcher):
        def on_train_start(self, run: Any) -> None:
            seen.append(len(casts))
            frozen = [p for p in run.model[0].parameters() if is_float8tensor(p)]
            assert len(frozen) == 4
            assert not any(hasattr(p, "_high_precision_init_val") for p in frozen)

        def on_train_end(self, run: Any) -> None:
            seen.append(len(casts))

    monkeypatch.setattr("tests.te.test_fp8_training.Watcher", Counter)
    lora = partial(LoRA, dim=4, target_modules=["linear_qkv", "linear_proj"])
    whole, _ = train(tmp_path, "whole", 4, overlap=False, base=base, peft=lora())
    assert seen == [8, 8]  # as the model is made, and as the checkpoint is read
    train(tmp_path, "parts", 2, overlap=False, base=base, peft=lora())
    late, _ = train(tmp_path, "parts", 4, overlap=False, base=base, peft=lora())
    assert late.losses == {step: whole.losses[step] for step in (3, 4)}

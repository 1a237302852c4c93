"""Training with weights in FP8, as on Blackwell: Megatron's distributed optimizer, buffers and gathering, on the CPU.

MXFP8 weights are gathered through the gradients' memory; here Megatron takes `fp8_on_cpu`'s tensors for such, and
products are computed in bf16.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig, param_and_grad_buffer
from megatron.core.fp8_utils import is_float8tensor

from mixtral_recipes.training import optimizer, precision, run
from tests.distributed.harness import launch
from tests.distributed.tiny_job import Job, silent, start, tiny_config
from tests.te.fp8_on_cpu import in_fp8, stand_in_for_the_kernel


class Watcher:
    """What a run gave: losses by step, and the optimizer's weights, of those kept in FP8, when it began and ended."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.validations: dict[int, float] = {}
        self.first: dict[str, torch.Tensor] = {}
        self.last: dict[str, torch.Tensor] = {}
        self.checkpoint = ""

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
        return {name: p.main_param.detach().clone() for name, p in named if is_float8tensor(p) and p.requires_grad}


class Casts:
    """How often weights were cast to FP8: until the first step, and until the end."""

    def __init__(self) -> None:
        from transformer_engine.pytorch.tensor import float8_tensor

        self.until: list[int] = []
        self._casts = 0
        quantize = float8_tensor.tex.quantize

        def counted(*args: Any, **named: Any) -> Any:
            self._casts += 1
            return quantize(*args, **named)

        float8_tensor.tex.quantize = counted

    def on_train_start(self, run: Any) -> None:
        self.until.append(self._casts)
        frozen = [p for p in run.model[0].parameters() if is_float8tensor(p)]
        assert len(frozen) == 4
        assert not any(hasattr(p, "_high_precision_init_val") for p in frozen)

    def on_train_end(self, run: Any) -> None:
        self.until.append(self._casts)


def gather_as_mxfp8() -> None:
    """Ask of optimizer and buffers what MXFP8 weights ask; products stay in bf16."""
    ddp_fields, optimizer_fields = precision.ddp_fields, precision.optimizer_fields
    reuse = {"reuse_grad_buf_for_mxfp8_param_ag": True}
    gather = {"fp8_param_gather": True, **reuse}

    def ddp(plugins: Any, *, frozen: bool = False) -> dict[str, Any]:
        return ddp_fields(plugins, frozen=frozen) | ({} if frozen else gather)

    def optim(plugins: Any, *, frozen: bool = False) -> dict[str, Any]:
        return optimizer_fields(plugins, frozen=frozen) | ({} if frozen else {"fp8_recipe": "mxfp8", **reuse})

    precision.ddp_fields = ddp
    optimizer.optimizer_fields = optim
    param_and_grad_buffer.is_mxfp8tensor = is_float8tensor


def attention_in_fp8() -> None:
    """Models whose attention's linear layers keep their weights in FP8, for the rest of this process."""
    stand_in_for_the_kernel(pytest.MonkeyPatch())
    build = run.build_model

    def build_in_fp8(*args: Any, **named: Any) -> list[Any]:
        chunks: list[Any] = build(*args, **named)
        for layer in chunks[0].decoder.layers:
            for linear in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj):
                attributes = vars(linear.weight)
                linear.weight = in_fp8(linear.weight)
                vars(linear.weight).update(attributes)
        return chunks

    run.build_model = build_in_fp8
    gather_as_mxfp8()


def on_one_rank(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns that is called on one rank whose models are in FP8."""
    (found,) = launch(1, _in_fp8, function, *args)
    return found


def _in_fp8(function: Callable[..., Any], *args: Any) -> Any:
    attention_in_fp8()
    with silent():
        return function(*args)


def train(folder: str, name: str, steps: int, *more: Any, overlap: bool = False, **fields: Any) -> Watcher:
    """A short run in this process.

    Args:
        folder: Of runs.
        name: The run's.
        steps: Where it ends.
        *more: Further callbacks.
        overlap: Whether gradients and weights travel while others are computed.
        **fields: Of the job.
    """
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap
    )
    job = Job(
        folder, name, steps, {"ddp": ddp}, every=2, optimizer={"bf16": True}, precision="bf16-mixed",
        **{"trainer": {"val_check_interval": 2}, **fields},
    )  # fmt: skip
    watcher = Watcher()
    watcher.checkpoint = start(job, watcher, *more).result["checkpoint"]
    return watcher


def test_casting_a_model_loses_nothing_that_was_said_of_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_the_kernel(monkeypatch)
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


def with_and_without_overlap(folder: str) -> tuple[Watcher, Watcher]:
    """The same run, its weights gathered after each step and during the next."""
    return train(folder, "plain", 5), train(folder, "overlapping", 5, overlap=True)


def test_gathering_during_the_forward_pass_changes_nothing(tmp_path: Path) -> None:
    plain, overlapping = on_one_rank(with_and_without_overlap, str(tmp_path))
    assert len(plain.first) == 4
    assert overlapping.losses == plain.losses
    assert overlapping.validations == plain.validations
    assert plain.losses[5] < plain.losses[1]


def whole_and_in_parts(folder: str, overlap: bool) -> tuple[Watcher, Watcher]:
    """A run of six steps, and the second half of one that was interrupted."""
    whole = train(folder, "whole", 6, overlap=overlap)
    train(folder, "parts", 3, overlap=overlap)
    return whole, train(folder, "parts", 6, overlap=overlap)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, overlap: bool) -> None:
    whole, late = on_one_rank(whole_and_in_parts, str(tmp_path), overlap)
    assert len(late.last) == 4
    for name, weight in late.last.items():
        assert torch.equal(weight, whole.last[name]), name


def trained_and_tuned(folder: str) -> tuple[Watcher, Watcher]:
    """A run, and one that starts from its weights."""
    trained = train(folder, "base", 2)
    return trained, train(folder, "tuned", 1, base=trained.checkpoint, trainer={"seed": 2})


def test_training_starts_from_the_weights_that_were_read(tmp_path: Path) -> None:
    trained, tuned = on_one_rank(trained_and_tuned, str(tmp_path))
    assert len(tuned.first) == 4
    for name, weight in tuned.first.items():
        torch.testing.assert_close(weight, trained.last[name], rtol=2**-3, atol=1e-3, msg=name)


def adapters_whole_and_in_parts(folder: str) -> tuple[list[int], Watcher, Watcher]:
    """Casts of a run with adapters over a frozen base, its outcome, and that of one in two parts."""
    fields = {"base": train(folder, "base", 2).checkpoint, "lora": True}
    casts = Casts()
    whole = train(folder, "whole", 4, casts, **fields)
    found = list(casts.until)
    train(folder, "parts", 2, **fields)
    return found, whole, train(folder, "parts", 4, **fields)


def test_frozen_weights_are_cast_once_as_they_are_read(tmp_path: Path) -> None:
    """The last cast is before the first step; what Transformer Engine keeps for an optimizer is freed."""
    casts, whole, late = on_one_rank(adapters_whole_and_in_parts, str(tmp_path))
    assert casts == [8, 8]  # as the model is made, and as the checkpoint is read
    assert late.losses == {step: whole.losses[step] for step in (3, 4)}

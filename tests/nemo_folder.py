"""Synthetic NeMo 2.0 checkpoints: weights by torch's own writer, io.json by fiddle itself.

Nothing of the code under test is used.
"""

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest
import torch
from fiddle._src.experimental import serialization

from tests.mixtral_folder import Tensors
from tests.torch_dist import halves, save_boxes

for _dtype in ("bfloat16", "float16", "float32"):
    serialization.register_constant("torch", _dtype, compare_by_identity=True)


@dataclasses.dataclass
class _Config:
    """Every field of NeMo's Mixtral configuration that a test sets; defaults as NeMo's."""

    num_layers: int = 32
    hidden_size: int = 4096
    num_attention_heads: int = 32
    num_query_groups: int = 8
    ffn_hidden_size: int = 14336
    kv_channels: int | None = None
    max_position_embeddings: int = 4096
    seq_length: int = 4096
    num_moe_experts: int = 8
    moe_router_topk: int = 2
    moe_router_load_balancing_type: str = "aux_loss"
    moe_router_pre_softmax: bool = False
    moe_aux_loss_coeff: float = 0.01
    init_method_std: float = 0.02
    layernorm_epsilon: float = 1e-5
    rotary_base: float = 1000000.0
    rotary_percent: float = 1.0
    normalization: str = "RMSNorm"
    position_embedding_type: str = "rope"
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    share_embeddings_and_output_weights: bool = False
    qk_l2_norm: bool = False
    qk_layernorm: bool = False
    softmax_type: str = "vanilla"
    activation_func: Any = torch.nn.functional.silu
    make_vocab_size_divisible_by: int = 128
    bf16: bool = True
    fp16: bool = False
    params_dtype: torch.dtype = torch.bfloat16
    vocab_size: int | None = None


@dataclasses.dataclass
class _Model:
    config: Any = None
    optim: Any = None
    tokenizer: Any = None
    model_transform: Any = None


@dataclasses.dataclass
class _Context:
    model: Any
    trainer: Any = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Tokenizer:
    pretrained_model_name: str
    use_fast: bool = True


@dataclasses.dataclass
class _LoRA:
    target_modules: list[str] = dataclasses.field(
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    )
    dim: int = 32
    alpha: int = 32
    dropout: float = 0.0
    dropout_position: str = "pre"


@dataclasses.dataclass
class _DoRA(_LoRA):
    alpha: int = 64


@dataclasses.dataclass
class _Anything:
    devices: int = 1
    accelerator: str = "cpu"
    strategy: Any = None
    ckpt_save_optimizer: bool = False
    always_save_context: bool = True


_CLASSES = {
    "nemo.collections.llm.gpt.model.mixtral.MixtralConfig": _Config,
    "nemo.collections.llm.gpt.model.mixtral.MixtralConfig8x7B": _Config,
    "nemo.collections.llm.gpt.model.mixtral.MixtralConfig8x22B": _Config,
    "nemo.collections.llm.gpt.model.mixtral.MixtralModel": _Model,
    "nemo.collections.llm.gpt.model.base.GPTConfig": _Config,
    "nemo.collections.llm.gpt.model.base.GPTModel": _Model,
    "nemo.lightning.io.pl.TrainerContext": _Context,
    "nemo.lightning.pytorch.trainer.Trainer": _Anything,
    "nemo.lightning.pytorch.strategies.megatron_strategy.MegatronStrategy": _Anything,
    "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer": _Tokenizer,
    "nemo.collections.llm.peft.lora.LoRA": _LoRA,
    "nemo.collections.llm.peft.dora.DoRA": _DoRA,
}


class Nemo:
    """NeMo's classes, as far as a checkpoint's context names them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._classes: dict[str, type] = {}
        for name, stand_in in _CLASSES.items():
            module, _, symbol = name.rpartition(".")
            if module not in sys.modules:
                monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
            made = dataclasses.make_dataclass(symbol, [], bases=(stand_in,))
            made.__module__, made.__qualname__ = module, symbol
            setattr(sys.modules[module], symbol, made)
            self._classes[symbol] = made

    def call(self, symbol: str, **arguments: Any) -> Any:
        """A configured call of a class, as NeMo captures it."""
        return fdl.Config(self._classes[symbol], **arguments)

    def context(self, model: Any) -> str:
        """io.json."""
        trainer = self.call("Trainer", strategy=self.call("MegatronStrategy"))
        return serialization.dump_json(self.call("TrainerContext", model=model, trainer=trainer))

    def built(self, text: str) -> Any:
        """What fiddle, which runs what a file names, makes of an io.json."""
        return fdl.build(serialization.load_json(text))


@pytest.fixture
def nemo(monkeypatch: pytest.MonkeyPatch) -> Nemo:
    """Stand-ins for NeMo's classes, importable under NeMo's names."""
    return Nemo(monkeypatch)


def nemo_fields(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json in NeMo's spelling."""
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "num_moe_experts": config["num_local_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_aux_loss_coeff": config["router_aux_loss_coef"],
        "max_position_embeddings": config["max_position_embeddings"],
        "rotary_base": config["rope_theta"],
        "vocab_size": config["vocab_size"],
    }


def nemo_tensors(config: dict[str, Any], hf: Tensors, prefix: str = "module.") -> Tensors:
    """A Hugging Face model's tensors as NeMo saves them: stacked, q, k and v by group, the vocabulary padded."""
    layers, experts = range(config["num_hidden_layers"]), range(config["num_local_experts"])
    groups = config["num_key_value_heads"]
    padding = -config["vocab_size"] % 128

    def stacked(make: Any) -> torch.Tensor:
        return torch.stack([make(f"model.layers.{layer}.") for layer in layers])

    def qkv(at: str) -> torch.Tensor:
        parts = [hf[f"{at}self_attn.{name}_proj.weight"].chunk(groups) for name in "qkv"]
        return torch.cat([part for group in zip(*parts, strict=True) for part in group])

    def fc1(at: str) -> torch.Tensor:
        moe = at + "block_sparse_moe.experts."
        return torch.stack([torch.cat([hf[f"{moe}{e}.w1.weight"], hf[f"{moe}{e}.w3.weight"]]) for e in experts])

    def fc2(at: str) -> torch.Tensor:
        return torch.stack([hf[f"{at}block_sparse_moe.experts.{e}.w2.weight"] for e in experts])

    layer = prefix + "decoder.layers."
    return {
        prefix + "embedding.word_embeddings.weight": torch.nn.functional.pad(
            hf["model.embed_tokens.weight"], (0, 0, 0, padding), value=7.0
        ),
        layer + "self_attention.linear_qkv.layer_norm_weight": stacked(lambda at: hf[at + "input_layernorm.weight"]),
        layer + "self_attention.linear_qkv.weight": stacked(qkv),
        layer + "self_attention.linear_proj.weight": stacked(lambda at: hf[at + "self_attn.o_proj.weight"]),
        layer + "pre_mlp_layernorm.weight": stacked(lambda at: hf[at + "post_attention_layernorm.weight"]),
        layer + "mlp.router.weight": stacked(lambda at: hf[at + "block_sparse_moe.gate.weight"]),
        layer + "mlp.experts.experts.linear_fc1.weight": stacked(fc1),
        layer + "mlp.experts.experts.linear_fc2.weight": stacked(fc2),
        prefix + "decoder.final_layernorm.weight": hf["model.norm.weight"],
        prefix + "output_layer.weight": torch.nn.functional.pad(hf["lm_head.weight"], (0, 0, 0, padding), value=7.0),
    }


def write_weights(folder: Path, tensors: Tensors, axis: int = 0) -> None:
    """``weights/``: every tensor in two boxes, an optimizer's state, and what Megatron writes beside them."""
    moments = {f"optimizer.state.exp_avg.{name}": tensor.float() for name, tensor in list(tensors.items())[:3]}
    state = {name: tensor.contiguous() for name, tensor in (tensors | moments).items()}
    save_boxes(state, {name: halves(tuple(t.shape), min(axis, t.dim() - 1)) for name, t in state.items()}, folder)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    torch.save({"epoch": 0, "global_step": 10}, folder / "common.pt")


def write_nemo(folder: Path, context: str, tensors: Tensors, *, axis: int = 0, tokenizer: Path | None = None) -> Path:
    """A checkpoint as NeMo saves it.

    Args:
        folder: To make.
        context: io.json.
        tensors: Under NeMo's names.
        axis: Along which each is cut in two.
        tokenizer: A folder whose tokenizer files go into ``context/nemo_tokenizer``.
    """
    write_weights(folder / "weights", tensors, axis)
    (folder / "context" / "nemo_tokenizer").mkdir(parents=True)
    (folder / "context" / "io.json").write_text(context)
    for path in sorted(tokenizer.glob("tokenizer*")) if tokenizer else []:
        (folder / "context" / "nemo_tokenizer" / path.name).write_bytes(path.read_bytes())
    return folder

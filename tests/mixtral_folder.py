"""Synthetic Mixtrals in Hugging Face's form, written without the code under test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def mixtral_config(**fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 300,  # not a multiple of 128
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **fields,
    }


def mixtral_tensors(config: dict[str, Any], dtype: torch.dtype, layout: str = "v4", seed: int = 0) -> Tensors:
    """Random weights under Hugging Face's names, spelled out here once more on purpose."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    tensors = {"model.embed_tokens.weight": random(config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        tensors[at + "input_layernorm.weight"] = random(hidden)
        tensors[at + "self_attn.q_proj.weight"] = random(head * config["num_attention_heads"], hidden)
        tensors[at + "self_attn.k_proj.weight"] = random(head * config["num_key_value_heads"], hidden)
        tensors[at + "self_attn.v_proj.weight"] = random(head * config["num_key_value_heads"], hidden)
        tensors[at + "self_attn.o_proj.weight"] = random(hidden, head * config["num_attention_heads"])
        tensors[at + "post_attention_layernorm.weight"] = random(hidden)
        gate = random(config["num_local_experts"], hidden)
        experts = [(random(ffn, hidden), random(hidden, ffn), random(ffn, hidden)) for _ in gate]
        if layout == "v4":
            tensors[at + "block_sparse_moe.gate.weight"] = gate
            for number, expert in enumerate(experts):
                for name, weight in zip(("w1", "w2", "w3"), expert, strict=True):
                    tensors[f"{at}block_sparse_moe.experts.{number}.{name}.weight"] = weight
        else:
            tensors[at + "mlp.gate.weight"] = gate
            tensors[at + "mlp.experts.gate_up_proj"] = torch.stack([torch.cat([w1, w3]) for w1, _, w3 in experts])
            tensors[at + "mlp.experts.down_proj"] = torch.stack([w2 for _, w2, _ in experts])
    return tensors | {"model.norm.weight": random(hidden), "lm_head.weight": random(config["vocab_size"], hidden)}


def write_model(folder: Path, config: dict[str, Any], tensors: Tensors, *, shards: int = 1, kind: str = "st") -> Path:
    """A model folder: config, tokenizer stand-ins, and weights in one file or several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}\n')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (folder / "notes.txt").write_text("not part of the model\n")
    ending = "safetensors" if kind == "st" else "bin"
    stem = "model" if kind == "st" else "pytorch_model"
    names = list(tensors)
    files = {}
    for index in range(shards):
        file = f"{stem}.{ending}" if shards == 1 else f"{stem}-{index + 1:05d}-of-{shards:05d}.{ending}"
        part = {name: tensors[name] for name in names[index::shards]}
        if kind == "st":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
        files |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any], Tensors]]:
    """Write a synthetic model under the test's folder: ``make_model(layout="v5", shards=3, num_local_experts=4)``."""

    def make(
        name: str = "hf",
        *,
        layout: str = "v4",
        dtype: torch.dtype = torch.bfloat16,
        shards: int = 1,
        kind: str = "st",
        seed: int = 0,
        change: Callable[[Tensors], None] | None = None,
        **fields: Any,
    ) -> tuple[Path, dict[str, Any], Tensors]:
        config = mixtral_config(**fields)
        tensors = mixtral_tensors(config, dtype, layout, seed)
        if change:
            change(tensors)
        return write_model(tmp_path / name, config, tensors, shards=shards, kind=kind), config, tensors

    return make

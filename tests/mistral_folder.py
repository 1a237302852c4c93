"""Synthetic Mixtrals in Mistral's own form, made from Hugging Face's without the code under test."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.mixtral_folder import Tensors


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from halves (i, i + D/2 turn together) to neighbours (2i, 2i + 1 turn together)."""
    rows, hidden = weight.shape
    return weight.view(heads, 2, rows // heads // 2, hidden).transpose(1, 2).reshape(rows, hidden).contiguous()


def mistral_params(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "max_batch_size": 0,
        "moe": {"num_experts_per_tok": config["num_experts_per_tok"], "num_experts": config["num_local_experts"]},
        **fields,
    }


def mistral_tensors(config: dict[str, Any], hf: Tensors, *, stacked: bool = False) -> Tensors:
    """A Hugging Face model's tensors (v4) under Mistral's names, in Mistral's order of rows.

    Args:
        config: config.json of ``hf``.
        hf: The tensors.
        stacked: The first release's form: a layer's experts one below the other, the last projection transposed.
    """
    found = {
        "tok_embeddings.weight": hf["model.embed_tokens.weight"],
        "norm.weight": hf["model.norm.weight"],
        "output.weight": hf["lm_head.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        at, their = f"layers.{layer}.", f"model.layers.{layer}."
        moe = their + "block_sparse_moe."
        found |= {
            at + "attention_norm.weight": hf[their + "input_layernorm.weight"],
            at + "ffn_norm.weight": hf[their + "post_attention_layernorm.weight"],
            at + "attention.wq.weight": interleaved(
                hf[their + "self_attn.q_proj.weight"], config["num_attention_heads"]
            ),
            at + "attention.wk.weight": interleaved(
                hf[their + "self_attn.k_proj.weight"], config["num_key_value_heads"]
            ),
            at + "attention.wv.weight": hf[their + "self_attn.v_proj.weight"],
            at + "attention.wo.weight": hf[their + "self_attn.o_proj.weight"],
        }
        experts = range(config["num_local_experts"])
        if stacked:
            found[at + "block_sparse_moe.gate.weight"] = hf[moe + "gate.weight"]
            for name in ("w1", "w2", "w3"):
                parts = [hf[f"{moe}experts.{expert}.{name}.weight"] for expert in experts]
                parts = [part.T if name == "w2" else part for part in parts]
                found[f"{at}block_sparse_moe.{name}"] = torch.cat(parts).contiguous()
        else:
            found[at + "feed_forward.gate.weight"] = hf[moe + "gate.weight"]
            for expert in experts:
                for name in ("w1", "w2", "w3"):
                    weight = hf[f"{moe}experts.{expert}.{name}.weight"]
                    found[f"{at}feed_forward.experts.{expert}.{name}.weight"] = weight
    return found


def write_mistral(
    folder: Path,
    params: dict[str, Any],
    tensors: Tensors,
    *,
    kind: str = "safetensors",
    files: int = 1,
) -> Path:
    """A folder as Mistral publishes it.

    Args:
        folder: Made if it is not there.
        params: params.json.
        tensors: Under Mistral's names.
        kind: "safetensors", "pth" or "pt".
        files: How many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(b"not read by these tests")
    names = list(tensors)
    weight_map = {}
    for index in range(files):
        part = {name: tensors[name] for name in names[index::files]}
        if kind == "safetensors":
            file = (
                f"consolidated-{index + 1:05d}-of-{files:05d}.safetensors" if files > 1 else "consolidated.safetensors"
            )
            save_file(part, folder / file)
        else:
            file = f"consolidated.{index:02d}.{kind}"
            torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if kind == "safetensors" and files > 1:
        (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder

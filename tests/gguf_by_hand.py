"""A GGUF file made of a Hugging Face folder by gguf's own writer, spelled out without the code under test."""

import json
import platform
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file

needs_llama_cpp = pytest.mark.skipif(platform.machine() != "x86_64", reason="cyllama is built for x86_64 alone")
BY_HAND = {"f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a query or key weight's rows. Source: its convert_hf_to_gguf.py, permute."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def by_hand(hf: Path, kind: str) -> dict[str, tuple[tuple[int, ...], Type, bytes]]:
    """Name -> shape, type and bytes of every tensor."""
    config = json.loads((hf / "config.json").read_text())
    stored = {name: tensor.float().numpy() for name, tensor in load_file(hf / "model.safetensors").items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    found = {"token_embd": stored["model.embed_tokens.weight"]}
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}.", f"blk.{layer}."
        found[ours + "attn_norm"] = stored[theirs + "input_layernorm.weight"]
        found[ours + "attn_q"] = interleaved(stored[theirs + "self_attn.q_proj.weight"], heads)
        found[ours + "attn_k"] = interleaved(stored[theirs + "self_attn.k_proj.weight"], groups)
        found[ours + "attn_v"] = stored[theirs + "self_attn.v_proj.weight"]
        found[ours + "attn_output"] = stored[theirs + "self_attn.o_proj.weight"]
        found[ours + "ffn_norm"] = stored[theirs + "post_attention_layernorm.weight"]
        if theirs + "mlp.gate.weight" in stored:
            found[ours + "ffn_gate_inp"] = stored[theirs + "mlp.gate.weight"]
            gate_up = stored[theirs + "mlp.experts.gate_up_proj"]
            half = gate_up.shape[1] // 2
            found[ours + "ffn_gate_exps"], found[ours + "ffn_up_exps"] = gate_up[:, :half], gate_up[:, half:]
            found[ours + "ffn_down_exps"] = stored[theirs + "mlp.experts.down_proj"]
            continue
        moe = theirs + "block_sparse_moe."
        found[ours + "ffn_gate_inp"] = stored[moe + "gate.weight"]
        for name, part in (("ffn_gate_exps", "w1"), ("ffn_up_exps", "w3"), ("ffn_down_exps", "w2")):
            experts = range(config["num_local_experts"])
            found[ours + name] = np.stack([stored[f"{moe}experts.{expert}.{part}.weight"] for expert in experts])
    found |= {"output_norm": stored["model.norm.weight"], "output": stored["lm_head.weight"]}
    return {f"{name}.weight": encoded(name, values, kind) for name, values in found.items()}


def encoded(name: str, values: np.ndarray, kind: str) -> tuple[tuple[int, ...], Type, bytes]:
    chosen = BY_HAND[kind]
    if values.ndim == 1 or "ffn_gate_inp" in name:
        chosen = Type.F32
    elif kind == "q4_0" and (name == "output" or name.endswith(("attn_k", "attn_v"))):
        chosen = Type.Q8_0
    return values.shape, chosen, gguf.quants.quantize(np.ascontiguousarray(values), chosen).tobytes()


def write_by_hand(hf: Path, kind: str, metadata_of: Path, path: Path) -> Path:
    """A whole file: these tensors, behind another file's metadata; ``kind`` names the file type too."""
    reader: Any = gguf.GGUFReader(metadata_of)
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    for name, (shape, chosen, content) in by_hand(hf, kind).items():
        array = np.frombuffer(content, dtype=np.uint8)
        block, nbytes = gguf.GGML_QUANT_SIZES[chosen]
        writer.add_tensor(name, array.reshape(*shape[:-1], shape[-1] // block * nbytes), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_mixtral(folder: Path, tokenizer: str, **fields: Any) -> Path:
    """A random Mixtral as transformers saves it, with a tokenizer.

    Its routers are decided, as a trained one's: no rounding sends a token to another expert, which would hide the rest.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    from mixtral_recipes.data.tokenizers import load_tokenizer

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if ".gate." in name:
                parameter.mul_(20)
    model.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
    return folder

"""Checkpoints as Megatron-LM's training script saves them: weights and arguments in torch_dist.

Nothing of the code under test is used.
"""

import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from tests.mixtral_folder import Tensors
from tests.torch_dist import halves, save_boxes


def arguments(config: dict[str, Any], **changes: Any) -> Namespace:
    """What the script was started with, in the words of its newest release, for a model of this config.json."""
    stated: dict[str, Any] = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "moe_ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "group_query_attention": True,
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["hidden_size"] // config["num_attention_heads"],
        "num_experts": config["num_local_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_load_balancing_type": ["aux_loss"],
        "moe_aux_loss_coeff": [config["router_aux_loss_coef"]],
        "moe_layer_freq": 1,
        "max_position_embeddings": config["max_position_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": int(config["rope_theta"]),
        "rotary_percent": 1.0,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "layernorm_zero_centered_gamma": False,
        "init_method_std": 0.02,
        "attention_dropout": 0.0,
        "swiglu": True,
        "squared_relu": False,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "window_size": None,
        "make_vocab_size_divisible_by": 128,
        "tensor_model_parallel_size": 1,
        "padded_vocab_size": -(-config["vocab_size"] // 128) * 128,
        "tokenizer_type": "Llama2Tokenizer",
        "tokenizer_model": "/data/tokenizer.model",
        "params_dtype": torch.bfloat16,
        "exit_signal": signal.SIGTERM,
    }
    return Namespace(**(stated | changes))


def write_megatron_lm(
    folder: Path, tensors: Tensors, args: Namespace | None, *, in_a_file: bool = False, tokenizer: Path | None = None
) -> Path:
    """A training run's folder with one checkpoint.

    Args:
        folder: To make.
        tensors: Under Megatron's names.
        args: Of the script; None leaves them out.
        in_a_file: Whether they are in ``common.pt``, as up to Megatron-Core 0.18, and not among the weights.
        tokenizer: A folder whose tokenizer files are copied beside the checkpoint.
    """
    weights = folder / "iter_0000010"
    moments = {f"optimizer.state.exp_avg.{name}": tensor.float() for name, tensor in list(tensors.items())[:2]}
    state = {name: tensor.contiguous() for name, tensor in (tensors | moments).items()}
    common = {"checkpoint_version": 3.0, "iteration": 10} | ({"args": args} if args else {})
    objects = {} if in_a_file else {"common_state/shard_0_1": [common]}
    places = {name: halves(tuple(tensor.shape), 0) for name, tensor in state.items()}
    save_boxes(state, places, weights, objects)
    if in_a_file:
        torch.save(common, weights / "common.pt")
    (weights / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    for path in sorted(tokenizer.glob("tokenizer*")) if tokenizer else []:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder

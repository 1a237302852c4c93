"""What a NeMo 2.0 checkpoint's ``context/`` says of its model: sizes, tokenizer, adapters. Nothing in it is run.

``io.json`` is what NeMo itself loads, and goes first; ``model.yaml`` has the same and is read where it is missing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.nemo import fiddle_json
from mixtral_recipes.importers.nemo.fiddle_json import CALL, TARGET
from mixtral_recipes.system.yaml_files import load_plain

# What NeMo's classes set where the context is silent. Source: nemo/collections/llm/gpt/model/mixtral.py.
_MIXTRAL: dict[str, Any] = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "ffn_hidden_size": 14336,
    "kv_channels": None,
    "moe_ffn_hidden_size": None,
    "max_position_embeddings": 4096,
    "attention_dropout": 0.0,
    "num_moe_experts": 8,
    "moe_aux_loss_coeff": 0.01,
    "moe_router_topk": 2,
    "init_method_std": 0.02,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 1000000.0,
    "vocab_size": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "MixtralConfig": _MIXTRAL,
    "MixtralConfig8x3B": _MIXTRAL | {"hidden_size": 2560, "ffn_hidden_size": 8960},
    "MixtralConfig8x7B": _MIXTRAL,
    "MixtralConfig8x22B": _MIXTRAL
    | {"num_layers": 56, "hidden_size": 6144, "num_attention_heads": 48, "ffn_hidden_size": 16384},
}
_SILU = ("torch.nn.functional.silu", "torch._C._nn.silu", "torch.nn.modules.activation.SiLU")


@dataclass(frozen=True)
class Context:
    """The settings a checkpoint was saved with, in plain values.

    Attributes:
        file: Where they were read.
        model: ``{"_target_": NeMo's class, "config": ..., "tokenizer": ..., "model_transform": ...}``.
    """

    file: Path
    model: dict[str, Any]

    @property
    def config(self) -> tuple[str, dict[str, Any]]:
        """The configuration's class and its fields, NeMo's defaults filled in.

        Raises:
            CheckpointError: it is not one of NeMo's Mixtral configurations, or says more than can be read.
        """
        given = self.model.get("config")
        if given is None:
            return "MixtralConfig8x7B", dict(DEFAULTS["MixtralConfig8x7B"])  # NeMo's MixtralModel() without one
        if not isinstance(given, dict) or given.get(CALL) is False:
            raise CheckpointError(
                f"{self.file}: model.config is stored in a pickle, which mixtral-recipes does not open; save the "
                "checkpoint with a newer NeMo, or replace io.json with context/model.yaml."
            )
        name = str(given.get(TARGET)).rpartition(".")[2]
        if name not in DEFAULTS:
            raise CheckpointError(
                f"{self.file}: model.config is {given.get(TARGET)}; only NeMo's Mixtral ({', '.join(DEFAULTS)}) can be "
                "imported."
            )
        return name, DEFAULTS[name] | {key: value for key, value in given.items() if key != TARGET}

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's folder or file in ``context/``; None where there is none.

        Raises:
            CheckpointError: it is named outside ``context/``.
        """
        given = self.model.get("tokenizer")
        if not isinstance(given, dict):
            return None
        name = given.get("pretrained_model_name") or given.get("model_path")
        if not isinstance(name, str):  # an id on the Hub, which NeMo wraps, or none
            return None
        context = self.file.parent.resolve()
        path = (context / name).resolve()
        if not path.exists():
            return None
        if not path.is_relative_to(context):
            raise CheckpointError(f"{self.file}: refused, because its tokenizer {name!r} is outside the checkpoint.")
        return path

    def hf_config(self, vocab_size: int, dtype: str) -> dict[str, Any]:
        """A config.json for the same model.

        Args:
            vocab_size: Tokens of the vocabulary, without padding.
            dtype: What the weights are stored in, as torch spells it.

        Raises:
            CheckpointError: a field asks for something a Mixtral does not do.
        """
        _, fields = self.config
        activation = fields.get("activation_func")
        if activation is None or (isinstance(activation, dict) and activation.get(TARGET) in _SILU):
            fields = fields | {"activation_func": "silu"}
        return hf_config.of_a_mixtral(fields, f"{self.file}: model.config.", vocab_size=vocab_size, dtype=dtype)


def read_context(folder: Path) -> Context:
    """Read the context of a NeMo 2.0 checkpoint.

    Args:
        folder: The checkpoint.

    Raises:
        CheckpointError: it is missing, or does not belong to a NeMo Mixtral.
    """
    file = folder / "context" / "io.json"
    if file.is_file():
        model = fiddle_json.read(file, "model")
    else:
        file = folder / "context" / "model.yaml"
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; it says which model the weights belong to.")
        model = load_plain(file, CheckpointError, aliases=True)
    if not isinstance(model, dict) or str(model.get(TARGET)).rpartition(".")[2] != "MixtralModel":
        what = model.get(TARGET) if isinstance(model, dict) else type(model).__name__
        raise CheckpointError(f"{file}: the model is {what}; only NeMo's MixtralModel can be imported.")
    return Context(file, model)

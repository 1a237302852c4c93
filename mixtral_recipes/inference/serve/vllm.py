"""The command with which vLLM serves a model, or a model and an adapter that peft could load."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import RecipeError

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks
TOKEN = "MIXTRAL_RECIPES_TOKEN"


@dataclass(frozen=True)
class VLLM:
    """Settings for serving with vLLM.

    Attributes:
        model: A Hugging Face folder or Hub id (with ``@revision``), or a folder with an adapter in peft's form.
        name: What clients call the model.
        host: Where it listens.
        port: Likewise.
        devices: GPUs, the tensor-parallel size.
        context: The most tokens of a prompt and its continuation; None is the model's own.
        dtype: "bf16", "fp16" or "fp32"; None is the model's own.
        rows: The most rows that are continued together.
    """

    model: str
    name: str
    host: str
    port: int
    devices: int
    context: int | None
    dtype: str | None
    rows: int

    def words(self) -> list[str]:
        """The command, without the token, which goes by the environment.

        Raises:
            RecipeError: an adapter that vLLM does not support.
        """
        adapter = _adapter(Path(self.model))
        base = self.model if adapter is None else adapter["base_model_name_or_path"]
        base, _, revision = (base, "", "") if Path(base).is_dir() else base.partition("@")
        names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
        return [
            *("vllm", "serve", base, *(("--revision", revision) if revision else ())),
            *("--host", self.host, "--port", str(self.port)),
            *("--served-model-name", self.name if adapter is None else f"{self.name}-base"),
            *("--tensor-parallel-size", str(self.devices), "--max-num-seqs", str(self.rows)),
            *(("--max-model-len", str(self.context)) if self.context else ()),
            *(("--dtype", names.get(self.dtype, self.dtype)) if self.dtype else ()),
            *(() if adapter is None else ("--enable-lora", "--max-lora-rank", str(_rank(adapter, self.model)))),
            *(() if adapter is None else ("--lora-modules", f"{self.name}={Path(self.model).absolute()}")),
        ]

    def line(self, *, with_token: bool) -> str:
        """The same as a line for a shell."""
        return (f'VLLM_API_KEY="${TOKEN}" ' if with_token else "") + shlex.join(self.words())


def _adapter(folder: Path) -> dict[str, Any] | None:
    """What an adapter's folder says of it; None for a whole model.

    Raises:
        RecipeError: it does not say which model it adapts, or vLLM does not support it.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        base = found["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{file}: does not say which model it adapts ({error}).") from error
    if not isinstance(base, str) or not base:
        raise RecipeError(f"{file}: base_model_name_or_path must name the model it adapts.")
    if found.get("use_dora"):
        raise RecipeError(
            f"{folder} is a DoRA adapter, which vLLM does not support; merge it with `mixtral-recipes export`."
        )
    return found


def _rank(adapter: dict[str, Any], folder: str) -> int:
    ranks = [adapter.get("r"), *(adapter.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and 0 < rank <= _RANKS[-1] for rank in ranks):
        raise RecipeError(f"{folder}: vLLM supports ranks from 1 to {_RANKS[-1]}, not {ranks}.")
    largest = max(rank for rank in ranks if isinstance(rank, int))
    return next(allowed for allowed in _RANKS if allowed >= largest)

"""What computes a model on this machine: whose layers, which attention kernel, which cuDNN; and why not better ones."""

import logging
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mixtral_recipes.errors import EnvironmentProblem, in_short
from mixtral_recipes.models.config import MixtralConfig
from mixtral_recipes.system.machine import COMPILER, no_compiler, package_version

# Unfused attention keeps a score for every pair of tokens: at this length 4 GiB a layer with 32 heads in bf16.
LONGEST_UNFUSED = 8192
INSTALL = "pip install --no-build-isolation 'mixtral-recipes[gpu]'"  # it is built for the torch that is installed


@dataclass(frozen=True)
class Kernels:
    """What a run computes with.

    Attributes:
        layers: ``Transformer Engine`` and its version, or ``PyTorch``.
        attention: ``fused``, ``flash`` or ``unfused``; ``unknown`` if Transformer Engine does not say; ``sdpa`` for
            PyTorch's layers.
        cudnn: Version of the cuDNN that attention loads; None without one.
        notes: Why it is not better, and what would mend that.
    """

    layers: str
    attention: str
    cudnn: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        cudnn = f" (cuDNN {self.cudnn})" if self.cudnn else ""
        return f"layers: {self.layers}; attention: {self.attention}{cudnn}"


def transformer_engine_usable() -> bool:
    """Whether layers are built from Transformer Engine: there is a CUDA device, and it is installed.

    Raises:
        EnvironmentProblem: it is installed, and does not load.
    """
    if not torch.cuda.is_available() or find_spec("transformer_engine") is None:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]
    except Exception as error:  # a library that is missing or of another version: OSError, ImportError, RuntimeError
        raise EnvironmentProblem(
            f"Transformer Engine is installed but cannot be loaded ({in_short(error)}): reinstall it for this torch "
            "and CUDA, or uninstall it to train with PyTorch's own layers. See mixtral-recipes doctor."
        ) from error
    return True


def in_use(config: MixtralConfig, *, length: int, packed: bool) -> Kernels | None:
    """What a model of this configuration computes with on this machine; None on a CPU.

    Args:
        config: The model's, parallel sizes filled in.
        length: Tokens of a sequence, or of a pack.
        packed: Whether several samples share a sequence.

    Raises:
        EnvironmentProblem: Transformer Engine does not load, it has no kernel for attention, or attention would be
            unfused above `LONGEST_UNFUSED`.
    """
    if not torch.cuda.is_available():
        return None
    missing, left_out = no_compiler(), ()
    if missing:
        left_out = (f"{missing}: kernels that are compiled on first use are left out, which is slower; {COMPILER}",)
    if not transformer_engine_usable():
        note = f"Transformer Engine is not installed: no FP8, no grouped products, fewer fused kernels. {INSTALL}"
        return Kernels("PyTorch", "sdpa", notes=(note, *left_out))
    version = f"Transformer Engine {package_version('transformer-engine')}"
    cudnn, notes = _cudnn()
    notes = (*notes, *left_out)
    attention, reasons = _attention(config, length=length, packed=packed)
    if attention == "none":
        why = "; ".join(reasons) or "no reason is given"
        raise EnvironmentProblem(
            f"no attention kernel of Transformer Engine computes this model ({why}); set "
            "model.config.attention_backend=auto, and unset the environment variables NVTE_*_ATTN."
        )
    if attention == "unfused":
        why = "; ".join(reasons) or "no fused kernel supports it"
        notes = (*notes, f"attention is unfused ({why}): it stores a score for every pair of tokens")
        if length > LONGEST_UNFUSED:
            raise EnvironmentProblem(
                f"attention over {length:,} tokens would be unfused ({why}), which stores a score for every pair of "
                f"tokens and is refused above {LONGEST_UNFUSED:,} tokens. {_mend()}"
            )
    return Kernels(version, attention, cudnn, notes)


def _cudnn() -> tuple[str | None, tuple[str, ...]]:
    """The cuDNN Transformer Engine loads, and what is wrong with it."""
    from transformer_engine.pytorch.utils import get_cudnn_version  # pyright: ignore[reportMissingImports]

    loaded = ".".join(map(str, get_cudnn_version()))
    code = torch.backends.cudnn.version()
    torchs = f"{code // 10000}.{code // 100 % 100}.{code % 100}" if code else loaded
    if loaded == torchs:
        return loaded, ()
    return loaded, (f"two different cuDNNs: torch uses {torchs}, but Transformer Engine loads {loaded}. {_mend()}",)


def _mend() -> str:
    folder = Path(sysconfig.get_path("purelib"), "nvidia", "cudnn")
    return f"export CUDNN_HOME={folder if folder.is_dir() else 'the folder of the cuDNN that torch uses'}"


def _attention(config: MixtralConfig, *, length: int, packed: bool) -> tuple[str, list[str]]:
    """Transformer Engine's choice, and why the kernels it likes better were ruled out."""
    from transformer_engine.pytorch.attention.dot_product_attention import (  # pyright: ignore[reportMissingImports]
        utils,
    )

    ranks = config.tensor_model_parallel_size
    heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
    width = config.kv_channels or config.hidden_size // heads
    layout = "thd_thd_thd" if packed else "sbhd_sbhd_sbhd"
    asked = utils.AttentionParams(
        qkv_dtype=config.params_dtype,
        qkv_layout=layout,
        num_heads=heads // ranks,
        num_gqa_groups=max(1, groups // ranks),
        max_seqlen_q=length,
        max_seqlen_kv=length,
        head_dim_qk=width,
        head_dim_v=width,
        attn_mask_type="padding_causal" if packed else "causal",
        attention_dropout=config.attention_dropout,
        context_parallel=config.context_parallel_size > 1,
        deterministic=config.deterministic_mode,
    )
    with _overheard(utils) as said:
        try:
            answer = utils.get_attention_backend(asked)
        except Exception as error:  # the choice is made again, and counts, in the first forward pass
            return "unknown", [str(error)]
    flash, _, fused, _, unfused, _ = answer
    disabled = [line for line in said if "Disabling" in line]
    if unfused:
        return "unfused", [line for line in disabled if "Unfused" not in line]
    if not (flash or fused):
        packages = ("flash_attn", "flash_attn_3")
        return "none", [*disabled, *(() if any(map(find_spec, packages)) else ("flash-attn is not installed",))]
    return ("flash" if flash else "fused"), []


@contextmanager
def _overheard(utils: Any) -> Iterator[list[str]]:
    """What Transformer Engine logs about its choice, which it shows with ``NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2``."""
    said: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: said.append(record.getMessage())  # pyright: ignore[reportAttributeAccessIssue]
    logger, level = logging.getLogger("DotProductAttention"), utils.AttentionLogging._log_level
    propagates = logger.propagate
    utils.AttentionLogging._log_level, logger.propagate = logging.DEBUG, False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        utils.AttentionLogging._log_level, logger.propagate = level, propagates

"""Keeps other libraries' deprecation notes out of what users read. Our own warnings are never hidden."""

import logging
import os
import warnings

_LIBRARIES = r"(torch|megatron|transformers|huggingface_hub|torchmetrics|nemo_run|torchx|fiddle)(\.|$)"
_CHATTY_LOGGERS = (
    "megatron.core.distributed.distributed_data_parallel",  # announces on every build that it lays out buffers itself
    "megatron.core.dist_checkpointing",
    "torch.utils.cpp_extension",  # "No CUDA runtime is found"
    "matplotlib",  # builds a font cache on a new machine
)


def libraries() -> None:
    """Hide what third-party modules warn about, and say ours in a line, unless MIXTRAL_RECIPES_DEBUG is set."""
    if os.environ.get("MIXTRAL_RECIPES_DEBUG"):
        return
    warnings.filterwarnings("ignore", module=_LIBRARIES)
    warnings.formatwarning = _in_a_line
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _in_a_line(message: Warning | str, *_place: object) -> str:
    return f"warning: {message}\n"

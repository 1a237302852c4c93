"""Keeps other libraries' warnings out of what users read: in commands, in ranks, and where the package is imported.

Ours are of one class, `MixtralRecipesWarning`, and are never hidden, wherever in a library's call they are raised.
"""

import logging
import os
import warnings
from typing import Any

from mixtral_recipes.errors import MixtralRecipesWarning
from mixtral_recipes.system.escapes import in_a_line

_LIBRARIES = (  # the packages we stand on, and theirs
    "torch", "torchx", "torchmetrics", "triton", "megatron", "transformer_engine", "nemo_run", "leptonai", "fiddle",
    "libcst", "transformers", "tokenizers", "peft", "datasets", "huggingface_hub", "accelerate", "trl", "sentencepiece",
    "mistral_common", "multiprocess", "dill", "pyarrow", "tensorboard", "matplotlib", "wandb", "mlflow", "starlette",
    "fastapi", "pydantic", "ray", "google", "opencensus", "grpc", "tqdm",
    "importlib", "contextlib",  # blamed for what a library warns of inside an import or a ``with``
)  # fmt: skip
THEIRS = rf"({'|'.join(_LIBRARIES)})(\.|$)"
COMPILED = r".*[/\\](site|dist)-packages[/\\]"  # Python names the file, not the module, when it warns of its syntax
_BLAMED = r"mixtral_recipes(\.|$)"  # a library's warning can name its caller (``stacklevel``), which is us
# They say what they fall back to, at import and at every build; matplotlib, that it looks for fonts on a new machine.
_CHATTY_LOGGERS = ("megatron", "torch.utils.cpp_extension", "matplotlib")


def libraries() -> None:
    """Hide what third-party modules warn about and show ours, unless MIXTRAL_RECIPES_DEBUG is set."""
    if os.environ.get("MIXTRAL_RECIPES_DEBUG"):
        return
    warnings.filterwarnings("ignore", module=THEIRS)
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=COMPILED)
    warnings.filterwarnings("ignore", module=_BLAMED)
    warnings.filterwarnings("always", category=MixtralRecipesWarning)
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def our_process() -> None:
    """As `libraries`, where the process is ours: without their progress bars too, and with our warnings in a line."""
    libraries()
    if os.environ.get("MIXTRAL_RECIPES_DEBUG"):
        return
    warnings.formatwarning = _in_a_line
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _in_a_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    if issubclass(category, MixtralRecipesWarning):
        return f"warning: {in_a_line(message)}\n"
    return _with_its_place(message, category, *place, **more)


_with_its_place = warnings.formatwarning

"""Python imports this at its start: once torch and Transformer Engine are there, the CPU computes their kernels."""

import os
import sys
from pathlib import Path
from typing import Any

# Once the first is imported, the second's function is called; in this order.
_THEN = [
    ("torch", "card_torch", "install"),
    ("transformer_engine_torch", "card_te", "install"),
    ("transformer_engine.pytorch.triton.permutation", "card_te_routing", "install_permutation"),
    ("transformer_engine.pytorch.triton.cross_entropy", "card_te_loss", "install"),
]


if os.environ.get("FAKE_CARD_IDLE") == "1":
    _THEN = [
        ("transformer_engine_torch", "card_idle", "install"),
        ("megatron.core.transformer.moe.token_dispatcher", "card_idle", "spread_evenly"),
    ]


class _Watch:
    """Looks at each later import what is there by now."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        while _THEN and _is_complete(_THEN[0][0]):
            _, module, function = _THEN.pop(0)
            getattr(__import__(module), function)()


def _is_complete(name: str) -> bool:
    module = sys.modules.get(name)
    if module is None or getattr(module.__spec__, "_initializing", False):
        return False
    return name != "torch" or ("torch.library" in sys.modules and hasattr(module, "compile"))


if os.environ.get("FAKE_CARD_ALONE"):  # as if Transformer Engine were not installed
    sys.path[:] = [folder for folder in sys.path if not (Path(folder) / "transformer_engine").exists()]
sys.meta_path.insert(0, _Watch())

# ruff: noqa: F401
"""What the fork server of `harness.py` imports before it forks: what ranks use, and what a run imports as it needs it.

A rank that imports transformers, Dynamo and matplotlib for itself takes longer for that than for a test's steps,
and so does one whose garbage collector looks through them.
"""

import contextlib

from mixtral_recipes.system.garbage import seldom_collected

with seldom_collected():
    # The package of recipes first: it keeps what Megatron says at import out of the tests' output.
    import mixtral_recipes.recipes  # isort: skip
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import megatron.core.models.mimo
    import peft
    import pytest
    import torch._dynamo
    import torch.onnx
    import transformers.models.auto.tokenization_auto
    import transformers.models.mixtral.modeling_mixtral
    import transformers.tokenization_utils_tokenizers

    import mixtral_recipes.api
    import mixtral_recipes.training.distributed
    import mixtral_recipes.training.step

    with contextlib.suppress(ImportError):
        import transformer_engine.pytorch

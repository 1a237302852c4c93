"""Transformer Engine's own modules on a machine without a GPU: the driver stood in for, no number ever computed.

Everything is built on the meta device, as one rank of a job whose other ranks do not exist (a fake process group).
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from mixtral_recipes.cpu.device import _Stream
from tests.card.build import build as build_card
from tests.card.build import toolkit_headers
from tests.fake_world import one_of

CAPABILITIES = {"a100": (8, 0), "h100": (9, 0), "b200": (10, 0)}
BuildRank = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs Transformer Engine."""
    for item in items:
        if item.path.parent.name == "te":
            item.add_marker(pytest.mark.te)


def pretend_gpu(patch: pytest.MonkeyPatch, hardware: str) -> None:
    """Let torch answer as if it had such a GPU; nothing is run on it."""
    major, minor = CAPABILITIES[hardware]
    properties = SimpleNamespace(
        name=hardware.upper(), major=major, minor=minor, multi_processor_count=132, total_memory=80 << 30
    )
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: torch.device("meta"),
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "Stream": _Stream,  # Megatron keeps some for as long as the process lives
        "Event": _Stream,
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, answer)


class OnMeta(TorchFunctionMode):
    """Whatever is made on, or moved to, the GPU is made on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0].to("meta")
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@pytest.fixture
def build_rank(monkeypatch: pytest.MonkeyPatch) -> BuildRank:
    """A function (recipe, rank, hardware) -> that rank's model chunks, built as `training.run.build_run` does.

    Its argument ``inside`` is called with them while the process groups are there; what it returns is returned instead.
    """
    import fiddle as fdl

    from mixtral_recipes.layout.topology import Topology
    from mixtral_recipes.models.acceleration import accelerated
    from mixtral_recipes.models.builder import build_model
    from mixtral_recipes.models.config import with_topology
    from mixtral_recipes.models.kernels import transformer_engine_usable
    from mixtral_recipes.peft import attach
    from mixtral_recipes.training import (
        precision,
    )  # brings Megatron, which has deprecated imports, so not while collecting

    def build(recipe: Any, rank: int, hardware: str, inside: Callable[[list[Any]], Any] = lambda chunks: chunks) -> Any:
        pretend_gpu(monkeypatch, hardware)
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as `training.distributed.join` does
        assert transformer_engine_usable()
        plugins: Any = fdl.build(recipe.trainer.plugins)
        precision.check_device(plugins)
        peft: Any = fdl.build(recipe.peft) if getattr(recipe, "peft", None) is not None else None
        # Meta tensors have nothing to initialise.
        fields = precision.model_fields(plugins) | {
            "perform_initialization": False,
            "init_model_with_meta_device": True,
        }
        config = fdl.build(recipe.model.config)
        fields |= accelerated(config, adapters=peft is not None)
        config = with_topology(config, Topology.of(recipe.trainer), **fields)
        with one_of(Topology.of(recipe.trainer), rank):
            with torch.device("meta"), OnMeta():
                chunks = build_model(config, adapters=peft is not None)
                if peft is not None:
                    attach.apply(peft, chunks)
                for chunk in chunks:
                    chunk.on_disk = chunk.sharded_state_dict()
            return inside(chunks)

    return build


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card's libraries."""
    if toolkit_headers() is None:
        pytest.skip("needs CUDA's headers: nvcc is not on PATH")
    folder = tmp_path_factory.mktemp("card")
    build_card(folder)
    return folder

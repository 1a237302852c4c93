"""A quantised base that is kept: another layout reads what one process wrote, byte for byte; damage makes it anew."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.checkpoints import load, quantized_cache
from mixtral_recipes.checkpoints.shards import quantized_weights
from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.settings.peft import QLoRA
from tests.distributed.harness import launch
from tests.parity.hf_mixtral import Folders, make_model, our_run

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return launch(1, make_model, str(tmp_path_factory.mktemp("model")))[0]


def loaded(folders: Folders, home: Path, scheme: QLoRA, layout: dict[str, Any]) -> tuple[int, list[str]]:
    """How many weights a rank quantised, and hashes of what it has."""
    os.environ["MIXTRAL_RECIPES_HOME"] = str(home)
    quantized: list[Any] = []
    original = load._quantize

    def counted(*args: Any) -> None:
        quantized.append(args)
        original(*args)

    load._quantize = counted
    run = our_run(folders, layout, peft=scheme)
    hashes = [
        f"{weight.key} {name} {hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()}"
        for weight in quantized_weights(run.model)
        for name, tensor in weight.layer.quantized.tensors().items()
    ]
    return len(quantized), hashes


@pytest.mark.parametrize(
    ("scheme", "layout"), [(QLoRA(dim=4), {"expert_model_parallel_size": 2}), (QLoRA(dim=4, bits=8), TP2)], ids=str
)
def test_what_one_process_keeps_another_layout_reads(
    folders: Folders, tmp_path: Path, scheme: QLoRA, layout: dict[str, Any]
) -> None:
    kept = dataclasses.replace(scheme, cache=True)
    anew = launch(2, loaded, folders, tmp_path, scheme, layout)
    assert not (tmp_path / "quantized").exists()
    assert launch(1, loaded, folders, tmp_path, kept, {})[0][0] == 4 * (2 + 2 * 8)
    assert launch(2, loaded, folders, tmp_path, kept, layout) == [(0, hashes) for _, hashes in anew]


def test_a_damaged_one_is_made_anew(folders: Folders, tmp_path: Path) -> None:
    kept = QLoRA(dim=4, bits=8, cache=True)
    first, hashes = launch(1, loaded, folders, tmp_path, kept, {})[0]
    (file,) = tmp_path.glob("quantized/*/weights/*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert launch(1, loaded, folders, tmp_path, kept, {})[0] == (first, hashes)
    assert launch(1, loaded, folders, tmp_path, kept, {})[0] == (0, hashes)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_stops_no_run_and_keeps_nothing(folders: Folders, tmp_path: Path, ranks: int) -> None:
    layout = {"expert_model_parallel_size": ranks}
    kept = QLoRA(dim=4, bits=8, cache=True)
    made = launch(ranks, loaded_on_a_full_disk, folders, tmp_path, kept, layout)
    assert not list(tmp_path.glob("quantized/*")) + list(tmp_path.glob("quantized/.*"))
    assert launch(ranks, loaded, folders, tmp_path, kept, layout) == made


def loaded_on_a_full_disk(folders: Folders, home: Path, scheme: QLoRA, layout: dict[str, Any]) -> tuple[int, list[str]]:
    def full(*arguments: Any) -> None:
        raise EnvironmentProblem("the disk is full")

    quantized_cache.write_items = full
    return loaded(folders, home, scheme, layout)

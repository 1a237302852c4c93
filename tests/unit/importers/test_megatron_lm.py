"""Megatron-LM's checkpoints: imported bit for bit, and nothing in them runs."""

import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.cli.main import run
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.resolve import check_source, resolve
from tests.megatron_lm_folder import arguments, write_megatron_lm
from tests.nemo_folder import nemo_tensors

type Make = Callable[..., tuple[Path, Path]]
NORM = "decoder.layers.pre_mlp_layernorm.weight"


@pytest.fixture
def checkpoints(make_model, tmp_path: Path) -> Make:
    """The same model in both forms: (Hugging Face folder, Megatron-LM's)."""

    def make(
        *,
        in_a_file: bool = False,
        tokenizer: bool = True,
        args: Callable[[Namespace], Any] = lambda a: a,
        **changes: Any,
    ) -> tuple[Path, Path]:
        hf, config, tensors = make_model()
        words = WordLevel({f"w{number}": number for number in range(config["vocab_size"])}, unk_token="w0")
        Tokenizer(words).save(str(hf / "tokenizer.json"))
        stated = arguments(config, **changes)
        args(stated)
        weights = nemo_tensors(config, tensors, "")
        if getattr(stated, "transformer_impl", None) == "local":
            weights["decoder.layers.mlp.linear_fc1.layer_norm_weight"] = weights.pop(NORM)
        beside = hf if tokenizer else None
        return hf, write_megatron_lm(tmp_path / "run", weights, stated, in_a_file=in_a_file, tokenizer=beside)

    return make


def older(args: Namespace) -> None:
    """In the words of earlier releases."""
    args.norm_epsilon, args.apply_layernorm_1p = args.layernorm_epsilon, False
    args.moe_aux_loss_coeff, args.moe_router_load_balancing_type = args.moe_aux_loss_coeff[0], "aux_loss"
    del args.layernorm_epsilon, args.layernorm_zero_centered_gamma


@pytest.mark.parametrize(
    "form", [{}, {"in_a_file": True, "args": older}, {"transformer_impl": "local"}], ids=["new", "old", "local"]
)
def test_equals_the_hugging_face_conversion(checkpoints: Make, tmp_path: Path, form: dict[str, Any]) -> None:
    hf, folder = checkpoints(**form)
    ours = import_checkpoint(str(folder), tmp_path / "ours", progress=False)
    theirs = import_checkpoint(str(hf), tmp_path / "theirs", progress=False)
    assert read_manifest(ours)["tensors"] == read_manifest(theirs)["tensors"]
    assert read_manifest(ours)["source"]["layout"] == "megatron-lm"
    assert (ours / "context" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    config = json.loads((ours / "context" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["router_aux_loss_coef"], config["vocab_size"]) == (256, 0.02, 300)


def test_on_the_command_line(checkpoints: Make, tmp_path: Path) -> None:
    hf, folder = checkpoints()
    ours = tmp_path / "ours"
    (folder / "config.json").write_text("{}")  # of something else, and not a description of these weights
    assert run(["import", str(folder), "--output", str(ours)]) == 0
    assert run(["verify", str(ours), "--against", str(folder / "iter_0000010")]) == 0
    assert run(["verify", str(ours), "--against", str(hf)]) == 0
    assert run(["export", str(ours), str(tmp_path / "back")]) == 0
    check_source(str(folder))
    assert resolve(str(folder)) == resolve(str(folder / "iter_0000010"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swiglu": False}, r"args\.swiglu=False is not what a Mixtral has; it must be True"),
        ({"add_bias_linear": True}, r"args\.add_bias_linear=True is not"),
        ({"normalization": "LayerNorm"}, r"args\.normalization='LayerNorm' is not"),
        ({"untie_embeddings_and_output_weights": False}, r"args\.untie_embeddings_and_output_weights=False is not"),
        ({"use_rope_scaling": True}, r"args\.use_rope_scaling=True is not"),
        ({"window_size": (4096, 0)}, r"args\.window_size=\(4096, 0\) is not"),
        ({"moe_router_load_balancing_type": ["sinkhorn"]}, r"load_balancing_type=\['sinkhorn'\] is not supported"),
        ({"num_experts": 4}, r"linear_fc1\.weight has shape|router\.weight has shape"),
        ({"window_size": os.system}, r"args\.window_size=<posix\.system> is not"),
        ({"tensor_model_parallel_size": 8}, "padded to 1024, but the embedding has 384 rows"),
        ({"make_vocab_size_divisible_by": None}, "how far the vocabulary is padded is not known"),
    ],
)
def test_another_model_is_refused(checkpoints: Make, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    _, folder = checkpoints(**changes)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(str(folder), tmp_path / "ours", progress=False)
    assert not (tmp_path / "ours").exists()


def test_what_is_missing_is_named(checkpoints: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = checkpoints(tokenizer=False)
    assert run(["import", str(folder)]) == 2
    assert "copy the one it was trained with (/data/tokenizer.model) into" in capsys.readouterr().err
    (folder / "latest_checkpointed_iteration.txt").write_text("20")
    assert run(["import", str(folder)]) == 2
    assert "names iter_0000020, but" in capsys.readouterr().err
    (folder / "latest_checkpointed_iteration.txt").write_text("../x")
    assert run(["import", str(folder)]) == 2
    assert "has '../x'; it must have an iteration's number" in capsys.readouterr().err
    (folder / "latest_checkpointed_iteration.txt").unlink()
    assert run(["import", str(folder)]) == 2
    assert "pass the folder of one: iter_0000010" in capsys.readouterr().err


def test_weights_without_arguments_are_refused(make_model, tmp_path: Path) -> None:
    _, config, tensors = make_model()
    for in_a_file in (True, False):
        folder = write_megatron_lm(
            tmp_path / str(in_a_file), nemo_tensors(config, tensors, ""), None, in_a_file=in_a_file
        )
        with pytest.raises(CheckpointError, match="holds no arguments of Megatron-LM's training script"):
            import_checkpoint(str(folder / "iter_0000010"), tmp_path / "ours", progress=False)


def test_a_damaged_file_is_named(checkpoints: Make, tmp_path: Path) -> None:
    _, folder = checkpoints(in_a_file=True)
    file = folder / "iter_0000010" / "common.pt"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"common\.pt: cannot be read \("):
        import_checkpoint(str(folder), tmp_path / "ours", progress=False)

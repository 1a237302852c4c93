"""Mistral's own format: bit for bit the Hugging Face conversion, and one line for what it is not."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.cli.main import run
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.verify import verify_checkpoint
from mixtral_recipes.importers.hf.mistral import open_mistral, read_params
from mixtral_recipes.importers.mapping import canonical_shapes, mistral_tensors
from mixtral_recipes.layout.shapes import MIXTRAL_8X7B, MIXTRAL_8X22B, ModelShape
from tests.mistral_folder import mistral_params, write_mistral
from tests.mistral_folder import mistral_tensors as in_mistrals_form
from tests.mixtral_folder import mixtral_config
from tests.mixtral_folder import mixtral_tensors as hugging_face_tensors


@pytest.fixture
def write(make_model, tmp_path: Path):
    """The same model in both forms: (Hugging Face folder, Mistral folder)."""

    def write(kind: str = "safetensors", files: int = 1, stacked: bool = False, **fields: Any) -> tuple[Path, Path]:
        hf, config, tensors = make_model(**fields)
        own = in_mistrals_form(config, tensors, stacked=stacked)
        return hf, write_mistral(tmp_path / "mistral", mistral_params(config), own, kind=kind, files=files)

    return write


@pytest.mark.parametrize(
    ("kind", "files", "stacked"),
    [
        ("safetensors", 1, False),
        ("safetensors", 3, False),
        ("pth", 1, False),
        ("pth", 2, False),
        ("pt", 8, True),
        ("safetensors", 1, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_equals_the_hugging_face_conversion(
    write, tmp_path: Path, kind: str, files: int, stacked: bool, dtype: torch.dtype
) -> None:
    hf, mistral = write(kind, files, stacked, dtype=dtype)
    ours = import_checkpoint(str(mistral), tmp_path / "ours", progress=False)
    theirs = import_checkpoint(str(hf), tmp_path / "theirs", progress=False)
    assert read_manifest(ours)["tensors"] == read_manifest(theirs)["tensors"]
    assert read_manifest(ours)["source"]["layout"] == "mistral"
    assert verify_checkpoint(ours, against=str(hf), progress=False).passed
    assert verify_checkpoint(theirs, against=str(mistral), progress=False).passed
    assert (ours / "context" / "tokenizer.model").is_file()


def test_a_changed_weight_is_found(write, tmp_path: Path) -> None:
    hf, mistral = write(stacked=True)
    checkpoint = import_checkpoint(str(hf), tmp_path / "out", progress=False)
    file = mistral / "consolidated.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert not verify_checkpoint(checkpoint, against=str(mistral), progress=False).passed


def test_queries_and_keys_turn_as_mistral_turns_them() -> None:
    """Mistral's rotation of its own rows and transformers' of the permuted ones give the same attention scores."""
    config = mixtral_config()
    hf = hugging_face_tensors(config, torch.float64)
    own = in_mistrals_form(config, hf)
    head, heads = 8, config["num_attention_heads"]
    x = torch.randn(5, config["hidden_size"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    angles = torch.outer(torch.arange(5.0).double(), 1e6 ** (-torch.arange(0, head, 2).double() / head))

    def mistrals(weight: torch.Tensor, count: int) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ weight.T).view(5, count, head // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)

    def transformers(weight: torch.Tensor, count: int) -> torch.Tensor:
        y = (x @ weight.T).view(5, count, head)
        cos, sin = (torch.cat([f(angles), f(angles)], -1)[:, None] for f in (torch.cos, torch.sin))
        low, high = y.chunk(2, -1)
        return y * cos + torch.cat([-high, low], -1) * sin

    groups = config["num_key_value_heads"]
    scores = []
    for turn, q, k in (
        (mistrals, own["layers.0.attention.wq.weight"], own["layers.0.attention.wk.weight"]),
        (transformers, hf["model.layers.0.self_attn.q_proj.weight"], hf["model.layers.0.self_attn.k_proj.weight"]),
    ):
        keys = turn(k, groups).repeat_interleave(heads // groups, 1)
        scores.append(torch.einsum("qhd,khd->hqk", turn(q, heads), keys))
    torch.testing.assert_close(scores[0], scores[1])


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dims", [MIXTRAL_8X7B, MIXTRAL_8X22B])
def test_the_shapes_of_both_sizes(dims: ModelShape, stacked: bool) -> None:
    tensors = mistral_tensors(dims, stacked=stacked)
    shapes = canonical_shapes(dims)
    covered = [name for parts in tensors.values() for name in parts.names]
    assert sorted(n.format(layer=0) for n in covered if "{" not in n) == sorted(n for n in covered if "{" not in n)
    count = sum(torch.Size(parts.shape).numel() for parts in tensors.values())
    assert count == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert set(covered) == set(shapes)
    if stacked:
        ffn, hidden = dims.ffn_hidden_size, dims.hidden_size
        assert tensors["layers.1.block_sparse_moe.w2"].shape == (8 * ffn, hidden)


@pytest.mark.parametrize("large", [False, True])
def test_both_sizes_open_at_full_width(tmp_path: Path, large: bool) -> None:
    """One layer at the published widths, in a sparse file: nothing but the header is read."""
    size = MIXTRAL_8X22B if large else MIXTRAL_8X7B
    params: dict[str, Any] = {
        "dim": size.hidden_size, "n_layers": 1, "head_dim": 128, "hidden_dim": size.ffn_hidden_size,
        "n_heads": size.num_attention_heads, "n_kv_heads": 8, "norm_eps": 1e-5, "vocab_size": 32000,
        "moe": {"num_experts_per_tok": 2, "num_experts": 8},
    }  # fmt: skip
    from dataclasses import replace

    shapes = {name: parts.shape for name, parts in mistral_tensors(replace(size, num_layers=1), stacked=False).items()}
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        stop = at + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    (tmp_path / "params.json").write_text(json.dumps(params))
    file = tmp_path / "consolidated.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + at)
    opened = open_mistral(tmp_path)
    assert opened.tensors["model.layers.0.self_attn.q_proj.weight"].rows == size.num_attention_heads * 128
    assert opened.tensors["model.layers.0.block_sparse_moe.experts.7.w2.weight"].rows == size.hidden_size


def test_what_params_json_leaves_out(tmp_path: Path) -> None:
    def config(**fields: Any) -> dict[str, Any]:
        (tmp_path / "params.json").write_text(json.dumps(mistral_params(mixtral_config(), **fields)))
        return read_params(tmp_path)

    assert config()["max_position_embeddings"] == 32768
    assert config()["rope_theta"] == 1e6
    assert config(dim=6144, n_layers=56)["max_position_embeddings"] == 65536
    assert config(max_seq_len=4096, rope_theta=5e5)["max_position_embeddings"] == 4096
    assert config(rope_theta=5e5)["rope_theta"] == 5e5
    assert config(sliding_window="4096")["sliding_window"] == 4096
    assert config(vision_encoder=None, model_type="transformer", causal=True)["num_local_experts"] == 8


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"moe": None}, "num_experts is missing; only Mixtrals"),
        ({"moe": 3}, "moe must be a JSON object"),
        ({"dim": "wide"}, "hidden_size='wide'"),
        ({"dim": "32²"}, "hidden_size='32²'"),
        ({"dim": "9" * 5000}, "hidden_size='999"),
        ({"vision_encoder": {"hidden_size": 1}}, "vision_encoder="),
        ({"lora": {"rank": 2}}, "lora="),
        ({"model_type": "mamba"}, "model_type='mamba'"),
        ({"tied_embeddings": True}, "tie_word_embeddings=True"),
        ({"causal": False}, "causal=False"),
        ({"rope_theta": "much"}, "rope_theta='much' must be a positive number"),
        ({"hidden_size": 999}, "hidden_size is 999, but another name for it has "),
        ({"hidden_dim": 40}, "layers.0.feed_forward.experts.0.w1.weight has shape [48, 32], but params.json requires"),
        ({"n_layers": 3}, "layers.2.attention_norm.weight and"),
        ({"n_layers": 1}, "which the model in params.json does not have"),
    ],
)
def test_parameters_that_cannot_be_honoured(write, tmp_path: Path, fields: dict[str, Any], word: str) -> None:
    _, mistral = write()
    params = json.loads((mistral / "params.json").read_text())
    (mistral / "params.json").write_text(json.dumps(params | fields))
    with pytest.raises(CheckpointError) as refused:
        import_checkpoint(str(mistral), tmp_path / "out", progress=False)
    assert word in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_missing_or_hostile(write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, mistral = write("pth", 3)
    (mistral / "consolidated.01.pth").unlink()
    assert run(["import", str(mistral), "--output", str(tmp_path / "out")]) == 2
    assert "consolidated.01.pth is missing" in capsys.readouterr().err

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Hostile()}, mistral / "consolidated.01.pth")
    assert run(["import", str(mistral), "--output", str(tmp_path / "out")]) == 2
    assert "could run code when loaded" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    for file in mistral.glob("consolidated.*"):
        file.unlink()
    assert run(["import", str(mistral), "--output", str(tmp_path / "out")]) == 2
    assert "params.json but no weights" in capsys.readouterr().err


def test_two_sets_of_weights(write, tmp_path: Path) -> None:
    """As mistral-inference refuses them."""
    _, mistral = write()
    torch.save({"x": torch.zeros(1)}, mistral / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"has consolidated\.safetensors and consolidated\.00\.pth; remove one"):
        import_checkpoint(str(mistral), tmp_path / "out", progress=False)


def test_a_config_json_beside_it_says_more_and_must_agree(write, tmp_path: Path) -> None:
    hf, mistral = write()
    published = json.loads((hf / "config.json").read_text())
    (mistral / "config.json").write_text(json.dumps(published))
    checkpoint = import_checkpoint(str(mistral), tmp_path / "out", progress=False)
    assert json.loads((checkpoint / "context" / "config.json").read_text()) == published
    (mistral / "config.json").write_text(json.dumps(published | {"rope_theta": 1e4}))
    with pytest.raises(CheckpointError, match=r"rotary_base is 10000\.0, but params.json has 1000000\.0"):
        import_checkpoint(str(mistral), tmp_path / "other", progress=False)

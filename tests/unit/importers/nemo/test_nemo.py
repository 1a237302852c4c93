"""NeMo 2.0 checkpoints in and out: bit for bit, and nothing in them runs."""

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest
import torch
import yaml
from fiddle._src.experimental import serialization
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.cli.main import run
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_nemo import export_nemo
from mixtral_recipes.importers.nemo import fiddle_json
from mixtral_recipes.importers.nemo.context import read_context
from mixtral_recipes.importers.resolve import resolve
from tests.nemo_folder import Nemo, nemo_fields, nemo_tensors, write_nemo, write_weights

TINY = "embedded://mixtral_tiny"


@pytest.fixture
def checkpoints(make_model, nemo: Nemo, tmp_path: Path):
    """The same model in both forms: (Hugging Face folder, NeMo checkpoint)."""

    def make(
        *, axis: int = 0, prefix: str = "module.", model: str = "MixtralModel", **fields: Any
    ) -> tuple[Path, Path]:
        hf, config, tensors = make_model()
        settings = nemo.call(fields.pop("config_class", "MixtralConfig8x7B"), **nemo_fields(config) | fields)
        tokenizer = nemo.call("AutoTokenizer", pretrained_model_name="nemo_tokenizer")
        context = nemo.context(nemo.call(model, config=settings, tokenizer=tokenizer))
        folder = tmp_path / "nemo"
        return hf, write_nemo(folder, context, nemo_tensors(config, tensors, prefix), axis=axis, tokenizer=hf)

    return make


@pytest.mark.parametrize(
    ("axis", "prefix"), [(0, "module."), (1, "module."), (2, "module."), (0, ""), (1, "module.module.")]
)
def test_equals_the_hugging_face_conversion(checkpoints, tmp_path: Path, axis: int, prefix: str) -> None:
    hf, folder = checkpoints(axis=axis, prefix=prefix)
    of_another = folder / "context" / "nemo_tokenizer" / "config.json"  # of the model the tokenizer was taken from
    of_another.write_text('{"architectures": ["LlamaForCausalLM"]}')
    ours = import_checkpoint(f"nemo://{folder}", tmp_path / "ours", progress=False)
    theirs = import_checkpoint(str(hf), tmp_path / "theirs", progress=False)
    assert read_manifest(ours)["tensors"] == read_manifest(theirs)["tensors"]
    assert read_manifest(ours)["source"]["layout"] == "nemo"
    assert (ours / "context" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    config = json.loads((ours / "context" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["router_aux_loss_coef"], config["vocab_size"]) == (256, 0.02, 300)


def test_there_and_back_on_the_command_line(
    checkpoints,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    nemo: Nemo,
) -> None:
    hf, folder = checkpoints()
    ours, back, again = tmp_path / "ours", tmp_path / "back", tmp_path / "again"
    assert run(["import", f"nemo://{folder}", "--output", str(ours)]) == 0
    assert run(["verify", str(ours), "--against", f"nemo://{folder}"]) == 0
    assert run(["verify", str(ours), "--against", str(hf)]) == 0
    assert run(["export", str(ours), str(back), "--format", "nemo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["model"] == str(back)
    assert run(["import", f"nemo://{back}", "--output", str(again)]) == 0
    assert read_manifest(again)["tensors"] == read_manifest(ours)["tensors"]
    assert (again / "context" / "config.json").read_bytes() == (ours / "context" / "config.json").read_bytes()
    assert (again / "context" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    assert resolve(f"nemo://{back}").is_dir()
    assert run(["export", str(ours), str(back), "--format", "nemo"]) == 2
    assert run(["export", str(ours), str(back), "--format", "nemo", "--overwrite"]) == 0
    assert run(["export", str(ours), str(tmp_path / "x"), "--format", "nemo", "--layout", "v5"]) == 2
    assert "--layout has no effect with --format nemo" in capsys.readouterr().err


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """What torch finds in a checkpoint."""
    stored = FileSystemReader(folder / "weights").read_metadata().state_dict_metadata
    return {key: tuple(entry.size) for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def test_torch_reads_the_weights_and_fiddle_the_settings(
    checkpoints,
    tmp_path: Path,
    nemo: Nemo,
) -> None:
    _, folder = checkpoints()
    ours = import_checkpoint(str(folder), tmp_path / "ours", progress=False)
    back = export_nemo(ours, tmp_path / "back", progress=False)
    wanted, found = shapes(folder), shapes(back)
    padded = {name: shape for name, shape in wanted.items() if not name.startswith("optimizer.")}
    assert found == {name: (300, 32) if shape == (384, 32) else shape for name, shape in padded.items()}
    assert dist_checkpointing.load_common_state_dict(str(back / "weights")) == {"epoch": 0, "global_step": 0}
    entries = FileSystemReader(back / "weights").read_metadata().state_dict_metadata
    assert "module.decoder.layers.self_attention.core_attention._extra_state/shard_1_2" in entries
    assert "module.decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_1.7_2.8" in entries
    model = nemo.built((back / "context" / "io.json").read_text()).model
    assert type(model).__name__ == "MixtralModel"
    assert (model.config.num_layers, model.config.ffn_hidden_size, model.config.vocab_size) == (2, 48, 300)
    assert model.config.activation_func is torch.nn.functional.silu
    assert model.config.params_dtype is torch.bfloat16
    assert model.tokenizer.pretrained_model_name == "nemo_tokenizer"
    assert (back / "context" / "nemo_tokenizer" / "tokenizer.json").is_file()
    described = yaml.safe_load((back / "context" / "model.yaml").read_text())
    assert described == fiddle_json.read(back / "context" / "io.json", "model")
    paths = {
        path
        for entry in json.loads((back / "context" / "io.json").read_text())["objects"].values()
        for path in entry["paths"]
    }
    assert {"<root>.model", "<root>.model.config", "<root>.model.tokenizer"} <= paths  # where NeMo looks


def test_settings_that_are_left_to_nemos_classes(make_model, nemo: Nemo, tmp_path: Path) -> None:
    for name, layers, heads in (("MixtralConfig8x7B", 32, 32), ("MixtralConfig8x22B", 56, 48)):
        folder = tmp_path / name
        (folder / "context").mkdir(parents=True)
        model = nemo.call("MixtralModel", config=nemo.call(name))
        (folder / "context" / "io.json").write_text(nemo.context(model))
        config = read_context(folder).hf_config(32000, "bfloat16")
        assert (config["num_hidden_layers"], config["num_attention_heads"]) == (layers, heads)
        assert (config["rope_theta"], config["max_position_embeddings"]) == (1e6, 4096)


def test_model_yaml_alone_will_do(checkpoints, tmp_path: Path) -> None:
    hf, folder = checkpoints()
    model = fiddle_json.read(folder / "context" / "io.json", "model")
    (folder / "context" / "io.json").unlink()
    (folder / "context" / "model.yaml").write_text(yaml.safe_dump(model))
    ours = import_checkpoint(str(folder), tmp_path / "ours", progress=False)
    theirs = import_checkpoint(str(hf), tmp_path / "theirs", progress=False)
    assert read_manifest(ours)["tensors"] == read_manifest(theirs)["tensors"]


def test_the_vocabulary_is_the_tokenizers_where_nothing_else_says(checkpoints, tmp_path: Path) -> None:
    from mixtral_recipes.embedded import resolve as embedded

    _, folder = checkpoints(vocab_size=None)
    tiny = json.loads((embedded(TINY) / "config.json").read_text())["vocab_size"]
    for path in embedded(TINY).glob("tokenizer*"):
        (folder / "context" / "nemo_tokenizer" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=f"vocabulary has {tiny} tokens, but the embedding has only 384 rows"):
        import_checkpoint(str(folder), tmp_path / "ours", progress=False)


def test_nothing_in_it_runs(
    checkpoints,
    tmp_path: Path,
    nemo: Nemo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A context may name any module; fiddle would import it, and build what it is told to."""
    _, folder = checkpoints()
    (tmp_path / "code").mkdir()
    marker = tmp_path / "ran"
    (tmp_path / "code" / "hostile_module.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\ndef Call(**_): pathlib.Path({str(marker)!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    document = json.loads((folder / "context" / "io.json").read_text())
    hostile = {"type": "pyref", "module": "hostile_module", "name": "Call"}
    for entry in document["objects"].values():
        if "'trainer'" in json.dumps(entry["items"]):
            entry["items"].append(["Attr(name='plugin')", hostile])
        for element, value in entry["items"]:
            if "params_dtype" in element or ("fn_or_cls" in element and value["name"] == "AutoTokenizer"):
                value.update(hostile)
    document["objects"]["list_9"] = {"type": hostile, "items": [], "metadata": None, "paths": ["<root>.x"]}
    (folder / "context" / "io.json").write_text(json.dumps(document))
    import_checkpoint(str(folder), tmp_path / "ours", progress=False)
    assert not marker.exists()
    assert "hostile_module" not in sys.modules
    with contextlib.suppress(Exception):  # the control: fiddle's own reader runs it
        fdl.build(serialization.load_json(json.dumps(document)))
    assert marker.exists()


def test_neither_pickles_nor_tags_are_opened(checkpoints, tmp_path: Path, nemo: Nemo) -> None:
    _, folder = checkpoints()
    marker = tmp_path / "ran"
    io_json = folder / "context" / "io.json"
    document = json.loads(io_json.read_text())
    key = next(key for key, entry in document["objects"].items() if "<root>.model.config" in entry.get("paths", []))
    pickled = {
        "type": {"type": "pyref", "module": "nemo.collections.llm", "name": "MixtralConfig8x7B"},
        "metadata": None,
    }
    document["objects"][key] = pickled | {"items": [["IdentityElement()", {"type": "leaf", "value": "artifact"}]]}
    io_json.write_text(json.dumps(document))
    (folder / "context" / "artifact").write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    with pytest.raises(
        CheckpointError, match=r"io\.json: (not in the form that NeMo writes|model.config is stored in a pickle)"
    ):
        import_checkpoint(str(folder), tmp_path / "ours", progress=False)
    io_json.unlink()
    (folder / "context" / "model.yaml").write_text(f"!!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(CheckpointError, match=r"tag !!python/object/apply:os\.system is not supported"):
        import_checkpoint(str(folder), tmp_path / "ours", progress=False)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"activation_func": torch.nn.functional.relu}, "activation_func="),
        ({"qk_layernorm": True}, "qk_layernorm=True"),
        ({"rotary_percent": 0.5}, "rotary_percent=0.5"),
        ({"moe_router_pre_softmax": True}, "moe_router_pre_softmax=True"),
        ({"normalization": "LayerNorm"}, "normalization='LayerNorm'"),
        ({"softmax_type": "off-by-one"}, "softmax_type='off-by-one'"),
        ({"qk_l2_norm": True}, "qk_l2_norm=True"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "moe_router_load_balancing_type='sinkhorn'"),
        ({"num_moe_experts": None}, "num_local_experts=None"),
        ({"num_layers": 3}, "has shape"),
        ({"vocab_size": 500}, "500 tokens, but the embedding has only 384 rows"),
        ({"config_class": "GPTConfig"}, "only NeMo's Mixtral"),
        ({"model": "GPTModel"}, "only NeMo's MixtralModel"),
    ],
)
def test_another_model(checkpoints, tmp_path: Path, fields: dict[str, Any], word: str) -> None:
    _, folder = checkpoints(**fields)
    with pytest.raises(CheckpointError) as refused:
        import_checkpoint(str(folder), tmp_path / "out", progress=False)
    assert word in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_a_mixtrals(checkpoints, make_model, tmp_path: Path) -> None:
    _, config, tensors = make_model()
    ours = nemo_tensors(config, tensors)
    _, folder = checkpoints()
    for change, word in (
        ({"module.decoder.layers.mlp.router.expert_bias": torch.zeros(2, 8)}, "expert_bias is not a weight"),
        ({"module.decoder.layers.mlp.router.weight": None}, "module.decoder.layers.mlp.router.weight is missing"),
        ({"module.embedding.word_embeddings.weight": None}, ": embedding.word_embeddings.weight is missing"),
    ):
        changed = {name: tensor for name, tensor in (ours | change).items() if tensor is not None}
        for file in (folder / "weights").iterdir():
            file.unlink()
        write_weights(folder / "weights", changed)
        with pytest.raises(CheckpointError, match=word):
            import_checkpoint(str(folder), tmp_path / "out", progress=False)


def test_a_tokenizer_outside_the_checkpoint(checkpoints, tmp_path: Path, nemo: Nemo) -> None:
    _, folder = checkpoints()
    (tmp_path / "secret").mkdir()
    text = (folder / "context" / "io.json").read_text().replace('"value": "nemo_tokenizer"', '"value": "../../secret"')
    (folder / "context" / "io.json").write_text(text)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        import_checkpoint(str(folder), tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[]",
        '{"root": {"type": "ref", "key": "a"}, "objects": {"a": {"type": "ref", "key": "a"}}}',
        '{"root": {"type": "leaf", "value": 1}, "objects": {}}',
        '{"root": {"type": "ref", "key": "a"}, "objects": {"a": {}, "a": {}}}',
        '{"root": ' + '{"type": {"type": "pyref"}, "items": [["Attr(name=\'model\')", ' * 500 + "1" + "]]}" * 500 + "}",
    ],
)
def test_broken_contexts_are_one_line(
    checkpoints, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = checkpoints()
    (folder / "context" / "io.json").write_text(text)
    assert run(["import", str(folder), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert re.search(r"io\.json: (not in the form that NeMo writes|not valid JSON|not a JSON object)", message)

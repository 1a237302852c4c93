"""NeMo 2.0's adapter checkpoints in and out: every factor as it was trained, merged as NeMo merges."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.cli.main import run
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.exports import export
from mixtral_recipes.importers.resolve import import_any
from tests.mixtral_folder import Tensors
from tests.nemo_folder import Nemo, nemo_fields, nemo_tensors, write_nemo, write_weights

LAYER = "module.decoder.layers."
MODULES = {
    "linear_qkv": ("self_attention.linear_qkv", (2,), 64, 32),
    "linear_proj": ("self_attention.linear_proj", (2,), 32, 32),
    "linear_fc1": ("mlp.experts.experts.linear_fc1", (2, 8), 96, 32),
    "linear_fc2": ("mlp.experts.experts.linear_fc2", (2, 8), 32, 48),
}
DIM = 4


def adapters(targets: tuple[str, ...], *, dora: bool = False, shared: bool = False) -> Tensors:
    """Random adapters under NeMo's names: stacked over layers, and over experts unless they share one."""
    generator = torch.Generator().manual_seed(3)
    found: Tensors = {}
    for target in targets:
        module, stacked, rows, columns = MODULES[target]
        stacked = stacked[:1] if shared else stacked
        at = f"{LAYER}{module}.adapter."
        found[at + "linear_in.weight"] = torch.randn(*stacked, DIM, columns, generator=generator)
        found[at + "linear_out.weight"] = torch.randn(*stacked, rows, DIM, generator=generator)
        if dora:
            found[at + "weight_magnitude"] = torch.rand(*stacked, rows, generator=generator) + 0.5
    return found


@pytest.fixture
def write(make_model, nemo: Nemo, tmp_path: Path):
    """A NeMo base and an adapter on it: (adapter folder, base's tensors under NeMo's names, config)."""

    def write(
        tensors: Tensors, kind: str = "LoRA", axis: int = 0, **scheme: Any
    ) -> tuple[Path, Tensors, dict[str, Any]]:
        _, config, hf = make_model(dtype=torch.float32, torch_dtype="float32")
        settings = nemo.call("MixtralConfig8x7B", **nemo_fields(config))
        base = nemo_tensors(config, hf)
        write_nemo(tmp_path / "base", nemo.context(nemo.call("MixtralModel", config=settings)), base)
        transform = nemo.call(kind, **{"dim": DIM, "alpha": 8, **scheme})
        model = nemo.call("MixtralModel", config=settings, model_transform=transform)
        folder = write_nemo(tmp_path / "adapter", nemo.context(model), tensors, axis=axis)
        metadata = folder / "weights" / "adapter_metadata.json"
        metadata.write_text(json.dumps({"model_ckpt_path": str(tmp_path / "base" / "weights")}))
        return folder, base, config

    return write


def merged(folder: Path, output: Path, config: dict[str, Any]) -> Tensors:
    """The model an imported adapter is merged into, under NeMo's names."""
    return nemo_tensors(config, load_file(export(folder, output, "hf", progress=False) / "model.safetensors"))


def check(found: Tensors, expected: Tensors) -> None:
    for key, tensor in expected.items():
        rows = 300 if tensor.shape[0] == 384 else tensor.shape[0]
        torch.testing.assert_close(found[key][:rows], tensor[:rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "axis"), [(("linear_qkv", "linear_proj"), 0), (tuple(MODULES), 1), (tuple(MODULES), 2)]
)
def test_lora_adds_what_nemo_adds(write, tmp_path: Path, targets: tuple[str, ...], axis: int) -> None:
    tensors = adapters(targets)
    folder, base, config = write(tensors, axis=axis, target_modules=list(targets))
    ours = import_any(f"nemo://{folder}", tmp_path / "ours")
    expected = dict(base)
    for target in targets:
        module = LAYER + MODULES[target][0]
        delta = tensors[f"{module}.adapter.linear_out.weight"] @ tensors[f"{module}.adapter.linear_in.weight"]
        expected[f"{module}.weight"] = base[f"{module}.weight"] + 2.0 * delta
    check(merged(ours, tmp_path / "merged", config), expected)


def test_one_adapter_for_all_experts_of_a_layer(write, tmp_path: Path) -> None:
    tensors = adapters(("linear_fc1", "linear_fc2"), shared=True)
    folder, base, config = write(tensors)
    ours = import_any(str(folder), tmp_path / "ours")
    expected = dict(base)
    for target in ("linear_fc1", "linear_fc2"):
        module = LAYER + MODULES[target][0]
        delta = tensors[f"{module}.adapter.linear_out.weight"] @ tensors[f"{module}.adapter.linear_in.weight"]
        expected[f"{module}.weight"] = base[f"{module}.weight"] + 2.0 * delta[:, None]
    check(merged(ours, tmp_path / "merged", config), expected)


@pytest.mark.parametrize("axis", [0, 2])
def test_dora_gives_rows_their_lengths(write, tmp_path: Path, axis: int) -> None:
    """Cut along rows, as two tensor-parallel ranks save it, each rank's lengths begin with its gate's."""
    tensors = adapters(("linear_qkv", "linear_fc1"), dora=True)
    lengths = {name: t.clone() for name, t in tensors.items() if name.endswith("weight_magnitude")}
    fc1 = LAYER + MODULES["linear_fc1"][0]
    if axis == 2:
        gate, up = lengths[f"{fc1}.adapter.weight_magnitude"].chunk(2, -1)
        (g0, g1), (u0, u1) = gate.chunk(2, -1), up.chunk(2, -1)
        tensors[f"{fc1}.adapter.weight_magnitude"] = torch.cat([g0, u0, g1, u1], -1)
    folder, base, config = write(tensors, "DoRA", axis=axis, alpha=4)
    ours = import_any(str(folder), tmp_path / "ours")
    expected = dict(base)
    for target in ("linear_qkv", "linear_fc1"):
        module = LAYER + MODULES[target][0]
        whole = base[f"{module}.weight"] + (
            tensors[f"{module}.adapter.linear_out.weight"] @ tensors[f"{module}.adapter.linear_in.weight"]
        )
        magnitude = lengths[f"{module}.adapter.weight_magnitude"]
        expected[f"{module}.weight"] = whole * (magnitude / whole.norm(dim=-1)).unsqueeze(-1)
    check(merged(ours, tmp_path / "merged", config), expected)


@pytest.mark.parametrize(("kind", "dora"), [("LoRA", False), ("DoRA", True)])
def test_there_and_back(
    write, tmp_path: Path, nemo: Nemo, kind: str, dora: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = adapters(tuple(MODULES), dora=dora)
    folder, _, _ = write(tensors, kind)
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert run(["import", f"nemo://{folder}", "--output", str(ours)]) == 0
    assert run(["verify", str(ours)]) == 0
    assert run(["export", str(ours), str(back), "--format", "nemo-peft", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["adapter"] == str(back)
    for made in (ours, back):
        assert run(["lineage", str(made)]) == 0
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load(read, storage_reader=FileSystemReader(back / "weights"), no_dist=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert json.loads((back / "weights" / "adapter_metadata.json").read_text()) == {
        "model_ckpt_path": str(tmp_path / "base")
    }
    transform = nemo.built((back / "context" / "io.json").read_text()).model.model_transform
    assert (type(transform).__name__, transform.dim, transform.alpha) == (kind, DIM, 8)
    assert transform.target_modules == sorted(MODULES)
    again = import_any(f"nemo://{back}", tmp_path / "again")
    weights = {name: entry for name, entry in read_manifest(again)["files"].items() if name.endswith(".distcp")}
    assert weights == {n: e for n, e in read_manifest(ours)["files"].items() if n.endswith(".distcp")}
    for changed, made in ((folder, ours), (back, back)):
        with next((changed / "weights").glob("*.distcp")).open("ab") as file:
            file.write(b"x")
        assert run(["lineage", str(made)]) == 2
        assert run(["lineage", str(made), "--quick"]) == 0


def test_layers_left_out_stay_as_they_are(write, tmp_path: Path) -> None:
    """NeMo's wildcards: ``target_modules=["*.layers.1.*.linear_proj"]``; the other layer's box is not there."""
    tensors = adapters(("linear_proj",))
    folder, base, config = write(tensors)
    only = {name: [((1, 0, 0), (1, *tensor.shape[1:]))] for name, tensor in tensors.items()}
    for file in (folder / "weights").glob("*.distcp"):
        file.unlink()
    from tests.torch_dist import save_boxes

    save_boxes(tensors, only, folder / "weights")
    module = LAYER + MODULES["linear_proj"][0]
    delta = tensors[f"{module}.adapter.linear_out.weight"] @ tensors[f"{module}.adapter.linear_in.weight"]
    expected = dict(base)
    expected[f"{module}.weight"] = base[f"{module}.weight"] + 2.0 * delta * torch.tensor([0.0, 1.0])[:, None, None]
    check(merged(import_any(str(folder), tmp_path / "ours"), tmp_path / "merged", config), expected)


def test_what_cannot_be_taken(write, tmp_path: Path, nemo: Nemo) -> None:
    folder, _, _ = write(adapters(("linear_proj",)))
    metadata = folder / "weights" / "adapter_metadata.json"
    said = metadata.read_text()
    metadata.write_text(json.dumps({"model_ckpt_path": str(tmp_path / "gone")}))
    with pytest.raises(CheckpointError, match="gone does not exist; pass its new location with --base"):
        import_any(str(folder), tmp_path / "ours")
    for text, why in (
        ("{}", "does not name the base model"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "nested too deep"),
    ):
        metadata.write_text(text)
        with pytest.raises(CheckpointError, match=rf"adapter_metadata\.json: .*{why}"):
            import_any(str(folder), tmp_path / "ours")
    assert import_any(str(folder), tmp_path / "ours", base=str(tmp_path / "base")).is_dir()
    metadata.write_text(said)
    proj = LAYER + MODULES["linear_proj"][0] + ".adapter."
    for change, word in (
        ({proj + "linear_in.weight": None}, "does not have exactly the tensors of a LoRA"),
        ({proj + "linear_in.weight": torch.zeros(2, 5, 32)}, r"has shape \[2, 5, 32\]"),
        ({proj + "linear_in.weight": torch.full((2, DIM, 32), float("nan"))}, "contains NaN"),
        ({LAYER + "mlp.router.adapter.linear_in.weight": torch.zeros(2, DIM, 32)}, "does not belong to any layer"),
        (dict.fromkeys(adapters(("linear_proj",))) | {LAYER + "x": torch.zeros(1)}, "holds no adapters"),
    ):
        changed = {n: t for n, t in (adapters(("linear_proj",)) | change).items() if t is not None}
        for file in (folder / "weights").glob("*.distcp"):
            file.unlink()
        write_weights(folder / "weights", changed)
        with pytest.raises(CheckpointError, match=word):
            import_any(str(folder), tmp_path / "other")
    text = (folder / "context" / "io.json").read_text()
    (folder / "context" / "io.json").write_text(text.replace('"name": "LoRA"', '"name": "CanonicalLoRA"'))
    with pytest.raises(CheckpointError, match="CanonicalLoRA; only LoRA and DoRA"):
        import_any(str(folder), tmp_path / "other")
    with pytest.raises(CheckpointError, match="--dtype has no effect"):
        import_any(str(folder), tmp_path / "other", dtype="bf16")

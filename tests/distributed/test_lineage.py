"""A chain of five links, made by real runs, followed back to its source; each link changed in turn is found."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mixtral_recipes.checkpoints.format.manifest import read_manifest, write_manifest
from mixtral_recipes.checkpoints.lineage import record
from mixtral_recipes.checkpoints.lineage.chain import Follower, Link
from mixtral_recipes.data.tokenizers import load_tokenizer, tokenizer_identity
from mixtral_recipes.embedded import resolve
from mixtral_recipes.errors import CheckpointError, RecipeError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from mixtral_recipes.importers.convert.tensor_hashes import tensors_of
from mixtral_recipes.importers.exports import export
from mixtral_recipes.importers.hf.source import open_source
from tests.distributed.harness import launch
from tests.distributed.tiny_job import Job, silent, start
from tests.mixtral_folder import mixtral_config, mixtral_tensors, write_model

HEADS = {"kv_channels": 8}
KINDS = ["export", "adapter", "training", "model", "source"]


@dataclass
class Chain:
    """Where each link is."""

    export: Path
    adapter: Path
    training: Path
    model: Path
    source: Path
    more_adapters: Path

    def follow(self, *, hashes: bool = True) -> list[Link]:
        return Follower(tensors_of, hashes=hashes).follow(self.export)


def source(folder: Path, seed: int = 0) -> Path:
    """A model folder that fits `tiny_config`."""
    config = mixtral_config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_local_experts=4, vocab_size=2000,
        max_position_embeddings=64, rope_theta=1e4,
    )  # fmt: skip
    write_model(folder, config, mixtral_tensors(config, torch.float32, seed=seed))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(resolve("embedded://mixtral_tiny") / name, folder / name)
    return folder


def make(folder: Path) -> Chain:
    """Import, train all weights, train adapters, train them on, merge and export."""
    with silent():
        given = source(folder / "source")
        model = import_checkpoint(str(given), folder / "model", progress=False)
        full = Job(str(folder / "runs"), "full", steps=1, base=str(model), lr=1e-3, model=HEADS)
        training = Path(start(full).result["checkpoint"])
        job = Job(str(folder / "runs"), "lora", steps=1, base=str(training), lora=True, model=HEADS)
        adapter = Path(start(job).result["checkpoint"])
        further = Job(str(folder / "runs"), "further", steps=1, base=str(adapter), lora=True, model=HEADS)
        more = Path(start(further).result["checkpoint"])
        with pytest.raises(RecipeError, match="this run trains all weights"):
            start(dataclasses.replace(further, lora=False))
    export = export_checkpoint(adapter, folder / "export", progress=False)
    return Chain(export, adapter, training, model, given, more)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return launch(1, make, tmp_path_factory.mktemp("chain"))[0]


@pytest.mark.parametrize("hashes", [True, False])
def test_a_chain_is_followed_back_to_its_source(chain: Chain, hashes: bool) -> None:
    links = chain.follow(hashes=hashes)
    assert [link.record.kind for link in links] == KINDS
    assert [link.state for link in links] == ["ok"] * 5, [link.detail for link in links]
    assert [link.path for link in links] == [getattr(chain, kind) for kind in KINDS]
    run = links[1].record
    assert run.run == {"name": "lora", "step": 1, "consumed_samples": 8}
    assert run.data["form"] == "SQuAD"
    assert run.recipe["peft.dim"] == 4
    assert links[3].record.identity.weights == links[4].record.identity.weights


def test_adapters_trained_on_record_the_base_and_the_adapters(chain: Chain) -> None:
    links = Follower(tensors_of).follow(chain.more_adapters)
    assert [(link.role, link.path, link.state) for link in links[:4]] == [
        ("", chain.more_adapters, "ok"),
        ("base", chain.training, "ok"),
        ("start", chain.model, "ok"),
        ("source", chain.source, "ok"),
    ]
    assert ("start", chain.adapter, "ok") in [(link.role, link.path, link.state) for link in links]


def another_tokenizer(folder: Path) -> Path:
    """The embedded tokenizer with another end and template."""
    tokenizer = load_tokenizer("embedded://mixtral_tiny")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(400)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def own_tokenizer(chain: Chain, folder: Path) -> tuple[Path, list[str], Path]:
    """A run with a tokenizer of its own; what it says of resuming with another; adapters trained on at a moved base."""
    other = another_tokenizer(folder / "tokenizer")
    job = Job(
        str(folder / "runs"), "own", steps=1, base=str(chain.training), lora=True, model=HEADS, tokenizer=str(other)
    )
    with silent():
        checkpoint = Path(start(job).result["checkpoint"])
        moved = shutil.copytree(other, folder / "moved")
        start(dataclasses.replace(job, steps=2, tokenizer=str(moved)))  # the same one elsewhere
        refusals = []
        for resumed in (
            dataclasses.replace(job, steps=3, tokenizer="embedded://mixtral_tiny"),
            dataclasses.replace(job, name="a", base=str(chain.model), adapters=str(chain.adapter)),
            dataclasses.replace(job, name="b", base=str(chain.model), adapters=str(chain.training)),
        ):
            with pytest.raises((RecipeError, CheckpointError)) as error:
                start(resumed)
            refusals.append(str(error.value))
        base = shutil.copytree(chain.training, folder / "base")
        moved_on = Job(
            str(folder / "runs"), "on", steps=1, base=str(base), adapters=str(chain.adapter), lora=True, model=HEADS
        )
        return checkpoint, refusals, Path(start(moved_on).result["checkpoint"])


def test_a_runs_tokenizer_is_recorded_exported_and_compared(chain: Chain, tmp_path: Path) -> None:
    checkpoint, refusals, moved_on = launch(1, own_tokenizer, chain, tmp_path)[0]
    exported = export_checkpoint(checkpoint, tmp_path / "export", progress=False)
    trained_with, found = load_tokenizer(tmp_path / "tokenizer"), load_tokenizer(exported)
    assert tokenizer_identity(found) == tokenizer_identity(trained_with)
    assert record.read(checkpoint).recipe["tokenizer"] == tokenizer_identity(trained_with)
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == 400
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == 400
    own = record.read(exported).identity.tokenizer
    assert own == record.read(checkpoint).identity.tokenizer != record.read(chain.export).identity.tokenizer
    before, after = tokenizer_identity(trained_with), tokenizer_identity(load_tokenizer("embedded://mixtral_tiny"))
    assert f"tokenizer: {before} -> {after}" in refusals[0]
    assert "is not the base of" in refusals[1]
    assert "adapter_path=ADAPTER" in refusals[1]
    assert "has no adapters" in refusals[2]
    links = record.read(moved_on).parents
    assert [(link.role, link.path) for link in links] == [
        ("base", str(tmp_path / "base")),
        ("start", str(chain.adapter)),
    ]


def flip(path: Path) -> None:
    """Change one bit of a file's last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def forge(folder: Path) -> None:
    """Another recipe in a checkpoint's record, sealed again, and the manifest too."""
    manifest = read_manifest(folder)
    own = record.read(folder)
    record.write(folder, dataclasses.replace(own, recipe=own.recipe | {"optim.config.lr": 1.0}))
    write_manifest(folder, manifest["kind"], source=manifest["source"], tensors=manifest["tensors"])


def reimport_another(folder: Path) -> None:
    import_checkpoint(str(source(folder.parent / "other", seed=1)), folder, overwrite=True, progress=False)


def a_run_again(folder: Path) -> None:
    """Another checkpoint at the place: the adapters of the run that went on."""
    shutil.rmtree(folder)
    (other,) = (folder.parents[2] / "further" / "checkpoints").glob("further--*")
    shutil.copytree(other, folder)


WEIGHTS = "weights/__0_0.distcp"
TAMPERED: list[tuple[str, str, Callable[[Path], None]]] = [
    ("source", "a weight", lambda folder: flip(folder / "model.safetensors")),
    ("source", "a setting", lambda folder: edit(folder / "config.json", rope_theta=5e5)),
    ("source", "the tokenizer", lambda folder: flip_text(folder / "tokenizer_config.json")),
    ("source", "another model", lambda folder: (source(folder, seed=2), None)[1]),
    ("model", "a weight", lambda folder: flip(next(folder.glob("weights/*.distcp")))),
    ("model", "another import", reimport_another),
    ("model", "its record", forge),
    ("training", "a weight", lambda folder: flip(next(folder.glob("weights/*.distcp")))),
    ("training", "its record", forge),
    ("training", "no checkpoint", lambda folder: (folder / "manifest.json").unlink()),
    ("adapter", "a weight", lambda folder: flip(next(folder.glob("weights/*.distcp")))),
    ("adapter", "another run", a_run_again),
    ("adapter", "its record", forge),
    ("export", "a weight", lambda folder: flip(folder / "model.safetensors")),
    ("export", "a setting", lambda folder: edit(folder / "config.json", num_experts_per_tok=1)),
    ("export", "the tokenizer", lambda folder: flip_text(folder / "tokenizer.json")),
]


def flip_text(path: Path) -> None:
    path.write_text(path.read_text() + " ")


@pytest.mark.parametrize(("kind", "what", "tamper"), TAMPERED, ids=[f"{kind}: {what}" for kind, what, _ in TAMPERED])
def test_each_link_changed_in_turn_is_found(
    chain: Chain, tmp_path: Path, kind: str, what: str, tamper: Callable[[Path], None]
) -> None:
    folder: Path = getattr(chain, kind)
    kept = shutil.copytree(folder, tmp_path / "kept")
    try:
        tamper(folder)
        links = chain.follow()
        assert [link.record.kind for link in links] == KINDS  # the record goes on where a link is broken
        wrong = [link for link in links if link.state == "wrong"]
        assert [link.record.kind for link in wrong] == [kind]
        assert str(folder) in wrong[0].detail
    finally:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    assert all(link.state == "ok" for link in chain.follow())


@pytest.mark.parametrize("form", ["nemo", "peft"])
def test_other_forms_of_export_carry_their_chain_too(chain: Chain, tmp_path: Path, form: str) -> None:
    made = export(chain.adapter, tmp_path / form, form)
    links = Follower(tensors_of).follow(made)
    assert [(link.record.kind, link.state) for link in links] == [(kind, "ok") for kind in KINDS]
    small = {"nemo": "context/io.json", "peft": "adapter_model.safetensors"}[form]
    flip(made / small)
    links = Follower(tensors_of).follow(made)
    assert [link.state for link in links] == ["wrong", "ok", "ok", "ok", "ok"]
    assert str(made) in links[0].detail


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_small_file_that_is_missing_is_found(chain: Chain, name: str) -> None:
    content = (chain.export / name).read_bytes()
    try:
        (chain.export / name).unlink()
        assert [link.state for link in chain.follow(hashes=False)] == ["wrong", "ok", "ok", "ok", "ok"]
    finally:
        (chain.export / name).write_bytes(content)


def test_both_identities_are_named(chain: Chain, tmp_path: Path) -> None:
    """What was recorded and what is there, of the link that does not match; and the export refuses."""
    recorded = record.read(chain.model).identity.weights
    kept = shutil.copytree(chain.model, tmp_path / "kept")
    try:
        reimport_another(chain.model)
        found = record.read(chain.model).identity.weights
        detail = next(link.detail for link in chain.follow(hashes=False) if link.state == "wrong")
        assert recorded is not None
        assert found is not None
        assert found[:12] in detail
        assert recorded[:12] in detail
    finally:
        shutil.rmtree(chain.model)
        shutil.copytree(kept, chain.model)


def test_what_is_gone_is_told_from_the_record(chain: Chain, tmp_path: Path) -> None:
    moved = chain.training.rename(chain.training.parent / "elsewhere")
    try:
        links = chain.follow()
        assert [link.record.kind for link in links] == KINDS
        assert [link.state for link in links] == ["ok", "ok", "absent", "ok", "ok"]
        found = Follower(tensors_of, base=moved).follow(chain.export)
        assert [link.state for link in found] == ["ok"] * 5
        with pytest.raises(CheckpointError, match="--base PATH"):
            export_checkpoint(chain.adapter, tmp_path / "lost", progress=False)
        export_checkpoint(chain.adapter, tmp_path / "found", base=moved, progress=False)
        assert record.read(tmp_path / "found").identity == record.read(chain.export).identity
        links = Follower(tensors_of).follow(tmp_path / "found")  # it remembers where the base was when it was merged
        assert [link.path for link in links][2] == moved
        assert [link.state for link in links] == ["ok"] * 5
    finally:
        moved.rename(chain.training)


def test_an_export_imported_again_goes_on_with_its_chain(chain: Chain, tmp_path: Path) -> None:
    again = import_checkpoint(str(chain.export), tmp_path / "again", progress=False)
    links = Follower(tensors_of).follow(again)
    assert [link.record.kind for link in links] == ["model", *KINDS]
    assert all(link.state == "ok" for link in links)
    cast = import_checkpoint(str(chain.source), tmp_path / "cast", dtype="bf16", progress=False)
    assert [link.state for link in Follower(tensors_of).follow(cast)] == ["ok", "ok"]
    before = (chain.source / "model.safetensors").read_bytes()
    try:
        flip(chain.source / "model.safetensors")
        open_source(chain.source)  # its header is as it was
        links = Follower(tensors_of).follow(cast)
    finally:
        (chain.source / "model.safetensors").write_bytes(before)
    # The lowest bit of a float32 may vanish in bfloat16: the check says what can be said of what was imported.
    assert links[0].state == "ok"

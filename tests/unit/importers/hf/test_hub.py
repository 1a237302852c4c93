"""The Hub path, against a loopback server that speaks the Hub's API and fails in every way a network does."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mixtral_recipes.checkpoints.format.integrity import verify
from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.errors import CheckpointError, EnvironmentProblem
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from mixtral_recipes.importers.hf import hub
from mixtral_recipes.importers.resolve import resolve
from mixtral_recipes.system.home import models_home
from tests.unit.importers.hf import hub_server

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def server(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["hub_server.HubServer"]:
    """A running server, with huggingface_hub pointed at it and at an empty cache."""
    folder, _, _ = make_model("served", shards=3)
    (folder / "consolidated.00.pt").write_bytes(b"not needed")
    running = hub_server.HubServer(folder)
    point_at(running.url, tmp_path / "cache", monkeypatch)
    yield running
    running.stop()


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE do, in a process that has imported huggingface_hub already."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # so that a broken transfer leaves something
    monkeypatch.setattr(hub, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_fresh_download(server: "hub_server.HubServer") -> None:
    checkpoint = import_checkpoint("hf://org/mixtral")
    manifest = verify(checkpoint)
    assert manifest["source"]["id"] == "hf://org/mixtral"
    assert manifest["source"]["revision"] == hub_server.COMMIT
    assert checkpoint == models_home() / "org" / "mixtral@0123456789ab"
    assert server.count("consolidated.00.pt") == server.count("notes.txt") == 0
    assert server.count(SHARD) == 1
    assert resolve("nemo://org/mixtral") == checkpoint
    before = len(server.served)
    assert import_checkpoint("hf://org/mixtral@main") == checkpoint  # same commit, so nothing to do
    assert len(server.served) == before


def test_same_tensors_as_from_the_folder(server: "hub_server.HubServer", tmp_path: Path) -> None:
    from_hub = read_manifest(import_checkpoint("org/mixtral", tmp_path / "hub"))
    from_folder = read_manifest(import_checkpoint(str(server.folder), tmp_path / "folder"))
    assert from_hub["tensors"] == from_folder["tensors"]


@pytest.mark.parametrize("fault", ["500", "reset", "short", "wrong"])
def test_a_fault_is_overcome(server: "hub_server.HubServer", fault: str) -> None:
    server.faults[SHARD] = [fault] * (1 if fault == "wrong" else 2)
    verify(import_checkpoint("hf://org/mixtral"))
    assert server.faults[SHARD] == []
    spans = [span for _, name, span in server.served if name == SHARD]
    if fault in ("reset", "short"):
        assert any(span for span in spans)  # went on where it had stopped
    if fault == "wrong":
        assert len(spans) == 2


def test_an_interrupted_download_is_resumed_by_the_next_run(server: "hub_server.HubServer") -> None:
    server.faults[SHARD] = ["reset"] + ["500"] * 100
    with pytest.raises(EnvironmentProblem):
        import_checkpoint("hf://org/mixtral")
    others = server.count("model-00001-of-00003.safetensors")
    server.faults[SHARD] = []
    verify(import_checkpoint("hf://org/mixtral"))
    last = [span for _, name, span in server.served if name == SHARD][-1]
    assert last is not None
    assert int(last.removeprefix("bytes=").split("-")[0]) > 0
    assert server.count("model-00001-of-00003.safetensors") == others


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_wrong_bytes_are_never_used(server: "hub_server.HubServer", tmp_path: Path, name: str) -> None:
    server.faults[name] = ["wrong"] * (3 if name == SHARD else 2)
    with pytest.raises(CheckpointError, match="not the ones the Hub publishes"):
        import_checkpoint("hf://org/mixtral", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    verify(import_checkpoint("hf://org/mixtral", tmp_path / "out"))  # the bad ones are not in the cache


def test_no_such_thing(server: "hub_server.HubServer") -> None:
    with pytest.raises(CheckpointError, match="no revision 'nowhere'"):
        import_checkpoint("hf://org/mixtral@nowhere")
    with pytest.raises(CheckpointError, match="does not exist, or is private"):
        import_checkpoint("hf://org/other")
    with pytest.raises(CheckpointError, match="neither a folder"):
        import_checkpoint("hf://just-a-name")
    (server.folder / SHARD).unlink()
    with pytest.raises(CheckpointError, match="not in the repository"):
        import_checkpoint("hf://org/mixtral")


@pytest.mark.parametrize("text", ["[]", '{"weight_map": {"w": 1}}', "[" * 100_000])
def test_an_index_of_other_things(server: "hub_server.HubServer", tmp_path: Path, text: str) -> None:
    (server.folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: not "):
        import_checkpoint("hf://org/mixtral", tmp_path / "out")


def test_two_sets_of_weights(server: "hub_server.HubServer", tmp_path: Path) -> None:
    (server.folder / "model.safetensors").write_bytes((server.folder / SHARD).read_bytes())
    with pytest.raises(CheckpointError, match=r"^hf://org/mixtral: has two sets of weights, model\.safetensors and"):
        import_checkpoint("hf://org/mixtral", tmp_path / "out")


def test_a_configuration_that_is_no_text(server: "hub_server.HubServer", tmp_path: Path) -> None:
    (server.folder / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        import_checkpoint("hf://org/mixtral", tmp_path / "out")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"sha": "../../x"}, "commit='../../x' is not allowed"),
        ({"sha": None}, "commit=None is not allowed"),
        ({"siblings": [{"rfilename": "LICENSE/../../../x", "size": 1, "blobId": "a" * 40}]}, "outside its own folder"),
        ({"siblings": [{"rfilename": "/etc/passwd", "size": 1, "blobId": "a" * 40}]}, "outside its own folder"),
        ({"siblings": [{"rfilename": "config.json", "size": -1, "blobId": "a" * 40}]}, "files[0].size=-1"),
        ({"siblings": [{"rfilename": "config.json", "size": "1", "blobId": "a" * 40}]}, "files[0].size='1'"),
        ({"siblings": [{"rfilename": "config.json", "size": 1 << 40, "blobId": "a" * 40}]}, "1099511627776 bytes"),
        ({"siblings": [{"rfilename": "config.json", "size": 1, "blobId": "../x"}]}, "git_sha1='../x'"),
        ({"siblings": [{}]}, "does not describe a model"),
        ({"siblings": 3}, "does not describe a model"),
    ],
)
def test_an_answer_that_is_none(
    server: "hub_server.HubServer", monkeypatch: pytest.MonkeyPatch, answer: dict[str, object], told: str
) -> None:
    good = server.info()
    monkeypatch.setattr(server, "info", lambda: good | answer)
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint("hf://org/mixtral")
    assert told in str(caught.value)


def test_gated_says_how_to_get_access(server: "hub_server.HubServer", monkeypatch: pytest.MonkeyPatch) -> None:
    server.gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint("hf://org/mixtral")
    assert "accept its terms" in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert "Bearer hf_secret" in server.tokens


def test_no_network_uses_the_cache_or_says_so(
    server: "hub_server.HubServer", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_checkpoint("hf://org/mixtral", tmp_path / "first")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    again = import_checkpoint("hf://org/mixtral", tmp_path / "second")
    assert read_manifest(again)["source"]["revision"] == hub_server.COMMIT
    with pytest.raises(EnvironmentProblem, match="cannot be reached"):
        import_checkpoint("hf://org/never-seen")
    blob = next((tmp_path / "cache").rglob(SHARD)).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        import_checkpoint("hf://org/mixtral", tmp_path / "third")


def test_from_the_command_line(server: "hub_server.HubServer", tmp_path: Path) -> None:
    """HF_ENDPOINT itself, in a process of its own."""
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf_home")}
    command = [sys.executable, "-W", "ignore", "-m", "mixtral_recipes.cli.main"]
    done = subprocess.run(
        [*command, "import", "hf://org/mixtral", "--output", str(tmp_path / "out"), "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"checkpoint"' in done.stdout.splitlines()[-1]
    verify(tmp_path / "out")


def test_an_export_brings_its_lineage(server: "hub_server.HubServer", tmp_path: Path) -> None:
    exported = export_checkpoint(import_checkpoint(str(server.folder), tmp_path / "megatron"), tmp_path / "exported")
    server.folder = exported
    again = import_checkpoint("hf://org/mixtral", tmp_path / "again")
    assert [link.kind for link in lineage.read(again).ancestors()] == ["model", "export", "model", "source"]
    assert read_manifest(again)["left_behind"] == ["README.md"]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub of httpx
def test_push_both_ways(server: "hub_server.HubServer", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--push-to-hub of import and of export: the finished folder, byte for byte, private unless told otherwise."""
    from mixtral_recipes.cli.main import run

    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    checkpoint, back = tmp_path / "megatron", tmp_path / "back"
    assert run(["import", str(server.folder), "--output", str(checkpoint), "--push-to-hub", "org/megatron"]) == 0
    assert run(["export", str(checkpoint), str(back), "--push-to-hub", "org/back", "--public"]) == 0
    assert server.private == {"org/megatron": True, "org/back": False}
    for repo, folder in (("org/megatron", checkpoint), ("org/back", back)):
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        assert server.uploaded[repo].keys() == files.keys()
        assert all(server.uploaded[repo][name] == path.read_bytes() for name, path in files.items())
    published = server.uploaded["org/back"]["lineage.json"].decode()
    assert str(tmp_path) not in published  # what is uploaded names no folder of this machine
    assert [link.kind for link in lineage.read(back).ancestors()] == ["export", "model", "source"]


def test_push_without_leave_keeps_the_folder(
    server: "hub_server.HubServer", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mixtral_recipes.cli.main import run

    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    words = ["import", str(server.folder), "--output", str(tmp_path / "out"), "--push-to-hub", "org/elsewhere"]
    assert run(words) == 2
    said = capsys.readouterr().err
    assert "401" in said
    assert "with write access" in said
    assert "hf_reader" not in said
    assert server.uploaded == {}
    verify(tmp_path / "out")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_push_that_breaks_off_says_so(
    server: "hub_server.HubServer", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    server.faults["upload"] = ["500"]
    hub.upload(server.folder, "org/once")
    assert server.faults["upload"] == []
    assert server.uploaded["org/once"].keys() == {path.name for path in server.folder.iterdir()}
    server.faults["upload"] = ["500"] * 100
    with pytest.raises(EnvironmentProblem, match=r"--push-to-hub org/twice: .*the upload failed"):
        hub.upload(server.folder, "org/twice")
    assert "org/twice" not in server.uploaded

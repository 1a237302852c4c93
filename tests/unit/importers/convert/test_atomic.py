"""Killed, raced, interrupted: a checkpoint has its name only when it is whole."""

import os
import resource
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mixtral_recipes.checkpoints.format.integrity import verify
from mixtral_recipes.checkpoints.format.manifest import write_manifest
from mixtral_recipes.checkpoints.publish import publish
from mixtral_recipes.errors import CheckpointError, EnvironmentProblem
from mixtral_recipes.importers.convert import hf_to_megatron
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.exports import FORMATS, export
from mixtral_recipes.settings.peft import LoRA
from tests.adapter_folder import make_adapter

# Set MIXTRAL_RECIPES_KILLS=20 for the full number.
KILLS = int(os.environ.get("MIXTRAL_RECIPES_KILLS", "5"))
BIG = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2000}  # 30 MB: long enough to be killed in


def test_killed_at_random_moments(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model(**BIG)
    output = tmp_path / "out" / "checkpoint"
    script = Path(__file__).with_name("killed_import.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, folder, output, "0", str(KILLS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    early, late = map(int, done.stdout.split()[-2:])
    assert early + late == KILLS
    assert early > 0
    import_checkpoint(str(folder), output)  # takes no notice of what the killed ones left
    verify(output)
    assert [path.name for path in output.parent.iterdir()] == ["checkpoint"]


def test_two_at_once_do_the_work_once(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, _ = make_model()
    runs = []
    run = hf_to_megatron._Import.run

    def counted(self, *arguments, **options):
        runs.append(threading.get_ident())
        run(self, *arguments, **options)

    monkeypatch.setattr(hf_to_megatron._Import, "run", counted)
    with ThreadPoolExecutor(3) as pool:  # flock is per open file, so threads exclude each other as processes do
        found = set(pool.map(lambda _: import_checkpoint(str(folder)), range(3)))
    assert len(found) == 1
    assert len(runs) == 1
    verify(found.pop())


def test_interrupt_leaves_nothing(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, _ = make_model()

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_to_megatron, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(str(folder), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("target", [name for name in FORMATS if name != "gguf"])  # that needs a real tokenizer
@pytest.mark.parametrize("most", [0, 16384])
def test_a_disk_that_takes_no_more_ends_an_export_in_a_line_that_names_the_place(
    make_model, tmp_path: Path, target: str, most: int
) -> None:
    folder, _, _ = make_model()
    adapter = make_adapter(import_checkpoint(str(folder), tmp_path / "base"), LoRA(dim=4), tmp_path / "adapter")
    output = tmp_path / "out" / "model"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises((OSError, EnvironmentProblem)) as error:
            export(adapter, output, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(output.parent) in str(error.value)
    assert list(output.parent.iterdir()) == []


def test_publish(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with publish(final, "model") as staging:
        (staging / "file").write_text("one")
        assert not final.exists()
    assert (final / "file").read_text() == "one"
    with pytest.raises(CheckpointError, match="exists"), publish(final, "model"):
        pass
    write_manifest(final, "model")
    with pytest.raises(RuntimeError), publish(final, "model", overwrite=True) as staging:
        raise RuntimeError
    assert (final / "file").read_text() == "one"
    with publish(final, "model", overwrite=True) as staging:
        (staging / "file").write_text("two")
    assert (final / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    stale = tmp_path / ".final.partial"
    stale.mkdir()
    (stale / "half").write_text("x")
    with publish(tmp_path / "final", "model") as staging:
        assert list(staging.iterdir()) == []
    shutil.rmtree(tmp_path / "final")


@pytest.mark.parametrize("replacement_is_there", [True, False])
def test_what_a_killed_overwrite_left(tmp_path: Path, replacement_is_there: bool) -> None:
    """Killed before the second rename, the old folder gets its name back; killed after it, the old one goes."""
    final, replaced = tmp_path / "final", tmp_path / ".final.replaced"
    for folder in (final, replaced) if replacement_is_there else (replaced,):
        folder.mkdir()
        (folder / "which").write_text(folder.name)
        write_manifest(folder, "model")
    with pytest.raises(CheckpointError, match="exists"), publish(final, "model"):
        pass
    assert (final / "which").read_text() == ("final" if replacement_is_there else ".final.replaced")
    with publish(final, "model", overwrite=True) as staging:
        (staging / "file").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "file"]

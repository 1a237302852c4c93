"""An adapter that was exported and comes back: the same adapter, on the base it was trained on, with its history."""

import json
import re
from pathlib import Path

import pytest

from mixtral_recipes.checkpoints.lineage import record
from mixtral_recipes.checkpoints.lineage.chain import Follower
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.adapter_to_nemo import export_nemo_adapter
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.peft.export import export_adapter
from mixtral_recipes.importers.resolve import import_any
from mixtral_recipes.settings.peft import LoRA
from tests.adapter_folder import make_adapter

EXPORTS = {"peft": export_adapter, "nemo": export_nemo_adapter}


@pytest.fixture(params=EXPORTS)
def exported(request: pytest.FixtureRequest, make_model, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter's export, and its base."""
    folder, _, _ = make_model()
    base = import_checkpoint(str(folder), tmp_path / "base", progress=False)
    trained = make_adapter(base, LoRA(dim=2, target_modules="attention"), tmp_path / "trained")
    return EXPORTS[request.param](trained, tmp_path / "exported"), base


def test_its_history_comes_along(exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = exported
    again = record.read(import_any(str(folder), tmp_path / "again", base=str(base)))
    assert [known.kind for known in again.ancestors()].count("export") == 1
    assert record.read(tmp_path / "trained").digest in {known.digest for known in again.ancestors()}


def test_another_base_of_the_same_sizes_is_refused(exported: tuple[Path, Path], make_model, tmp_path: Path) -> None:
    folder, _ = exported
    other = import_checkpoint(str(make_model(seed=1)[0]), tmp_path / "other", progress=False)
    with pytest.raises(CheckpointError, match=r"other is not the base of .*exported: .* was recorded"):
        import_any(str(folder), tmp_path / "again", base=str(other))
    assert not (tmp_path / "again").exists()


def test_settings_that_were_changed_are_refused(exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = exported
    path = next(path for path in (folder / "adapter_config.json", folder / "context" / "io.json") if path.is_file())
    changed, count = re.subn(r'(alpha"|alpha\'\)", \{"type": "leaf", "value")(: ?)32\b', r"\1\g<2>64", path.read_text())
    assert count == 1
    path.write_text(changed)
    with pytest.raises(CheckpointError, match=r"does not match its lineage\.json: it has .*config"):
        import_any(str(folder), tmp_path / "again", base=str(base))
    links = Follower(lambda *_: {}, base=base).follow(folder)
    assert links[0].state == "wrong"
    assert "config" in links[0].detail


def test_where_pefts_base_is_and_the_order_of_its_lists_say_nothing(make_model, tmp_path: Path) -> None:
    base = import_checkpoint(str(make_model()[0]), tmp_path / "base", progress=False)
    folder = export_adapter(make_adapter(base, LoRA(dim=2), tmp_path / "trained"), tmp_path / "exported")
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    moved = {"base_model_name_or_path": "elsewhere", "target_modules": settings["target_modules"][::-1]}
    path.write_text(json.dumps(settings | moved))
    import_any(str(folder), tmp_path / "again", base=str(base))


def test_a_tokenizer_beside_pefts_files_says_nothing(make_model, tmp_path: Path) -> None:
    base = import_checkpoint(str(make_model()[0]), tmp_path / "base", progress=False)
    folder = export_adapter(make_adapter(base, LoRA(dim=2), tmp_path / "trained"), tmp_path / "exported")
    (folder / "lineage.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    again = import_any(str(folder), tmp_path / "again", base=str(base))
    (folder / "tokenizer.json").unlink()
    links = Follower(lambda *_: {}, hashes=False).follow(again)
    assert {link.state for link in links if link.path == folder} == {"ok"}

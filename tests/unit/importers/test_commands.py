"""import, export and verify on the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_recipes.cli.main import run


@pytest.mark.parametrize("module", ["import_checkpoint", "export", "verify"])
def test_the_command_module_is_light(module: str) -> None:
    code = (
        f"import sys, mixtral_recipes.cli.{module}; "
        "print(sorted({'torch', 'megatron', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_there_back_and_verified(make_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, _ = make_model()
    checkpoint, back = tmp_path / "megatron", tmp_path / "back"
    assert run(["import", str(folder), "--output", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoint"] == str(checkpoint)
    assert run(["export", str(checkpoint), str(back), "--layout", "v5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["model"] == str(back)
    assert run(["verify", str(checkpoint), "--against", str(back), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["passed"] is True


def test_errors_are_one_line(make_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, _ = make_model()
    checkpoint = tmp_path / "megatron"
    for words in (
        ["import", str(tmp_path / "nowhere")],
        ["import", str(folder), "--dtype", "int4"],
        ["export", str(folder), str(tmp_path / "back")],
        ["verify", str(tmp_path)],
        ["export", str(folder), str(tmp_path / "back"), "--format", "gguf"],
    ):
        assert run(words) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("error: ")
    assert run(["import", str(folder), "--output", str(checkpoint)]) == 0
    (checkpoint / "context" / "tokenizer.json").write_text("changed")
    assert run(["verify", str(checkpoint)]) == 2

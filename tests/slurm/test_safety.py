"""Hostile values stay values, and a token is nowhere but in its 0600 file."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from slurm_site import Site

VALUES = [
    "a b; touch X", "`touch X`", "$(touch X)", "a\nb", "a\ttouch X", "..", "../x", "-rf", "--wrap=id", "'", '"',
    "'; touch X; '", '"; touch X; "', "a & touch X", "a | touch X", "a > X", "a < /etc/passwd", "*", "?", "~root",
    "$HOME", "${IFS}x", "a\\", "\\$(touch X)", "#SBATCH --wrap=id", "", " ", "!x", "{a,b}", "[a]", "é", "%j", "$$",
    "${SLURM_JOB_ID}",    "\nEOF\ntouch X\n", "$'touch X'", "a=b", "\r",
]  # fmt: skip


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_hostile_values_arrive_and_run_nothing(plain: Site) -> None:
    values = {f"MIXTRAL_RECIPES_HOSTILE_{number}": value for number, value in enumerate(VALUES)}
    text = "\n".join(VALUES)
    record = plain.submit(
        "hostile", 1, 2, steps=1, text=text, dump_env="MIXTRAL_RECIPES_HOSTILE_", settings={"env": values}
    )
    plain.succeed(record)
    arrived = json.loads((plain.runs / "hostile" / "env.json").read_text())
    assert arrived == {key: sha(value) for key, value in values.items()} | {"text": sha(text)}
    assert not [path for path in plain.root.rglob("*") if path.name == "X"]
    assert not Path("X").exists()


def holders(root: Path, canary: bytes) -> list[Path]:
    """Files that hold the canary."""
    found = []
    for folder, _, files in os.walk(root):
        for file in files:
            path = Path(folder, file)
            if path.is_file() and not path.is_symlink() and canary in path.read_bytes():
                found.append(path)
    return found


def test_token_is_only_in_its_private_file(plain: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = f"hf_canary_{os.urandom(12).hex()}"
    monkeypatch.setenv("HF_TOKEN", canary)
    monkeypatch.setenv("SOME_OTHER_THING", canary)  # not named as a secret: it must not travel at all
    record = plain.submit("canary", steps=2000, step_s=0.5, dump_env="HF_TOKEN")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("SOME_OTHER_THING")
    plain.wait_for_step("canary", 2)
    assert json.loads((plain.runs / "canary" / "env.json").read_text())["HF_TOKEN"] == sha(canary)
    private = Path(record.job_dir, "secrets.env")
    assert holders(plain.root, canary.encode()) == [private]
    assert private.stat().st_mode & 0o777 == 0o600
    assert Path(record.job_dir).stat().st_mode & 0o777 == 0o700
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert canary.encode() not in (process / "cmdline").read_bytes()
        except OSError:
            continue
    plain.cli("cancel", record.id)
    plain.wait(record)
    end = Path(record.job_dir, "attempts.jsonl")
    from slurm_cluster import wait_for

    wait_for(lambda: '"final": true' in end.read_text(), "the job to end", 120)
    assert holders(plain.root, canary.encode()) == []

"""What is packed is what is on disk: uncommitted and untracked files too, ignored ones not."""

import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

nemo_run = pytest.importorskip("nemo_run")

from mixtral_recipes.errors import LaunchError, MixtralRecipesWarning  # noqa: E402
from mixtral_recipes.executors.packager import WorkingTreePackager  # noqa: E402


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "pkg").mkdir(parents=True)
    (root / "pkg" / "a.py").write_text("committed")
    (root / ".gitignore").write_text("*.bin\n")
    (root / "link").symlink_to("pkg")
    (root / "outside").symlink_to("/etc")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", "-C", str(root)]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    (root / "pkg" / "a.py").write_text("changed")
    (root / "new; touch X.py").write_text("untracked")
    (root / "big.bin").write_text("ignored")
    return root


def pack(root: Path, tmp_path: Path, **settings: Any) -> dict[str, tarfile.TarInfo]:
    job = tmp_path / "job"
    job.mkdir(exist_ok=True)
    archive = WorkingTreePackager(roots=[str(root)], **settings).package(tmp_path, str(job), "code")
    assert Path(archive).stat().st_mode & 0o777 == 0o600
    with tarfile.open(archive) as tar:
        return {member.name: member for member in tar.getmembers()}


def test_working_tree_as_it_is(tree: Path, tmp_path: Path) -> None:
    members = pack(tree, tmp_path)
    assert set(members) == {".gitignore", "pkg/a.py", "new; touch X.py", "link"}
    assert members["pkg/a.py"].size == len("changed")
    assert members["link"].issym()
    assert members["link"].linkname == "pkg"
    manifest = json.loads((tmp_path / "job" / "code.json").read_text())
    assert len(manifest["roots"][0]["commit"]) == 40
    assert any("a.py" in line for line in manifest["roots"][0]["uncommitted"])
    assert set(manifest["files"]) == set(members)


def test_keys_stay_whether_git_tracks_them_or_not(tree: Path, tmp_path: Path) -> None:
    keys = [".env", "conf/.env.local", "prod.env", "id_ed25519", "certs/server.pem", ".ssh/config", ".netrc"]
    kept = [".env.example", "environment.py", "keys.py", "id_rsa.pub", "monkey"]
    for name in (*keys, *kept):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("x")
    (tree / "innocent.txt").symlink_to(".env")
    subprocess.run(["git", "-C", str(tree), "add", "-f", ".env", "id_ed25519"], check=True)
    members = pack(tree, tmp_path)
    assert set(kept) <= set(members)
    assert not {*keys, "innocent.txt"} & set(members)
    manifest = json.loads((tmp_path / "job" / "code.json").read_text())
    assert set(manifest["roots"][0]["left_out"]) == {*keys, "innocent.txt"}


def test_what_git_ignores_stays_though_it_tracks_it(tree: Path, tmp_path: Path) -> None:
    (tree / "weights.bin").write_text("tracked, and ignored")
    subprocess.run(["git", "-C", str(tree), "add", "-f", "weights.bin"], check=True)
    with pytest.warns(MixtralRecipesWarning, match=r"weights\.bin are not packed, because git ignores them"):
        members = pack(tree, tmp_path)
    assert "weights.bin" not in members
    manifest = json.loads((tmp_path / "job" / "code.json").read_text())
    assert manifest["roots"][0]["left_out"] == ["weights.bin"]


def test_folder_without_git(tmp_path: Path) -> None:
    root = tmp_path / "plain"
    for name in ("pkg/a.py", "pkg/__pycache__/a.pyc", ".venv/x", "build/y", ".secret"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    assert set(pack(root, tmp_path)) == {"pkg/a.py"}


def test_size_limit_names_the_largest(tree: Path, tmp_path: Path) -> None:
    (tree / "data.jsonl").write_bytes(os.urandom(2 * 2**20))
    with pytest.raises(LaunchError, match=r"data\.jsonl \(2 MiB\)"):
        pack(tree, tmp_path, max_mib=1)

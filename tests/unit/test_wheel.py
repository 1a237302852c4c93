"""The wheel holds the whole package, symlinked folders included, and imports outside the checkout."""

import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mixtral_recipes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_every_module_and_the_embedded_files_are_inside(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for module in pkgutil.walk_packages(mixtral_recipes.__path__, "mixtral_recipes."):
        path = module.name.replace(".", "/")
        assert {f"{path}.py", f"{path}/__init__.py"} & names, module.name
    assert "mixtral_recipes/embedded/mixtral_tiny/model.safetensors" in names
    assert "mixtral_recipes/embedded/squad/train.json" in names
    assert {f"mixtral_recipes/reports/templates/report.{suffix}" for suffix in ("html", "css")} <= names
    assert "mixtral_recipes/py.typed" in names


def test_every_module_imports_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import importlib, pkgutil, mixtral_recipes\n"
        "assert mixtral_recipes.__file__.startswith(sys.argv[1]), mixtral_recipes.__file__\n"
        "for m in pkgutil.walk_packages(mixtral_recipes.__path__, 'mixtral_recipes.'):\n"
        "    importlib.import_module(m.name)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(site)], check=True, cwd=tmp_path)

"""Packages that need not be installed."""

from pathlib import Path

import pytest

from mixtral_recipes.errors import EnvironmentProblem
from mixtral_recipes.system.packages import package


def test_a_missing_package_is_told_from_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, code in {
        "whole": "answer = 42",
        "broken": "import numpy\nnumpy.no_such_name",
        "half": "import missing_dependency",
        "exits": "raise OSError('libx.so.1: cannot open shared object file')",
    }.items():
        (tmp_path / f"mr_{name}.py").write_text(code)
    assert package("mr_whole", "").answer == 42
    for name in ("mr_none", "mr_none.below"):
        with pytest.raises(EnvironmentProblem, match=r"^get it$"):
            package(name, "get it")
    for name, told in {
        "mr_broken": "AttributeError: .*no_such_name",
        "mr_half": "ModuleNotFoundError: No module named 'missing_dependency'",
        "mr_whole.below": "ModuleNotFoundError: .*mr_whole.below",
        "mr_exits": "OSError: libx.so.1",
    }.items():
        what = name.partition(".")[0]
        with pytest.raises(EnvironmentProblem, match=rf"^{what} is installed but cannot be imported \({told}"):
            package(name, "get it")

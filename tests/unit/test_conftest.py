"""On a machine with a GPU it is seen by the tests that are for one, and by no others."""

from pathlib import Path

import pytest

from tests import conftest


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], False),
        (["tests"], False),
        (["tests/unit"], False),
        (["tests/gpu"], True),
        (["tests/gpu/test_training.py::test_fine_tuning_in_bf16[full]", "tests/gpu/test_qlora.py"], True),
        (["tests/gpu", "tests/unit"], False),
    ],
)
def test_who_sees_a_gpu(arguments: list[str], wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(conftest.ROOT)
    assert conftest.for_a_gpu(arguments) == wanted
    assert conftest.for_a_gpu([str(Path(each).absolute()) for each in arguments]) == wanted

"""Pipeline files that are clumsy end in one line that names the stage and the rule."""

from pathlib import Path

import pytest

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors import pipeline

STAGE = '[[stage]]\nname = "a"\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stage = 1", "stage=1 is not allowed; a list"),
        ("stage = [1]", "stage[0]=1 is not allowed; a table"),
        ("name = 1\n" + STAGE, "name=1 is not allowed; text"),
        ("dir = [1]\n" + STAGE, "dir=[1] is not allowed; text"),
        (STAGE + 'command = "import x"', "stage 'a': command='import x' is not allowed; a list"),
        (STAGE + "command = [1]", "stage 'a': command[0]=1 is not allowed; text"),
        (STAGE + 'recipe = "x"\ntask = "evaluate"', "task='evaluate' is not allowed"),
        (STAGE + 'recipe = "x"\noverrides = "a=1"', "overrides='a=1' is not allowed; a list"),
        (STAGE + 'recipe = "x"\nslurm = []', "slurm=[] is not allowed; a table"),
        (STAGE + "after = true\ncommand = ['x']", "after=True is not allowed; a list"),
        ("[[stage]]\nname = true\ncommand = ['x']", "name=True is not allowed; text"),
        (STAGE + "comand = ['x']", "unknown key 'comand'"),
    ],
)
def test_a_clumsy_file(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(LaunchError) as caught:
        pipeline.read(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(STAGE + 'command = ["import", "x"]\n[[stage]]\nname = "b"\nrecipe = "mixtral_tiny"\n')
    read = pipeline.read(path)
    assert (read.name, [stage.name for stage in read.stages]) == ("p", ["a", "b"])
    assert read.stages[0].command == ("import", "x")
    assert read.stages[1].after == ("a",)

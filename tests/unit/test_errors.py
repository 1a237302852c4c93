"""Errors are told in one line."""

import errno
import runpy
import subprocess
import sys
from pathlib import Path

import fiddle as fdl
import pytest

from mixtral_recipes.errors import in_python, in_short, of_the_machine


@pytest.mark.parametrize(
    ("error", "text"),
    [(ValueError("\nfirst\nsecond"), "first"), (ValueError(), "ValueError"), (OSError("x" * 300), "x" * 200)],
)
def test_a_library_error_becomes_one_line(error: Exception, text: str) -> None:
    assert in_short(error) == text


def test_an_assertion_without_a_message_is_told_by_what_it_asserts(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text("def part(sizes):\n    assert (sizes\n            and max(sizes) > 1)\n")
    part = runpy.run_path(str(tmp_path / "part.py"))["part"]
    for make in (lambda: part([]), lambda: fdl.build(fdl.Config(part, []))):
        with pytest.raises(AssertionError) as caught:
            make()
        assert in_short(caught.value) == "assert (sizes and max(sizes) > 1)"


def test_the_library_of_configs_adds_nothing() -> None:
    def part() -> None:
        raise ValueError

    with pytest.raises(ValueError, match="Fiddle context") as caught:
        fdl.build(fdl.Config(part))
    assert in_short(caught.value) == "ValueError"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied; choose a place"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
        (OSError(errno.EIO, "Input/output error", "/x"), "/x: Input/output error."),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"/x"), "/x: No such file or directory; check"),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_the_operating_system_refuses_is_one_line(error: BaseException, said: str) -> None:
    problem = of_the_machine(error)
    assert problem is not None
    assert str(problem).startswith(said)
    assert problem.exit_code == 2


@pytest.mark.parametrize("error", [ValueError("x"), OSError("made up by a library"), KeyError("x")])
def test_other_errors_are_ours(error: BaseException) -> None:
    assert of_the_machine(error) is None


@pytest.mark.parametrize(
    ("command", "script"),
    [
        ("set --num-nodes to 2", "set recipe.trainer.num_nodes to 2"),
        (
            "To repair: trainer.strategy.context_parallel_size=2",
            "To repair: recipe.trainer.strategy.context_parallel_size=2",
        ),
        ("start a run with another --name.", "start a run with another recipe.log.name."),
        (
            "--format hff is not a known format; --base has no effect",
            "target hff is not a known format; base has no effect",
        ),
        ("type `mixtral-recipes export X --format hf`", "type `mixtral-recipes export X --format hf`"),
        ("use --executor slurm", "use executor=run.SlurmExecutor(...)"),
        ("runs/model.config is a file of mine", "runs/model.config is a file of mine"),
        ("recipe.trainer.devices", "recipe.trainer.devices"),
        ("see docs/guide/own-data.md", "see docs/guide/own-data.md"),
    ],
)
def test_a_scripts_words_for_options_and_settings(command: str, script: str) -> None:
    assert in_python(command) == script


def test_a_panic_of_the_tokenizers_library_is_named() -> None:
    """A regular expression that gives up: Rust's panic is no Exception."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={"x": 0}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(x+x+)+y"), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(BaseException, match="retry-limit-in-match") as caught:
        tokenizer.encode("x" * 40)
    assert not isinstance(caught.value, Exception)
    assert "the tokenizers library failed on a text (Onig: Regex search error" in str(of_the_machine(caught.value))


def test_a_home_folder_that_is_none() -> None:
    with pytest.raises(RuntimeError) as caught:
        Path("~nobody-of-this-name/x").expanduser()
    assert "the home folder of ~ or ~NAME cannot be found" in str(of_the_machine(caught.value))
    assert of_the_machine(RuntimeError("another")) is None


def test_a_python_without_docstrings_is_told_from_a_defect() -> None:
    code = "import sys; from mixtral_recipes.cli import main; sys.exit(main.run(['finetune', '--dry-run']))"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1].split(";")[0]) == (
        2, "error: this Python runs without docstrings, which nemo_run reads",
    )  # fmt: skip

"""Errors a user can fix.

Every error here ends a command with exit code 2 and one line: what failed, the value, the rule, the fix.
Anything else that escapes is our bug: exit code 1.
"""

import contextlib
from collections.abc import Iterator, Sequence

# What a command's option is called in a script; the longer spellings stand first.
_IN_PYTHON = {
    "--executor slurm": "executor=run.SlurmExecutor(...)",
    "--executor local": "executor=run.LocalExecutor()",
    "--restore-from": "recipe.resume.restore_config.path",
    "--resize-vocab": "recipe.resume.restore_config.resize_vocab=True",
    "--num-nodes": "recipe.trainer.num_nodes",
    "--num-gpus-per-node": "recipe.trainer.devices",
    "--name": "recipe.log.name",
    "--dir": "recipe.log.log_dir",
    "--data PATH": "recipe.data.dataset_root",
    "--data X": "recipe.data.dataset_root",
    "--recipe mixtral_tiny": "llm.mixtral_tiny",
    "--peft none": "peft_scheme='none'",
    "--peft lora": "peft_scheme='lora'",
    "--peft dora": "peft_scheme='dora'",
    "--peft qlora": "peft_scheme='qlora'",
    "--format": "target",
    "--base": "base",
    "--chat": "chat=True",
    "--tasks": "EvaluationConfig.type",
    "--include-path FOLDER": "ConfigParams(extra={'include_path': FOLDER})",
    "--dtype": "dtype",
    "--max-shard-size": "max_shard_size",
    "--overwrite": "overwrite=True",
    "--output": "output_path",
}
_PARTS = "trainer data model optim log resume peft"
_by_command = False


class MixtralRecipesError(Exception):
    """Base of every error the user can fix. ``str(error)`` is one line."""

    exit_code = 2


class RecipeError(MixtralRecipesError):
    """A recipe, an override or a parallel layout that cannot run."""


class CheckpointError(MixtralRecipesError):
    """A checkpoint that is incomplete, damaged, of another kind, or unsafe to read."""


class DataError(MixtralRecipesError):
    """A data file or record that cannot be used; names the file and, where there is one, the line."""


class LaunchError(MixtralRecipesError):
    """A job that could not be submitted, or whose processes failed."""


class EnvironmentProblem(MixtralRecipesError):
    """This machine lacks something the command needs (a GPU, a library, disk room)."""


class MixtralRecipesWarning(UserWarning):
    """Something a user should know but need not fix: a setting without effect, a record left out."""


class Preempted(MixtralRecipesError, SystemExit):
    """The run was asked to stop, saved, and can be resumed.

    A script that does not catch it ends with exit code 75 and without a traceback, as a command does.
    """

    exit_code = code = 75


#: What to do about an answer of the operating system; any other is told as it is.
_ADVICE = {
    "ENOENT": "check the path",
    "ENOTDIR": "a part of the path is a file; choose another path",
    "EEXIST": "something already exists there; choose another path",
    "EISDIR": "it is a folder, but a file is needed",
    "EACCES": "choose a place that you can read and write",
    "EPERM": "choose a place that you can read and write",
    "EROFS": "choose a place that you can write to",
    "ENOSPC": "free some space, or choose another disk",
    "EDQUOT": "free some space, or choose another disk",
    "EFBIG": "raise `ulimit -f`, or choose another disk",
    "EMFILE": "raise `ulimit -n`",
    "ENOMEM": "free some memory",
}


def of_the_machine(error: BaseException) -> MixtralRecipesError | None:
    """What a user can mend of an error of the operating system, or a library's, in one line; None for any other error.

    The last resort: who opens a file that a user named says more about it.
    """
    if is_panic(error):
        return DataError(
            f"the tokenizers library failed on a text ({in_short(error)}): a regular expression in tokenizer.json "
            "cannot be evaluated on it; download the model's tokenizer again, or use another."
        )
    if isinstance(error, MemoryError):
        return EnvironmentProblem("out of memory; close other programs, or choose a smaller model or batch.")
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of pathlib, for ~ and ~user
        return EnvironmentProblem(
            "the home folder of ~ or ~NAME cannot be found; set HOME or MIXTRAL_RECIPES_HOME, or write out the path."
        )
    if isinstance(error, TypeError) and "docstring" in str(error):  # of fiddle, nemo_run's library of configs
        return EnvironmentProblem(
            "this Python runs without docstrings, which nemo_run reads; unset PYTHONOPTIMIZE, or leave -OO out."
        )
    if not isinstance(error, OSError) or error.errno is None:
        return None
    import errno

    name = error.filename
    where = f"{name.decode(errors='replace') if isinstance(name, bytes) else name}: " if name else ""
    advice = _ADVICE.get(errno.errorcode.get(error.errno, ""), "")
    return EnvironmentProblem(f"{where}{error.strerror or error}{'; ' * bool(advice)}{advice}.")


def is_panic(error: BaseException) -> bool:
    """Whether Rust code gave up: no ``Exception``, so that nothing between it and us takes it for one."""
    return type(error).__name__ == "PanicException"


def in_short(error: BaseException) -> str:
    """A library's error in one line: the first line of its text; without any, what it asserts, or its class."""
    text = str(error).partition("Fiddle context:")[0].strip()  # nemo_run's library of configs adds its view
    return (text or _asserted(error) or type(error).__name__).splitlines()[0][:200]


def _asserted(error: BaseException) -> str:
    """The lines of an assertion without a message; empty for any other error."""
    import linecache
    import traceback

    if not isinstance(error, AssertionError) or not (frames := traceback.extract_tb(error.__traceback__)):
        return ""
    first, last = frames[-1].lineno or 1, frames[-1].end_lineno or 1
    return " ".join(line.strip() for line in linecache.getlines(frames[-1].filename)[first - 1 : last])


def nearest(name: str, valid: list[str] | tuple[str, ...]) -> str:
    """Suffix for an unknown-name message: the closest valid spelling, and all of them when they are few.

    Args:
        name: What the user wrote.
        valid: Every spelling that would have been accepted.

    Returns:
        Text that starts with a space, or the empty string when nothing is close and the list is long.
    """
    import difflib

    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return hint + (f" Valid: {', '.join(sorted(valid))}." if 0 < len(valid) <= 24 else "")


def some_of(names: Sequence[str], most: int) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextlib.contextmanager
def asked_by_command() -> Iterator[None]:
    """While this lasts, advice is for someone who types commands."""
    global _by_command
    before, _by_command = _by_command, True
    try:
        yield
    finally:
        _by_command = before


@contextlib.contextmanager
def advice_for_scripts() -> Iterator[None]:
    """Reword an error for someone who writes Python, unless a command asked."""
    try:
        yield
    except MixtralRecipesError as error:
        if not _by_command:
            error.args = (in_python(str(error)),)
        raise


def in_python(text: str) -> str:
    """An error's text with a script's words for options and settings: ``recipe.trainer.max_steps`` and the like.

    A command to type stays as it is.
    """
    import re

    parts = re.split(r"(`mixtral-recipes [^`]*`)", text)
    return "".join(part if number % 2 else _in_python(part) for number, part in enumerate(parts))


def _in_python(text: str) -> str:
    import re

    for option, name in _IN_PYTHON.items():
        text = re.sub(rf"(?<![\w-]){option}(?![\w-])", name.replace("\\", ""), text)
    parts = _PARTS.replace(" ", "|")
    return re.sub(rf"(?<![\w./-])(?=(?:{parts})\.[a-z_]+(?:\.[a-z_]+)*\b(?!\())", "recipe.", text)

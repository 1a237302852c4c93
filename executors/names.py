"""Which names may reach a shell, a path or Slurm. Standard library only."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.system import private

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ENV_NAME = re.compile(r"[A-Z_a-z][A-Z_a-z0-9]{0,127}")
_SAFE_PATH = re.compile(r"/[A-Za-z0-9._/+@=,-]*")


def check_name(name: str, what: str = "run name") -> str:
    """Return ``name`` if it is safe in a path, a file name, a Slurm job name and a log line.

    Raises:
        LaunchError: the name is empty, longer than 64 characters, starts with ``.`` or ``-``, contains ``..`` or
            anything but letters, digits, ``.``, ``_`` and ``-``.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise LaunchError(
            f"{what} {name!r} is not allowed; use 1 to 64 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit, without '..'."
        )
    return name


def check_env(env: Mapping[str, object]) -> dict[str, str]:
    """Return ``env`` with string values if they may be written into a script.

    Raises:
        LaunchError: a name no shell accepts, a NUL byte in a value, a name that is not known to be harmless, or a
            password in an address.
    """
    for key, value in env.items():
        check_variable(key)
        if "\0" in str(value):
            raise LaunchError(f"environment variable {key} holds a NUL byte; no process can receive one.")
        if not private.is_harmless(key):
            raise LaunchError(
                f"environment variable {key} is not known to be harmless, and its value would be written to job files: "
                f"export it in your shell and add its name to secrets (secrets = [..., {key!r}]), or write it to a "
                "file of mode 0600 and set env_file to it; both pass it on in a 0600 file."
            )
        check_no_password(str(value), f"environment variable {key}")
    return {key: str(value) for key, value in env.items()}


def check_variable(name: str) -> str:
    """Return ``name`` if it is an environment variable's.

    Raises:
        LaunchError: no shell accepts it.
    """
    if not isinstance(name, str) or not _ENV_NAME.fullmatch(name):
        raise LaunchError(f"environment variable name {name!r} is not allowed; use letters, digits and '_'.")
    return name


def check_no_password(text: str, what: str) -> str:
    """Return ``text`` if it carries no password in an address.

    Raises:
        LaunchError: it does; the message does not repeat it.
    """
    if address := private.password_in(text):
        raise LaunchError(
            f"{what} is not allowed: the address {address} carries a password, which would be written to job files; "
            "remove it, and pass it through secrets or env_file."
        )
    return text


def check_path(path: str | Path, what: str) -> str:
    """Return ``path`` as text if nemo_run may put it unquoted into its shell commands, as it does.

    Raises:
        LaunchError: the path is relative or holds a space or a shell character.
    """
    text = str(path)
    if not _SAFE_PATH.fullmatch(text) or "/../" in f"{text}/":
        raise LaunchError(
            f"{what} {text!r} is not allowed; use an absolute path of letters, digits and '. _ / + @ = , -' "
            "(nemo_run puts it into shell commands)."
        )
    return text


def quote(value: object) -> str:
    """Shell-quote a value for bash."""
    return shlex.quote(str(value))

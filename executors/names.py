"""Which names may reach a shell, a path or Slurm. Standard library only."""

import re
import shlex
from pathlib import Path

from mixtral_recipes.errors import LaunchError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ENV_NAME = re.compile(r"[A-Z_a-z][A-Z_a-z0-9]{0,127}")
_SAFE_PATH = re.compile(r"/[A-Za-z0-9._/+@=,-]*")
_SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)S?$", re.IGNORECASE
)


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


def check_env(env: dict[str, str], *, allow_secrets: bool = False) -> dict[str, str]:
    """Return ``env`` with string values if every name is a shell variable name and no value needs to stay secret.

    Raises:
        LaunchError: a name no shell accepts, a NUL byte in a value, or a name that looks like a secret's.
    """
    for key, value in env.items():
        if not _ENV_NAME.fullmatch(key):
            raise LaunchError(f"environment variable name {key!r} is not allowed; use letters, digits and '_'.")
        if "\0" in str(value):
            raise LaunchError(f"environment variable {key} holds a NUL byte; no process can receive one.")
        if not allow_secrets and _SECRET_NAME.search(key):
            raise LaunchError(
                f"environment variable {key} looks like a secret and would be written to job files; "
                "export it in your shell instead and name it in secrets=[...], which passes it in a 0600 file."
            )
    return {key: str(value) for key, value in env.items()}


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

"""A login node: every command for a cluster behind ssh goes through the user's own ssh. Standard library only.

So what ``~/.ssh/config`` says of it holds (an alias, a jump host, a connection that is shared), and its host key is
checked. A command runs in a login shell and finds what a user finds who logs in; what that shell says is cut off.
"""

import contextlib
import io
import re
import shlex
import subprocess
import tarfile
from typing import IO, Any

from mixtral_recipes.errors import LaunchError

#: How a login node is named: user@host[:port]; the user may stand in ~/.ssh/config.
NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*(:\d+)?")
#: Nobody is there to answer a question; a node that is away or goes away is given up.
_OPTIONS = (
    "BatchMode=yes", "ConnectTimeout=20", "ServerAliveInterval=15", "ServerAliveCountMax=4",
)  # fmt: skip
#: Return codes of a command that did not reach the node, or got no answer.
AWAY = (124, 127, 255)
_BEGINS = "-- mixtral-recipes --"  # what the command itself says comes after this line


def address(name: str, key: str | None) -> str:
    """How records name a login node: as `NAME`, and after a ``#`` the key file, if one is given."""
    return f"{name}#{key}" if key else name


def ssh(node: str, *, options: tuple[str, ...] = _OPTIONS) -> list[str]:
    """The ssh command for a login node, without what it should run there.

    Args:
        node: As `address` gives it.
        options: Of ssh.

    Raises:
        LaunchError: it names no login node.
    """
    name, _, key = node.partition("#")
    if not NAME.fullmatch(name):
        raise LaunchError(f"{node!r} is not a login node; records name it as user@host.")
    host, _, port = name.partition(":")
    given = [word for option in options for word in ("-o", option)]
    return ["ssh", *given, *(["-p", port] if port else []), *(["-i", key] if key else []), "--", host]


def by_hand(node: str, command: str = "") -> str:
    """What a user types to do the same."""
    words = [word for word in ssh(node, options=()) if word != "--"]
    return shlex.join([*words, command] if command else words)


def run(
    node: str, command: str, *, stdin: bytes | IO[bytes] = b"", timeout_s: float | None = 60
) -> subprocess.CompletedProcess[bytes]:
    """Run a shell command on a login node; one that cannot be entered, or is too slow, is a non-zero return code.

    Args:
        node: As `address` gives it.
        command: For bash.
        stdin: What it reads: bytes, or an open file.
        timeout_s: How long it may take; None waits as long as the connection lives.

    Raises:
        LaunchError: as `ssh`.
    """
    # without SSH_CLIENT, by which a bash in the command would read ~/.bashrc again
    script = f"unset SSH_CLIENT; echo; echo {shlex.quote(_BEGINS)}; {command}"
    words = [*ssh(node), f"exec bash -lc {shlex.quote(script)}"]
    given: dict[str, Any] = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
    name = node.partition("#")[0]

    def failed(code: int, why: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(words, code, b"", f"login node {name}: {why}".encode())

    try:
        done = subprocess.run(words, capture_output=True, timeout=timeout_s, check=False, **given)
    except FileNotFoundError:
        return failed(127, "ssh is not installed here")
    except subprocess.TimeoutExpired:
        return failed(124, f"no answer within {timeout_s:.0f} s")
    _noise, begun, said = done.stdout.partition(f"\n{_BEGINS}\n".encode())
    if not begun:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        why = last[0].strip().rstrip(".") if last else "it does not run commands"
        return failed(done.returncode or 255, f"{why}; `{by_hand(node)}` must log in without asking anything")
    return subprocess.CompletedProcess(words, done.returncode, said, done.stderr)


def fetch(node: str, there: str, here: str, run_dir: str = "") -> str:
    """Bring a job's logs and history from a login node, and its run's result.json.

    Args:
        node: As `address` gives it.
        there: The job's folder.
        here: Where they go.
        run_dir: The run's folder on the cluster.

    Returns:
        Why the node was not reached; an empty text where it was.
    """
    place, result = shlex.quote(there), shlex.quote(f"{run_dir}/result.json")
    command = (
        f"cd {place} && set -- $(ls -d attempts attempts*.jsonl sbatch_*.out 2> /dev/null) && "
        f'if [ -e {result} ]; then set -- "$@" -C {shlex.quote(run_dir)} result.json; fi && '
        'tar -czf - --exclude=torchrun "$@"'
    )
    done = run(node, command, timeout_s=None)
    if not done.stdout:
        return done.stderr.decode(errors="replace") if done.returncode in AWAY else ""
    with (
        contextlib.suppress(tarfile.TarError, EOFError, OSError),  # a file that grew while it was read
        tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar,
    ):
        tar.extractall(here, filter="data")
    return ""

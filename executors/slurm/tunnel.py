"""nemo_run's way to a login node, through `login` in place of a connection and of host keys of its own."""

import dataclasses
import os
import shlex
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from nemo_run.core.tunnel import client

from mixtral_recipes.errors import LaunchError
from mixtral_recipes.executors.slurm import login
from mixtral_recipes.executors.slurm.status import one_line


class SSHTunnel(client.SSHTunnel):
    """A tunnel of a `slurm_executor`. It has the name of nemo_run's, by which nemo_run reads its jobs back."""

    @property
    def node(self) -> str:
        """The login node as `login` takes it."""
        return address(self)

    def connect(self) -> None:
        """There is nothing to keep open: each command logs in, through a shared connection where ssh has one."""
        self.session: Any = self

    def run(self, command: str, hide: bool = True, warn: bool = False, **_kwargs: Any) -> client.RunResult:
        """Run a shell command on the login node.

        Raises:
            subprocess.CalledProcessError: it failed, and ``warn`` is False.
        """
        done = login.run(self.node, command)
        said, error = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        if done.returncode and not warn:
            raise subprocess.CalledProcessError(done.returncode, command, said, error)
        return client.RunResult(said, error, command=command, exited=done.returncode)

    def put(self, local_path: str, remote_path: str) -> None:
        """Copy a file there.

        Raises:
            LaunchError: it cannot be written there.
        """
        with Path(local_path).open("rb") as file:
            self._fed(f"cat > {shlex.quote(remote_path)}", file, remote_path)

    def get(self, remote_path: str, local_path: str) -> None:
        """Copy a file from there.

        Raises:
            LaunchError: it cannot be read there.
        """
        done = login.run(self.node, f"cat {shlex.quote(remote_path)}", timeout_s=None)
        if done.returncode:
            raise LaunchError(f"{remote_path}: {one_line(done.stderr.decode(errors='replace'))}.")
        Path(local_path).write_bytes(done.stdout)

    def cleanup(self) -> None:
        """Nothing was kept open."""

    def send(self, folder: str, target: str) -> None:
        """Copy a folder there, links and modes included.

        Args:
            folder: Here.
            target: The folder on the login node to put it in; it is created.

        Raises:
            LaunchError: the node cannot be entered, or the folder cannot be written.
        """
        with tempfile.TemporaryFile() as file:
            with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
                tar.add(folder, os.path.basename(folder))
            file.seek(0)
            place = shlex.quote(target)
            self._fed(f"mkdir -p {place} && tar -xzpf - --no-same-owner -C {place}", file, target)

    def _fed(self, command: str, file: Any, target: str) -> None:
        done = login.run(self.node, command, stdin=file, timeout_s=None)
        if done.returncode:
            what = "" if done.returncode in login.AWAY else f"job files cannot be written to {target}: "
            raise LaunchError(f"{what}{one_line(done.stderr.decode(errors='replace'))}.")


def as_ours(tunnel: client.SSHTunnel) -> SSHTunnel:
    """The same tunnel as one of ours."""
    return SSHTunnel(**{field.name: getattr(tunnel, field.name) for field in dataclasses.fields(tunnel)})


def address(tunnel: client.SSHTunnel) -> str:
    """A tunnel's login node as `login` takes it."""
    name = f"{tunnel.user}@{tunnel.host}" if tunnel.user else tunnel.host
    return login.address(f"{name}:{tunnel.port}" if tunnel.port else name, tunnel.identity)

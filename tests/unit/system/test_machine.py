"""What is known about this machine and its processes."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from mixtral_recipes.system.machine import children, cores, io_threads, package_version, process_start


def test_threads_follow_the_cores_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert (cores(), io_threads(), io_threads(4), io_threads(64)) == (8, 10, 4, 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(128)))
    assert io_threads() == 16


def test_versions_of_packages() -> None:
    assert package_version("torch") == metadata.version("torch")
    assert package_version("no-such-package") is None


def test_a_process_is_known_by_its_start_until_it_ends() -> None:
    started = process_start(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in children(os.getpid())
        assert int(process_start(child.pid)) > int(started)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process_start(child.pid) == ""  # a zombie, not waited for yet
        child.wait()
        assert process_start(child.pid) == ""
    assert child.pid not in children(os.getpid())

"""Two processes never hold one lock, whoever is refused hears who holds it, and a lock dies with its process."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

from mixtral_recipes.errors import EnvironmentProblem, LaunchError
from mixtral_recipes.system.locks import held, held_or_refused

HOLD = """
import sys
from pathlib import Path
from mixtral_recipes.system import locks
with {lock}:
    print("held", flush=True)
    sys.stdin.read()
"""
RUN = "locks.held_or_refused(Path(sys.argv[1]), '')"
PLACE = "locks.held(Path(sys.argv[1]) / 'final')"


@contextlib.contextmanager
def another_process(lock: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock until its standard input ends."""
    command = [sys.executable, "-c", HOLD.format(lock=lock), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_filelock_is_flock_here() -> None:
    """A marker file instead would stay behind a killed process."""
    assert issubclass(filelock.FileLock, filelock.UnixFileLock)


def test_a_second_run_is_refused_and_hears_who_holds_the_folder(tmp_path: Path) -> None:
    with another_process(RUN, tmp_path) as other:
        for _ in range(2):  # being refused does not wipe the holder's name out
            with pytest.raises(LaunchError) as refused, held_or_refused(tmp_path, "taken"):
                pass
            holder = f"process {other.pid} on {os.uname().nodename} since "
            assert str(refused.value).startswith(f"taken ({holder}")
            assert str(refused.value).endswith("; choose another --name or --dir, or wait for it.")
        other.send_signal(signal.SIGKILL)
        other.wait()
        with held_or_refused(tmp_path, "taken"):
            pass


def test_one_process_cannot_hold_a_folder_twice(tmp_path: Path) -> None:
    with held_or_refused(tmp_path / "new", "taken"):
        with pytest.raises(LaunchError, match="taken"), held_or_refused(tmp_path / "new", "taken"):
            pass
        with pytest.raises(LaunchError, match="taken"), held_or_refused(tmp_path / "new", "taken"):
            pass
    with held_or_refused(tmp_path / "new", "taken"):
        pass


def test_a_killed_holder_lets_the_waiting_go_on(tmp_path: Path) -> None:
    order = []
    with another_process(PLACE, tmp_path) as other:

        def wait() -> None:
            with held(tmp_path / "final"):
                order.append("waited")

        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        order.append("killed")
        other.send_signal(signal.SIGKILL)
        waiting.join()
    assert order == ["killed", "waited"]
    assert list(tmp_path.iterdir()) == []


def test_many_wait_their_turn_and_leave_no_file(tmp_path: Path) -> None:
    order = []

    def hold(name: str) -> None:
        for _ in range(5):
            with held(tmp_path / "new" / "final"):
                order.append(name)
                order.append(name)

    threads = [threading.Thread(target=hold, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(order) == 30
    assert order[::2] == order[1::2]
    assert list((tmp_path / "new").iterdir()) == []


def test_a_child_that_lives_on_does_not_keep_the_lock(tmp_path: Path) -> None:
    with held_or_refused(tmp_path, "taken"):
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
    try:
        with held_or_refused(tmp_path, "taken"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    lock = held_or_refused(tmp_path / "file" / "run", "taken")
    with pytest.raises(EnvironmentProblem, match=rf"^{tmp_path}/file/run cannot be locked \(Not a directory\); "), lock:
        pass

    too_long = held(tmp_path / ("long" * 70))
    with pytest.raises(EnvironmentProblem, match=r"\(File name too long\); choose a shorter name\.$"), too_long:
        pass

    for lock in (
        held(Path("/proc/new/final")),
        held(Path("/proc/final")),
    ):  # which takes no file, nor says that it is so
        with (
            pytest.raises(EnvironmentProblem, match=r"^/proc(/new)? cannot be locked \(No such file or directory\)"),
            lock,
        ):
            pass

    def without_locks(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", without_locks)
    for lock in (held(tmp_path / "new" / "final"), held_or_refused(tmp_path / "new", "taken")):
        with pytest.raises(EnvironmentProblem, match=r"new cannot be locked \(Function not implemented\); "), lock:
            pass

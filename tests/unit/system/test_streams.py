"""Streams that are closed, full, cut off, or of another encoding: an answer and an exit code, never a traceback."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.system.machine import process_start

COMMAND = f"{sys.executable} -m mixtral_recipes.cli.main"
SHOWS = f"{sys.executable} -c"
SNOWMAN = """'
import sys
from mixtral_recipes.system import streams
streams.in_utf8()
streams.prepare()
print("snow \\u2603", open(sys.argv[1]).read(), flush=True)
print("more \\u2603", file=sys.stderr)
'"""


def shell(line: str, **env: str) -> "subprocess.CompletedProcess[bytes]":
    """A line of shell, as a user types it."""
    return subprocess.run(["bash", "-c", line], capture_output=True, env=os.environ | env, check=False, timeout=60)


@pytest.mark.parametrize(
    ("env", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"snow \\u2603 \\u4f60\n"),
        ({"PYTHONIOENCODING": "latin-1"}, b"snow \\u2603 \\u4f60\n"),
        ({"PYTHONIOENCODING": "utf-8"}, "snow ☃ 你\n".encode()),
        # Files are UTF-8 where the terminal's language is not.
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"snow \\u2603 \\u4f60\n"),
    ],
)
def test_what_an_encoding_lacks_is_escaped(tmp_path: Path, env: dict[str, str], shown: bytes) -> None:
    (tmp_path / "text").write_text("你", encoding="utf-8")
    done = shell(f"{SHOWS} {SNOWMAN} {tmp_path / 'text'}", **env)
    assert (done.returncode, done.stdout) == (0, shown)
    assert b"Traceback" not in done.stderr


def test_closed_streams_lead_nowhere_and_no_file_takes_their_number(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    code = """'
from mixtral_recipes.system import streams
streams.prepare()
import os, sys
print("lost"); print("lost", file=sys.stderr); os.write(1, b"lost"); sys.stdin.read()
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    file.write("kept")
'"""
    assert shell(f"{SHOWS} {code} {tmp_path / 'text'} <&- >&- 2>&-").returncode == 0
    assert (tmp_path / "text").read_text() == "kept"


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (">&-", 0),
        (">&- 2>&-", 0),
        ("> /dev/full", 2),
        ("> /dev/full 2>&1", 2),
        ("| head -1", 0),
    ],
)
def test_a_command_with_such_a_stdout(ending: str, code: int) -> None:
    done = shell(f"set -o pipefail; {COMMAND} recipes list {ending}", LC_ALL="C.UTF-8")
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert b"this is a bug" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    if ending == "> /dev/full":
        assert done.stderr.startswith(b"error: ")
        assert b"No space left on device" in done.stderr
        assert done.stderr.count(b"\n") == 1


def with_a_log(folder: Path, text: str, **more: Any) -> dict[str, str]:
    """A home with the record of a run named ``long`` that has this log, as a process's environment names it."""
    log = folder / "stdout.log"
    log.write_text(text)
    record = {"id": "long", "name": "long", "executor": "local", "run_dir": "/", "created": 1.0, "logs": [str(log)]}
    (folder / "runs" / "long").mkdir(parents=True)
    (folder / "runs" / "long" / "run.json").write_text(json.dumps(record | more))
    return {"MIXTRAL_RECIPES_HOME": str(folder)}


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help > /dev/full", 2),
        ("--version > /dev/full", 2),
        ("--help | true", 0),
        ("export --help | true", 0),
        ("runs logs long | head -1", 0),
        ("recipes list 2> /dev/full", 0),
        ("nonsense 2> /dev/full", 2),
    ],
)
def test_whatever_prints(line: str, code: int, tmp_path: Path) -> None:
    home = with_a_log(tmp_path, "a line\n" * 100_000, state="succeeded")
    done = shell(f"set -o pipefail; {COMMAND} {line}", **home)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") <= 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_a_command_that_is_asked_to_end_says_so(tmp_path: Path, number: signal.Signals, code: int) -> None:
    home = with_a_log(tmp_path, "a line\n", state="running", pid=os.getpid(), pid_start=process_start(os.getpid()))
    command = [sys.executable, "-m", "mixtral_recipes.cli.main", "runs", "logs", "long", "--follow"]
    before = signal.signal(number, signal.SIG_DFL)  # tests run under nohup ignore it, and so would the command
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | home) as process:
        signal.signal(number, before)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"a line\n"  # it follows now
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, said) == (code, f"error: stopped by {number.name}.\n".encode())


@pytest.mark.parametrize("variables", [{"HOME": "/proc/none", "MIXTRAL_RECIPES_HOME": ""}, {"HOME": "/dev/null/x"}])
def test_a_home_that_cannot_be_used(variables: dict[str, str]) -> None:
    done = shell(f"{COMMAND} runs list", **variables)
    assert (done.returncode, done.stderr) == (0, b"")
    done = shell(f"{COMMAND} report '~nobody-of-this-name/run'", **variables)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: the home folder of ~ or ~NAME cannot be found")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("finetune --to-yaml /proc/none/x.yaml", "/proc/none/x.yaml: No such file or directory; check the path."),
        ("pipeline /tmp", "/tmp: Is a directory; it is a folder, but a file is needed."),
        ("clusters list", "clusters.toml: Is a directory"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    from mixtral_recipes.cli.main import run

    (tmp_path / "clusters.toml").mkdir()
    monkeypatch.setenv("MIXTRAL_RECIPES_CLUSTERS", str(tmp_path / "clusters.toml"))
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    code = run(line.split())
    error = capsys.readouterr().err.splitlines()[-1:]
    assert code == 2
    assert said in error[0]
    assert "this is a bug" not in "".join(error)

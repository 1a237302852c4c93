"""Run by test_interrupted.py, or by hand: commands that are killed, or whose disk fills up, at random moments.

    unshare -rm python tests/distributed/interrupted.py OPERATION,... killed|full COUNT SEED

Each attempt starts a command in a fork of this process, which has loaded everything, with something of the same name
there before, or without. After it, what had its final name is what it was or what the command makes, and nothing else
is there; then the command, started again, succeeds. ``full`` mounts a tmpfs of its own (that is what unshare is for)
and leaves it a random share of the room the command needs: besides all that, the command ends with code 2 and one line.

Prints, as JSON, how many attempts ended with nothing there, with the old content whole, and with the new.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint  # noqa: F401  # loaded once, before the forks

from mixtral_recipes import api, embedded  # noqa: F401
from mixtral_recipes.checkpoints.format.integrity import verify
from mixtral_recipes.cli.main import run
from mixtral_recipes.importers.convert import hf_to_megatron, megatron_to_hf, plan  # noqa: F401
from mixtral_recipes.reports import page  # noqa: F401
from mixtral_recipes.training import loop  # noqa: F401

TINY = "embedded://mixtral_tiny"
MODEL = embedded.resolve(TINY)
# Written anew each time: checked for being whole, and not compared.
_TIMED = ("manifest.json", "lineage.json", "README.md")
_TMPFS_ROOM = 512 << 20


@dataclass
class Operation:
    """A command that writes something under a name.

    Attributes:
        before: Makes, in a folder, what the command reads, and what it replaces.
        words: The command line, for a folder.
        made: The names it makes, below the folder.
        fresh: Whether it can also be tried with nothing of these names there.
        check: Looks at what is there further.
    """

    before: Callable[[Path], None]
    words: Callable[[Path], list[str]]
    made: str
    fresh: bool = True
    check: Callable[[Path], None] = lambda folder: None


def _checked_checkpoint(folder: Path) -> None:
    if (folder / "made").exists():
        verify(folder / "made")


def _other_model(folder: Path) -> None:
    """A copy of the embedded model with other weights."""
    shutil.copytree(MODEL, folder / "other")
    file = folder / "other" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2000:] = bytes(2000)
    file.write_bytes(content)


def _before_import(folder: Path) -> None:
    _other_model(folder)
    done(["import", folder / "other", "--output", folder / "made"])


def _before_export(folder: Path) -> None:
    _other_model(folder)
    done(["import", folder / "other", "--output", folder / "before"])
    done(["import", MODEL, "--output", folder / "checkpoint"])
    done(["export", folder / "before", folder / "made"])


def _before_prepare(folder: Path) -> None:
    lines = embedded.resolve("embedded://squad").joinpath("pretraining.jsonl").read_text().splitlines(keepends=True)
    for name, part in {"before": lines[:200], "text": lines}.items():
        (folder / f"{name}.jsonl").write_text("".join(part))
    done(_prepare(folder, "before"))


def _prepare(folder: Path, name: str) -> list[Any]:
    text = ["data", "prepare", folder / f"{name}.jsonl", "-o", folder / "made", "--overwrite", "--workers", "1"]
    return [*text, "--part-mb", "1", "--tokenizer", TINY]


def _before_report(folder: Path) -> None:
    entries = [
        {"kind": "train", "time": 1.7e9, "step": n, "loss": 5 / n, "lr": 1e-3, "seconds": 0.5} for n in range(1, 200)
    ]
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "made.html").write_text("the page of before")


def _before_finetune(folder: Path) -> None:
    done(_finetune(folder, 2))


def _finetune(folder: Path, steps: int = 6) -> list[Any]:
    job = [
        "finetune",
        "--executor",
        "direct",
        "--num-gpus-per-node",
        "1",
        "--dir",
        folder,
        "--name",
        "made",
        "--peft",
        "lora",
    ]
    sizes = [
        "data.seq_length=128",
        "data.global_batch_size=2",
        "data.micro_batch_size=1",
        "log.ckpt.every_n_train_steps=2",
    ]
    limits = [f"trainer.max_steps={steps}", "trainer.limit_val_batches=1", "trainer.val_check_interval=100"]
    return [*job, *sizes, *limits, "optim.lr_scheduler.max_steps=6"]


def _checked_run(folder: Path) -> None:
    made = folder / "made"
    checkpoints = [
        p for p in (made / "checkpoints").iterdir() if p.is_dir() and not p.is_symlink() and p.name[0] != "."
    ]
    assert checkpoints, "no checkpoint is left"
    for checkpoint in checkpoints:
        verify(checkpoint)
    *lines, _ = (made / "metrics.jsonl").read_text().split("\n")
    for line in lines:
        json.loads(line)
    if (made / "result.json").exists():
        json.loads((made / "result.json").read_text())
    if (made / "report.html").exists():
        assert (made / "report.html").read_text().rstrip().endswith("</html>")


OPERATIONS = {
    "import": Operation(
        _before_import,
        lambda f: ["import", MODEL, "--output", f / "made", "--overwrite"],
        "made",
        check=_checked_checkpoint,
    ),
    "export": Operation(_before_export, lambda f: ["export", f / "checkpoint", f / "made", "--overwrite"], "made"),
    "prepare": Operation(_before_prepare, lambda f: _prepare(f, "text"), "made.*"),
    "report": Operation(_before_report, lambda f: ["report", f / "run", "-o", f / "made.html"], "made.html"),
    "finetune": Operation(_before_finetune, _finetune, "", fresh=False, check=_checked_run),
}


def done(words: list[Any]) -> None:
    """A command that must succeed, in a fork."""
    child = started(words, Path(os.devnull))
    assert os.waitpid(child, 0)[1] == 0, words


def started(words: list[Any], output: Path) -> int:
    """A command in a fork of its own session, its output in a file; the process's number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        code = run([str(word) for word in words])
        sys.stdout.flush()
    finally:
        os._exit(code)


def snapshot(folder: Path, pattern: str) -> dict[str, str]:
    """Relative path -> hash of every file under the names a command makes."""
    files = [p for top in folder.glob(pattern) for p in (top.rglob("*") if top.is_dir() else [top]) if p.is_file()]
    found = {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    for path in (p for p in files if p.name in ("manifest.json", "lineage.json")):
        json.loads(path.read_text())
    return {name: "there" if name.rpartition("/")[2] in _TIMED else digest for name, digest in found.items()}


@contextlib.contextmanager
def disk(limited: bool) -> Any:
    """A folder, and the function that leaves it so many bytes; on a tmpfs where that is asked for."""
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(size: int, flags: int) -> None:
        if libc.mount(b"none", os.fsencode(folder), b"tmpfs", flags, f"size={size}".encode()):
            raise OSError(ctypes.get_errno(), "mount of a tmpfs failed; run this with `unshare -rm`")

    with tempfile.TemporaryDirectory() as folder:
        if not limited:
            yield Path(folder), lambda left: None
            return
        mount(_TMPFS_ROOM, 0)
        try:
            # MS_REMOUNT. None gives all the room back.
            yield Path(folder), lambda left: mount(_TMPFS_ROOM if left is None else used(folder) + max(left, 4096), 32)
        finally:
            libc.umount2(os.fsencode(folder), 2)  # MNT_DETACH


def used(folder: str | Path) -> int:
    """Bytes in use on a file system."""
    about = os.statvfs(folder)
    return (about.f_blocks - about.f_bfree) * about.f_frsize


def attempts(operation: Operation, fault: str, count: int, seed: int) -> dict[str, int]:
    """Try ``count`` times; how they ended, by name."""
    moments, ends = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as home, disk(fault == "full") as (place, leave):
        os.environ["MIXTRAL_RECIPES_HOME"] = home
        output = Path(home) / "output"
        template = place / "template"
        template.mkdir()
        operation.before(template)
        old = snapshot(template, operation.made) if operation.made else {}
        new, seconds, room = _clean(operation, fault, template, place, output)
        for number in range(count):
            folder = place / "work"
            shutil.copytree(template, folder, symlinks=True)
            there = old
            if operation.fresh and number % 2:
                _remove(folder, operation.made)
                there = {}
            if fault == "full":
                leave(int(moments.uniform(0, room)))
            child = started(operation.words(folder), output)
            if fault == "killed":
                time.sleep(moments.uniform(0, 1.1 * seconds))
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            leave(None)
            told = output.read_text(errors="replace")
            if fault == "full":
                _told_well(code, told)
            if operation.made:
                found = snapshot(folder, operation.made)
                assert found in (there, new), _difference(found, there, new, told)
                ends["new" if found == new else "old" if found else "nothing"] += 1
                assert fault == "killed" or code == 0 or found != new or found == there, "failed, and it is there"
            else:
                ends["stopped" if code else "finished"] += 1
            operation.check(folder)
            done(operation.words(folder))
            if operation.made:
                assert snapshot(folder, operation.made) == new
            operation.check(folder)
            shutil.rmtree(folder)
    return dict(ends)


def _clean(
    operation: Operation, fault: str, template: Path, place: Path, output: Path
) -> tuple[dict[str, str], float, int]:
    """What the command makes, how long it takes, and how much room at most."""
    seconds: list[float] = []
    new: dict[str, str] = {}
    most = 0
    for _ in range(2 if fault == "killed" else 1):  # the first warms up, and would tell of later moments
        folder = place / "work"
        shutil.copytree(template, folder, symlinks=True)
        before, most, start = used(place), 0, time.perf_counter()
        child = started(operation.words(folder), output)
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            most = max(most, used(place) - before)
            time.sleep(0.001)
        seconds.append(time.perf_counter() - start)
        new = snapshot(folder, operation.made) if operation.made else {}
        assert not operation.made or new, output.read_text()
        operation.check(folder)
        shutil.rmtree(folder)
    return new, min(seconds), most


def _remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _told_well(code: int, told: str) -> None:
    lines = told.strip().splitlines()
    assert code in (0, 2), f"exit code {code}: {told[-1500:]}"
    assert "Traceback" not in told, told[-3000:]
    assert code == 0 or (lines and lines[-1].startswith("error: ")), told[-1500:]


def _difference(found: dict[str, str], old: dict[str, str], new: dict[str, str], told: str) -> str:
    names = {
        name for name in found.keys() | old.keys() | new.keys() if found.get(name) not in (old.get(name), new.get(name))
    }
    return f"neither what it was nor what it becomes: {names or sorted(found)}; {told[-500:]}"


if __name__ == "__main__":
    names, fault, count, seed = sys.argv[1:]
    for name in names.split(","):
        print(name, json.dumps(attempts(OPERATIONS[name], fault, int(count), int(seed))), flush=True)

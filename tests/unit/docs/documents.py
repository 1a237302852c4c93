"""What the documents say: their command lines, their code, the files and pages they name."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[3]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").iterdir())
PROGRAM = "mixtral-recipes"


@dataclass(frozen=True)
class Place:
    """A piece of text and where it stands."""

    file: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.text}"


def inline_code(file: Path) -> Iterator[Place]:
    """What stands between single backticks, outside of code blocks."""
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.startswith("    "):
            yield from (Place(file, number, text) for text in re.findall(r"`([^`]+)`", line))


def command_lines(file: Path) -> Iterator[Place]:
    """Every command line of ours, without its comment: on a line of its own or between backticks."""
    own_line = re.compile(rf"^(?:\s{{4}}|# {{3}})(?:\$ )?(?:\.venv/bin/)?({PROGRAM} .*)$")
    for number, line in enumerate(file.read_text().splitlines(), 1):
        found = own_line.match(line)
        if found:
            yield Place(file, number, re.split(r"\s{2,}[#(]|\s#\s", found[1])[0].strip())
    for place in inline_code(file):
        if place.text.startswith(f"{PROGRAM} "):
            yield place


def arguments(command_line: str) -> list[str]:
    """The arguments of a command line; of a synopsis, all it may take: ``[--dtype bf16|fp16]`` is ``--dtype bf16``."""
    plain = re.sub(r"\[(--?[^\]]*)\]", r"\1", command_line)
    words = shlex.split(re.sub(r"(?<= )\|(?= )", "", plain))[1:]
    return [word.partition("|")[0] if re.fullmatch(r"[a-z0-9]+(\|[a-z0-9]+)+", word) else word for word in words]


@cache
def tracked_files() -> frozenset[str]:
    """Every file of the tree, relative to its root; new ones that git does not ignore are among them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return frozenset(name for name in listed.splitlines() if (ROOT / name).exists())


def exists(path: str) -> bool:
    """Whether a path that a document names is there: from the root, or from the package, or a bare file's name.

    ``<name>`` and ``*`` stand for anything.
    """
    pattern = re.sub(r"<\w+>", "*", path.removesuffix("/"))
    if "/" not in path:
        return any(Path(name).match(pattern) for name in tracked_files())
    return any(next(folder.glob(pattern), None) for folder in (ROOT, ROOT / "mixtral_recipes"))

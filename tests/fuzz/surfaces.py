"""What is fuzzed: a file that is read from outside, how it is damaged, and the commands that read it."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import outcome
from tests.fuzz.mutations import DAMAGES

TOKENIZER = "embedded://mixtral_tiny"


@dataclass(frozen=True)
class Surface:
    """One file, and what reads it.

    Attributes:
        file: Below the folder of specimens.
        damage: A key of `mutations.DAMAGES`.
        commands: Command lines; ``{root}`` stands for the specimens, ``{file}`` for the file, ``{folder}`` for its
            folder, ``{out}`` for a path where nothing is. One that fails ends them.
        sealed: The checkpoint whose manifest says what is in the file, below the folder of specimens; it is made to say
            what is there now, so that more than the hash is looked at.
        of: The folder of specimens that is copied aside; "" takes the first part of ``file``.
    """

    file: str
    damage: str
    commands: tuple[str, ...]
    sealed: str = ""
    name: str = ""

    @property
    def title(self) -> str:
        """Its name among the tests."""
        return self.name or self.file


def _import(folder: str, *more: str) -> tuple[str, ...]:
    return (f"import {{root}}/{folder} --output {{out}}", *more)


_CHECKED = "verify {out} --against {folder}"
_READ_CHECKPOINT = ("lineage {root}/checkpoint", "verify {root}/checkpoint", "export {root}/checkpoint {out}")
_READ_RUN = ("report {root}/run -o {out}", "lineage {root}/run --quick", "runs status tune-0", "runs list --all")
_TOKENIZER = (
    "import {folder} --output {out}",
    "data show {root}/data/chat.jsonl -n 2 --seq-length 128 --tokenizer {folder}",
)
_DATA = (
    f"data check {{file}} --seq-length 128 --tokenizer {TOKENIZER}",
    f"data show {{file}} -n 2 --seq-length 128 --tokenizer {TOKENIZER} --html {{out}}",
)
_TEXT = (_DATA[0], f"data show {{file}} -n 2 --seq-length 16 --tokenizer {TOKENIZER}")
_CORPUS = (f"data show {{root}}/corpus/text -n 2 --seq-length 16 --tokenizer {TOKENIZER}",)
_PREPARED = f"data prepare {{file}} -o {{out}}/c --workers 1 --tokenizer {TOKENIZER}"

SURFACES = [
    Surface("hf/config.json", "json", _import("hf", _CHECKED)),
    Surface("hf/generation_config.json", "json", _import("hf")),
    Surface("hf/model.safetensors", "safetensors", _import("hf", _CHECKED)),
    Surface("sharded/model.safetensors.index.json", "json", _import("sharded", _CHECKED)),
    Surface("bin/pytorch_model.bin", "archive", _import("bin", _CHECKED)),
    Surface("hf/tokenizer.json", "json", _TOKENIZER),
    Surface("hf/tokenizer_config.json", "json", _TOKENIZER),
    Surface("hf/special_tokens_map.json", "json", _TOKENIZER),
    Surface("hf/chat_template.jinja", "text", _TOKENIZER),
    Surface("sentencepiece/tokenizer.model", "bytes", _TOKENIZER),
    Surface("mistral/params.json", "json", _import("mistral")),
    Surface("mistral/consolidated.safetensors", "safetensors", _import("mistral")),
    Surface("nemo/context/io.json", "json", ("import nemo://{root}/nemo --output {out}",)),
    Surface("nemo/weights/.metadata", "pickle", ("import nemo://{root}/nemo --output {out}",)),
    Surface("nemo/weights/common.pt", "archive", ("import nemo://{root}/nemo --output {out}",)),
    Surface("nemo/weights/metadata.json", "json", ("import nemo://{root}/nemo --output {out}",)),
    Surface(
        "peft/adapter_config.json",
        "json",
        _import("peft --base {root}/checkpoint", "export {out} {out}-2 --format peft"),
    ),
    Surface("peft/adapter_model.safetensors", "safetensors", _import("peft --base {root}/checkpoint")),
    Surface("checkpoint/manifest.json", "json", _READ_CHECKPOINT),
    Surface("checkpoint/lineage.json", "json", _READ_CHECKPOINT, sealed="checkpoint"),
    Surface("checkpoint/context/config.json", "json", _READ_CHECKPOINT, sealed="checkpoint"),
    Surface("checkpoint/weights/.metadata", "pickle", _READ_CHECKPOINT, sealed="checkpoint"),
    Surface("checkpoint/weights/metadata.json", "json", _READ_CHECKPOINT, sealed="checkpoint"),
    Surface(
        "adapter/context/run.json",
        "json",
        ("lineage {root}/adapter", "export {root}/adapter {out} --format peft"),
        sealed="adapter",
    ),
    Surface(
        "exported/lineage.json", "json", ("lineage {root}/exported --quick", "import {root}/exported --output {out}")
    ),
    Surface("run/metrics.jsonl", "lines", (*_READ_RUN, "plan --recipe mixtral_tiny --from-run {root}/run")),
    Surface("run/result.json", "json", _READ_RUN),
    Surface("run/checkpoints/step=2/context/run.json", "json", _READ_RUN, sealed="run/checkpoints/step=2"),
    Surface(
        "home/runs/tune-0/run.json",
        "json",
        ("runs list --all", "runs status tune-0", "runs logs tune-0", "report tune-0 -o {out}"),
    ),
    Surface(
        "home/runs/tune-0/attempts/0/rank-0.json", "json", ("runs list --all", "runs status tune-0", "runs logs tune-0")
    ),
    Surface(
        "texts/clusters.toml",
        "text",
        ("clusters list", "finetune --recipe mixtral_8x7b --executor slurm --cluster big --dry-run"),
    ),
    Surface("texts/pipeline.toml", "text", ("pipeline {file} --dry-run", "pipeline {file} --executor slurm --dry-run")),
    Surface("texts/recipe.yaml", "text", ("recipes show {file}", "run {file} --dry-run", "plan --yaml {file}")),
    Surface("texts/automodel.yaml", "text", ("recipes show {file}", "run {file} --dry-run")),
    Surface("texts/script.py", "text", ("migrate {file} --output {out}",)),
    Surface(
        "texts/template.jinja",
        "text",
        (
            "finetune --data {root}/data/chat.jsonl --chat-template {file} --dry-run",
            f"data show {{root}}/data/chat.jsonl data.chat_template={{file}} --tokenizer {TOKENIZER}",
        ),
    ),
    Surface("data/squad.json", "json", _DATA),
    Surface("data/chat.jsonl", "lines", _DATA),
    Surface("data/sharegpt.jsonl", "lines", _DATA),
    Surface(
        "data/tools.jsonl",
        "lines",
        tuple(f"{line.replace('128', '400')} data.chat_template=mistral-v3" for line in _DATA),
    ),
    Surface("data/pairs.jsonl", "lines", _DATA),
    Surface("data/text.jsonl", "lines", (*_TEXT, _PREPARED)),
    Surface("data/plain.txt", "bytes", (*_TEXT, _PREPARED)),
    Surface("data/pairs.csv", "text", (*_DATA, f"{_PREPARED.replace('{out}', '{out}-2')} --text-key input")),
    Surface("data/chat.parquet", "bytes", _DATA),
    Surface("data/packed.jsonl.gz", "bytes", _DATA),
    Surface("corpus/text.idx", "bytes", _CORPUS),
    Surface("corpus/text.bin", "bytes", _CORPUS),
    Surface("corpus/text.prepared.json", "json", _CORPUS),
]
BY_TITLE = {surface.title: surface for surface in SURFACES}


class Bench:
    """The specimens of one session, in which one file at a time is another.

    Args:
        root: Their folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._outs = 0

    def damages(self, surface: Surface) -> object:
        """The strategy that damages a surface's file."""
        return DAMAGES[surface.damage]((self.root / surface.file).read_bytes())

    def whole(self, surface: Surface) -> dict[str, str]:
        """What is wrong with a surface whose file is as it should be: a command that fails, most of all."""
        return self.run(surface, (self.root / surface.file).read_bytes(), must_succeed=True)

    def run(self, surface: Surface, content: bytes, *, must_succeed: bool = False) -> dict[str, str]:
        """Put ``content`` into a surface's file, run its commands, put everything back; what was wrong, by name."""
        file = self.root / surface.file
        manifest = self.root / surface.sealed / "manifest.json"
        kept = {path: path.read_bytes() for path in (file, *([manifest] if surface.sealed else []))}
        _put(file, content)
        if surface.sealed:
            _seal_again(manifest, file, content)
        try:
            return self._commands(surface, file, must_succeed)
        finally:
            for path, before in kept.items():
                _put(path, before)

    @property
    def places(self) -> list[Path]:
        """Where commands may write."""
        return [self.root / name for name in ("out", "home", "temporary", "runs")]

    def out(self) -> Path:
        """A path where nothing is, in a folder of its own."""
        self._outs += 1
        out = self.root / "out" / str(self._outs)
        out.parent.mkdir(exist_ok=True)
        return out

    def _commands(self, surface: Surface, file: Path, must_succeed: bool) -> dict[str, str]:
        out = self.out()
        faults: dict[str, str] = {}
        try:
            for command in surface.commands:
                words = [w.format(root=self.root, file=file, folder=file.parent, out=out) for w in command.split()]
                ended = outcome.run(words, self.places)
                faults |= {f"{command.split()[0]}: {name}": text for name, text in ended.faults.items()}
                if ended.code and out.exists() and command.startswith(("import", "export")):
                    faults[f"{words[0]}: failed, and its output is there"] = ended.text[-300:]
                if command == _CHECKED and "FAILED" in ended.text:
                    faults["verify refuses what was imported from the same source"] = ended.text[-500:]
                if ended.code and must_succeed:
                    faults[f"{command}: exit code {ended.code}"] = ended.text[-300:]
                if ended.code and "{out}" in command:
                    break
        finally:
            shutil.rmtree(out.parent)
        return faults


def _put(path: Path, content: bytes) -> None:
    """A new file each time: some readers remember a file by its inode, size and time."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    new.replace(path)


def _seal_again(manifest: Path, file: Path, content: bytes) -> None:
    """What our manifest says of one file, as an attacker would write it."""
    plain = json.loads(manifest.read_text())
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    plain["files"][os.path.relpath(file, manifest.parent)] = entry
    del plain["seal"]
    plain["seal"] = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    _put(manifest, json.dumps(plain).encode())

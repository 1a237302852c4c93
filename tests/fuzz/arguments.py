"""Command lines: valid ones, and what becomes of them."""

import shutil
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import outcome
from tests.fuzz.mutations import TEXTS
from tests.fuzz.surfaces import TOKENIZER, Bench

# Each ends with exit code 0 as it stands. {root} is the folder of specimens, {out} a path where nothing is.
LINES = [
    "recipes list",
    "recipes show mixtral_tiny.finetune trainer.max_steps=3",
    "recipes show mixtral_8x7b.pretrain(num_nodes=2) --all --json",
    "recipes diff mixtral_8x7b.finetune mixtral_8x22b.finetune",
    "finetune --dry-run --peft lora --name x --dir {out} --num-gpus-per-node 2",
    "finetune --dry-run --recipe mixtral_8x7b --executor slurm --cluster big --num-nodes 2 --time 10:00 --slurm qos=a",
    "finetune --dry-run --data {root}/data/chat.jsonl:0.7 --data {root}/data/tools.jsonl:0.3 --packed",
    "finetune --dry-run --restore-from embedded://mixtral_tiny --recipe mixtral_tiny --precision fp32",
    "pretrain --dry-run --recipe mixtral_tiny --executor direct --num-gpus-per-node 1 --json",
    "pretrain --dry-run --recipe mixtral_tiny --data {root}/data/text.jsonl",
    "run --dry-run {root}/texts/recipe.yaml trainer.max_steps=2",
    "plan --recipe mixtral_8x7b --num-nodes 2 --hardware h100 --price 2.5 --json",
    "plan --recipe mixtral_8x7b --max-gpus 16 --deadline 36h",
    "plan --recipe mixtral_tiny --smallest",
    "import {root}/hf --output {out} --dtype bf16",
    "import {root}/peft --base {root}/checkpoint --output {out}",
    "export {root}/checkpoint {out} --format hf --layout v5 --max-shard-size 1MB",
    "export {root}/adapter {out} --format peft",
    "verify {root}/checkpoint --against {root}/hf --json",
    "lineage {root}/exported --quick",
    f"data check {{root}}/data/chat.jsonl --tokenizer {TOKENIZER} --seq-length 64 data.learn=last",
    f"data show {{root}}/data/squad.json -n 1 --tokenizer {TOKENIZER} --split train --seq-length 64",
    f"data stats {{root}}/data/chat.jsonl {{root}}/data/pairs.jsonl --tokenizer {TOKENIZER}",
    f"data prepare {{root}}/data/text.jsonl -o {{out}} --tokenizer {TOKENIZER} --workers 1 --part-mb 1 --no-bos",
    "runs list --all --json",
    "runs status tune-0",
    "runs logs tune-0",
    "report {root}/run -o {out}",
    "pipeline {root}/texts/pipeline.toml --dry-run",
    "migrate {root}/texts/script.py --output {out}",
    "clusters list",
]
_KEPT = ("--dry-run", "list", "status", "logs")  # without these a job would start, or be stopped
_VALUES = [
    "0", "-1", "1", "3", "1e9", "999999999999", "1.5", "nan", "inf", "-inf", "true", "None", "none", "null", "''",
    '""', "[]", "[1,2]", "{}", "{'a': 1}", "(1,)", "1e400", "9" * 400, "__import__('os').system('id')", "lambda: 1",
    "run.Config(os.system)", "Config[LoRA]", "LoRA", "LoRA(dim=4)", "Adam(lr=", "trainer.max_steps", "@x", "$(id)",
    "a=b", "1 2", "*", "torch.float32", "fp8", "=3", "8,8", "10B", "5GB", "1:2:3", "2-00", "hf://x/y", "nemo://",
    "embedded://nothing", "squad", "{root}/hf", "{root}/run", "{root}/data/chat.jsonl", "{root}/texts/recipe.yaml",
    "{root}/corpus/text", "{root}", "/dev/null", "/proc/self/mem", "/", ".",
]  # fmt: skip
_OPTIONS = [
    *("--json", "--debug-", "--overwrite", "--all", "--quick", "--logits", "--help", "--", "-n", "-o", "--output"),
    *("--recipe", "--yaml", "--dir", "--name", "--num-nodes", "--num-gpus-per-node", "--nproc-per-node", "--executor"),
    *("--cluster", "--slurm", "--time", "--data", "--precision", "--hardware", "--peft", "--packed", "--base"),
    *("--chat-template", "--restore-from", "--resize-vocab", "--dtype", "--format", "--layout", "--max-shard-size"),
    *("--against", "--tokenizer", "--seq-length", "--split", "--text-key", "--part-mb", "--price", "--epochs"),
    *("--deadline", "--max-gpus", "--smallest", "--advice", "--instruct", "--performance-mode", "--account"),
    *("--partition", "--retries", "--png", "--html", "--to-yaml", "--count"),
]
_SHOWN = [
    "recipes show mixtral_tiny.finetune",
    "recipes show mixtral_8x7b.pretrain",
    "finetune --dry-run",
    "pretrain --dry-run --recipe mixtral_tiny",
    "plan --recipe mixtral_tiny",
    "run --dry-run {root}/texts/recipe.yaml",
]


def _text() -> st.SearchStrategy[str]:
    return st.sampled_from([*TEXTS, *_VALUES, *_OPTIONS]) | st.text(max_size=12)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A valid line with one to three of its words replaced, removed, doubled, moved, or others put in."""
    words = draw(st.sampled_from(LINES)).split()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(words) - 1))
        how = draw(st.sampled_from(("replace", "replace", "remove", "double", "put", "put", "inside", "swap")))
        if words[at] in _KEPT and how not in ("put", "double"):
            continue
        if how == "replace":
            words[at] = draw(_text())
        elif how == "remove" and len(words) > 1:
            del words[at]
        elif how == "double":
            words.insert(at, words[at])
        elif how == "put":
            words.insert(at + 1, draw(_text()))
        elif how == "inside":
            head, sign, _ = words[at].partition(draw(st.sampled_from(("=", ".", ":", "/"))))
            words[at] = head + sign + draw(_text())
        else:
            other = draw(st.integers(0, len(words) - 1))
            words[at], words[other] = words[other], words[at]
    return words


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """A recipe with one or two settings that exist, or nearly, and any value."""
    from mixtral_recipes.overrides.completion import PATHS

    paths = sorted(PATHS)
    words: list[str] = draw(st.sampled_from(_SHOWN)).split()
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(paths))
        if draw(st.integers(0, 5)) == 0:
            path = draw(
                st.sampled_from((path + ".x", path[:-1], path.rpartition(".")[0], "recipe." + path, path + "[0]", ""))
            )
        sign = draw(st.sampled_from(("=", "=", "=", "=", "+=", "*=", "==", ":", "")))
        words.append(path + sign + draw(st.sampled_from([*_VALUES, *TEXTS])))
    return words


def run(bench: Bench, words: list[str], *, whole: bool = False) -> dict[str, str]:
    """Run a line; what was wrong.

    Args:
        bench: Where the specimens are.
        words: With ``{root}`` and ``{out}`` in them.
        whole: Whether it must succeed.
    """
    out = bench.out()
    filled = [word.replace("{root}", str(bench.root)).replace("{out}", str(out)) for word in words]
    try:
        ended = outcome.run(filled, bench.places)
    finally:
        shutil.rmtree(out.parent)
    ended.faults.pop(outcome.OUTSIDE, None)  # a word may name any path; nothing was written there
    faults: dict[str, Any] = {f"{words[0][:20]}: {name}": text for name, text in ended.faults.items()}
    if whole and ended.code:
        faults[f"exit code {ended.code}"] = ended.text[-300:]
    return faults

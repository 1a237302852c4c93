"""``generate`` and ``chat`` as a user calls them: on an adapter's run, on its export, on one process and on two."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.inference.generate import generate
from mixtral_recipes.inference.model import InferenceModel, join
from mixtral_recipes.inference.sampling import Sampling
from mixtral_recipes.layout.topology import Topology
from tests.distributed.harness import command as forked
from tests.distributed.harness import launch

PROMPTS = ["Context: Bruxelles is a city in Belgium. Question: Where is Bruxelles? Answer:", "Question:", "The"]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}Answer:"


def command(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """In a new process, where the other tests here fork one."""
    return subprocess.run(
        [sys.executable, "-m", "mixtral_recipes.cli.main", *words],
        capture_output=True, text=True, input=stdin, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of the embedded model, exported; its learning rate high enough to change what is said."""
    folder = tmp_path_factory.mktemp("runs")
    done = forked(
        "finetune", "--recipe", "mixtral_tiny", "--peft", "lora", "--dir", str(folder), "--name", "tune", "--evaluate",
        "0", "--export", "--num-gpus-per-node", "1", "trainer.max_steps=4", "trainer.limit_val_batches=0",
        "optim.config.lr=0.02",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "tune"


@functools.cache
def texts(model: Path | str, *options: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
        words = ["generate", str(model), "--prompts", str(file), "--max-new-tokens", "16", "--json", *options]
        done = command(*words) if options else forked(*words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["continuations"]


def test_an_adapter_says_what_its_export_says_and_the_base_does_not(run: Path) -> None:
    adapter = texts(run)
    assert [row["prompt"] for row in adapter] == PROMPTS
    assert adapter == texts(run / "exported") == texts(run, "--devices", "2")
    assert adapter != texts("embedded://mixtral_tiny")


def with_and_without(checkpoint: Path) -> list[str]:
    """An adapter's greedy text, its base's, and the adapter's again."""
    model = InferenceModel.load(checkpoint, join(Topology()))
    prompt = [model.tokenizer(PROMPTS[0])["input_ids"]]
    before = generate(model, prompt, Sampling(16))[0].text
    with model.without_adapters():
        base = generate(model, prompt, Sampling(16))[0].text
    return [before, base, generate(model, prompt, Sampling(16))[0].text]


def test_without_its_adapters_a_model_is_its_base(run: Path) -> None:
    before, base, after = launch(1, with_and_without, (run / "checkpoints" / "latest").resolve())[0]
    assert before == after != base
    assert base == texts("embedded://mixtral_tiny")[0]["text"]


def test_the_text_appears_alone(run: Path) -> None:
    (expected, _, _) = texts(run)
    done = command("generate", str(run), PROMPTS[0], "--max-new-tokens", "16")
    assert (done.returncode, done.stdout.strip()) == (0, expected["text"].strip())


@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_error_is_one_line(run: Path, processes: str) -> None:
    done = command("generate", str(run), "Hi", "--max-new-tokens", "9999", "--devices", processes)
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if not line.startswith("Checkpoint: ")]
    assert len(told) == 1
    assert "max_position_embeddings=512" in told[0]


def test_a_conversation(run: Path, tmp_path: Path) -> None:
    model = tmp_path / "chat"
    shutil.copytree(run / "exported", model, ignore=shutil.ignore_patterns("lineage.json"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    lines = "Where is Bruxelles?\n/system Be brief.\n/reset\n\n/what\nWho?\n/quit\nnot read\n"
    done = command("chat", str(model), "--max-new-tokens", "5", "--devices", "2", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip("\n").splitlines()) >= 2
    assert "/reset clears the conversation" in done.stderr  # what rank 0 says appears, and nothing of torchrun's
    assert "[default" not in done.stderr
    assert forked("chat", str(run), stdin="Hi\n").returncode == 2  # no template
    done = forked("chat", str(model), "--compare", stdin="Hi\n")
    assert (done.returncode, "is not an adapter; leave it out" in done.stderr) == (2, True)

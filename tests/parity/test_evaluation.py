"""What a model scores on our engine, under every layout, is what it scores exported, with transformers."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_recipes.evaluation.perplexity import perplexity
from mixtral_recipes.inference.model import InferenceModel, join
from mixtral_recipes.layout.topology import Topology
from tests.distributed.harness import launch
from tests.parity.test_generate import LAYOUTS, make

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install -e '.[eval]'")

TASKS = ("choose", "continue", "whole", "say")
TEXTS = [
    "Context: The Normans gave their name to Normandy. Question: Who did? Answer:",
    "In what country is Bruxelles? It is in Belgium, they say.",
    "A bee is an insect.",
    "Question: what?",
]
SETTINGS = {
    "choose": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label\n"
    "metric_list: [{metric: acc}]",
    "continue": "output_type: loglikelihood\ndoc_to_target: target\nmetric_list: [{metric: perplexity}, {metric: acc}]",
    "whole": "output_type: loglikelihood_rolling\ndoc_to_target: whole\nmetric_list: [{metric: word_perplexity}]",
    "say": "output_type: generate_until\ndoc_to_target: target\n"
    "generation_kwargs: {until: ['Question'], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]",
}


def write_tasks(folder: Path) -> Path:
    """Four local tasks, one of each kind of request."""
    folder.mkdir()
    rows = [
        {"text": text, "choices": [" yes", " the Normans", " in Belgium"], "label": number % 3,
         "target": " the Normans.", "whole": text * (1 + 12 * number)}
        for number, text in enumerate(TEXTS)
    ]  # fmt: skip
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, more in SETTINGS.items():
        text = "''" if name == "whole" else "'{{text}}'"
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{files}\ndoc_to_text: {text}\n{more}\n")
    return folder


def asked(model: Any, tasks: Path) -> dict[str, Any]:
    """The harness's answers of each request, and its scores."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tasks / "cache")}
    manager = TaskManager(include_path=tasks, include_defaults=False)
    found: Any = evaluator.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    if found is None:
        return {}
    return {
        task: [sample["resps"] for sample in sorted(found["samples"][task], key=lambda one: one["doc_id"])]
        for task in TASKS
    }


def by_transformers(folder: Path, tasks: Path) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    return asked(HFLM(str(folder), dtype="float32", device="cpu", batch_size=3), tasks)


def by_us(checkpoint: Path, tasks: Path, topology: Topology) -> dict[str, Any]:
    from mixtral_recipes.evaluation.tasks import MegatronLM

    return asked(MegatronLM(InferenceModel.load(checkpoint, join(topology), dtype="fp32"), 3), tasks)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(1, make, tmp_path_factory.mktemp("model"))[0]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tasks: Path) -> dict[str, Any]:
    return launch(1, by_transformers, checkpoint.parent / "hf", tasks)[0]


@pytest.mark.parametrize("layout", ["ep2", "tp2", "pp2"])
def test_the_harness_is_told_the_same(checkpoint: Path, tasks: Path, expected: Any, layout: str) -> None:
    """Log-likelihoods to 1e-6 of themselves, in fp32; the same greedy flags, the same texts."""
    topology = LAYOUTS[layout]
    found = launch(topology.world_size, by_us, checkpoint, tasks, topology)[0]
    for task in TASKS:
        ours, theirs = (list(_flat(answers[task])) for answers in (found, expected))
        assert len(ours) == len(theirs) >= len(TEXTS)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == (pytest.approx(other, rel=1e-6) if isinstance(other, float) else other)


def ours_and_theirs(checkpoint: Path, folder: Path, text: Path, window: int, stride: int) -> tuple[float, float]:
    """Perplexity by us, and by the loop of transformers' documentation."""
    from transformers import MixtralForCausalLM

    model = InferenceModel.load(checkpoint, join(Topology()), dtype="fp32")
    found = perplexity(model, text, window=window, stride=stride, batch_size=3)
    hf: Any = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = model.tokenizer(text.read_text(), return_tensors="pt")["input_ids"]
    total, count, before = 0.0, 0, 0
    for start in range(0, ids.shape[1], stride):
        end = min(start + window, ids.shape[1])
        labels = ids[:, start:end].clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = hf(ids[:, start:end], labels=labels).loss
        judged = int((labels[:, 1:] != -100).sum())
        total, count, before = total + float(loss) * judged, count + judged, end
        if end == ids.shape[1]:
            break
    assert found["tokens"] == count == ids.shape[1] - 1
    return found["perplexity"], math.exp(total / count)


def test_perplexity_is_that_of_transformers_loop(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS * 5))
    ours, theirs = launch(1, ours_and_theirs, checkpoint, checkpoint.parent / "hf", text, 64, 24)[0]
    assert ours == pytest.approx(theirs, rel=1e-5)


def _flat(value: Any) -> Any:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value

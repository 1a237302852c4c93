"""Greedy continuations equal transformers', token by token in fp32, under every layout."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.inference.batch import Batch, Row
from mixtral_recipes.inference.generate import Continuation, generate
from mixtral_recipes.inference.model import InferenceModel, join
from mixtral_recipes.inference.sampling import Sampling
from mixtral_recipes.layout.topology import Topology
from tests.distributed.harness import launch

NEW = 64
LAYOUTS = {
    "one": Topology(),
    "ep2": Topology(world_size=2, expert_model_parallel_size=2),
    "tp2": Topology(world_size=2, tensor_model_parallel_size=2, sequence_parallel=True),
    "etp1": Topology(world_size=2, tensor_model_parallel_size=2, expert_tensor_parallel_size=1, sequence_parallel=True),
    "pp2": Topology(world_size=2, pipeline_model_parallel_size=2),
}


def prompts() -> list[list[int]]:
    """Twenty, of 1 to 39 tokens, not in the order of their lengths."""
    generator = torch.Generator().manual_seed(5)
    lengths = [(7 * number) % 20 * 2 + 1 for number in range(20)]
    return [torch.randint(3, 1900, (length,), generator=generator).tolist() for length in lengths]


def make(folder: Path) -> Path:
    """A random model with the embedded model's tokenizer, imported."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from mixtral_recipes import embedded

    source = embedded.resolve("embedded://mixtral_tiny")
    shutil.copytree(source, folder / "hf", ignore=shutil.ignore_patterns("*.safetensors", "README*"))
    config = MixtralConfig.from_pretrained(
        source, initializer_range=0.15, hidden_size=32, intermediate_size=48, head_dim=8
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder / "hf")
    return import_checkpoint(str(folder / "hf"), folder / "megatron", progress=False)


def by_transformers(folder: Path) -> list[list[int]]:
    from transformers import MixtralForCausalLM

    model: Any = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=2
        )
        found.append(whole[0, len(prompt) :].tolist())
    return found


def by_us(checkpoint: Path, topology: Topology, sampling: Sampling, batch_size: int) -> list[Continuation]:
    model = InferenceModel.load(checkpoint, join(topology), dtype="fp32")
    return generate(model, prompts(), sampling, batch_size=batch_size)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(1, make, tmp_path_factory.mktemp("model"))[0]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    found = launch(1, by_transformers, checkpoint.parent / "hf")[0]
    assert sum(map(len, found)) > 0.8 * 20 * NEW  # few end early
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens(checkpoint: Path, expected: list[list[int]], layout: str) -> None:
    topology = LAYOUTS[layout]
    for answers in launch(topology.world_size, by_us, checkpoint, topology, Sampling(NEW), 7):
        assert [answer.tokens for answer in answers] == expected
        assert [answer.finish_reason for answer in answers] == [
            "length" if len(a) == NEW and a[-1] != 2 else "stop" for a in expected
        ]


def test_draws_repeat_and_do_not_depend_on_the_batch(checkpoint: Path) -> None:
    sampling = Sampling(16, temperature=0.8, top_k=50, top_p=0.9, seed=3)
    one = launch(1, by_us, checkpoint, Topology(), sampling, 1)[0]
    many = launch(1, by_us, checkpoint, Topology(), sampling, 20)[0]
    split = launch(2, by_us, checkpoint, LAYOUTS["ep2"], sampling, 4)[0]
    assert [a.tokens for a in one] == [a.tokens for a in many] == [a.tokens for a in split]
    other = launch(1, by_us, checkpoint, Topology(), dataclasses.replace(sampling, seed=4), 20)[0]
    assert [a.tokens for a in other] != [a.tokens for a in one]


def beside_no_numbers(checkpoint: Path, topology: Topology) -> list[list[int]]:
    """What a short prompt is continued with alone, and in the place of one of which the model makes no numbers."""
    model = InferenceModel.load(checkpoint, join(topology), dtype="fp32")
    with torch.no_grad():
        model.chunk.embedding.word_embeddings.weight[77] = float("nan")
    long, damaged, short = ([50] * 20, [77] * 20, [51])
    rows = [Row(model, prompt, Sampling(8)) for prompt in (*[long] * topology.data_parallel_size, damaged, short)]
    batch = Batch(model, 2, 64)
    batch.add(rows[:-1])
    batch.add(rows[-1:])
    while len(batch):
        batch.step()
    assert [row.failure is not None for row in rows] == [False] * topology.data_parallel_size + [True, False]
    assert rows[-1].done
    return [generate(model, [short], Sampling(8))[0].tokens, rows[-1].done.tokens]


@pytest.mark.parametrize("layout", ["one", "ep2"])
def test_a_row_without_numbers_ends_alone_and_leaves_none_behind(checkpoint: Path, layout: str) -> None:
    topology = LAYOUTS[layout]
    for alone, beside in launch(topology.world_size, beside_no_numbers, checkpoint, topology):
        assert alone == beside

"""`mixtral-recipes plan`: its JSON, its goals, its errors; it loads no torch."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nemo_run as run
import pytest

from mixtral_recipes.cli import main
from mixtral_recipes.cli.jobs import planning
from mixtral_recipes.data.recognise import recognize
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.overrides import loading, outline_paths, paths
from mixtral_recipes.planner.workload import Workload
from mixtral_recipes.recipes.outline import Question, outline
from mixtral_recipes.settings.tokenizer import AutoTokenizer
from tests.unit.cli.test_command_line import modules_after

KEYS = {
    "fits", "layout", "memory_gb", "step_seconds", "step_seconds_low", "step_seconds_high", "tokens_per_second_per_gpu",
    "tflops_per_gpu", "steps", "hours", "gpu_hours", "disk_gb_per_checkpoint", "alternatives",
}  # fmt: skip
MEMORY = {
    "weights", "gradients", "optimizer", "adapters", "activations", "logits", "buffers", "overhead", "total",
    "capacity",
}  # fmt: skip


def planned(line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main.run(["plan", *line.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned("--recipe mixtral_8x7b", capsys)
    assert set(found) >= KEYS
    assert set(found["memory_gb"]) == MEMORY
    assert found["fits"]
    assert found["steps"] == 1000


def test_overrides_count(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned("--recipe mixtral_8x7b data.micro_batch_size=2 trainer.max_steps=7 optim.config.lr=1e-4", capsys)
    assert (found["steps"], found["layout"]["micro_batch_size"]) == (7, 2)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("trainer.max_step=7", "Trainer has no setting 'max_step'. Did you mean 'max_steps'?"),
        ("model.config.softmax_scale=5", "is not supported (only None is): the model would no longer be a Mixtral."),
    ],
)
def test_a_setting_is_refused_in_the_words_of_a_run(
    setting: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["plan", "--recipe", "mixtral_8x7b", setting]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "goal",
    [
        "--smallest --peft QLoRA",
        "--max-gpus 16 --peft none --task finetune",
        "--deadline 2h --max-gpus 64",
    ],
)
def test_goals_are_reached(goal: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(f"--recipe mixtral_8x7b {goal}", capsys)
    assert found["fits"]
    if "--deadline" in goal:
        assert found["hours"] <= 2
    if "--max-gpus" in goal:
        assert found["layout"]["gpus"] <= int(goal.split("--max-gpus ")[1].split()[0])


def test_the_table_says_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["plan", "--recipe", "mixtral_8x22b", "--peft", "none", "--num-nodes", "1"]) == 0
    out = capsys.readouterr().out
    assert "does NOT fit" in out
    assert "To fit: " in out


def test_a_picture(tmp_path: Path) -> None:
    assert main.run(["plan", "--recipe", "mixtral_8x7b", "--png", str(tmp_path / "memory.png")]) == 0
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "choose a recipe with --recipe"),
        ("--recipe mixtral_8x9b", "Did you mean 'mixtral_8x7b'"),
        ("--recipe mixtral_8x7b --hardware h300", "hardware='h300' is not a known GPU"),
        ("--recipe mixtral_8x7b --peft lroa", "Invalid value for '--peft': 'lroa' is not one of"),
        ("--recipe mixtral_8x7b trainer.max_step=1", "Did you mean 'max_steps'"),
        ("--recipe mixtral_8x7b trainer.max_steps=many", "trainer.max_steps=many must be a whole number."),
        ("--recipe mixtral_8x7b trainer.strategy.tensor_model_parallel_size=3", "does not divide"),
        ("--recipe mixtral_8x7b peft.target_modules=[]", "leave no layer to adapt"),
        ("--recipe mixtral_8x7b peft.target_modules=linear_fc9", "Did you mean 'linear_fc2'"),
        ("--recipe mixtral_8x7b model.config.recompute_granularity=ful", "use 'full', 'selective' or null"),
        ("--recipe mixtral_8x7b trainer.plugins.fp8=yes", "use 'hybrid' or 'e4m3'"),
        ("--recipe mixtral_8x7b trainer.plugins.precision=bf16", "is not supported; use '32'"),
        ("--recipe mixtral_8x7b model.config.fp8=hybrid", "is not supported (only None is): set trainer.plugins.fp8"),
        ("--recipe mixtral_8x7b trainer.accumulate_grad_batches=4", "accumulation follows from"),
        ("--recipe mixtral_8x7b --smallest --deadline 5h", "--smallest cannot be combined with --deadline"),
        ("--recipe mixtral_8x7b --deadline soon", "use hours"),
        (f"--recipe mixtral_8x7b --deadline {'9' * 5000}-10:00", "use hours"),
        (
            "--recipe mixtral_8x7b --smallest --num-nodes 2",
            "--num-nodes cannot be combined with --smallest",
        ),
        (
            "--recipe mixtral_8x7b --max-gpus 64 --nproc-per-node 4",
            "cannot be combined with --max-gpus",
        ),
        ("--recipe mixtral_8x7b --epochs 2", "--epochs counts passes over --data"),
        ("--recipe mixtral_8x7b --task pretrain --peft lora", "--peft applies only to fine-tuning"),
        ("--recipe mixtral_8x7b --performance-mode", "--performance-mode applies only to pretraining"),
        ("--yaml recipe.yaml --num-nodes 2", "--num-nodes cannot be combined with a recipe file"),
        ("--yaml recipe.yaml --no-packed", "--packed cannot be combined with a recipe file"),
        ("--recipe mixtral_8x7b --deadline 1m --max-gpus 8", "allow more time or GPUs"),
        ("--recipe mixtral_8x22b --peft none --smallest --max-gpus 8", "no layout of up to 8"),
    ],
)
def test_errors_are_one_line(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["plan", *line.split()]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not captured.out


@pytest.mark.parametrize("line", ["plan --help", "plan --recipe mixtral_8x7b data.micro_batch_size=2"])
def test_no_torch_is_loaded(line: str) -> None:
    assert modules_after(*line.split()) == []


OVERRIDES = [
    "trainer.strategy.tensor_model_parallel_size=2", "trainer.strategy.sequence_parallel=True",
    "trainer.strategy.expert_tensor_parallel_size=1", "data.micro_batch_size=4", "data.global_batch_size=256",
    "model.config.recompute_granularity=full", "model.config.recompute_method=block",
    "model.config.recompute_num_layers=3", "model.config.num_layers=16", "trainer.plugins.fp8=hybrid",
    "trainer.plugins.fp8_recipe=blockwise", "peft.dim=8", "peft.target_modules=attention",
    "trainer.strategy.ddp.overlap_grad_reduce=True", "trainer.devices=4", "model.config.accelerate=False",
    "model.config.gradient_accumulation_fusion=True", "model.config.gradient_accumulation_fusion=False",
    "model.config.moe_expert_capacity_factor=1.5", "optim.config.use_distributed_optimizer=False",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size is not set:UserWarning")
def test_an_override_changes_an_outline_as_it_changes_the_recipe() -> None:
    recipe, mine = loading.load("mixtral_8x7b", "finetune"), outline(Question("mixtral_8x7b"))
    for override in OVERRIDES:
        before = Workload.of(mine)
        paths.apply(recipe, [override])
        outline_paths.apply(mine, [override])
        assert Workload.of(mine) == Workload.of(recipe), override
        assert Workload.of(mine) != before or "method" in override or "accelerate" in override, override


def test_what_an_outline_cannot_hold_needs_the_recipe() -> None:
    for override in (
        "peft=DoRA(dim=16)",
        "peft.target_modules=[linear_fc1,linear_fc2]",
        "trainer.max_steps*=2",
        "trainer.callbacks[0].x=1",
        "peft=null",
        "model.config.mtp_loss_scaling_factor=0.5",
    ):
        with pytest.raises(outline_paths.NeedsRecipe):
            outline_paths.apply(outline(Question("mixtral_8x7b")), [override])
    with pytest.raises(outline_paths.NeedsRecipe):
        outline_paths.apply(outline(Question("mixtral_8x7b", "pretrain")), ["trainer.max_steps={[]: 1}"])


def test_tokens_are_counted_with_the_recipes_own_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(json.dumps({"input": f"What is number {n}?", "output": "a number"}) for n in range(40)))

    def counted(recipe: str, *overrides: str) -> int:
        return planned(f"--recipe {recipe} --data {data} {' '.join(overrides)}", capsys)["data"]["tokens"]

    def tokens(tokenizer: str) -> int:
        module = recognize(data).module(seq_length=128)
        lengths = module.datasets(load_tokenizer(tokenizer))["train"].lengths
        return int(lengths.sum()) + len(lengths)

    of_tiny, of_8x7b = tokens("embedded://mixtral_tiny"), tokens("mistral://mixtral-8x7b")
    assert of_tiny != of_8x7b
    assert counted("mixtral_tiny") == of_tiny
    assert counted("mixtral_8x7b") == of_8x7b
    assert counted("mixtral_8x7b", "model.tokenizer=embedded://mixtral_tiny") == of_tiny
    model = SimpleNamespace(tokenizer=run.Config(AutoTokenizer, "embedded://mixtral_tiny"))  # as recipe files have it
    assert len(planning._tokenizer_of(SimpleNamespace(model=model), 32000)) == 1999
    tools = tmp_path / "tools.jsonl"  # which only the tokenizer of Mixtral 8x22B Instruct has tokens for
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    tool = {"type": "function", "function": {"name": "get", "description": "", "parameters": {}}}
    tools.write_text("\n".join(json.dumps({"tools": [tool], "messages": talk}) for _ in range(4)))
    line = f"--recipe mixtral_8x22b --data {tools} model.config.vocab_size=32768"
    assert planned(line, capsys)["data"]["samples"] == 3


def test_several_data_sets_are_counted_as_a_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, long = tmp_path / "short.jsonl", tmp_path / "long.jsonl"
    short.write_text("\n".join(json.dumps({"input": f"q{n}", "output": "a"}) for n in range(200)))
    long.write_text("\n".join(json.dumps({"input": f"q{n}", "output": "a " * 50}) for n in range(40)))

    def planned(*data: str) -> dict[str, Any]:
        asked = [word for spec in data for word in ("--data", spec)]
        assert main.run(["plan", "--recipe", "mixtral_8x7b", *asked, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    one, both = planned(str(short))["data"], planned(f"{short}:0.75", f"{long}:0.25")
    first, second = both["data"]["sources"]
    assert (first["samples"], first["share"], second["share"]) == (one["samples"], 0.75, 0.25)
    assert both["data"]["samples"] == first["samples"] + second["samples"] == 228
    means = [source["tokens"] / source["samples"] for source in (first, second)]
    assert both["data"]["mean_tokens"] == pytest.approx(0.75 * means[0] + 0.25 * means[1], abs=0.06)
    assert both["steps"] == 2  # 228 rows, 128 in a step
    assert main.run(["plan", "--recipe", "mixtral_8x7b", "--data", f"{short}:0.75", "--data", str(long)]) == 2

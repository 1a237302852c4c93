"""One valid example of everything that is read from outside, as small as it can be, in one folder."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.mistral_folder import mistral_params, mistral_tensors, write_mistral
from tests.mixtral_folder import mixtral_config, mixtral_tensors, write_model
from tests.nemo_folder import Nemo, nemo_fields, nemo_tensors, write_nemo

SIZES = {"num_hidden_layers": 1, "num_local_experts": 2, "hidden_size": 16, "intermediate_size": 16}
TEMPLATE = (
    "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else "
    "m['content'] + eos_token }}{% endfor %}"
)
CHAT = [
    {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(4)
]
SHAREGPT = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day", "weight": 1}]}
_ADD = {
    "name": "add",
    "description": "adds",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = {
    "tools": [{"type": "function", "function": _ADD}],
    "messages": [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "It is 3."},
    ],
}
SQUAD = {
    "version": "1.1",
    "data": [{"title": "T", "paragraphs": [{"context": "The cat sat on the mat.", "qas": [
        {"id": "1", "question": "Who sat?", "answers": [{"text": "The cat", "answer_start": 0}]}]}]}],
}  # fmt: skip
CLUSTERS = """
[big]
account = "research"
partition = "batch"
time = "08:00:00"
gpus_per_node = 8
venv = "/shared/me/venv"
modules = ["cuda/12.8"]
mounts = ["/data:/data:ro"]
retries = 2
exclusive = true
env = {NCCL_DEBUG = "WARN"}
sbatch = {mail-type = "END"}
"""
PIPELINE = """
name = "squad"
dir = "{folder}/pipeline"

[[stage]]
name = "tune"
recipe = "mixtral_tiny"
arguments = {peft_scheme = "lora"}
overrides = ["trainer.max_steps=3"]

[[stage]]
name = "check"
command = ["recipes", "list"]
after = ["tune"]
slurm = {partition = "gpu"}
"""
AUTOMODEL = """
recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler: {global_batch_size: 8, local_batch_size: 1, max_steps: 7, ckpt_every_steps: 3}
rng: {_target_: nemo_automodel.components.training.rng.StatefulRNG, seed: 5, ranked: true}
model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained
  pretrained_model_name_or_path: mistralai/Mixtral-8x7B-v0.1
  torch_dtype: bf16
peft: {_target_: nemo_automodel.components._peft.lora.PeftConfig, match_all_linear: true, dim: 4}
checkpoint: {enabled: true, checkpoint_dir: kept/, model_save_format: safetensors}
distributed: {strategy: fsdp2, dp_size: none, tp_size: 1, cp_size: 1}
dataset: {_target_: x.squad.make_squad_dataset, dataset_name: rajpurkar/squad, split: train}
packed_sequence: {packed_sequence_size: 0}
optimizer: {_target_: torch.optim.Adam, betas: [0.8, 0.9], eps: "1e-7", lr: "2.0e-5"}
lr_scheduler: {lr_decay_style: cosine, min_lr: "1.0e-6"}
"""
SCRIPT = """
from nemo.collections import llm
import nemo_run as run

def recipe(nodes: int = 1):
    found = llm.mixtral_8x7b.pretrain_recipe(name="x", dir="/y", num_nodes=nodes)
    found.trainer.strategy.expert_model_parallel_size = 8
    found.data = run.Config(llm.SquadDataModule, seq_length=2048, micro_batch_size=1)
    return found

if __name__ == "__main__":
    run.run(recipe(), executor=run.LocalExecutor(ntasks_per_node=8, launcher="torchrun"))
"""


def make(root: Path) -> None:
    """Write them all below ``root``; the home folder in use belongs to them too."""
    from mixtral_recipes import embedded
    from mixtral_recipes.checkpoints.format.manifest import write_manifest

    tiny = embedded.resolve("embedded://mixtral_tiny")
    vocabulary = json.loads((tiny / "config.json").read_text())["vocab_size"]
    config = mixtral_config(**SIZES, vocab_size=vocabulary, bos_token_id=1, eos_token_id=2)
    tensors = mixtral_tensors(config, torch.bfloat16)
    for name, form in {"hf": {}, "sharded": {"shards": 2}, "bin": {"kind": "bin"}}.items():
        folder = write_model(root / name, config, tensors, **form)
        for file in tiny.glob("*token*"):
            shutil.copy(file, folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    write_mistral(root / "mistral", mistral_params(config), mistral_tensors(config, tensors))
    _sentencepiece(root)
    with pytest.MonkeyPatch.context() as patch:
        nemo = Nemo(patch)
        model = nemo.call("MixtralModel", config=nemo.call("MixtralConfig", **nemo_fields(config)))
        write_nemo(root / "nemo", nemo.context(model), nemo_tensors(config, tensors), tokenizer=root / "hf")
    _adapter(root / "peft", root / "checkpoint", config)

    done("import", root / "hf", "--output", root / "checkpoint")
    done("import", root / "peft", "--base", root / "checkpoint", "--output", root / "adapter")
    done("export", root / "checkpoint", root / "exported")
    _run(root, root / "checkpoint")
    weights = json.loads((root / "checkpoint" / "manifest.json").read_text())["tensors"]
    write_manifest(root / "run" / "checkpoints" / "step=2", "model", source={"run": "x"}, tensors=weights)
    _data(root / "data")
    done("data", "prepare", root / "data" / "text.jsonl", "-o", root / "corpus" / "text", "--tokenizer",
         "embedded://mixtral_tiny", "--workers", "1")  # fmt: skip

    texts = root / "texts"
    texts.mkdir()
    done("finetune", "--recipe", "mixtral_tiny", "--to-yaml", texts / "recipe.yaml", "trainer.max_steps=3")
    written = {"clusters.toml": CLUSTERS, "automodel.yaml": AUTOMODEL, "script.py": SCRIPT, "template.jinja": TEMPLATE}
    for name, text in (written | {"pipeline.toml": PIPELINE.replace("{folder}", str(root))}).items():
        (texts / name).write_text(text)


def done(*words: Any) -> None:
    """Run a command that must succeed."""
    from mixtral_recipes.cli.main import run

    assert run([str(word) for word in words]) == 0, words


def _sentencepiece(root: Path) -> None:
    """A folder whose tokenizer is a SentencePiece file."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    shutil.copytree(root / "hf", root / "sentencepiece", ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    found = next((Path(MistralTokenizer._data_path())).glob("*.model*"))
    shutil.copy(found, root / "sentencepiece" / "tokenizer.model")


def _adapter(folder: Path, base: Path, config: dict[str, Any]) -> None:
    folder.mkdir()
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 8,
        "lora_dropout": 0.0, "bias": "none", "target_modules": ["o_proj"], "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    at, hidden = "base_model.model.model.layers.0.self_attn.o_proj.", config["hidden_size"]
    tensors = {at + "lora_A.weight": torch.ones(4, hidden), at + "lora_B.weight": torch.ones(hidden, 4)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _run(root: Path, checkpoint: Path) -> None:
    """A run that ended, its record and its last checkpoint."""
    from mixtral_recipes.executors.runs.records import new

    run = root / "run"
    saved = run / "checkpoints" / "step=2"
    shutil.copytree(checkpoint, saved)
    (saved / "manifest.json").unlink()
    facts = {"step": 2, "consumed_samples": 4, "world_size": 1, "metrics": {"val_loss": 1.5}, "peft": None}
    (saved / "context" / "run.json").write_text(json.dumps(facts))
    entries: list[dict[str, Any]] = [
        {"kind": "start", "time": 1.7e9, "step": 0, "restored_from": "random weights", "changed": ["optim.lr: 1 -> 2"],
         "topology": "EP2", "world_size": 2, "environment": {"torch": "2"}, "recipe": {"optim.lr": 1e-3}},
        {"kind": "plan", "hardware": "h100", "step_seconds": 1.0, "memory_gb": 2.0},
        *({"kind": "train", "time": 1.7e9 + step, "step": step, "loss": 5 / step, "grad_norm": 1.0, "lr": 1e-3,
           "seconds": 0.5, "tokens_per_second": 1e4, "tflops_per_process": 1.0, "memory_gb": 1.5, "skipped_steps": 0,
           "router_entropy": 0.9, "dropped_share": 0.0, "loss/squad": 2.0, "expert_load": [[10, 30], [20, 20]],
           "router_losses": {"load_balancing_loss": [1.0, 1.2]}} for step in (1, 2, 3)),
        {"kind": "val", "step": 2, "val_loss": 1.5}, {"kind": "save", "step": 2, "stall_seconds": 0.1},
        {"kind": "end", "time": 1.8e9, "steps": 3, "last_loss": 1.7, "checkpoint": str(saved)},
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (run / "result.json").write_text(json.dumps({"steps": 3, "last_loss": 1.7, "checkpoint": str(saved)}))
    record = new("tune", run, "local", "mixtral_tiny.finetune")
    record.id = "tune-0"
    record.job_dir = str(record.path.parent)
    record.state = "failed"
    record.save()
    ends = record.path.parent / "attempts" / "0"
    ends.mkdir(parents=True)
    end = {"rank": 0, "host": "h", "exit_code": 1, "error": "ValueError: x", "traceback": "trace", "time": 1.0}
    (ends / "rank-0.json").write_text(json.dumps(end))


def _data(folder: Path) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    pairs = [{"input": f"What is {n}?", "output": f"It is {n}."} for n in range(4)]
    texts = [{"text": f"The cat sat on mat {n}. " * 8} for n in range(4)]
    records = {"chat": CHAT, "sharegpt": [SHAREGPT] * 3, "tools": [TOOLS] * 2, "pairs": pairs, "text": texts}
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "squad.json").write_text(json.dumps(SQUAD))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress((folder / "chat.jsonl").read_bytes()))
    (folder / "plain.txt").write_text("One document.\n\nAnother document,\nof two lines.\n")
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["input", "output"])
        writer.writeheader()
        writer.writerows(pairs)
    pq.write_table(pa.Table.from_pylist(CHAT), folder / "chat.parquet")

"""Tokens per second of our training step beside transformers + peft, from the same weights on the same tokens.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --sizes small --modes lora --repeats 3 --profile

One process without a GPU, fp32, full sequences, every token learned. A Mixtral is made at random, imported into our
run and loaded by transformers once per way it can compute experts. Each repeat takes one step of every contender in
turn, so that a slow moment of the machine strikes all of them. Both sides clip gradients and step AdamW (transformers'
side torch's fused one, as its Trainer does). The first losses are compared, so that nobody trains something else.

LoRA is of dim 16 on all linear layers, experts included (peft: ``target_parameters`` for the experts). QLoRA is the
same over a base in NF4; transformers with bitsandbytes quantises attention and leaves fused experts as they are, which
the result says (``quantized``), so that its step dequantises less than ours. Prints JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mixtral_recipes.data.batches.batch import Batch, DataParallelPlace, Sample, Samples
from mixtral_recipes.data.modules.base import DataModule

SIZES = {
    # hidden, layers, heads, KV heads, head dim, width of an expert, vocabulary, sequences per step, their length
    "tiny": (128, 4, 4, 2, 64, 128, 1999, 16, 256),
    "small": (512, 4, 8, 4, 64, 1024, 8000, 4, 512),
}
WAYS = ("eager", "grouped_mm")
MODES = ("lora", "qlora", "full")
LEARNING_RATE, CLIP, RANK = 1e-4, 1.0, 16
Step = Callable[[], float]


class RandomTokens(Dataset[Sample]):
    """Full sequences of random tokens, all learned."""

    def __init__(self, length: int, vocab_size: int) -> None:
        self.length, self.vocab_size = length, vocab_size

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> Sample:
        tokens = np.random.default_rng(index).integers(0, self.vocab_size, self.length + 1)
        return Sample(tokens=tokens, loss_mask=np.ones(self.length))


@dataclass
class RandomData(DataModule):
    """Random full sequences."""

    vocab_size: int = 2000

    def datasets(self, tokenizer: Any) -> dict[str, Samples]:
        """One endless training set."""
        return {"train": RandomTokens(self.seq_length, self.vocab_size)}


def make_model(folder: Path, size: str) -> None:
    """Write a random Mixtral as a Hugging Face folder."""
    from transformers import MixtralConfig, MixtralForCausalLM

    hidden, layers, heads, kv, head_dim, width, vocab, _, length = SIZES[size]
    config = MixtralConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, head_dim=head_dim,
        num_attention_heads=heads, num_key_value_heads=kv, num_local_experts=8, max_position_embeddings=length,
        router_aux_loss_coef=0.0, initializer_range=0.05, sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)


def our_step(folder: Path, size: str, mode: str, data: DataModule) -> Step:
    """One `train_step` of ours."""
    from megatron.core.optimizer import OptimizerConfig

    from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
    from mixtral_recipes.models.config import MixtralConfigTiny, MixtralModel
    from mixtral_recipes.settings.optim import MegatronOptimizerModule
    from mixtral_recipes.settings.peft import LoRA, QLoRA
    from mixtral_recipes.settings.precision import MegatronMixedPrecision
    from mixtral_recipes.settings.trainer import Trainer
    from mixtral_recipes.training import distributed
    from mixtral_recipes.training.run import build_run
    from mixtral_recipes.training.step import train_step

    weights = folder.with_name(folder.name + "-megatron")
    if not weights.exists():
        import_checkpoint(str(folder), weights)
    hidden, layers, heads, kv, head_dim, width, vocab, _, length = SIZES[size]
    config = MixtralConfigTiny(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_query_groups=kv, kv_channels=head_dim,
        ffn_hidden_size=width, vocab_size=vocab, max_position_embeddings=length, rotary_base=1e6,
        moe_aux_loss_coeff=0.0,
    )  # fmt: skip
    trainer = Trainer(accelerator="cpu", max_steps=10_000, plugins=MegatronMixedPrecision(precision="32"))
    place = distributed.ProcessPlace.from_environment()
    device = distributed.choose_device("cpu", place)
    if not torch.distributed.is_initialized():
        distributed.initialize(trainer.topology(), place, device, seed=1)
    optim = MegatronOptimizerModule(
        OptimizerConfig(lr=LEARNING_RATE, clip_grad=CLIP, weight_decay=0.0, use_distributed_optimizer=True)
    )
    peft = {"lora": LoRA, "qlora": QLoRA}[mode](dim=RANK, alpha=RANK) if mode != "full" else None
    run = build_run(MixtralModel(config), trainer, data, optim, device=device, peft=peft, weights=weights)
    batches = data.train_batches(run.data_place, **run.loader_shape)
    return lambda: train_step(run, batches).loss


def their_step(folder: Path, mode: str, way: str, batches: Iterator[Batch]) -> Step:
    """The same step with transformers, and peft for LoRA, and bitsandbytes for QLoRA.

    Args:
        folder: The model.
        mode: "lora", "qlora" or "full".
        way: How transformers computes experts.
        batches: Its batches.
    """
    from transformers import MixtralForCausalLM

    settings: dict[str, Any] = {"experts_implementation": way, "dtype": torch.float32}
    if mode == "qlora":
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model: Any = MixtralForCausalLM.from_pretrained(folder, **settings)
    if mode != "full":
        from peft import LoraConfig, get_peft_model

        attention, experts = (
            ["q_proj", "k_proj", "v_proj", "o_proj"],
            ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=attention, target_parameters=experts)
        model = get_peft_model(model, lora)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step() -> float:
        batch = next(batches)
        logits = model(input_ids=batch["tokens"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure(size: str, mode: str, folder: Path, repeats: int, profile: bool) -> dict[str, Any]:
    """Steps of all contenders in turn.

    Returns:
        Per contender the median tokens/s and its spread (lowest, highest); how ours compares with the best other; a
        contender that fails has its error instead.
    """
    *_, vocab, batch, length = SIZES[size]
    data = RandomData(seq_length=length, micro_batch_size=batch, global_batch_size=batch, vocab_size=vocab)
    data.setup(None)
    ours = our_step(folder, size, mode, data)
    steps: dict[str, Step] = {"mixtral-recipes": ours}
    result: dict[str, Any] = {"size": size, "mode": mode, "tokens_per_step": batch * length}
    if mode == "qlora":
        result["quantized"] = {"mixtral-recipes": "attention and experts", "transformers": "attention"}
    first = {"mixtral-recipes": ours()}
    for way in WAYS:
        try:
            theirs = their_step(folder, mode, way, data.train_batches(DataParallelPlace()))
            first[way] = theirs()
            steps[way] = theirs
        except (ImportError, RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            result[way] = {"failed": str(error).splitlines()[0][:200]}
    tolerance = 2e-2 if mode == "qlora" else 1e-4  # other weights are quantised
    for loss in first.values():
        if abs(loss - first["mixtral-recipes"]) > tolerance * loss:
            raise SystemExit(f"{size} {mode}: first losses differ, so this compares nothing: {first}")
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            speeds[name].append(batch * length / (time.perf_counter() - start))
    for name, found in speeds.items():
        result[name] = {
            "tokens_per_second": round(statistics.median(found)),
            "spread": [round(min(found)), round(max(found))],
        }
    others = [name for name in speeds if name in WAYS]
    if not others:
        return result
    best = max(others, key=lambda name: statistics.median(speeds[name]))
    ratios = [mine / other for mine, other in zip(speeds["mixtral-recipes"], speeds[best], strict=True)]
    result |= {"best_other": best, "ratio": round(statistics.median(ratios), 3)}
    if profile:
        result["profile"] = {
            name: profile_of(step) for name, step in steps.items() if name in ("mixtral-recipes", best)
        }
    return result


def profile_of(step: Step, rows: int = 12) -> dict[str, float]:
    """Share of a step's processor time per operator, the largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: round(event.self_cpu_time_total / total, 3) for event in events[:rows]}


def main() -> None:
    """Print one JSON object per size and mode, then all of them as one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="also where a step's time goes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in options.sizes:
            make_model(folder := Path(scratch) / size, size)
            for mode in options.modes:
                found.append(measure(size, mode, folder, options.repeats, options.profile))
                print(json.dumps(found[-1], indent=1), file=sys.stderr, flush=True)
    torch.distributed.destroy_process_group()
    print(json.dumps({"threads": options.threads, "cores": os.cpu_count(), "results": found}))


if __name__ == "__main__":
    main()

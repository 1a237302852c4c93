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
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from step_contenders import (
    CLIP,
    LEARNING_RATE,
    RANK,
    RandomData,
    Step,
    furthest,
    our_step,
    transformers_step,
    with_adapters,
)
from temporary import temporary_folder

from mixtral_recipes.data.batches.batch import DataParallelPlace
from mixtral_recipes.data.modules.base import DataModule

SIZES = {
    # hidden, layers, heads, KV heads, head dim, width of an expert, vocabulary, sequences per step, their length
    "tiny": (128, 4, 4, 2, 64, 128, 1999, 16, 256),
    "small": (512, 4, 8, 4, 64, 1024, 8000, 4, 512),
}
WAYS = ("eager", "grouped_mm")
MODES = ("lora", "qlora", "full")


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


def ours(folder: Path, size: str, mode: str, data: DataModule) -> Step:
    """One `train_step` of ours, from the model's weights."""
    from megatron.core.optimizer import OptimizerConfig

    from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
    from mixtral_recipes.models.config import MixtralConfigTiny, MixtralModel
    from mixtral_recipes.settings.optim import MegatronOptimizerModule
    from mixtral_recipes.settings.peft import LoRA, QLoRA
    from mixtral_recipes.settings.precision import MegatronMixedPrecision
    from mixtral_recipes.settings.trainer import Trainer
    from mixtral_recipes.training import distributed

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
    device = distributed.choose_device("cpu", distributed.ProcessPlace.from_environment())
    optim = MegatronOptimizerModule(
        OptimizerConfig(lr=LEARNING_RATE, clip_grad=CLIP, weight_decay=0.0, use_distributed_optimizer=True)
    )
    peft = {"lora": LoRA, "qlora": QLoRA}[mode](dim=RANK, alpha=RANK) if mode != "full" else None
    return our_step(MixtralModel(config), trainer, data, optim, device=device, peft=peft, weights=weights)


def theirs(folder: Path, mode: str, way: str, data: DataModule) -> Step:
    """The same step with transformers, and peft for LoRA, and bitsandbytes for QLoRA; ``way`` computes experts."""
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
        model = with_adapters(model, experts=True)
    return transformers_step(model, data.train_batches(DataParallelPlace()))


def measure(size: str, mode: str, folder: Path, repeats: int, profile: bool) -> dict[str, Any]:
    """Steps of all contenders in turn.

    Returns:
        Per contender the median tokens/s and its spread (lowest, highest); how ours compares with the best other; a
        contender that fails has its error instead.
    """
    *_, vocab, batch, length = SIZES[size]
    data = RandomData(seq_length=length, micro_batch_size=batch, global_batch_size=batch, vocab_size=vocab)
    data.setup(None)
    own = ours(folder, size, mode, data)
    steps: dict[str, Step] = {"mixtral-recipes": own}
    result: dict[str, Any] = {"size": size, "mode": mode, "tokens_per_step": batch * length}
    if mode == "qlora":
        result["quantized"] = {"mixtral-recipes": "attention and experts", "transformers": "attention"}
    first = {"mixtral-recipes": own()}
    for way in WAYS:
        try:
            rival = theirs(folder, mode, way, data)
            first[way] = rival()
            steps[way] = rival
        except (ImportError, RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            result[way] = {"failed": str(error).splitlines()[0][:200]}
    tolerance = 2e-2 if mode == "qlora" else 1e-4  # other weights are quantised
    if furthest(first) > tolerance:
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
    with temporary_folder() as scratch:
        for size in options.sizes:
            make_model(folder := scratch / size, size)
            for mode in options.modes:
                found.append(measure(size, mode, folder, options.repeats, options.profile))
                print(json.dumps(found[-1], indent=1), file=sys.stderr, flush=True)
    torch.distributed.destroy_process_group()
    print(json.dumps({"threads": options.threads, "cores": os.cpu_count(), "results": found}))


if __name__ == "__main__":
    main()

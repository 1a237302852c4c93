"""Tokens per second of greedy decoding with a cache of keys and values, against transformers' `generate`.

    python benchmarks/decode.py
    python benchmarks/decode.py --model FOLDER --batch 1 8 --new-tokens 128 --json out.json

One process, one thread, the same weights, prompts and number of new tokens. Each repeat lets both go in turn, so that a
slow moment of the machine strikes both; the figures are processor time, the ratio is the median of the repeats' ratios.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from temporary import temporary_folder

PROMPT_TOKENS = 32


def ours(folder: Path, new_tokens: int) -> Callable[[list[list[int]]], list[list[int]]]:
    """Our engine on a checkpoint: prompts to new tokens."""
    from mixtral_recipes.inference.generate import generate
    from mixtral_recipes.inference.model import InferenceModel, join
    from mixtral_recipes.inference.sampling import Sampling
    from mixtral_recipes.layout.topology import Topology

    model = InferenceModel.load(folder, join(Topology()), dtype="fp32")
    model.end_tokens = frozenset()

    def run(prompts: list[list[int]]) -> list[list[int]]:
        found = generate(model, prompts, Sampling(new_tokens), batch_size=len(prompts))
        return [one.tokens for one in found]

    return run


def theirs(folder: Path, new_tokens: int) -> Callable[[list[list[int]]], list[list[int]]]:
    """transformers on a Hugging Face folder: prompts to new tokens."""
    from transformers import MixtralForCausalLM

    model: Any = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def run(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
        return whole[:, ids.shape[1] :].tolist()

    return run


def compare(source: Path, batch_sizes: list[int], new_tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of both, and the ratio, for each batch size."""
    from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint

    torch.set_num_threads(1)
    with temporary_folder() as scratch:
        checkpoint = import_checkpoint(str(source), scratch / "megatron", progress=False)
        engines = {"ours": ours(checkpoint, new_tokens), "transformers": theirs(source, new_tokens)}
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for batch in batch_sizes:
        prompts = torch.randint(3, 1900, (batch, PROMPT_TOKENS), generator=generator).tolist()
        said = {name: engine(prompts) for name, engine in engines.items()}  # warms up
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(repeats):
            for name, engine in engines.items():
                start = time.process_time()
                engine(prompts)
                speeds[name].append(batch * new_tokens / (time.process_time() - start))
        ratios = [a / b for a, b in zip(speeds["ours"], speeds["transformers"], strict=True)]
        found[f"batch {batch}"] = {
            **{name: statistics.median(values) for name, values in speeds.items()},
            "ratio": statistics.median(ratios),
            "same tokens": said["ours"] == said["transformers"],
        }
    return found


def main() -> None:
    """Print both speeds and their ratio."""
    from mixtral_recipes import embedded

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: the embedded model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    source = options.model or embedded.resolve("embedded://mixtral_tiny")
    found = compare(source, options.batch, options.new_tokens, options.repeats)
    for name, row in found.items():
        both = "".join(f"{kind} {row[kind]:>8,.1f} tokens/s   " for kind in ("ours", "transformers"))
        print(f"{name:<10}{both}{row['ratio']:.2f}x   same tokens: {row['same tokens']}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

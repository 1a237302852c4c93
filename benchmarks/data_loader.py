"""How fast data modules deliver tokens, and tokenizing end to end beside the raw tokenizer.

    python benchmarks/data_loader.py
    python benchmarks/data_loader.py --seq-length 4096 --tokens 50000000 --json out.json

Processor time of one process, so that other work on the machine does not count. The loader rows include collating into
torch tensors. "prepare over raw" is ``data prepare`` of a JSONL file (reading, parsing, tokenizing, writing .bin and
.idx) against ``[e.ids for e in encode_batch_fast(...)]`` of the same texts held in memory, with as many threads;
"prepare over encoding" leaves out of the rival that its ids are read, which is where tokens become Python's.
"""

import argparse
import itertools
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from temporary import temporary_folder

from mixtral_recipes.data.batches.batch import DataParallelPlace
from mixtral_recipes.data.corpus import Encoder, prepare_corpus, write_index
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.data.modules.pretraining import PreTrainingDataModule
from mixtral_recipes.data.modules.squad import SquadDataModule
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.settings.data import PackedSequenceSpecs


def synthetic_corpus(prefix: Path, tokens: int, vocab_size: int) -> Path:
    """Documents of lognormal length with random tokens."""
    draw = np.random.default_rng(0)
    lengths = np.maximum(draw.lognormal(6.5, 1.0, tokens // 1000), 2).astype(np.int32)
    draw.integers(3, vocab_size, int(lengths.sum()), dtype=np.uint16).tofile(f"{prefix}.bin")
    write_index(Path(f"{prefix}.idx"), lengths, np.dtype(np.uint16))
    return prefix


def loader_speed(module: DataModule, batches: int) -> dict[str, float]:
    """Real tokens per second of processor time, after one batch."""
    stream = module.train_batches(DataParallelPlace())
    next(stream)
    start, tokens, slots = time.process_time(), 0, 0
    for batch in itertools.islice(stream, batches):
        slots += batch["tokens"].numel()
        padding = batch.get("padding_mask")
        tokens += batch["tokens"].numel() - (int(padding.sum()) if padding is not None else 0)
    elapsed = time.process_time() - start
    return {"tokens_per_second": tokens / elapsed, "useful_share": tokens / slots}


def prepare_over_raw(folder: Path, tokenizer: Any, megabytes: int) -> dict[str, float]:
    """Throughput of `prepare_corpus` over that of the raw tokenizer on the same texts."""
    lines = json_texts(megabytes)
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    backend = tokenizer.backend_tokenizer
    backend.encode_batch_fast(lines[:100], add_special_tokens=False)
    encoding, raw, whole, tokens = [], [], [], 0
    for number in range(9):
        for seconds, take in ((encoding, lambda encoded: None), (raw, lambda encoded: [e.ids for e in encoded])):
            start = time.process_time()
            for first in range(0, len(lines), 512):
                take(backend.encode_batch_fast(lines[first : first + 512], add_special_tokens=False))
            seconds.append(time.process_time() - start)
        start = time.process_time()
        tokens = prepare_corpus([path], folder / f"prepared{number}", Encoder.of(tokenizer)).tokens
        whole.append(time.process_time() - start)
    return {
        "prepare_over_raw": min(raw) / min(whole),  # of nine each: the moments the machine disturbed least
        "prepare_over_encoding": min(encoding) / min(whole),
        "prepare_tokens_per_second": tokens / min(whole),
    }


def json_texts(megabytes: int) -> list[str]:
    """Documents made of the embedded sample's passages, each with numbers of its own."""
    from mixtral_recipes.embedded import resolve

    passages = [json.loads(line)["text"] for line in resolve("embedded://squad/pretraining.jsonl").open()]
    texts, size = [], 0
    while size <= megabytes << 20:
        number = len(texts)
        some = (passages[(number * 7 + k * 13) % len(passages)] for k in range(1 + number % 5))
        texts.append("\n\n".join([f"Document {number}", *some]))
        size += len(texts[-1])
    return texts


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens of the synthetic corpus")
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--megabytes", type=int, default=8, help="text to tokenize")
    parser.add_argument("--tokenizer", default="mistral://mixtral-8x7b")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    tokenizer = load_tokenizer(options.tokenizer)
    results: dict[str, dict[str, float]] = {}
    with temporary_folder() as folder:
        os.environ["MIXTRAL_RECIPES_HOME"] = str(folder)
        corpus = synthetic_corpus(folder / "corpus", options.tokens, len(tokenizer))
        shape: dict[str, Any] = {"seq_length": options.seq_length, "micro_batch_size": 1}
        padded: dict[str, Any] = shape | {"micro_batch_size": 16}
        specs = PackedSequenceSpecs(options.seq_length)
        modules: dict[str, DataModule] = {
            "indexed": PreTrainingDataModule(paths=str(corpus), split="1,0,0", **shape),
            "squad padded": SquadDataModule(dataset_root="embedded://squad", **padded),
            "squad packed": SquadDataModule(dataset_root="embedded://squad", **shape, packed_sequence_specs=specs),
        }
        for name, module in modules.items():
            module.setup(tokenizer)
            results[name] = loader_speed(module, options.batches)
            speed, useful = results[name].values()
            print(f"{name:<14}{speed / 1e6:8.2f} million tokens/s/process, {useful:.1%} of the slots", flush=True)
        results["tokenizing"] = prepare_over_raw(folder, tokenizer, options.megabytes)
    ratio, bare, speed = results["tokenizing"].values()
    print(
        f"{'tokenizing':<14}{speed / 1e6:8.2f} million tokens/s/process, {ratio:.3f} of the raw tokenizer's speed, "
        f"{bare:.3f} of its encoding alone"
    )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Train the embedded model's tokenizer on the sample, and write it and the model's config.json.

Writes, under mixtral_recipes/embedded/mixtral_tiny/, all of a Hugging Face Mixtral folder but its weights. The
tokenizer is a byte-level BPE, so any text can be encoded; like Mixtral's it puts <s> in front and nothing behind.
Training is deterministic for a given version of `tokenizers`.

    python scripts/make_sample.py       # first: the text it learns from
    python scripts/make_tokenizer.py    # write the files
    python scripts/make_tokenizer.py --check
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

EMBEDDED = Path(__file__).resolve().parent.parent / "mixtral_recipes" / "embedded"
SAMPLE = EMBEDDED / "squad"
FOLDER = EMBEDDED / "mixtral_tiny"

# Most words of the sample become one token. Odd, so no multiple of 128 on purpose: padding of the vocabulary, which
# Megatron does and real checkpoints need, is then part of every run.
VOCAB_SIZE = 1999
CONTEXT = 512
UNK, BOS, EOS = "<unk>", "<s>", "</s>"  # ids 0, 1, 2 as in Mixtral

CONFIG: dict[str, object] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "max_position_embeddings": CONTEXT,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "router_aux_loss_coef": 0.02,
    "router_jitter_noise": 0.0,
    "output_router_logits": False,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
GENERATION_CONFIG: dict[str, object] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "do_sample": False}
SPECIAL_TOKENS: dict[str, object] = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": EOS}
TOKENIZER_CONFIG: dict[str, object] = {
    **SPECIAL_TOKENS,
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": CONTEXT,
    "padding_side": "right",
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def sample_text() -> Iterator[str]:
    """Yield the train text: passages with their restated questions, and the words of the fine-tuning prompt."""
    with (SAMPLE / "pretraining.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]
    for article in json.loads((SAMPLE / "train.json").read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                yield f"Context: {paragraph['context']} Question: {qa['question']} Answer: {qa['answers'][0]['text']}"


def train_tokenizer() -> Tokenizer:
    """Train the tokenizer on the sample."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[UNK, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_text(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, 1)]
    )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the sample gives {tokenizer.get_vocab_size()} tokens, not the {VOCAB_SIZE} wanted")
    return tokenizer


def make_files() -> dict[str, str]:
    """Return the text of each file by name."""
    objects = {
        "config.json": CONFIG,
        "generation_config.json": GENERATION_CONFIG,
        "special_tokens_map.json": SPECIAL_TOKENS,
        "tokenizer_config.json": TOKENIZER_CONFIG,
    }
    files = {name: json.dumps(value, indent=2) + "\n" for name, value in objects.items()}
    files["tokenizer.json"] = train_tokenizer().to_str(pretty=False) + "\n"
    return files


def main() -> int:
    """Write the files, or with --check compare them with those on disk."""
    parser = argparse.ArgumentParser(description="Train the embedded model's tokenizer and write its config.json.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files are (default: in the package)")
    parser.add_argument("--check", action="store_true", help="compare with the files there instead of writing them")
    options = parser.parse_args()
    different = []
    for name, text in make_files().items():
        path = options.folder / name
        if options.check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                different.append(name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{name}: {len(text.encode())} bytes")
    if different:
        print(f"{', '.join(different)}: not what this script writes; run it without --check", file=sys.stderr)
    elif options.check:
        print("the files are what this script makes")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

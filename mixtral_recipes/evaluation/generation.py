"""Generating text from a Hugging Face folder with transformers' own `generate`.

What is measured is what users of the exported model will get, not what the training code would have said.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.errors import CheckpointError, in_short


def generate(
    model_folder: Path, prompts: Sequence[str], batch_size: int = 32, max_new_tokens: int = 24
) -> Iterator[str]:
    """Greedy continuations of prompts, in their order, up to the end the model gives them.

    Prompts of similar length are generated together, so that little is spent on padding.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto").eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model_folder}: cannot be loaded ({in_short(error)}).") from error
    tokenizer = load_tokenizer(model_folder, error=CheckpointError)
    tokenizer.padding_side = "left"
    if torch.cuda.is_available():
        model.to("cuda")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True).to(model.device)
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            output = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[i] = text.strip()
    yield from (texts[i] for i in range(len(prompts)))

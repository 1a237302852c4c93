"""Generating text from a Hugging Face folder with transformers' own `generate`.

What is measured is what users of the exported model will get, not what the training code would have said.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.errors import CheckpointError, in_short
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint


def generate(
    model_folder: Path,
    prompts: Sequence[str],
    batch_size: int = 32,
    max_new_tokens: int = 24,
    *,
    sampling: dict[str, Any] | None = None,
    add_bos: bool = True,
) -> Iterator[str]:
    """Continuations of prompts, in their order, up to the end the model gives them.

    Prompts of similar length are generated together, so that little is spent on padding.

    Args:
        model_folder: A Hugging Face folder.
        prompts: The texts to go on from.
        batch_size: The maximum number of prompts generated together.
        max_new_tokens: The maximum number of tokens of a continuation.
        sampling: ``temperature``, ``top_k`` and ``top_p`` to draw tokens by; None always takes the likeliest.
        add_bos: Whether each prompt begins with the tokenizer's first token.

    Raises:
        CheckpointError: the folder cannot be loaded.
    """
    drawn = {"do_sample": True, **sampling} if sampling else {"do_sample": False}
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
        texts_in = [prompts[i] for i in chosen]
        inputs = tokenizer(texts_in, return_tensors="pt", padding=True, add_special_tokens=add_bos).to(model.device)
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            output = model.generate(
                **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **drawn
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[i] = text.strip()
    yield from (texts[i] for i in range(len(prompts)))


@contextlib.contextmanager
def hugging_face_form(path: Path) -> Iterator[Path]:
    """A Hugging Face folder of a model: the folder itself, or a checkpoint's export, which is gone afterwards.

    Raises:
        CheckpointError: it is neither a model folder nor a whole checkpoint.
    """
    if (path / "config.json").is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mixtral-recipes-") as folder:
        yield export_checkpoint(path, Path(folder) / "model", no_check=True)

"""Generation from a Hugging Face folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.evaluation import generation


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        list(generation.generate(tmp_path, ["x"]))


class Letters:
    """A tokenizer of letters."""

    pad_token_id = 0
    padding_side = "right"

    def __call__(self, prompts: list[str], **options: Any) -> transformers.BatchEncoding:
        longest = max(map(len, prompts))
        justify = str.rjust if self.padding_side == "left" else str.ljust
        rows = [[ord(letter) for letter in justify(prompt, longest, "\0")] for prompt in prompts]
        return transformers.BatchEncoding({"input_ids": torch.tensor(rows)})

    def batch_decode(self, rows: torch.Tensor, **options: Any) -> list[str]:
        return ["".join(chr(token) for token in row if token) for row in rows.tolist()]


class Shouting(torch.nn.Module):
    """A model that answers with its prompt's letters as capitals, and nothing to one that ends in padding."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[str]] = []

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.batches.append(Letters().batch_decode(input_ids))
        ends_in_a_letter = input_ids[:, -1:] > 0
        return torch.cat([input_ids, torch.where(ends_in_a_letter & (input_ids > 0), input_ids - 32, 0)], 1)


def test_answers_come_in_the_order_of_the_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Shouting()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(generation, "load_tokenizer", lambda *args, **options: Letters())
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **options: model)
    prompts = ["dddd", "a", "eeeee", "bb", "ccc", "fffffff", "g"]
    answers = list(generation.generate(tmp_path, prompts, batch_size=2))
    assert answers == [prompt.upper() for prompt in prompts]
    assert model.batches == [["a", "g"], ["bb", "ccc"], ["dddd", "eeeee"], ["fffffff"]], "not batched by length"

"""Fine-tuning on prompt and answer pairs, with the loss on the answer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from mixtral_recipes.data.batch import Sample
from mixtral_recipes.data.module import DataModule
from mixtral_recipes.data.packing import PackedSequenceSpecs
from mixtral_recipes.embedded import resolve
from mixtral_recipes.errors import DataError


class Pair(NamedTuple):
    """A prompt and the answer to learn, e.g. ``("... Answer:", " Paris")``: the texts are joined as they are."""

    prompt: str
    answer: str


class PairDataset(Dataset[Sample]):
    """Tokenized pairs: ``<bos> prompt answer <eos>``, loss on the answer and ``<eos>``.

    The joined text is tokenized once, so the training tokens are those that generation will see; a token counts as
    answer when it ends behind the prompt.
    """

    def __init__(self, pairs: Sequence[Pair], tokenizer: Any, seq_length: int) -> None:
        self.truncated = 0
        self._samples = [self._fit(*sample, seq_length) for sample in _tokenize(pairs, tokenizer)]

    def _fit(self, tokens: list[int], is_answer: list[bool], seq_length: int) -> Sample:
        """Cut a long prompt at its start: the question and the answer stand at the end."""
        excess = len(tokens) - (seq_length + 1)
        if excess > 0:
            self.truncated += 1
            tokens = tokens[:1] + tokens[1 + excess :]
            is_answer = is_answer[:1] + is_answer[1 + excess :]
        return Sample(tokens=np.asarray(tokens), loss_mask=np.asarray(is_answer[1:], np.float32))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def _tokenize(pairs: Sequence[Pair], tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    if not pairs:
        return []
    encoded = tokenizer(
        [pair.prompt + pair.answer for pair in pairs], return_offsets_mapping=True, add_special_tokens=False
    )
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    samples = []
    for pair, ids, offsets in zip(pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        answer = [end > len(pair.prompt) for _, end in offsets]
        samples.append(([*bos, *ids, *eos], [False] * len(bos) + answer + [True] * len(eos)))
    return samples


@dataclass
class FineTuningDataModule(DataModule):
    """JSONL records with ``input`` and ``output``, in a file or a folder with one file per split.

    Attributes:
        dataset_root: A file, or a folder with ``training.jsonl`` and optionally ``validation.jsonl``.
        tokenizer: Unused here; the model's tokenizer is given to `setup`.
        packed_sequence_specs: How samples are packed; None pads instead.
        dataset_kwargs: Accepted for NeMo's recipes.
        val_proportion: Share of a single file's records held out for validation.
    """

    dataset_root: str | Path | None = None
    tokenizer: Any = None
    packed_sequence_specs: PackedSequenceSpecs | None = None
    dataset_kwargs: dict[str, Any] | None = None
    val_proportion: float = 0.05  # NeMo's

    fixed_length = False

    def datasets(self, tokenizer: Any) -> tuple[Dataset[Sample], Dataset[Sample] | None]:
        """Read and tokenize both splits."""
        if tokenizer is None:
            raise DataError(f"{type(self).__name__} needs a tokenizer; the checkpoint has none in its context folder.")
        train, validation = self.pairs()
        return (
            PairDataset(train, tokenizer, self.seq_length),
            PairDataset(validation, tokenizer, self.seq_length) if validation else None,
        )

    def pairs(self) -> tuple[list[Pair], list[Pair]]:
        """Training and validation pairs.

        Raises:
            DataError: names the file and line of the first record that cannot be used.
        """
        root = existing(self.dataset_root)
        if root.is_dir():
            train = split_file(root, ("training", "train"), (".jsonl",))
            validation = split_file(root, ("validation", "val", "dev"), (".jsonl",), required=False)
            return read_jsonl_pairs(train), read_jsonl_pairs(validation) if validation else []
        pairs = read_jsonl_pairs(root)
        held_out = round(len(pairs) * self.val_proportion)
        return pairs[: len(pairs) - held_out], pairs[len(pairs) - held_out :]


def existing(root: str | Path | None) -> Path:
    """The path of a dataset that must be there.

    Raises:
        DataError: it is not.
    """
    if root is None:
        raise DataError("data.dataset_root is not set; give a file or a folder (--data PATH).")
    path = resolve(root)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder (data.dataset_root, --data).")
    return path


def split_file(folder: Path, names: tuple[str, ...], endings: tuple[str, ...], *, required: bool = True) -> Path | None:
    """The file of one split in a folder; None when it is optional and missing.

    Raises:
        DataError: a required split is missing.
    """
    for name in names:
        for ending in endings:
            if (folder / (name + ending)).is_file():
                return folder / (name + ending)
    if required:
        wanted = ", ".join(name + ending for name in names for ending in endings)
        raise DataError(f"{folder}: none of {wanted} is there.")
    return None


def read_jsonl_pairs(path: Path | None) -> list[Pair]:
    """Pairs from ``{"input": ..., "output": ...}`` lines; a space joins them, as NeMo's template does."""
    assert path is not None
    pairs = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                prompt, answer = record["input"], record["output"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{number}: needs an object with 'input' and 'output' ({error!r}).") from error
            if not isinstance(prompt, str) or not isinstance(answer, str) or not answer.strip():
                raise DataError(f"{path}:{number}: 'input' and 'output' must be text, and 'output' not empty.")
            pairs.append(Pair(prompt, " " + answer))
    if not pairs:
        raise DataError(f"{path}: no records.")
    return pairs

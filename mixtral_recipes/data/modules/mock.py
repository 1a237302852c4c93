"""Random tokens, for measuring speed and for trying a layout."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mixtral_recipes.data.batches.batch import Sample, Samples
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments

_VOCAB_WITHOUT_TOKENIZER = 32000  # Mixtral 8x7B's


@dataclass(frozen=True)
class MockDataset:
    """Sequences of uniformly random tokens; sample i is the same in every run."""

    num_samples: int
    seq_length: int
    vocab_size: int
    seed: int

    @property
    def lengths(self) -> np.ndarray:
        """[n], positions each sample takes."""
        return np.full(self.num_samples, self.seq_length)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        draw = np.random.default_rng([self.seed, index])
        tokens = draw.integers(0, self.vocab_size, self.seq_length + 1)
        return Sample(tokens=tokens, loss_mask=np.ones(self.seq_length, np.float32))


@takes_nemos_arguments
@dataclass
class MockDataModule(DataModule):
    """Random data under NeMo's name.

    Attributes:
        num_train_samples: Training sequences.
        num_val_samples: Validation sequences.
        vocab_size: Tokens to draw from; None takes the tokenizer's, or Mixtral's 32,000.
        tokenizer: Whose tokens are drawn, where the recipe's tokenizer is ``"data"``; a `NullTokenizer` says how many.
    """

    seq_length: int = 2048
    micro_batch_size: int = 4
    global_batch_size: int = 8
    num_workers: int = 0
    seed: int = 1234
    shuffles = False  # random as it is
    form = "random tokens"

    num_train_samples: int = 10_000_000
    num_val_samples: int = 10_000
    vocab_size: int | None = None
    tokenizer: Any = None

    def datasets(self, tokenizer: Any) -> dict[str, Samples]:
        """Make both sets; they never share a sample."""
        drawn_from = len(tokenizer) if tokenizer is not None else getattr(self.tokenizer, "vocab_size", None)
        vocab = self.vocab_size or drawn_from or _VOCAB_WITHOUT_TOKENIZER
        train = MockDataset(self.num_train_samples, self.seq_length, vocab, self.seed)
        validation = MockDataset(self.num_val_samples, self.seq_length, vocab, self.seed + 1)
        return {"train": train, "validation": validation}

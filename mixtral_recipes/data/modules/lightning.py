"""Data modules in Lightning's shape, as NeMo's users have them: ``setup``, ``train_dataloader``, ``val_dataloader``."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import fiddle as fdl
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from mixtral_recipes.data.batches.batch import Batch, DataParallelPlace, EpochOrder, Shuffled, in_turn
from mixtral_recipes.data.batches.given import as_batch, joined
from mixtral_recipes.data.modules.base import DataModule
from mixtral_recipes.errors import DataError, RecipeError
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments
from mixtral_recipes.system.ranks import launched_local_rank, shared

_BY_LIGHTNING = ("lightning.", "pytorch_lightning.")
# What a subclass of NeMo's data modules may define, and one of ours may not: its batches come by another way.
_UNCALLED = ("train_dataloader", "val_dataloader", "test_dataloader", "_create_dataset", "_create_dataloader")
# What samplers have that know their rank.
_OF_RANKS = ("num_replicas", "data_parallel_rank")
# Where a module of that shape states a size: on itself, or on the data sampler that NeMo's modules carry.
_SIZES = {
    "seq_length": ("seq_length", "seq_len"),
    "micro_batch_size": ("micro_batch_size",),
    "global_batch_size": ("global_batch_size",),
}


@runtime_checkable
class LightningData(Protocol):
    """A data module with Lightning's interface; it need not inherit from Lightning's class."""

    def train_dataloader(self) -> Any:
        """A loader of batches with NeMo's keys."""
        ...


def as_data_module(data: Any, trainer: Any = None) -> Any:
    """A recipe's data as the loop reads it, a `DataModule`; None, which is refused with all other settings, stays None.

    Args:
        data: A `DataModule`, or an object in Lightning's shape, which gets an adapter.
        trainer: What such an object finds as ``self.trainer``.

    Raises:
        RecipeError: it is neither, or states no batch.
    """
    refuse_other_data(data)
    if isinstance(data, DataModule):
        return data
    if data is None:
        return None
    if trainer is not None and getattr(data, "trainer", None) is None:
        data.trainer = trainer
    return LightningAdapter(module=data)


def refuse_other_data(data: Any) -> None:
    """Refuse what is no data module, built or still a `run.Config` of one.

    Raises:
        RecipeError: names its class.
    """
    target = fdl.get_callable(data) if isinstance(data, fdl.Buildable) else type(data)
    if isinstance(data, type):
        raise RecipeError(
            f"data={data.__name__} is a class; pass an instance, {data.__name__}(...), or a run.Config of it."
        )
    if isinstance(data, fdl.Partial | functools.partial):
        raise RecipeError("data is a partial, which makes no data module; use run.Config(CLASS, ...).")
    if data is None or not isinstance(target, type):  # a function that makes one shows when it is built
        return
    if not issubclass(target, DataModule | LightningData):
        raise RecipeError(
            f"data={target.__name__}: neither a data module (a subclass of mixtral_recipes.DataModule) nor a class "
            "with train_dataloader(); see docs/guide/own-data.md."
        )
    of_nemo = next((name for name in _UNCALLED if issubclass(target, DataModule) and hasattr(target, name)), None)
    if of_nemo:
        raise RecipeError(
            f"data={target.__name__}: has {of_nemo}(), which is never called in a subclass of "
            f"{target.__mro__[1].__name__}; define datasets(tokenizer), which returns the samples, or remove the base "
            "class; see docs/guide/own-data.md."
        )
    ways = ("datasets", "pipeline", "setup")
    if issubclass(target, DataModule) and all(getattr(target, way) is getattr(DataModule, way) for way in ways):
        raise RecipeError(
            f"data={target.__name__}: must define datasets(tokenizer), which returns the training samples."
        )


@takes_nemos_arguments
@dataclass
class MegatronDataSampler:
    """The batch sizes that a NeMo module states in ``self.data_sampler``.

    Attributes:
        seq_len: Maximum number of tokens in a row.
        micro_batch_size: Rows per forward pass.
        global_batch_size: Rows per optimizer step.
    """

    seq_len: int
    micro_batch_size: int = 4
    global_batch_size: int = 8


@dataclass
class LightningAdapter(DataModule):
    """Adapts a module with Lightning's interface; `api.finetune` and similar functions add it automatically.

    A map-style data set behind a ``DataLoader`` is read by position: every data-parallel rank reads its own share of
    each global batch, and a resumed run continues at its position. The loader's own batch size is not used; its
    ``collate_fn`` and its order (sequential or shuffled) are. Any other loader, such as a list of batches, is read
    through by every rank, which picks its own rows; a resumed run skips those that were already used.

    Attributes:
        module: The module.
        seq_length: Maximum number of tokens in a row; 0 takes the module's ``seq_length``.
        micro_batch_size: Rows per forward pass; 0 takes the module's.
        global_batch_size: Rows per optimizer step; 0 takes the module's.
    """

    module: Any = None
    seq_length: int = 0
    micro_batch_size: int = 0
    global_batch_size: int = 0

    fixed_length = False
    form = "batches of the user's own"

    def __post_init__(self) -> None:
        for name, spellings in _SIZES.items():
            if not getattr(self, name):
                setattr(self, name, self._stated(name, spellings))

    def _stated(self, name: str, spellings: tuple[str, ...]) -> int:
        for holder in (self.module, getattr(self.module, "data_sampler", None)):
            for spelling in spellings:
                value = getattr(holder, spelling, None)
                if isinstance(value, int):
                    return value
        raise RecipeError(
            f"data={self._whose}: has no {name}; add that attribute, or use LightningAdapter(module=..., "
            "seq_length=..., micro_batch_size=..., global_batch_size=...)."
        )

    @property
    def tokenizer(self) -> Any:
        """The module's own tokenizer, where it is one that a run can use; None asks for the model's."""
        own = getattr(self.module, "tokenizer", None)
        usable = isinstance(own, str) or hasattr(own, "save_pretrained") or type(own).__name__ == "AutoTokenizer"
        return own if usable and own != "model" else None

    @property
    def _whose(self) -> str:
        return type(self.module).__name__

    def setup(self, tokenizer: Any) -> None:
        """Prepare and set up the module, and look at a first batch of each of its loaders.

        Args:
            tokenizer: What the module finds as ``self.tokenizer`` where it has none of its own.

        Raises:
            DataError: a loader gives no batches, or batches that cannot be used.
        """
        module = self.module
        if tokenizer is not None and getattr(module, "tokenizer", "absent") in (None, "model"):
            module.tokenizer = tokenizer
        if _defines(module, "prepare_data"):
            shared(lambda: module.prepare_data() if launched_local_rank() == 0 else None)
        if _defines(module, "setup"):
            module.setup(*["fit"] * bool(inspect.signature(module.setup).parameters))
        self._sets: Any = {"train": self._rows("train_dataloader")}
        if _defines(module, "val_dataloader") and module.val_dataloader() is not None:
            self._sets["validation"] = self._rows("val_dataloader")
        self._packed = {}

    def _rows(self, name: str) -> "_Positions | _Stream":
        make, whose = getattr(self.module, name), f"{self._whose}.{name}()"
        loader = _single(make(), whose)
        order = _order_of(loader)
        self.num_workers = self.num_workers or getattr(loader, "num_workers", 0) or 0
        rows = _Stream(make, self.seq_length, self.seed, whose) if order is None else _Positions(loader, order, whose)
        first = rows.first(self.micro_batch_size)
        if first is None:
            raise DataError(f"{whose}: yields no batches.")
        as_batch(first, whose, self.seq_length)
        return rows

    def train_order(self, rows: Any) -> EpochOrder:
        """The loader's: in turn, or shuffled anew each epoch."""
        return Shuffled(len(rows), self.seed) if rows.shuffled else in_turn(len(rows))

    def make_collate(self, rows: Any, *, length: int | None, multiple: int, sequence_multiple: int) -> Any:
        """The loader's ``collate_fn``, its result checked and padded."""
        return _Collate(rows.collate, rows.whose, self.seq_length, length, multiple, sequence_multiple)

    def train_batches(self, place: DataParallelPlace, *, consumed_samples: int = 0, **shape: Any) -> Iterator[Batch]:
        """As `DataModule.train_batches`."""
        rows = self._sets["train"]
        if isinstance(rows, _Stream):
            return self._streamed(rows.rows(consumed_samples), place, rows.whose, **shape)
        return super().train_batches(place, consumed_samples=consumed_samples, **shape)

    def validation_batches(
        self, place: DataParallelPlace, *, limit_batches: int | None, split: str = "validation", **shape: Any
    ) -> Iterator[Batch] | None:
        """As `DataModule.validation_batches`."""
        rows = self._sets.get(split)
        if not isinstance(rows, _Stream):
            return super().validation_batches(place, limit_batches=limit_batches, split=split, **shape)
        count = self.num_validation_batches(limit_batches, split=split) * self.global_batch_size
        return self._streamed(itertools.islice(rows.rows(0), count), place, rows.whose, **shape)

    def _streamed(
        self,
        rows: Iterator[Batch],
        place: DataParallelPlace,
        whose: str,
        *,
        multiple: int = 8,
        sequence_multiple: int = 1,
        fixed: bool = False,
    ) -> Iterator[Batch]:
        """This rank's rows of a stream that all ranks read."""
        length = self.row_length if fixed else None
        for mine in place.microbatches(rows, self.micro_batch_size):
            yield joined(mine, length=length, multiple=multiple, sequence_multiple=sequence_multiple, whose=whose)


class _Positions(Dataset[Any]):
    """A map-style data set, with the loader's way of making batches of it."""

    def __init__(self, loader: DataLoader[Any], order: str, whose: str) -> None:
        self.dataset: Any = loader.dataset
        self.collate = loader.collate_fn
        self.shuffled = order == "shuffled"
        self.whose = whose

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def first(self, rows: int) -> Any:
        """A batch; None where there are no samples."""
        return self.collate([self.dataset[n] for n in range(min(rows, len(self)))]) if len(self) else None


class _Stream:
    """The rows of the batches a loader gives, epoch after epoch."""

    def __init__(self, make: Callable[[], Any], seq_length: int, seed: int, whose: str) -> None:
        self.make, self.seq_length, self.seed, self.whose = make, seq_length, seed, whose
        self._count: int | None = None

    def __len__(self) -> int:
        """Rows of an epoch; the loader is read through once to count them."""
        if self._count is None:
            self._count = sum(1 for _ in self._epoch(0))
        return self._count

    def first(self, rows: int) -> Any:
        """A batch; None where there is none."""
        return next(self._given(0), None)

    def rows(self, start: int) -> Iterator[Batch]:
        """Rows without end, from position ``start`` on."""
        return itertools.islice(
            itertools.chain.from_iterable(self._epoch(epoch) for epoch in itertools.count()), start, None
        )

    def _epoch(self, epoch: int) -> Iterator[Batch]:
        empty = True
        for given in self._given(epoch):
            empty = False
            batch = as_batch(given, self.whose, self.seq_length)
            yield from (_row(batch, number) for number in range(len(batch["tokens"])))
        if empty:
            raise DataError(f"{self.whose}: yields no batches.")

    def _given(self, epoch: int) -> Iterator[Any]:
        """The batches of an epoch. A loader that shuffles draws its seed first: the same on every rank."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + epoch)
            batches = iter(_single(self.make(), self.whose))
            first = list(itertools.islice(batches, 1))
        yield from itertools.chain(first, batches)


def _row(batch: Batch, number: int) -> Batch:
    """One row of a batch; ``cu_seqlens`` belong to the only one."""
    tensors: Any = batch
    row: Any = {name: t if name == "cu_seqlens" else t[number : number + 1] for name, t in tensors.items()}
    return row


@dataclass(frozen=True)
class _Collate:
    """Makes a microbatch of samples in the loader's way."""

    collate: Callable[[list[Any]], Any]
    whose: str
    seq_length: int
    length: int | None
    multiple: int
    sequence_multiple: int

    def __call__(self, samples: list[Any]) -> Batch:
        """Collate."""
        batch = as_batch(self.collate(samples), self.whose, self.seq_length)
        if len(batch["tokens"]) != len(samples):
            raise DataError(
                f"{self.whose}: its collate_fn turns {len(samples)} samples into {len(batch['tokens'])} rows; it must "
                "make one row of each."
            )
        return joined(
            [batch],
            length=self.length,
            multiple=self.multiple,
            sequence_multiple=self.sequence_multiple,
            whose=self.whose,
        )


def _defines(module: Any, name: str) -> bool:
    """Whether a module has a method of its own, not only Lightning's empty one."""
    method = getattr(module, name, None)
    return callable(method) and not getattr(method, "__module__", "").startswith(_BY_LIGHTNING)


def _single(loader: Any, whose: str) -> Any:
    """The loader where a module returns a list with one; a list of batches is a loader itself."""
    several: Any = loader if isinstance(loader, list | tuple) else []
    if len(several) and isinstance(several[0], DataLoader):
        if len(several) > 1:
            raise DataError(f"{whose}: returns {len(several)} loaders; it must return one.")
        return several[0]
    if not hasattr(loader, "__iter__"):
        raise DataError(f"{whose}: returns a {type(loader).__name__}, which yields no batches.")
    return loader


def _order_of(loader: Any) -> str | None:
    """``in turn`` or ``shuffled`` where a loader reads a map-style data set by position; None where it does not.

    Raises:
        DataError: it deals out samples to ranks by itself.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    batch_sampler = loader.batch_sampler
    sampler = batch_sampler.sampler if type(batch_sampler) is BatchSampler else None
    if isinstance(sampler, DistributedSampler):
        return "shuffled" if sampler.shuffle else "in turn"
    if type(sampler) is RandomSampler and not sampler.replacement:
        return "shuffled"
    if type(sampler) is SequentialSampler:
        return "in turn"
    by_rank = next((s for s in (batch_sampler, sampler) if any(hasattr(s, name) for name in _OF_RANKS)), None)
    if by_rank is not None:
        raise DataError(
            f"{type(by_rank).__name__} distributes samples over ranks, which the training loop does itself; leave it "
            "out of the DataLoader."
        )
    return None

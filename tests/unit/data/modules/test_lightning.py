"""Data modules in Lightning's shape: what their loaders may give, and what is refused by name."""

import itertools
from collections.abc import Iterator
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

import mixtral_recipes as llm
from mixtral_recipes.data.batches.batch import DataParallelPlace
from mixtral_recipes.data.batches.given import as_batch
from mixtral_recipes.data.modules.lightning import as_data_module, refuse_other_data
from mixtral_recipes.errors import DataError, RecipeError
from mixtral_recipes.executors.preflight import preflight

LENGTH = 16


def row(number: int, length: int = LENGTH) -> dict[str, Any]:
    tokens = torch.arange(length + 1) + number
    return {
        "tokens": tokens[:-1],
        "labels": tokens[1:],
        "loss_mask": torch.ones(length),
        "position_ids": torch.arange(length),
    }


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return row(index)


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(map(row, range(20)))


class Module:
    """A module in Lightning's shape, its training loader made by a function."""

    def __init__(self, make: Any, **sizes: Any) -> None:
        self.make = make
        self.__dict__ |= {"seq_length": LENGTH, "micro_batch_size": 2, "global_batch_size": 4} | sizes

    def train_dataloader(self) -> Any:
        return self.make()


def set_up(make: Any, **sizes: Any) -> Any:
    made = as_data_module(Module(make, **sizes))
    made.setup(None)
    return made


def first_tokens(data: Any, count: int, place: DataParallelPlace | None = None, **where: Any) -> list[list[int]]:
    batches = data.train_batches(place or DataParallelPlace(), **where)
    return [next(batches)["tokens"][:, 0].tolist() for _ in range(count)]


def flat(rows: list[list[int]]) -> list[int]:
    return list(itertools.chain(*rows))


LOADERS: dict[str, Any] = {
    "positions": lambda: DataLoader(Rows(), batch_size=5),
    "batches of its own": lambda: DataLoader(Rows(), batch_sampler=list(BatchSampler(range(20), 3, False))),
    "an iterable data set": lambda: DataLoader(Streamed(), batch_size=3),
    "a list": lambda: list(DataLoader(Rows(), batch_size=7)),
    "a generator": lambda: (batch for batch in DataLoader(Rows(), batch_size=7)),
    "a list with one loader": lambda: [DataLoader(Rows())],
}


@pytest.mark.parametrize("name", LOADERS)
def test_rows_come_in_order_are_shared_out_and_found_again(name: str) -> None:
    data = set_up(LOADERS[name])
    assert first_tokens(data, 11) == [[n % 20, (n + 1) % 20] for n in range(0, 22, 2)]
    assert first_tokens(data, 2, DataParallelPlace(1, 2)) == [[2, 3], [6, 7]]
    assert first_tokens(data, 2, consumed_samples=28) == [[8, 9], [10, 11]]


def test_a_shuffled_loader_gives_each_epoch_its_order() -> None:
    data = set_up(lambda: DataLoader(Rows(), shuffle=True))
    epochs = [flat(first_tokens(data, 10, consumed_samples=start)) for start in (0, 20)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    torch.rand(1)  # what else draws numbers changes nothing
    assert flat(first_tokens(data, 10)) == epochs[0]
    stream = set_up(lambda: iter(DataLoader(Rows(), shuffle=True)))
    assert first_tokens(stream, 5) == first_tokens(stream, 5)
    assert sorted(flat(first_tokens(stream, 10))) == list(range(20))


def test_rows_are_padded_to_what_the_layout_splits() -> None:
    data = set_up(lambda: [row_batch(n, 5 + n) for n in range(4)], seq_length=24)
    batch = next(data.train_batches(DataParallelPlace(), multiple=8))
    assert batch["tokens"].shape == (2, 8)
    assert batch["padding_mask"].tolist() == [[False] * 5 + [True] * 3, [False] * 6 + [True] * 2]
    assert batch["loss_mask"].sum() == 11
    fixed = next(data.train_batches(DataParallelPlace(), fixed=True))
    assert fixed["tokens"].shape == (2, 24)
    assert "padding_mask" not in next(set_up(LOADERS["positions"]).train_batches(DataParallelPlace()))


def row_batch(number: int, length: int, **more: Any) -> dict[str, Any]:
    return {key: value[None] for key, value in row(number, length).items()} | more


def test_packed_rows_keep_their_borders() -> None:
    borders = torch.tensor([[0, 6, 12, -1, -1]])
    data = set_up(lambda: [row_batch(0, 12, cu_seqlens=borders)], micro_batch_size=1, seq_length=24)
    batch = next(data.train_batches(DataParallelPlace()))
    assert batch["cu_seqlens"].tolist() == [0, 6, 12, 16]  # the padding is a sequence of its own
    assert batch["position_ids"][0, 12:].tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"each packed sequence must be a multiple of 4 tokens"):
        next(data.train_batches(DataParallelPlace(), sequence_multiple=4))
    with pytest.raises(DataError, match="rows with cu_seqlens need micro_batch_size=1, not 2"):
        next(set_up(lambda: [row_batch(0, 12, cu_seqlens=borders)], seq_length=24).train_batches(DataParallelPlace()))


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
GIVEN: dict[str, tuple[Any, str]] = {
    "a tuple": ((1, 2), "a batch is a tuple; it must be a dict with tokens, labels"),
    "Hugging Face's keys": (
        {"input_ids": torch.ones(1, 4), "labels": torch.ones(1, 4)},
        "has no tokens, loss_mask, position_ids; it has input_ids, labels, but needs tokens, labels (the next token",
    ),
    "one row": (row(0), "tokens [16], labels [16]"),
    "another shape": (row_batch(0, 16) | {"labels": torch.ones(1, 15)}, "labels [1, 15]"),
    "too long": (row_batch(0, LENGTH + 1), "rows of 17 tokens are longer than seq_length=16"),
    "fractions": (row_batch(0, 4) | {"tokens": torch.rand(1, 4)}, "tokens must be whole numbers"),
    "no label": (row_batch(0, 4) | {"labels": torch.full((1, 4), -100)}, "labels are negative although loss_mask"),
    "borders": (row_batch(0, 4, cu_seqlens=[0, 3]), "cu_seqlens must rise from 0 to the row's 4 tokens"),
    "a mask": (row_batch(0, LENGTH, attention_mask=torch.ones(1, 1, 16, 16)), "attention_mask is not causal"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_batch_that_cannot_be_used_is_refused_before_the_first_step(name: str) -> None:
    given, says = GIVEN[name]
    with pytest.raises(DataError) as caught:
        set_up(lambda: [given])
    assert str(caught.value).startswith("Module.train_dataloader(): ")
    assert says in str(caught.value)


@pytest.mark.parametrize("mask", [CAUSAL, ~CAUSAL, CAUSAL[None, None]], ids=["seen", "NeMo's, hidden", "4-d"])
def test_a_causal_mask_says_nothing_new(mask: Any) -> None:
    given = row_batch(0, LENGTH, attention_mask=mask)
    assert set(as_batch(given, "", LENGTH)) == {"tokens", "labels", "loss_mask", "position_ids"}


class OfRanks(SequentialSampler):
    data_parallel_rank = 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (list, "yields no batches"),
        (lambda: None, "returns a NoneType, which yields no batches"),
        (lambda: [DataLoader(Rows())] * 2, "returns 2 loaders; it must return one"),
        (lambda: DataLoader(Rows(), sampler=OfRanks(Rows())), "OfRanks distributes samples over ranks"),
    ],
    ids=["empty", "none", "two", "by rank"],
)
def test_loaders_that_cannot_be_used(make: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        set_up(make)


class WithoutBatch:
    def train_dataloader(self) -> Any:
        return []


class Undefined(llm.DataModule):
    """A data module that forgets its data sets."""


OTHERS: dict[str, tuple[Any, str]] = {
    "a text": (
        "squad",
        "data=str: neither a data module (a subclass of mixtral_recipes.DataModule) nor a class with",
    ),
    "a loader": (DataLoader(Rows()), "data=DataLoader: neither"),
    "a class": (Module, "data=Module is a class; pass an instance, Module(...), or a run.Config of it."),
    "no batch": (WithoutBatch(), "data=WithoutBatch: has no seq_length; add that attribute, or use Lightning"),
    "no data sets": (Undefined(), "data=Undefined: must define datasets(tokenizer)"),
}


@pytest.mark.parametrize(
    "kind", [llm.SquadDataModule, llm.ChatDataModule, llm.FineTuningDataModule, llm.MockDataModule]
)
def test_our_own_modules_are_none_of_these(kind: Any) -> None:
    refuse_other_data(run.Config(kind))


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_refused_by_name_before_the_start(name: str) -> None:
    data, says = OTHERS[name]
    with pytest.raises(RecipeError) as caught:
        llm.pretrain(llm.MixtralModel(llm.MixtralConfigTiny()), data, llm.Trainer(accelerator="cpu"))
    assert str(caught.value).startswith(says)
    if isinstance(data, type | str):
        return
    recipe = llm.mixtral_tiny.pretrain_recipe(num_gpus_per_node=1)
    recipe.data = run.Config(type(data), *([Rows()] if isinstance(data, DataLoader) else []))
    with pytest.raises(RecipeError) as caught:
        preflight(recipe)
    assert str(caught.value).startswith(says)


def test_preflight_sees_the_batch_a_module_states() -> None:
    recipe = llm.mixtral_tiny.pretrain_recipe(num_gpus_per_node=1)
    recipe.data = run.Config(Module, make=LOADERS["a list"], global_batch_size=3)
    with pytest.raises(RecipeError, match=r"global_batch_size=3 is not .* To repair: data.global_batch_size=4"):
        preflight(recipe)
    adapter = run.Config(llm.LightningAdapter, module=run.Config(WithoutBatch), seq_length=8, micro_batch_size=1)
    adapter.global_batch_size = 2
    recipe.data = adapter
    preflight(recipe)
    assert fdl.build(adapter).row_length == 8


def test_what_a_module_finds_on_itself() -> None:
    module = Module(LOADERS["a list"])
    module.tokenizer, module.trainer = "model", None
    made = as_data_module(module, trainer="the trainer")
    made.setup("the tokenizer")
    assert (module.trainer, module.tokenizer) == ("the trainer", "the tokenizer")
    sampler = type("Sampler", (), {"seq_len": 8, "micro_batch_size": 1, "global_batch_size": 2})
    bare = WithoutBatch()
    bare.data_sampler = sampler()  # pyright: ignore[reportAttributeAccessIssue]
    assert as_data_module(bare).seq_length == 8

"""Names that may be misspelt paths are told from names on the Hub, without asking it."""

import warnings
from pathlib import Path

import pytest
from huggingface_hub import constants

from mixtral_recipes.errors import CheckpointError, DataError, MixtralRecipesWarning
from mixtral_recipes.importers.locations import HubId, parse_source
from mixtral_recipes.importers.peek import still_to_come
from mixtral_recipes.system.hub_ids import refuse_misspelt_path, warn_of_a_word

KNOWN = ("mistral://mixtral-8x7b", "embedded://mixtral_tiny")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for fetched in ("cache/models--gpt2", "cache/datasets--lab--talks", "lab/models"):
        (tmp_path / fetched).mkdir(parents=True)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("mixtral-8x7", "mistral://mixtral-8x7b"),
        ("mixtral_tny", "embedded://mixtral_tiny"),
        ("labb", "lab"),
        ("qq", ""),
    ],
)
def test_a_word_is_more_often_a_misspelt_name(word: str, meant: str) -> None:
    with pytest.warns(MixtralRecipesWarning, match="taken as a name on the Hub") as said:
        warn_of_a_word(word, "model", KNOWN)
    assert (f"Did you mean {meant!r}?" in str(said[0].message)) == bool(meant)


@pytest.mark.parametrize("name", ["org/name", "hf://word", "lab", "gpt2", "gpt2@main"])
def test_nothing_is_said_of_a_name_that_is_clear(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_a_word(name, "model", KNOWN)


def test_a_name_in_a_folder_that_is_here_is_a_path() -> None:
    said = r"lab/modles does not exist in the folder lab\. Did you mean 'lab/models'\? If you mean the Hub, use hf://lab/modles"
    with pytest.raises(DataError, match=said):
        refuse_misspelt_path("lab/modles", "dataset", DataError)
    for name in ("lab/talks", "org/modles", "hf://lab/modles", "word"):
        refuse_misspelt_path(name, "dataset", DataError)
    with pytest.raises(CheckpointError, match="does not exist in the folder lab"):
        parse_source("lab/talks")  # a data set was fetched, not a model
    assert parse_source("hf://lab/talks") == HubId("lab/talks")


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("nemo://lab/missing", "is not imported yet; before the run starts: mixtral-recipes import hf://lab/missing"),
        ("hf://org/missing", "is not on this machine yet; it will be downloaded and imported when the run starts"),
        ("embedded://mixtral_tiny", None),
        ("lab", None),
    ],
)
def test_what_must_happen_before_a_run_can_start(
    start: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    line = still_to_come(start)
    assert (line is None) if said is None else said in str(line)

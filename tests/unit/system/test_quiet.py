"""What is hidden from users, and what never is."""

import logging
import warnings
from collections.abc import Iterator

import pytest

from mixtral_recipes.system import quiet

OURS = ("mixtral_recipes.training.loop", "mixtral_recipes", "users_script")
THEIRS = ("torch", "torch.nn.modules", "megatron.core.optimizer", "transformers.utils", "nemo_run.run")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    names = (*quiet._CHATTY_LOGGERS, "mixtral_recipes")
    levels = {name: logging.getLogger(name).level for name in names}
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    monkeypatch.delenv("MIXTRAL_RECIPES_DEBUG", raising=False)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def seen(*modules: str) -> list[str]:
    """The modules whose warning reaches the user once libraries are quiet."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet.libraries()
        for module in modules:
            for category in (UserWarning, FutureWarning):
                warnings.warn_explicit(module, category, f"{module}.py", 1, module=module)
    return [str(warning.message) for warning in caught]


def test_our_warnings_are_seen_and_the_libraries_are_not() -> None:
    assert seen(*OURS, *THEIRS) == [module for module in OURS for _ in range(2)]


def test_a_name_that_only_starts_like_a_librarys_is_not_hidden() -> None:
    assert seen("torchlight", "megatron_users") == ["torchlight"] * 2 + ["megatron_users"] * 2


def test_our_log_messages_are_seen_and_chatter_is_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)  # as in a new process; other tests import what raises it
    quiet.libraries()
    assert logging.getLogger("mixtral_recipes.training").isEnabledFor(logging.WARNING)
    assert not logging.getLogger("megatron.core.dist_checkpointing.serialization").isEnabledFor(logging.WARNING)
    assert logging.getLogger("megatron.core.dist_checkpointing").isEnabledFor(logging.ERROR)


def test_debug_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_DEBUG", "1")
    assert seen("torch") == ["torch"] * 2

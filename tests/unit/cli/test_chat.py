"""What ``chat`` does with an answer that its user interrupts, and with a line that is no text."""

import io
from typing import Any

import pytest

from mixtral_recipes.cli import chat
from mixtral_recipes.cli.options.model import SamplingOptions
from mixtral_recipes.errors import DataError, MixtralRecipesWarning
from mixtral_recipes.inference import generate
from mixtral_recipes.inference.sampling import Sampling
from mixtral_recipes.system import ranks


class Talk:
    kept = 0

    def asked(self, question: str) -> list[int]:
        return [1]

    def answered(self, question: str, answer: str) -> None:
        self.kept += 1


def _interrupted(*given: Any, **named: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_ends_an_answer_not_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "generate", _interrupted)
    talk: Any = Talk()
    model: Any = None
    chat._turn(model, talk, "Why?", Sampling(), "", speaks=True)  # pyright: ignore[reportPrivateUsage]
    assert "stopped" in capsys.readouterr().out
    assert talk.kept == 0
    monkeypatch.setattr(ranks, "rank_and_size", lambda: (0, 2))
    with pytest.raises(KeyboardInterrupt):
        chat._turn(model, talk, "Why?", Sampling(), "", speaks=True)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8", errors))
    with pytest.raises(DataError, match="not UTF-8"):
        chat._ask()  # pyright: ignore[reportPrivateUsage]


def test_options_of_draws_are_warned_of_where_nothing_is_drawn() -> None:
    with pytest.warns(MixtralRecipesWarning, match="--top-k 5, --seed 3: no effect without --temperature"):
        assert SamplingOptions(top_k=5, seed=3).sampling() == Sampling(top_k=5, seed=3)
    SamplingOptions(temperature=0.5, top_k=5, seed=3).sampling()  # a warning would be an error

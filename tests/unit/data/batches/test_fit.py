"""What is cut of a sample that is too long: never the start of what is learned."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_recipes.data.batches.fit import Encoded, Fit, Tally
from mixtral_recipes.errors import DataError


def sample(*runs: tuple[int, bool], head: int = 1) -> Encoded:
    """Runs of (tokens, learned), numbered through."""
    learned = [is_learned for count, is_learned in runs for _ in range(count)]
    turns = tuple(n for n, is_learned in enumerate(learned) if is_learned and (n == 0 or not learned[n - 1]))
    return Encoded(list(range(len(learned))), learned, head, turns)


def test_a_long_prompt_loses_its_start() -> None:
    fitted = Fit(16)(sample((101, False), (3, True)))
    assert fitted.sample is not None
    assert fitted.sample.tokens == [0, *range(104 - 16, 104)]
    assert (fitted.cut, fitted.removed) == ("prompt", (1, 87))


def test_a_long_answer_loses_its_end_and_no_prompt_is_cut_below_the_floor() -> None:
    fitted = Fit(16)(sample((3, False), (100, True)))
    assert fitted.sample is not None
    assert fitted.sample.tokens == list(range(17))
    fitted = Fit(16, prompt_floor=5)(sample((51, False), (100, True)))
    assert fitted.sample is not None
    assert fitted.sample.tokens == [0, *range(46, 62)]
    assert fitted.cut == "answer"


def test_a_conversation_loses_its_end_first() -> None:
    fitted = Fit(16)(sample((5, False), (4, True), (5, False), (9, True)))
    assert fitted.sample is not None
    assert fitted.sample.tokens == list(range(17))
    assert fitted.turns == 2
    fitted = Fit(12)(sample((5, False), (4, True), (5, False), (9, True)))
    assert fitted.turns == 1


def test_other_settings() -> None:
    long = sample((101, False), (3, True))
    assert Fit(16, "end")(long).why == "nothing to learn within seq_length"
    assert Fit(16, "drop")(long).why == "too long"
    with pytest.raises(DataError, match=r"^x:3: has 104 tokens, 87 more than seq_length=16 allows"):
        Fit(16, "stop")(long, "x:3")
    with pytest.raises(DataError, match="truncation='left' is not supported; use prompt, end, drop, stop"):
        Fit(16, "left")
    with pytest.raises(DataError, match="prompt_floor=17 must be between 0 and seq_length=16"):
        Fit(16, prompt_floor=17)


runs = st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=6)


@given(runs=runs, length=st.integers(8, 60), head=st.integers(1, 4), how=st.sampled_from(["prompt", "end"]))
def test_what_is_learned_is_never_a_tail(runs: list[tuple[int, bool]], length: int, head: int, how: str) -> None:
    whole = sample((head, False), *runs, head=head)
    fitted = Fit(length, how)(whole)
    if fitted.sample is None:
        return
    tokens, learned = fitted.sample.tokens, fitted.sample.learned
    assert len(tokens) == min(len(whole.tokens), length + 1)
    assert [whole.learned[token] for token in tokens] == learned
    for n in range(1, len(tokens)):  # where a learned token is, the one before it is, or it begins a turn
        if learned[n]:
            assert tokens[n - 1] == tokens[n] - 1 or tokens[n] in whole.turns
    kept = {token for token, is_learned in zip(tokens, learned, strict=True) if is_learned}
    wanted = [n for n, is_learned in enumerate(whole.learned) if is_learned]
    assert kept == set(wanted[: len(kept)])  # the first that were to be learned, none left out
    assert fitted.turns == sum(turn in kept for turn in whole.turns)


def test_a_tally_counts_what_is_left() -> None:
    tally, fit = Tally(), Fit(16)
    for encoded in (sample((3, False), (4, True)), sample((3, False), (100, True)), sample((5, False))):
        tally.add(encoded, fit(encoded))
    assert (tally.records, tally.samples, tally.tokens, tally.learned) == (3, 2, 24, 18)
    assert (tally.cut_answers, tally.cut_tokens) == (1, 86)
    assert tally.dropped == {"nothing in it is learned": 1}
    assert Tally.of(tally.as_dict()) == tally

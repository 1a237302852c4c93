"""SQuAD 2.0's scores, on a file of predictions whose values are worked out by hand."""

import pytest

from mixtral_recipes.evaluation.squad_scores import exact_match, f1, normalized, squad_scores

# (predicted, accepted answers, exact match, F1)
BY_HAND = [
    ("The Ashby Farm!", ["Ashby Farm", "a farm"], 1.0, 1.0),  # articles, case and punctuation do not count
    ("Ashby", ["Ashby Farm"], 0.0, 2 / 3),  # precision 1, recall 1/2
    ("the big red farm", ["red farm house", "barn"], 0.0, 2 / 3),  # 2 words of 3 and of 3
    ("", ["Ashby Farm"], 0.0, 0.0),  # there is an answer, and none was given
    ("", [], 1.0, 1.0),  # there is none, and none was given
    ("Ashby", [], 0.0, 0.0),  # there is none, and one was given
    ("a", ["the"], 1.0, 1.0),  # an answer of articles only counts as none
]


@pytest.mark.parametrize(("said", "right", "exact", "overlap"), BY_HAND)
def test_single_answers(said: str, right: list[str], exact: float, overlap: float) -> None:
    assert exact_match(said, right) == exact
    assert f1(said, right) == pytest.approx(overlap)


def test_a_file_of_predictions() -> None:
    scores = squad_scores([row[0] for row in BY_HAND], [row[1] for row in BY_HAND])
    assert scores == {
        "exact_match": 42.86,  # 3 of 7
        "f1": 61.9,  # (1 + 2/3 + 2/3 + 0 + 1 + 0 + 1) / 7
        "has_answer_exact": 40.0,  # 2 of 5
        "has_answer_f1": 66.67,  # (1 + 2/3 + 2/3 + 0 + 1) / 5
        "has_answer_count": 5,
        "no_answer_exact": 50.0,
        "no_answer_f1": 50.0,
        "no_answer_count": 2,
    }


def test_version_1_has_two_scores() -> None:
    assert squad_scores(["x", "y"], [["x"], ["z"]]) == {"exact_match": 50.0, "f1": 50.0}


def test_normalisation() -> None:
    assert normalized("  The  U.S.A., an  Ant ") == "usa ant"

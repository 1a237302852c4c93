"""Errors are told in one line."""

import pytest

from mixtral_recipes.errors import in_short


@pytest.mark.parametrize(
    ("error", "text"),
    [(ValueError("\nfirst\nsecond"), "first"), (ValueError(), "ValueError"), (OSError("x" * 300), "x" * 200)],
)
def test_a_library_error_becomes_one_line(error: Exception, text: str) -> None:
    assert in_short(error) == text

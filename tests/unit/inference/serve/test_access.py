"""Other machines need a token."""

from pathlib import Path

import pytest

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.inference.serve.access import read_token


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_needs_none(host: str) -> None:
    assert read_token(None, None, host) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.example.org"])
def test_others_do(host: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs a token: pass --token-file"):
        read_token(None, None, host)
    file = tmp_path / "token"
    file.write_text("secret\n")
    assert read_token(file, "of the environment", host) == "secret"
    assert read_token(None, "secret", host) == "secret"


@pytest.mark.parametrize("text", ["", "\n", "two words", "schlüssel"])
def test_what_is_no_token(text: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(RecipeError, match="single word of ASCII"):
        read_token(tmp_path / "token", None, "127.0.0.1")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_token(tmp_path / "none", None, "127.0.0.1")

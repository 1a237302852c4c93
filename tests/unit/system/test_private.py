"""What may be written down (names of variables: tests/unit/executors/test_names.py)."""

import pytest

from mixtral_recipes.system.private import password_in, sounds_secret, without_passwords


@pytest.mark.parametrize("name", ["GITHUB_PAT", "openai-key", "dbPassword", "aws_session", "SENTRY_DSN", "x.token"])
def test_names_that_sound_secret(name: str) -> None:
    assert sounds_secret(name)


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "keyboard", "NCCL_IB_PKEY", "patience", "monkey", "compass", ""]
)
def test_names_that_only_contain_such_a_word(name: str) -> None:
    assert not sounds_secret(name)


@pytest.mark.parametrize(
    "text",
    ["git@host:repo", "ssh://git@host/x", "https://host:443/a@b", "hf://org/name@0123456789abcdef01234567", "a@b.c"],
)
def test_addresses_without_a_password(text: str) -> None:
    assert password_in(text) is None
    assert without_passwords(text) == text


def test_passwords_are_taken_out_of_a_text() -> None:
    text = "first http://me:pw@proxy:1, then https://abcdefghijklmnopqrstuvwxyz@host/x"
    assert without_passwords(text) == "first http://...@proxy:1, then https://...@host/x"
    assert password_in(text) == "http://...@"

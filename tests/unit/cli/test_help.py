"""--help of every command: grouped in panels, whole at 80 columns, and one text for each option that commands share."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from rich.text import Text

from mixtral_recipes.cli import main

PANELS = {
    "pretrain": ["Arguments", "Options", "Recipe", "Where it runs", "Slurm", "Output"],
    "finetune": ["Arguments", "Options", "Recipe", "Where it runs", "Slurm", "After training", "Output"],
    "run": ["Arguments", "Options", "Where it runs", "Slurm", "After training", "Output"],
}
# These give no result: what they print is the answer.
WITHOUT_JSON = {"runs logs", "chat"}
# The same option may say different things only where it is a different thing.
OWN_TEXTS = {
    "--all", "--compare", "--data", "--executor", "--output", "--peft", "--png", "--rank", "--slurm", "--yaml",
}  # fmt: skip


def commands() -> Iterator[tuple[str, Any]]:
    """Every command and subcommand by its full name."""
    for name in main.COMMANDS:
        command = main._load(name)
        for inner, subcommand in getattr(command, "commands", {"": command}).items():
            yield f"{name} {inner}".strip(), subcommand


NAMES = [name for name, _ in commands()]


@pytest.fixture(autouse=True)
def _a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)  # read from the environment when it was imported


def shown(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main.run([*name.split(), "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [*NAMES, *("recipes", "data", "runs", "clusters")])
def test_help_is_whole_at_80_columns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(name, capsys)
    assert max(map(len, text.splitlines())) == 80
    assert "…" not in text
    panels = re.findall(r"^╭─ (.+?) ─+╮$", text, re.MULTILINE)
    assert "Options" in panels
    assert panels == PANELS.get(name, panels)


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_squeezed_into_a_narrow_column(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(name, capsys)
    for option in dict(commands())[name].params:
        if not option.hidden:
            assert " ".join(option.help.split()[:3]) in text, option.opts


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_named_in_full_and_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(name, capsys)
    command = dict(commands())[name]
    for option in command.params:
        assert option.help or option.hidden, option.name
        if option.param_type_name == "option" and not option.hidden:
            assert all(
                f"{spelled} " in text or f"{spelled}," in text for spelled in option.opts + option.secondary_opts
            )


def test_no_word_is_taken_for_markup() -> None:
    for name, command in commands():
        for text in (command.help or "", *(option.help or "" for option in command.params)):
            assert Text.from_markup(text).plain == text, name


def test_a_command_says_of_itself_what_the_table_says() -> None:
    for name, (_, about) in main.COMMANDS.items():
        assert main._load(name).help.split("\n\n")[0].strip() == about
        assert len(f"  {name:<9}  {about}") <= 80


def test_a_subcommand_is_one_sentence() -> None:
    for name, command in commands():
        first = command.help.split("\n\n")[0]
        assert first.endswith("."), name
        assert "\n" not in first.strip(), name


def test_an_option_says_the_same_wherever_it_is() -> None:
    texts: dict[str, set[str]] = {}
    for _, command in commands():
        for option in command.params:
            if option.param_type_name == "option":
                texts.setdefault(option.opts[0], set()).add(option.help)
    assert texts["--json"] == {"End with one JSON object on stdout."}
    assert {name for name, found in texts.items() if len(found) > 1} == OWN_TEXTS


def test_every_command_with_a_result_takes_json_and_debug() -> None:
    for name, command in commands():
        options = {spelled for option in command.params for spelled in option.opts}
        assert ("--json" in options) == (name not in WITHOUT_JSON), name
        assert "--debug" in options, name

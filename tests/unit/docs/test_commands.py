"""Every command line, option and setting in the documents is one that the program takes."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
import typer

import mixtral_recipes as llm
from mixtral_recipes.cli import main
from mixtral_recipes.errors import RecipeError
from mixtral_recipes.overrides import paths
from tests.unit.docs.documents import DOCUMENTS, EXAMPLES, ROOT, Place, arguments, command_lines, inline_code

LINES = [place for file in (*DOCUMENTS, *EXAMPLES) for place in command_lines(file)]
# Jobs that need no file, cluster or checkpoint of the reader's: these are prepared and checked too.
JOBS = [
    place
    for place in LINES
    if arguments(place.text)[0] in ("finetune", "pretrain", "run")
    and not any(word in place.text for word in ("slurm", "my", "FILE", "FOLDER", "hf://", "..."))
]


def parse(words: list[str]) -> Any:
    """Parse a command line as the program does, and run nothing; the context of the command it names."""
    group = main._group()
    context = group.make_context(main.PROGRAM, list(words), resilient_parsing=False)
    while hasattr(context.command, "resolve_command"):
        name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None, f"no command {name!r}"
        context = command.make_context(name, rest, parent=context)
    return context


def options() -> set[str]:
    """Every option of every command."""
    found = {"--help", "--version", "--debug", "--install-completion"}
    commands = [(name, main._load(name)) for name in main.COMMANDS]
    while commands:
        _, command = commands.pop()
        commands += getattr(command, "commands", {}).items()
        found |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return found


@pytest.mark.parametrize("place", LINES, ids=str)
def test_it_parses(place: Place) -> None:
    words = arguments(place.text)
    if words == ["--install-completion"]:  # it would change this machine
        return
    changes = parse(words).params.get("overrides") or []
    assert not [word for word in changes if "=" not in word and word != "..."]


@pytest.mark.parametrize(
    "line",
    ["finetune --pefd lora", "finetune --peft lara", "fintune", "runs lsit", "import", "run a.yaml --num-nodes 0"],
)
def test_what_it_does_not_take_is_noticed(line: str) -> None:
    usage_error = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
    with pytest.raises((usage_error, RecipeError)):
        parse(line.split())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", JOBS, ids=str)
def test_a_job_passes_its_checks_or_fails_as_the_next_line_says(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)  # where examples/ is
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path))
    words = arguments(place.text)
    code = main.run([*words, "--dir", str(tmp_path), *([] if "--dry-run" in words else ["--dry-run"])])
    error = place.file.read_text().splitlines()[place.line].strip()
    if error.startswith("error: "):
        assert (code, capsys.readouterr().err.strip()) == (2, error)
    else:
        assert code == 0


def test_options_between_backticks_exist() -> None:
    beside = "".join(path.read_text() for folder in ("benchmarks", "scripts") for path in (ROOT / folder).glob("*.py"))
    others = {
        "--container-image",
        "--mpi",
        *re.findall(r'add_argument\("(--[\w-]+)"', beside),
    }  # the first two are srun's
    named = [place for file in DOCUMENTS for place in inline_code(file) if place.text.startswith("--")]
    assert named
    known = options()
    unknown = [str(place) for place in named if place.text.split()[0] not in known | others]
    assert not unknown


def test_settings_between_backticks_exist() -> None:
    recipes = []
    for module in (llm.ChatDataModule, llm.FineTuningDataModule, llm.PreTrainingDataModule, llm.SquadDataModule):
        recipes.append(llm.mixtral_tiny.finetune_recipe(peft_scheme="qlora"))
        recipes[-1].data = run.Config(module)
    pattern = re.compile(r"(?<![\w./-])(?:trainer|optim|data|log|resume|peft|model\.config)(?:\.[a-z]\w*)+")
    pages = [file for file in DOCUMENTS if file.name != "automodel.md"]  # AutoModel's own settings
    named = [(path, place) for file in pages for place in inline_code(file) for path in pattern.findall(place.text)]
    assert len(named) > 60

    def exists(path: str) -> bool:
        for recipe in recipes:
            with suppress(RecipeError):
                paths.locate(recipe, path, path)
                return True
        return path == "data.largest"  # of the module that own-data.md writes

    assert not [f"{path} at {place}" for path, place in named if not exists(path)]

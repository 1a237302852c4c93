"""Other libraries' warnings are kept out, ours never: each half fails when the other is all there is."""

import ast
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mixtral_recipes.errors import MixtralRecipesWarning
from mixtral_recipes.system import quiet


def warn_from(module: str, text: str, category: str = "UserWarning") -> None:
    """Raise a warning as code of that module does."""
    names = {"__name__": module, "MixtralRecipesWarning": MixtralRecipesWarning}
    exec(f"import warnings; warnings.warn({text!r}, {category})", names)


def shown(*calls: tuple[str, ...]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("default")
        quiet.libraries()
        for call in calls:
            warn_from(*call)
    return [str(warning.message) for warning in caught]


FAULTY = '''"""Items \\- free."""'''


def shown_when_compiled(file: str) -> list[str]:
    """The warnings that are seen when that file, with an escape that is none, is compiled."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("default")
        quiet.libraries()
        compile(FAULTY, file, "exec")
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("module", ["torch", "torch.nn.modules.module", "megatron.core.optimizer", "nemo_run.config"])
def test_what_libraries_say_is_hidden(module: str) -> None:
    assert shown((module, "deprecated", "DeprecationWarning"), (module, "falling back")) == []


@pytest.mark.parametrize("place", ["site-packages", "dist-packages"])
def test_syntax_warnings_of_a_library_are_hidden(place: str) -> None:
    """By us and in tests: Megatron has such a docstring, and where pip did not compile it, the first import does."""
    file = f"/usr/lib/{place}/megatron/core/pool.py"
    compile(FAULTY, file, "exec")  # as pytest is set up, where a warning is an error
    assert shown_when_compiled(file) == []


def test_syntax_warnings_of_users_are_shown() -> None:
    assert shown_when_compiled("/home/me/my_recipes.py") == ["invalid escape sequence '\\-'"]


def test_what_a_library_blames_us_for_is_hidden() -> None:
    assert shown(("mixtral_recipes.models.config", "moe_ffn_hidden_size is not set")) == []


@pytest.mark.parametrize("module", ["mixtral_recipes.data.modules.squad", "torch.utils.data", "fiddle", "__main__"])
def test_ours_are_shown_whoever_called_and_each_time(module: str) -> None:
    ours = (module, "left out: line 3", "MixtralRecipesWarning")
    assert shown(ours, ours) == ["left out: line 3"] * 2


def test_every_warning_of_ours_is_of_our_class() -> None:
    root = Path(quiet.__file__).parents[2]
    folders = [
        root / "mixtral_recipes",
        *(root / "mixtral_recipes" / name for name in ("cli", "executors", "importers")),
    ]
    calls = [
        (path.name, ast.unparse(node))
        for folder in folders
        for path in folder.resolve().rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn")
    ]
    assert len(calls) >= 4
    assert [call for call in calls if "MixtralRecipesWarning" not in call[1]] == []


@pytest.mark.parametrize("module", ["__main__", "torchlight", "my_training"])
def test_users_own_are_shown(module: str) -> None:
    assert shown((module, "look at this")) == ["look at this"]


def test_nothing_is_hidden_when_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_DEBUG", "1")
    assert shown(("torch", "falling back")) == ["falling back"]


def test_our_log_messages_are_seen_and_chatter_is_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)  # as in a new process; other tests import what raises it
    quiet.libraries()
    assert logging.getLogger("mixtral_recipes.training").isEnabledFor(logging.WARNING)
    assert not logging.getLogger("megatron.core.dist_checkpointing.serialization").isEnabledFor(logging.WARNING)
    assert logging.getLogger("megatron.core.dist_checkpointing").isEnabledFor(logging.ERROR)


def stderr_of(*arguments: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import mixtral_recipes as llm; llm.mixtral_8x7b.finetune_recipe()",
        "from mixtral_recipes.recipes.mixtral_tiny import pretrain_recipe; pretrain_recipe()",
        "import mixtral_recipes.api",  # as nemo_run does, in the processes it starts
    ],
)
def test_the_package_is_quiet(code: str) -> None:
    assert stderr_of("-c", code) == ""


def test_the_package_says_what_the_user_should_know() -> None:
    code = """
import mixtral_recipes as llm
recipe = llm.mixtral_8x7b.finetune_recipe()
recipe.trainer.limit_test_batches = 3
from mixtral_recipes.executors.preflight import preflight
preflight(recipe)
"""
    said = stderr_of("-c", code)
    assert "MixtralRecipesWarning: trainer.limit_test_batches" in said


def test_a_command_says_ours_in_a_line(tmp_path: Path) -> None:
    said = stderr_of(
        "-m", "mixtral_recipes.cli.main", "finetune", "--recipe", "mixtral_8x7b", "--dry-run",
        "trainer.limit_test_batches=3", cwd=tmp_path,
    )  # fmt: skip
    ours = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(ours) == 1
    assert "trainer.limit_test_batches" in ours[0]
    assert "Warning" not in said


@pytest.mark.slow
def test_a_rank_is_quiet_and_says_ours(tmp_path: Path) -> None:
    from mixtral_recipes.executors.stored import store
    from mixtral_recipes.recipes import mixtral_tiny

    recipe = mixtral_tiny.finetune_recipe(dir=str(tmp_path), name="quiet", num_gpus_per_node=1)
    recipe.trainer.max_steps, recipe.trainer.val_check_interval, recipe.trainer.limit_test_batches = 1, 0, 3
    store(recipe, tmp_path / "recipe.json")
    said = stderr_of("-m", "mixtral_recipes.executors.rank", str(tmp_path / "recipe.json"), cwd=tmp_path)
    lines = [line for line in said.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("data: ") or "trainer.limit_test_batches" in line]
    assert lines == ours
    assert any("trainer.limit_test_batches" in line for line in lines)

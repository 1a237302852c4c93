"""What nemo_run's command line (``nemo llm pretrain --factory mixtral_8x7b``) finds: tasks and recipe factories.

nemo_run imports this module through the entry-point group ``nemo_run.cli``, also for a script that calls
``run.cli.main(llm.finetune)``. Importing a recipe module registers its factories; the tasks are registered here.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import logging
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import typer
from nemo_run.cli.api import EXECUTOR_CLASSES, list_factories
from nemo_run.cli.cli_parser import CLIException, parse_cli_args
from nemo_run.cli.lazy import LazyEntrypoint

import mixtral_recipes.recipes  # noqa: F401  # hides the libraries' warnings
from mixtral_recipes import api
from mixtral_recipes.cli import output
from mixtral_recipes.cli.main import say
from mixtral_recipes.errors import (
    EnvironmentProblem,
    MixtralRecipesError,
    RecipeError,
    in_short,
    nearest,
    of_the_machine,
)
from mixtral_recipes.executors import nemo_run_jobs
from mixtral_recipes.executors import torchrun as _torchrun  # noqa: F401  # registers run.executor=torchrun
from mixtral_recipes.overrides import paths, yaml_file
from mixtral_recipes.recipes import data as _data  # noqa: F401  # registers data=mock and data=squad
from mixtral_recipes.recipes.catalog import names
from mixtral_recipes.system.ranks import launched_rank
from mixtral_recipes.system.yaml_files import load_plain

_SCRIPT_S = re.compile(r"(?<![\w./-])recipe\.(?=[a-z_]+\.[a-z_])")  # how a script writes a setting
_FILE = re.compile(r"[\w.]+=@([^:]+)(?::\w+)?")  # a part of it from a file


class RecipeContext(run.cli.RunContext):
    """nemo_run's commands, which end as ours do: an error is one line, and its exit code is also a script's."""

    def cli_execute(self, fn: Any, args: list[str], entrypoint_type: Any = "task") -> None:
        """As nemo_run calls it."""
        try:
            if self.repl and importlib.util.find_spec("IPython") is None:
                raise EnvironmentProblem("--repl needs IPython, which is not installed; run `pip install ipython`.")
            super().cli_execute(fn, args, entrypoint_type)
        except typer.Abort:
            raise SystemExit(say("nothing was started; --yes starts without asking.", 2)) from None
        except Exception as error:
            problem = error if isinstance(error, MixtralRecipesError) else of_the_machine(error)
            if problem is None:
                traceback.print_exc()
                raise SystemExit(1) from None
            text = _SCRIPT_S.sub("", str(problem))
            raise SystemExit(say(text, problem.exit_code)) from None

    def parse_args(self, args: list[str], lazy: bool = False) -> Any:
        """As nemo_run calls it, for what begins with ``run.``; settings of a script's own executor count too."""
        own = [text.removeprefix("executor.") for text in args if text.startswith("executor.")]
        with _in_short():
            if own and not any(text.startswith("executor=") for text in args):
                if not hasattr(self, "executor"):
                    raise RecipeError(f"run.executor.{own[0]}: name an executor, e.g. run.executor=torchrun.")
                self.executor = parse_cli_args(self.executor, own)  # pyright: ignore[reportArgumentType]
            return super().parse_args(args, lazy)

    def parse_executor(self, name: str, *args: str) -> Any:
        """As nemo_run calls it; its own refusal names no executor that there is."""
        try:
            return super().parse_executor(name, *args)
        except ValueError as error:
            if str(error) != f"Executor {name} not found":
                raise
            known = sorted({each.__name__ for kind in EXECUTOR_CLASSES for each in list_factories(kind)})
            raise RecipeError(
                f"run.executor={name} is not an executor; leave it out to run on this machine.{nearest(name, known)}"
            ) from None

    def _should_continue(self, skip_confirmation: bool) -> bool:
        """As nemo_run calls it before it calls a task, whose answer, scores or folder it would drop."""
        go_on = super()._should_continue(skip_confirmation)
        if go_on and (self.direct or self.executor is None):
            fdl.update_callable(self._recipe, _shown(fdl.get_callable(self._recipe)))
        return go_on

    def parse_fn(self, fn: Any, args: list[str], **default_kwargs: Any) -> Any:
        """The recipe that factory or file, and settings, make; before a dry run prints it, it is checked."""
        for text in args:
            if text.startswith(("executor=", "executor.", "plugins=", "plugins.")):
                raise RecipeError(f"{text}: use run.{text}")
            if (file := _FILE.fullmatch(text)) and not Path(file[1]).is_file():
                raise RecipeError(f"{text}: no such file: {file[1]}.")
        recipe = self._recipe = self._of_file(fn, args) or self._of_factory(fn, args, default_kwargs)
        parameters = [each for each in inspect.signature(fn).parameters.values() if each.kind is not each.VAR_KEYWORD]
        required = [each.name for each in parameters if each.default is each.empty]
        missing = [name for name in required if name not in recipe.__arguments__]
        if missing and not self.repl:
            how = "choose a recipe: --factory mixtral_8x7b" if "trainer" in required else f"set {missing[0]}=VALUE"
            raise RecipeError(f"not set: {', '.join(missing)}; {how}.")
        if self.dryrun:
            nemo_run_jobs.check(recipe, self.executor or run.LocalExecutor())
        return recipe

    def _of_file(self, fn: Any, args: list[str]) -> Any:
        """The recipe of a file that holds a whole one, such as ``--to-yaml`` writes, which nemo_run cannot read."""
        if self.yaml is None or Path(self.yaml).suffix == ".toml":
            return None
        path = Path(self.yaml)
        if not {"_target_", "recipe"} & load_plain(path, RecipeError).keys():
            return None
        recipe = yaml_file.read_recipe(path)
        if recipe.__fn_or_cls__ is not fn:
            raise RecipeError(f"{path} is a recipe for {recipe.__fn_or_cls__.__name__}, not for {fn.__name__}.")
        paths.apply(recipe, args)
        return recipe

    def _of_factory(self, fn: Any, args: list[str], default_kwargs: dict[str, Any]) -> Any:
        named = str(self.factory).partition("(")[0]
        if named in names() and fn is api.validate:  # what fine-tuning validates with
            given = dict(self._of_factory(api.finetune, args, default_kwargs).__arguments__)
            return run.Partial(fn, model_transform=given.pop("peft", None), **given)
        if named in names() and fn not in (api.pretrain, api.finetune):
            raise RecipeError(f"--factory {named} is for pretrain, finetune and validate, not for {fn.__name__}.")
        try:
            with _in_short():
                return super().parse_fn(fn, args, **default_kwargs)
        except RecipeError as error:
            if str(error).startswith("No matching factory"):
                raise RecipeError(f"{error}.{nearest(str(self.factory), names())}") from None
            with _in_short():
                recipe = super().parse_fn(fn, [], **default_kwargs)
        for text in args:
            _change(recipe, text)
        return recipe


def _change(recipe: Any, text: str) -> None:
    """Change a setting as nemo_run does, which knows a script's own factories and files, or as our own commands do."""
    try:
        with _in_short():
            LazyEntrypoint(fdl.get_callable(recipe), factory=lambda: recipe, overwrites=[text]).resolve()
    except RecipeError:
        if "=@" in text:
            raise
        paths.apply(recipe, [text])


def _shown(task: Callable[..., Any]) -> Callable[..., Any]:
    """A task that shows what it returns."""

    @functools.wraps(task)
    def called(*args: Any, **kwargs: Any) -> None:
        result = task(*args, **kwargs)
        if launched_rank() != 0:
            return
        if isinstance(result, dict):
            output.say(json.dumps({name: value for name, value in result.items() if name != "predictions"}, indent=1))
        for each in result if isinstance(result, list) else []:
            output.say(each if isinstance(each, str) else f"> {each.prompt}\n{each.generated_text}\n")
        if isinstance(result, Path):
            output.say(result)

    return called


@contextlib.contextmanager
def _in_short() -> Iterator[None]:
    """Turn nemo_run's errors about arguments, which hold and log the whole recipe, into a line."""
    logger = logging.getLogger("nemo_run.cli.cli_parser")
    logger.disabled = True
    try:
        yield
    except (CLIException, ValueError) as error:
        named = f"{getattr(error, 'arg', '')}: ".removeprefix(": ")
        raise RecipeError(named + in_short(error).partition(" for <")[0]) from None
    finally:
        logger.disabled = False


def _register(task: Callable[..., Any], name: str | None = None) -> None:
    run.cli.entrypoint(task, name=name, namespace="llm", run_ctx_cls=RecipeContext)


for _name in names():
    importlib.import_module(f"mixtral_recipes.recipes.{_name}")

for _task in (api.train, api.pretrain, api.finetune, api.validate, api.generate, api.evaluate):
    _register(_task)
_register(api.import_ckpt, "import")
_register(api.export_ckpt, "export")

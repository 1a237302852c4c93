"""The ``mixtral-recipes`` command: a table of commands, each loaded when it is called.

``--help`` is written from the table alone, so it starts in milliseconds: nothing heavier than the standard library.
"""

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from mixtral_recipes.errors import asked_by_command
from mixtral_recipes.system import late_imports, streams
from mixtral_recipes.system.garbage import seldom_collected

PROGRAM = "mixtral-recipes"
ABOUT = "Mixtral recipes on Megatron-Core: pretraining, fine-tuning, conversion, on a laptop or a cluster."

# command -> (module, one line; its --help begins with it). A module holds a function `command` or a typer app `app`.
COMMANDS: dict[str, tuple[str, str]] = {
    "finetune": ("finetune", "Fine-tune a checkpoint with LoRA, DoRA, QLoRA, or all weights."),
    "pretrain": ("pretrain", "Train a model from random weights."),
    "run": ("run", "Run a recipe written in a YAML file."),
    "plan": ("plan", "Will it fit, how long will it take, what to choose."),
    "recipes": ("recipes", "List, show and compare recipes."),
    "data": ("data", "Prepare a corpus, check a data set, show what is learned."),
    "import": ("import_checkpoint", "Import a model or adapter: HF, Mistral, PEFT, NeMo, Megatron-LM."),
    "export": ("export", "Export a checkpoint: Hugging Face, NeMo 2.0, GGUF, or an adapter."),
    "merge": ("merge", "Combine adapters of one base as a weighted sum."),
    "verify": ("verify", "Compare a checkpoint with its source, tensor by tensor."),
    "generate": ("generate", "Continue prompts with a model."),
    "chat": ("chat", "Talk to a model on the terminal."),
    "serve": ("serve", "Serve a model behind OpenAI's API."),
    "evaluate": ("evaluate", "Score a model: questions, loss, perplexity, lm-evaluation-harness."),
    "lineage": ("lineage", "Follow a model back to its source, and compare every link."),
    "runs": ("runs", "See, follow, resume and stop runs."),
    "report": ("report", "Write a page about a run: loss, throughput, expert load, restarts."),
    "pipeline": ("pipeline", "Run several jobs that depend on each other."),
    "migrate": ("migrate", "Report what changes in a script or notebook written for NeMo."),
    "clusters": ("clusters", "List and check the Slurm clusters you can reach."),
    "doctor": ("doctor", "Check this machine."),
}


def main() -> None:
    """Entry point of the console script."""
    streams.in_utf8()
    streams.prepare()
    needs_all_of_torch = {"--simulate", "--calibrate"} & set(sys.argv)  # also the parts that commands leave out
    if not needs_all_of_torch:
        late_imports.activate(only_describes=sys.argv[1:2] in (["recipes"], ["plan"]) or "--dry-run" in sys.argv)
    if "--debug" in sys.argv:
        os.environ["MIXTRAL_RECIPES_DEBUG"] = "1"  # nothing is hushed, in the ranks neither
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one
            signal.signal(number, _stop)
    with seldom_collected():
        try:
            code = run(sys.argv[1:])
        except _Stopped as stop:  # while it said its last line
            code = 128 + stop.args[0]
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) in (_stop, signal.default_int_handler):  # no traceback out of Python's own end
            signal.signal(number, signal.SIG_DFL)
    problem = streams.finish()
    if problem is not None and not isinstance(problem, BrokenPipeError) and code == 0:
        code = say(f"the output could not be written ({problem.strerror}).", 2)
        streams.finish()
    sys.exit(code)


class _ReaderGone(Exception):
    """What read our output has gone: ``| head``."""


@contextlib.contextmanager
def _past_click() -> Iterator[None]:
    """Let a broken pipe pass by click, and by rich, which end the process with 1 where they see one."""
    try:
        yield
    except BrokenPipeError as error:
        raise _ReaderGone from error
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            raise _ReaderGone from end
        raise


class _Stopped(BaseException):
    """Somebody, or a terminal that is gone, asks this process to end: what is half-written is cleared away."""


def _stop(number: int, _frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise _Stopped(number)


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: Arguments without the program's name.

    Returns:
        0 done; 2 the user can fix it; 75 stopped after saving; 1 a defect of ours; 130 interrupted, 143 and 129 by
        SIGTERM and a lost terminal.
    """
    if "_MIXTRAL_RECIPES_COMPLETE" not in os.environ and (not argv or argv[0] in ("--help", "-h", "--version")):
        return _about(argv)
    debug = "--debug" in argv
    with asked_by_command():
        return _call([word for word in argv if word != "--debug"], debug)


def _about(argv: list[str]) -> int:
    """What is answered without loading a command."""
    text = overview()
    if argv[:1] == ["--version"]:
        from mixtral_recipes import __version__

        text = f"{PROGRAM} {__version__}"
    try:
        print(text, flush=True)
    except BrokenPipeError:
        streams.give_up("stdout")
    except OSError as error:
        streams.give_up("stdout")
        return say(f"the output could not be written ({error.strerror}).", 2)
    return 0


def overview() -> str:
    """The text of ``mixtral-recipes --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {at[1]}" for name, at in COMMANDS.items()]
    return "\n".join(
        [
            f"Usage: {PROGRAM} COMMAND [OPTIONS] [dotted.path=value ...]",
            "",
            ABOUT,
            "",
            "Commands:",
            *lines,
            "",
            "Options:",
            "  --help                Show this text; COMMAND --help shows a command's options.",
            "  --version             Show the version.",
            "  --debug               With any command: show the traceback of an error.",
            "  --install-completion  Install completion for this shell.",
        ]
    )


def _call(argv: list[str], debug: bool) -> int:
    import typer

    from mixtral_recipes.errors import MixtralRecipesError, is_panic, of_the_machine
    from mixtral_recipes.system import quiet

    usage_error = _usage_error()
    if not debug:
        quiet.our_process()
    try:
        result = _group().main(argv, prog_name=PROGRAM, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except MixtralRecipesError as error:
        if debug:
            raise
        return say(str(error), error.exit_code)
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return say("interrupted.", 130)
    except _Stopped as stop:
        return say(f"stopped by {signal.Signals(stop.args[0]).name}.", 128 + stop.args[0])
    except usage_error as error:
        return say(_one_line(error), 2)
    except _ReaderGone:
        streams.give_up("stdout")  # nothing more to say
        return 0
    except BaseException as error:
        if debug or not (isinstance(error, Exception) or is_panic(error)):
            raise
        if problem := of_the_machine(error):
            return say(str(problem), problem.exit_code)
        return say(f"{type(error).__name__}: {error} (this is a bug; please report it with the output of --debug)", 1)


def check_words(words: list[str]) -> None:
    """Read a command line as it is read before the command runs.

    Args:
        words: A command and its arguments.

    Raises:
        RecipeError: no such command, option or value; or it would only show its help.
    """
    import typer

    from mixtral_recipes.cli.options.groups import Group
    from mixtral_recipes.errors import RecipeError

    command = _group()
    try:
        context = command.make_context(PROGRAM, list(words))
        while isinstance(command, Group):
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(name, rest, parent=context)
    except typer.Exit as shown:
        raise RecipeError("it only shows its help.") from shown
    except _usage_error() as error:
        raise RecipeError(_one_line(error) or "it only shows its help.") from error


def _usage_error() -> type[Exception]:
    """typer carries its own click; the base of its usage errors is reached through what typer exports."""
    import typer

    return next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def say(text: str, code: int) -> int:
    """Print an error's line; return its exit code."""
    from mixtral_recipes.system.escapes import in_a_line, shortened
    from mixtral_recipes.system.private import without_passwords

    if text:  # a group of commands that was called without one has printed its help
        with contextlib.suppress(OSError):  # nobody hears it; the exit code is there still
            print(f"error: {shortened(in_a_line(without_passwords(text)))}", file=sys.stderr, flush=True)
    return code


def _one_line(error: Any) -> str:
    return " ".join(error.format_message().replace("Value error, ", "").split())


def _group() -> Any:
    """The commands as a group that imports a command's module when it is asked for."""
    import typer

    from mixtral_recipes.cli.options.groups import Group

    class LazyGroup(Group):
        def make_context(self, *args: Any, **kwargs: Any) -> Any:
            with _past_click():
                return super().make_context(*args, **kwargs)

        def invoke(self, ctx: Any) -> Any:
            with _past_click():
                return super().invoke(ctx)

        def list_commands(self, ctx: Any) -> list[str]:
            return list(COMMANDS)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            return _load(cmd_name)

    app = typer.Typer(cls=LazyGroup, add_completion=True, help=ABOUT, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    group = typer.main.get_command(app)
    group.name = PROGRAM
    return group


def _load(name: str) -> Any:
    if name not in COMMANDS:
        return None
    import typer

    from mixtral_recipes.cli.options.groups import App

    module_name, about = COMMANDS[name]
    module = importlib.import_module(f"mixtral_recipes.cli.{module_name}")
    app = getattr(module, "app", None)
    if app is None:
        app = App(about)
        app.command(name)(module.command)
    command = typer.main.get_command(app)
    command.name = name
    return command


if __name__ == "__main__":
    main()

"""Groups of options: in a command's signature, one dataclass stands for all the options that are its fields.

typer reads a command's signature, so it is shown one in which each group is replaced by its fields. The command itself
receives the groups, filled in.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from mixtral_recipes.errors import RecipeError, nearest

# Every command accepts it, but `main` takes it off the line before typer sees it; it is declared here for --help.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_ANY_TEXT = ("TEXT", "PROMPT")  # metavars


class Group(TyperGroup):
    """Commands; an unknown one is an error that lists the known ones."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As typer's."""
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            path = [*ctx.command_path.split()[1:], args[0]]
            raise RecipeError(f"command {' '.join(path)!r} is not known.{nearest(args[0], known)}")
        return super().resolve_command(ctx, args)


class Command(TyperCommand):
    """A command that takes an empty word for a shell's variable that is not set, where any text is not meant.

    As a path it would be the current folder, as a name none at all.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's.

        Raises:
            RecipeError: a word is empty.
        """
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in self.params:
            words = given.get(parameter.name or "")
            shown = str(parameter.metavar or parameter.name).strip("[]")
            if "" in (words if isinstance(words, list | tuple) else [words]) and not any(map(shown.count, _ANY_TEXT)):
                option = parameter.opts[0] if parameter.param_type_name == "option" else shown
                raise RecipeError(f"{option} is empty; is a shell variable not set?")
        return super().parse_args(ctx, args)


class App(typer.Typer):
    """Commands that may take groups of options, and that list --debug.

    Args:
        about: What ``--help`` says first.
    """

    def __init__(self, about: str) -> None:
        super().__init__(
            cls=Group, help=about, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
        )

    def command(self, *names: Any, **settings: Any) -> Callable[[Any], Any]:
        """As typer's; the decorated function itself stays as it was."""
        register = super().command(*names, cls=Command, **settings)

        def add(function: Any) -> Any:
            register(spread(function))
            return function

        return add


def spread(function: Callable[..., None]) -> Callable[..., None]:
    """A command with one parameter for each option, which calls ``function`` with the groups it takes."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            fields = dataclasses.fields(parameter.annotation)
            parameters += [_parameter(field.name, field.type, field.default) for field in fields]
        else:
            parameters.append(_parameter(name, parameter.annotation, parameter.default))
    parameters.append(_parameter("debug", Debug, False))

    def command(**values: Any) -> None:
        del values["debug"]
        taken = {
            name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        function(**values, **taken)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    return command


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind, *settings = get_args(annotation)
    if settings and kind in (bool, bool | None):
        settings[0].metavar = ""  # help says nothing of the type where no value follows
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

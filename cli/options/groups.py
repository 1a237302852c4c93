"""Groups of options: in a command's signature, one dataclass stands for all the options that are its fields.

typer reads a command's signature, so it is shown one in which each group is replaced by its fields. The command itself
receives the groups, filled in. An option is declared as help shows it, ``--output -o FILE``: by `option` beside a type,
by `field` in a group.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mixtral_recipes.errors import RecipeError, nearest


def option(spelling: str, help: str, **more: Any) -> Any:
    """What stands beside an option's type: ``Annotated[Path, option("--output -o FILE", "Folder to write.")]``.

    Args:
        spelling: Its names, and what its value is called; a flag has no value.
        help: What help says of it.
        **more: Further settings of `typer.Option`.
    """
    words = spelling.split()
    names = [word for word in words if word.startswith("-")]
    return typer.Option(*names, metavar="".join(words[len(names) :]), help=help, **more)


def field(spelling: str, help: str, default: Any = None, **more: Any) -> Any:
    """An `option` as a field of a group: ``name: str | None = field("--name NAME", "Run name.")``.

    Without a default it is None where it is not given, and a flag that cannot be switched off is False.
    """
    if default is None and "/" not in spelling and spelling.split()[-1].startswith("-"):
        default = False
    return dataclasses.field(default=default, metadata={"option": option(spelling, help, **more)})


def argument(metavar: str, help: str, **more: Any) -> Any:
    """What stands beside the type of an argument, which has no name on the command line."""
    return typer.Argument(metavar=metavar, help=help, **more)


# Every command accepts it, but `main` takes it off the line before typer sees it; it is declared here for --help.
Debug = Annotated[bool, option("--debug", "Show the traceback of an error.")]

_ANY_TEXT = ("TEXT", "PROMPT")  # metavars


class Group(TyperGroup):
    """Commands; an unknown one is an error that lists the known ones."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As typer's."""
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            path = [*ctx.command_path.split()[1:], args[0]]
            raise RecipeError(f"unknown command {' '.join(path)!r}.{nearest(args[0], known)}")
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
    parameter = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, taken in inspect.signature(function).parameters.items():
        if not dataclasses.is_dataclass(taken.annotation):
            parameters.append(parameter(name, default=taken.default, annotation=taken.annotation))
            continue
        groups[name] = taken.annotation
        for one in dataclasses.fields(taken.annotation):
            kind = Annotated[one.type, one.metadata["option"]] if one.metadata else one.type
            parameters.append(parameter(one.name, default=one.default, annotation=kind))
    parameters.append(parameter("debug", default=False, annotation=Debug))

    def command(**values: Any) -> None:
        del values["debug"]
        filled = {
            name: group(**{one.name: values.pop(one.name) for one in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        function(**values, **filled)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    return command

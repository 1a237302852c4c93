"""What our command line imports only when it is used: the one table, and the reason for each line.

`import nemo_run` brings the clients of every cloud nemo_run can start jobs in, and `import megatron.core` everything
that trains, in processes that only write a recipe down. `LATE` names the statements. While the body of a module in it
runs, such a statement imports nothing and binds the name's own text, which is what an annotation may hold (a forward
reference). When the body is done the text is taken out again, and whoever then looks for the name, inside the module or
from outside, makes the import: what is found is the real object, always, and from then on it stands where it would have
stood. Nothing is pretended, so `isinstance`, pickling and type hints need no care.

Active in the processes of our own command line only, not in ranks, which train, and not in anyone's Python. A package
that is imported already, or of another version than its lines were written for, is left alone.
"""

import builtins
import contextlib
import functools
import importlib
import importlib.util
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple


class Package(NamedTuple):
    """The late imports of one distribution.

    Attributes:
        distribution: Its name among the installed ones; empty for our own.
        versions: What its version must begin with, one of these, separated by blanks.
        why: What is saved, and who would use it.
        modules: Module -> what it imports late: names of modules (with all below them), separated by blanks.
        before: Module -> what of these has to be imported before it: they import each other, which works in one order.
    """

    distribution: str
    versions: str
    why: str
    modules: Mapping[str, str]
    before: Mapping[str, str] = MappingProxyType({})


_SHELL = "invoke"  # runs commands; every executor names it in its annotations
_TRAINS = "megatron.core.transformer megatron.core.optimizer megatron.core.distributed megatron.core.tensor_parallel"
LATE = {
    "torch": Package(
        "torch",
        "2.14. 2.15.",
        "torch.export writes programs for other runtimes; with it come tracing and torch's compiler passes.",
        {"torch": "torch.export"},
    ),
    "nemo_run": Package(
        "nemo_run",
        "0.11.",
        "Clients of clouds (leptonai with its web server and telemetry, requests), SSH (paramiko, fabric, invoke), the "
        "graph of an experiment's jobs (networkx) and other programs' configuration files (omegaconf): used when a job "
        "is started there, never to describe one.",
        {
            "nemo_run.core.execution.lepton": f"leptonai {_SHELL}",
            "nemo_run.core.execution.dgxcloud": f"requests {_SHELL}",
            "nemo_run.core.execution.docker": _SHELL,
            "nemo_run.core.execution.skypilot": _SHELL,
            "nemo_run.core.execution.skypilot_jobs": _SHELL,
            "nemo_run.core.execution.slurm": _SHELL,
            "nemo_run.core.packaging.git": _SHELL,
            "nemo_run.core.packaging.hybrid": _SHELL,
            "nemo_run.core.packaging.pattern": _SHELL,
            "nemo_run.core.tunnel.client": f"paramiko fabric {_SHELL}",
            "nemo_run.core.tunnel.rsync": f"paramiko fabric {_SHELL}",
            "nemo_run.core.tunnel.server": f"paramiko fabric {_SHELL}",
            "nemo_run.run.experiment": "networkx",
            "nemo_run.cli.lazy": "omegaconf",
        },
    ),
    "megatron": Package(
        "megatron-core",
        "0.19.",
        "Everything that trains (with it the rest of torch.distributed, sympy and triton): a recipe is written with "
        "three dataclasses of settings, and importing any module of Megatron's imports all of it.",
        {
            "megatron.core": (
                "megatron.core.tensor_parallel megatron.core.parallel_state megatron.core.distributed "
                "megatron.core.inference_params megatron.core.timers"
            ),
            "megatron.core.utils": (
                "torch.distributed._tensor torch.distributed.tensor megatron.core.parallel_state "
                "megatron.core.dist_checkpointing"
            ),
            "megatron.core.transformer": "megatron.core.transformer",
            "megatron.core.transformer.pipeline_parallel_layer_layout": "megatron.core.parallel_state",
            "megatron.core.optimizer": f"{_TRAINS} megatron.core.process_groups_config",
            "megatron.core.distributed": "megatron.core.distributed",
            "megatron.core.rerun_state_machine": "megatron.core.dist_checkpointing megatron.core.parallel_state",
            "megatron.core.inference.moe": "megatron.core.inference.moe",
        },
    ),
    "mixtral_recipes.api": Package(
        "",
        "",
        "A recipe holds our `finetune` as what to call; what `finetune` calls is needed where it is called.",
        {
            "mixtral_recipes.api": "mixtral_recipes.training mixtral_recipes.checkpoints mixtral_recipes.reports",
        },
    ),
}


# What applies in place of the above where nothing is calculated: `recipes show`, `--dry-run`.
DESCRIBING = {
    "torch": Package(
        "torch",
        "2.14. 2.15.",
        "As above, and what operations on tensors without data (device 'meta') are told: nothing asks for that "
        "by name, so it waits only where there are no tensors. An operation that needed it would fail, not go wrong.",
        {"torch": "torch.export torch._meta_registrations"},
        dict.fromkeys(
            ("torch._decomp", "torch._prims", "torch._refs", "torch.utils._content_store"), "torch._meta_registrations"
        ),
    ),
}


class _Later(str):
    """A name's text, and how to get the object it refers to."""

    get: Callable[[], Any]

    def __getattr__(self, name: str) -> "_Later":
        """``paramiko.Channel`` in an annotation: text too."""
        if name.startswith("__"):
            raise AttributeError(name)
        return _later(f"{self}.{name}", lambda: getattr(self.get(), name))

    def __or__(self, other: Any) -> Any:
        return typing.Union[self, other]  # noqa: UP007  # text | type is an error, in Union it is a forward reference

    def __ror__(self, other: Any) -> Any:
        return typing.Union[other, self]  # noqa: UP007


def _later(text: str, get: Callable[[], Any]) -> _Later:
    later = _Later(text)
    later.get = get
    return later


def _package(modules: Sequence[str]) -> Any:
    """What ``import a.b`` binds: a, with b imported."""
    for name in modules:
        importlib.import_module(name)
    return sys.modules[modules[0].partition(".")[0]]


def _attribute(module: str, name: str, is_module: bool) -> Any:
    """What ``from module import name`` binds."""
    if not is_module:
        try:
            return getattr(importlib.import_module(module), name)
        except AttributeError:
            pass
    return importlib.import_module(f"{module}.{name}")


class _Names(dict[str, Any]):
    """Where a module's code looks for a name that is not its own: Python's builtins, and what it imports late."""

    def __init__(self, module: ModuleType, prefixes: tuple[str, ...]) -> None:
        super().__init__(vars(builtins))
        self._module, self._prefixes = module, prefixes
        self._packages: dict[str, tuple[str, ...]] = {}  # top package -> the modules `import a.b` statements name
        self._waiting: dict[str, _Later] = {}
        self["__import__"] = self._import

    def __missing__(self, name: str) -> Any:
        if name not in self._waiting:
            raise KeyError(name)
        value = self._waiting[name].get()
        vars(self._module)[name] = value
        return value

    def is_late(self, module: str) -> bool:
        """Whether a module is one of those to import late, or below one."""
        return any(module == prefix or module.startswith(f"{prefix}.") for prefix in self._prefixes)

    def _import(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        """The module's ``import`` while its body runs."""
        full = importlib.util.resolve_name("." * level + name, globals["__package__"]) if level else name
        items = list(fromlist or ())
        late = [item for item in items if self.is_late(full) or self.is_late(f"{full}.{item}")]
        top = full.partition(".")[0]
        if not (late or (not items and self.is_late(full))) or importlib.util.find_spec(top) is None:
            return builtins.__import__(name, globals, locals, fromlist, level)
        if not items:
            self._packages[top] = modules = (*self._packages.get(top, ()), full)
            return _later(top, functools.partial(_package, modules))
        now = [item for item in items if item not in late]
        own = full == self._module.__name__  # `from . import below`: the attribute is what is being looked for
        found = SimpleNamespace(**{item: _later(item, functools.partial(_attribute, full, item, own)) for item in late})
        if now:
            module = builtins.__import__(name, globals, locals, now, level)
            vars(found).update({item: getattr(module, item) for item in now})
        return found

    @staticmethod
    def _as_usual(*args: Any, **named: Any) -> Any:
        return builtins.__import__(*args, **named)  # looked up at each call: nemo_run puts another there for a while

    def waiting(self) -> list[str]:
        """The late names that have not been looked up yet."""
        return [name for name in self._waiting if name not in vars(self._module)]

    def body_done(self) -> None:
        """Take the texts out again; from here on a look-up finds the real thing."""
        own = vars(self._module)
        self._waiting = {name: value for name, value in own.items() if isinstance(value, _Later)}
        for name in self._waiting:
            del own[name]
        self["__import__"] = self._as_usual
        own["__getattr__"] = functools.partial(self._from_outside, own.get("__getattr__"))

    def _from_outside(self, theirs: Callable[[str], Any] | None, name: str) -> Any:
        """The module's ``__getattr__``: a late name, or a module below, which what is late may have imported."""
        if name in self._waiting:
            return vars(self._module)[name] if name in vars(self._module) else self.__missing__(name)
        if theirs is not None:
            with contextlib.suppress(AttributeError):
                return theirs(name)
        below = f"{self._module.__name__}.{name}"
        if "__path__" in vars(self._module) and _could_be_below(name) and importlib.util.find_spec(below):
            return importlib.import_module(below)
        raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r}")


def _could_be_below(name: str) -> bool:
    """Whether a package may be asked for a module of this name; torch.compile asks packages for ``torch.device``."""
    return name.isidentifier() and not name.startswith("__")


class _Loader(SourceFileLoader):
    """Runs a module's body as Python does, with some of its imports put off."""

    def __init__(self, name: str, path: str, prefixes: tuple[str, ...]) -> None:
        super().__init__(name, path)
        self._prefixes = prefixes

    def exec_module(self, module: ModuleType) -> None:
        names = _Names(module, self._prefixes)
        vars(module)["__builtins__"] = names
        super().exec_module(module)
        names.body_done()


class _After:
    """Has another module imported first, and then this one; Python takes what is in `sys.modules` when that is done."""

    def __init__(self, first: str) -> None:
        self._first = first

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        del sys.modules[module.__name__]
        importlib.import_module(self._first)
        importlib.import_module(module.__name__)


class _Finder:
    """Stands before Python's own finders and answers for the modules of packages that are imported after it."""

    def __init__(self, packages: Iterable[Package]) -> None:
        self._packages = {name: package for package in packages for name in (*package.modules, *package.before)}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        package = self._packages.get(name)
        if package is None or not _is_known(package.distribution, package.versions):
            return None
        if name in package.before:
            first = package.before[name]
            return None if first in sys.modules else ModuleSpec(name, _After(first))  # pyright: ignore[reportArgumentType]
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(name, spec.loader.path, tuple(package.modules[name].split()))
        return spec


@functools.cache
def _is_known(distribution: str, versions: str) -> bool:
    from importlib import metadata

    try:
        return not distribution or metadata.version(distribution).startswith(tuple(versions.split()))
    except metadata.PackageNotFoundError:
        return False


def activate(*, only_describes: bool = False) -> None:
    """Import late what `LATE` names, in this process, from here on. Idempotent.

    Args:
        only_describes: Whether the process will not calculate at all, so that `DESCRIBING` applies too.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        table = LATE | DESCRIBING if only_describes else LATE
        packages = [package for name, package in table.items() if name not in sys.modules]
        sys.meta_path.insert(0, _Finder(packages))  # pyright: ignore[reportArgumentType]


def complete(package: str) -> None:
    """Import what a package's modules still wait for, as importing the package without us would have done."""
    while waiting := [
        (module, name)
        for module in LATE[package].modules
        if module in sys.modules and isinstance(names := vars(sys.modules[module]).get("__builtins__"), _Names)
        for name in names.waiting()
    ]:  # importing one may import another module of the table
        for module, name in waiting:
            getattr(sys.modules[module], name)

"""Reads a script or notebook that was written for NeMo, says line by line what changes, and makes the changed copy.

Works on the syntax tree and the table of names alone: nothing of the script is run, and nothing heavy is imported.
"""

import ast
import functools
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.callbacks import of_lightning
from mixtral_recipes.settings.classes import PUBLIC, THEIRS
from mixtral_recipes.settings.literals import literal
from mixtral_recipes.settings.nemo.arguments import CALLS
from mixtral_recipes.settings.nemo.names import MODULES, NAMES, instead_of, lightnings_module
from mixtral_recipes.settings.nemo.notebooks import Notebook
from mixtral_recipes.settings.nemo.rules import Ignored, Keys, Only, Renamed, Rule, notice, refusal, wrong_type
from mixtral_recipes.settings.nemo.stated import stated_default, stated_type
from mixtral_recipes.settings.ranges import out_of_range

MARK = "# mixtral-recipes:"
_OURS = "mixtral_recipes"
_PACKAGE_FOLDER = Path(__file__).resolve().parents[2]
_NO_LIGHTNING = "mixtral-recipes does not run on Lightning; it has its own callbacks and loggers"
# Part of a recipe -> its class, where a setting of it is assigned: recipe.trainer.strategy.x = ...
_PARTS = {
    "trainer": "Trainer",
    "strategy": "MegatronStrategy",
    "ddp": "DistributedDataParallelConfig",
    "plugins": "MegatronMixedPrecision",
    "log": "NeMoLogger",
    "ckpt": "ModelCheckpoint",
    "wandb": "WandbLogger",
    "tensorboard": "TensorBoardLogger",
    "resume": "AutoResume",
    "restore_config": "RestoreConfig",
    "optim": "MegatronOptimizerModule",
    "lr_scheduler": "CosineAnnealingScheduler",
    "peft": "LoRA",
    "packed_sequence_specs": "PackedSequenceSpecs",
    "model.config": "MixtralConfig",
    "optim.config": "OptimizerConfig",
}


@dataclass(frozen=True)
class Finding:
    """One thing about a line.

    Attributes:
        line: Its number.
        kind: ``changed`` (rewritten), ``warned`` (accepted with a warning), ``refused`` (must be changed by hand)
            or ``note`` (worth a look).
        text: What to say about it.
        cell: The number of a notebook's cell, in which the line is counted.
    """

    line: int
    kind: str
    text: str
    cell: int | None = None

    @property
    def place(self) -> str:
        """Where, behind the file's name."""
        return f"{self.line}" if self.cell is None else f"cell {self.cell}:{self.line}"


@dataclass
class Migrated:
    """A script that was read.

    Attributes:
        path: The script or notebook.
        source: Its changed text.
        findings: By line.
    """

    path: Path
    source: str
    findings: list[Finding] = field(default_factory=list)

    def count(self, kind: str) -> int:
        """How many findings of a kind."""
        return sum(finding.kind == kind for finding in self.findings)


def migrate(path: Path) -> Migrated:
    """Read a script.

    Raises:
        RecipeError: it cannot be read, or is not valid Python.
    """
    if path.suffix in (".yaml", ".yml"):
        raise RecipeError(f"{path} is not a script; NeMo's recipe files run as they are: `mixtral-recipes run {path}`.")
    try:
        source = path.read_text(encoding="utf-8-sig")
        notebook = Notebook(source) if path.suffix == ".ipynb" else None
        lines = notebook.lines if notebook else io.StringIO(source).readlines()  # as Python counts them
        python = notebook.python if notebook else source
        tree = ast.parse(python)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}.") from error
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"{path}:{getattr(error, 'lineno', None) or 1}: not valid Python ({error}).") from error
    except (MemoryError, RecursionError) as error:  # what Python's parser says of too many brackets
        raise RecipeError(f"{path}: nested too deeply for Python's parser.") from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    reader = _Reader(lines)
    reader.read(tree)
    findings = sorted(set(reader.findings), key=lambda finding: (finding.line, finding.kind, finding.text))
    lines = reader.changed(findings, python)
    if notebook is None:
        return Migrated(path, "".join(lines), findings)
    told = [
        Finding(line, each.kind, each.text, cell) for each in findings for cell, line in [notebook.place(each.line)]
    ]
    told += [
        Finding(1, "note", "not read: not valid Python", each.number) for each in notebook.cells if each.python is None
    ]
    return Migrated(path, notebook.changed(lines), sorted(told, key=lambda one: (one.cell or 0, one.line)))


def scripts_in(path: Path) -> list[Path]:
    """A script itself, or every Python file and notebook of a folder.

    Raises:
        RecipeError: there is none.
    """
    if path.is_file():
        return [path]
    found = sorted(
        file
        for pattern in ("*.py", "*.ipynb")
        for file in path.rglob(pattern)
        if not {"__pycache__", ".git", ".ipynb_checkpoints"} & set(file.parts)
    )
    if not found:
        raise RecipeError(
            f"{path}: {'no Python file or notebook in it' if path.is_dir() else 'no such file or folder'}."
        )
    return found


class _Reader:
    """Goes over a script's syntax tree."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.findings: list[Finding] = []
        self.origins: dict[str, str] = {}  # local name -> where it comes from, dotted
        self.classes: dict[str, str] = {}  # variable -> NeMo's class it is made of; empty where that is not one alone
        self.edits: list[tuple[int, int, int, str]] = []  # line, from and to column, text
        self.generates = False  # whether the script asks a model in its own process

    def read(self, tree: ast.AST) -> None:
        """Look at everything."""
        self.generates = any(isinstance(node, ast.Attribute) and node.attr == "generate" for node in ast.walk(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self._import(node)
            elif isinstance(node, ast.ImportFrom):
                self._import_from(node)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                self._made(node.targets[0], node.value)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                self._call(node)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assignment(target, node.value)
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                self._assignment(node.target, node.value)
            elif isinstance(node, ast.AugAssign):
                self._assignment(node.target, node.target)  # what comes out, the text does not show
            elif isinstance(node, ast.Attribute):
                self._attribute(node)
            elif isinstance(node, ast.ClassDef) and any(self._origin(b).endswith(".Callback") for b in node.bases):
                self._callback(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self._text(node)

    def changed(self, findings: list[Finding], python: str) -> list[str]:
        """Each line with every edit, and a remark above it where it needs a change by hand.

        Args:
            findings: What was found, by line.
            python: The lines as Python.
        """
        lines, free = list(self.lines), _free_lines(python)
        for line, start, end, text in sorted(self.edits, reverse=True):
            old = lines[line - 1].encode()  # the tree counts bytes
            lines[line - 1] = (old[:start] + text.encode() + old[end:]).decode()
        for finding in reversed(findings):
            if finding.kind == "refused":
                place = max(line for line in free if line <= finding.line) - 1
                old = self.lines[place]
                indent = old[: len(old) - len(old.lstrip())]
                lines[place] = f"{indent}{MARK} {finding.text}\n{lines[place]}"
        return lines

    def _say(self, node: ast.AST, kind: str, text: str) -> None:
        self.findings.append(Finding(getattr(node, "lineno", 1), kind, text))

    def _edit(self, node: ast.AST, start: int, end: int, text: str) -> None:
        line: int = getattr(node, "lineno", 1)
        old = self.lines[line - 1].strip()
        self.edits.append((line, start, end, text))
        new = self.lines[line - 1].encode()
        self._say(node, "changed", f"{old}  ->  {(new[:start] + text.encode() + new[end:]).decode().strip()}")

    def _import(self, node: ast.Import) -> None:
        for alias in node.names:
            top = alias.name.partition(".")[0]
            if top == "nemo":
                self._known(node, alias.name)
                self.origins[alias.asname or "nemo"] = alias.name if alias.asname else "nemo"
                start = alias.col_offset
                if alias.asname is None:  # `import nemo.x` binds nemo
                    self._say(
                        node, "note", f"import {alias.name} no longer defines the name nemo; use `from ... import ...`"
                    )
                self._edit(alias, start, start + len("nemo"), _OURS)
            elif top in ("lightning", "pytorch_lightning"):
                ours = lightnings_module(alias.name)
                if ours is None or alias.asname is None:
                    self._say(node, "note", f"{alias.name}: {_NO_LIGHTNING}")
                    continue
                self.origins[alias.asname] = f"nemo.{ours}"
                self._edit(alias, alias.col_offset, alias.col_offset + len(alias.name), f"{_OURS}.{ours}")

    def _import_from(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        top = module.partition(".")[0]
        if node.level or top not in ("nemo", "lightning", "pytorch_lightning", "megatron"):
            return
        for alias in node.names:
            self.origins[alias.asname or alias.name] = f"{module}.{alias.name}"
        if top == "megatron":  # its settings are the same here
            return
        line = self.lines[node.lineno - 1]
        start = line.encode().find(module.encode(), node.col_offset)
        if start < 0:
            self._say(node, "refused", f"`from {module} import` spans several lines; join them and migrate again")
            return
        ours = lightnings_module(module)
        if ours is not None:
            self._edit(node, start, start + len(module), f"{_OURS}.{ours}")
            for alias in node.names:
                self._named(node, alias.name, ours)
            return
        if module.partition(".")[0] != "nemo":
            self._say(node, "refused", f"{module} is not available: {_NO_LIGHTNING}")
            return
        for alias in node.names:
            inside = f"{module}.{alias.name}"
            if inside.removeprefix("nemo.") not in MODULES:
                self._known(node, module)
                self._named(node, alias.name, module.removeprefix("nemo."))
        names = [(alias.name, alias.asname) for alias in node.names]
        if module == "nemo.collections" and names[0][0] == "llm" and len(names) == 1:
            end = len(line.rstrip("\n").encode()) if node.end_lineno == node.lineno else 0
            if end and node.end_col_offset is not None:
                self._edit(node, node.col_offset, node.end_col_offset, f"import {_OURS} as {names[0][1] or 'llm'}")
                return
        self._edit(node, start, start + len("nemo"), _OURS)

    def _known(self, node: ast.AST, module: str) -> None:
        if module != "nemo" and module.removeprefix("nemo.") not in MODULES:
            self._say(
                node,
                "refused",
                f"{module} is not available in mixtral-recipes: {instead_of(module.removeprefix('nemo.'))}",
            )

    def _named(self, node: ast.AST, name: str, module: str) -> None:
        """A name that is imported from a module, or looked up in it."""
        rule = NAMES.get(name)
        if isinstance(rule, Only):
            self._say(node, "refused", f"{name} is not available in mixtral-recipes: {rule.why}")
        elif isinstance(rule, Ignored):
            self._say(node, "warned", f"{name} has no effect: {rule.why}")
        elif rule is None and module in MODULES and name not in offered(MODULES[module]):
            self._say(node, "refused", f"{name} is not available in mixtral-recipes: {instead_of('')}")

    def _origin(self, node: ast.expr) -> str:
        """Where a name or attribute comes from, dotted; empty where that is not NeMo."""
        if isinstance(node, ast.Name):
            return self.origins.get(node.id, "")
        if isinstance(node, ast.Attribute):
            inner = self._origin(node.value)
            return f"{inner}.{node.attr}" if inner else ""
        return ""

    def _attribute(self, node: ast.Attribute) -> None:
        module, origin = self._origin(node.value), self._origin(node)
        if origin.startswith("nemo.") and origin.removeprefix("nemo.") not in MODULES:
            self._named(node, node.attr, module.removeprefix("nemo."))

    def _call(self, node: ast.Call) -> None:
        called, arguments = node.func, node.args
        if ast.unparse(called) == "torch.distributed.get_rank" and self.generates:
            self._say(
                node, "refused", f"{ast.unparse(called)}: no process group is left after generate; remove this call"
            )
        if ast.unparse(called) == "setattr" and len(arguments) == 3 and isinstance(arguments[1], ast.Constant):
            target = ast.Attribute(arguments[0], str(arguments[1].value))
            self._assignment(ast.copy_location(target, node), arguments[2])
        name, arguments = self._called(node)
        call = CALLS.get("MixtralConfig" if name.startswith("MixtralConfig") else name)
        if call is None:
            return
        positions = [argument for argument in call.order if argument != "*"]
        given = list(zip(positions, arguments, strict=False))
        given += [(str(keyword.arg), keyword.value) for keyword in node.keywords if keyword.arg]
        for argument, value in given:
            self._judge(value, name, argument, value, _rules(name).get(argument))

    def _called(self, node: ast.Call) -> tuple[str, list[ast.expr]]:
        """NeMo's name of what a call makes, with ``run.Config`` around it or not, and its arguments by position."""
        called, arguments = node.func, node.args
        if isinstance(called, ast.Attribute) and called.attr in ("Config", "Partial") and arguments:
            called, arguments = arguments[0], arguments[1:]
        return self._origin(called).rpartition(".")[2], arguments

    def _made(self, target: ast.expr, value: ast.Call) -> None:
        name, _ = self._called(value)
        if isinstance(target, ast.Name):
            self.classes[target.id] = name if self.classes.get(target.id, name) == name else ""

    def _callback(self, node: ast.ClassDef) -> None:
        """A class with Lightning's hooks."""
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name.startswith("on_"):
                why = of_lightning(method.name, [argument.arg for argument in method.args.args])
                if why:
                    self._say(method, "refused", f"{node.name} {why}")

    def _assignment(self, target: ast.expr, value: ast.expr) -> None:
        path = list(_steps(target))
        if len(path) < 2:
            return
        *parts, setting = path
        made = self.classes.get(parts[0], "") if len(parts) == 1 else ""
        owner = made or _PARTS.get(".".join(parts[-2:])) or _PARTS.get(parts[-1])
        if owner:
            self._judge(target, owner, setting, value, _rules(owner).get(setting))

    def _judge(self, node: ast.AST, owner: str, name: str, value: ast.expr, rule: Rule | None) -> None:
        """Say what becomes of an argument's value, as far as the text shows the value."""
        where = f"{owner}.{name}"
        try:
            given = literal(value)
        except ValueError:
            if isinstance(rule, Only) and getattr(value, "attr", getattr(value, "id", None)) != rule.value:
                self._say(node, "note", f"{where} must evaluate to {rule.value!r}: {rule.why}")
            elif isinstance(rule, Ignored) and ast.unparse(value) not in rule.quiet:
                self._say(node, "warned", f"{where} has no effect: {rule.why}")
            return
        if rule:
            refused = refusal(rule, where, given)
        else:
            refused = wrong_type(stated_type(owner, name), where, given) or out_of_range(where, name, given)
        if refused and given != stated_default(owner, name):
            self._say(node, "refused", refused.rstrip("."))
        elif isinstance(rule, Ignored | Keys):
            told = notice(rule, _NoDefaults, where, {name: given})
            if told and given != stated_default(owner, name):
                self._say(node, "warned", told.rstrip("."))

    def _text(self, node: ast.Constant) -> None:
        value = str(node.value)
        if value == "NEMO_HOME":
            self._say(node, "note", "NEMO_HOME: imported models are kept in $MIXTRAL_RECIPES_HOME")
        elif value.endswith("-last"):
            self._say(
                node,
                "note",
                f"{value}: no checkpoint has this name; use the run's name or folder for its newest checkpoint",
            )
        elif value.startswith("nvcr.io/nvidia/nemo:"):
            self._say(node, "note", f"{value}: NeMo's image does not contain mixtral-recipes; build one that does")


@functools.cache
def offered(ours: str) -> frozenset[str]:
    """The names that a module below ``mixtral_recipes.`` hands out under NeMo's path, read from its text."""
    found = {*PUBLIC, *THEIRS, "peft", "recipes", "adam", "logging"}
    for path in {_PACKAGE_FOLDER, _PACKAGE_FOLDER / ours.replace(".", "/")}:
        files = [path / "__init__.py", *path.glob("*.py")] if path.is_dir() else [path.with_suffix(".py")]
        found |= {file.stem for file in files}
        for node in ast.walk(ast.parse(files[0].read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                found |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Compare):  # of a module's `__getattr__`
                found |= {str(each.value) for each in node.comparators if isinstance(each, ast.Constant)}
    return frozenset(found)


def _free_lines(python: str) -> set[int]:
    """The lines above which a remark changes nothing: not those that a string or a backslash carries on to."""
    tokens = tokenize.generate_tokens(io.StringIO(python).readline)
    return {1} | {token.start[0] + 1 for token in tokens if token.type in (tokenize.NEWLINE, tokenize.NL)}


class _NoDefaults:
    """Stands for a class whose defaults are looked up in its text."""


def _rules(name: str | None) -> dict[str, Rule]:
    base = {"DoRA": "LoRA", "WarmupHoldPolicyScheduler": "WarmupPolicyScheduler"}.get(name or "")
    if name and name.startswith("MixtralConfig"):
        base, name = "MixtralConfig", "MixtralConfig"
    found = dict(CALLS[base].rules) if base else {}
    found |= CALLS[name].rules if name in CALLS else {}
    return {argument: rule for argument, rule in found.items() if not isinstance(rule, Renamed)}


def _steps(node: ast.expr) -> Iterator[str]:
    """The names of ``a.b[0].c``, without what stands in brackets."""
    if isinstance(node, ast.Attribute):
        yield from _steps(node.value)
        yield node.attr
    elif isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Subscript):
        yield from _steps(node.value)

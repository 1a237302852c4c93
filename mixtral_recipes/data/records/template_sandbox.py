"""Chat templates are programs of a model's author: they are run with a bound on their steps, memory and output.

transformers' sandbox keeps a template from files and from Python's insides, and lets it loop and grow without end.
Here everything that repeats (loops, calls, filters) is counted, and whatever makes a text or a list longer is charged
for its length before it is made.
"""

import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar
from typing import Any, cast

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from mixtral_recipes.errors import DataError, in_short

MOST_STEPS = 2_000_000  # a turn of Mixtral's template takes about ten
MOST_CHARACTERS = 256 << 20  # made while one conversation is rendered
LONGEST_S = 10.0
LONGEST_TEMPLATE = 1 << 20  # characters; the longest on the Hub have some ten thousand
_ELEMENT = 64  # what an element of a list counts for
_LARGEST_ARGUMENT = 100_000
_WIDE = re.compile(r"%[^%a-zA-Z]*(\d{4,}|\*)|\{[^{}]*:[^{}]*(\d{4,}|\{)")

type Span = tuple[int, int]


class _Budget:
    def __init__(self) -> None:
        self.steps, self.left, self.until = MOST_STEPS, MOST_CHARACTERS, time.monotonic() + LONGEST_S

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise SecurityError(f"it takes more than {MOST_STEPS:,} steps")
        if not self.steps % 256 and time.monotonic() > self.until:
            raise SecurityError(f"it takes longer than {LONGEST_S:g} s")

    def make(self, characters: int) -> None:
        self.step()
        self.left -= characters
        if self.left < 0:
            raise SecurityError(f"it makes texts and lists of more than {MOST_CHARACTERS:,} characters")

    def hold(self, value: Any) -> None:
        """Charge a value for all that would be written if it were: a list in a list twice counts twice."""
        if isinstance(value, str):
            self.make(len(value))
        elif isinstance(value, dict):
            for name, inner in value.items():
                self.make(_ELEMENT)
                self.hold(name)
                self.hold(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                self.make(_ELEMENT)
                self.hold(inner)


_budget: ContextVar[_Budget] = ContextVar("budget of a chat template")


def render(
    template: str,
    special: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    where: object,
    *,
    tools: Any = None,
    prompt: bool = False,
) -> tuple[str, list[Span]]:
    """A conversation's text, and the stretches of it that the template marks as the assistant's.

    Args:
        template: The template.
        special: The tokenizer's special tokens, by transformers' names.
        messages: The conversation, as plain data.
        where: What it is, for messages.
        tools: JSON schemas of tools; None where there are none.
        prompt: Whether the beginning of an answer follows.

    Raises:
        DataError: the template is invalid, refuses the conversation, or takes too long or too much memory.
    """
    try:
        return rendered(
            template, **{**special, "messages": messages, "tools": tools, "documents": None},
            add_generation_prompt=prompt,
        )  # fmt: skip
    except Exception as error:  # a template raises what it likes
        raise DataError(f"{where}: the chat template refuses this conversation ({in_short(error)}).") from error


def rendered(template: str, **variables: Any) -> tuple[str, list[Span]]:
    """What a template makes of variables, and the stretches it marks.

    Raises:
        jinja2.TemplateError: it is not a template, or takes too long or too much memory.
        Exception: whatever its expressions raise.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise SecurityError(f"it has {len(template):,} characters; the limit is {LONGEST_TEMPLATE:,}")
    compiled = _compiled(template)
    budget = _Budget()
    token = _budget.set(budget)
    blocks: list[str] = []
    spans: list[Span] = []
    try:
        with compiled.environment.activate_tracker(blocks, spans):
            for block in compiled.generate(**variables):
                budget.make(len(block))
                blocks.append(block)
    finally:
        _budget.reset(token)
    return "".join(blocks), spans


@functools.lru_cache
def _compiled(template: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    theirs = cast(Any, _compile_jinja_template)("").environment
    environment = _Bounded(
        trim_blocks=True, lstrip_blocks=True, extensions=[type(one) for one in theirs.iter_extensions()]
    )
    environment.filters = {name: _counted_filter(name, found) for name, found in theirs.filters.items()}
    environment.globals = {name: found for name, found in theirs.globals.items() if name != "lipsum"}
    return environment.from_string(template)


class _Bounded(ImmutableSandboxedEnvironment):
    """The sandbox, with a budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if operator == "%" and isinstance(left, str):
            _refuse_wide(left)
        elif operator == "**":
            bits = left.bit_length() * abs(right) if isinstance(left, int) and isinstance(right, int) else 0
            if bits > 1 << 12:
                raise SecurityError("it raises a number to a power that no template needs")
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, Sized) and isinstance(other, int):
                    budget.make(len(one) * max(other, 0) * (1 if isinstance(one, str) else _ELEMENT))
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            budget.make(len(left) + len(right))
            return left + right
        return self.held(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # of `str.format`, which the sandbox replaces
        _check_arguments(getattr(obj, "__name__", ""), (getattr(method, "__self__", None), *args), kwargs)
        return self.held(super().call(context, obj, *args, **kwargs))

    def joined(self, *parts: Any) -> str:
        """What ``~`` makes."""
        texts = [str(part) for part in parts]
        _budget.get().make(sum(map(len, texts)))
        return "".join(texts)

    def part(self, value: Any, *bounds: Any) -> Any:
        """What ``[a:b:c]`` makes."""
        return self.held(value[slice(*bounds)])

    def held(self, made: Any) -> Any:
        """Anything that was made."""
        _budget.get().hold(made)
        return made

    def each(self, value: Any) -> "_Counted":
        """What a loop goes through."""
        return _Counted(value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Routed().visit(super()._parse(source, name, filename))


class _Routed(NodeTransformer):
    """Lets loops, ``~``, ``[a:b]`` and lists go through the environment, as jinja does with calls and operators."""

    def _call(self, node: nodes.Node, name: str, arguments: list[Any]) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = self._call(node, "each", [node.iter])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return self._call(node, "joined", node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)]
        return self._call(node, "part", [node.node, *bounds])

    def _literal(self, node: Any) -> nodes.Expr:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or not list(node.find_all((nodes.Name, nodes.Call, nodes.Getattr))):
            return node
        return self._call(node, "held", [node])

    visit_List = visit_Tuple = visit_Dict = _literal


class _Counted:
    """Something to loop over, each element a step."""

    def __init__(self, value: Any) -> None:
        if not isinstance(value, Sized):
            value = list(itertools.islice(value, MOST_STEPS))
        self._value: Any = value

    def __len__(self) -> int:
        return len(self._value)

    def __iter__(self) -> Iterator[Any]:
        for element in self._value:
            _budget.get().step()
            yield element


def _counted_filter(name: str, found: Callable[..., Any]) -> Callable[..., Any]:
    first = int(hasattr(found, "jinja_pass_arg"))  # before the value stands the context

    @functools.wraps(found)
    def counted(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(name, args[first:], kwargs)
        made = found(*args, **kwargs)
        _budget.get().hold(made)
        return made

    return counted


def _check_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Charge what a call is about to make where it can be far longer than what it is given."""
    budget = _budget.get(None)
    if budget is None:  # while a template is compiled, constant expressions are worked out
        raise nodes.Impossible
    numbers = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, int)]
    if name != "range" and any(abs(number) > _LARGEST_ARGUMENT for number in numbers):
        raise SecurityError(f"{name} gets a number above {_LARGEST_ARGUMENT:,}")
    subject = args[0] if args else None
    if name == "replace" and len(args) > 2 and isinstance(subject, str):
        budget.make(subject.count(str(args[1])) * len(str(args[2])))
    elif name == "join":
        parts = subject if not isinstance(subject, str) else args[1] if len(args) > 1 else subject
        glue = next((value for value in args if isinstance(value, str)), "") + str(kwargs.get("d", ""))
        if isinstance(parts, Sized):
            whole = sum(len(part) if isinstance(part, str) else 0 for part in cast(Any, parts))
            budget.make(whole + len(glue) * len(parts))
    elif name == "wordwrap" and any(
        isinstance(value, str) and len(value) > 80 for value in (*args[1:], *kwargs.values())
    ):
        raise SecurityError("wordwrap inserts long texts between lines")
    elif name == "translate":
        raise SecurityError("translate is not allowed in templates")
    elif name == "expandtabs" and isinstance(subject, str):
        budget.make(subject.count("\t") * max([8, *numbers]))
    elif name in ("format", "format_map") and isinstance(subject, str):
        _refuse_wide(subject)
    elif name == "sum" and any(isinstance(value, Sized) for value in (*args[2:], *kwargs.values())):
        raise SecurityError("sum adds numbers only")
    elif name == "indent" and isinstance(subject, str):
        budget.make((subject.count("\n") + 1) * max([4, *numbers]))


def _refuse_wide(text: str) -> None:
    if _WIDE.search(text):
        raise SecurityError(f"the format {text[:40]!r} asks for a width that no template needs")

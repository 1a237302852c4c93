"""Plain data against a type: the place, the value and the rule are told."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from msgspec import Meta

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.system.schema import Count, Moment, Sha256, fits, typed


class Entry(TypedDict):
    size: Count
    sha256: NotRequired[Sha256]


class File(TypedDict, total=False):
    files: dict[str, Entry]
    rows: list[dict[str, list[int]]]
    share: Annotated[float, Meta(ge=0, le=1)]
    when: Moment
    kind: Literal["full", "adapter"]


@dataclass
class Run:
    name: str
    nodes: Count = 1
    command: tuple[str, ...] = ()
    table: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (
            {"files": {"ok": {"size": 1}, "q/x y": {"size": True}}},
            "files.q/x y.size=True is not allowed; it must be a whole number",
        ),
        ({"files": {"a": {"size": 1.5}}}, "files.a.size=1.5 is not allowed; it must be a whole number"),
        ({"files": {"a": {"size": "3"}}}, "files.a.size='3' is not allowed; it must be a whole number"),
        ({"share": "0.5"}, "share='0.5' is not allowed; it must be a number"),
        ({"files": {"a": {"size": -1}}}, "files.a.size=-1 is not allowed; it must be a whole number >= 0"),
        ({"files": {"a": {"size": 1 << 60}}}, "a whole number <= 9007199254740992"),
        ({"files": {"a": {}}}, "files.a.size is required but missing"),
        ({"files": {"a": {"size": 1, "sha256": "../x"}}}, "files.a.sha256='../x' is not allowed"),
        ({"files": []}, "files=[] is not allowed; it must be a table"),
        ({"rows": [{"a": [1]}, {"b": [1], "c": [1, "x"]}]}, "rows[1].c[1]='x' is not allowed; it must be a whole"),
        ({"rows": "text"}, "rows='text' is not allowed; it must be a list"),
        ({"share": True}, "share=True is not allowed; it must be a number"),
        ({"share": 1.5}, "share=1.5 is not allowed; it must be a number <= 1.0"),
        ({"share": float("nan")}, "share=nan is not allowed"),
        ({"when": 1e18}, "when=1e+18 is not allowed"),
        ({"kind": "half"}, "kind='half' is not allowed; it must be one of the allowed values"),
        ([], "[] is not allowed; it must be a table"),
        ({"share": "x" * 9999}, "share='xxxx"),
    ],
)
def test_what_does_not_fit(value: Any, told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        typed(value, File, "m.json", CheckpointError)
    assert str(caught.value).startswith("m.json: ")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 200
    assert not fits(value, File)


def test_what_fits_is_an_instance_and_other_names_are_let_be() -> None:
    found = typed({"name": "a", "command": ["x", "y"], "newer": 1}, Run, "run.json", CheckpointError)
    assert found == Run("a", command=("x", "y"))
    with pytest.raises(CheckpointError, match=r"run\.json: command='xy' is not allowed; it must be a list"):
        typed({"name": "a", "command": "xy"}, Run, "run.json", CheckpointError)

"""What the documents link to and name exists: pages, headings, files."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import yaml

from tests.unit.docs.documents import DOCUMENTS, ROOT, Place, exists, inline_code

LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
# What users have, and what other projects call theirs.
ELSEWHERE = {"setup.py", "code.json"}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file: Path) -> None:
    for path, heading in LINK.findall(file.read_text()):
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), f"{file.relative_to(ROOT)} links to {path}, which does not exist"
        if heading:
            assert heading in headings(target), f"{path} has no heading #{heading}"


def headings(file: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    found = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in found}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_that_are_named_exist(file: Path) -> None:
    missing = [str(place) for place in inline_code(file) if _is_ours(place) and not exists(place.text)]
    assert not missing


def test_names_in_a_step_are_in_the_files_it_names() -> None:
    """A step of docs/extending.md names files, and what is in them."""
    steps = re.findall(r"^\d\. (.*?)(?=^\d\. |^#|\n\n|\Z)", (ROOT / "docs/extending.md").read_text(), re.M | re.S)
    assert len(steps) > 15
    for step in steps:
        codes = re.findall(r"`([^`\s]+)`", step)
        texts = [path.read_text() for code in codes for path in _files_of(code)]
        names = [code for code in codes if re.fullmatch(r"[A-Za-z]\w+", code)]
        assert not [name for name in names if not any(re.search(rf"\b{name}\b", text) for text in texts)], step
        for name, code in re.findall(r"`(\w+)` in\s`([^`]+\.py)`", step):
            text = "".join(path.read_text() for path in _files_of(code))
            assert re.search(rf"^(def |class |){name}\b", text, re.M), f"{name} is not in {code}"


def _files_of(code: str) -> list[Path]:
    """The files that a path in a step means."""
    pattern = re.sub(r"<\w+>", "*", code)
    folders = (ROOT, ROOT / "mixtral_recipes")
    return [path for folder in folders for path in folder.glob(pattern)] if code.endswith(".py") else []


def _is_ours(place: Place) -> bool:
    """Whether a piece of code names a file or folder of this tree."""
    text = place.text
    if text in ELSEWHERE or not re.fullmatch(r"[\w./<>*-]+", text) or text.startswith((".", "/")):
        return False
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()}
    return text.endswith((".py", ".sh")) or ("/" in text and text.partition("/")[0] in tops - {"data"})


def test_python_is_given_what_it_can_run() -> None:
    called = [place for file in DOCUMENTS for place in inline_code(file) if place.text.startswith("python ")]
    assert called
    for place in called:
        _, first, *rest = place.text.split()
        path = "/".join(rest[0].split(".")) + ".py" if first == "-m" else first
        assert exists(path), str(place)
        assert "__main__" in next(ROOT.glob(path)).read_text(), str(place)


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), _AnyTag)
    listed: list[str] = []

    def collect(entry: object) -> None:
        if isinstance(entry, str):
            listed.append(entry)
        for child in entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else ():
            collect(child)

    collect(config["nav"])
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(pages)


class _AnyTag(yaml.SafeLoader):
    """Python names in the configuration are left alone."""


_AnyTag.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_python_parses_and_imports_what_is_there(file: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mixtral_recipes"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module} has no {name.name}"
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "llm":
                assert hasattr(importlib.import_module("mixtral_recipes"), node.attr), f"llm has no {node.attr}"

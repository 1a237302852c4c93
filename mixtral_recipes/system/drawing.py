"""Figures drawn by matplotlib, for a page that follows the reader's theme and for papers.

matplotlib is imported when something is drawn: it takes half a second that no other command should wait for.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from xml.etree import ElementTree

# The light theme's colours, which is what a PNG shows. In an SVG each becomes the page's CSS variable of its name, so
# no two may be equal.
PALETTE = {
    "ink": "#1c2430",
    "soft": "#5d6b7e",
    "line": "#e3e7ed",
    "card": "#ffffff",
    "a": "#2463c7",
    "b": "#c2501a",
}
_PNG_DPI = 300
_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"


@dataclass
class Drawing:
    """A figure and the texts shown under the pointer.

    Attributes:
        figure: A `matplotlib.figure.Figure`.
        titles: Group id -> one title for the group, or one for each of its markers.
    """

    figure: Any
    titles: dict[str, list[str]] = field(default_factory=dict)

    def hover(self, artist: Any, titles: Sequence[str]) -> None:
        """Give an artist a title, or each marker of a line one."""
        group = f"hover{len(self.titles)}"
        artist.set_gid(group)
        self.titles[group] = list(titles)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Our look, whatever the user's matplotlibrc says; draw inside of it."""
    import matplotlib

    soft, line = PALETTE["soft"], PALETTE["line"]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 7, "axes.labelsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
                "text.color": PALETTE["ink"], "axes.labelcolor": soft, "xtick.labelcolor": soft,
                "ytick.labelcolor": soft, "legend.labelcolor": soft, "legend.frameon": False,
                "xtick.major.size": 0, "ytick.major.size": 0, "axes.edgecolor": line, "axes.linewidth": 0.6,
                "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False,
                "axes.facecolor": "none", "axes.axisbelow": True, "grid.color": line, "grid.linewidth": 0.6,
                "lines.linewidth": 1.1, "lines.markersize": 3.2, "patch.linewidth": 0,
                "svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "mixtral-recipes",
            }
        )  # fmt: skip
        yield


def blank(width: float, height: float) -> Drawing:
    """An empty figure of a size in inches. No pyplot: nothing is kept open, and no window system is asked for."""
    from matplotlib.figure import Figure

    return Drawing(Figure(figsize=(width, height), layout="constrained"))


def render(drawing: Drawing, kind: Literal["png", "svg"], name: str = "") -> bytes:
    """The file's bytes: a PNG on white at print resolution, or an ``<svg>`` element to put into a page.

    The element takes the page's font and CSS variables for its colours.

    Args:
        drawing: What to render.
        kind: Format.
        name: Tells an SVG's ids from those of the page's other drawings.
    """
    buffer = io.BytesIO()
    with style():
        if kind == "png":
            drawing.figure.savefig(buffer, format="png", dpi=_PNG_DPI, facecolor=PALETTE["card"])
            return buffer.getvalue()
        drawing.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(buffer.getvalue().decode(), drawing.titles, name)


def _for_page(svg: str, titles: dict[str, list[str]], name: str) -> bytes:
    for variable, colour in PALETTE.items():
        svg = svg.replace(colour, f"var(--{variable})")
    root = ElementTree.fromstring(re.sub(r"font-family: [^;\"]*;? ?", "", svg))
    # Who drew it, and a style sheet that would be the whole page's.
    for unwanted in (root.find(f"{{{_SVG}}}metadata"), root.find(f"{{{_SVG}}}defs[{{{_SVG}}}style]")):
        if unwanted is not None:
            root.remove(unwanted)
    for element in root.iter():
        _add_titles(element, titles.get(element.get("id", ""), []))
    _rename_ids(root, name)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(root)


def _add_titles(element: ElementTree.Element, titles: list[str]) -> None:
    if not titles:
        return
    markers = element.findall(f".//{{{_SVG}}}use")
    for place, title in zip(markers or [element], titles, strict=True):
        child = ElementTree.Element(f"{{{_SVG}}}title")
        child.text = title
        place.insert(0, child)


def _rename_ids(root: ElementTree.Element, name: str) -> None:
    """Drop the ids that nothing refers to, and make the others differ from those of the page's other drawings."""
    used = set(re.findall(r"#([\w-]+)", ElementTree.tostring(root, encoding="unicode")))
    for element in root.iter():
        if element.get("id") in used:
            element.set("id", f"{name}-{element.get('id')}")
        else:
            element.attrib.pop("id", None)
        if _HREF in element.attrib:
            element.set(_HREF, f"#{name}-{element.attrib[_HREF][1:]}")
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("#", f"#{name}-"))

"""Figures of a comparison, as SVG for the report and as PNG for everything else, in one style."""

import hashlib
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path

from ssl_vit_eval.compare.arms import FIRST

DPI = 200
INK, SOFT = "#1b1f24", "#57606a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0609a", "#4aa3d8", "#8c6d1f")  # after Okabe and Ito: told apart by the colour-blind
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[tuple[float, ...], ...] = ((), (4.5, 1.5), (1.2, 1.2), (6.0, 1.5, 1.2, 1.5), (3.0, 1.0, 1.0, 1.0, 1.0, 1.0))
COLUMNS = 3  # of panels
LINE = 0.2  # inches of a line of text
SHORTEST = 8  # characters of a line
STYLE = dict(matplotlib.rc_params_from_file(Path(__file__).parent / "templates/report.mplstyle", use_default_template=False))
T = TypeVar("T")


@dataclass(frozen=True)
class Plot:
    """A figure. name: of its files; title and note: plain text; png: its bytes; svg: the same as a drawing, empty if there is none.

    The title is part of a drawing, the note is not.
    """

    name: str
    title: str
    svg: str
    png: bytes
    note: str = ""

    @property
    def file(self) -> str:
        """Where a report has it."""
        return f"plots/{self.name}.{'svg' if self.svg else 'png'}"


class Look(NamedTuple):
    """How a readout is drawn: what its colour says, marker and dashes say in grey too."""

    colour: str
    marker: str
    dashes: tuple[float, ...]


def looks(specs: Iterable[str]) -> dict[str, Look]:
    """A look for each spec (or other name), in their order behind cls, gap and register, which always have their own."""
    names = set(given := list(specs))
    order = enumerate(dict.fromkeys([*FIRST, *given]))
    return {name: Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)]) for i, name in order if name in names}


def name_of(kind: str, *words: str, key: object = None) -> str:
    """A file name, and the beginning of ids: the kind, the words, and a hash that differs where words or `key` do."""
    readable = [re.sub(r"[^A-Za-z0-9_.]+", "-", word).strip("-.") for word in words]
    return "-".join([kind, *filter(None, readable), hashlib.sha256(repr((words, key)).encode()).hexdigest()[:6]])


def draw(name: str, title: str, size: tuple[float, float], paint: Callable[[Figure], None], note: str = "") -> Plot:
    """What `paint` puts into a new figure, in the one style and under its title; the same bytes every time.

    size: inches without title and legend, which add the height that they take."""
    style: Any = STYLE | {"svg.hashsalt": name}
    with matplotlib.rc_context(style):
        head = wrapped(title, size[0] - 0.2, 10.0, "bold")
        figure = Figure(figsize=(size[0], size[1] + LINE * (1 + head.count("\n"))), layout="constrained")
        figure.suptitle(head, x=0.01, ha="left", fontsize=10, fontweight="bold")
        paint(figure)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    return Plot(name, title, svg.getvalue(), png.getvalue(), note)


def draw_panels(
    name: str,
    title: str,
    panels: Mapping[str, T],
    paint: Callable[[Axes, T], Mapping[str, Artist]],
    note: str = "",
    height: float = 2.5,
    share: bool = True,
) -> Plot:
    """A panel under each title, in rows of three and of one scale if they `share` it; `paint` gives what belongs into the one legend."""
    columns, rows = min(len(panels), COLUMNS), -(-len(panels) // COLUMNS)

    def paint_all(figure: Figure) -> None:
        grid: list[Axes] = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False).flatten().tolist()
        handles: dict[str, Artist] = {}
        for axes, (head, content) in zip(grid, panels.items(), strict=False):
            axes.tick_params(labelbottom=True, labelleft=True)
            axes.set_title(wrapped(head, 3.0))
            handles |= paint(axes, content)
        for axes in grid[len(panels) :]:
            axes.remove()
        if handles:
            legend(figure, handles)

    return draw(name, title, (1.0 + 3.1 * columns, 0.2 + height * rows), paint_all, note)


def curve(axes: Axes, look: Look, x: Sequence[float | int], y: Sequence[float | int], spread: Sequence[float] = (), **style: Any) -> Line2D:
    """A line, with ± `spread` as a band where it is given."""
    if len(spread):
        low, high = ([value + sign * width for value, width in zip(y, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=look.colour, alpha=0.13, linewidth=0)
    drawn: dict[str, Any] = {"marker": look.marker, "linewidth": 1.5, "markersize": 4.5} | style
    return axes.plot(x, y, color=look.colour, dashes=look.dashes, **drawn)[0]


def bar(axes: Axes, low: float, high: float, value: float, y: int, colour: str, marker: str) -> None:
    """A value with its interval."""
    axes.plot([low, high], [y, y], color=INK, linewidth=1.5, solid_capstyle="butt")
    axes.scatter([value], [y], s=54, marker=marker, facecolor=colour, edgecolor=INK, zorder=3)


def wrapped(text: str, inches: float, size: float = 9.0, weight: str = "normal") -> str:
    """Lines that are at most so wide at this size in points; a name that is longer than a line is broken."""
    font = FontProperties(family=STYLE["font.sans-serif"][0], size=size, weight=weight)
    count = len(text)
    while count > SHORTEST and any(_width(line, font) > inches for line in textwrap.wrap(text, count)):
        count = min(count - 1, int(0.95 * count))
    return "\n".join(textwrap.wrap(text, max(count, SHORTEST)))


def legend(figure: Figure, handles: Mapping[str, Artist]) -> None:
    """Below the axes, in as many columns as fit; the figure grows by it."""
    size, beside = STYLE["legend.fontsize"], 0.6  # of inches: the line or marker, and what is between the columns
    width, height = figure.get_size_inches()
    names = [wrapped(name, width - beside - 0.2, size) for name in handles]
    font = FontProperties(family=STYLE["font.sans-serif"][0], size=size)
    widest = max((_width(line, font) for name in names for line in name.split("\n")), default=0.0)
    columns = max(1, min(len(names), int((width - 0.1) / (widest + beside))))
    lines = -(-len(names) // columns) + sum(name.count("\n") for name in names)
    figure.set_size_inches(width, height + LINE * lines)
    figure.legend(list(handles.values()), names, loc="outside lower left", ncols=columns, handlelength=2.6)


def _width(text: str, font: FontProperties) -> float:
    """Inches."""
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72)

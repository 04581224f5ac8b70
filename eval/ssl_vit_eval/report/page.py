"""A report as data, chapters of blocks, and its two faces: one HTML file that needs nothing beside it, and Markdown with its images.

The HTML is made by `templates/page.html` and `blocks.html`; the files of a report replace those of the last one and nothing else.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from operator import methodcaller
from pathlib import Path
from textwrap import wrap
from typing import ClassVar, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from ssl_vit.errors import UsageError
from ssl_vit.files import write_atomically
from ssl_vit_eval.compare.verdict import Outcome
from ssl_vit_eval.report import table
from ssl_vit_eval.report.plotting import Plot
from ssl_vit_eval.report.table import Sheet, escape_markdown, slug

MARKER = '<meta name="generator" content="ssl-vit compare">'
MARKDOWN_MARKER = "<!-- written by ssl-vit compare -->"
DRAWING_BYTES = 1_500_000  # of embedded drawings, and
STORED_BYTES = 1_500_000  # of embedded PNG files; both take a third more as text: the file stays below 5 MB
FOLDERS = ("tables", "plots")
NAME = r"report\.(html|md)|(tables|plots)/\w[^/\\]*"
OURS = ".ssl-vit-report"  # the names of the files that the last report in a folder consists of
WIDTH = 120  # of text in a terminal
_PLAIN = ("plain", "soft", "note")


@dataclass(frozen=True)
class Text:
    """A paragraph. lead: its first words, in bold; style: a remark, a warning, or a verdict with its badge."""

    kind: ClassVar = "text"
    text: str
    style: Literal["plain", "soft", "note"] | Outcome = "plain"
    lead: str = ""

    @property
    def is_verdict(self) -> bool:
        return self.style not in _PLAIN


@dataclass(frozen=True)
class Bullets:
    """A list. style: "note" for warnings; title: of a list that is closed until it is clicked."""

    kind: ClassVar = "bullets"
    items: list[str]
    style: Literal["plain", "soft", "note"] = "plain"
    title: str = ""


@dataclass(frozen=True)
class Heading:
    kind: ClassVar = "heading"
    text: str


@dataclass(frozen=True)
class Listing:
    """A table; folded: closed until it is clicked. html: how it looks in the page, where it has a template of its own."""

    kind: ClassVar = "listing"
    sheet: Sheet
    folded: bool = False
    html: Markup | None = None


@dataclass(frozen=True)
class Figures:
    """Figures side by side, at least one. title: of figures that are closed until it is clicked."""

    kind: ClassVar = "figures"
    plots: list[Plot]
    title: str = ""

    @property
    def note(self) -> str:
        """What is noted of all of them, to be said once; empty where they differ."""
        return self.plots[0].note if len({plot.note for plot in self.plots}) == 1 else ""


Block = Text | Bullets | Heading | Listing | Figures


@dataclass(frozen=True)
class Chapter:
    """anchor: what a link in the contents leads to; short: its title there."""

    anchor: str
    short: str
    title: str
    blocks: list[Block]


_TEMPLATES = Environment(
    loader=PackageLoader("ssl_vit_eval.report"), autoescape=select_autoescape(["html"]), undefined=StrictUndefined, trim_blocks=True
)
_TEMPLATES.filters |= {
    "slug": slug,
    "md": escape_markdown,
    "lines": lambda text, indent="": "\n".join(wrap(text, WIDTH, subsequent_indent=indent)),
    "aligned": lambda frame: table.aligned([[name, *frame[name]] for name in frame]),
}


def template(name: str, **values: object) -> Markup:
    """A template of this folder, filled in; in one of HTML every value is escaped but Markup."""
    return Markup(_TEMPLATES.get_template(name).render(values))


def page(title: str, lead: Sequence[Text], chapters: Sequence[Chapter]) -> str:
    """The HTML file. What it may load and run is forbidden by its own policy, but for its style, its images and its one script."""
    asset = files("ssl_vit_eval.report").joinpath
    style, script = (Markup(asset(f"templates/{name}").read_text(encoding="utf-8")) for name in ("report.css", "report.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = Markup(f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{allowed}'")
    own = {"marker": Markup(MARKER), "policy": policy, "style": style, "script": script, "sources": _sources(chapters)}
    return template("page.html", title=title, lead=lead, chapters=chapters, **own)


def _sources(chapters: Sequence[Chapter]) -> dict[str, str]:
    """The addresses that hold the figures themselves, in their order until a budget is used up."""
    left, found = {"svg+xml": DRAWING_BYTES, "png": STORED_BYTES}, {}
    for plot in _plots(chapters):
        kind, content = ("svg+xml", plot.svg.encode()) if plot.svg else ("png", plot.png)
        if len(content) <= left[kind]:
            left[kind] -= len(content)
            found[plot.name] = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return found


def _plots(chapters: Sequence[Chapter]) -> list[Plot]:
    return [plot for chapter in chapters for block in chapter.blocks if isinstance(block, Figures) for plot in block.plots]


def plot_files(chapters: Sequence[Chapter]) -> dict[str, bytes]:
    """The content of `plots/NAME.png`, and of `plots/NAME.svg` where it was drawn; ValueError for two of one name."""
    plots = _plots(chapters)
    table.check_names("plots", [plot.name for plot in plots])
    return {f"plots/{plot.name}.png": plot.png for plot in plots} | {plot.file: plot.svg.encode() for plot in plots if plot.svg}


def markdown(title: str, lead: Sequence[Text], chapters: Sequence[Chapter]) -> str:
    """The same as Markdown; its figures are `plots/NAME.png` beside it."""
    return _without_gaps(template("report.md", marker=MARKDOWN_MARKER, title=title, lead=lead, chapters=chapters, table=table.markdown))


def text(lead: Sequence[Text], chapters: Sequence[Chapter]) -> str:
    """The same for a terminal, without its figures."""
    return _without_gaps(template("report.txt", lead=lead, chapters=chapters))


def _without_gaps(text: str) -> str:
    return re.sub("\n{3,}", "\n\n", str(text)).strip("\n") + "\n"


def check_out(out: Path) -> None:
    """UsageError for a folder that a report cannot be written into: a file, or one that holds a report which is not ours."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: name a folder, report.html is written into it")
    _check_free(out, ["report.html", "report.md", *(folder for folder in FOLDERS if not (out / folder).is_dir())])


def replace_files(out: Path, contents: Mapping[str, bytes]) -> None:
    """Write the files into `out`, each complete before it has its name; what the last report had and this one has not is removed.

    UsageError, before anything is written, as `check_out`, and for a file of one of these names that is not of the last report.
    """
    check_out(out)
    _check_free(out, contents)
    before = [name for name in _before(out) if name not in contents]
    for folder in FOLDERS:
        (out / folder).mkdir(parents=True, exist_ok=True)
    write_atomically(out / OURS, json.dumps([*contents, *before]))  # a kill leaves none unknown
    for name, content in contents.items():
        write_atomically(out / name, methodcaller("write", content))
    for name in before:
        (out / name).unlink(missing_ok=True)
    write_atomically(out / OURS, json.dumps(list(contents)))


def _before(out: Path) -> list[str]:
    """What the last report in the folder consists of; a list that was tampered with leads to nothing else."""
    try:
        names = json.loads((out / OURS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name in names if re.fullmatch(NAME, str(name))] if isinstance(names, list) else []


def _check_free(out: Path, names: Sequence[str] | Mapping[str, bytes]) -> None:
    before = _before(out)
    for path in (out / name for name in names if not (name in before and (out / name).is_file())):
        if path.exists() and not (path.suffix in (".html", ".md") and path.is_file() and _is_marked(path)):
            raise UsageError(f"{path} was not written by ssl-vit compare and is left alone: name another folder with --out")


def _is_marked(path: Path) -> bool:
    with open(path, encoding="utf-8", errors="replace") as file:
        start = file.read(1000)
    return MARKER in start or MARKDOWN_MARKER in start

"""A report as data, sections of blocks, and its two faces: one HTML file that needs nothing beside it, and Markdown with its pictures."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Literal

from ssl_vit_eval.compare.verdict import Outcome
from ssl_vit_eval.report import table
from ssl_vit_eval.report.plotting import Plot
from ssl_vit_eval.report.table import Sheet, escape_markdown

MARKER = '<meta name="generator" content="ssl-vit compare">'
MARKDOWN_MARKER = "<!-- written by ssl-vit compare -->"
DRAWING_BYTES = 1_500_000  # of embedded plots, and
PICTURE_BYTES = 1_500_000  # of embedded pictures, which take a third more as text: the file stays below 4 MB


@dataclass(frozen=True)
class Text:
    """A paragraph. lead: its first words, in bold; style: a remark, a warning, or a verdict with its badge."""

    text: str
    style: Literal["plain", "soft", "note"] | Outcome = "plain"
    lead: str = ""


@dataclass(frozen=True)
class Bullets:
    """A list. style: "note" for warnings; title: of a list that is closed until it is clicked."""

    items: list[str]
    style: Literal["plain", "soft", "note"] = "plain"
    title: str = ""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Listing:
    """A table; folded: closed until it is clicked."""

    sheet: Sheet
    folded: bool = False


@dataclass(frozen=True)
class Grid:
    """A table with a look of its own, trusted HTML, and the same numbers as a sheet."""

    html: str
    sheet: Sheet


@dataclass(frozen=True)
class Drawings:
    """Plots side by side, at least one. title: of plots that are closed until it is clicked."""

    plots: list[Plot]
    title: str = ""


@dataclass(frozen=True)
class Picture:
    """name: of its file; png: its bytes."""

    name: str
    caption: str
    png: bytes


Block = Text | Bullets | Heading | Listing | Grid | Drawings | Picture


@dataclass(frozen=True)
class Section:
    """anchor: what a link in the contents leads to; short: its title there."""

    anchor: str
    short: str
    title: str
    blocks: list[Block]


def page(title: str, lead: Sequence[Text], sections: Sequence[Section]) -> str:
    """The HTML file. What it may load and run is forbidden by its own policy, but for its style, its pictures and its one script."""
    asset = files("ssl_vit_eval.report").joinpath
    style, script = (asset(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{allowed}'"
    links = "".join(f'<a href="#{section.anchor}">{escape(section.short)}</a>' for section in sections)
    render = _Html()
    body = [f"<header><h1>{escape(title)}</h1>", *map(render.block, lead), f'<nav aria-label="contents">{links}</nav></header>']
    for section in sections:
        parts = "\n".join(map(render.block, section.blocks))
        body.append(f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>\n{parts}\n</section>')
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARKER}',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>ssl_vit: {escape(title)}</title>\n<style>\n{style}</style></head>\n<body>",
            *body,
            f"<script>{script}</script>\n</body></html>\n",
        ]
    )


def markdown(title: str, lead: Sequence[Text], sections: Sequence[Section]) -> str:
    """The same as Markdown; its pictures are `plots/NAME.png` beside it."""
    parts = [MARKDOWN_MARKER, f"# {escape_markdown(title)}", *map(_markdown, lead)]
    for section in sections:
        parts += [f"## {escape_markdown(section.title)}", *map(_markdown, section.blocks)]
    return "\n\n".join(parts) + "\n"


def picture_files(sections: Sequence[Section]) -> dict[str, bytes]:
    """The content of `plots/NAME.png`, and of `plots/NAME.svg` where it was drawn; ValueError for two of one name."""
    found: dict[str, bytes] = {}
    for block in (block for section in sections for block in section.blocks):
        new: dict[str, bytes] = {}
        for plot in block.plots if isinstance(block, Drawings) else []:
            new |= {f"plots/{plot.name}.png": plot.png, f"plots/{plot.name}.svg": plot.svg.encode()}
        if isinstance(block, Picture):
            new[f"plots/{block.name}.png"] = block.png
        if twice := found.keys() & new.keys():
            raise ValueError(f"two pictures are called {', '.join(sorted(twice))}")
        found |= new
    return found


class _Html:
    """Blocks as HTML; pictures are embedded in their order until a budget is used up, and what is left out is said."""

    def __init__(self) -> None:
        self._drawings, self._pictures = DRAWING_BYTES, PICTURE_BYTES

    def block(self, block: Block) -> str:
        match block:
            case Text(text, "plain" | "soft" | "note" as style, lead):
                return f'<p class="{style}">{f"<b>{escape(lead)}</b> " if lead else ""}{escape(text)}</p>'
            case Text(text, style, lead):
                badge = f'<span class="badge {table.slug(style)}">{escape(style)}</span>'
                return f'<p class="verdict {table.slug(style)}">{badge} {f"<b>{escape(lead)}</b> " if lead else ""}{escape(text)}</p>'
            case Bullets(items, style, title):
                points = f'<ul class="{style}">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'
                return f"<details><summary>{escape(title)}</summary>{points}</details>" if title else points
            case Heading(text):
                return f"<h3>{escape(text)}</h3>"
            case Listing(sheet, folded):
                shown = table.html(sheet, caption=not folded)
                return f"<details><summary>{escape(sheet.title)}</summary>{shown}</details>" if folded else shown
            case Grid(html, _):
                return html
            case Drawings(plots, title):
                shared = _shared(plots)
                panels = f'<div class="panels">{"".join(self._drawing(plot, shared) for plot in plots)}</div>'
                panels += f'<p class="soft">{escape(shared)}</p>' if shared else ""
                return f"<details><summary>{escape(title)}</summary>{panels}</details>" if title else panels
            case Picture():
                return self._picture(block)

    def _drawing(self, plot: Plot, shared: str) -> str:
        size = len(plot.svg.encode())
        if size > self._drawings:
            return f'<p class="soft">{escape(plot.title)}: plots/{escape(plot.name)}.svg is too large to be embedded here.</p>'
        self._drawings -= size
        note = f'<figcaption class="soft">{escape(plot.note)}</figcaption>' if plot.note and not shared else ""
        return f'<figure aria-label="{escape(plot.title)}">{plot.svg}{note}</figure>'

    def _picture(self, picture: Picture) -> str:
        if len(picture.png) > self._pictures:
            return f'<p class="soft">{escape(picture.caption)}: plots/{escape(picture.name)}.png is too large to be embedded here.</p>'
        self._pictures -= len(picture.png)
        source = base64.b64encode(picture.png).decode()
        caption = escape(picture.caption)
        return f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="data:image/png;base64,{source}"></figure>'


def _markdown(block: Block) -> str:
    match block:
        case Text(text, style, lead):
            words = " ".join(part for part in (f"**{escape_markdown(lead)}**" if lead else "", escape_markdown(text)) if part)
            if style in ("plain", "soft"):
                return words
            return f"> {words}" if style == "note" else f"> **{style}**: {words}"
        case Bullets(items):
            return "\n".join(f"- {escape_markdown(item)}" for item in items)
        case Heading(text):
            return f"### {escape_markdown(text)}"
        case Listing(sheet) | Grid(_, sheet):
            return table.markdown(sheet)
        case Drawings(plots):
            shared = _shared(plots)
            notes = ["" if shared else escape_markdown(plot.note) for plot in plots]
            parts = [part for plot, note in zip(plots, notes, strict=True) for part in (_image(plot.title, plot.name), note)]
            return "\n\n".join(part for part in [*parts, escape_markdown(shared)] if part)
        case Picture(name, caption):
            return _image(caption, name)


def _shared(plots: Sequence[Plot]) -> str:
    """The note that all of them have, to be said once; empty where they differ."""
    return plots[0].note if len({plot.note for plot in plots}) == 1 else ""


def _image(caption: str, name: str) -> str:
    return f"![{escape_markdown(caption)}](plots/{name}.png)"

"""Tables as data: written once, shown in the terminal, in the report, and as Markdown, CSV and LaTeX."""

import csv as csv_format
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal, NamedTuple

MISSING = "–"
LONG = 48  # characters; shorter text is not broken into lines
Style = Literal["", "code", "better", "worse", "no difference", "undecided"]

# what pdflatex would take for commands, lacks in its text fonts, or reads as an option behind the end of a line
LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "[": "{[}", "]": "{]}", "*": "{*}"},
    **{"–": "--", "…": r"\ldots{}", "·": r"\textperiodcentered{}", "±": r"$\pm$", "−": r"$-$", "×": r"$\times$", "○": r"$\circ$"},
    **{"≈": r"$\approx$", "∞": r"$\infty$", "→": r"$\rightarrow$", "↓": r"$\downarrow$", "α": r"$\alpha$", "≤": r"$\leq$"},
}


class Value(NamedTuple):
    """A cell: its text, and the number that it is sorted by and that a CSV file holds; None where it is only text.

    style: how it looks in a page, as code or as the badge of a verdict.
    """

    text: str
    number: float | None = None
    style: Style = ""


@dataclass(frozen=True)
class Sheet:
    """A table. name: of its files; title and note: plain text; lines: one cell for each of `head`; only_in_files: columns for CSV alone."""

    name: str
    title: str
    head: list[str]
    lines: list[list[Value]]
    note: str = ""
    only_in_files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for number, line in enumerate(self.lines, 1):
            if len(line) != len(self.head):
                raise ValueError(f"line {number} of {self.name} has {len(line)} cells for {len(self.head)} columns")

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers: they stand at the right."""
        return [any(line[place].number is not None for line in self.lines) for place in range(len(self.head))]

    def shown(self) -> "Sheet":
        """The table as it is read, without the columns that are only for files."""
        kept = [place for place, name in enumerate(self.head) if name not in self.only_in_files]
        lines = [[line[place] for place in kept] for line in self.lines]
        return replace(self, head=[self.head[place] for place in kept], lines=lines, only_in_files=())


def slug(*parts: str) -> str:
    """A file's name: what is neither letter nor digit becomes a hyphen."""
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(parts).lower()).strip("-.")[:80] or "table"


def text(sheet: Sheet) -> str:
    """For a terminal: title, aligned columns, note."""
    sheet = sheet.shown()
    cells = [sheet.head, *([value.text for value in line] for line in sheet.lines)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(sheet.head))]
    aligned = [
        "  ".join(
            f"{item:>{width}}" if right else f"{item:{width}}" for item, width, right in zip(line, widths, sheet.numeric, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([sheet.title, "", *aligned, *([sheet.note] if sheet.note else [])])


def html(sheet: Sheet, caption: bool = True) -> str:
    """A table, with its title as caption or without. A script makes it sortable by `data-sort`, or by text where there is none."""

    sheet = sheet.shown()

    def head(name: str, right: bool) -> str:
        return f'<th scope="col"{" class=number" if right else ""}>{escape(name)}</th>'

    def cell(value: Value, right: bool) -> str:
        sort = "" if value.number is None else f' data-sort="{_plain(value.number).replace("inf", "Infinity")}"'
        inside = escape(value.text)
        if value.style == "code":
            inside = f"<code>{inside}</code>"
        elif value.style:
            inside = f'<span class="badge {slug(value.style)}">{inside}</span>'
        kind = "number" if right else "long" if len(value.text) > LONG else ""
        return f"<td{f' class={kind}' if kind else ''}{sort}>{inside}</td>"

    numeric = sheet.numeric
    header = "".join(map(head, sheet.head, numeric))
    rows = "".join("<tr>" + "".join(map(cell, line, numeric)) + "</tr>\n" for line in sheet.lines)
    title = f"<caption>{escape(sheet.title)}</caption>" if caption else ""
    note = f'<p class="soft">{escape(sheet.note)}</p>' if sheet.note else ""
    return (
        f'<div class="wide"><table class="plain sortable">{title}<thead><tr>{header}</tr></thead>'
        f"<tbody>\n{rows}</tbody></table></div>{note}"
    )


def markdown(sheet: Sheet) -> str:
    """A table of GitHub's Markdown, title above and note below it."""
    sheet = sheet.shown()
    lines = [sheet.head, *([value.text for value in line] for line in sheet.lines)]
    rows = ["| " + " | ".join(map(escape_markdown, line)) + " |" for line in lines]
    rule = "|" + "|".join(" ---: " if right else " --- " for right in sheet.numeric) + "|"
    parts = [f"**{escape_markdown(sheet.title)}**", "\n".join([rows[0], rule, *rows[1:]])]
    return "\n\n".join([*parts, *([escape_markdown(sheet.note)] if sheet.note else [])])


def csv(sheet: Sheet) -> str:
    """Numbers in full, in the unit of their column; text as it is shown; what is missing stays empty."""
    file = io.StringIO()
    writer = csv_format.writer(file, lineterminator="\n")
    writer.writerow(sheet.head)
    for line in sheet.lines:
        cells = zip(line, sheet.numeric, strict=True)
        writer.writerow([_field(value, right) for value, right in cells])
    return file.getvalue()


def latex(sheet: Sheet) -> str:
    """A floating table; the document must use the package booktabs."""
    sheet = sheet.shown()
    columns = "".join("r" if right else "l" for right in sheet.numeric)
    lines = [" & ".join(map(escape_latex, line)) + r" \\" for line in (sheet.head, *([value.text for value in of] for of in sheet.lines))]
    caption = " ".join(escape_latex(part.rstrip(".")) + "." for part in (sheet.title, sheet.note) if part)
    parts = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0]]
    return "\n".join([*parts, r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def table_files(sheets: Sequence[Sheet]) -> dict[str, str]:
    """The content of `tables/NAME.csv` and `tables/NAME.tex` of every sheet; ValueError for two of one name."""
    if twice := {sheet.name for sheet in sheets if sum(other.name == sheet.name for other in sheets) > 1}:
        raise ValueError(f"two tables are called {', '.join(sorted(twice))}")
    return {f"tables/{sheet.name}.{ending}": write(sheet) for sheet in sheets for ending, write in (("csv", csv), ("tex", latex))}


def escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(text.split()))


def escape_latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))


def _field(value: Value, numeric: bool) -> str:
    if value.number is not None:
        return _plain(value.number)
    return "" if numeric or value.text == MISSING else value.text


def _plain(number: float) -> str:
    return str(int(number)) if number.is_integer() else repr(number)

"""Tables as pandas frames: numbers in full for files, the same numbers as text for readers."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import pandas as pd

from ssl_vit_eval.report.text import WORDS

MISSING = "–"
Forms = Mapping[str, str | Callable[[Any], str]]
LATEX = str.maketrans(WORDS["latex"])


def frame_of(records: Sequence[Mapping[str, Any]] | Sequence[Sequence[Any]], columns: Iterable[str] = ()) -> pd.DataFrame:
    """A line for each record, whose values stay what they are: whole numbers next to missing ones do not become fractions."""
    return pd.DataFrame(list(records), columns=list(columns) or None, dtype=object)


class Shown(float):
    """A number that is read as its text."""

    text: str

    def __new__(cls, number: float, text: str) -> "Shown":
        shown = super().__new__(cls, number)
        shown.text = text
        return shown


@dataclass(frozen=True, eq=False)
class Sheet:
    """A table. name: of its files; title and note: plain text; frame: numbers in full, None for what is missing.

    forms: how the values of a column read, as a format or a function; a `Shown` knows its text. styles: columns of code, and of verdicts,
    which are shown as badges. only_in_files: columns for CSV alone.
    """

    name: str
    title: str
    frame: pd.DataFrame
    note: str = ""
    forms: Forms = field(default_factory=dict)
    styles: Mapping[str, Literal["code", "badge"]] = field(default_factory=dict)
    only_in_files: tuple[str, ...] = ()

    @cached_property
    def shown(self) -> pd.DataFrame:
        """The table as it is read: text alone, without the columns that are only for files."""
        return pd.DataFrame({name: self._texts(name) for name in self.frame if name not in self.only_in_files}, dtype=object)

    def _texts(self, column: str) -> list[str]:
        form = self.forms.get(column, str)
        write = form.format if isinstance(form, str) else form
        values = self.frame[column]
        return [MISSING if is_missing(value) else value.text if isinstance(value, Shown) else write(value) for value in values]

    @cached_property
    def numeric(self) -> dict[str, bool]:
        """Which columns hold numbers: they stand at the right."""
        return {name: any(map(_is_number, self.frame[name])) for name in self.frame}

    def entries(self) -> list[list[tuple[str, str, str]]]:
        """Line by line, of each value its column, its text, and what it is sorted by ("" where that is the text)."""
        columns = []
        for name, texts in self.shown.items():
            sorts = [str(_plain(value)) if _is_number(value) else "" for value in self.frame[name]]
            columns.append([(str(name), text, sort) for text, sort in zip(texts, sorts, strict=True)])
        return [list(line) for line in zip(*columns, strict=True)]


def slug(*parts: str) -> str:
    """A file's name: what is neither letter nor digit becomes a hyphen."""
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(parts).lower()).strip("-.")[:80] or "table"


def aligned(columns: Sequence[Sequence[str]]) -> str:
    """Columns of text side by side, names at the left, all else at the right."""
    texts = []
    for place, column in enumerate(columns):
        width = max(map(len, column))
        texts.append([f"{text:>{width}}" if place else f"{text:{width}}" for text in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*texts, strict=True))


def markdown(sheet: Sheet) -> str:
    """A table of GitHub's Markdown, title above and note below it."""
    lines = [list(sheet.shown), *sheet.shown.to_numpy().tolist()]
    rows = ["| " + " | ".join(map(escape_markdown, line)) + " |" for line in lines]
    rule = "|" + "|".join(" ---: " if sheet.numeric[name] else " --- " for name in sheet.shown) + "|"
    parts = [f"**{escape_markdown(sheet.title)}**", "\n".join([rows[0], rule, *rows[1:]]), escape_markdown(sheet.note)]
    return "\n\n".join(filter(None, parts))


def csv(sheet: Sheet) -> str:
    """Numbers in full, in the unit of their column; text as it is shown; what is missing stays empty."""

    def field_of(value: object, numeric: bool) -> object:
        return _plain(value) if _is_number(value) else "" if numeric or is_missing(value) else value

    fields = {name: [field_of(value, sheet.numeric[name]) for value in sheet.frame[name]] for name in sheet.frame}
    return str(pd.DataFrame(fields, dtype=object).to_csv(index=False, lineterminator="\n"))


def latex(sheet: Sheet) -> str:
    """A floating table; the document must use the package booktabs."""
    caption = " ".join(escape_latex(part.rstrip(".")) + "." for part in (sheet.title, sheet.note) if part)
    columns = "".join("r" if sheet.numeric[name] else "l" for name in sheet.shown)
    style = sheet.shown.map(escape_latex).rename(columns=escape_latex).style.hide(axis="index")
    return str(style.to_latex(column_format=columns, caption=caption, hrules=True, position_float="centering"))


def table_files(sheets: Sequence[Sheet]) -> dict[str, str]:
    """The content of `tables/NAME.csv` and `tables/NAME.tex` of every sheet; ValueError for two of one name."""
    check_names("tables", [sheet.name for sheet in sheets])
    return {f"tables/{sheet.name}.{ending}": write(sheet) for sheet in sheets for ending, write in (("csv", csv), ("tex", latex))}


def check_names(what: str, names: Sequence[str]) -> None:
    """ValueError for files that would be written over each other."""
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two {what} are called {', '.join(sorted(twice))}")


def escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(text.split()))


def escape_latex(text: str) -> str:
    return " ".join(text.split()).translate(LATEX)


def is_missing(value: object) -> bool:
    return value is None or value == MISSING or (isinstance(value, float) and math.isnan(value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not is_missing(value)


def _plain(value: Any) -> int | float:
    return int(value) if float(value).is_integer() else float(value)

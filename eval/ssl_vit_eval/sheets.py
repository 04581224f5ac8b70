"""Tables as data: written once, shown in the terminal, in the report, and as Markdown, CSV and LaTeX."""

from dataclasses import dataclass
from typing import NamedTuple


class Value(NamedTuple):
    """A cell: its text, and the number that it is sorted by and that a CSV file holds; None where it is only text."""

    text: str
    number: float | None = None


@dataclass(frozen=True)
class Sheet:
    """A table. name: of its files; title and note: plain text; lines: one cell for each of `head`."""

    name: str
    title: str
    head: list[str]
    lines: list[list[Value]]
    note: str = ""

"""Figures of a comparison, as SVG for the report and as PNG for everything else."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plot:
    """A figure. name: of its files; title and note: plain text; svg: the element, without a header; png: the same at 200 dpi."""

    name: str
    title: str
    svg: str
    png: bytes
    note: str = ""

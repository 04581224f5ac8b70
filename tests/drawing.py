"""Reads a figure back from its SVG: where marks and lines lie, in the units of the axes."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

import numpy as np


class Drawing:
    """texts: (text, x, y, anchor); marks: (fill, x, y); lines: (stroke, width, points), of lines those in axes, grid among them."""

    def __init__(self, svg: str) -> None:
        self.root = ET.fromstring(svg)
        places = [(node, _style(node)) for node in self.root.iter()]
        self.texts = [
            (node.text or "", float(node.get("x", "nan")), float(node.get("y", "nan")), style.get("text-anchor", ""))
            for node, style in places
            if _tag(node) == "text"
        ]
        self.marks = [
            (style.get("fill", "#000000"), float(node.get("x", "nan")), float(node.get("y", "nan")))
            for node, style in places
            if _tag(node) == "use"
        ]
        self.lines = [
            (style.get("stroke", ""), float(style.get("stroke-width", 1)), _points(node.get("d", "")))
            for node, style in places
            if _tag(node) == "path" and style.get("fill") == "none" and node.get("clip-path")
        ]

    def words(self) -> str:
        return " ".join(text for text, *_ in self.texts)

    def scale(self, axis: str, left: float = 0.0, right: float = 1e9) -> Callable[[float], float]:
        """From points of the page to the unit of the axis whose tick labels lie between left and right."""
        anchor, place = ("middle", 1) if axis == "x" else ("end", 2)
        ticks = [
            (of[place], float(of[0].replace("−", "-")))
            for of in self.texts
            if of[3] == anchor and left <= of[1] <= right and re.fullmatch(r"−?\d+(\.\d+)?", of[0])
        ]
        slope, offset = np.polyfit([at - (3.3 if axis == "y" else 0.0) for at, _ in ticks], [value for _, value in ticks], 1)
        return lambda at: float(slope * at + offset)


def _tag(node: ET.Element) -> str:
    return node.tag.rpartition("}")[2]


def _style(node: ET.Element) -> dict[str, str]:
    pairs = (item.partition(":")[::2] for item in node.get("style", "").split(";") if item)
    return {name.strip(): value.strip() for name, value in pairs}


def _points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path)]

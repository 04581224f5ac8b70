"""Tables A and B as the report shows them, one of each for every setting: coloured by gain, and the same numbers as sheets."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import NamedTuple

from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.comparison import Cell, Comparison, Table
from ssl_vit_eval.report.page import Block, Grid
from ssl_vit_eval.report.score_tables import ZERO, score_text, under_text
from ssl_vit_eval.report.table import MISSING, Sheet, Value, slug
from ssl_vit_eval.rows import Setting
from ssl_vit_eval.sources import PIXELS

GAIN, LOSS = (120, 178, 226), (240, 178, 122)  # dark text keeps a contrast above 7 : 1 on both


class Line(NamedTuple):
    """One line of a table: its name within the section that its method and recipe make, and its cells, or one for all columns."""

    arm: Arm
    name: str
    cells: list[Cell | None]


def full_colour(comparison: Comparison) -> float:
    """The gain in points that has full colour, the same in all tables; at least 5, so that no trifle is painted as a gain."""
    gains = [abs(cell.gain.points) for table in comparison.tables for cell in table.cells.values() if cell.gain]
    return max(5.0, *gains) if gains else 0.0


def trained_grids(comparison: Comparison, scale: float) -> list[Block]:
    """Table B of every setting, with its controls: trained here, by what they were trained with and how they are read."""
    grids = []
    for table, name in _named(comparison.tables, "trained-with"):
        pixels = [Line(arm, "", [cell]) for (arm, spec), cell in table.cells.items() if spec == PIXELS]
        grids += _grid(comparison, table, name, comparison.trained(table), "trained with", scale, pixels)
    return _with_legend(grids, scale)


def other_grids(comparison: Comparison, scale: float) -> list[Block]:
    """Table A of every setting that has models which were not trained here: each frozen backbone read in every way."""
    grids: list[Block] = []
    for table, name in _named(comparison.tables, "post-hoc"):
        grids += _grid(comparison, table, name, comparison.others(table), "model", scale)
    return grids


def setting_text(setting: Setting) -> str:
    return f"{setting.dataset} · {setting.rule}"


def _named(tables: Sequence[Table], what: str) -> list[tuple[Table, str]]:
    """A name for the files of each: settings can differ in what is not in it, so the later ones are numbered."""
    names: list[str] = []
    for table in tables:
        name = slug(what, table.setting.dataset, table.setting.rule)
        count = sum(other == name or other.startswith(f"{name}--") for other in names)
        names.append(f"{name}--{count + 1}" if count else name)
    return list(zip(tables, names, strict=True))


def _with_legend(grids: Sequence[Grid], scale: float) -> list[Block]:
    """The first one shows what the colours mean, unless nothing is coloured."""
    stops = ", ".join(_colour(share * scale, scale) for share in (-1, 0, 1))
    bar = f'<i style="background: linear-gradient(90deg, {stops})"></i>'
    legend = (
        f'<div class="legend"><span>gain over random initialisation, points: −{scale:.1f}{bar}+{scale:.1f}</span>'
        f'<span><i class="own"></i>read as trained</span><span>{ZERO} interval includes zero</span></div>'
    )
    return [replace(grid, html=legend + grid.html) if scale and not place else grid for place, grid in enumerate(grids)]


def _grid(
    comparison: Comparison, table: Table, name: str, arms: Sequence[Arm], what: str, scale: float, more: Sequence[Line] = ()
) -> list[Grid]:
    """None without lines. Recipes and readouts without any number in this setting are named instead of shown."""
    measured = {(arm, spec) for arm, spec in table.cells if arm in arms}
    specs = {spec for _, spec in measured}
    columns = [spec for spec in comparison.read_with if spec in specs and at_last(spec) not in specs - {spec}]
    sections = {arm[:2] for arm, _ in measured}
    control = "random init" if what == "trained with" else ""
    shown = [arm for arm in arms if arm[:2] in sections]
    lines = [Line(arm, arm.trained_with or control, [table.cells.get((arm, spec)) for spec in columns]) for arm in shown]
    lines += more
    if not lines:
        return []
    setting = table.setting
    about = f"protocol version {setting.version}, {table.n_test:,} test images, {setting.transform}, data {setting.data[:16]}"
    absent = [spec for spec in comparison.read_with if spec not in specs and at_last(spec) in (spec, None)]
    absent += dict.fromkeys(arm.section for arm in arms if arm not in shown)
    about += f"; not measured here: {', '.join(absent)}" if absent else ""
    if blocks := len(specs) - len(columns):
        about += f"; {blocks} readouts of other blocks: see the curves by block, and tables/scores.csv"
    wide = columns or [PIXELS]
    html = (
        f'<section class="setting"><h3>{escape(setting_text(setting))}</h3><p class="soft">{escape(about)}</p>'
        f"{_pair(lines, wide, f'{what} ↓ read with →', scale)}</section>"
    )
    return [Grid(html, _sheet(name, f"{setting_text(setting)}: top-1, % ({about})", lines, wide, what))]


def at_last(spec: str) -> str | None:
    """The same readout of the last block; None for one that mixes blocks."""
    terms = ReadoutSpec.parse(spec).terms
    if len({term.blocks for term in terms}) > 1:
        return None
    return str(ReadoutSpec(tuple(replace(term, blocks=(-1,)) for term in terms)))


def _sheet(name: str, title: str, lines: Sequence[Line], columns: Sequence[str], what: str) -> Sheet:
    rows = []
    for arm, label, cells in lines:
        wide = cells if len(cells) == len(columns) else [*cells, *[None] * (len(columns) - len(cells))]
        scores = [Value(MISSING) if cell is None else Value(_score(cell), 100 * cell.top1) for cell in wide]
        rows.append([Value(arm.method), Value(arm.recipe), Value(label or MISSING), *scores])
    return Sheet(name, title, ["method", "recipe", what, *(f"read {spec}" for spec in columns)], rows)


def _score(cell: Cell) -> str:
    return f"{score_text(cell)} ({under_text(cell)})" if under_text(cell) else score_text(cell)


def _pair(lines: Sequence[Line], columns: Sequence[str], corner: str, scale: float) -> str:
    """The table of top-1, and beside it the same of macro top-1."""
    head = "".join(f'<th scope="col">{escape(spec)}</th>' for spec in columns)
    top1 = f'<thead><tr><th class="corner" colspan="2">{corner}</th>{head}</tr></thead>'
    macro = f'<thead><tr><th class="corner"></th>{head}</tr></thead>'
    for method, recipe in dict.fromkeys(line.arm[:2] for line in lines):
        section = [line for line in lines if line.arm[:2] == (method, recipe)]
        first = f'<th class="method" rowspan="{len(section)}">{escape(method)}<span class="soft">{escape(recipe)}</span></th>'
        top1 += "<tbody>"
        macro += "<tbody>"
        for arm, name, cells in section:
            row = "<tr>" if arm.trained_with else '<tr class="control">'
            span = len(columns) // len(cells)
            own = [arm.trained_with == spec for spec in columns]
            big = "".join(_cell(cell, mark, scale, span) for cell, mark in zip(cells, own, strict=False))
            small = "".join(_macro(cell, span) for cell in cells)
            top1 += f'{row}{first}<th scope="row">{escape(name)}</th>{big}</tr>'
            macro += f'{row}<th scope="row">{escape(f"{method} {name}" if name else recipe)}</th>{small}</tr>'
            first = ""
        top1 += "</tbody>"
        macro += "</tbody>"
    return (
        f'<div class="pair"><table class="grid"><caption>Top-1, %</caption>{top1}</table>'
        f'<table class="grid small"><caption>Macro top-1 (mean over classes), %</caption>{macro}</table></div>'
    )


def _cell(cell: Cell | None, own: bool, scale: float, span: int) -> str:
    names = ["own"] if own else []
    if cell is None:
        return f'<td class="{" ".join([*names, "missing"])}">{MISSING}</td>'
    colour = f' style="background: {_colour(cell.gain.points, scale)}"' if cell.gain else ""
    score, space, spread = score_text(cell).partition(" ")
    big = f"<b>{score}<small>{space}{spread}</small></b>" if spread else f"<b>{score}</b>"
    return f'<td class="{" ".join(names)}" colspan="{span}"{colour}>{big}<span>{under_text(cell)}</span></td>'


def _macro(cell: Cell | None, span: int) -> str:
    return f'<td colspan="{span}">{MISSING if cell is None or cell.macro is None else f"{100 * cell.macro:.1f}"}</td>'


def _colour(points: float, scale: float) -> str:
    end = GAIN if points > 0 else LOSS
    share = min(1.0, abs(points) / scale) if scale else 0.0
    return "#" + "".join(f"{round(255 + share * (channel - 255)):02x}" for channel in end)

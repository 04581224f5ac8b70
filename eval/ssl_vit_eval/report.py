"""The comparison as one HTML file that needs nothing beside it: no script, no font, no picture from elsewhere."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from ssl_vit_eval.arms import Arm
from ssl_vit_eval.comparison import MISSING, ZERO, Cell, Comparison, Table, score_text, under_text
from ssl_vit_eval.models import PIXELS
from ssl_vit_eval.pictures import training_curves
from ssl_vit_eval.records import datasets, evaluations, pretrainings, protocols
from ssl_vit_eval.runs import Run

MARKER = '<meta name="generator" content="ssl-vit compare">'
PICTURE_BYTES = 1_500_000  # of embedded reconstructions; with them the file stays below 3 MB
GAIN, LOSS = (120, 178, 226), (240, 178, 122)  # dark text keeps a contrast above 7 : 1 on both

INTRODUCTION = """
<p>Each backbone was pretrained without labels, its loss attached to one readout (<b>trained with</b>), then frozen and judged through
every readout (<b>read with</b>). The outlined diagonal is what is usually published; the rest of a row shows where else the same
backbone carries the image.</p>
<p><b>How to read a cell.</b> Large: top-1 accuracy on the test images, in %. Small: the gain in points over the same backbone at its random
initialisation, read the same way and paired image by image, with its 95 % bootstrap interval over test images. With several seeds:
mean ± standard deviation and n, and the mean gain with the smallest and the largest of the seeds in round brackets.
{zero} marks a gain whose interval (or range) includes zero: these images did not show that pretraining helped. {missing} is a number
that was not measured. Control rows without colour show the accuracy and its 95 % Wilson interval.</p>
"""
INTERVALS = """Intervals are over the test images of that data set only. One pretraining seed says nothing about how much a method
varies from seed to seed."""
PHOTOS = """builtin:photos and builtin:photos-new are patches of a few photographs, the class being the photograph: their intervals hold
within these photographs."""
REGISTER = """<code>register</code> is the mean of all r register tokens: with r = 4, of four class-like tokens. With r = 1 and no
position of its own it is the class token by symmetry, so that its difference from <code>cls</code> is a null control and shows the
noise."""
MAE = "MAE's decoder sees the visible patches beside the readout, so expect its trained-with to matter little."
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">{marker}<meta name="viewport" content="width=device-width">
<title>ssl_vit: readouts compared</title>
<style>
{style}</style></head>
<body>
{body}
</body></html>
"""


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the report; the folder of `path` must exist."""
    gains = [abs(cell.gain.points) for table in comparison.tables for cell in table.cells.values() if cell.gain]
    # the gain in points that has full colour, the same in all tables; at least 5, so that no trifle is painted as a gain
    scale = max(5.0, *gains) if gains else 0.0
    body = [
        "<h1>Which token should carry the image?</h1>",
        INTRODUCTION.format(zero=ZERO, missing=MISSING),
        *(f'<p class="note">{escape(note)}.</p>' for note in comparison.notes),
        "<h2>Trained with × read with</h2>",
        _legend(scale),
        _cautions(comparison),
        *(_setting(comparison, table, scale) for table in comparison.tables),
        "<h2>What each pretraining did</h2>",
        _curves(comparison.runs),
        _reconstructions(comparison.runs),
        "<h2>What was run</h2>",
        pretrainings(comparison),
        datasets(comparison.rows),
        protocols(comparison.rows),
        evaluations(comparison.rows),
    ]
    style = files("ssl_vit_eval").joinpath("report.css").read_text(encoding="utf-8")
    text = PAGE.format(marker=MARKER, style=style, body="\n".join(body))
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _cautions(comparison: Comparison) -> str:
    """What keeps a reader from reading more into the tables than they hold; only what these tables need."""
    cautions = {
        INTERVALS: True,
        PHOTOS: any(table.setting.dataset.startswith("builtin:photos") for table in comparison.tables),
        REGISTER: any("register" in spec for spec in comparison.read_with),
        MAE: any(method == "mae" for method, _ in comparison.sections),
    }
    return f'<ul class="soft">{"".join(f"<li>{text}</li>" for text, needed in cautions.items() if needed)}</ul>'


def _colour(points: float, scale: float) -> str:
    end = GAIN if points > 0 else LOSS
    share = min(1.0, abs(points) / scale) if scale else 0.0
    return "#" + "".join(f"{round(255 + share * (channel - 255)):02x}" for channel in end)


def _legend(scale: float) -> str:
    if not scale:
        return ""
    stops = ", ".join(_colour(share * scale, scale) for share in (-1, 0, 1))
    bar = f'<i style="background: linear-gradient(90deg, {stops})"></i>'
    return (
        f'<div class="legend"><span>gain over random initialisation, points: −{scale:.1f}{bar}+{scale:.1f}</span>'
        f'<span><i class="own"></i>read as trained</span><span>{ZERO} interval includes zero</span></div>'
    )


def _setting(comparison: Comparison, table: Table, scale: float) -> str:
    setting = table.setting
    parts = [
        f"<h3>{escape(setting.dataset)} · {escape(setting.rule)}</h3>",
        f'<p class="soft">protocol version {setting.version}, {table.n_test:,} test images, {escape(setting.transform)}, '
        f"data <code>{escape(setting.data)}</code></p>",
    ]
    columns = comparison.read_with or [PIXELS]
    pixels = {arm: cell for (arm, spec), cell in table.cells.items() if spec == PIXELS}
    lines = [_line(table, arm, columns, "random init") for arm in comparison.trained(table)]
    lines += [Line(arm, "", [cell]) for arm, cell in pixels.items()]
    if lines:
        parts.append(_pair(lines, columns, "trained with ↓ read with →", scale))
    if others := comparison.others(table):
        parts.append("<h4>Not trained here, read out post hoc</h4>")
        parts.append(_pair([_line(table, arm, columns, "") for arm in others], columns, "model ↓ read with →", scale))
    return f'<section class="setting">{"".join(parts)}</section>'


class Line(NamedTuple):
    """One line of a table: its name within the section that its method and recipe make, and its cells, or one for all columns."""

    arm: Arm
    name: str
    cells: list[Cell | None]


def _line(table: Table, arm: Arm, columns: Sequence[str], control: str) -> Line:
    return Line(arm, arm.trained_with or control, [table.cells.get((arm, spec)) for spec in columns])


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
            top1 += f'{row}{first}<th scope="row">{escape(name)}</th>{big}</tr>'
            macro += (
                f'{row}<th scope="row">{escape(f"{method} {name}" if name else recipe)}</th>{"".join(_macro(c, span) for c in cells)}</tr>'
            )
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


def _curves(runs: Sequence[Run]) -> str:
    drawings = training_curves(runs)
    if not drawings:
        return '<p class="soft">The compared folders hold no run folders with logged steps, so there are no training curves.</p>'
    note = (
        "Lines are runs, coloured by what they were trained with. Losses are not comparable between methods. Teacher information (DINO) is "
        "H(mean teacher output) − mean H(teacher output) as a share of ln k, without labels: near 0 the teacher has collapsed."
    )
    return f'<p class="soft">{note}</p><div class="panels">{"".join(drawings)}</div>'


def _reconstructions(runs: Iterable[Run]) -> str:
    """The pictures of the first seed of every arm, as far as they fit."""
    parts, left = [], PICTURE_BYTES
    seen = set()
    for run in runs:
        picture = run.folder / "reconstructions.png"
        arm = (run.name, run.recipe["readout"])
        if arm in seen or not picture.is_file():
            continue
        seen.add(arm)
        caption = f"{escape(run.name)}, trained with <b>{escape(run.recipe['readout'])}</b>, seed {run.recipe['seed']}"
        data = picture.read_bytes()
        if len(data) > left:
            parts.append(f'<p class="soft">{caption}: {escape(picture.parent.name)}/{picture.name} is too large to be embedded here.</p>')
            continue
        left -= len(data)
        source = base64.b64encode(data).decode()
        parts.append(f'<figure><figcaption>{caption}</figcaption><img alt="reconstructions" src="data:image/png;base64,{source}"></figure>')
    if not parts:
        return ""
    note = (
        "One fixed mask for all models, first seed only. Where the recipe normalises its target by patch (norm_pixels), the prediction is "
        "shown with each patch's own true mean and deviation: brightness and contrast of a patch are given, its structure is predicted."
    )
    return f'<h3>What MAE fills in</h3><p class="soft">{note}</p>{"".join(parts)}'

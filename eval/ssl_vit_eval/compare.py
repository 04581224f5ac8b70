"""`ssl-vit compare`: the tables in the terminal, and the same numbers as a report."""

from collections.abc import Sequence
from pathlib import Path

from ssl_vit.errors import UsageError
from ssl_vit_eval.arms import Arm
from ssl_vit_eval.comparison import MISSING, ZERO, Cell, Comparison, Gain, Table, bounds_text, build, score_text, signed, under_text
from ssl_vit_eval.models import PIXELS
from ssl_vit_eval.report import MARKER, write_report


def compare(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Compare every row below the folders, print the tables, write `report.html` into `out` (default: the first folder); its path.

    UsageError for folders without rows, for an `out` that is a file and for a `report.html` in it that is not ours.
    """
    if not folders:
        raise UsageError("no folder was given: name those that `ssl-vit eval` or `ssl-vit study` wrote to")
    folder = Path(folders[0] if out is None else out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file: name a folder, report.html is written into it")
    path = folder / "report.html"
    if path.exists() and not (path.is_file() and MARKER in path.read_text(encoding="utf-8", errors="replace")[:1000]):
        raise UsageError(f"{path} was not written by ssl-vit compare and is left alone: name another folder with --out")
    comparison = build(folders)
    print(terminal(comparison))
    folder.mkdir(parents=True, exist_ok=True)
    write_report(comparison, path)
    print(f"report: {path}")
    return path


def terminal(comparison: Comparison) -> str:
    """All tables as text, each followed by a sentence for every cell that was read as it was trained."""
    parts = [part for table in comparison.tables for part in (_table(comparison, table), "\n".join(sentences(table))) if part]
    legend = (
        "Top-1 in %; below it the gain in points over the random-initialised backbone, with its 95 % interval over test images "
        f"({ZERO} includes zero).\nSeveral seeds: mean ± deviation, and the range of the gain over seeds. * read as trained."
    )
    return "\n\n".join([*parts, legend, *(f"note: {note}" for note in comparison.notes)]) + "\n"


def sentences(table: Table) -> list[str]:
    """The diagonal in words."""
    return [
        f"{arm.method} trained with {spec}, read with {spec}, {table.setting.dataset}, {table.setting.rule}: "
        f"{100 * cell.top1:.1f} %{_seeds(cell)}, {_gain(cell.gain, table.n_test)}"
        for (arm, spec), cell in table.cells.items()
        if arm.trained_with == spec
    ]


def _seeds(cell: Cell) -> str:
    return "" if cell.spread is None else f" ± {100 * cell.spread:.1f} ({cell.seeds} seeds)"


def _gain(gain: Gain | None, images: int) -> str:
    if gain is None:
        return "its random initialisation was not evaluated"
    text = f"{signed(gain.points)} points {bounds_text(gain)} over its random initialisation"
    if gain.seeds > 1:
        return text + (f", not above zero in all {gain.seeds} seeds" if gain.includes_zero else "")
    return text + (f", includes zero: no gain that these {images} images could show" if gain.includes_zero else "")


def _table(comparison: Comparison, table: Table) -> str:
    """One setting: trained arms with their random initialisation, pixels, then what was not trained here."""
    setting, columns = table.setting, comparison.read_with or [PIXELS]
    lines = [["trained with", *(f"read {spec}" for spec in columns)]]
    for arm in comparison.trained(table):
        lines += _lines(label(arm), [table.cells.get((arm, spec)) for spec in columns], [spec == arm.trained_with for spec in columns])
    for (arm, spec), cell in table.cells.items():
        if spec == PIXELS:
            lines += _lines(arm.recipe, [cell], [False])
    if others := comparison.others(table):
        lines.append(["not trained here"])
        for arm in others:
            lines += _lines(arm.recipe, [table.cells.get((arm, spec)) for spec in columns], [False] * len(columns))
    widths = [max(len(line[place]) for line in lines if place < len(line)) for place in range(len(columns) + 1)]
    text = ["  ".join(f"{item:{width}}" for item, width in zip(line, widths, strict=False)).rstrip() for line in lines]
    title = f"{setting.dataset} · {setting.rule} v{setting.version} · {setting.transform} · {table.n_test} test images"
    return "\n".join([title, "", *text])


def _lines(name: str, cells: Sequence[Cell | None], own: Sequence[bool]) -> list[list[str]]:
    scores = [MISSING if cell is None else score_text(cell) + "*" * mark for cell, mark in zip(cells, own, strict=True)]
    return [[name, *scores], ["", *("" if cell is None else under_text(cell) for cell in cells)]]


def label(arm: Arm) -> str:
    """`dino (dino_photos), cls`; its initialisation, `dino (dino_photos), random`."""
    return f"{arm.method} ({arm.recipe}), {arm.trained_with or 'random'}"

"""`ssl-vit compare`: tables and verdicts in the terminal, and the same numbers as a report."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import get_args

from ssl_vit.errors import UsageError
from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.comparison import Cell, Comparison, Gain, Table, build
from ssl_vit_eval.compare.verdict import Family, Outcome, Rule
from ssl_vit_eval.report.report_files import check_out
from ssl_vit_eval.report.score_tables import ZERO, bounds_text, score_text, scores, under_text
from ssl_vit_eval.report.table import MISSING
from ssl_vit_eval.report.text import TITLES, line, signed, words_of
from ssl_vit_eval.report.wandb import write_wandb_report
from ssl_vit_eval.report.write import write_report
from ssl_vit_eval.rows import Setting
from ssl_vit_eval.sources import PIXELS

SHOWN = 24  # differences of a question; the report has all
IN_FULL = ("trained with", "null control")
_WIDTH = 140


def compare(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    margin: float | None = None,
    wandb: str | None = None,
    group: str | None = None,
) -> Path:
    """Compare every row below the folders, print the tables, write the report into `out` (default: the first folder); the path of its HTML.

    margin: points, of studies that declare none. wandb: the `[ENTITY/]PROJECT` that gets a W&B Report too, on the runs of `group`, or all.
    UsageError for folders without rows, for an `out` that is a file, for a file of a report's name in it that is not ours, and for a
    margin beside one that a study declared; of W&B as `write_wandb_report`, when the other report is written.
    """
    if not folders:
        raise UsageError("no folder was given: name those that `ssl-vit eval` or `ssl-vit study` wrote to")
    folder = Path(folders[0] if out is None else out)
    check_out(folder)
    comparison = build(folders, margin)
    print(terminal(comparison))
    path = write_report(comparison, folders, folder)
    print(f"report: {path}")
    if wandb is not None:
        print(f"W&B Report: {write_wandb_report(comparison, wandb, group, [scores(comparison)])}")
    return path


def terminal(comparison: Comparison) -> str:
    """All tables as text, each followed by a sentence for every cell that was read as it was trained; then verdicts and notes."""
    parts = [part for table in comparison.tables for part in (_table(comparison, table), "\n".join(sentences(table))) if part]
    legend = (
        "Top-1 in %; below it the gain in points over the random-initialised backbone, with its 95 % interval over test images "
        f"({ZERO} includes zero).\nSeveral seeds: mean ± deviation, and the range of the gain over seeds. * read as trained."
    )
    parts += [legend, verdicts(comparison.families, comparison.rule), *(f"note: {note}" for note in comparison.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


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


def verdicts(families: Sequence[Family], rule: Rule) -> str:
    """The rule, then what training changes in full, and of the other questions how they came out; empty where nothing can be subtracted."""
    if not families:
        return ""
    parts = ["verdicts\n\n" + "\n".join(wrap(rule.text, _WIDTH))]
    if primary := [family for family in families if family.primary]:
        parts.append(_question("Primary comparison, declared before the training", primary, rule))
    for question, title in TITLES.items():
        if of := [family for family in families if family.question == question and not family.primary]:
            parts.append(_question(title, of, rule) if question in IN_FULL else _counted(title, of, rule))
    return "\n\n".join(parts)


def place(setting: Setting) -> str:
    """`builtin:photos, knn v1, resize32`."""
    return f"{setting.dataset}, {setting.rule} v{setting.version}, {setting.transform}"


def _question(title: str, families: Sequence[Family], rule: Rule) -> str:
    lines, left = [title], SHOWN
    for family in families:
        shown = family.differences[:left]
        left -= len(shown)
        if shown:
            count = len(family.differences)
            how = (
                f"Holm over {count}" if family.is_corrected and count > 1 else "one comparison" if family.is_corrected else "not corrected"
            )
            lines.append(f"  {family.scope}, {place(family.setting)} ({how})")
        for difference in shown:
            lines += [
                f"    {line(family, difference, rule)}",
                *(f"      {text}" for text in wrap(words_of(family, difference, rule), _WIDTH - 6)),
            ]
    rest = sum(len(family.differences) for family in families) - (SHOWN - left)
    return "\n".join([*lines, *([f"  and {rest} more differences: in the report"] if rest else [])])


def _counted(title: str, families: Sequence[Family], rule: Rule) -> str:
    """How many differences came out how, and those that were found."""
    outcomes = Counter(difference.outcome for family in families for difference in family.differences)
    count = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in get_args(Outcome) if outcomes[outcome])
    found = [
        f"  {family.scope}, {place(family.setting)}: {line(family, difference, rule)}"
        for family in families
        for difference in family.differences
        if difference.outcome in ("better", "worse")
    ]
    rest = [f"  and {len(found) - SHOWN} more: in the report"] if len(found) > SHOWN else []
    return "\n".join([f"{title}: {count}; the report lists all", *found[:SHOWN], *rest])

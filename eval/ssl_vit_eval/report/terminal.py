"""`ssl-vit compare`: one screen of tables and verdicts, and the same numbers as a report."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import get_args

import pandas as pd

from ssl_vit.errors import UsageError
from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.comparison import Comparison, build
from ssl_vit_eval.compare.verdict import Outcome
from ssl_vit_eval.metrics import MACRO
from ssl_vit_eval.report import first_page, page
from ssl_vit_eval.report.first_page import about, chip, families_of
from ssl_vit_eval.report.score_tables import FLOOR, at_last, pixels_of, scores
from ssl_vit_eval.report.text import METRIC_NAMES, QUESTIONS, WORDS, interval_text, points_text, words_of
from ssl_vit_eval.report.wandb import write_wandb_report
from ssl_vit_eval.report.write import chapters_of, write_report
from ssl_vit_eval.sources import PIXELS

SHOWN = {"trained with": 8}  # differences that were found, of other questions 2; the report has all


def compare(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    margin: float | None = None,
    wandb: str | None = None,
    group: str | None = None,
    verbose: bool = False,
    family: str | None = None,
) -> Path:
    """Compare every row below the folders, print one screen, write the report into `out` (default: the first folder); the path of its HTML.

    margin (points), family: of `Rule`, for studies that declare none.
    wandb: the `[ENTITY/]PROJECT` that gets a W&B Report too, on the runs of `group`, or all.
    verbose: print all that the report says. UsageError for folders without rows, for an `out` that is a file, for a file of a report's
    name in it that is not ours, and for a margin beside one that a study declared; of W&B as `write_wandb_report`, when the other report
    is written.
    """
    if not folders:
        raise UsageError("no folder was given: name those that `ssl-vit eval` or `ssl-vit study` wrote to")
    folder = Path(folders[0] if out is None else out)
    page.check_out(folder)
    comparison = build(folders, margin, family)
    chapters = chapters_of(comparison, folders)
    path = write_report(comparison, chapters, folder)  # before anything is printed, which `head` or `less` may not take
    if verbose:
        print(page.text(first_page.lead(comparison), chapters))
    print(screen(comparison))
    print(f"report: {path}")
    if wandb is not None:
        print(f"W&B Report: {write_wandb_report(comparison, wandb, group, [scores(comparison)])}")
    return path


def screen(comparison: Comparison) -> str:
    """What to be warned of first, the tables in small, the verdicts, and what to do next."""
    width = get_terminal_size((120, 40)).columns
    first = first_page.first_warnings(comparison)
    others = len(first_page.warnings_of(comparison)) - len(first)
    parts = ["\n".join(line for note in first for line in wrap(f"warning: {note}", width, subsequent_indent="  "))]
    tables = [_tables(comparison, dataset, width) for dataset in dict.fromkeys(table.setting.dataset for table in comparison.tables)]
    parts += [*tables, "; ".join(meaning for sign, meaning in WORDS["legend"].items() if sign in "\n".join(tables)) + "."]
    verdicts = [f"verdicts, at a margin of {points_text(comparison.rule.margin)}", *_verdicts(comparison)]
    verdicts += wrap(f"next: {first_page.next_step(comparison)}", width, subsequent_indent="  ")
    parts.append("\n".join(verdicts))
    parts.append(WORDS["hint"] + (f" Warnings there: {others}." if others else ""))
    return "\n\n".join(filter(None, parts))


def _tables(comparison: Comparison, dataset: str, width: int) -> str:
    """Trained-with × read-with under every protocol, side by side as far as they fit; other blocks and norms are in the report."""
    tables = [table for table in comparison.tables if table.setting.dataset == dataset]
    several = len({(table.setting.rule, table.setting.version) for table in tables}) < len(tables)
    lines, cells = dict[Arm, str](), dict[tuple[str, str], dict[Arm, str]]()
    for table in tables:
        named = [table.setting.rule, f"v{table.setting.version}", *([table.setting.transform, table.setting.data[:4]] if several else [])]
        named += [METRIC_NAMES[table.metric]] * (table.metric == MACRO)
        specs = [spec for spec in comparison.read_with if at_last(spec) in (spec, None) and any(spec == of for _, of in table.cells)]
        specs = [spec for spec in specs if "/" not in spec or spec in comparison.trained_with] or specs
        columns = {spec: cells.setdefault((" ".join(named), f"read {spec}"), {}) for spec in specs or [PIXELS]}
        columns.setdefault(PIXELS, next(iter(columns.values())))
        for arm in [*comparison.trained(table), *pixels_of(table), *comparison.others(table)]:
            for spec, column in columns.items():
                if cell := table.cells.get((arm, spec)):
                    spread = "" if cell.spread is None else f" ± {100 * cell.spread:.1f}"
                    column[arm] = f"{100 * cell.value:.1f}{spread}{'*' * (arm.trained_with == spec)}{FLOOR * cell.below_pixels}"
                    lines[arm] = f"{arm.recipe} {arm.trained_with or ('random' if arm[:2] in comparison.sections else '')}"
    frame = pd.DataFrame(cells, index=list(lines)).fillna("–").rename(index=lines)
    frame.columns.names = [f"{dataset}, {tables[0].n_test:,} images", "trained with"]
    return "\n".join(map(str.rstrip, frame.to_string(line_width=width).splitlines()))


def _verdicts(comparison: Comparison) -> list[str]:
    """What was declared in full; of each question how its differences came out, and the first that were found."""
    rule, lines = comparison.rule, []
    for family in (family for family in comparison.families if family.primary):
        lines += [f"  declared: {about(family)}: {words_of(family, of, rule)}" for of in family.differences]
    for question, (title, _) in QUESTIONS.items():
        pairs = [(family, of) for family in families_of(comparison, question) if not family.primary for of in family.differences]
        outcomes = Counter(of.outcome for _, of in pairs)
        found = [
            f"    {about(family)}: {chip(family, of)} {interval_text(of.low, of.high, rule)}"
            for family, of in pairs
            if of.outcome in ("better", "worse")
        ]
        if pairs:
            count = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in get_args(Outcome) if outcomes[outcome])
            shown = SHOWN.get(question, 2)
            more = [f"    and {len(found) - shown} more"] if len(found) > shown else []
            lines += [f"  {title}: {count}", *found[:shown], *more]
    return lines or ["  none: nothing here can be subtracted from something else"]

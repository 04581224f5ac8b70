"""Rows arranged for comparison: trained-with × read-with tables, each cell paired with its own random-initialised backbone.

Image-level intervals come from the per-image predictions. They hold for one seed; over several seeds a cell shows mean and spread of the
seeds instead, since an interval over images says nothing about another pretraining.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.compare.arms import Arm, arms_of, clash_notes, ordered, weights_of
from ssl_vit_eval.compare.differences import Answers, family_of
from ssl_vit_eval.compare.preregistration import find_declared
from ssl_vit_eval.compare.questions import ask, cells_of, null_controls
from ssl_vit_eval.compare.runs import Run, find_runs
from ssl_vit_eval.compare.verdict import Family, Rule
from ssl_vit_eval.compare.warnings import missing, repeated, revisions
from ssl_vit_eval.rows import Key, Row, Setting, find_rows
from ssl_vit_eval.sources import PIXELS
from ssl_vit_eval.stats.images import PairedDifference, paired_difference


@dataclass(frozen=True)
class Gain:
    """Points of top-1 over the random-initialised backbone read the same way, paired by image and averaged over seeds.

    low, high: 95 % bootstrap interval over images for one seed, the smallest and the largest seed for several.
    """

    points: float
    low: float
    high: float
    seeds: int

    @property
    def includes_zero(self) -> bool:
        """As shown, with one decimal: a bound that rounds to zero counts as zero."""
        return round(self.low, 1) <= 0 <= round(self.high, 1)


@dataclass(frozen=True)
class Cell:
    """Top-1 and macro top-1 as fractions, means over seeds; ci: interval over images for one seed; spread: deviation of several."""

    top1: float
    macro: float | None
    ci: tuple[float, float] | None
    spread: float | None
    seeds: int
    gain: Gain | None


@dataclass(frozen=True)
class Table:
    """All numbers of one setting: cells by arm and read-with."""

    setting: Setting
    n_test: int
    cells: dict[tuple[Arm, str], Cell]

    def arms(self) -> list[Arm]:
        return list(dict.fromkeys(arm for arm, _ in self.cells))


@dataclass(frozen=True)
class Comparison:
    """Tables in order of appearance; sections are (method, recipe) of what was trained here; notes say what is missing or kept apart.

    families: the primary comparison first, then by question and setting.
    """

    tables: list[Table]
    sections: list[tuple[str, str]]
    trained_with: list[str]
    read_with: list[str]
    rows: list[Row]
    runs: list[Run]
    notes: list[str]
    families: list[Family]
    rule: Rule

    def trained(self, table: Table) -> list[Arm]:
        """The lines of table B: every recipe with every trained-with, missing ones too, then its random initialisation."""
        arms = [Arm(*section, spec) for section in self.sections for spec in [*self.trained_with, None]]
        return arms if any(arm.trained_with for arm in table.arms()) else [arm for arm in arms if arm in table.arms()]

    def others(self, table: Table) -> list[Arm]:
        """The lines of table A: what was not trained here, and random backbones that nothing here started from."""
        return [arm for arm in table.arms() if arm.trained_with is None and arm[:2] not in self.sections and arm.method != PIXELS]


def build(folders: Sequence[str | Path], margin: float | None = None) -> Comparison:
    """Compare every row below the folders. margin: points, where no study declares one.

    UsageError for folders without rows and for a study file that is wrong, Failure where predictions cannot be read or paired.
    """
    measured = find_rows(folders)
    found = list({row.id: (row, store) for row, store in measured}.values())
    rows = [row for row, _ in found]
    names, answers = arms_of(rows), Answers(found)
    tables = _tables(rows, names, answers)
    trained = [arm for arm in names.values() if arm.trained_with]

    runs, declared, cells = find_runs(folders), find_declared(folders, margin), cells_of(rows, names)
    cells = {table.setting: cells[table.setting] for table in tables if table.setting in cells}  # in their order
    asked = ask(cells, null_controls(runs), declared.primary)
    rule = Rule(declared.margin)
    cut = [line for store in {store.file: store for _, store in measured}.values() if (line := store.cut_line())]
    notes = [*cut, *repeated(measured), *clash_notes(rows), *_notes(tables), *missing(cells)]
    return Comparison(
        tables,
        sections=list(dict.fromkeys(arm[:2] for arm in trained)),
        trained_with=ordered(arm.trained_with for arm in trained if arm.trained_with),
        read_with=ordered(row.read_with for row in rows if row.method != PIXELS),
        rows=rows,
        runs=runs,
        notes=[*notes, *asked.notes, *revisions(asked.groups), *declared.notes],
        families=[family_of(group, answers, rule) for group in asked.groups],
        rule=rule,
    )


def _tables(rows: Sequence[Row], names: Mapping[tuple[str, str], Arm], answers: Answers) -> list[Table]:
    """A table for each setting, those of a data set together."""
    inits: dict[str, dict[Arm, None]] = defaultdict(dict)  # the initialisation of a shared start is shown in every recipe that has it
    for row in rows:
        if row.trained_with and row.init:
            inits[row.init][names[weights_of(row)]._replace(trained_with=None)] = None

    grouped: dict[Setting, dict[tuple[Arm, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        arms = inits.get(row.checkpoint) if row.method == "random" else None
        for arm in arms or [names[weights_of(row)]]:
            grouped[Setting.of(row)][arm, row.read_with].append(row)

    gains = _Gains(rows, answers)
    tables = []
    for setting, places in grouped.items():
        cells = {place: _cell(of, gains) for place, of in places.items() if any(row.metric == "top1" for row in of)}
        n_test = next(row.n_test for of in places.values() for row in of)
        tables.append(Table(setting, n_test, cells))
    order = list(dict.fromkeys(row.dataset for row in rows))
    return sorted(tables, key=lambda table: order.index(table.setting.dataset))  # stable: in the order of the protocols


class _Gains:
    """Pairs a row with the random-initialised backbone that its checkpoint started from: same images, protocol and readout."""

    def __init__(self, rows: Sequence[Row], answers: Answers) -> None:
        self._rows: dict[Key, Row] = {row.key: row for row in rows if row.metric == "top1"}
        self._answers = answers

    def over_random(self, row: Row) -> PairedDifference | None:
        """None where that backbone was not evaluated so."""
        baseline = self._rows.get(row.key._replace(checkpoint=row.init)) if row.trained_with and row.init else None
        return paired_difference(*self._answers.together([row, baseline])) if baseline else None


def _cell(rows: Sequence[Row], gains: _Gains) -> Cell:
    top1 = [row for row in rows if row.metric == "top1"]
    macro = [row.value for row in rows if row.metric == "top1_macro"]
    values = [row.value for row in top1]
    differences = [difference for row in top1 if (difference := gains.over_random(row))]
    gain = None
    if len(differences) == 1:
        gain = Gain(*differences[0], seeds=1)
    elif differences:
        points = [difference.points for difference in differences]
        gain = Gain(fmean(points), min(points), max(points), len(points))
    one = len(values) == 1
    return Cell(
        top1=fmean(values),
        macro=fmean(macro) if macro else None,
        ci=(top1[0].ci_low, top1[0].ci_high) if one else None,
        spread=None if one else stdev(values),
        seeds=len(values),
        gain=gain,
    )


def _notes(tables: Sequence[Table]) -> list[str]:
    """Settings that differ only in version, data or transform, and trained cells without their baseline."""
    notes = []
    for dataset, rule in dict.fromkeys((table.setting.dataset, table.setting.rule) for table in tables):
        apart = [table.setting for table in tables if (table.setting.dataset, table.setting.rule) == (dataset, rule)]
        differs = {"protocol version": "version", "protocol parameters": "parameters", "data": "data", "transform": "transform"}
        what = " and ".join(name for name, field in differs.items() if len({getattr(setting, field) for setting in apart}) > 1)
        if what:
            notes.append(f"{dataset}, {rule}: {len(apart)} tables that differ in {what}: never averaged, not comparable")
    trained = [
        cell for table in tables for (arm, spec), cell in table.cells.items() if arm.trained_with and ReadoutSpec.parse(spec).of_last_blocks
    ]
    if lacking := sum(cell.gain is None for cell in trained):
        notes.append(
            f"{lacking} of {len(trained)} trained cells have no gain: evaluate random:RUN/recipe.yaml, its own start, on the same data"
        )
    if partly := sum(cell.gain is not None and cell.gain.seeds < cell.seeds for cell in trained):
        notes.append(f"{partly} cells have a gain over fewer seeds than their score: evaluate random:RUN/recipe.yaml of the other seeds")
    return notes

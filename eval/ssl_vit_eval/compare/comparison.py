"""Rows arranged for comparison: trained-with × read-with tables, each cell paired with its own random-initialised backbone.

Image-level intervals come from the per-image predictions. They hold for one seed; over several seeds a cell shows mean and spread of the
seeds instead, since an interval over images says nothing about another pretraining.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev

from ssl_vit.errors import Failure
from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.compare.answers import Answers, with_metrics
from ssl_vit_eval.compare.arms import Arm, Weights, arms_and_notes, ordered, starts, weights_of
from ssl_vit_eval.compare.differences import measured
from ssl_vit_eval.compare.notes import Note
from ssl_vit_eval.compare.preregistration import find_declared
from ssl_vit_eval.compare.questions import ask, cells_of, null_controls
from ssl_vit_eval.compare.runs import Run, find_runs
from ssl_vit_eval.compare.verdict import Family, Rule, Side
from ssl_vit_eval.compare.warnings import missing, repeated, revisions, two_recipes
from ssl_vit_eval.metrics import MACRO, TOP1, metric_of
from ssl_vit_eval.rows import Key, Row, Setting, find_rows
from ssl_vit_eval.sources import PIXELS
from ssl_vit_eval.stats.seeds import crossed_interval

Scores = dict[tuple[Setting, Side], dict[int | None, float]]


@dataclass(frozen=True)
class Gain:
    """Points over the random-initialised backbone read the same way, by the dataset's metric, paired by image and averaged over seeds.

    low, high: 95 % interval over images and replicates for one seed, the smallest and the largest seed for several.
    """

    points: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Cell:
    """Accuracies as fractions, means over seeds. value: by the metric of the dataset, which ci, spread and gain are of too; other: by the
    other one of top-1 and macro top-1; ci: interval for one seed; spread: deviation of several. pixels: best of raw pixels by the same
    protocol, None where they were not evaluated."""

    value: float
    other: float | None
    ci: tuple[float, float] | None
    spread: float | None
    seeds: int
    gain: Gain | None
    pixels: float | None = None

    @property
    def below_pixels(self) -> bool:
        return self.pixels is not None and self.value < self.pixels


@dataclass(frozen=True)
class Table:
    """All numbers of one setting: cells by arm and read-with. classes: that have test images; metric: what the dataset is judged by."""

    setting: Setting
    n_test: int
    classes: int
    metric: str
    cells: dict[tuple[Arm, str], Cell]

    def arms(self) -> list[Arm]:
        return list(dict.fromkeys(arm for arm, _ in self.cells))


@dataclass(frozen=True)
class Comparison:
    """Tables in order of appearance; sections are (method, recipe) of what was trained here; notes say what is missing or kept apart.
    arms: of all weights.

    families: the primary comparison first, then by question and setting.
    """

    tables: list[Table]
    sections: list[tuple[str, str]]
    trained_with: list[str]
    read_with: list[str]
    rows: list[Row]
    arms: dict[Weights, Arm]
    runs: list[Run]
    notes: list[Note]
    families: list[Family]
    rule: Rule

    def arm(self, row: Row) -> Arm:
        """What the row is of."""
        return self.arms[weights_of(row)]

    @cached_property
    def scores(self) -> Scores:
        """Accuracy, as a fraction, of each side in each setting by seed, in the order of the rows; None for weights without a seed."""
        found = Scores()
        for row in self.rows:
            if row.metric == metric_of(row):
                found.setdefault((Setting.of(row), Side(self.arm(row), row.read_with)), {})[row.seed] = row.value
        return found

    @cached_property
    def floors(self) -> list[Note]:
        """Of each setting: the trained backbones that raw pixels beat as they were trained, then all other scores that they beat. A random
        initialisation is before training, and not warned of."""
        return [note for as_trained in (True, False) for table in self.tables for note in self._below_pixels(table, as_trained)]

    def _below_pixels(self, table: Table, as_trained: bool) -> list[Note]:
        seen = {*(arm for arm in table.arms() if arm.trained_with), *(arm for arm in self.others(table) if arm.method != "random")}
        own = {side: cell for side, cell in table.cells.items() if side[0] in seen and (side[0].trained_with == side[1]) == as_trained}
        low = [side for side, cell in own.items() if cell.below_pixels]
        values = {"as_trained": as_trained, "setting": table.setting, "sides": low, "of": len(own)}
        return [Note("below pixels", values | {"pixels": max(cell.pixels or 0.0 for cell in own.values())})] if low else []

    def trained(self, table: Table) -> list[Arm]:
        """The lines of table B: every recipe with all that it was trained with, missing ones too, then its random initialisation."""
        own = [arm for arm in dict.fromkeys(self.arms.values()) if arm.trained_with]
        arms = [
            Arm(*section, spec)
            for section in self.sections
            for spec in [*(spec for spec in self.trained_with if Arm(*section, spec) in own), None]
        ]
        return arms if any(arm.trained_with for arm in table.arms()) else [arm for arm in arms if arm in table.arms()]

    def others(self, table: Table) -> list[Arm]:
        """The lines of table A: what was not trained here, and random backbones that nothing here started from."""
        return [arm for arm in table.arms() if arm.trained_with is None and arm[:2] not in self.sections and arm.method != PIXELS]


def build(folders: Sequence[str | Path], margin: float | None = None, family: str | None = None) -> Comparison:
    """Compare every row below the folders. margin and family: of `Rule`, where no study declares one.

    UsageError for folders without rows and for a study file that is wrong, Failure where predictions cannot be read or paired, for a row
    whose value is not that of its predictions, and for an evaluation that lacks one of its lines.
    """
    every, declarations = with_metrics(find_rows(folders))
    found = list({row.id: (row, store) for row, store in every}.values())
    answers = Answers(found)
    rows = [answers.checked(row) for row, _ in found]
    _complete(rows)
    arms, names, clashes = arms_and_notes(rows)
    tables = _tables(rows, arms, answers)
    trained = [arm for arm in arms.values() if arm.trained_with]

    runs, declared, cells = find_runs(folders, names), find_declared(folders, margin, family), cells_of(rows, arms)
    cells = {table.setting: cells[table.setting] for table in tables if table.setting in cells}  # in their order
    families = null_controls(runs)
    asked = ask(cells, {arms[weights_of(row)][:2] for row in rows if row.family in families}, declared.primary)
    cut = [Note("cut", {"line": line}) for store in {store.file: store for _, store in every}.values() if (line := store.cut_line())]
    alone = [] if any(family.question == "trained with" for family in asked.families) else two_recipes(rows, runs)
    notes = [*cut, *alone, *repeated(every), *declarations, *clashes, *_notes(tables), *missing(cells)]
    return Comparison(
        tables,
        sections=list(dict.fromkeys(arm[:2] for arm in trained)),
        trained_with=ordered(arm.trained_with for arm in trained if arm.trained_with),
        read_with=ordered(row.read_with for row in rows if row.method != PIXELS),
        rows=rows,
        arms=arms,
        runs=runs,
        notes=[*notes, *asked.notes, *revisions(asked.families), *declared.notes],
        families=measured(asked.families, answers, declared.rule),
        rule=declared.rule,
    )


def _complete(rows: Sequence[Row]) -> None:
    """Failure for an evaluation without the metric that its dataset is judged by, or without top-1."""
    metrics: dict[Key, set[str]] = defaultdict(set)
    for row in rows:
        metrics[row.key].add(row.metric)
    for row in rows:
        if lacking := {TOP1, metric_of(row)} - metrics[row.key]:
            what = f"{row.source} read with {row.read_with} on {row.dataset} by {row.protocol} has no line with {lacking.pop()}"
            raise Failure(f"{what}: evaluate it again; both lines of an evaluation ({TOP1}, {MACRO}) belong together")


def _tables(rows: Sequence[Row], names: Mapping[Weights, Arm], answers: Answers) -> list[Table]:
    """A table for each setting, those of a dataset together."""
    judged = [row for row in rows if row.metric == metric_of(row)]
    by_key, other = {row.key: row for row in judged}, {row.key: row.value for row in rows if row.metric != metric_of(row)}
    begun = starts(rows, names)  # the initialisation of a shared start is shown in every recipe that has it
    grouped: dict[Setting, dict[tuple[Arm, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    floors: dict[Setting, float] = defaultdict(float)
    for row in judged:
        setting = Setting.of(row)
        for arm in (row.method == "random" and begun.get(row.checkpoint)) or [names[weights_of(row)]]:
            grouped[setting][arm, row.read_with].append(row)
        if row.method == PIXELS:  # which have a transform of their own, their size; of several sizes the best is the floor
            place = setting._replace(transform="")
            floors[place] = max(floors[place], row.value)

    tables = []
    for setting, places in grouped.items():
        floor, cells = floors.get(setting._replace(transform="")), {}
        for (arm, spec), of in places.items():
            values, others = [row.value for row in of], [other[row.key] for row in of if row.key in other]
            cells[arm, spec] = Cell(
                value=fmean(values),
                other=fmean(others) if others else None,
                ci=(of[0].ci_low, of[0].ci_high) if len(of) == 1 else None,
                spread=stdev(values) if len(of) > 1 else None,
                seeds=len(of),
                gain=_gain(of, by_key, answers),
                pixels=None if spec == PIXELS else floor,
            )
        first = next(of[0] for of in places.values())
        classes = len(set(answers.together([first])[1].tolist()))
        tables.append(Table(setting, first.n_test, classes, first.metric, cells))
    order = list(dict.fromkeys(row.dataset for row in rows))
    return sorted(tables, key=lambda table: order.index(table.setting.dataset))  # stable: in the order of the protocols


def _gain(rows: Sequence[Row], by_key: Mapping[Key, Row], answers: Answers) -> Gain | None:
    """Over the random-initialised backbones that the checkpoints started from, on the same images, by the same protocol and readout; None
    where none was evaluated so."""
    found = []
    for row in rows:
        if row.trained_with and row.init and (start := by_key.get(row.key._replace(checkpoint=row.init))):
            (right, random), labels = answers.together([row, start])
            found.append(crossed_interval((right.double() - random.double())[None], labels if row.metric == MACRO else None))
    if len(found) == 1:
        return Gain(*found[0][:3], seeds=1)
    points = [of.points for of in found]
    return Gain(fmean(points), min(points), max(points), len(points)) if points else None


def _notes(tables: Sequence[Table]) -> list[Note]:
    """Settings that differ only in version, data or transform, and trained cells without their baseline."""
    notes = []
    for dataset, rule in dict.fromkeys((table.setting.dataset, table.setting.rule) for table in tables):
        apart = [table.setting for table in tables if (table.setting.dataset, table.setting.rule) == (dataset, rule)]
        named = {"protocol version": "version", "protocol parameters": "parameters", "data": "data", "transform": "transform"}
        if differs := [name for name, field in named.items() if len({getattr(setting, field) for setting in apart}) > 1]:
            notes.append(Note("apart", {"dataset": dataset, "rule": rule, "count": len(apart), "differs": differs}))
    trained = [
        cell for table in tables for (arm, spec), cell in table.cells.items() if arm.trained_with and ReadoutSpec.parse(spec).of_last_blocks
    ]
    if lacking := sum(cell.gain is None for cell in trained):
        notes.append(Note("no gain", {"count": lacking, "of": len(trained)}))
    if partly := sum(cell.gain is not None and cell.gain.seeds < cell.seeds for cell in trained):
        notes.append(Note("partial gain", {"count": partly}))
    return notes

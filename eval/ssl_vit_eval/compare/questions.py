"""What is asked of the rows: which cells are subtracted from which, and which differences are corrected together.

The questions, each about one setting: do arms of one recipe differ, each read as it was trained ("trained with")? Is an arm read best as
it was trained ("self-consistency")? How do readouts of one backbone differ, post hoc ("read with"), and what does the place of the final
norm do ("norm")? And is cls a register where nothing can tell them apart ("null control")? Controls, and single blocks, which the
diagnostics read as curves, take no part.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean
from typing import get_args

from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.compare.arms import Arm, Weights, ordered, weights_of
from ssl_vit_eval.compare.notes import Note
from ssl_vit_eval.compare.preregistration import Primary
from ssl_vit_eval.compare.runs import Run
from ssl_vit_eval.compare.verdict import Family, Pair, Question, Remark, Side
from ssl_vit_eval.metrics import metric_of
from ssl_vit_eval.rows import Row, Setting
from ssl_vit_eval.sources import PIXELS

Section = tuple[str, str]  # method and recipe
Seeds = dict[int | None, Row]  # one cell; None of weights without a seed
Cells = dict[Setting, dict[Arm, dict[str, Seeds]]]  # by read-with last
NULL = {"cls", "register"}


@dataclass(frozen=True)
class Asked:
    """families: not measured yet; notes: pairs that could not be made."""

    families: list[Family] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def add(self, question: Question, setting: Setting, scope: str, pairs: Sequence[Pair], primary: bool = False) -> None:
        if pairs:
            self.families.append(Family.asked(question, setting, scope, pairs, primary))


def cells_of(rows: Sequence[Row], arms: Mapping[Weights, Arm]) -> Cells:
    """The rows, by the metric of their dataset, of everything but random backbones and pixels."""
    cells: Cells = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for row in rows:
        if row.metric == metric_of(row) and row.method not in ("random", PIXELS):
            cells[Setting.of(row)][arms[weights_of(row)]][row.read_with][row.seed] = row
    return cells


def null_controls(runs: Sequence[Run]) -> set[str]:
    """Families of recipes with one class token and one register, which have no position of their own: by symmetry either could be the
    other."""
    backbones = {run.family: run.recipe.get("backbone", {}) for run in runs}
    return {
        family
        for family, backbone in backbones.items()
        if (backbone.get("cls_tokens", 1), backbone.get("registers"), backbone.get("cls_position", False)) == (1, 1, False)
    }


def ask(cells: Cells, nulls: set[Section], primary: Primary | None) -> Asked:
    """All families, the primary one first. The primary comparison leaves the family that it would be in. nulls: the sections whose cls and
    register are exchangeable."""
    asked = Asked()
    declared = _place(primary, cells, asked.notes) if primary else None
    for setting, arms in cells.items():
        if setting.control:
            continue
        order = ordered(arm.trained_with for arm in arms if arm.trained_with)
        sections: dict[Section, list[Arm]] = defaultdict(list)
        for arm in sorted((arm for arm in arms if arm.trained_with), key=lambda arm: order.index(str(arm.trained_with))):
            sections[arm[:2]].append(arm)
        for section, own in sections.items():
            sides = declared[1] if declared and (setting, section) == (declared[0], declared[1][0][:2]) else ()
            _ask_trained_with(asked, setting, arms, own, section in nulls, sides)
            consistency = [pair for arm in own if (pair := _self_consistency(arm, arms[arm], asked.notes))]
            asked.add("self-consistency", setting, own[0].section, consistency)
        for arm in [*(arm for own in sections.values() for arm in own), *(arm for arm in arms if not arm.trained_with)]:
            read, norm = _post_hoc(arm, arms[arm])
            asked.add("read with", setting, arm.name, read)
            asked.add("norm", setting, arm.name, norm)
    if declared and not any(family.primary for family in asked.families):
        asked.notes.append(Note("primary has no pairs", {"primary": primary}))
    questions = get_args(Question)
    asked.families.sort(key=lambda family: (not family.primary, questions.index(family.question)))  # stable: by setting within a question
    return asked


def _place(primary: Primary, cells: Cells, notes: list[Note]) -> tuple[Setting, tuple[Arm, Arm]] | None:
    """The setting of the primary comparison and its two arms, if it is in exactly one setting and one section."""
    places = []
    for setting, arms in cells.items():
        read = [arm for arm, specs in arms.items() if arm.trained_with in specs and primary.is_in(setting)]
        found = [primary.sides([arm for arm in read if arm[:2] == section]) for section in dict.fromkeys(arm[:2] for arm in read)]
        places += [(setting, sides) for sides in found if sides]
    if len(places) == 1:
        return places[0]
    notes.append(Note("primary has no place", {"primary": primary, "places": len(places)}))
    return None


def _ask_trained_with(
    asked: Asked, setting: Setting, cells: Mapping[Arm, dict[str, Seeds]], own: Sequence[Arm], null: bool, primary: Sequence[Arm]
) -> None:
    """All pairs of arms of one recipe, each read as it was trained; the primary pair, if there is one, and the null control apart."""
    together = []
    for one, other in combinations(own, 2):
        is_primary = {one, other} == set(primary)
        a, b = primary if is_primary else (one, other)
        read_a, read_b = str(a.trained_with), str(b.trained_with)
        rows = _same_start(cells[a].get(read_a, {}), cells[b].get(read_b, {}), (a, b), asked.notes)
        if not rows:
            continue
        pair = Pair(Side(a, read_a), Side(b, read_b), rows)
        if is_primary:
            asked.add("trained with", setting, a.section, [pair], primary=True)
        elif null and {read_a, read_b} == NULL:
            asked.add("null control", setting, a.section, [pair])
        else:
            together.append(pair)
    asked.add("trained with", setting, own[0].section, together)


def _same_start(a: Seeds, b: Seeds, arms: tuple[Arm, Arm], notes: list[Note]) -> list[tuple[Row, Row]]:
    """Pairs of the same seed, if all of them differ in the readout alone; else none, and why."""
    rows = [(a[seed], b[seed]) for seed in _common(a, b)]
    if a and b and not rows:
        notes.append(Note("no seed in common", {"arms": arms}))
    # a readout with parameters has them in its start too
    plain = not any(ReadoutSpec.parse(str(row.trained_with)).learned for pair in rows for row in pair)
    if plain and any(one.init and other.init and one.init != other.init for one, other in rows):
        notes.append(Note("other starts", {"arms": arms}))
        return []
    return rows


def _common(*cells: Seeds) -> list[int | None]:
    """The seeds that all cells have."""
    return sorted(set.intersection(*map(set, cells)), key=lambda seed: -1 if seed is None else seed)


def _self_consistency(arm: Arm, cells: Mapping[str, Seeds], notes: list[Note]) -> Pair | None:
    """Read as trained minus the best reading of other tokens, which is picked without a look at test where the rows allow it."""
    own = str(arm.trained_with)
    readings = [spec for spec in _whole(cells) if _at_post(spec) == spec != _at_post(own)]
    if own not in cells or not readings:
        return None
    # a reading of few seeds must not take the others' seeds away
    most = max(len(_common(cells[own], cells[spec])) for spec in readings)
    others = [spec for spec in readings if len(_common(cells[own], cells[spec])) == most]
    if partly := [spec for spec in readings if spec not in others]:
        notes.append(Note("readouts lack seeds", {"arm": arm, "readouts": partly}))
    seeds = _common(cells[own], *(cells[spec] for spec in others))
    if not seeds:
        return None
    rows = {spec: [cells[spec][seed] for seed in seeds] for spec in others}
    on_slice = {spec: [_slice_accuracy(row) for row in of] for spec, of in rows.items()}
    remark: Remark = "picked on train"
    if any(accuracy is None for of in on_slice.values() for accuracy in of):
        on_slice, remark = {spec: [row.value for row in of] for spec, of in rows.items()}, "picked on test"
    best = max(others, key=lambda spec: fmean(accuracy or 0.0 for accuracy in on_slice[spec]))
    pairs = [(cells[own][seed], cells[best][seed]) for seed in seeds]
    return Pair(Side(arm, own), Side(arm, best), pairs, remark if len(others) > 1 else "the only other")


def _slice_accuracy(row: Row) -> float | None:
    """Of the settings that were chosen, which were the best on the slice of train; None where nothing was chosen."""
    return max(row.grid["slice_accuracy"]) if row.grid and row.grid.get("slice_accuracy") else None


def _post_hoc(arm: Arm, cells: Mapping[str, Seeds]) -> tuple[list[Pair], list[Pair]]:
    """Every pair of readouts: those with cls, or with the first one, minus it; other places of the norm against the readout with the norm
    at its place."""
    specs = _whole(cells)
    norms = [spec for spec in specs if _at_post(spec) != spec and _at_post(spec) in specs]
    plain = [spec for spec in specs if spec not in norms]
    read = [*((spec, plain[0]) for spec in plain[1:]), *combinations(plain[1:], 2)]  # cls is the first where it is there
    return _pairs(arm, cells, read), _pairs(arm, cells, [(spec, _at_post(spec)) for spec in norms])


def _pairs(arm: Arm, cells: Mapping[str, Seeds], specs: Sequence[tuple[str, str]]) -> list[Pair]:
    found = [Pair(Side(arm, a), Side(arm, b), [(cells[a][seed], cells[b][seed]) for seed in _common(cells[a], cells[b])]) for a, b in specs]
    return [pair for pair in found if pair.rows]


def _whole(cells: Mapping[str, Seeds]) -> list[str]:
    """The readouts of the last blocks."""
    return ordered(spec for spec in cells if ReadoutSpec.parse(spec).of_last_blocks)


def _at_post(spec: str) -> str:
    """The same readout with the final norm at its usual place."""
    return str(ReadoutSpec.parse(spec).with_norm("post"))

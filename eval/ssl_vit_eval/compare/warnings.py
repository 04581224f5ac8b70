"""What a reader must know of the rows before the numbers: what is missing, measured twice, or of several revisions of the code."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

from ssl_vit.model.readout import ReadoutSpec
from ssl_vit.train.folder import recipe_changes
from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.notes import Note
from ssl_vit_eval.compare.questions import Cells, Section
from ssl_vit_eval.compare.runs import Run
from ssl_vit_eval.compare.verdict import Family
from ssl_vit_eval.metrics import metric_of
from ssl_vit_eval.rows import Key, Row, RowStore, Setting


def repeated(found: Sequence[tuple[Row, RowStore]]) -> list[Note]:
    """Evaluations that were measured more than once, with different results."""
    again: dict[Key, list[tuple[Row, RowStore]]] = defaultdict(list)
    for row, store in found:
        if row.metric == metric_of(row):
            again[row.key].append((row, store))
    notes = []
    for of in again.values():
        last, store = of[-1]
        values = [row.value for row, _ in of if row.value != last.value]
        # a store keeps the predictions of its last measurement only
        others = {other.folder: (row, other) for row, other in of if other.folder != store.folder}
        if values or not all(_same_answers((last, store), other) for other in others.values()):
            notes.append(Note("repeated", {"row": last, "times": len(of), "values": values}))
    return notes


def missing(cells: Cells) -> list[Note]:
    """Cells that arms or seeds of the same recipe have, for each setting and recipe."""
    arms: dict[Section, dict[Arm, None]] = defaultdict(dict)
    seeds: dict[Section, set[int]] = defaultdict(set)
    for of_setting in cells.values():
        for arm, readings in of_setting.items():
            if arm.trained_with:
                arms[arm[:2]][arm] = None
                seeds[arm[:2]] |= {seed for cell in readings.values() for seed in cell if seed is not None}
    notes = []
    for setting, of_setting in cells.items():
        for section, own in arms.items():
            there = {(arm, seed, spec) for arm in own for spec, cell in of_setting.get(arm, {}).items() for seed in cell}
            read = dict.fromkeys((spec, arm.trained_with) for arm in own for spec in of_setting.get(arm, {}))
            specs = dict.fromkeys(spec for spec, _ in read if ReadoutSpec.parse(spec).of_last_blocks)
            # where every arm was read as it was trained and no other way, the other ways are not missing
            crossed = any(spec in specs and spec != trained_with for spec, trained_with in read)
            # a readout with parameters is read by the arm that trained it, by others only where the protocol trains it anew
            anew = {spec for spec, trained_with in read if not ReadoutSpec.parse(spec).learned or spec != trained_with}
            asked = {arm: [spec for spec in specs if spec == arm.trained_with or (crossed and spec in anew)] for arm in own}
            lacking = {
                (arm, seed): [spec for spec in of if (arm, seed, spec) not in there]
                for arm, of in asked.items()
                for seed in sorted(seeds[section])
            }
            if count := sum(map(len, lacking.values())):
                whole = [(arm.trained_with, seed) for (arm, seed), of in lacking.items() if of and of == asked[arm]]
                partly = [(arm.trained_with, seed, ", ".join(of)) for (arm, seed), of in lacking.items() if of and of != asked[arm]]
                values = {"section": next(iter(own)).section, "setting": setting, "count": count, "whole": whole, "partly": partly}
                notes.append(Note("missing", values | {"asked": len(seeds[section]) * sum(map(len, asked.values()))}))
    return notes


def two_recipes(rows: Sequence[Row], runs: Sequence[Run]) -> list[Note]:
    """Trainings of one method that are of several recipes: in which fields, as far as their run folders are there."""
    recipes = {run.family: {key: value for key, value in run.recipe.items() if key not in ("readout", "seed")} for run in runs}
    found: dict[str, dict[str, str]] = defaultdict(dict)  # method -> family -> the first source of it
    for row in rows:
        if row.trained_with and row.family:
            found[row.method].setdefault(row.family, row.source)
    notes = []
    for sources in found.values():
        (first, a), *others = sources.items()
        for other, b in others:
            changed = recipe_changes(recipes[first], recipes[other]) if {first, other} <= recipes.keys() else ""
            notes.append(Note("two recipes", {"a": a, "b": b, "changed": changed}))
    return notes


def revisions(families: Iterable[Family]) -> list[Note]:
    """Families whose rows were measured by several revisions of the code."""
    found: dict[str, None] = {}
    places: dict[tuple[str, Setting], None] = {}
    for family in families:
        own = dict.fromkeys(row.git or "unknown" for pair in family.pairs for rows in pair.rows for row in rows)
        if len(own) > 1:
            found |= own
            places[family.scope, family.setting] = None
    return [Note("revisions", {"revisions": list(found), "places": list(places)})] if found else []


def _same_answers(one: tuple[Row, RowStore], other: tuple[Row, RowStore]) -> bool:
    (right, labels), (right_other, labels_other) = (store.predictions(row) for row, store in (one, other))
    return torch.equal(right, right_other) and torch.equal(labels, labels_other)

"""What a reader must know of the rows before the numbers: what is missing, measured twice, or of several revisions of the code."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.questions import Cells, Group, Section
from ssl_vit_eval.metrics import metric_of
from ssl_vit_eval.rows import Key, Row, RowStore, Setting


def repeated(found: Sequence[tuple[Row, RowStore]]) -> list[str]:
    """Evaluations that were measured more than once, with different results."""
    again: dict[Key, list[tuple[Row, RowStore]]] = defaultdict(list)
    for row, store in found:
        if row.metric == metric_of(row):
            again[row.key].append((row, store))
    notes = []
    for of in again.values():
        row, store = of[-1]
        values = list(dict.fromkeys(f"{100 * other.value:.2f} %" for other, _ in of if other.value != row.value))
        what = f"{row.source} read with {row.read_with}, {row.dataset}, {row.protocol}"
        if values:
            notes.append(f"{what} was measured {len(of)} times, as {', '.join(values)} and as {100 * row.value:.2f} %: the last counts")
        # one store keeps the predictions of the last measurement only
        elif any(other.folder != store.folder and not _same_answers((row, store), (one, other)) for one, other in of):
            notes.append(f"{what} was measured {len(of)} times, always as {100 * row.value:.2f} % but with other answers: the last counts")
    return notes


def missing(cells: Cells) -> list[str]:
    """Cells that arms or seeds of the same recipe have: a sentence for each setting and recipe."""
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
            here = {arm: of_setting.get(arm, {}) for arm in own}
            specs = list(dict.fromkeys(spec for found in here.values() for spec in found if ReadoutSpec.parse(spec).of_last_blocks))
            # where every arm was read as it was trained and no other way, the other ways are not missing
            crossed = any(spec != arm.trained_with for arm in own for spec in here[arm] if spec in specs)
            expected = [
                (arm, seed, spec)
                for arm in own
                for seed in sorted(seeds[section])
                for spec in specs
                if (_readable(spec, arm, here) if crossed else spec == arm.trained_with)
            ]
            lacking = [(arm, seed, spec) for arm, seed, spec in expected if seed not in here[arm].get(spec, {})]
            if lacking:
                where = f"{next(iter(own)).section}, {_place(setting)}"
                notes.append(
                    f"{where}: {len(lacking)} of {len(expected)} cells are missing ({listed(_summed_up(lacking, expected))}); "
                    "what has no partner of the same seed is in no difference"
                )
    return notes


def revisions(groups: Iterable[Group]) -> list[str]:
    """Families whose rows were measured by several revisions of the code."""
    found: dict[str, None] = {}
    where: dict[str, None] = {}
    for group in groups:
        of_group = dict.fromkeys(row.git or "unknown" for pair in group.pairs for rows in pair.rows for row in rows)
        if len(of_group) > 1:
            found |= of_group
            where[f"{group.scope} on {_place(group.setting)}"] = None
    if not found:
        return []
    return [f"rows of {len(found)} revisions of the code ({listed(key[:8] for key in found)}) are compared: {listed(where)}"]


def _same_answers(one: tuple[Row, RowStore], other: tuple[Row, RowStore]) -> bool:
    (right, labels), (right_other, labels_other) = (store.predictions(row) for row, store in (one, other))
    return torch.equal(right, right_other) and torch.equal(labels, labels_other)


def _readable(spec: str, arm: Arm, here: dict[Arm, dict[str, dict[int | None, Row]]]) -> bool:
    """A readout with parameters is read by the arm that trained it, by others only where the protocol trains it anew."""
    if not ReadoutSpec.parse(spec).learned or arm.trained_with == spec:
        return True
    return any(spec in of for other, of in here.items() if other.trained_with != spec)


def _summed_up(lacking: Sequence[tuple[Arm, int, str]], expected: Sequence[tuple[Arm, int, str]]) -> list[str]:
    """One text for each arm and seed, those of which all is missing first; the readouts only where some are there."""
    whole, partly = [], []
    for arm, seed in dict.fromkeys((arm, seed) for arm, seed, _ in lacking):
        specs = [spec for one, of, spec in lacking if (one, of) == (arm, seed)]
        text = f"trained with {arm.trained_with}, seed {seed}"
        if len(specs) < sum((one, of) == (arm, seed) for one, of, _ in expected):
            partly.append(f"{text}, read with {', '.join(specs)}")
        else:
            whole.append(text)
    return whole + partly


def listed(texts: Iterable[str], most: int = 4) -> str:
    """The first of them, then the number of the others."""
    items = list(texts)
    return "; ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _place(setting: Setting) -> str:
    return f"{setting.dataset}, {setting.rule} v{setting.version}"

"""Arms across datasets, each read as it was trained: ranks, interquartile mean, probability of improvement.

Only datasets on which every arm has every seed enter, so that no arm is judged on easier data or luckier seeds; what is left out is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from ssl_vit_eval.compare.arms import Arm, ordered
from ssl_vit_eval.compare.comparison import Comparison, Table
from ssl_vit_eval.compare.notes import Note
from ssl_vit_eval.rows import Setting
from ssl_vit_eval.stats.seeds import Estimate, interquartile_mean, probability_of_improvement


class Protocol(NamedTuple):
    """A protocol as it was run, whatever the dataset; parameters: hash."""

    name: str
    version: int
    parameters: str


@dataclass(frozen=True)
class Ranking:
    """The arms of one recipe under one protocol, best mean rank first. No arms and no datasets where none can be compared.

    scores: as fractions, of each arm [datasets][seeds]. ranks: of each arm on each dataset, by its mean over seeds; 1 is the best, equal
    means share the mean of their ranks. floors: of each dataset, the accuracy of the random-initialised backbone, mean over the arms'
    readouts, or of chance (one over the number of classes) where not all of them have one below 100 %. iqm: interquartile mean, over
    datasets and seeds, of each arm's normalised scores, which are 0 at the floor and 1 where all is right: else it would be that of the
    datasets of middling difficulty. improvement: the probability that a run of the first beats one of the second on a dataset, mean over
    datasets (Agarwal et al. 2021, section 4.3, which normalises likewise).
    """

    method: str
    recipe: str
    protocol: Protocol
    datasets: list[str]
    seeds: list[int]
    scores: dict[Arm, list[list[float]]]
    floors: list[float]
    ranks: dict[Arm, list[float]]
    iqm: dict[Arm, Estimate]
    improvement: dict[tuple[Arm, Arm], Estimate]
    left_out: list[Note]

    def normalised(self, arm: Arm) -> list[list[float]]:
        """Its scores as the interquartile mean takes them."""
        return [[(value - floor) / (1 - floor) for value in of] for of, floor in zip(self.scores[arm], self.floors, strict=True)]


def rankings(comparison: Comparison) -> list[Ranking]:
    """One for each recipe and protocol by which two arms or more were read as trained, on two datasets or more; without controls."""
    scores = {
        (setting, side.arm): {seed: value for seed, value in seeds.items() if seed is not None}
        for (setting, side), seeds in comparison.scores.items()
        if side.read_with == side.arm.trained_with and not setting.control
    }
    found = []
    for section in comparison.sections:
        for protocol in dict.fromkeys(_protocol(setting) for setting, arm in scores if arm[:2] == section):
            of = {key: seeds for key, seeds in scores.items() if key[1][:2] == section and _protocol(key[0]) == protocol}
            specs = ordered(arm.trained_with for _, arm in of if arm.trained_with)
            if len(specs) > 1 and len({setting.dataset for setting, _ in of}) > 1:
                found.append(_ranking(comparison, section, protocol, [Arm(*section, spec) for spec in specs], of))
    return found


def _ranking(
    comparison: Comparison,
    section: tuple[str, str],
    protocol: Protocol,
    arms: list[Arm],
    of: Mapping[tuple[Setting, Arm], dict[int, float]],
) -> Ranking:
    had = {arm: {seed for (_, other), seeds in of.items() if other == arm for seed in seeds} for arm in arms}
    seeds = sorted(set.intersection(*had.values()))
    left_out = list[Note]()
    if extra := sorted(set.union(*had.values()) - set(seeds)):
        left_out.append(Note("seeds left out", {"seeds": extra}))
    datasets: dict[str, Setting] = {}
    for name in dict.fromkeys(setting.dataset for setting, _ in of):
        variants = list(dict.fromkeys(setting for setting, _ in of if setting.dataset == name))
        lacking = [arm.trained_with for arm in arms if not set(seeds) <= of.get((variants[0], arm), {}).keys()]
        if len(variants) > 1 or lacking or not seeds:
            left_out.append(Note("dataset left out", {"dataset": name, "versions": len(variants), "lacking": lacking}))
        else:
            datasets[name] = variants[0]
    if len(datasets) < 2:
        return Ranking(*section, protocol, [], seeds, {}, [], {}, {}, {}, left_out)

    scores = {arm: [[of[setting, arm][seed] for seed in seeds] for setting in datasets.values()] for arm in arms}
    # means that differ by their rounding are equal
    means = np.array([[round(fmean(values), 9) for values in scores[arm]] for arm in arms])
    ranks = dict(zip(arms, rankdata(-means, axis=0).tolist(), strict=True))
    arms = sorted(arms, key=lambda arm: fmean(ranks[arm]))
    improvement = {(a, b): probability_of_improvement(scores[a], scores[b]) for a, b in combinations(arms, 2)}
    tables = [next(table for table in comparison.tables if table.setting == setting) for setting in datasets.values()]
    of_arms, of_ranks = {arm: scores[arm] for arm in arms}, {arm: ranks[arm] for arm in arms}
    found = Ranking(*section, protocol, list(datasets), seeds, of_arms, _floors(tables, arms), of_ranks, {}, improvement, left_out)
    return replace(found, iqm={arm: interquartile_mean(found.normalised(arm)) for arm in arms})


def _floors(tables: Sequence[Table], arms: Sequence[Arm]) -> list[float]:
    starts = [[table.cells.get((arm._replace(trained_with=None), str(arm.trained_with))) for arm in arms] for table in tables]
    floors = [fmean(cell.value for cell in of if cell) if all(of) else 1.0 for of in starts]
    return floors if max(floors) < 1 else [1 / table.classes for table in tables]


def _protocol(setting: Setting) -> Protocol:
    return Protocol(setting.protocol, setting.version, setting.parameters)

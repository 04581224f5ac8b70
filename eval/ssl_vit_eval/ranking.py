"""Arms across data sets, each read as it was trained: ranks, interquartile mean, probability of improvement.

Only data sets on which every arm has every seed enter, so that no arm is judged on easier data or luckier seeds; what is left out is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import rankdata

from ssl_vit_eval.arms import Arm, Setting, ordered
from ssl_vit_eval.comparison import MISSING, Comparison
from ssl_vit_eval.plots import INK, SOFT, Plot, draw, looks, name_of, wrapped
from ssl_vit_eval.scores import scores_by_seed
from ssl_vit_eval.seeds import Estimate, interquartile_mean, probability_of_improvement
from ssl_vit_eval.sheets import Sheet, Value

FEW = 3  # data sets: with fewer a rank only describes


class Protocol(NamedTuple):
    """A protocol as it was run, whatever the data set; parameters: hash."""

    name: str
    version: int
    parameters: str


@dataclass(frozen=True)
class Ranking:
    """The arms of one recipe under one protocol, best mean rank first. No arms and no data sets where none can be compared.

    scores: top-1 as fractions, of each arm [data sets][seeds]. ranks: of each arm on each data set, by its mean over seeds; 1 is the best,
    equal means share the mean of their ranks. iqm: interquartile mean of each arm's scores over data sets and seeds. improvement: the
    probability that a run of the first beats one of the second on a data set, mean over data sets (Agarwal et al. 2021, section 4.3).
    """

    method: str
    recipe: str
    protocol: Protocol
    datasets: list[str]
    seeds: list[int]
    scores: dict[Arm, list[list[float]]]
    ranks: dict[Arm, list[float]]
    iqm: dict[Arm, Estimate]
    improvement: dict[tuple[Arm, Arm], Estimate]
    left_out: list[str]

    @property
    def title(self) -> str:
        """Which arms, and how they were judged."""
        return f"{self.method} ({self.recipe}) · {self.protocol.name} v{self.protocol.version}"

    @property
    def basis(self) -> str:
        """What the ranking rests on, and what it leaves out, in sentences."""
        if not self.datasets:
            return ". ".join(["Nothing to rank: no two data sets have every seed of every arm", *self.left_out]) + "."
        few = f": fewer than {FEW}, so this describes these data sets and says nothing about others" if len(self.datasets) < FEW else ""
        seeds = f"{len(self.seeds)} seed{'' if len(self.seeds) == 1 else 's'} of each arm"
        return ". ".join([f"{seeds} on {len(self.datasets)} data sets ({', '.join(self.datasets)}){few}", *self.left_out]) + "."


def rankings(comparison: Comparison) -> list[Ranking]:
    """One for each recipe and protocol by which two arms or more were read as trained, on two data sets or more; without controls."""
    scores = {
        (setting, side.arm): {seed: value for seed, value in seeds.items() if seed is not None}
        for (setting, side), seeds in scores_by_seed(comparison.rows).items()
        if side.read_with == side.arm.trained_with and not setting.control
    }
    found = []
    for section in comparison.sections:
        for protocol in dict.fromkeys(_protocol(setting) for setting, arm in scores if arm[:2] == section):
            of = {key: seeds for key, seeds in scores.items() if key[1][:2] == section and _protocol(key[0]) == protocol}
            specs = ordered(arm.trained_with for _, arm in of if arm.trained_with)
            if len(specs) > 1 and len({setting.dataset for setting, _ in of}) > 1:
                found.append(_ranking(section, protocol, [Arm(*section, spec) for spec in specs], of))
    return found


def sheets(found: Sequence[Ranking]) -> list[Sheet]:
    """The arms of all rankings, and their pairs; none where nothing was ranked."""
    if not found:
        return []
    arms, pairs = [], []
    for of in found:
        place = [Value(of.method), Value(of.recipe), Value(f"{of.protocol.name} v{of.protocol.version}")]
        size = [Value(str(len(many)), float(len(many))) for many in (of.datasets, of.seeds)]
        for arm, ranks in of.ranks.items():
            rank = Value(f"{fmean(ranks):.2f}", fmean(ranks))
            arms.append([*place, Value(str(arm.trained_with)), rank, *_percent(of.iqm[arm]), *size])
        for (a, b), estimate in of.improvement.items():
            pairs.append([*place, Value(str(a.trained_with)), Value(str(b.trained_with)), *_percent(estimate), *size])
    head = ["method", "recipe", "protocol"]
    note = " ".join(f"{of.title}: {of.basis}" for of in found)
    return [
        Sheet(
            "rankings",
            "Across data sets, each arm read as it was trained",
            [*head, "trained with", "mean rank", "interquartile mean, %", "low", "high", "data sets", "seeds"],
            arms,
            f"Rank 1 is the best, by the mean over seeds. Intervals (95 %) over seeds, of these data sets. {note}",
        ),
        Sheet(
            "improvement",
            "Across data sets: the probability that a run of A beats a run of B",
            [*head, "A", "B", "P(A > B), %", "low", "high", "data sets", "seeds"],
            pairs,
            "Mean over data sets, ties count half; 50 % is no improvement. Intervals (95 %) over seeds, of these data sets.",
        ),
    ]


def plots(found: Sequence[Ranking]) -> list[Plot]:
    """For each ranking its ranks beside the interquartile means, then the pairs."""
    return [plot for of in found if of.datasets for plot in (_ranks(of), _pairs(of))]


def _ranking(section: tuple[str, str], protocol: Protocol, arms: list[Arm], of: Mapping[tuple[Setting, Arm], dict[int, float]]) -> Ranking:
    had = {arm: {seed for (_, other), seeds in of.items() if other == arm for seed in seeds} for arm in arms}
    seeds = sorted(set.intersection(*had.values()))
    left_out = []
    if extra := sorted(set.union(*had.values()) - set(seeds)):
        left_out.append(f"Left out: seed {', '.join(map(str, extra))}, which not every arm has")
    datasets: dict[str, Setting] = {}
    for name in dict.fromkeys(setting.dataset for setting, _ in of):
        variants = list(dict.fromkeys(setting for setting, _ in of if setting.dataset == name))
        lacking = [str(arm.trained_with) for arm in arms if not set(seeds) <= of.get((variants[0], arm), {}).keys()]
        if len(variants) > 1:
            left_out.append(f"Left out: {name}, measured in {len(variants)} versions of its data or transform")
        elif lacking or not seeds:
            left_out.append(f"Left out: {name}, which lacks seeds of {', '.join(lacking) or 'every arm'}")
        else:
            datasets[name] = variants[0]
    if len(datasets) < 2:
        return Ranking(*section, protocol, [], seeds, {}, {}, {}, {}, left_out)

    scores = {arm: [[of[setting, arm][seed] for seed in seeds] for setting in datasets.values()] for arm in arms}
    # means that differ by their rounding are equal
    means = np.array([[round(fmean(values), 9) for values in scores[arm]] for arm in arms])
    ranks = dict(zip(arms, rankdata(-means, axis=0).tolist(), strict=True))
    arms = sorted(arms, key=lambda arm: fmean(ranks[arm]))
    return Ranking(
        *section,
        protocol,
        list(datasets),
        seeds,
        {arm: scores[arm] for arm in arms},
        {arm: ranks[arm] for arm in arms},
        {arm: interquartile_mean(scores[arm]) for arm in arms},
        {(a, b): probability_of_improvement(scores[a], scores[b]) for a, b in combinations(arms, 2)},
        left_out,
    )


def _protocol(setting: Setting) -> Protocol:
    return Protocol(setting.protocol, setting.version, setting.parameters)


def _percent(estimate: Estimate) -> list[Value]:
    return [Value(MISSING) if share is None else Value(f"{100 * share:.1f}", 100 * share) for share in estimate]


def _ranks(of: Ranking) -> Plot:
    look = looks(str(arm.trained_with) for arm in of.ranks)

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for y, (arm, ranks) in enumerate(of.ranks.items()):
            colour, marker, _ = look[str(arm.trained_with)]
            heights = [y] if len(ranks) == 1 else np.linspace(y - 0.25, y + 0.25, len(ranks)).tolist()
            left.scatter(ranks, heights, s=14, color=SOFT, linewidths=0)
            left.scatter([fmean(ranks)], [y], s=70, marker=marker, facecolor=colour, edgecolor=INK, zorder=3)
            _estimate(right, of.iqm[arm], y, colour, marker)
        left.set_xlim(0.7, len(of.ranks) + 0.3)
        left.set_xticks(range(1, len(of.ranks) + 1))
        left.set_xlabel("rank, 1 is the best")
        left.set_title("mean rank; dots: a data set each")
        left.set_yticks(range(len(of.ranks)), [wrapped(str(arm.trained_with), 1.6) for arm in of.ranks])
        left.set_ylim(len(of.ranks) - 0.5, -0.5)
        right.set_xlabel("interquartile mean of top-1, %")
        right.set_title("over data sets and seeds")

    name = name_of("ranks", of.recipe, of.protocol.name, key=(of.method, of.recipe, of.protocol))
    return draw(name, f"Across data sets: {of.title}", (8.0, 0.9 + 0.45 * len(of.ranks)), paint, of.basis)


def _pairs(of: Ranking) -> Plot:
    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.axvline(50.0, color=INK, linewidth=0.8)
        for y, estimate in enumerate(of.improvement.values()):
            _estimate(axes, estimate, y, INK, "D")
        axes.set_xlim(-3, 103)
        axes.set_xlabel("P(a run of the first beats one of the second), %")
        axes.set_yticks(range(len(of.improvement)), [wrapped(f"{a.trained_with} > {b.trained_with}", 2.4) for a, b in of.improvement])
        axes.set_ylim(len(of.improvement) - 0.5, -0.5)

    name = name_of("improvement", of.recipe, of.protocol.name, key=(of.method, of.recipe, of.protocol))
    title = f"Probability of improvement across data sets: {of.title}"
    return draw(name, title, (8.0, 0.7 + 0.34 * len(of.improvement)), paint, f"Mean over data sets, ties count half. {of.basis}")


def _estimate(axes: Axes, estimate: Estimate, y: int, colour: str, marker: str) -> None:
    """A share in % with its interval."""
    if estimate.low is not None and estimate.high is not None:
        axes.plot([100 * estimate.low, 100 * estimate.high], [y, y], color=INK, linewidth=1.5, solid_capstyle="butt")
    axes.scatter([100 * estimate.value], [y], s=54, marker=marker, facecolor=colour, edgecolor=INK, zorder=3)

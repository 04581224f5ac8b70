"""Figures across datasets and protocols: ranks of the arms, and whether a linear probe agrees with k-NN."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.compare.across_datasets import Ranking
from ssl_vit_eval.compare.arms import ordered
from ssl_vit_eval.compare.comparison import Comparison
from ssl_vit_eval.compare.verdict import Side
from ssl_vit_eval.report.plotting import INK, SOFT, Plot, bar, draw, draw_panels, looks, name_of, wrapped
from ssl_vit_eval.report.text import METRIC_NAMES, ranking_basis, ranking_title
from ssl_vit_eval.rows import Setting
from ssl_vit_eval.sources import PIXELS
from ssl_vit_eval.stats.seeds import Estimate

Points = dict[str, dict[Side, list[tuple[float, float]]]]  # x and y in %, a point a seed, by recipe
NEIGHBOURS, LINEAR = "knn", ("logreg", "linear")  # how the names of protocols begin


def agreement_plots(comparison: Comparison) -> list[Plot]:
    """A figure for each dataset and pair of k-NN and linear protocol; readouts of other blocks than the last are left out."""
    by_setting: dict[Setting, dict[Side, dict[int | None, float]]] = {}
    for (setting, side), seeds in comparison.scores.items():
        if side.read_with != PIXELS and not setting.control and ReadoutSpec.parse(side.read_with).blocks == (-1,):
            by_setting.setdefault(setting, {})[side] = seeds
    metrics = {table.setting: table.metric for table in comparison.tables}
    drawn = []
    for x, across in by_setting.items():
        for y, up in by_setting.items():
            if x[:3] == y[:3] and x.protocol.startswith(NEIGHBOURS) and y.protocol.startswith(LINEAR):
                points: Points = {}
                for side, seeds in across.items():  # in their order, so that every run draws the same
                    if both := [(100 * seeds[seed], 100 * value) for seed, value in up.get(side, {}).items() if seed in seeds]:
                        points.setdefault(side.arm.section if side.arm.trained_with else "not trained here", {})[side] = sorted(both)
                if points:
                    drawn.append(_scatter(x, y, metrics[x], points))
    return drawn


def _scatter(x: Setting, y: Setting, metric: str, points: Points) -> Plot:
    arms = ordered(str(side.arm.trained_with) for of in points.values() for side in of if side.arm.trained_with)
    specs = ordered(side.read_with for of in points.values() for side in of)
    colours, markers = looks(arms), looks(specs)

    key: dict[str, Artist] = {f"trained with {arm}": Line2D([], [], color=colours[arm].colour, linewidth=5) for arm in arms}
    for spec in specs:
        key[f"read {spec}"] = Line2D([], [], ls="", marker=markers[spec].marker, markerfacecolor="none", markeredgecolor="black")

    def paint(axes: Axes, of: Mapping[Side, list[tuple[float, float]]]) -> dict[str, Artist]:
        for (arm, spec), seeds in sorted(of.items(), key=str):
            colour = colours[arm.trained_with].colour if arm.trained_with else SOFT
            fill = colour if arm.trained_with else "none"
            xs, ys = zip(*seeds, strict=True)
            axes.scatter(xs, ys, s=26, marker=markers[spec].marker, facecolor=fill, edgecolor=colour, alpha=0.8)
        axes.set_xlabel(f"{x.protocol}, {METRIC_NAMES[metric]}, %")
        axes.set_ylabel(f"{y.protocol}, {METRIC_NAMES[metric]}, %")
        return key

    title = f"Linear probe against k-NN: {x.dataset} · {y.protocol} v{y.version} against {x.protocol} v{x.version}"
    name = name_of("agreement", x.dataset, x.protocol, y.protocol, key=(x, y))
    note = "A dot for each arm, readout of the last block, and seed. Hollow: not trained here."
    return draw_panels(name, title, dict(sorted(points.items())), paint, note)


def ranking_plots(found: Sequence[Ranking]) -> list[Plot]:
    """For each ranking its ranks beside the interquartile means, then the pairs."""
    return [plot for of in found if of.datasets for plot in (_ranks(of), _pairs(of))]


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
        left.set_title("mean rank; dots: a dataset each")
        left.set_yticks(range(len(of.ranks)), [wrapped(str(arm.trained_with), 1.6) for arm in of.ranks])
        left.set_ylim(len(of.ranks) - 0.5, -0.5)
        right.set_xlabel("interquartile mean, normalised, %")
        right.set_title("over datasets and seeds")

    name = name_of("ranks", of.recipe, of.protocol.name, key=(of.method, of.recipe, of.protocol))
    return draw(name, f"Across datasets: {ranking_title(of)}", (8.0, 0.9 + 0.45 * len(of.ranks)), paint, ranking_basis(of))


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
    title = f"Probability of improvement across datasets: {ranking_title(of)}"
    return draw(name, title, (8.0, 0.7 + 0.34 * len(of.improvement)), paint, f"Mean over datasets, ties count half. {ranking_basis(of)}")


def _estimate(axes: Axes, of: Estimate, y: int, colour: str, marker: str) -> None:
    """A share in % with its interval."""
    low, high = (100 * (of.value if bound is None else bound) for bound in (of.low, of.high))
    bar(axes, low, high, 100 * of.value, y, colour, marker)

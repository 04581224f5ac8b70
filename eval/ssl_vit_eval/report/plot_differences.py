"""Differences as figures: a family with its intervals and margin, and the pairs of seeds behind one difference."""

import math
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ssl_vit_eval.compare.comparison import Scores
from ssl_vit_eval.compare.verdict import Difference, Family, Outcome, Rule
from ssl_vit_eval.report.plotting import INK, SOFT, Plot, bar, draw, legend, name_of, wrapped
from ssl_vit_eval.report.text import METRIC_NAMES, NOTES, interval_text, points_text, side_name, signed

OUTCOMES: dict[Outcome, tuple[str, str]] = {  # colour and marker; undecided is hollow
    "better": ("#0072b2", ">"),
    "worse": ("#d55e00", "<"),
    "no difference": (INK, "s"),
    "undecided": ("#ffffff", "o"),
}
BAND = "#e4e8ec"
INCHES = 0.42  # of height for a difference
FRAME = 0.7  # inches for the axis


def forest(family: Family, rule: Rule) -> Plot:
    """Each difference of a family with its interval, its seeds as dots, and the band of differences that do not matter."""
    names = [wrapped(_label(family, difference), 2.4) for difference in family.differences]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        _ground(axes, rule)
        for y, difference in enumerate(family.differences):
            _bar(axes, difference, y)
            if len(difference.of_seeds) > 1:
                axes.scatter(difference.of_seeds, [y + 0.28] * len(difference.of_seeds), s=12, color=SOFT, linewidths=0)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"first − second, points of {METRIC_NAMES[family.metric]}")
        beside = axes.secondary_yaxis("right")
        beside.set_yticks(range(len(names)), [_numbers(difference, rule) for difference in family.differences])
        beside.tick_params(length=0)
        beside.spines["right"].set_visible(False)
        legend(figure, _key([difference.outcome for difference in family.differences], rule))

    question = f"primary comparison, {family.question}" if family.primary else family.question
    title = f"{question[0].upper()}{question[1:]}: {family.scope} · {family.setting.dataset} · {family.setting.rule}"
    name = name_of("forest", family.question, family.setting.dataset, family.setting.protocol, key=(family.scope, *_where(family)))
    height = FRAME + INCHES * sum(1 + 0.4 * name.count("\n") for name in names)
    return draw(name, title, (8.4, height), paint, NOTES[f"bars, {family.unit}"])


def paired_seeds(family: Family, rule: Rule, scores: Scores) -> list[Plot]:
    """For each difference over several seeds: both scores of every seed, joined by a line, and beside them the seeds' differences
    with their mean and interval. Meant for the primary comparison; KeyError where `scores` lack one of a difference."""
    several = [difference for difference in family.differences if len(difference.seeds) > 1]
    return [_pairs(family, difference, rule, scores) for difference in several]


def _pairs(family: Family, difference: Difference, rule: Rule, scores: Scores) -> Plot:
    sides = [difference.a, difference.b]
    lines = [[100 * scores[family.setting, side][seed] for side in sides] for seed in difference.seeds]
    names = [side_name(family.question, side) for side in sides]

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
        for values in lines:
            left.plot([0, 1], values, color=SOFT, linewidth=1.0, marker="o", markersize=3.5)
        means = [math.fsum(values) / len(lines) for values in zip(*lines, strict=True)]
        left.plot([0, 1], means, color=INK, linewidth=2.4, marker="D", markersize=6)
        left.set_xlim(-0.35, 1.35)
        left.set_xticks([0, 1], [wrapped(name, 1.2) for name in names])
        left.set_ylabel(f"{METRIC_NAMES[family.metric]}, %")
        left.set_title("a line for each seed; bold: mean")
        _ground(right, rule)
        count = len(lines)
        right.scatter(difference.of_seeds, range(count), s=26, color=SOFT, linewidths=0)
        _bar(right, difference, count)
        right.set_ylim(count + 0.6, -0.6)
        right.set_yticks(range(count + 1), [*(f"seed {seed}" for seed in difference.seeds), "mean"])
        right.tick_params(axis="y", length=0)
        right.set_title(_numbers(difference, rule))
        right.set_xlabel(f"{_label(family, difference)}, points of {METRIC_NAMES[family.metric]}")
        legend(figure, _key([difference.outcome], rule))

    title = f"{_label(family, difference)}: {family.scope} · {family.setting.dataset} · {family.setting.rule}"
    name = name_of("seeds", *names, family.setting.dataset, family.setting.protocol, key=(sides, family.scope, *_where(family)))
    return draw(name, title, (7.6, 1.5 + 0.24 * len(lines)), paint, NOTES[f"bars, {family.unit}"])


def _where(family: Family) -> tuple[object, ...]:
    return family.question, family.setting, family.primary


def _label(family: Family, difference: Difference) -> str:
    return " − ".join(side_name(family.question, side) for side in (difference.a, difference.b))


def _numbers(difference: Difference, rule: Rule) -> str:
    return f"{signed(difference.points)} {interval_text(difference.low, difference.high, rule)}  {difference.outcome}"


def _ground(axes: Axes, rule: Rule) -> None:
    axes.axvspan(-rule.margin, rule.margin, color=BAND, linewidth=0)
    axes.axvline(0.0, color=INK, linewidth=0.8)
    axes.grid(axis="y", visible=False)


def _bar(axes: Axes, difference: Difference, y: int) -> None:
    bar(axes, difference.low, difference.high, difference.points, y, *OUTCOMES[difference.outcome])


def _key(outcomes: Sequence[Outcome], rule: Rule) -> dict[str, Artist]:
    """What the markers of these outcomes and the band mean."""
    key: dict[str, Artist] = {
        outcome: Line2D([], [], linestyle="", marker=marker, markersize=7, markerfacecolor=colour, markeredgecolor=INK)
        for outcome, (colour, marker) in OUTCOMES.items()
        if outcome in outcomes
    }
    return key | {f"within ±{points_text(rule.margin)}": Patch(color=BAND)}

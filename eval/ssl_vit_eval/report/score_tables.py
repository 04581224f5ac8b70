"""What came out, as tables: every score, every difference, the places of the final norm side by side, and ranks across data sets.

And one cell as text, the same in the terminal and in the report.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.compare.across_datasets import Ranking
from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.comparison import Cell, Comparison, Gain
from ssl_vit_eval.compare.verdict import Family, Rule
from ssl_vit_eval.report.run_tables import GONE, code, number
from ssl_vit_eval.report.table import MISSING, Sheet, Value
from ssl_vit_eval.report.text import p_text, side_name, signed
from ssl_vit_eval.sources import PIXELS
from ssl_vit_eval.stats.seeds import Estimate

ZERO = "○"  # marks a gain whose interval includes zero
NORMS = ("post", "pre", "pooled")
DIFFERENCES = (
    "Points of top-1, A minus B, paired by image and by pretraining seed; low and high bound the 95 % interval. Discordant: share of "
    "images that just one of the two answers rightly, in %. Resolvable: the smallest true difference, in points, that this comparison "
    "would have called better four times in five (∞: with so few seeds none, however large). Seeds –: one set of weights, compared over "
    "images."
)


def score_text(cell: Cell) -> str:
    """Top-1 in %, over several seeds with their standard deviation and number: `71.2`, `71.2 ± 0.4, n = 3`."""
    spread = "" if cell.spread is None else f" ± {100 * cell.spread:.1f}, n = {cell.seeds}"
    return f"{100 * cell.top1:.1f}{spread}"


def under_text(cell: Cell) -> str:
    """What stands below the score: the gain where there is one, else the interval over images, as points and %."""
    if cell.gain:
        return gain_text(cell.gain)
    return "" if cell.ci is None else f"[{100 * cell.ci[0]:.1f}, {100 * cell.ci[1]:.1f}]"


def gain_text(gain: Gain) -> str:
    """`+6.1 [4.4, 7.8]`; ○ behind it where the interval, or the range of several seeds, includes zero."""
    return f"{signed(gain.points)} {bounds_text(gain)}" + (f" {ZERO}" if gain.includes_zero else "")


def bounds_text(gain: Gain) -> str:
    """`[4.4, 7.8]`, the interval of one seed, or `(5.0 … 7.1)`, the range of several."""
    low, high = signed(gain.low).lstrip("+"), signed(gain.high).lstrip("+")
    return f"[{low}, {high}]" if gain.seeds == 1 else f"({low} … {high})"


def scores(comparison: Comparison) -> Sheet:
    """Every cell of every table in one long list, with its spread, macro top-1 and gain."""
    lines = []
    for table in comparison.tables:
        setting = table.setting
        for (arm, spec), cell in table.cells.items():
            low, high = cell.ci or (None, None)
            gain = cell.gain
            lines.append(
                [
                    *(Value(text) for text in (setting.dataset, setting.rule, arm.method, arm.recipe, arm.trained_with or MISSING, spec)),
                    _percent(cell.top1),
                    _percent(cell.spread),
                    number(cell.seeds),
                    _percent(low),
                    _percent(high),
                    _percent(cell.macro),
                    *(_points(value) for value in ((gain.points, gain.low, gain.high) if gain else (None, None, None))),
                    number(table.n_test),
                    number(setting.version),
                    Value(setting.transform),
                    code(setting.data),
                ]
            )
    head = ["data set", "protocol", "method", "recipe", "trained with", "read with", "top-1, %", "deviation", "n", "low", "high"]
    head += ["macro top-1, %", "gain", "gain low", "gain high", "test images", "version", "transform", "data"]
    note = (
        "Means over n pretraining seeds and their standard deviation; for one seed the interval over images instead. Gain: points over the "
        "random-initialised backbone, with the interval over images of one seed or the smallest and largest of several."
    )
    return Sheet("scores", "Every score", head, lines, note)


def differences(name: str, title: str, families: Sequence[Family], rule: Rule) -> Sheet:
    """One line for each difference of the families."""
    lines = []
    for family in families:
        setting, own = family.setting, family.question == "self-consistency"
        for of in family.differences:
            lines.append(
                [
                    Value(of.a.arm.name if own else family.scope),
                    Value(setting.dataset),
                    Value(setting.rule),
                    *(Value(side.read_with if own else side_name(family.question, side)) for side in (of.a, of.b)),
                    *(_points(value) for value in (of.points, of.low, of.high)),
                    Value(of.outcome, style=of.outcome),
                    Value(p_text(of.p, rule), of.p),
                    Value(p_text(of.corrected, rule), of.corrected) if family.is_corrected else GONE,
                    number(100 * of.discordance, "{:.1f}"),
                    number(len(of.seeds)) if family.unit == "seeds" else GONE,
                    number(of.images, "{:,}"),
                    Value("∞", of.resolvable) if of.resolvable == float("inf") else number(of.resolvable, "{:.1f}"),
                ]
            )
    head = ["of", "data set", "protocol", "A", "B", "points", "low", "high", "verdict of A", "p", "corrected p", "discordant", "seeds"]
    return Sheet(name, title, [*head, "images", "resolvable"], lines, DIFFERENCES, only_in_files=("images",))


def norms(comparison: Comparison) -> Sheet:
    """Readouts that were read in several places of the final norm, one line each and the places side by side."""
    lines = []
    for table in comparison.tables:
        found: dict[tuple[Arm, str], dict[str, Value]] = {}
        for (arm, spec), cell in table.cells.items():
            if placed := _placed(spec):
                found.setdefault((arm, placed[0]), {})[placed[1]] = Value(score_text(cell), 100 * cell.top1)
        lines += [
            [Value(table.setting.dataset), Value(table.setting.rule), Value(arm.name), Value(spec), *(of.get(norm, GONE) for norm in NORMS)]
            for (arm, spec), of in found.items()
            if len(of) > 1
        ]
    head = ["data set", "protocol", "backbone", "readout", "norm, then pool (post)", "no norm (pre)", "pool, then norm (pooled)"]
    return Sheet("norms", "Where the final norm stands: top-1, %", head, lines)


def _placed(spec: str) -> tuple[str, str] | None:
    """The readout with its norm in the default place, and where its norm is; None for terms of several norms, and for pixels."""
    if spec == PIXELS:
        return None
    terms = ReadoutSpec.parse(spec).terms
    if len(places := {term.norm for term in terms}) > 1:
        return None
    return str(ReadoutSpec(tuple(replace(term, norm="post") for term in terms))), places.pop()


def _percent(share: float | None) -> Value:
    return number(None if share is None else 100 * share, "{:.1f}")


def _points(points: float | None) -> Value:
    return GONE if points is None else Value(signed(points), points)


def ranking_sheets(found: Sequence[Ranking]) -> list[Sheet]:
    """The arms of all rankings, and their pairs; none where nothing was ranked."""
    if not found:
        return []
    arms, pairs = [], []
    for of in found:
        place = [Value(of.method), Value(of.recipe), Value(f"{of.protocol.name} v{of.protocol.version}")]
        size = [Value(str(len(many)), float(len(many))) for many in (of.datasets, of.seeds)]
        for arm, ranks in of.ranks.items():
            rank = Value(f"{fmean(ranks):.2f}", fmean(ranks))
            arms.append([*place, Value(str(arm.trained_with)), rank, *_with_bounds(of.iqm[arm]), *size])
        for (a, b), estimate in of.improvement.items():
            pairs.append([*place, Value(str(a.trained_with)), Value(str(b.trained_with)), *_with_bounds(estimate), *size])
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


def _with_bounds(estimate: Estimate) -> list[Value]:
    return [Value(MISSING) if share is None else Value(f"{100 * share:.1f}", 100 * share) for share in estimate]

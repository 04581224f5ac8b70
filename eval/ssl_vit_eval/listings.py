"""What came out, as tables: every score, every difference, and the places of the final norm side by side."""

from collections.abc import Sequence
from dataclasses import replace

from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.arms import Arm
from ssl_vit_eval.comparison import Comparison, score_text
from ssl_vit_eval.models import PIXELS
from ssl_vit_eval.records import GONE, code, number
from ssl_vit_eval.sheets import MISSING, Sheet, Value
from ssl_vit_eval.verdict import Family, Rule
from ssl_vit_eval.wording import p_text, side_name, signed

NORMS = ("post", "pre", "pooled")
DIFFERENCES = (
    "Points of top-1, A minus B, paired by image and by pretraining seed; low and high bound the 95 % interval. Discordant: share of "
    "images that just one of the two answers rightly, in %. Resolvable: the smallest true difference, in points, that this comparison "
    "would have called better four times in five (∞: with so few seeds none, however large). Seeds –: one set of weights, compared over "
    "images."
)


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

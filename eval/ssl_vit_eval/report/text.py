"""Differences and verdicts as text: signs, bounds, p-values and sentences, the same in the terminal, the report and W&B."""

import math
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from ssl_vit_eval.compare.across_datasets import Ranking
from ssl_vit_eval.compare.notes import Note
from ssl_vit_eval.compare.verdict import Difference, Family, Outcome, Question, Rule, Side, Unit, excludes_zero, within_margin
from ssl_vit_eval.stats.seeds import seeds_needed, smallest_p

WORDS: dict[str, Any] = yaml.safe_load(files("ssl_vit_eval.report").joinpath("templates/words.yaml").read_text(encoding="utf-8"))
METRIC_NAMES: dict[str, str] = WORDS["metrics"]  # as columns and axes have them
NOTES: dict[str, str] = WORDS["notes"]  # below tables and plots
QUESTIONS: dict[Question, tuple[str, str]] = WORDS["questions"]  # a short title and a long one
OUTCOMES: dict[Outcome, tuple[str, str]] = WORDS["outcomes"]  # a sign and what it means
T_SEEDS = 3  # the fewest to advise for Student's t: with two, 95 % are 13 standard errors
FEW = 3  # datasets: with fewer a rank only describes
_MOST_DIGITS = 6


def listed(texts: Iterable[str], most: int = 4) -> str:
    """The first of them, then the number of the others."""
    items = list(texts)
    return "; ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


_SENTENCES = Environment(undefined=StrictUndefined)
_SENTENCES.filters |= {
    "listed": listed,
    "each": lambda items, form: [form.format(*(item if isinstance(item, tuple) else (item,))) for item in items],
    "percent": lambda share, digits=2: f"{100 * share:.{digits}f} %",
}


def note_text(note: Note) -> str:
    """What it warns of as a sentence, without its full stop."""
    return _SENTENCES.from_string(WORDS["warnings"][note.kind]).render(note.values)


def rule_text(rule: Rule) -> str:
    """The rule in words, to be shown wherever a verdict is."""
    return str(
        WORDS["rule"].format(level=rule.level, margin=rule.margin, test=WORDS["tests"][rule.test], family=WORDS["families"][rule.family])
    )


def ranking_title(of: Ranking) -> str:
    """Which arms, and how they were judged."""
    return f"{of.method} ({of.recipe}) · {of.protocol.name} v{of.protocol.version}"


def ranking_basis(of: Ranking) -> str:
    """What the ranking rests on, and what it leaves out, in sentences."""
    first = "Nothing to rank: no two datasets have every seed of every arm"
    if of.datasets:
        few = f": fewer than {FEW}, so this describes these datasets and says nothing about others" if len(of.datasets) < FEW else ""
        first = f"{count(len(of.seeds), 'seed')} of each arm on {len(of.datasets)} datasets ({', '.join(of.datasets)}){few}"
    return ". ".join([first, *map(note_text, of.left_out)]) + "."


def signed(points: float, digits: int = 1) -> str:
    """With its sign; zero, also a rounded one, has none."""
    text = f"{points:+.{digits}f}".replace("-", "−")
    return text if float(text[1:]) else text[1:]


def interval_text(low: float, high: float, rule: Rule) -> str:
    """`[0.3, 2.1]`, with as many decimals as `digits_of` says."""
    digits = digits_of(low, high, rule)
    return f"[{signed(low, digits).lstrip('+')}, {signed(high, digits).lstrip('+')}]"


def digits_of(low: float, high: float, rule: Rule) -> int:
    """Decimals to show: one, or more where one would tell another story of zero, of the margin or of the largest difference left."""
    truth = _facts(low, high, rule)
    return next(
        (digits for digits in range(1, _MOST_DIGITS) if truth == _facts(round(low, digits), round(high, digits), rule)), _MOST_DIGITS
    )


def p_text(p: float, rule: Rule) -> str:
    """`.031`, `< .001`, with more decimals where three would put it on the other side of the level."""
    if p < 0.001:
        return "< .001"
    if p > 0.9995:
        return "1"
    same = (digits for digits in range(3, _MOST_DIGITS) if (round(p, digits) <= rule.level) == (p <= rule.level))
    digits = next(same, _MOST_DIGITS)
    return f"{p:.{digits}f}".removeprefix("0")


def count(number: float | int, what: str) -> str:
    """`1 seed`, `2 seeds`, `2,000,000 seeds`."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{text} {what}{'' if number == 1 else 's'}"


def points_text(points: float | int) -> str:
    """`1 point`, `1.2 points`."""
    return count(points, "point")


def side_name(question: Question, side: Side) -> str:
    """What a side is called within its family, whose scope says the rest."""
    if question in ("trained with", "null control"):
        return str(side.arm.trained_with)
    return f"{side.arm.trained_with} read with {side.read_with}" if question == "self-consistency" else side.read_with


def words_of(family: Family, difference: Difference, rule: Rule) -> str:
    """The verdict as a sentence, without its full stop."""
    text = _verdict(family.question, family.unit, difference, rule)
    if family.question == "null control":
        text = f"null control, a difference is not expected to be resolvable: {text}"
        if difference.outcome in ("better", "worse"):
            text += (
                f". This is a false alarm by construction: chance gives one in {1 / rule.level:.0f} such controls; "
                "if it comes oftener, the instrument is off"
            )
    if rule.test == "t" and len(difference.seeds) > 1 and difference.outcome != "undecided":
        text += f", by Student's t over {len(difference.seeds)} seeds, whose differences are taken as normal"
    return f"{text}; {WORDS['remarks'][difference.remark].format(b=difference.b.read_with)}" if difference.remark else text


def _facts(low: float, high: float, rule: Rule) -> tuple[bool, bool, float]:
    """What an interval says of zero, of the margin, and within it how large a difference may still be."""
    outside, inside = excludes_zero(low, high), within_margin(low, high, rule)
    return outside, inside, _rounded_up(low, high) if inside else 0.0


def _verdict(question: Question, unit: Unit, d: Difference, rule: Rule) -> str:
    needs = _needs(d.comparisons, rule)
    a, b = (side_name(question, side) for side in (d.a, d.b))
    of = "of these weights, " if unit == "images" else ""
    if d.outcome in ("better", "worse"):
        low, high = (d.low, d.high) if d.outcome == "better" else (-d.high, -d.low)
        points = signed(abs(d.points), digits_of(low, high, rule)).lstrip("+")
        less = f", by less than the margin of {points_text(rule.margin)}" if within_margin(d.low, d.high, rule) else ""
        return f"{of}{a} is {d.outcome} than {b} by {points} points {interval_text(low, high, rule)}{less}"
    if d.outcome == "no difference":
        seen = f"these {d.images:,} images" if unit == "images" else "this study"
        return f"{of}no difference between {a} and {b} of more than {points_text(_rounded_up(d.low, d.high))} that {seen} could see"
    if unit == "seeds" and len(d.seeds) < 2:
        two = question in ("trained with", "null control")
        why = "one seed of each is two networks, and says nothing about the readouts" if two else "one seed says nothing about another one"
        return f"undecided: {why}; {needs}"
    interval = f"undecided: {of}{a} − {b} lies in {interval_text(d.low, d.high, rule)}"
    if within_margin(d.low, d.high, rule) and not excludes_zero(d.low, d.high):
        beyond = p_text(d.corrected_beyond, rule)
        return f"{interval}, within the margin, but the corrected p of a difference beyond it is {beyond}"
    if math.isinf(d.resolvable):
        if rule.test == "t" or unit == "images":
            few = "the replicates" if unit == "images" else f"{len(d.seeds)} seeds"
            return f"{interval}; no difference is resolvable by Student's t: {few} are too few for {count(d.comparisons, 'comparison')}"
        reach = p_text(min(1.0, d.comparisons * smallest_p(len(d.seeds))), rule)
        return f"{interval}; no difference is resolvable: the best corrected p of {len(d.seeds)} seeds is {reach}, {needs}"
    return f"{interval}; a true difference of {d.resolvable:.1f} points would have been found four times in five"


def _needs(comparisons: int, rule: Rule) -> str:
    if rule.test == "t":
        return f"Student's t needs {T_SEEDS} seeds or more"
    family = "one comparison" if comparisons == 1 else f"a family of {comparisons} comparisons"
    return f"{family} needs {seeds_needed(comparisons, rule.level)} seeds"


def _rounded_up(low: float, high: float) -> float:
    # to 0.1, but 0.3 is not 0.30000000000000004
    return max(0.1, math.ceil(round(10 * max(abs(low), abs(high)), 6)) / 10)

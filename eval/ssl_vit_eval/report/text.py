"""Differences and verdicts as text: signs, bounds, p-values and sentences, the same in the terminal, the report and W&B."""

import math
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, Template

from ssl_vit_eval.compare.across_datasets import Ranking
from ssl_vit_eval.compare.notes import Note
from ssl_vit_eval.compare.verdict import Difference, Family, Outcome, Question, Rule, Side, excludes_zero, within_margin
from ssl_vit_eval.metrics import METRIC_NAMES as METRIC_NAMES
from ssl_vit_eval.stats.seeds import seeds_needed, smallest_p

WORDS: dict[str, Any] = yaml.safe_load(files("ssl_vit_eval.report").joinpath("templates/words.yaml").read_text(encoding="utf-8"))
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


def joined(names: Iterable[str]) -> str:
    """`cls, gap and register`, each once."""
    found = list(dict.fromkeys(names))
    return "".join(found) if len(found) < 2 else f"{', '.join(found[:-1])} and {found[-1]}"


@cache
def _template(kind: str) -> Template:
    sentences = Environment(undefined=StrictUndefined)
    sentences.filters |= {"listed": listed, "joined": joined, "count": count, "points": points_text, "told": note_text}
    sentences.filters["each"] = lambda items, form: [form.format(*(item if isinstance(item, tuple) else (item,))) for item in items]
    sentences.filters["percent"] = lambda share, digits=2: f"{100 * share:.{digits}f} %"
    return sentences.from_string(WORDS["sentences"][kind])


def sentence(kind: str, **values: Any) -> str:
    """One of the `sentences` in words.yaml, filled in."""
    return " ".join(_template(kind).render(values).split())


def note_text(note: Note) -> str:
    """What it warns of as a sentence, without its full stop."""
    return sentence(note.kind, **note.values)


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
    return sentence("ranking", of=of, few=FEW)


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
    d, (a, b) = difference, (side_name(family.question, side) for side in (difference.a, difference.b))
    low, high = (-d.high, -d.low) if d.outcome == "worse" else (d.low, d.high)
    numbers = {
        "points": signed(abs(d.points), digits_of(low, high, rule)).lstrip("+"),
        "interval": interval_text(low, high, rule),
        "within": within_margin(low, high, rule),
        "excludes_zero": excludes_zero(low, high),
        "most": _rounded_up(low, high),
        "is_resolvable": math.isfinite(d.resolvable),
        "needed": seeds_needed(d.comparisons, rule.level),
        "reach": p_text(min(1.0, d.comparisons * smallest_p(len(d.seeds))), rule),
        "beyond": p_text(d.corrected_beyond, rule),
    }
    return sentence("verdict", family=family, d=d, rule=rule, a=a, b=b, t_seeds=T_SEEDS, **numbers)


def _facts(low: float, high: float, rule: Rule) -> tuple[bool, bool, float]:
    """What an interval says of zero, of the margin, and within it how large a difference may still be."""
    outside, inside = excludes_zero(low, high), within_margin(low, high, rule)
    return outside, inside, _rounded_up(low, high) if inside else 0.0


def _rounded_up(low: float, high: float) -> float:
    # to 0.1, but 0.3 is not 0.30000000000000004
    return max(0.1, math.ceil(round(10 * max(abs(low), abs(high)), 6)) / 10)

"""The first page of a report: what was compared, what came out, by which rule, and what keeps it from saying more."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape
from math import isinf

from ssl_vit_eval.compare.arms import arms_of, weights_of
from ssl_vit_eval.compare.comparison import Comparison
from ssl_vit_eval.compare.verdict import Difference, Family, Outcome, Question, Rule
from ssl_vit_eval.report.page import Block, Bullets, Drawings, Grid, Heading, Text
from ssl_vit_eval.report.plot_differences import paired_seeds
from ssl_vit_eval.report.run_tables import selection_warnings
from ssl_vit_eval.report.score_grids import at_last
from ssl_vit_eval.report.table import Sheet, Value, slug
from ssl_vit_eval.report.text import side_name, signed, words_of

SIGNS: dict[Outcome, str] = {"better": ">", "worse": "<", "no difference": "≈", "undecided": "?"}
MEANINGS: dict[Outcome, str] = {
    "better": "A is better",
    "worse": "B is better",
    "no difference": "no difference that matters",
    "undecided": "undecided",
}
KEY = "; ".join(f"A {sign} B: {MEANINGS[outcome]}" for outcome, sign in SIGNS.items()) + "."
QUESTIONS: dict[Question, str] = {
    "trained with": "Which readout to train with (B)",
    "null control": "Null control (B)",
    "self-consistency": "Read as trained, or otherwise (B)",
    "read with": "Which readout to read with (A)",
    "norm": "Where the final norm stands (A)",
}
TABLE_A: frozenset[Question] = frozenset({"read with", "norm"})


def families_of(comparison: Comparison, question: Question) -> list[Family]:
    """The families of the question, what was declared before the training first."""
    return sorted((family for family in comparison.families if family.question == question), key=lambda family: not family.primary)


def lead(comparison: Comparison) -> list[Text]:
    """What was compared, and what came out, for someone who sees the report for the first time."""
    return [Text(_compared(comparison)), Text(_outcome(comparison))]


def blocks(comparison: Comparison) -> list[Block]:
    """The primary comparison, every verdict at a glance, the rule and the warnings."""
    primary = [family for family in comparison.families if family.primary]
    found: list[Block] = [
        Text(f"{words_of(family, difference, comparison.rule)}.", difference.outcome, f"Declared before training, {about(family)}:")
        for family in primary
        for difference in family.differences
    ]
    if drawn := [plot for family in primary for plot in paired_seeds(family, comparison.rule, comparison.rows)]:
        found.append(Drawings(drawn))
    warnings = [*comparison.notes, *selection_warnings(comparison.rows)]
    if warnings:
        found += [Heading("Warnings"), Bullets([f"{note.rstrip('.')}." for note in warnings], "note")]
    found += [Heading("All verdicts at a glance"), *_glances(comparison)] if comparison.families else []
    return [*found, Text(comparison.rule.text, "soft", "The rule.")]


def chip(family: Family, difference: Difference) -> str:
    """`cls > gap +1.2`; of a self-consistency `cls: cls > gap +1.2`."""
    own = family.question == "self-consistency"
    a, b = (side.read_with if own else side_name(family.question, side) for side in (difference.a, difference.b))
    return f"{f'{difference.a.arm.trained_with}: ' if own else ''}{a} {SIGNS[difference.outcome]} {b} {signed(difference.points)}"


def _compared(comparison: Comparison) -> str:
    rows = [row for row in comparison.rows if row.metric == "top1"]
    trained = [row for row in rows if row.trained_with]
    judged = f"judged on {_and(row.dataset for row in rows)} by {_and(row.protocol for row in rows)}"
    if not trained:
        return f"{_count(len({row.source for row in rows}), 'model')} were read with {_readouts(comparison)} and {judged}."
    arms, seeds = arms_of(trained), defaultdict(set)
    for row in trained:
        seeds[arms[weights_of(row)]].add(row.seed)
    fewest, most = min(map(len, seeds.values())), max(map(len, seeds.values()))
    each = _count(most, "seed") if fewest == most else f"{fewest} to {most} seeds"
    return (
        f"{_count(len({row.checkpoint for row in trained}), 'vision transformer')} were pretrained without labels "
        f"({_and(f'{method}: {recipe}' for method, recipe in comparison.sections)}), the loss attached to one readout at a time: "
        f"{_and(comparison.trained_with)}, {each} each. "
        f"Then they were frozen, read with {_readouts(comparison)} and {judged}."
    )


def _readouts(comparison: Comparison) -> str:
    last = [spec for spec in comparison.read_with if at_last(spec) == spec]
    return _and(last) + ("" if len(last) == len(comparison.read_with) else " (and at other blocks)")


def _outcome(comparison: Comparison) -> str:
    pairs = [(family, of) for family in families_of(comparison, "trained with") for of in family.differences]
    if not pairs:
        return "No two of them can be compared as trainings, so that this report shows numbers, and no verdict on what to train with."
    counts = Counter(of.outcome for _, of in pairs)
    decided = counts["better"] + counts["worse"]
    text = f"Of {_count(len(pairs), 'comparison')} of two trainings, each read as it was trained, "
    text += f"{decided} found a better readout, {counts['no difference']} no difference that matters, {counts['undecided']} stay undecided."
    better = [f"{_winner(family, of)} ({about(family)})" for family, of in pairs if of.outcome in ("better", "worse")]
    if hopeless := sum(of.outcome == "undecided" and isinf(of.resolvable) for _, of in pairs):
        text += f" {hopeless} of these could not be decided with so few seeds, however large the difference."
    named = f" Better: {'; '.join(better[:3])}{f'; and {len(better) - 3} more' if len(better) > 3 else ''}." if better else ""
    return text + named


def _winner(family: Family, of: Difference) -> str:
    sides = (of.a, of.b) if of.outcome == "better" else (of.b, of.a)
    return " over ".join(side_name(family.question, side) for side in sides)


def about(family: Family) -> str:
    """`dino (dino_photos), builtin:photos, knn`."""
    return f"{family.scope}, {family.setting.dataset}, {family.setting.rule}"


def _glances(comparison: Comparison) -> list[Block]:
    """A table for each question, tables A apart from tables B and folded where there are both; the first is led by what the signs mean."""
    asked = {question: of for question in QUESTIONS if (of := families_of(comparison, question))}
    both = asked.keys() & TABLE_A and asked.keys() - TABLE_A
    grids = [_glance(question, of, comparison.rule, folded=bool(both and question in TABLE_A)) for question, of in asked.items()]
    signs = "".join(f'<span class="badge {slug(outcome)}">A {sign} B</span> {MEANINGS[outcome]}' for outcome, sign in SIGNS.items())
    return [replace(grid, html=grid.html if place else f'<p class="key">{signs}</p>{grid.html}') for place, grid in enumerate(grids)]


def _glance(question: Question, families: Sequence[Family], rule: Rule, folded: bool) -> Grid:
    """A line for each family, a coloured chip for each of its differences."""
    body, lines = "", []
    for family in families:
        declared = ", declared before training" if family.primary else ""
        cells = [family.scope + declared, family.setting.dataset, family.setting.rule]
        named = list(map(Value, cells))
        chips = [(slug(of.outcome), escape(words_of(family, of, rule)), escape(chip(family, of))) for of in family.differences]
        badges = " ".join(f'<span class="badge {name}" title="{words}">{text}</span>' for name, words, text in chips)
        body += f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}<td>{badges}</td></tr>\n"
        for of in family.differences:
            sentence = Value(words_of(family, of, rule))
            lines.append([*named, Value(chip(family, of)), Value(of.outcome, style=of.outcome), sentence])
    what = "trained with: read so, and with the best other" if question == "self-consistency" else "A and B"
    head = ["of", "data set", "protocol", f"{what}; A − B in points"]
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    title = f"{QUESTIONS[question]}: {_count(sum(len(family.differences) for family in families), 'difference')}"
    html = (
        f'<details{"" if folded else " open"} class="glance"><summary>{title}</summary><div class="wide"><table class="plain">'
        f"<thead><tr>{columns}</tr></thead><tbody>\n{body}</tbody></table></div></details>"
    )
    return Grid(html, Sheet(f"verdicts-{slug(question)}", title, [*head, "verdict of A", "in words"], lines, KEY))


def _and(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    return "".join(found) if len(found) < 2 else f"{', '.join(found[:-1])} and {found[-1]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

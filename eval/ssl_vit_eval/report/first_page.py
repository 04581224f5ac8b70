"""The first page of a report: what to conclude, how sure that is, what to do next; then every verdict, the rule, and the warnings."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import isinf

from ssl_vit_eval.compare.comparison import Comparison
from ssl_vit_eval.compare.verdict import Difference, Family, Question, Rule
from ssl_vit_eval.metrics import TOP1
from ssl_vit_eval.report.page import Block, Bullets, Figures, Heading, Listing, Text, template
from ssl_vit_eval.report.plot_differences import paired_seeds
from ssl_vit_eval.report.run_tables import frame_of_rows, selection_warnings
from ssl_vit_eval.report.score_tables import at_last
from ssl_vit_eval.report.table import Sheet, frame_of, slug
from ssl_vit_eval.report.text import OUTCOMES, QUESTIONS, T_SEEDS, count, note_text, rule_text, sentence, side_name, signed, words_of
from ssl_vit_eval.stats.seeds import seeds_needed

KEY = "; ".join(f"A {sign} B: {meaning}" for sign, meaning in OUTCOMES.values()) + "."
TABLE_A: frozenset[Question] = frozenset({"read with", "norm"})


def families_of(comparison: Comparison, question: Question) -> list[Family]:
    """The families of the question, what was declared before the training first."""
    return sorted((family for family in comparison.families if family.question == question), key=lambda family: not family.primary)


def lead(comparison: Comparison) -> list[Text]:
    """What was compared, what to conclude, how sure it is, what to do next; for someone who sees the report for the first time."""
    return [
        Text(_compared(comparison)),
        *_declared(comparison),
        Text(_outcome(comparison), lead="What to conclude."),
        Text(_certainty(comparison), lead="How sure that is."),
        Text(next_step(comparison), lead="What to do next."),
    ]


def blocks(comparison: Comparison) -> list[Block]:
    """The primary comparison seed by seed, the warnings, every verdict at a glance, the rule."""
    primary = [family for family in comparison.families if family.primary]
    drawn = [plot for family in primary for plot in paired_seeds(family, comparison.rule, comparison.scores)]
    found: list[Block] = [Figures(drawn)] if drawn else []
    if notes := warnings_of(comparison):
        found += [Heading("Warnings"), Bullets([f"{note.rstrip('.')}." for note in notes], "note")]
    found += [Heading("All verdicts at a glance"), *_glances(comparison)] if comparison.families else []
    return [*found, Text(rule_text(comparison.rule), "soft", "The rule.")]


def warnings_of(comparison: Comparison) -> list[str]:
    """What keeps the numbers from meaning what they seem to; first what raw pixels beat."""
    return [
        *dict.fromkeys([*first_warnings(comparison), *map(note_text, comparison.notes)]),
        *selection_warnings(frame_of_rows(comparison.rows)),
    ]


def first_warnings(comparison: Comparison) -> list[str]:
    """Those that the screen shows as well: what raw pixels beat, what is lost, and what is not compared."""
    return [note_text(note) for note in [*comparison.floors, *(note for note in comparison.notes if note.kind in ("cut", "two recipes"))]]


def chip(family: Family, difference: Difference) -> str:
    """`cls > gap +1.2`; of a self-consistency `cls: cls > gap +1.2`."""
    own = family.question == "self-consistency"
    a, b = (side.read_with if own else side_name(family.question, side) for side in (difference.a, difference.b))
    return f"{f'{difference.a.arm.trained_with}: ' if own else ''}{a} {OUTCOMES[difference.outcome][0]} {b} {signed(difference.points)}"


def _compared(comparison: Comparison) -> str:
    rows, seeds = [row for row in comparison.rows if row.metric == TOP1], defaultdict(set)
    for row in rows:
        if row.trained_with:
            seeds[comparison.arm(row)].add(row.seed)
    last = [spec for spec in comparison.read_with if at_last(spec) == spec]
    return sentence("compared", comparison=comparison, rows=rows, seeds=[*map(len, seeds.values())], last=last)


def _declared(comparison: Comparison) -> list[Text]:
    return [
        Text(f"{words_of(family, of, comparison.rule)}.", of.outcome, f"Declared before training, {about(family)}:")
        for family in comparison.families
        if family.primary
        for of in family.differences
    ]


def _trainings(comparison: Comparison) -> list[tuple[Family, Difference]]:
    return [(family, of) for family in families_of(comparison, "trained with") for of in family.differences]


def _outcome(comparison: Comparison) -> str:
    pairs = _trainings(comparison)
    better = [f"{_winner(family, of)} ({about(family)})" for family, of in pairs if of.outcome in ("better", "worse")]
    return sentence("outcome", counts=Counter(of.outcome for _, of in pairs), better=better)


def _certainty(comparison: Comparison) -> str:
    found = [of for _, of in _trainings(comparison)]
    hopeless = sum(of.outcome == "undecided" and isinf(of.resolvable) for of in found)
    resolvable, warnings = [of.resolvable for of in found if not isinf(of.resolvable)], len(warnings_of(comparison))
    return sentence("certainty", rule=comparison.rule, hopeless=hopeless, resolvable=resolvable, warnings=warnings)


def next_step(comparison: Comparison) -> str:
    """What the outcome asks for, the most urgent first."""
    rule, found = comparison.rule, [of for _, of in _trainings(comparison)]
    undecided = [of for of in found if of.outcome == "undecided"]
    asked = {
        "below_pixels": any(note.values["as_trained"] for note in comparison.floors),
        "undecided": bool(undecided),
        "hopeless": any(len(of.seeds) < 2 if rule.test == "t" else isinf(of.resolvable) for of in undecided),
        "found": any(of.outcome in ("better", "worse") for of in found),
    }
    needed = seeds_needed(max((of.comparisons for of in undecided), default=1), rule.level)
    text = sentence("next", rule=rule, needed=needed, alone=seeds_needed(1, rule.level), t_seeds=T_SEEDS, **asked)
    return f"{text[0].upper()}{text[1:]}."


def _winner(family: Family, of: Difference) -> str:
    sides = (of.a, of.b) if of.outcome == "better" else (of.b, of.a)
    return " over ".join(side_name(family.question, side) for side in sides)


def about(family: Family) -> str:
    """`dino (dino_photos), builtin:photos, knn v2`."""
    return f"{family.scope}, {family.setting.dataset}, {family.setting.rule} v{family.setting.version}"


def _glances(comparison: Comparison) -> list[Block]:
    """A table for each question, tables A apart from tables B and folded where there are both; the first is led by what the signs mean."""
    asked = {question: of for question in QUESTIONS if (of := families_of(comparison, question))}
    both = bool(asked.keys() & TABLE_A and asked.keys() - TABLE_A)
    return [
        _glance(question, of, comparison.rule, is_open=not (both and question in TABLE_A), is_first=not place)
        for place, (question, of) in enumerate(asked.items())
    ]


def _glance(question: Question, families: Sequence[Family], rule: Rule, is_open: bool, is_first: bool) -> Listing:
    what = "trained with: read so, and with the best other" if question == "self-consistency" else "A and B"
    head = ["of", "dataset", "protocol", f"{what}; A − B in points"]
    lines, records = [], []
    for family in families:
        place = [family.scope + (", declared before training" if family.primary else ""), family.setting.dataset, family.setting.rule]
        chips = [{"text": chip(family, of), "outcome": of.outcome, "words": words_of(family, of, rule)} for of in family.differences]
        lines.append((place, chips))
        columns = [*head, "verdict of A", "in words"]
        records += [dict(zip(columns, [*place, one["text"], one["outcome"], one["words"]], strict=True)) for one in chips]
    title = f"{QUESTIONS[question][0]}: {count(len(records), 'difference')}"
    sheet = Sheet(f"verdicts-{slug(question)}", title, frame_of(records), KEY, styles={"verdict of A": "badge"})
    outcomes = OUTCOMES if is_first else {}
    return Listing(sheet, html=template("glance.html", title=title, head=head, lines=lines, open=is_open, outcomes=outcomes))

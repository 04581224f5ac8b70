"""The verdicts as text, for the terminal."""

from collections import Counter
from collections.abc import Sequence
from textwrap import wrap
from typing import get_args

from ssl_vit_eval.arms import Setting
from ssl_vit_eval.verdict import Family, Outcome, Rule
from ssl_vit_eval.wording import line

SHOWN = 24  # differences of a question; the report has all
IN_FULL = ("trained with", "null control")
TITLES = {
    "trained with": "Trained with: arms of one recipe, each read as it was trained",
    "self-consistency": "Self-consistency: read as trained, minus the best other readout",
    "read with": "Read with, post hoc: one backbone, read in several ways",
    "norm": "Norm: the same readout with the final norm at another place",
    "null control": "Null control: cls and the only register are exchangeable",
}
_WIDTH = 140


def verdicts(families: Sequence[Family], rule: Rule) -> str:
    """The rule, then what training changes in full, and of the other questions how they came out; empty where nothing can be subtracted."""
    if not families:
        return ""
    parts = ["verdicts\n\n" + "\n".join(wrap(rule.text, _WIDTH))]
    if primary := [family for family in families if family.primary]:
        parts.append(_question("Primary comparison, declared before the training", primary, rule))
    for question, title in TITLES.items():
        if of := [family for family in families if family.question == question and not family.primary]:
            parts.append(_question(title, of, rule) if question in IN_FULL else _counted(title, of, rule))
    return "\n\n".join(parts)


def place(setting: Setting) -> str:
    """`builtin:photos, knn v1, resize32`."""
    return f"{setting.dataset}, {setting.rule} v{setting.version}, {setting.transform}"


def _question(title: str, families: Sequence[Family], rule: Rule) -> str:
    lines, left = [title], SHOWN
    for family in families:
        shown = family.differences[:left]
        left -= len(shown)
        if shown:
            count = len(family.differences)
            how = (
                f"Holm over {count}" if family.is_corrected and count > 1 else "one comparison" if family.is_corrected else "not corrected"
            )
            lines.append(f"  {family.scope}, {place(family.setting)} ({how})")
        for difference in shown:
            lines += [f"    {line(family, difference, rule)}", *(f"      {text}" for text in wrap(difference.words, _WIDTH - 6))]
    rest = sum(len(family.differences) for family in families) - (SHOWN - left)
    return "\n".join([*lines, *([f"  and {rest} more differences: in the report"] if rest else [])])


def _counted(title: str, families: Sequence[Family], rule: Rule) -> str:
    """How many differences came out how, and those that were found."""
    outcomes = Counter(difference.outcome for family in families for difference in family.differences)
    count = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in get_args(Outcome) if outcomes[outcome])
    found = [
        f"  {family.scope}, {place(family.setting)}: {line(family, difference, rule)}"
        for family in families
        for difference in family.differences
        if difference.outcome in ("better", "worse")
    ]
    rest = [f"  and {len(found) - SHOWN} more: in the report"] if len(found) > SHOWN else []
    return "\n".join([f"{title}: {count}; the report lists all", *found[:SHOWN], *rest])

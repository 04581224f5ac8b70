"""From pairs of rows to differences with intervals, tests and verdicts, paired image by image."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ssl_vit_eval.compare.answers import Answers
from ssl_vit_eval.compare.questions import Group, Pair
from ssl_vit_eval.compare.verdict import Difference, Family, Question, Rule, Unit, outcome_of
from ssl_vit_eval.metrics import MACRO, metric_of
from ssl_vit_eval.stats.images import holm, paired_p, resolvable_images, sign_flip
from ssl_vit_eval.stats.seeds import crossed_interval, means_of_seeds, resolvable_seeds, resolvable_t, sign_flip_within, t_test

Corrected = tuple[Question, int | None]  # what is corrected together: a question, of one group or of all


def families_of(groups: Sequence[Group], answers: Answers, rule: Rule) -> list[Family]:
    """Measure, correct and judge the pairs of all groups. Failure for predictions that cannot be read or paired."""
    families = [
        Family(group.question, group.setting, group.scope, _unit(group), [], group.primary, metric_of(group.pairs[0].rows[0][0]))
        for group in groups
    ]
    together: dict[tuple[Corrected, bool], list[tuple[int, int]]] = defaultdict(list)  # number of group and of pair
    asked: dict[Corrected, int] = defaultdict(int)
    for number, (group, family) in enumerate(zip(groups, families, strict=True)):
        of = (group.question, None if family.is_corrected and rule.family == "study" else number)
        asked[of] += len(group.pairs)
        for place, pair in enumerate(group.pairs):
            # the p of one seed is of another hypothesis, and must not count among those over seeds
            together[of, len(pair.rows) > 1].append((number, place))

    found: dict[tuple[int, int], Difference] = {}
    for (of, several), places in together.items():
        measured = [
            _measure(groups[number].pairs[place], answers, families[number].unit, rule, rule.level / len(places))
            for number, place in places
        ]
        corrected = zip(holm([one.p for one in measured]), holm([one.p_beyond for one in measured]), strict=True)
        for at, one, (p, beyond) in zip(places, measured, corrected, strict=True):
            # with more seeds, those of one seed would be tested beside the others
            count = len(places) if several or families[at[0]].unit == "images" else asked[of]
            found[at] = replace(one, corrected=p, corrected_beyond=beyond, comparisons=count)
    for (number, _), one in sorted(found.items(), key=lambda item: item[0]):
        families[number].differences.append(replace(one, outcome=outcome_of(one, families[number].unit, rule)))
    return families


def _unit(group: Group) -> Unit:
    # of two arms, one seed is still about pretrainings, of which it cannot tell anything; of one arm it is about these weights
    several = group.question in ("trained with", "null control") or any(len(pair.rows) > 1 for pair in group.pairs)
    return "seeds" if several else "images"


def _measure(pair: Pair, answers: Answers, unit: Unit, rule: Rule, level: float) -> Difference:
    """Everything but correction and verdict; level: that the smallest p of its family is held against."""
    count = len(pair.rows)
    right, labels = answers.together([row for rows in pair.rows for row in rows])
    a, b = right[::2].double(), right[1::2].double()  # [seeds, replicates, images] each
    classes = labels if metric_of(pair.rows[0][0]) == MACRO else None
    crossed, of_seeds = crossed_interval(a - b, classes), means_of_seeds(a - b, classes)
    discordance = (a != b).double().mean().item()
    p, beyond = t_test(crossed), t_test(crossed, rule.margin)
    resolvable: float | None = None  # by Student's t
    if count == 1:
        of_images = paired_p(a[0].mean(dim=0), b[0].mean(dim=0), classes)
        p = of_images if a.shape[1] == 1 else max(p, of_images)
        if unit == "seeds":
            resolvable = math.inf
        elif a.shape[1] == 1 and classes is None:
            resolvable = resolvable_images(discordance, a.shape[2], level)
    elif rule.test == "sign-flip":
        p, beyond = sign_flip(of_seeds), sign_flip_within(of_seeds, rule.margin)
        resolvable = resolvable_seeds(crossed.standard_error, count, level)
    seeds = tuple(rows[0].seed for rows in pair.rows if rows[0].seed is not None)
    return Difference(
        pair.a,
        pair.b,
        *crossed[:3],
        p=p,
        corrected=p,
        p_beyond=beyond,
        corrected_beyond=beyond,
        discordance=discordance,
        seeds=seeds,
        of_seeds=tuple(of_seeds[: len(seeds)]),
        images=a.shape[2],
        resolvable=max(resolvable_t(error, df, level) for error, df in crossed.errors) if resolvable is None else resolvable,
        outcome="undecided",
        remark=pair.remark,
    )

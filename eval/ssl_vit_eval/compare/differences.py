"""From pairs of rows to differences with intervals, tests and verdicts, paired image by image."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ssl_vit_eval.compare.answers import Answers
from ssl_vit_eval.compare.verdict import Difference, Family, Pair, Question, Rule, Unit, outcome_of
from ssl_vit_eval.metrics import MACRO, metric_of
from ssl_vit_eval.stats.images import holm, paired_p, resolvable_images, sign_flip
from ssl_vit_eval.stats.seeds import crossed_interval, resolvable_seeds, resolvable_t, sign_flip_within, t_test


def measured(families: Sequence[Family], answers: Answers, rule: Rule) -> list[Family]:
    """Their pairs measured, corrected and judged. Failure for predictions that cannot be read or paired."""
    together: dict[tuple[Question, int | None, bool], list[tuple[Family, Pair]]] = defaultdict(list)
    for number, family in enumerate(families):
        alone = None if family.is_corrected and rule.family == "study" else number
        for pair in family.pairs:
            # the p of one seed is of another hypothesis, and must not count among those over seeds
            together[family.question, alone, len(pair.rows) > 1].append((family, pair))
    found: dict[Pair, Difference] = {}
    for (question, alone, several), asked in together.items():
        differences = [_measure(pair, answers, family.unit, rule, rule.level / len(asked)) for family, pair in asked]
        corrected = zip(holm([one.p for one in differences]), holm([one.p_beyond for one in differences]), strict=True)
        for (family, pair), one, (p, beyond) in zip(asked, differences, corrected, strict=True):
            # with more seeds, those of one seed would be tested beside the others
            others = [] if several or family.unit == "images" else together.get((question, alone, True), [])
            one = replace(one, corrected=p, corrected_beyond=beyond, comparisons=len(asked) + len(others))
            found[pair] = replace(one, outcome=outcome_of(one, family.unit, rule))
    return [replace(family, differences=[found[pair] for pair in family.pairs]) for family in families]


def _measure(pair: Pair, answers: Answers, unit: Unit, rule: Rule, level: float) -> Difference:
    """Everything but correction and verdict; level: that the smallest p of its family is held against."""
    count = len(pair.rows)
    right, labels = answers.together([row for rows in pair.rows for row in rows])
    a, b = right[::2].double(), right[1::2].double()  # [seeds, replicates, images] each
    classes = labels if metric_of(pair.rows[0][0]) == MACRO else None
    crossed = crossed_interval(a - b, classes)
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
        p, beyond = sign_flip(crossed.of_seeds), sign_flip_within(crossed.of_seeds, rule.margin)
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
        of_seeds=crossed.of_seeds[: len(seeds)],
        images=a.shape[2],
        resolvable=max(resolvable_t(error, df, level) for error, df in crossed.errors) if resolvable is None else resolvable,
        outcome="undecided",
        remark=pair.remark,
    )

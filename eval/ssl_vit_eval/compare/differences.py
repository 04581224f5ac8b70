"""From pairs of rows to differences with intervals, tests and verdicts, paired image by image."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ssl_vit.errors import Failure
from ssl_vit_eval.compare.questions import Group, Pair
from ssl_vit_eval.compare.verdict import Difference, Family, Rule, Unit, outcome_of
from ssl_vit_eval.rows import Key, Row, RowStore
from ssl_vit_eval.stats.images import holm, paired_difference, paired_p, resolvable_images, sign_flip
from ssl_vit_eval.stats.seeds import crossed_interval, resolvable_seeds

_KEPT = 512  # evaluations in memory: more than one setting has, whose cells are all paired with each other


class Answers:
    """What every evaluation got right; read when asked for."""

    def __init__(self, found: Sequence[tuple[Row, RowStore]]) -> None:
        self._found = {row.key: (row, store) for row, store in found if row.metric == "top1"}
        self._read = lru_cache(_KEPT)(self._read_now)

    def together(self, rows: Sequence[Row]) -> Float64[Tensor, "r n"]:
        """Shares of right answers, a line for each row; Failure where these are not answers on the same test images."""
        read = [self._read(row.key) for row in rows]
        for row, (_, labels) in zip(rows, read, strict=True):
            if not torch.equal(labels, read[0][1]):
                what = "other classes" if len(labels) == len(read[0][1]) else f"{len(labels)} test images instead of {len(read[0][1])}"
                raise Failure(f"{_called(row)} has {what} in its predictions than {_called(rows[0])}: evaluate one of them again")
        return torch.stack([share for share, _ in read])

    def _read_now(self, key: Key) -> tuple[Float64[Tensor, " n"], Int64[Tensor, " n"]]:
        row, store = self._found[key]
        return store.correct(row)


def family_of(group: Group, answers: Answers, rule: Rule) -> Family:
    """Measure, correct and judge the pairs of a group. Failure for predictions that cannot be read or paired."""
    # of two arms, one seed is still about pretrainings, of which it cannot tell anything; of one arm it is about these weights
    several = group.question in ("trained with", "null control") or any(len(pair.rows) > 1 for pair in group.pairs)
    family = Family(group.question, group.setting, group.scope, "seeds" if several else "images", [], group.primary)
    for tested in (True, False):
        pairs = [pair for pair in group.pairs if _tested(pair) == tested]
        measured = [_measure(pair, answers, family.unit, rule.level / len(pairs)) for pair in pairs]
        corrected = [replace(found, corrected=p) for found, p in zip(measured, holm([found.p for found in measured]), strict=True)]
        # with more seeds, those of one seed would be tested beside the others
        count = len(pairs) if tested else len(group.pairs)
        for pair, found in zip(pairs, corrected, strict=True):
            outcome = outcome_of(found, family.unit, rule)
            family.differences.append(replace(found, outcome=outcome, comparisons=count, remark=pair.remark))
    order = [(pair.a, pair.b) for pair in group.pairs]
    family.differences.sort(key=lambda found: order.index((found.a, found.b)))
    return family


def _tested(pair: Pair) -> bool:
    """Whether over seeds: the p of one seed is of another hypothesis, and must not count among those."""
    return len(pair.rows) > 1


def _measure(pair: Pair, answers: Answers, unit: Unit, level: float) -> Difference:
    """Everything but correction and verdict; level: that the smallest p of its family is held against."""
    count = len(pair.rows)
    right = answers.together([row for rows in pair.rows for row in rows]).reshape(count, 2, -1)
    a, b = right[:, 0], right[:, 1]
    of_seeds = [100 * points for points in (a - b).mean(dim=1).tolist()]
    discordance = (a != b).double().mean().item()
    if count > 1:
        points, low, high, error = crossed_interval(a - b)
        p, resolvable = sign_flip(of_seeds), resolvable_seeds(error, count, level)
    else:
        points, low, high = paired_difference(a[0], b[0])
        p = paired_p(a[0], b[0])
        resolvable = resolvable_images(discordance, a.shape[1], level) if unit == "images" else math.inf
    seeds = [rows[0].seed for rows in pair.rows]
    known = tuple(seed for seed in seeds if seed is not None)
    return Difference(
        pair.a,
        pair.b,
        points,
        low,
        high,
        p=p,
        corrected=p,
        discordance=discordance,
        seeds=known,
        of_seeds=tuple(of_seeds[: len(known)]),
        images=a.shape[1],
        resolvable=resolvable,
        outcome="undecided",
    )


def _called(row: Row) -> str:
    return f"{row.source} read with {row.read_with} on {row.dataset} by {row.protocol}"

"""Accuracies by pretraining seed, for what is drawn or ranked seed by seed."""

from collections.abc import Sequence

from ssl_vit_eval.compare.arms import arms_of, weights_of
from ssl_vit_eval.compare.verdict import Side
from ssl_vit_eval.rows import Row, Setting

Scores = dict[tuple[Setting, Side], dict[int | None, float]]


def scores_by_seed(rows: Sequence[Row]) -> Scores:
    """Top-1, as a fraction, of each side in each setting by seed, in the order of the rows; None for weights without a seed."""
    arms = arms_of(rows)
    found: Scores = {}
    for row in rows:
        if row.metric == "top1":
            found.setdefault((Setting.of(row), Side(arms[weights_of(row)], row.read_with)), {})[row.seed] = row.value
    return found

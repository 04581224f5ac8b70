"""The answers that accuracies and their differences are computed from."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from ssl_vit.errors import Failure
from ssl_vit_eval.compare.notes import Note
from ssl_vit_eval.metrics import MACRO, METRICS, accuracies
from ssl_vit_eval.rows import Key, Row, RowStore
from ssl_vit_eval.stats.seeds import accuracy_interval

_KEPT = 512  # evaluations in memory: more than one setting has, whose cells are all paired with each other


def with_metrics(found: Sequence[tuple[Row, RowStore]]) -> tuple[list[tuple[Row, RowStore]], list[Note]]:
    """The rows, all those of a dataset with the metric that any of them declares for it, of several the last; and a note of those
    datasets."""
    declared: dict[tuple[str, str], list[str]] = {}
    for row, _ in found:
        if row.dataset_metric:
            declared.setdefault((row.dataset, row.data), []).append(row.dataset_metric)
    notes = [
        Note("other metrics", {"dataset": dataset, "metrics": list(dict.fromkeys(metrics)), "last": metrics[-1]})
        for (dataset, _), metrics in declared.items()
        if len(set(metrics)) > 1
    ]
    return [(replace(row, dataset_metric=declared.get((row.dataset, row.data), [None])[-1]), store) for row, store in found], notes


class Answers:
    """What every evaluation got right; read when asked for."""

    def __init__(self, found: Sequence[tuple[Row, RowStore]]) -> None:
        self._found = {row.key: (row, store) for row, store in found}
        self._read = lru_cache(_KEPT)(self._read_now)

    def checked(self, row: Row) -> Row:
        """The row with its interval computed again; Failure for a value that is not that of its predictions, but for rounding: 2^-52 an
        answer. The oracle cannot be checked: predictions are of the settings that were chosen."""
        predictions, labels = self._predictions(row)
        scores = [accuracies(answers.contiguous(), labels) for answers in predictions.T]
        value = sum(score[METRICS.index(row.metric)] for score in scores) / len(scores)
        if abs(value - row.value) > predictions.numel() * 2.0**-52:
            file = self._found[row.key][1].folder / row.predictions
            raise Failure(f"{_called(row)}: the row says {row.metric} {row.value:.6g}, its predictions {file} {value:.6g}; evaluate again")
        low, high = accuracy_interval(predictions == labels[:, None], labels if row.metric == MACRO else None)
        return replace(row, ci_low=low, ci_high=high)

    def together(self, rows: Sequence[Row]) -> tuple[Bool[Tensor, "r k n"], Int64[Tensor, " n"]]:
        """Right answers by row, replicate and image, and the classes; Failure where these are not answers on the same test images."""
        read = [self._read(row.key) for row in rows]
        (first, classes), other = read[0], _called(rows[0])
        for row, (right, labels) in zip(rows, read, strict=True):
            for what, own, its in zip(("replicates", "test images"), right.shape, first.shape, strict=True):
                if own != its:
                    raise Failure(f"{_called(row)} has {own} {what} in its predictions, {other} has {its}: evaluate one of them again")
            if not torch.equal(labels, classes):
                raise Failure(f"{_called(row)} has other classes in its predictions than {other}: evaluate one of them again")
        return torch.stack([right for right, _ in read]), classes

    def _read_now(self, key: Key) -> tuple[Bool[Tensor, "k n"], Int64[Tensor, " n"]]:
        predictions, labels = self._predictions(self._found[key][0])
        return (predictions == labels[:, None]).T.contiguous(), labels

    def _predictions(self, row: Row) -> tuple[Int64[Tensor, "n k"], Int64[Tensor, " n"]]:
        store = self._found[row.key][1]
        predictions, labels = store.predictions(row)
        if len(labels) != row.n_test:
            raise Failure(f"{store.folder / row.predictions} has {len(labels)} predictions, its row {row.n_test} images: evaluate again")
        return predictions, labels


def _called(row: Row) -> str:
    return f"{row.source} read with {row.read_with} on {row.dataset} by {row.protocol}"

"""The answers that accuracies and their differences are computed from."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy.typing import NDArray
from torch import Tensor

from ssl_vit.errors import Failure
from ssl_vit_eval.compare.notes import Note
from ssl_vit_eval.metrics import MACRO, METRICS, accuracies
from ssl_vit_eval.rows import Key, Row, RowStore
from ssl_vit_eval.stats.seeds import accuracy_interval


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
    last = {of: metrics[-1] for of, metrics in declared.items()}
    return [(_judged_by(row, last.get((row.dataset, row.data))), store) for row, store in found], notes


def _judged_by(row: Row, metric: str | None) -> Row:
    return row if row.dataset_metric == metric else replace(row, dataset_metric=metric)


class Answers:
    """What every evaluation got right; its file is read once, when it is asked for, and kept as a bit for each answer."""

    def __init__(self, found: Sequence[tuple[Row, RowStore]]) -> None:
        self._found = {row.key: (row, store) for row, store in found}
        self._bits: dict[Key, tuple[NDArray[np.uint8], torch.Size, Int64[Tensor, " n"]]] = {}  # the bits, their shape, the classes
        self._classes: dict[str, Int64[Tensor, " n"]] = {}  # by data

    def checked(self, row: Row) -> Row:
        """The row with its interval computed again; Failure for a value that is not that of its predictions, but for rounding: 2^-52 an
        answer. The oracle cannot be checked: predictions are of the settings that were chosen."""
        right, labels = self._read(row.key)
        scores = [accuracies(torch.where(of, labels, -1), labels) for of in right]
        value = sum(score[METRICS.index(row.metric)] for score in scores) / len(scores)
        if abs(value - row.value) > right.numel() * 2.0**-52:
            file = self._found[row.key][1].folder / row.predictions
            said = f"the row says {row.metric} {row.value:.6g}, its predictions {file} {value:.6g}"
            raise Failure(f"{_called(row)}: {said}; remove the row and evaluate again")
        low, high = accuracy_interval(right.T, labels if row.metric == MACRO else None)
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

    def _read(self, key: Key) -> tuple[Bool[Tensor, "k n"], Int64[Tensor, " n"]]:
        if key not in self._bits:
            row, store = self._found[key]
            predictions, labels = store.predictions(row)
            if len(labels) != row.n_test:
                file = store.folder / row.predictions
                raise Failure(f"{file} has {len(labels)} predictions, its row {row.n_test} images: remove the row and evaluate again")
            right = (predictions == labels[:, None]).T
            shared = self._classes.setdefault(key.data, labels)
            self._bits[key] = np.packbits(right.numpy()), right.shape, shared if torch.equal(shared, labels) else labels
        bits, shape, labels = self._bits[key]
        return torch.from_numpy(np.unpackbits(bits, count=shape.numel()).reshape(shape)).bool(), labels


def _called(row: Row) -> str:
    return f"{row.source} read with {row.read_with} on {row.dataset} by {row.protocol}"

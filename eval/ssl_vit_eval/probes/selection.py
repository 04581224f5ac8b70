"""Selection that never sees test: the slice of train, the choice on it, and what a choice on test would have given (the oracle)."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from ssl_vit.errors import UsageError

Axes = Mapping[str, Sequence[int | float]]  # the values of each setting; the grid is their product, the last axis changing fastest

# where a setting ends by its nature, so that a choice there hides nothing beyond it
ENDS = {"weight_decay": 0.0, "k": 1}


class Choice(NamedTuple):
    """A point of the grid: its settings, its place in `points(axes)`, and whether it has no neighbour in some direction."""

    settings: dict[str, int | float]
    place: int
    edge: bool


@dataclass(frozen=True)
class Found:
    """What a protocol found for one readout: the frozen choice's answers on test, read once.

    predictions: class indices, a column for each draw of a protocol that draws several training sets. Accuracies are fractions.
    `grid`, `edge_of_grid` and `oracle` are None where nothing was selected; `oracle` is the best of the grid on test, never used.
    parameters: numbers that were fitted and are used; bank: images that could vote. None where there are none.
    """

    predictions: Int64[Tensor, "m"] | Int64[Tensor, "m draws"]
    selected: dict[str, Any]
    grid: dict[str, Any] | None = None
    edge_of_grid: bool | None = None
    oracle: float | None = None
    parameters: int | None = None
    bank: int | None = None


def points(axes: Axes) -> list[dict[str, int | float]]:
    """Every combination of settings, in the order in which accuracies are given to `choose`."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def choose(axes: Axes, slice_accuracy: Sequence[float], ends: Mapping[str, int | float] | None = None) -> Choice:
    """The first of the best points on the slice. It is on the edge if a setting of several values has its smallest or largest there,
    unless the setting ends there by its nature (`ENDS`) or with this set (`ends`)."""
    place = int(np.argmax(slice_accuracy))
    settings = points(axes)[place]
    edge = any(
        len(values) > 1 and settings[name] in (min(values), max(values)) and settings[name] not in (ENDS.get(name), (ends or {}).get(name))
        for name, values in axes.items()
    )
    return Choice(settings, place, edge)


def record(axes: Axes, slice_accuracy: Sequence[float], test_accuracy: Sequence[float]) -> dict[str, Any]:
    """The grid as a row holds it: the values of every setting, and both accuracies in the order of `points`."""
    values = {name: list(map(float, of)) for name, of in axes.items()}
    return {**values, "slice_accuracy": list(map(float, slice_accuracy)), "test_accuracy": list(map(float, test_accuracy))}


def check_slice(held_out: Bool[Tensor, " n"]) -> None:
    """UsageError for a slice that is empty or all of train."""
    if held_out.all() or not held_out.any():
        raise UsageError(
            f"the selection slice holds {int(held_out.sum())} of {len(held_out)} training images: it needs some, and must leave some"
        )


def stratified_slice(y: Int64[Tensor, " n"], fraction: float = 0.1, seed: int = 0) -> Bool[Tensor, " n"]:
    """Mark `fraction` of the rows of every class, drawn by `seed`: at least one, and at least one left; none of a class with one row."""
    if not 0 < fraction < 1:
        raise UsageError(f"the slice fraction is {fraction}: give a share of train between 0 and 1")
    labels = y.cpu().numpy()
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = np.zeros(len(labels), dtype=bool)
    _, counts = np.unique(labels, return_counts=True)
    # class by class, each in the drawn order
    for rows in np.split(order[np.argsort(labels[order], kind="stable")], counts.cumsum()[:-1]):
        held_out[rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)]] = True
    return torch.from_numpy(held_out)

"""Selection that never sees test: choose on a slice of train, fit again on all of train, read test once.

`select` does this for every protocol. `oracle` is what a choice on test would have given; it is never used.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_vit.errors import UsageError

Axes = Mapping[str, Sequence[int | float]]  # the values of each setting; the grid is their product, the last axis changing fastest

# what the protocols are given: features by readout, the labels of train and of test, and what is held out of train
Parameters = Mapping[str, Any]
Train = Mapping[str, Float[Tensor, "n _"]]
Test = Mapping[str, Float[Tensor, "m _"]]
Labels = Int64[Tensor, " n"]
Truth = Int64[Tensor, " m"]
Slice = Bool[Tensor, " n"]
SLICE: dict[str, Any] = {"slice_fraction": float, "slice_seed": int}  # parameters of every protocol that selects on a slice

# where a setting ends by its nature, so that a choice there hides nothing beyond it
ENDS = {"weight_decay": 0.0, "k": 1}


class Answers(NamedTuple):
    """What probes of one readout answer that were fitted with every setting of the grid, each with every replicate.

    alive: settings of which no replicate diverged. details: what else to say of each setting beside its values. converged: where it can
    be told. parameters and bank as in `Found`."""

    predictions: Int64[Tensor, "settings m replicates"]
    alive: Bool[Tensor, " settings"]
    details: Sequence[Mapping[str, Any]] = ()
    converged: Sequence[bool] = ()
    parameters: int | None = None
    bank: int | None = None


# fits every setting on these rows of train, and answers these rows of the split "train" or "test", for each readout
Fit = Callable[[Int64[Tensor, " n"], str, Int64[Tensor, " m"]], Mapping[str, Answers]]


class Choice(NamedTuple):
    """A point of the grid: its settings, its place in `points(axes)`, and whether it has no neighbour in some direction."""

    settings: dict[str, int | float]
    place: int
    edge: bool


@dataclass(frozen=True)
class Found:
    """What a protocol found for one readout: the frozen choice's answers on test, read once.

    predictions: class indices, a column for each replicate: a probe seed, or a draw of the training set. Accuracies are fractions.
    `grid`, `edge_of_grid` and `oracle` are None where nothing was selected; `oracle` is the best of the grid on test, never used.
    parameters: numbers that were fitted and are used; bank: images that could vote. None where there are none. remarks: sentences on what
    went wrong.
    """

    predictions: Int64[Tensor, "m"] | Int64[Tensor, "m replicates"]
    selected: dict[str, Any]
    grid: dict[str, Any] | None = None
    edge_of_grid: bool | None = None
    oracle: float | None = None
    parameters: int | None = None
    bank: int | None = None
    remarks: tuple[str, ...] = ()


class Diverged(UsageError):
    """Readouts whose training diverged with every setting. reasons: a sentence for each; found: what was found for the other readouts."""

    def __init__(self, reasons: Sequence[str], found: dict[str, Found]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons, self.found = reasons, found


def select(
    axes: Axes, fit: Fit, y: Labels, y_test: Truth, held_out: Sequence[Slice], ends: Mapping[str, int | float] | None = None
) -> dict[str, Found]:
    """Choose for each readout on what is held out of train, fit every setting again on all of train, and read test once.

    held_out: a slice, or folds that are held out in turn; a grid of one setting leaves them alone. Accuracies are means over replicates,
    of which `selected` has each one's and their standard deviation (n - 1) where there are several.
    A setting that diverged, in any fit, has accuracy 0 and is not chosen. `ends` as `choose`. UsageError for a slice that is empty or
    all of train; Diverged, at the end, for readouts of which every setting diverged."""
    y, y_test, rows, grid = y.cpu(), y_test.cpu(), torch.arange(len(y)), points(axes)
    selects = len(grid) > 1
    right = defaultdict[str, Tensor](lambda: torch.zeros(len(grid), dtype=torch.float64))
    cut = defaultdict[str, set[int]](set)  # settings that did not converge
    alive = defaultdict[str, Tensor](lambda: torch.ones(len(grid), dtype=torch.bool))
    for out in held_out if selects else ():
        check_slice(out)
        for spec, answers in fit(rows[~out.cpu()], "train", rows[out.cpu()]).items():
            # counted, so that equally good settings are equal whatever the order of the sum
            right[spec] += (answers.predictions == y[out.cpu()][:, None]).sum(dim=(1, 2)).double() / answers.predictions.shape[2]
            alive[spec] &= answers.alive
            cut[spec] |= {place for place, converged in enumerate(answers.converged) if not converged}
    found, diverged = {}, []
    for spec, answers in fit(rows, "test", torch.arange(len(y_test))).items():
        lives = alive[spec] & answers.alive
        if not lives.any():
            rates = ", ".join(f"{lr:g}" for lr in axes["lr"])
            diverged.append(f"readout {spec!r}: training diverged at the learning rates {rates}: give smaller ones")
            continue
        on_slice = right[spec] * lives / max(1, sum(int(out.sum()) for out in held_out))
        on_test = (answers.predictions == y_test[:, None]).double().mean(dim=1) * lives[:, None]  # [settings replicates]
        # below 0, so that a setting that lives goes before one that diverged even where it has nothing right
        choice = choose(axes, torch.where(lives, on_slice, -1.0).tolist(), ends)
        cut[spec] |= {place for place, converged in enumerate(answers.converged) if not converged}
        names = [", ".join(f"{name} {value:g}" for name, value in grid[place].items()) for place in sorted(cut[spec])]
        details = {**choice.settings, **(answers.details[choice.place] if answers.details else {})}
        if on_test.shape[1] > 1:
            details |= {"accuracy": on_test[choice.place].tolist(), "spread": on_test[choice.place].std().item()}
        found[spec] = Found(
            predictions=answers.predictions[choice.place].squeeze(1).clone(),  # not a view that keeps the answers of the whole grid
            selected=details,
            grid=record(axes, on_slice.tolist(), on_test.mean(dim=1).tolist()) if selects else None,
            edge_of_grid=choice.edge if selects else None,
            oracle=on_test.mean(dim=1).max().item() if selects else None,
            parameters=answers.parameters,
            bank=answers.bank,
            remarks=(f"probes did not converge at {'; '.join(names)}",) if names else (),
        )
    if diverged:
        raise Diverged(diverged, found)
    return found


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

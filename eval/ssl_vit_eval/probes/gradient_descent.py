"""Heads trained by stochastic gradient descent, a whole grid of settings at once, and the choice among them on the slice of train.

What a head is, `linear.py` and `mlp.py` say. All heads of a readout lie in one weight tensor, on an accelerator with those of the
other readouts of its width, and every step updates all of them on the same batch, which is read once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_vit.errors import UsageError
from ssl_vit_eval.distributed import device
from ssl_vit_eval.probes.base import check_features, check_training
from ssl_vit_eval.probes.batches import ROWS, Course, Rows, Standard, read, standard_of
from ssl_vit_eval.probes.selection import Axes, Found, check_slice, choose, points, record

# Logits that readouts trained side by side may have for a batch. An accelerator waits for its launches, which one readout needs as much
# as five. A CPU's products are as fast one readout after the other, and then no number depends on which others were asked for.
SIDE_BY_SIDE = {"cuda": 2**26}


class Heads(ABC):
    """A grid of G heads for each of R readouts of width d, trained on the same batches and otherwise independent of each other."""

    parameters: int  # of one head

    @abstractmethod
    def step(self, x: Float[Tensor, "r b d"], targets: Int64[Tensor, " b"], rate: float) -> None:
        """One update of every head by its mean cross-entropy on the batch; `rate` is the schedule's share of the learning rates."""

    @abstractmethod
    def logits(self, x: Float[Tensor, "r m d"]) -> Float[Tensor, "r g c m"]:
        """What every head answers at evaluation."""

    @abstractmethod
    def finite(self) -> Bool[Tensor, "r g"]:
        """Which heads did not diverge."""


class Trained(NamedTuple):
    """Heads, and what standardised the features that they were trained on."""

    heads: Heads
    standard: Standard | None

    def predict(self, features: Sequence[Float[Tensor, "m d"]], rows: Int64[Tensor, " k"]) -> Int64[Tensor, "r g k"]:
        """The class that every head gives to these rows."""
        answers = [self.heads.logits(read(features, part, self.standard)).argmax(dim=2).cpu() for part in torch.split(rows, ROWS)]
        return torch.cat(answers, dim=2)


@dataclass(frozen=True)
class Training:
    """How a grid of heads is trained.

    axes: `lr` and `weight_decay`; a head for each of `points(axes)`. standardise: by the mean and the standard deviation of the rows
    trained on. build: (R, d, c, b) -> untrained Heads for R readouts of width d, c classes and batches of b images.
    """

    axes: Axes
    course: Course
    standardise: bool
    build: Callable[[int, int, int, int], Heads]

    def fit(self, features: Sequence[Float[Tensor, "n d"]], rows: Int64[Tensor, " k"], targets: Int64[Tensor, " n"], c: int) -> Trained:
        """Train on these rows of readouts of one width; targets below c."""
        standard = standard_of(features, rows) if self.standardise else None
        heads = self.build(len(features), features[0].shape[1], c, self.course.batch(len(rows)))
        held, targets = Rows(features, rows, standard), targets[rows].to(device())
        for which, rate in self.course.steps(len(rows)):
            heads.step(held.batch(which), targets[which.to(targets.device)], rate)
        return Trained(heads, standard)


@torch.no_grad()
def select(
    training: Training,
    train: Mapping[str, Float[Tensor, "n _"]],
    y_train: Int64[Tensor, " n"],
    test: Mapping[str, Float[Tensor, "m _"]],
    y_test: Int64[Tensor, " m"],
    held_out: Bool[Tensor, " n"],
) -> dict[str, Found]:
    """Train the grid on train without its slice, choose on the slice for each readout, train the grid on all of train, read test once.

    A grid of one point leaves nothing to choose: it is trained once. A head that diverged, in either training, has accuracy 0 and is not
    chosen. `selected` says beside the settings how many images a step saw and how many steps there were.
    UsageError for features or labels that the probes refuse, for a slice that is empty or all of train, where every head diverged.
    """
    for spec, X in train.items():
        try:
            check_training(X, y_train)
            check_features(test[spec])
            if test[spec].shape[1] != X.shape[1]:
                raise UsageError(f"features are {test[spec].shape[1]} wide in test, {X.shape[1]} in train: read both in the same way")
        except UsageError as error:
            raise UsageError(f"readout {spec!r}: {error}") from error
    classes, _ = torch.unique(y_train, return_inverse=True)
    logits = len(points(training.axes)) * len(classes) * training.course.batch(len(y_train))  # of a readout in a step
    found: dict[str, Found] = {}
    for names in _groups(train, SIDE_BY_SIDE.get(device().type, 0) // logits):
        found |= _found(training, names, [train[name] for name in names], y_train, [test[name] for name in names], y_test, held_out)
    return {name: found[name] for name in train}


def _found(
    training: Training,
    names: Sequence[str],
    train: Sequence[Float[Tensor, "n d"]],
    y_train: Int64[Tensor, " n"],
    test: Sequence[Float[Tensor, "m d"]],
    y_test: Int64[Tensor, " m"],
    held_out: Bool[Tensor, " n"],
) -> dict[str, Found]:
    """`select` for readouts of one width, side by side."""
    classes, targets = torch.unique(y_train, return_inverse=True)
    n, rows = len(y_train), torch.arange(len(y_train))
    grid = points(training.axes)
    selects = len(grid) > 1
    on_slice, alive = torch.zeros(len(names), len(grid), dtype=torch.float64), torch.ones(len(names), len(grid), dtype=torch.bool)
    if selects:
        check_slice(held_out)
        trained = training.fit(train, rows[~held_out], targets, len(classes))
        alive = trained.heads.finite().cpu()
        on_slice = (trained.predict(train, rows[held_out]) == targets[held_out]).double().mean(dim=2)
    trained = training.fit(train, rows, targets, len(classes))
    alive = alive & trained.heads.finite().cpu()
    for name, any_alive in zip(names, alive.any(dim=1), strict=True):
        if not any_alive:
            rates = ", ".join(f"{lr:g}" for lr in training.axes["lr"])
            raise UsageError(f"readout {name!r}: all heads diverged at the learning rates {rates}: give smaller ones")
    # below 0, so that a head that lives goes before one that diverged even where it has nothing right
    choices = [choose(training.axes, accuracy.tolist()) for accuracy in torch.where(alive, on_slice, -1.0)]
    answers = classes[trained.predict(test, torch.arange(len(y_test)))]
    on_slice, on_test = on_slice * alive, (answers == y_test).double().mean(dim=2) * alive
    return {
        name: Found(
            predictions=answers[r, choice.place].clone(),  # not a view that keeps the answers of the whole grid
            selected={**choice.settings, "batch_size": training.course.batch(n), "iterations": training.course.total(n)},
            grid=record(training.axes, on_slice[r].tolist(), on_test[r].tolist()) if selects else None,
            edge_of_grid=choice.edge if selects else None,
            oracle=on_test[r].max().item() if selects else None,
            parameters=trained.heads.parameters,
        )
        for r, (name, choice) in enumerate(zip(names, choices, strict=True))
    }


def _groups(features: Mapping[str, Float[Tensor, "n _"]], most: int) -> list[list[str]]:
    """The readouts, those of one width side by side, but not more than `most` (at least one)."""
    of_width: dict[int, list[str]] = {}
    for name, X in features.items():
        of_width.setdefault(X.shape[1], []).append(name)
    size = max(1, most)
    return [names[start : start + size] for names in of_width.values() for start in range(0, len(names), size)]

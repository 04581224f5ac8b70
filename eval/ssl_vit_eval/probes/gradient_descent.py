"""Heads trained by stochastic gradient descent, a whole grid of settings at once, and the choice among them on the slice of train.

What a head is, `linear.py` and `mlp.py` say. All heads of a readout lie in one weight tensor, on an accelerator with those of the
other readouts of its width, and every step updates all of them on the same batch, which is read once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_vit_eval.distributed import device
from ssl_vit_eval.probes.base import check_readouts, class_targets
from ssl_vit_eval.probes.batches import ROWS, Course, Rows, Standard, read, standard_of
from ssl_vit_eval.probes.selection import Answers, Axes, Found, points, select

# Logits that readouts trained side by side may have for a batch. An accelerator waits for its launches, which one readout needs as much
# as five. A CPU's products are as fast one readout after the other, and then no number depends on which others were asked for.
SIDE_BY_SIDE = {"cuda": 2**26}


class Heads(ABC):
    """A grid of G heads for each of R readouts of width d and seeds, independent of each other."""

    parameters: int  # of one head

    @abstractmethod
    def step(self, x: Float[Tensor, "r b d"], targets: Int64[Tensor, "r b"], rate: float) -> None:
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
    seeds: int

    def predict(self, features: Sequence[Float[Tensor, "m d"]], rows: Int64[Tensor, " k"]) -> Int64[Tensor, "r g k seeds"]:
        """The class that every head gives to these rows."""
        answers = [self.logits(read(features, part, self.standard)).argmax(dim=2).cpu() for part in torch.split(rows, ROWS)]
        found = torch.cat(answers, dim=2)
        return found.view(len(features), self.seeds, *found.shape[1:]).permute(0, 2, 3, 1)

    def logits(self, x: Float[Tensor, "r m d"]) -> Float[Tensor, "rs g c m"]:
        return self.heads.logits(x.repeat_interleave(self.seeds, dim=0))

    def alive(self) -> Bool[Tensor, "r g"]:
        """Which settings did not diverge, with any seed."""
        finite = self.heads.finite().cpu()
        return finite.view(-1, self.seeds, finite.shape[1]).all(dim=1)


@dataclass(frozen=True)
class Training:
    """How a grid of heads is trained.

    axes: `lr` and `weight_decay`; a head for each of `points(axes)`. standardise: by the mean and the standard deviation of the rows
    trained on. build: (seeds, d, c, b) -> untrained Heads of width d for c classes and batches of b images, a grid for each seed.
    """

    axes: Axes
    course: Course
    standardise: bool
    build: Callable[[Sequence[int], int, int, int], Heads]

    def fit(self, features: Sequence[Float[Tensor, "n d"]], rows: Int64[Tensor, " k"], targets: Int64[Tensor, " n"], c: int) -> Trained:
        """Train on these rows of readouts of one width; targets below c."""
        standard = standard_of(features, rows) if self.standardise else None
        course, width, batch = self.course, features[0].shape[1], self.course.batch(len(rows))
        heads = self.build(course.seeds * len(features), width, c, batch)
        held, targets = Rows(features, rows, standard), targets[rows].to(device())
        for which, rate in course.steps(len(rows)):
            x = held.batch(which.flatten()).view(-1, batch, width)  # readouts, then seeds
            heads.step(x, targets[which.to(targets.device)].repeat(len(features), 1), rate)
        return Trained(heads, standard, len(course.seeds))


@torch.no_grad()
def run(
    trained_by: Callable[[Mapping[str, Any], torch.dtype], Training],
    parameters: Mapping[str, Any],
    train: Mapping[str, Float[Tensor, "n _"]],
    y_train: Int64[Tensor, " n"],
    test: Mapping[str, Float[Tensor, "m _"]],
    y_test: Int64[Tensor, " m"],
    held_out: Bool[Tensor, " n"],
) -> dict[str, Found]:
    """`selection.select` among heads trained side by side; `selected` says beside the settings how many images a step saw and how many
    steps there were. trained_by: parameters and dtype -> the Training. UsageError for parameters, features or labels that are refused, and
    as `select`."""
    training = trained_by(parameters, next(iter(train.values())).dtype)
    check_readouts(train, y_train, test)
    classes, targets = class_targets(y_train)
    n, course, grid, splits = len(y_train), training.course, points(training.axes), {"train": train, "test": test}
    logits = len(course.seeds) * len(grid) * len(classes) * course.batch(n)  # of a readout in a step
    details = [{"batch_size": course.batch(n), "iterations": course.total(n)}] * len(grid)

    def fit(rows: Int64[Tensor, " k"], split: str, asked: Int64[Tensor, " q"]) -> dict[str, Answers]:
        answers = {}
        for names in _groups(train, SIDE_BY_SIDE.get(device().type, 0) // logits):
            trained = training.fit([train[name] for name in names], rows, targets, len(classes))
            given = classes[trained.predict([splits[split][name] for name in names], asked)]
            for name, of, alive in zip(names, given, trained.alive(), strict=True):
                answers[name] = Answers(of, alive, details, parameters=trained.heads.parameters)
        return {name: answers[name] for name in train}

    return select(training.axes, fit, y_train, y_test, [held_out])


def _groups(features: Mapping[str, Float[Tensor, "n _"]], most: int) -> list[list[str]]:
    """The readouts, those of one width side by side, but not more than `most` (at least one)."""
    of_width: dict[int, list[str]] = {}
    for name, X in features.items():
        of_width.setdefault(X.shape[1], []).append(name)
    size = max(1, most)
    return [names[start : start + size] for names in of_width.values() for start in range(0, len(names), size)]

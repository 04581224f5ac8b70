"""Heads trained by stochastic gradient descent on frozen features, a whole grid of settings at once, and the choice among them on the
slice of train.

What a head is, `linear.py` and `mlp.py` say. All heads of a readout lie in one weight tensor, on an accelerator with those of the
other readouts of its width, and every step updates all of them on the same batch, which is read once.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_vit.errors import UsageError
from ssl_vit.methods.schedules import cosine
from ssl_vit_eval.distributed import device
from ssl_vit_eval.memory import available_memory
from ssl_vit_eval.probes.base import check_readouts, class_targets, moments, progress
from ssl_vit_eval.probes.selection import SLICE, Answers, Axes, Found, Labels, Parameters, Slice, Test, Train, Truth, points, select
from ssl_vit_eval.schema import Count, NotNegative, NotNegatives, Positives, Whole

# parameters of every protocol that trains
TRAINED: dict[str, Any] = {"lr": Positives, "weight_decay": NotNegatives, "batch_size": Count, "seed": int, "probe_seeds": Count, **SLICE}
COURSE: dict[str, Any] = {"epochs": NotNegative, "iterations": Whole, "warmup_epochs": NotNegative}  # of those with a length to choose
Schedule = Literal["iteration", "epoch"]
ROWS = 2048  # read, standardised or answered at once
# Logits that readouts trained side by side may have for a batch. An accelerator waits for its launches, which one readout needs as much
# as five. A CPU's products are as fast one readout after the other, and then no number depends on which others were asked for.
SIDE_BY_SIDE = {"cuda": 2**26}


@dataclass(frozen=True)
class Course:
    """How long heads are trained, in which order they see the images, and how their rates fall.

    batch_size: images a step; a smaller dataset is one batch. An epoch is a new order drawn from each of `seeds`, and its last, incomplete
    batch is left out: which images that is changes with the order.
    epochs or iterations: one of them, the other is 0. warmup_epochs: the rates rise linearly from 0; then they fall to 0 along a half
    cosine, at every `iteration` or every `epoch` (`schedule`). UsageError for both of epochs and iterations, or none.
    """

    batch_size: int
    epochs: float
    iterations: int
    warmup_epochs: float
    schedule: Schedule
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if (self.epochs > 0) == (self.iterations > 0):
            raise UsageError(f"epochs are {self.epochs} and iterations {self.iterations}: set one of them above 0 and the other to 0")

    def batch(self, n: int) -> int:
        """Images a step, of n."""
        return min(self.batch_size, n)

    def total(self, n: int) -> int:
        """Steps on n images."""
        return self.iterations or max(1, round(self.epochs * (n // self.batch(n))))

    def rate(self, step: int, n: int) -> float:
        """The share of the learning rates at a step, counted from 0."""
        epoch = n // self.batch(n)
        unit = epoch if self.schedule == "epoch" else 1
        return cosine(step // unit, math.ceil(self.total(n) / unit), 1.0, 0.0, warmup=round(self.warmup_epochs * epoch / unit))

    def steps(self, n: int) -> Iterator[tuple[Int64[Tensor, "seeds b"], float]]:
        """Every step's images for each seed, as indices below n, and its rate."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        b = self.batch(n)
        for step in progress(range(self.total(n)), "training probes"):
            place = step % (n // b)
            if place == 0:
                order = torch.stack([torch.randperm(n, generator=generator) for generator in generators])
            yield order[:, place * b : (place + 1) * b], self.rate(step, n)


class Standard(NamedTuple):
    """What standardises the features of R readouts: (x - mean) / scale."""

    mean: Float[Tensor, "r 1 d"]
    scale: Float[Tensor, "r 1 d"]


def standard_of(features: Sequence[Float[Tensor, "n d"]], rows: Int64[Tensor, " k"]) -> Standard:
    """The `moments` of these rows, on this process's device."""
    mean, scale = (
        torch.stack(part)[:, None].to(device=device(), dtype=features[0].dtype)
        for part in zip(*(moments(of, rows) for of in features), strict=True)
    )
    return Standard(mean, scale)


def read(features: Sequence[Float[Tensor, "n d"]], rows: Int64[Tensor, " b"], standard: Standard | None) -> Float[Tensor, "r b d"]:
    """These rows of several readouts of one width, on this process's device."""
    x = torch.stack([of[rows] for of in features]).to(device())
    return x if standard is None else x.sub_(standard.mean).div_(standard.scale)


class Rows:
    """Rows of the features of several readouts of one width, to be taken in batches.

    Held on the device if that takes at most a quarter of its free memory; else every batch is read from where the features lie.
    """

    def __init__(self, features: Sequence[Float[Tensor, "n d"]], rows: Int64[Tensor, " k"], standard: Standard | None) -> None:
        self._features, self._rows, self._standard = features, rows, standard
        free = torch.cuda.mem_get_info(device())[0] if device().type == "cuda" else available_memory()
        shape, dtype = (len(features), len(rows), features[0].shape[1]), features[0].dtype
        self._held: Tensor | None = None
        if math.prod(shape) * dtype.itemsize <= free / 4:
            self._held = torch.empty(shape, dtype=dtype, device=device())
            for held, part in zip(torch.split(self._held, ROWS, dim=1), torch.split(rows, ROWS), strict=True):
                held.copy_(read(features, part, standard))

    def batch(self, which: Int64[Tensor, " b"]) -> Float[Tensor, "r b d"]:
        """The rows at these places among those given."""
        if self._held is None:
            return read(self._features, self._rows[which], self._standard)
        return self._held.index_select(1, which.to(self._held.device))


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
        answers = []
        for part in torch.split(rows, ROWS):
            x = read(features, part, self.standard).repeat_interleave(self.seeds, dim=0)
            answers.append(self.heads.logits(x).argmax(dim=2).cpu())
        found = torch.cat(answers, dim=2)
        return found.view(len(features), self.seeds, *found.shape[1:]).permute(0, 2, 3, 1)

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
    trained_by: Callable[[Parameters, torch.dtype], Training],
    parameters: Parameters,
    train: Train,
    y_train: Labels,
    test: Test,
    y_test: Truth,
    held_out: Slice,
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

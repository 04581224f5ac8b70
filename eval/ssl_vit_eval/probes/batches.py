"""Frozen features in batches, for heads trained by gradient descent: what a step sees, how fast it learns, how features are read."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_vit.errors import UsageError, one_of, require
from ssl_vit.methods.schedules import cosine
from ssl_vit_eval.distributed import device
from ssl_vit_eval.memory import available_memory
from ssl_vit_eval.probes.base import moments, progress

ROWS = 2048  # read, standardised or answered at once


@dataclass(frozen=True)
class Course:
    """How long heads are trained, in which order they see the images, and how their rates fall.

    batch_size: images a step; a smaller set is one batch. An epoch is a new order drawn from each of `seeds`, and its last, incomplete
    batch is left out: which images that is changes with the order.
    epochs or iterations: one of them, the other is 0. warmup_epochs: the rates rise linearly from 0; then they fall to 0 along a half
    cosine, at every `iteration` or every `epoch` (`schedule`). UsageError for other values.
    """

    batch_size: int
    epochs: float
    iterations: int
    warmup_epochs: float
    schedule: str
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "batch_size", self.batch_size, "above 0")
        require(self.warmup_epochs >= 0, "warmup_epochs", self.warmup_epochs, "at least 0")
        if min(self.epochs, self.iterations) < 0 or (self.epochs > 0) == (self.iterations > 0):
            raise UsageError(f"epochs are {self.epochs} and iterations {self.iterations}: set one of them above 0 and the other to 0")
        if self.schedule not in ("iteration", "epoch"):
            raise UsageError(f"unknown schedule {self.schedule!r}: {one_of(self.schedule, ('iteration', 'epoch'))}")

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

"""Intervals and paired tests over images. They say how sure a number is of these images, nothing about another pretraining seed.

Answers are right or wrong, so a resample of the images is known by its counts: the bootstrap distribution of an accuracy is a
binomial, that of a paired difference a multinomial over (+1, 0, -1). Counts are drawn in place of images: the same distribution, at once.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64
from scipy.stats import binomtest
from torch import Tensor

from ssl_vit.errors import UsageError

DRAWS = 10_000
CONFIDENCE = 0.95
_TAILS = [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]  # percentiles


class Interval(NamedTuple):
    """A 95 % confidence interval, in the unit of what it is of."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """Accuracy of A minus accuracy of B, and its 95 % interval, in percentage points."""

    points: float
    ci_low: float
    ci_high: float


def wilson_interval(correct: int, n: int) -> Interval:
    """Wilson's score interval of an accuracy, as fractions: sound at 0 and 1 and for few images (Wilson 1927)."""
    if not 0 <= correct <= n or n == 0:
        raise UsageError(f"{correct} of {n} images are right: an interval needs at least one image, and no more right ones than images")
    interval = binomtest(correct, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def macro_interval(correct: Bool[Tensor, " n"], labels: Int64[Tensor, " n"], seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the mean of the class accuracies, images resampled within their class, as fractions.

    A class whose few images are all right, or all wrong, adds no spread: with such classes the interval is too narrow.
    """
    _images(correct)
    _, classes, counts = np.unique(labels.cpu().numpy(), return_inverse=True, return_counts=True)
    accuracy = np.bincount(classes, weights=correct.cpu().numpy()) / counts
    rng = np.random.default_rng(seed)
    macro = np.zeros(DRAWS)
    for n, p in zip(counts, accuracy, strict=True):
        macro += rng.binomial(n, p, DRAWS) / n
    return _percentiles(macro / len(counts))


def paired_difference(correct_a: Bool[Tensor, " n"], correct_b: Bool[Tensor, " n"], seed: int = 0) -> PairedDifference:
    """Accuracy of A minus B on the same images, with the percentile interval of the paired bootstrap over images, in points."""
    n = _images(correct_a)
    only_a, only_b = _discordant(correct_a, correct_b)
    draws = np.random.default_rng(seed).multinomial(n, [only_a / n, only_b / n, (n - only_a - only_b) / n], DRAWS)
    low, high = _percentiles(100 * (draws[:, 0] - draws[:, 1]) / n)
    return PairedDifference(100 * (only_a - only_b) / n, low, high)


def _images(correct: Bool[Tensor, " n"]) -> int:
    if len(correct) == 0:
        raise UsageError("there are no images to resample: an interval needs at least one")
    return len(correct)


def _discordant(correct_a: Bool[Tensor, " n"], correct_b: Bool[Tensor, " n"]) -> tuple[int, int]:
    return int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())


def _percentiles(draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, _TAILS)
    return Interval(float(low), float(high))

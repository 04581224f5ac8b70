"""Intervals and paired tests over images. They say how sure a number is of these images, nothing about another pretraining seed.

Answers are right or wrong, or right in some of a few draws, so a resample of the images is known by its counts: the bootstrap distribution
of a paired difference is a multinomial over (+1, 0, -1). Counts are drawn in place of images: the same distribution, at once.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64
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


def mean_interval(share: Float[Tensor, " n"], seed: int = 0) -> Interval:
    """Percentile bootstrap interval, over images, of the mean of `share`: how often each image was answered rightly, in [0, 1]."""
    rng = np.random.default_rng(seed)
    return _percentiles(_sums(_images(share), rng) / len(share))


def macro_interval(share: Float[Tensor, " n"], labels: Int64[Tensor, " n"], seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the mean of the class accuracies, images resampled within their class, as fractions.

    A class whose few images are all right, or all wrong, adds no spread: with such classes the interval is too narrow.
    """
    values, classes = _images(share), labels.cpu().numpy()
    rng = np.random.default_rng(seed)
    groups = [values[classes == label] for label in np.unique(classes)]
    return _percentiles(np.mean([_sums(group, rng) / len(group) for group in groups], axis=0))


def paired_difference(share_a: Float[Tensor, " n"], share_b: Float[Tensor, " n"], seed: int = 0) -> PairedDifference:
    """Accuracy of A minus B on the same images, with the percentile interval of the paired bootstrap over images, in points.

    share: 1 for an image answered rightly, 0 for wrongly, between them for several draws of the training set."""
    differences = _images(share_a) - _images(share_b)
    low, high = _percentiles(100 * _sums(differences, np.random.default_rng(seed)) / len(differences))
    return PairedDifference(float(100 * differences.mean()), low, high)


def _images(share: Float[Tensor, " n"]) -> np.ndarray:
    if len(share) == 0:
        raise UsageError("there are no images to resample: an interval needs at least one")
    values: np.ndarray = share.double().cpu().numpy()
    return values


def _sums(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The sums of `DRAWS` resamples of `values`, of which only few differ: how often each comes is a multinomial."""
    different, counts = np.unique(values, return_counts=True)
    order = np.lexsort((-different, -np.abs(different)))  # zero, the most frequent and the one that adds nothing, last
    drawn = rng.multinomial(len(values), counts[order] / len(values), DRAWS)
    sums: np.ndarray = drawn @ different[order]
    return sums


def _percentiles(draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, _TAILS)
    return Interval(float(low), float(high))

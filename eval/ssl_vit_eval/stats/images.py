"""Intervals and paired tests over images. They say how sure a number is of these images, nothing about another pretraining seed
(that is `seeds.py`).

Answers are right or wrong, or right in some of a few draws, so a resample of the images is known by its counts: the bootstrap distribution
of a paired difference is a multinomial over (+1, 0, -1). Counts are drawn in place of images: the same distribution, at once.
"""

from collections.abc import Sequence
from functools import cache
from itertools import product
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy.stats import norm, t
from torch import Tensor

from ssl_vit.errors import UsageError

DRAWS = 10_000
CONFIDENCE = 0.95
FEW = 25  # discordant images, below which normal and bootstrap distributions are not to be trusted
EXACT = 16  # paired differences, up to which all 2^n sign flips are tried
FLIPS = 100_000  # random ones beyond,
MANY = 100  # up to so many; then their sum is normal
_TAILS = [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]  # percentiles


class Interval(NamedTuple):
    """A 95 % confidence interval, in the unit of what it is of."""

    low: float
    high: float


def wilson_interval(correct: int, n: int) -> Interval:
    """Wilson's score interval of an accuracy, as fractions: sound at 0 and 1 and for few images (Wilson 1927)."""
    from statsmodels.stats.proportion import proportion_confint

    if not 0 <= correct <= n or n == 0:
        raise UsageError(f"{correct} of {n} images are right: an interval needs at least one image, and no more right ones than images")
    # scipy's binomtest computes a p value too, and takes ten times as long
    low, high = proportion_confint(correct, n, 1 - CONFIDENCE, method="wilson")
    return Interval(max(float(low), 0.0), min(float(high), 1.0))  # which old versions leave to rounding


def strata(n: int, classes: Int64[Tensor, " n"] | None) -> list[np.ndarray]:
    """Which images are averaged first: all n together for top-1 (no classes given), those of each class for the mean over classes."""
    if n == 0:
        raise UsageError("there are no images to resample: an interval needs at least one")
    if classes is None:
        return [np.arange(n)]
    order, counts = torch.sort(classes.cpu(), stable=True).indices.numpy(), torch.unique(classes.cpu(), return_counts=True)[1].tolist()
    return np.split(order, np.cumsum(counts)[:-1])


def mean_over(values: Float64[np.ndarray, "*levels n"], groups: Sequence[np.ndarray]) -> Float64[np.ndarray, "*levels"]:
    """The mean over the groups of their means over images."""
    return np.asarray(np.mean([values[..., group].mean(axis=-1) for group in groups], axis=0))


def variance_over(values: Float64[np.ndarray, "*levels n"], groups: Sequence[np.ndarray]) -> Float64[np.ndarray, "*levels"]:
    """Variance of `mean_over` for another draw of the images within their groups; unbiased, but a group of one image adds none."""
    of_groups = [values[..., group].var(axis=-1, ddof=1) / len(group) for group in groups if len(group) > 1]
    return np.asarray(np.sum([np.zeros(values.shape[:-1]), *of_groups], axis=0) / len(groups) ** 2)


def resampled(values: Float64[np.ndarray, " n"], groups: Sequence[np.ndarray], rng: np.random.Generator) -> Float64[np.ndarray, " draws"]:
    """`DRAWS` deviations of `mean_over` from what it is, for other images of the same groups.

    Of one group by the bootstrap. The sum over classes is drawn from the normal distribution with the unbiased variance: a bootstrap
    within classes of m images has (m - 1) / m of it, which is too little for small classes. A class whose images are all alike adds no
    spread either way.
    """
    if len(groups) == 1:
        return np.asarray((resampled_sums(values, rng) - values.sum()) / len(values))
    return student_draws(inf, rng) * variance_over(values, groups) ** 0.5


def student_draws(df: float, rng: np.random.Generator) -> Float64[np.ndarray, " draws"]:
    """The `DRAWS` quantiles of Student's t, of infinite df those of the normal distribution, in a random order."""
    draws: np.ndarray = _quantiles(df, DRAWS)[rng.permutation(DRAWS)]
    return draws


@cache
def _quantiles(df: float, draws: int) -> Float64[np.ndarray, " {draws}"]:
    places = (np.arange(draws) + 0.5) / draws
    return np.asarray(t.ppf(places, df) if df < inf else norm.ppf(places))


def largest_weight(groups: Sequence[np.ndarray]) -> float:
    """That an image has in `mean_over`: 1 / n, or over C classes 1 / (C · images of the smallest class)."""
    return 1 / len(groups) / min(map(len, groups))


def imaginary(
    differences: Float64[np.ndarray, " n"], groups: Sequence[np.ndarray], rng: np.random.Generator
) -> Float64[np.ndarray, " draws"] | None:
    """What two more images, one that only A and one that only B gets right, add to the draws of a mean difference of n images; None
    where 25 images or more differ from the others, and none are needed. In the mean over classes they may be of the smallest class.

    As a rule that is where fewer than 25 are discordant. Resampling never draws what did not come, though none of n images leaves a rate
    of 3 / n (rule of three). The two are Bonett & Price's (2012) correction of the interval of paired proportions; without discordant
    images the bounds become just these ± 3 / n, and with classes ± 3 / (C · images of the smallest class).
    """
    if np.count_nonzero(differences != np.median(differences)) >= FEW:
        return None
    n = len(differences)
    return resampled_sums(np.append(np.zeros(n), [1.0, -1.0]), rng) * largest_weight(groups)


def mcnemar(correct_a: Bool[Tensor, " n"], correct_b: Bool[Tensor, " n"]) -> float:
    """Two-sided p that A and B are right equally often on the same images (McNemar 1947): exact below 25 discordant images, else chi-square
    with continuity correction."""
    from statsmodels.stats.contingency_tables import mcnemar as test

    if len(correct_a) == 0:
        raise UsageError("there are no images to compare: McNemar's test needs at least one")
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    discordant = only_a + only_b
    return float(test([[0, only_a], [only_b, 0]], exact=discordant < FEW, correction=True).pvalue) if discordant else 1.0


def paired_p(share_a: Float[Tensor, " n"], share_b: Float[Tensor, " n"], classes: Int64[Tensor, " n"] | None = None) -> float:
    """Two-sided p of equal accuracy on the same images: McNemar's for answers that are right or wrong, 1 or 0.

    For shares between them (several probe seeds or draws of the training set) and for the mean over classes, in which an image of a small
    class weighs more, the sign-flip test over images: where A and B are alike, the difference on an image is as often of one sign as of
    the other. McNemar's exact test is this test for 0 and 1, and images of equal weight."""
    a, b = share_a.double().cpu().numpy(), share_b.double().cpu().numpy()
    if classes is None and np.isin([a, b], [0.0, 1.0]).all():
        return mcnemar(share_a == 1, share_b == 1)
    differences = a - b
    for group in strata(len(a), classes):
        differences[group] /= len(group)
    return sign_flip(differences.tolist())


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of the paired sign-flip (permutation) test of a mean difference of zero (Fisher 1935), of seeds or of images.

    Exact up to 16 differences that are not zero (a zero has no sign, and does not change p), by 100,000 random flips up to 100: then p is
    at least 1e-5. Beyond, from the normal distribution with McNemar's continuity correction, the size of the smallest one. Any unit.
    """
    values = np.asarray([value for value in differences if value], dtype=np.float64)
    if len(values) <= EXACT:
        return float(exact_sign_flip(values[:, None])[0])
    sizes, counts = np.unique(np.abs(values).round(15), return_counts=True)
    if len(values) > MANY:
        z = max(abs(values.sum()) - sizes[0], 0.0) / np.square(values).sum() ** 0.5
        return float(2 * norm.sf(z))
    flips = 2 * np.random.default_rng(seed).binomial(counts, 0.5, (FLIPS, len(counts))) - counts
    as_far = np.abs(flips @ sizes) >= abs(values.sum()) - 1e-9 * np.abs(values).sum()
    return float((1 + as_far.sum()) / (1 + FLIPS))


def exact_sign_flip(differences: Float64[np.ndarray, "s m"]) -> Float64[np.ndarray, " m"]:
    """p of each column: the share of the 2^s sign flips whose mean is at least as far from zero as the one that came."""
    others = max(len(differences) - 1, 0)  # the first keeps its sign: flipping all signs keeps the distance
    signs = np.array([(1, *flips) for flips in product((1, -1), repeat=others)], dtype=np.float64)[:, : len(differences)]
    reached = np.abs(differences.sum(axis=0)) - 1e-9 * np.abs(differences).sum(axis=0)  # equal but for rounding is as far
    p: np.ndarray = (np.abs(signs @ differences) >= reached).mean(axis=0)
    return p


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of one family corrected by Holm (1979), in their order: any false rejection in the family is as rare as the level."""
    # statsmodels' collects all garbage of the process in every call: half a second
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    p[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    return [float(value) for value in p]


def resolvable_images(discordance: float, n: int, level: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference, in points, that McNemar's test on n images finds with this power; discordance is a fraction.

    (z_level/2 + z_power) standard errors: 0.89 points at 10 % discordance and n = 10,000. Discordance is never less than the difference.
    """
    z = norm.ppf(1 - level / 2) + norm.ppf(power)
    return float(100 * max(z * (discordance / n) ** 0.5, z**2 / n))


def resampled_sums(values: Float64[np.ndarray, " n"], rng: np.random.Generator) -> Float64[np.ndarray, " draws"]:
    """The sums of `DRAWS` resamples of `values`, of which only few differ: how often each comes is a multinomial."""
    different, counts = np.unique(values.round(12), return_counts=True)  # thirds that were reached in two ways are one value
    order = np.lexsort((-different, -np.abs(different)))  # zero, the most frequent and the one that adds nothing, last
    drawn = rng.multinomial(len(values), counts[order] / len(values), DRAWS)
    sums: np.ndarray = drawn @ different[order]
    return sums


def percentiles(draws: Float64[np.ndarray, " draws"]) -> Interval:
    """Where the middle 95 % of the draws end."""
    low, high = np.percentile(draws, _TAILS)
    return Interval(float(low), float(high))

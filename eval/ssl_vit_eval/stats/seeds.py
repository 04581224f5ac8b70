"""Intervals and tests over pretraining seeds: what a difference says about a method, and not only about the networks at hand.

Seeds are few, so nothing here trusts a percentile of a bootstrap over seeds: with six it covers 0.9 where 0.95 is stated. Student's t with
one degree of freedom less than seeds takes its place.
"""

from collections.abc import Sequence
from functools import cache
from math import inf
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64
from scipy.optimize import brentq
from scipy.stats import nct, t, trim_mean
from torch import Tensor

from ssl_vit.errors import UsageError
from ssl_vit_eval.stats.images import CONFIDENCE, DRAWS, exact_sign_flip, percentiles, resampled_sums, with_imaginary

STUDIES = 4000  # simulated, to find what a number of seeds resolves
SIMULATED = 10  # seeds, up to which they are; beyond, the sign-flip test has the power of the t test


class CrossedDifference(NamedTuple):
    """Accuracy of A minus accuracy of B over seeds and images, its 95 % interval and its standard error, in percentage points."""

    points: float
    low: float
    high: float
    standard_error: float


class Estimate(NamedTuple):
    """A number over data sets and seeds with its 95 % interval over seeds, None for one seed, in the unit of what it is of."""

    value: float
    low: float | None
    high: float | None


def crossed_interval(differences: Float[Tensor, "s n"], seed: int = 0) -> CrossedDifference:
    """95 % interval of the mean difference for another draw of both the seeds and the images.

    differences: right answers of A minus those of B, by seed and image, in [-1, 1]. A crossed bootstrap (Owen & Eckles 2012, section 3)
    with two changes. Images are resampled, the same ones for all seeds; the seeds' part is drawn from Student's t instead: resampling two
    to eight seeds makes it too narrow. Seed × image interaction, which that bootstrap counts three times, is counted once: the images'
    draws are shrunk by what of their variance (two-way layout of mean squares) is interaction, which the seeds' part has already. Two
    independent parts, one with t: Behrens and Fisher's problem, whose solution by draws covers at least what it states.

    The interval contains the one over images of these seeds' mean, so that seeds that agree by chance promise nothing. Where only few
    images are discordant see `with_imaginary`. UsageError for fewer than two seeds: then `paired_difference` says what the images say.
    """
    values = differences.double().cpu().numpy()
    seeds, n = values.shape
    if seeds < 2 or n == 0:
        raise UsageError(f"{seeds} seeds × {n} images: an interval over seeds and images needs two seeds and one image, or more")
    of_seeds, of_images, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
    seed_part = of_seeds.var(ddof=1) / seeds
    residual = values - of_seeds[:, None] - of_images + mean
    interaction = np.square(residual).sum() / ((seeds - 1) * n) / (seeds * n)

    images, kept = with_imaginary(of_images), 1.0
    image_part = images.var() * len(images) / n**2
    if len(images) == n:  # else too few to split
        kept = 1 - interaction / image_part if interaction < image_part else 0.0

    rng = np.random.default_rng(seed)
    by_image = (resampled_sums(images, rng) - images.sum()) / n
    by_seed = t.ppf((rng.permutation(DRAWS) + 0.5) / DRAWS, seeds - 1) * seed_part**0.5
    crossed, alone = percentiles(kept**0.5 * by_image + by_seed), percentiles(by_image)
    error = max(seed_part + kept * image_part, image_part) ** 0.5
    low, high = max(mean + min(crossed.low, alone.low), -1.0), min(mean + max(crossed.high, alone.high), 1.0)
    return CrossedDifference(*(float(100 * value) for value in (mean, low, high, error)))


def smallest_p(seeds: int) -> float:
    """The smallest two-sided p that the sign-flip test over so many seeds can reach, however large the difference."""
    return 2.0 ** (1 - seeds)


def seeds_needed(comparisons: int, level: float = 0.05) -> int:
    """The fewest seeds whose smallest sign-flip p survives Holm's correction among so many comparisons: 6 for 1, 7 for 2 or 3, 8 for 6."""
    return next(seeds for seeds in range(1, 1000) if comparisons * smallest_p(seeds) <= level)


def resolvable_seeds(standard_error: float, seeds: int, level: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that is found with this power: sign-flip p at most `level` and a 95 % t interval without zero.

    In the unit of the standard error, that of the mean difference over these seeds, whose differences are taken as normal. `inf` where
    no p of so few seeds is small enough.
    """
    return inf if smallest_p(seeds) > level else standard_error * _errors_resolved(seeds, level, power)


@cache
def _errors_resolved(seeds: int, level: float, power: float) -> float:
    """In standard errors. By simulation: the sign-flip test of few seeds has no power function in closed form."""
    df, needed = seeds - 1, t.ppf(0.5 + CONFIDENCE / 2, seeds - 1)
    if seeds > SIMULATED:
        needed = max(needed, t.ppf(1 - level / 2, df))
        return float(brentq(lambda difference: nct.sf(needed, df, difference) - power, 0, 100))
    noise = np.random.default_rng(0).standard_normal((seeds, STUDIES))
    errors = noise.std(axis=0, ddof=1) / seeds**0.5

    def found(difference: float) -> float:
        studies = noise + difference / seeds**0.5  # the standard error of their mean
        sure = (studies.mean(axis=0) > needed * errors) & (exact_sign_flip(studies) <= level)
        return float(sure.mean()) - power

    return float(brentq(found, 0, 100, xtol=0.01))


def probability_of_improvement(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Estimate:
    """P(A > B) + P(A = B) / 2 for a seed of each, mean over the data sets (Agarwal et al. 2021, section 4.3); a fraction.

    a, b: scores [data sets][seeds]. A seed is one pretraining that all data sets saw: the bootstrap draws seeds once for all data sets, and
    for A and B each, as in the paper; equal starts in A and B make the interval a little wide, while drawing pairs made it too narrow. It
    is Wilson's, of as many pairs as would have the bootstrap's standard error (where all pairs agree, of as many as there are seeds), with
    Student's t: unlike the bootstrap's it does not end where one arm always wins. The data sets are fixed: it says nothing about others.
    UsageError where a data set lacks a seed.
    """
    scores = _rectangle([*a, *b])
    if len(a) != len(b):
        raise UsageError(f"{len(a)} data sets of A and {len(b)} of B: compare them on the same ones")
    first, second = scores[: len(a)], scores[len(a) :]
    seeds = scores.shape[1]
    wins = (np.sign(first[:, :, None] - second[:, None, :]) / 2 + 0.5).mean(axis=0)  # [seed of A, seed of B]
    value = float(wins.mean())
    if seeds == 1:
        return Estimate(value, None, None)
    of_a, of_b = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), (2, DRAWS)) / seeds
    variance = _unbiased(((of_a @ wins) * of_b).sum(axis=1), seeds)
    pairs = value * (1 - value) / variance if variance > 1e-12 else seeds
    z2 = t.ppf(0.5 + CONFIDENCE / 2, seeds - 1) ** 2 / pairs
    middle, half = (value + z2 / 2) / (1 + z2), (z2 * value * (1 - value) + z2**2 / 4) ** 0.5 / (1 + z2)
    return Estimate(value, float(max(middle - half, 0.0)), float(min(middle + half, 1.0)))


def interquartile_mean(scores: Sequence[Sequence[float]]) -> Estimate:
    """Mean of the middle half of all scores [data sets][seeds] (Agarwal et al. 2021, section 4.3), in their unit.

    Interval: Student's t with the standard error of a bootstrap that draws seeds, the same for all data sets. The data sets are fixed.
    UsageError where a data set lacks a seed.
    """
    values = _rectangle(scores)
    seeds = values.shape[1]
    value = float(trim_mean(values, 0.25, axis=None))
    if seeds == 1:
        return Estimate(value, None, None)
    drawn = values[:, np.random.default_rng(0).integers(seeds, size=(DRAWS, seeds))]  # [data sets, draws, seeds]
    means = trim_mean(drawn.swapaxes(0, 1).reshape(DRAWS, -1), 0.25, axis=1)
    half = t.ppf(0.5 + CONFIDENCE / 2, seeds - 1) * _unbiased(means, seeds) ** 0.5
    return Estimate(value, float(value - half), float(value + half))


def _rectangle(scores: Sequence[Sequence[float]]) -> Float64[np.ndarray, "k s"]:
    numbers = sorted({len(of) for of in scores})
    if len(numbers) != 1 or numbers == [0]:
        raise UsageError(f"scores of {numbers} seeds: every data set needs the same seeds, at least one; leave out those that one lacks")
    return np.asarray(scores, dtype=np.float64)


def _unbiased(draws: Float64[np.ndarray, " draws"], seeds: int) -> float:
    """Variance over the draws of a bootstrap over seeds, which is (seeds - 1) / seeds of that of a mean."""
    return float(draws.var() * seeds / (seeds - 1))

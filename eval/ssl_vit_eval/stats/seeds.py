"""Intervals and tests over pretraining seeds: what a difference says about a method, and not only about the networks at hand.

Seeds are few, so nothing here trusts a percentile of a bootstrap over seeds: with six it covers 0.9 where 0.95 is stated. Student's t with
one degree of freedom less than seeds takes its place.
"""

from collections.abc import Sequence
from functools import cache
from math import inf
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from scipy.optimize import brentq
from scipy.stats import nct, t, trim_mean
from torch import Tensor

from ssl_vit.errors import UsageError
from ssl_vit_eval.stats.images import (
    CONFIDENCE,
    DRAWS,
    Interval,
    exact_sign_flip,
    imaginary,
    largest_weight,
    mean_over,
    percentiles,
    resampled,
    sign_flip,
    strata,
    student_draws,
    variance_over,
    wilson_interval,
)

STUDIES = 4000  # simulated, to find what a number of seeds resolves
MOST_ERRORS = 1000  # that a difference may need; more is out of reach of any study, and the noncentral t has no accuracy there
SIMULATED = 10  # seeds, up to which they are; beyond, the sign-flip test has the power of the t test


class Crossed(NamedTuple):
    """A mean over seeds, replicates and images with its 95 % interval and standard error, in percentage points; df: degrees of freedom of
    the standard error by Welch and Satterthwaite, infinite where it is of images alone. of_levels: standard error and degrees of freedom of
    the means of the seeds alone and of those of the replicates alone, each where there are several. of_seeds: the mean of each seed."""

    points: float
    low: float
    high: float
    standard_error: float
    df: float
    of_levels: tuple[tuple[float, float], ...] = ()
    of_seeds: tuple[float, ...] = ()

    @property
    def errors(self) -> tuple[tuple[float, float], ...]:
        """Every standard error with its degrees of freedom, each of which a difference is held against."""
        return (self.standard_error, self.df), *self.of_levels


class Estimate(NamedTuple):
    """A number over datasets and seeds with its 95 % interval over seeds, None for one seed, in the unit of what it is of."""

    value: float
    low: float | None
    high: float | None


def crossed_interval(values: Float[Tensor, "s k n"], classes: Int64[Tensor, " n"] | None = None, seed: int = 0) -> Crossed:
    """95 % interval of a mean for another draw of the pretraining seeds, of the replicates and of the images.

    values: by pretraining seed, replicate and image, in [-1, 1]: right answers of A minus those of B. A replicate is a probe seed or a draw
    of the training set. classes: of the images, for the mean over classes instead of the mean over images.

    The model of variance: v[s, k, i] = mean + seed[s] + replicate[k] + probe[s, k] + image[i] + interactions with the image. The means of
    the seeds vary by seed[s] and by probe[s, k], so none of the two has to be estimated. The means of the replicates vary by what they
    share over all seeds, replicate[k] (a low-shot draw is the same images for each), and again by probe[s, k]: counted twice, since to
    subtract it from so few would leave the interval too narrow. Of one pretraining seed nothing can be said about others: then the
    replicates stand in the place of the seeds, and the mean is that of these weights.

    A crossed bootstrap (Owen & Eckles 2012, section 3) with two changes. Images are resampled, the same ones for all seeds; the parts of
    the few seeds and replicates are drawn from Student's t instead: resampling two to eight makes them too narrow. Interaction with the
    image, which that bootstrap counts again with each of its parts, is counted once: the images' draws are shrunk by what of their variance
    is interaction, by the layout of mean squares (Searle, Casella & McCulloch 1992, chapter 4), since the other parts have it already.
    Independent parts, some with t: Behrens and Fisher's problem, whose solution by draws covers at least what it states.

    The interval contains the one over images of this mean, so that seeds that agree by chance promise nothing. One seed and one replicate
    are their images alone: then this is the paired bootstrap over images. Few discordant images: see `imaginary`.
    """
    v = values.double().cpu().numpy()
    groups = strata(v.shape[2], classes)
    of_images, rng = v.mean(axis=(0, 1)), np.random.default_rng(seed)
    mean = mean_over(of_images, groups)
    levels = [of for of in (v.mean(axis=1), v.mean(axis=0)) if len(of) > 1]  # [seeds; images] and [replicates; images]
    parts = [(mean_over(of, groups).var(ddof=1) / len(of), len(of) - 1) for of in levels]  # variance and degrees of freedom

    image_part, by_image, kept = variance_over(of_images, groups), resampled(of_images, groups, rng), 1.0
    two_more = imaginary(of_images, groups, rng)
    if two_more is not None:
        image_part, by_image = image_part + 2 * largest_weight(groups) ** 2, by_image + two_more
    elif image_part > 0:
        interaction = sum(variance_over(of - of_images, groups).sum() / (len(of) - 1) / len(of) for of in levels)
        kept = max(0.0, 1 - interaction / image_part)
    by_level = sum(student_draws(float(df), rng) * variance**0.5 for variance, df in parts)
    crossed, alone = percentiles(kept**0.5 * by_image + by_level), percentiles(by_image)
    low, high = max(float(mean) + min(crossed.low, alone.low), -1.0), min(float(mean) + max(crossed.high, alone.high), 1.0)

    variance = sum(part for part, _ in parts) + kept * image_part
    uncertain = sum(part**2 / df for part, df in parts)
    df = inf if variance <= image_part or not uncertain else variance**2 / uncertain
    points, error = 100 * float(mean), 100 * float(max(variance, image_part)) ** 0.5
    of_levels = tuple((100 * float(part) ** 0.5, float(df)) for part, df in parts)
    of_seeds = tuple((100 * mean_over(v.mean(axis=1), groups)).tolist())
    return Crossed(points, 100 * low, 100 * high, error, float(df), of_levels, of_seeds)


def accuracy_interval(correct: Bool[Tensor, "n k"], classes: Int64[Tensor, " n"] | None = None) -> Interval:
    """95 % interval of an accuracy, as fractions: over images, or with `classes` over images within their class, and over the replicates
    k where there are several. Wilson's for right and wrong answers of one replicate, else that of `crossed_interval`."""
    if classes is None and correct.shape[1] == 1:
        return wilson_interval(int(correct.sum()), len(correct))
    _, low, high, *_ = crossed_interval(correct.T[None].double(), classes)
    return Interval(max(low / 100, 0.0), high / 100)


def t_test(difference: Crossed, margin: float | None = None) -> float:
    """p of Student's t, which takes the differences of the seeds as normal: the largest on the crossed standard error, on that of the seeds
    alone and on that of the replicates alone, each with its own degrees of freedom.

    The crossed one by itself rejects too often at corrected levels: where the few seeds agree by chance, their small variance brings many
    degrees of freedom too. Without a margin two-sided, of no difference. With one: that the difference is not within ± margin points, the
    larger of two one-sided p (Schuirmann 1987)."""
    distance, sides = (abs(difference.points), 2) if margin is None else (margin - abs(difference.points), 1)
    return max(float(sides * t.sf(distance / max(error, 1e-12), df)) for error, df in difference.errors)


def sign_flip_within(differences: Sequence[float], margin: float) -> float:
    """p that the mean of the seeds is not within ± margin, by two one-sided sign-flip tests: the larger p, 1 where it lies outside.
    At least 2^-s."""
    sides = [[margin + sign * value for value in differences] for sign in (1, -1)]
    return max(sign_flip(side) / 2 if sum(side) > 0 else 1.0 for side in sides)


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


def resolvable_t(standard_error: float, df: float, level: float = 0.05, power: float = 0.8) -> float:
    """The same by Student's t: p at most `level`, and a 95 % t interval without zero. `inf` beyond 1000 standard errors, which one or two
    degrees of freedom need at a small level."""
    df = min(df, 1e4)  # of the noncentral t; beyond it is normal
    needed = max(t.ppf(0.5 + CONFIDENCE / 2, df), t.ppf(1 - level / 2, df))
    if needed > MOST_ERRORS:
        return inf
    return standard_error * float(brentq(lambda difference: nct.sf(needed, df, difference) - power, 0, 10 * needed + 10))


@cache
def _errors_resolved(seeds: int, level: float, power: float) -> float:
    """In standard errors. By simulation: the sign-flip test of few seeds has no power function in closed form."""
    if seeds > SIMULATED:
        return resolvable_t(1.0, float(seeds - 1), level, power)
    needed = t.ppf(0.5 + CONFIDENCE / 2, seeds - 1)
    noise = np.random.default_rng(0).standard_normal((seeds, STUDIES))
    errors = noise.std(axis=0, ddof=1) / seeds**0.5

    def found(difference: float) -> float:
        studies = noise + difference / seeds**0.5  # the standard error of their mean
        sure = (studies.mean(axis=0) > needed * errors) & (exact_sign_flip(studies) <= level)
        return float(sure.mean()) - power

    return float(brentq(found, 0, 100, xtol=0.01))


def probability_of_improvement(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Estimate:
    """P(A > B) + P(A = B) / 2 for a seed of each, mean over the datasets (Agarwal et al. 2021, section 4.3); a fraction.

    a, b: scores [datasets][seeds]. A seed is one pretraining that all datasets saw: the bootstrap draws seeds once for all datasets, and
    for A and B each, as in the paper; equal starts in A and B make the interval a little wide, while drawing pairs made it too narrow. It
    is Wilson's, of as many pairs as would have the bootstrap's standard error (where all pairs agree, of as many as there are seeds), with
    Student's t: unlike the bootstrap's it does not end where one arm always wins. The datasets are fixed: it says nothing about others.
    UsageError where a dataset lacks a seed.
    """
    scores = _rectangle([*a, *b])
    if len(a) != len(b):
        raise UsageError(f"{len(a)} datasets of A and {len(b)} of B: compare them on the same ones")
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
    """Mean of the middle half of all scores [datasets][seeds] (Agarwal et al. 2021, section 4.3), in their unit.

    Interval: Student's t with the standard error of a bootstrap that draws seeds, the same for all datasets. The datasets are fixed.
    UsageError where a dataset lacks a seed.
    """
    values = _rectangle(scores)
    seeds = values.shape[1]
    value = float(trim_mean(values, 0.25, axis=None))
    if seeds == 1:
        return Estimate(value, None, None)
    drawn = values[:, np.random.default_rng(0).integers(seeds, size=(DRAWS, seeds))]  # [datasets, draws, seeds]
    means = trim_mean(drawn.swapaxes(0, 1).reshape(DRAWS, -1), 0.25, axis=1)
    half = t.ppf(0.5 + CONFIDENCE / 2, seeds - 1) * _unbiased(means, seeds) ** 0.5
    return Estimate(value, float(value - half), float(value + half))


def _rectangle(scores: Sequence[Sequence[float]]) -> Float64[np.ndarray, "k s"]:
    numbers = sorted({len(of) for of in scores})
    if len(numbers) != 1 or numbers == [0]:
        raise UsageError(f"scores of {numbers} seeds: every dataset needs the same seeds, at least one; leave out those that one lacks")
    return np.asarray(scores, dtype=np.float64)


def _unbiased(draws: Float64[np.ndarray, " draws"], seeds: int) -> float:
    """Variance over the draws of a bootstrap over seeds, which is (seeds - 1) / seeds of that of a mean."""
    return float(draws.var() * seeds / (seeds - 1))

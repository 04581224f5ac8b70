"""Over images: intervals against their definitions, naive bootstraps that draw images and simulated coverage; tests against plain loops,
simulated false positives and power."""

from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from scipy.stats import norm, permutation_test
from statsmodels.stats.multitest import multipletests

from ssl_vit.errors import UsageError
from ssl_vit_eval.stats import images
from ssl_vit_eval.stats.images import (
    holm,
    mcnemar,
    paired_p,
    resolvable_images,
    sign_flip,
    wilson_interval,
)
from ssl_vit_eval.stats.seeds import Crossed, accuracy_interval, crossed_interval


def paired_difference(a: torch.Tensor, b: torch.Tensor, seed: int = 0) -> Crossed:
    """Of one seed: over its images."""
    return crossed_interval((a - b)[None, None], seed=seed)


def answers(n: int, accuracy: float, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(n) < accuracy).double()


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (1, 3), (640, 1000)])
def test_wilson_bounds_are_where_the_score_test_rejects(correct: int, n: int) -> None:
    """The interval's definition: the bounds p at which |share - p| is 1.96 standard errors of p."""
    z, share = norm.ppf(0.975), correct / n
    for bound in wilson_interval(correct, n):
        if 1e-12 < bound < 1 - 1e-12:  # else 0 or 1, but for rounding
            assert abs(share - bound) == pytest.approx(z * (bound * (1 - bound) / n) ** 0.5)
        else:
            assert bound == pytest.approx(share)


def test_macro_equals_drawing_images_within_classes() -> None:
    labels = torch.tensor([0] * 300 + [1] * 40 + [7] * 20)
    correct = torch.cat([answers(300, 0.9, 0), answers(40, 0.5, 1), answers(20, 0.3, 2)])
    rng = np.random.default_rng(3)
    groups = [correct[labels == label].numpy() for label in (0, 1, 7)]
    naive = [np.mean([g[rng.integers(len(g), size=len(g))].mean() for g in groups]) for _ in range(10_000)]
    np.testing.assert_allclose(accuracy_interval(correct[:, None].bool(), labels), np.percentile(naive, [2.5, 97.5]), atol=0.006)


def test_paired_difference_equals_drawing_images() -> None:
    a = answers(400, 0.7, 0)
    b = torch.where(answers(400, 0.15, 1).bool(), answers(400, 0.5, 2), a)
    rng = np.random.default_rng(3)
    signed = a.numpy() - b.numpy()
    naive = [100 * signed[rng.integers(400, size=400)].mean() for _ in range(10_000)]
    found = paired_difference(a, b)
    assert found.points == pytest.approx(100 * signed.mean())
    np.testing.assert_allclose((found.low, found.high), np.percentile(naive, [2.5, 97.5]), atol=0.251)
    back = paired_difference(b, a)
    np.testing.assert_allclose((-back.points, -back.high, -back.low), (found.points, found.low, found.high), atol=0.251)


def test_paired_interval_covers_the_true_difference_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(600):
        outcome = torch.from_numpy(rng.choice(4, size=500, p=[0.5, 0.2, 0.15, 0.15]))  # both, only A, only B, none
        found = paired_difference((outcome <= 1).double(), ((outcome == 0) | (outcome == 2)).double(), seed)
        covered += found.low <= 5.0 <= found.high
    assert 0.92 < covered / 600 < 0.98


def test_paired_width_is_the_detectable_difference_of_theory() -> None:
    # known: 10 % discordance at n = 10 000 detects 0.89 points at 80 % power, (1.96 + 0.84) standard errors
    a, b = torch.zeros(10_000), torch.zeros(10_000)
    a[:500], b[500:1000] = 1.0, 1.0
    found = paired_difference(a, b)
    standard_error = (found.high - found.low) / 2 / norm.ppf(0.975)
    assert standard_error * (norm.ppf(0.975) + norm.ppf(0.8)) == pytest.approx(0.89, abs=0.02)


def test_bad_input_is_named() -> None:
    none = torch.zeros(0)
    with pytest.raises(UsageError, match="0 of 0"):
        wilson_interval(0, 0)
    with pytest.raises(UsageError, match="11 of 10"):
        wilson_interval(11, 10)
    with pytest.raises(UsageError, match="no images"):
        paired_difference(none, none)
    with pytest.raises(UsageError, match="no images"):
        mcnemar(none.bool(), none.bool())


def planted(only_a: int, only_b: int, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B on n images: first those that only A has right, then those of B, then both and none in turn."""
    a, b = torch.arange(n) % 2 == 0, torch.arange(n) % 2 == 0
    a[: only_a + only_b], b[: only_a + only_b] = torch.arange(only_a + only_b) < only_a, torch.arange(only_a + only_b) >= only_a
    return a, b


def test_agreement_on_all_images_leaves_three_in_n() -> None:
    ones = torch.ones(1000)
    assert paired_difference(ones, ones)[:3] == pytest.approx((0.0, -0.3, 0.3), abs=1e-9)
    points, low, high = paired_difference(ones, 1 - ones)[:3]  # and so does disagreement on all
    assert (points, high) == (100.0, 100.0)
    assert 99 < low < 99.8


def test_ordinary_intervals_have_no_imaginary_images() -> None:
    """25 discordant images are resampled as they are, 24 with two more."""
    differences, rng = np.zeros(5000), np.random.default_rng(0)
    differences[:24] = 1
    two_more = images.imaginary(differences, images.strata(len(differences), None), rng)
    assert two_more is not None
    assert (two_more * 5000).std() == pytest.approx(2**0.5, rel=0.03)
    differences[24] = -1
    assert images.imaginary(differences, images.strata(len(differences), None), rng) is None


@pytest.mark.parametrize(("only_a", "only_b"), [(2.5, 0.0), (4.0, 1.0), (1.0, 8.0)])
def test_interval_covers_where_few_images_are_discordant(only_a: float, only_b: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expected numbers of discordant images of 400. Of 500 simulated studies 95 % are 475 ± 5."""
    monkeypatch.setattr(images, "DRAWS", 1000)
    rng, n, covered = np.random.default_rng(1), 400, 0
    for seed in range(500):
        outcome = torch.from_numpy(rng.choice(3, size=n, p=[only_a / n, only_b / n, 1 - (only_a + only_b) / n]))
        found = paired_difference((outcome != 1).double(), (outcome != 0).double(), seed)
        covered += found.low <= 100 * (only_a - only_b) / n <= found.high
    assert covered >= 465


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (0, 6), (2, 8), (12, 12), (20, 4), (20, 5), (13, 12), (10, 40)])
def test_p_of_mcnemar(only_a: int, only_b: int) -> None:
    """Exact below 25: twice the smaller tail of a fair coin; else (|b - c| - 1)² / (b + c) with one degree of freedom, z² of a normal."""
    k = only_a + only_b
    if k < 25:
        expected = min(1.0, 2 * sum(comb(k, hits) for hits in range(min(only_a, only_b) + 1)) / 2**k)
    else:
        expected = 2 * norm.sf((abs(only_a - only_b) - 1) / k**0.5)
    found = mcnemar(*planted(only_a, only_b))
    assert found == pytest.approx(expected)
    assert paired_p(*(correct.double() for correct in planted(only_a, only_b))) == found
    if k < 16:
        assert sign_flip([1.0] * only_a + [-1.0] * only_b + [0.0] * 30) == pytest.approx(found)


def test_mcnemar_errs_and_finds_as_often_as_stated() -> None:
    """1000 studies of 2000 images, 10 % discordant: of no difference, then of the one that is found in 80 %."""
    rng, n, difference = np.random.default_rng(0), 2000, resolvable_images(0.1, 2000)
    for true, least, most in ((0.0, 25, 60), (difference, 760, 840)):  # 5 % with continuity correction is about 4; 800 ± 13
        only_a = (0.1 + true / 100) / 2
        tables = rng.multinomial(n, [only_a, 0.1 - only_a, 0.9], 1000)
        assert least <= sum(mcnemar(*planted(int(a), int(b), n)) <= 0.05 for a, b, _ in tables) <= most


def test_what_images_resolve() -> None:
    assert [round(resolvable_images(discordance, 10_000), 2) for discordance in (0.05, 0.1, 0.2)] == [0.63, 0.89, 1.25]
    # no images are discordant: 8 of n, all for one side, are expected and at least 6, the fewest with p <= 0.05, come in 80 %
    assert resolvable_images(0.0, 1000) == pytest.approx(0.785, abs=0.001)


def test_shares_are_tested_by_flipping_signs_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FLIPS", 2000)
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 4, 12) / 3, rng.integers(0, 4, 12) / 3
    expected = permutation_test((a - b,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert paired_p(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected)

    # 400 studies of 100 images, four draws of the training set each; 5 % are 20 ± 4.4
    skill = rng.random((400, 100, 1))
    right = (rng.random((400, 100, 8)) < skill).astype(float)
    shares = torch.from_numpy(right.reshape(400, 100, 2, 4).mean(axis=3))
    assert 8 <= sum(paired_p(one[:, 0], one[:, 1]) <= 0.05 for one in shares) <= 33


@pytest.mark.parametrize("seeds", [1, 2, 5, 6, 8])
def test_sign_flip_tries_all_signs(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    for of_seeds in (rng.normal(0.8, 1, seeds), rng.integers(-3, 4, seeds) / 10):  # tenths: ties, exact but for rounding
        scale = 10 if (of_seeds * 10 == np.round(of_seeds * 10)).all() else 1
        whole = np.round(of_seeds * scale) if scale > 1 else of_seeds
        flipped = [abs(sum(sign * one for sign, one in zip(signs, whole, strict=True))) for signs in product((1, -1), repeat=seeds)]
        assert sign_flip(of_seeds.tolist()) == pytest.approx(np.mean(np.array(flipped) >= abs(whole.sum()) - 1e-12))
        assert sign_flip((-of_seeds).tolist()) == sign_flip(of_seeds.tolist())
    assert sign_flip([0.5] * seeds) == 2 / 2**seeds
    assert sign_flip([0.1, 0.2, -0.3]) == 1.0


def test_random_flips_agree_with_all_of_them() -> None:
    of_seeds = np.random.default_rng(5).normal(0.5, 1, 18)
    signs = 1 - 2 * (np.arange(2**18)[:, None] >> np.arange(18) & 1)
    expected = np.mean(np.abs(signs @ of_seeds) >= abs(of_seeds.sum()))
    assert 0.005 < expected < 0.2
    assert sign_flip(of_seeds.tolist()) == pytest.approx(expected, rel=0.1)
    assert sign_flip([1.0] * 40) == pytest.approx(1e-5, rel=0.01)


def test_holm_equals_statsmodels() -> None:
    for p_values in ([0.04, 0.01, 0.3, 0.012, 0.012], [0.9, 0.6, 0.031], [0.2]):
        assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())
    assert holm([]) == []


def test_holm_holds_the_error_of_a_family() -> None:
    """Three arms, all alike, and a fourth that is better: 600 studies of 8 seeds; any false finding in at most 5 %, 30 ± 5.3."""
    rng, false = np.random.default_rng(3), 0
    for _ in range(600):
        scores = rng.standard_normal((4, 8)) + np.array([[0], [0], [0], [4]])
        pairs = [(0, 1), (0, 2), (1, 2), (3, 0), (3, 1), (3, 2)]
        corrected = holm([sign_flip((scores[a] - scores[b]).tolist()) for a, b in pairs])
        false += any(p <= 0.05 for p in corrected[:3])
    assert false <= 42

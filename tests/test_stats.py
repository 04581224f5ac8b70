"""Intervals against their definitions, naive bootstraps that draw images, and simulated coverage."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from ssl_vit.errors import UsageError
from ssl_vit_eval.stats import macro_interval, mean_interval, paired_difference, wilson_interval


def answers(n: int, accuracy: float, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(n) < accuracy).double()


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (1, 3), (640, 1000)])
def test_wilson_bounds_are_where_the_score_test_rejects(correct: int, n: int) -> None:
    """The interval's definition: the bounds p at which |share - p| is 1.96 standard errors of p."""
    z, share = norm.ppf(0.975), correct / n
    for bound in wilson_interval(correct, n):
        if 0 < bound < 1:
            assert abs(share - bound) == pytest.approx(z * (bound * (1 - bound) / n) ** 0.5)
        else:
            assert bound == share


def test_macro_equals_drawing_images_within_classes() -> None:
    labels = torch.tensor([0] * 300 + [1] * 40 + [7] * 20)
    correct = torch.cat([answers(300, 0.9, 0), answers(40, 0.5, 1), answers(20, 0.3, 2)])
    rng = np.random.default_rng(3)
    groups = [correct[labels == label].numpy() for label in (0, 1, 7)]
    naive = [np.mean([g[rng.integers(len(g), size=len(g))].mean() for g in groups]) for _ in range(10_000)]
    np.testing.assert_allclose(macro_interval(correct, labels), np.percentile(naive, [2.5, 97.5]), atol=0.006)


def test_paired_difference_equals_drawing_images() -> None:
    a = answers(400, 0.7, 0)
    b = torch.where(answers(400, 0.15, 1).bool(), answers(400, 0.5, 2), a)
    rng = np.random.default_rng(3)
    signed = a.numpy() - b.numpy()
    naive = [100 * signed[rng.integers(400, size=400)].mean() for _ in range(10_000)]
    found = paired_difference(a, b)
    assert found.points == pytest.approx(100 * signed.mean())
    np.testing.assert_allclose((found.ci_low, found.ci_high), np.percentile(naive, [2.5, 97.5]), atol=0.251)
    back = paired_difference(b, a)
    np.testing.assert_allclose((-back.points, -back.ci_high, -back.ci_low), (found.points, found.ci_low, found.ci_high), atol=0.251)


def test_paired_interval_covers_the_true_difference_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(600):
        outcome = torch.from_numpy(rng.choice(4, size=500, p=[0.5, 0.2, 0.15, 0.15]))  # both, only A, only B, none
        found = paired_difference((outcome <= 1).double(), ((outcome == 0) | (outcome == 2)).double(), seed)
        covered += found.ci_low <= 5.0 <= found.ci_high
    assert 0.92 < covered / 600 < 0.98


def test_paired_width_is_the_detectable_difference_of_theory() -> None:
    # known: 10 % discordance at n = 10 000 detects 0.89 points at 80 % power, (1.96 + 0.84) standard errors
    a, b = torch.zeros(10_000), torch.zeros(10_000)
    a[:500], b[500:1000] = 1.0, 1.0
    found = paired_difference(a, b)
    standard_error = (found.ci_high - found.ci_low) / 2 / norm.ppf(0.975)
    assert standard_error * (norm.ppf(0.975) + norm.ppf(0.8)) == pytest.approx(0.89, abs=0.02)


def test_shares_of_several_draws_are_resampled_by_image() -> None:
    """Each image was asked three times: the images are drawn, not the answers."""
    shares = torch.stack([answers(300, 0.4, seed) for seed in (0, 1)] + [answers(300, 0.4, 0)]).mean(dim=0)
    rng = np.random.default_rng(3)
    naive = [shares.numpy()[rng.integers(300, size=300)].mean() for _ in range(10_000)]
    np.testing.assert_allclose(mean_interval(shares), np.percentile(naive, [2.5, 97.5]), atol=0.004)
    other = torch.stack([answers(300, 0.5, seed) for seed in (5, 6, 7)]).mean(dim=0)
    naive = [100 * (shares - other).numpy()[rng.integers(300, size=300)].mean() for _ in range(10_000)]
    found = paired_difference(shares, other)
    np.testing.assert_allclose((found.ci_low, found.ci_high), np.percentile(naive, [2.5, 97.5]), atol=0.4)


def test_bad_input_is_named() -> None:
    none = torch.zeros(0)
    with pytest.raises(UsageError, match="0 of 0"):
        wilson_interval(0, 0)
    with pytest.raises(UsageError, match="11 of 10"):
        wilson_interval(11, 10)
    with pytest.raises(UsageError, match="no images"):
        paired_difference(none, none)

"""Measures of features, on features whose answer is known or against their definition in loops."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_vit.errors import UsageError
from ssl_vit_eval.diagnostics.geometry import alpha_req, bimodality, cka_table, norm_histograms, rankme, redundancy


def centred_basis(n: int, d: int) -> Tensor:
    """d orthonormal columns, each of mean 0."""
    columns = torch.cat([torch.ones(n, 1), torch.randn(n, d)], dim=1).double()
    return torch.linalg.qr(columns).Q[:, 1:]


def test_rankme_of_equal_directions_is_their_number_and_of_one_is_one() -> None:
    basis = torch.linalg.qr(torch.randn(64, 20)).Q
    assert rankme(3 * basis) == pytest.approx(20, rel=1e-4)
    assert rankme(basis[:, :5] @ torch.linalg.qr(torch.randn(30, 5)).Q.T) == pytest.approx(5, rel=1e-3)
    assert rankme(torch.outer(torch.randn(64), torch.randn(20))) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", [(50, 12), (12, 50)])
def test_rankme_is_its_formula_on_uncentred_features(shape: tuple[int, int]) -> None:
    X = torch.randn(shape) + 3
    sigma = np.linalg.svd(X.double().numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert rankme(X) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)


@pytest.mark.parametrize("a", [0.5, 1.0, 2.5])
def test_alpha_req_of_a_power_law(a: float) -> None:
    X = centred_basis(200, 80) * torch.arange(1, 81) ** (-a / 2) + 10 * torch.randn(80)
    fit = alpha_req(X)
    assert fit is not None
    assert (fit["first"], fit["last"]) == (11, 50)
    assert fit["alpha"] == pytest.approx(a, abs=1e-6)


def test_alpha_req_fits_its_range_and_no_other_rank() -> None:
    k = torch.arange(1.0, 81)
    variance = torch.where(k < 11, 1e3, torch.where(k > 50, 1e-6, 1 / k))
    fit = alpha_req(centred_basis(200, 80) * variance.sqrt())
    assert fit == {"alpha": pytest.approx(1.0, abs=1e-6), "first": 11, "last": 50}
    narrow = alpha_req(centred_basis(200, 30) * k[:30] ** -0.5)
    assert narrow == {"alpha": pytest.approx(1.0, abs=1e-6), "first": 11, "last": 30}
    few_images = alpha_req((centred_basis(20, 19) * k[:19] ** -0.5) @ torch.linalg.qr(torch.randn(40, 19).double()).Q.T)
    assert few_images == {"alpha": pytest.approx(1.0, abs=1e-6), "first": 11, "last": 19}
    assert alpha_req(torch.randn(100, 12)) is None
    assert alpha_req(torch.randn(100, 5) @ torch.randn(5, 60)) is None  # of rank 5 but for the rounding


def hsic_1(K: Tensor, L: Tensor) -> float:
    """Song et al. 2012, eq. 5, written out over pairs of images."""
    n = len(K)
    trace = sums = mixed = sum_k = sum_l = 0.0
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            trace += K[i, j].item() * L[i, j].item()
            sum_k += K[i, j].item()
            sum_l += L[i, j].item()
            mixed += K[i, j].item() * sum(L[j, q].item() for q in range(n) if q != j)
    sums = sum_k * sum_l / ((n - 1) * (n - 2))
    return (trace + sums - 2 / (n - 2) * mixed) / (n * (n - 3))


def test_cka_equals_its_definition_in_loops() -> None:
    X, Y = torch.randn(9, 4) + 1, torch.randn(9, 3) - 2
    Y[:, 0] += X[:, 0]
    K, L = ((Z.double() @ Z.double().T) for Z in (X, Y))
    (pair,) = cka_table({"x": X, "y": Y})
    assert (pair["a"], pair["b"]) == ("x", "y")
    assert pair["cka"] == pytest.approx(hsic_1(K, L) / math.sqrt(hsic_1(K, K) * hsic_1(L, L)), rel=1e-9)
    generator = torch.Generator().manual_seed(7)
    orders = [torch.randperm(9, generator=generator) for _ in range(3)]
    null = [hsic_1(K, L[order][:, order]) / math.sqrt(hsic_1(K, K) * hsic_1(L, L)) for order in orders]
    (pair,) = cka_table({"x": X, "y": Y}, permutations=3, seed=7)
    assert pair["null_mean"] == pytest.approx(np.mean(null), rel=1e-9)
    assert pair["null_p95"] == pytest.approx(np.percentile(null, 95), rel=1e-9)


def test_cka_is_one_for_a_rotation_and_debiased_to_zero_for_independent_features() -> None:
    X = torch.randn(120, 60) * torch.linspace(0.1, 2, 60)
    rotated = 5 * X @ torch.linalg.qr(torch.randn(60, 60)).Q + 7
    table = {(pair["a"], pair["b"]): pair for pair in cka_table({"x": X, "rotated": rotated, "other": torch.randn(120, 300)})}
    assert list(table) == [("x", "rotated"), ("x", "other"), ("rotated", "other")]
    assert table["x", "rotated"]["cka"] == pytest.approx(1, abs=1e-5)
    for pair in table.values():
        assert abs(pair["null_mean"]) < 0.01
        assert 0 < pair["null_p95"] < 0.06
    assert abs(table["x", "other"]["cka"]) < 0.05  # without debiasing about 0.5


def test_cka_of_constant_features_is_unknown_and_of_three_images_refused() -> None:
    (pair,) = cka_table({"x": torch.randn(8, 3), "constant": torch.ones(8, 3)})
    assert pair == {"a": "x", "b": "constant", "cka": None, "null_mean": None, "null_p95": None}
    with pytest.raises(UsageError, match="got 3 images; give at least 4"):
        cka_table({"x": torch.randn(3, 3), "y": torch.randn(3, 3)})


def test_planted_outlier_tokens_are_counted() -> None:
    norms = torch.linspace(10, 11, 5000).view(50, 100)  # median 10.5, MAD 0.25, but for the planted
    threshold = 10.5 + 10 * 0.25
    norms[::5, 7] = 300.0  # 10 of 5000
    norms[1, 1] = threshold - 0.05
    norms[2, 2] = threshold + 0.05
    result = norm_histograms({"patches": norms, "cls": 20 + torch.rand(50, 1), "registers": torch.empty(50, 0)})
    patches = result["patches"]
    assert patches["outliers"] == 11 / 5000
    assert patches["median"] == pytest.approx(10.5, abs=0.02)
    assert patches["mad"] == pytest.approx(0.25, abs=0.02)
    assert patches["threshold"] == pytest.approx(patches["median"] + 10 * patches["mad"])
    assert sum(patches["histogram"]) == 5000
    assert patches["histogram"][-1] == 10
    assert (result["cls"]["count"], sum(result["cls"]["histogram"])) == (50, 50)
    assert result["registers"] is None
    assert len(result["edges"]) == len(patches["histogram"]) + 1


def test_bimodality_of_known_distributions() -> None:
    assert bimodality(np.linspace(0, 1, 10_001)) == pytest.approx(5 / 9, abs=1e-3)
    assert bimodality(np.random.default_rng(0).standard_normal(100_000)) == pytest.approx(1 / 3, abs=0.01)
    assert bimodality(np.repeat([1.0, 2.0], 5000)) == pytest.approx(1.0, abs=1e-3)
    x = np.array([1.0, 2, 2, 3, 9])
    n, z = 5, x - x.mean()
    m2, m3, m4 = (z**2).mean(), (z**3).mean(), (z**4).mean()
    g = m3 / m2**1.5 * math.sqrt(n * (n - 1)) / (n - 2)
    k = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * (m4 / m2**2 - 3) + 6)
    assert bimodality(x) == pytest.approx((g**2 + 1) / (k + 3 * 16 / (3 * 2)))
    assert bimodality(np.full(100, 3.3)) is None
    assert bimodality(np.array([1.0, 2.0, 3.0])) is None


def test_redundancy_is_what_the_pair_adds_to_the_better() -> None:
    assert redundancy(71.0, 70.0, 64.0) == 1.0
    assert redundancy(lp_ab=69.0, lp_a=60.0, lp_b=70.0) == -1.0

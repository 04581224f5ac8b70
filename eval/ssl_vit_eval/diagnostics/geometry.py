"""The geometry of a set of features: effective rank, decay of the spectrum, similarity of two readouts, token norms."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import kurtosis, skew
from torch import Tensor

from ssl_vit.errors import UsageError

RANKS = (11, 50)  # fitted by alpha_req: behind the first few directions, before the noise of the last ones
PERMUTATIONS = 20
MADS = 10  # above the median, for an outlier; 10 MAD of normally distributed norms are 6.7 standard deviations
BINS = 40


def rankme(X: Float[Tensor, "n d"]) -> float:
    """exp(-sum p log p) with p = sigma / sum sigma + 1e-7 over the singular values of X, not centred (Garrido et al. 2023, eq. 1).

    At most min(n, d), but for the 1e-7; comparable at equal n and d only."""
    sigma = _eigenvalues(X).sqrt()
    p = sigma / sigma.sum() + 1e-7
    return float((-p * p.log()).sum().exp())


def alpha_req(X: Float[Tensor, "n d"], ranks: tuple[int, int] = RANKS) -> dict[str, Any] | None:
    """alpha of eigenvalue ~ rank^-alpha: the negative slope, by least squares, of log-eigenvalues of the covariance over log-rank
    (Agrawal et al. 2022, section 3).

    `ranks` are the first and the last fitted, from 1; the last is cut to the covariance's rank, and the range used is given back:
    {alpha, first, last}. None where fewer than three are left. Comparable at equal n, d and range only."""
    eigenvalues = _eigenvalues(X - X.mean(dim=0))
    # features are float32: smaller ones are its rounding
    rank = int((eigenvalues > eigenvalues[0] * torch.finfo(torch.float32).eps ** 2).sum())
    first, last = ranks[0], min(ranks[1], rank)
    if last < first + 2:
        return None
    k = np.arange(first, last + 1)
    slope = np.polyfit(np.log(k), np.log(eigenvalues[first - 1 : last].cpu().numpy()), deg=1)[0]
    return {"alpha": float(-slope), "first": first, "last": last}


def _eigenvalues(X: Float[Tensor, "n d"]) -> Float[Tensor, " k"]:
    """Squared singular values of X, largest first; k = min(n, d)."""
    X = X.double()
    X = X if len(X) >= X.shape[1] else X.T
    eigenvalues: Tensor = torch.linalg.eigvalsh(X.T @ X).flip(0).clamp(min=0)
    return eigenvalues


def cka_table(features: Mapping[str, Float[Tensor, "n _"]], permutations: int = PERMUTATIONS, seed: int = 0) -> list[dict[str, Any]]:
    """Debiased linear CKA of each pair of readouts: {a, b, cka, null_mean, null_p95}.

    HSIC_1, the unbiased estimator of Song et al. 2012 (eq. 5), in CKA as in Nguyen et al. 2021 (section 2). The null are its values
    with the images of b in another order, mean and 95th percentile over `permutations`. cka and null are None where a readout is the
    same for all images. UsageError for fewer than 4 images."""
    n = len(next(iter(features.values())))
    if n < 4:
        raise UsageError(f"debiased CKA got {n} images; give at least 4")
    kernels = torch.stack([_u_centred(X) for X in features.values()])
    flat = kernels.flatten(1)
    scale = flat.norm(dim=1).outer(flat.norm(dim=1))
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(n), *(torch.randperm(n, generator=generator) for _ in range(permutations))]
    shuffled = (kernels[:, order][:, :, order].flatten(1) for order in (order.to(kernels.device) for order in orders))
    own, *null = torch.stack([flat @ other.T / scale for other in shuffled]).cpu().numpy()
    mean, p95 = np.mean(null, axis=0), np.percentile(null, 95, axis=0)
    known = {"cka": own, "null_mean": mean, "null_p95": p95}
    return [
        {"a": a, "b": b, **{key: float(of[i, j]) if scale[i, j] else None for key, of in known.items()}}
        for (i, a), (j, b) in combinations(enumerate(features), 2)
    ]


def _u_centred(X: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """The linear kernel of X, such that HSIC_1 of two is the sum of their products over n (n - 3) (Szekely and Rizzo 2014)."""
    n = len(X)
    X = X.double()
    X = X - X.mean(dim=0)  # changes nothing but the rounding
    kernel = (X @ X.T).fill_diagonal_(0)
    rows = kernel.sum(dim=1) / (n - 2)
    kernel = kernel - rows[:, None] - rows + rows.sum() / (n - 1)
    return kernel.fill_diagonal_(0)


def norm_histograms(norms: Mapping[str, Float[Tensor, "b k"]]) -> dict[str, Any]:
    """Distributions of token norms by kind of token, over one set of logarithmic bins: {edges, KIND: {...}}.

    Of each: count, median, mad, threshold = median + `MADS` * MAD, outliers (the fraction above it), histogram (counts), bimodality;
    None for a kind without tokens."""
    arrays = {kind: values.flatten().double().cpu().numpy() for kind, values in norms.items()}
    together = np.concatenate(list(arrays.values()))
    low = max(float(together.min()), 1e-12)
    edges = np.geomspace(low, max(float(together.max()), low * 1.01), BINS + 1)
    result: dict[str, Any] = {"edges": edges.tolist()}
    for kind, values in arrays.items():
        if len(values) == 0:
            result[kind] = None
            continue
        median = float(np.median(values))
        mad = float(np.median(np.abs(values - median)))
        threshold = median + MADS * mad
        result[kind] = {
            "count": len(values),
            "median": median,
            "mad": mad,
            "threshold": threshold,
            "outliers": float(np.mean(values > threshold)),
            "histogram": np.histogram(values.clip(edges[0], edges[-1]), edges)[0].tolist(),
            "bimodality": bimodality(values),
        }
    return result


def bimodality(values: Float[np.ndarray, " n"]) -> float | None:
    """Sarle's coefficient (g^2 + 1) / (k + 3 (n - 1)^2 / ((n - 2) (n - 3))), g and k the bias-corrected skewness and excess kurtosis.

    5/9 for a uniform distribution, 1/3 for a normal one, 1 for two points; a long tail raises it too. None where values are constant
    or fewer than 4."""
    n = len(values)
    if n < 4 or np.ptp(values) <= 1e-6 * np.abs(values).max():
        return None
    g, k = skew(values, bias=False), kurtosis(values, bias=False)
    return float((g**2 + 1) / (k + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))))


def redundancy(lp_ab: float, lp_a: float, lp_b: float) -> float:
    """LP(A + B concatenated) - max(LP(A), LP(B)), in the unit of the accuracies; near 0: one holds what the other does.

    lp_a is that of A beside B of other images (`--controls width`), lp_b of B beside A: three probes of one width. Of A and B alone, the
    concatenation could also be better because it is wider."""
    return lp_ab - max(lp_a, lp_b)

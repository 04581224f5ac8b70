"""Linear probe: multinomial logistic regression by L-BFGS on standardised features, and the choice of its C on a slice of train."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor

from ssl_vit.errors import UsageError
from ssl_vit_eval.memory import place_for
from ssl_vit_eval.probes.base import Probe, check_training
from ssl_vit_eval.probes.selection import Found, check_slice, choose, record

_ROWS = 4096  # rows a block, so that the logits stay in the cache and memory does not grow with the classes
_CONSTANT = 1e-6  # a spread below this share of the mean is the rounding of float32, not a feature


class LinearProbe(Probe):
    """Multinomial logistic regression in scikit-learn manners: `fit(X, y)`, `predict`, `predict_proba`, `score`.

    Minimises `C * (sum of cross-entropies) + ||W||^2 / 2` over W [d c] and an unpenalised intercept, on features standardised
    by the mean and the (biased) standard deviation of the training rows; a constant feature keeps std 1. From three classes on
    this is `make_pipeline(StandardScaler(), LogisticRegression(C=C))`. For two classes scikit-learn fits one vector where the
    multinomial model has two, so that its `C` is twice ours.

    Args:
        C: inverse strength of the L2 penalty.
        max_iter: the most L-BFGS iterations; `converged_` is False when they did not suffice.
        tol: the fit ends when no entry of the (preconditioned) gradient of the mean loss exceeds it. At 1e-5, probabilities
            are within about 5e-4 of the exact minimum's.

    After `fit`: `coef_ [c d]` and `intercept_ [c]`, for standardised features; `mean_` and `scale_ [d]`, `classes_ [c]`, `n_iter_`,
    `converged_`.
    """

    coef_: Float64[Tensor, "c d"]
    intercept_: Float64[Tensor, " c"]
    mean_: Float64[Tensor, " d"]
    scale_: Float64[Tensor, " d"]
    n_iter_: int
    converged_: bool

    def __init__(self, C: float = 1.0, max_iter: int = 1000, tol: float = 1e-5) -> None:
        self.C = C
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, X: Float[Tensor, "n d"], y: Int64[Tensor, " n"]) -> "LinearProbe":
        """Fit on features [n d] and class indices [n]; UsageError for non-finite features, an empty set or a single class."""
        vars(self).update(vars(fit_path(X, y, [self.C], self.max_iter, self.tol)[0]))
        return self

    def predict_proba(self, X: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
        """Softmax probabilities in float64, columns in the order of `classes_`; UsageError where `X` does not fit the fitted probe."""
        self.check_query(X)
        logits = [(x.to(self.mean_) - self.mean_) / self.scale_ @ self.coef_.T + self.intercept_ for x in torch.split(X, _ROWS)]
        return torch.cat(logits).softmax(dim=1)


def fit_path(
    X: Float[Tensor, "n d"],
    y: Int64[Tensor, " n"],
    grid: Sequence[float],
    max_iter: int,
    tol: float,
    near: Sequence[LinearProbe] = (),
) -> list[LinearProbe]:
    """One fitted LinearProbe for each C of `grid`, in the grid's order, each started from the solution of the next smaller C.

    near: fits of similar rows for the same grid, to start from instead; the problem is convex, so they change the time, not the result.

    What makes it fast is the coordinates. On the principal axes of the standardised features the Hessian of the mean
    cross-entropy is close to `variance_i / c` (exactly so, up to the constraint over classes, for uniform predictions), so that
    dividing axis i by `sqrt(variance_i / c + 1 / (C n))` makes the problem nearly round: L-BFGS then takes tens of iterations
    where the raw features take hundreds. The minimum stays where it was: a rotation keeps `||W||`, and the penalty is taken
    on W itself. All in float64, because a float32 loss stalls the line search near the minimum. UsageError as `LinearProbe.fit`.
    """
    if len(grid) == 0 or min(grid) <= 0:
        raise UsageError(f"the grid of C is {list(grid)}: give at least one value, all above 0")
    check_training(X, y)
    classes, targets = torch.unique(y.to(X.device), return_inverse=True)
    n, d, c = *X.shape, len(classes)
    Z = X.double()
    mean, std = Z.mean(dim=0), Z.std(dim=0, correction=0)
    scale = torch.where(std > _CONSTANT * mean.abs(), std, 1.0)
    Z = (Z - mean).div_(scale)
    variances, axes = torch.linalg.eigh(Z.T @ Z / n)
    # the intercept is the weight of a column of ones, which has variance 1 here and is orthogonal to the centred features
    Z = torch.cat([torch.ones_like(Z[:, :1]), Z @ axes], dim=1)
    variances = torch.cat([torch.ones_like(variances[:1]), variances.clamp(min=0)])
    penalised = torch.ones_like(variances).index_fill(0, torch.zeros(1, dtype=torch.int64, device=X.device), 0)[:, None]

    probes = {}
    W = Z.new_zeros(d + 1, c)
    for C in sorted(grid):
        penalty = penalised / (C * n)
        precondition = (variances[:, None] / c + penalty).rsqrt()

        def objective(flat: np.ndarray, penalty: Tensor = penalty, precondition: Tensor = precondition) -> tuple[float, np.ndarray]:
            W = precondition * torch.from_numpy(flat).to(X.device).view(d + 1, c)
            loss, gradient = cross_entropy(Z, targets, W)
            loss = loss + (penalty * W.square()).sum() / 2
            return loss.item(), (precondition * (gradient + penalty * W)).flatten().cpu().numpy()

        if known := [probe for probe in near if probe.C == C and torch.equal(probe.classes_, classes)]:
            raw = known[0].coef_ / known[0].scale_
            W = torch.cat([(known[0].intercept_ + raw @ (mean - known[0].mean_))[None], axes.T @ (raw * scale).T])
        start = (W / precondition).flatten().cpu().numpy()
        options = {"maxiter": max_iter, "maxfun": 10 * max_iter, "gtol": tol, "ftol": 0.0, "maxls": 50}
        with threadpool_limits(1, "blas"):  # scipy's own BLAS threads and torch's, in turn, wait for each other: 10 times the time
            found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
        W = precondition * torch.from_numpy(found.x).to(X.device).view(d + 1, c)

        probe = probes[C] = LinearProbe(C, max_iter, tol)
        probe.coef_, probe.intercept_ = (axes @ W[1:]).T, W[0]
        probe.mean_, probe.scale_, probe.classes_, probe.n_features_in_ = mean, scale, classes, d
        probe.n_iter_, probe.converged_ = int(found.nit), bool(np.abs(found.jac).max() <= tol)
    return [probes[C] for C in grid]


def cross_entropy(
    Z: Float64[Tensor, "n d"], targets: Int64[Tensor, " n"], W: Float64[Tensor, "d c"]
) -> tuple[Float64[Tensor, ""], Float64[Tensor, "d c"]]:
    """Mean cross-entropy of softmax(Z W) and its gradient in W."""
    loss = Z.new_zeros(())
    gradient = torch.zeros_like(W)
    weights = W.T.contiguous()
    for z, target in zip(torch.split(Z, _ROWS), torch.split(targets, _ROWS), strict=True):
        # classes first: with few of them a softmax down the columns is vectorised, one along the rows is not
        logp = (weights @ z.T).log_softmax(dim=0)
        loss -= logp.gather(0, target[None]).sum()
        residual = logp.exp_().scatter_add_(0, target[None], torch.full_like(logp[:1], -1.0))
        gradient += (residual @ z).T
    return loss / len(Z), gradient / len(Z)


PARAMETERS: dict[str, type] = {"C": list, "max_iter": int, "tol": float, "slice_fraction": float, "slice_seed": int}


def run(
    parameters: Mapping[str, Any],
    train: Mapping[str, Float[Tensor, "n _"]],
    y_train: Int64[Tensor, " n"],
    test: Mapping[str, Float[Tensor, "m _"]],
    y_test: Int64[Tensor, " m"],
    held_out: Bool[Tensor, " n"],
) -> dict[str, Found]:
    """The protocol kind `logreg`: `select_and_fit` for every readout."""
    p = parameters
    return {
        spec: select_and_fit(X, y_train, test[spec], y_test, p["C"], held_out, p["max_iter"], p["tol"], f"readout {spec!r}: ")
        for spec, X in train.items()
    }


def memory(n: int, d: int) -> int:
    """Bytes that a fit on n rows of d features takes: the rows themselves, and three times in float64."""
    return (3 * 8 + 4) * n * d


def select_and_fit(
    X: Float[Tensor, "n d"],
    y: Int64[Tensor, " n"],
    X_test: Float[Tensor, "m d"],
    y_test: Int64[Tensor, " m"],
    grid: Sequence[float],
    held_out: Bool[Tensor, " n"],
    max_iter: int = 1000,
    tol: float = 1e-5,
    what: str = "",
) -> Found:
    """Choose C on the slice of train marked by `held_out`, freeze it, refit the grid on all of train and score it on test once.

    Of equally good C the smaller one is chosen. UsageError for a slice that is empty or all of train, and as `LinearProbe.fit`;
    Failure for features that do not fit into memory three times in float64; `what` stands before the message.
    """
    check_slice(held_out)
    on = place_for(memory(*X.shape), f"{what}logistic regression", "use the protocol linear, which reads features batch by batch")
    X = X.to(on)
    axes, y_test = {"C": sorted(grid)}, y_test.to(X.device)
    held_out, y = held_out.to(X.device), y.to(X.device)
    try:
        without_slice = fit_path(X[~held_out], y[~held_out], axes["C"], max_iter, tol)
        slice_accuracy = [probe.score(X[held_out], y[held_out]) for probe in without_slice]
        probes = fit_path(X, y, axes["C"], max_iter, tol, near=without_slice)
        predictions = [probe.predict(X_test) for probe in probes]
    except UsageError as error:
        raise UsageError(f"{what}{error}") from error
    test_accuracy = [(answer == y_test).double().mean().item() for answer in predictions]
    choice = choose(axes, slice_accuracy)
    probe = probes[choice.place]
    return Found(
        predictions[choice.place].cpu(),
        selected={**choice.settings, "n_iter": probe.n_iter_, "converged": probe.converged_},
        grid=record(axes, slice_accuracy, test_accuracy),
        edge_of_grid=choice.edge,
        oracle=max(test_accuracy),
        parameters=probe.coef_.numel() + probe.intercept_.numel(),
    )

"""Linear probe: multinomial logistic regression by L-BFGS on standardised features, and the choice of its C on a slice of train."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy.optimize import OptimizeResult, minimize
from threadpoolctl import threadpool_limits
from torch import Tensor

from ssl_vit.errors import require
from ssl_vit_eval.memory import place_for
from ssl_vit_eval.probes.base import Probe, check_readouts, check_training, moments, progress
from ssl_vit_eval.probes.selection import SLICE, Answers, Found, select
from ssl_vit_eval.schema import Count, NotNegative, Positives

_ROWS = 4096  # rows a block, so that the logits stay in the cache and memory does not grow with the classes
_RESTART = 200  # iterations, after which the scaling is chosen anew
_WHOLE = 4000  # weights, up to which the scaling may use the whole Hessian, here of 128 MB
_SAMPLE = 8192  # rows of train that this Hessian is computed on
_FLAT = 1e-13  # a share of the largest variance: below it, rounding
_ROUNDING = 1e-7  # a scaled gradient whose square, what the loss still falls by, is float64's rounding of the loss


class LinearProbe(Probe):
    """Multinomial logistic regression in scikit-learn manners: `fit(X, y)`, `predict`, `predict_proba`, `score`.

    Minimises `C * (sum of cross-entropies) + ||W||^2 / 2` over W [d c] and an unpenalised intercept, on features standardised
    by the mean and the (biased) standard deviation of the training rows; a constant feature keeps std 1. From three classes on
    this is `make_pipeline(StandardScaler(), LogisticRegression(C=C))`. For two classes scikit-learn fits one vector where the
    multinomial model has two, so that its `C` is twice ours.

    Args:
        C: inverse strength of the L2 penalty.
        max_iter: the most L-BFGS iterations; `converged_` is False when they did not suffice.
        tol: the fit ends when the gradient's norm is at most this share of the penalty's part in it (both scaled). At the minimum
            that part balances the data's, so that the share means the same for every C: at 1e-3, about 1 of 1000 answers differs from
            those of the exact minimum. It also ends where the loss falls by less than float64 shows, which comes first where C is large.

    After `fit`: `coef_ [c d]` and `intercept_ [c]`, for standardised features; `mean_` and `scale_ [d]`, `classes_ [c]`, `n_iter_`,
    `converged_`.
    """

    coef_: Float64[Tensor, "c d"]
    intercept_: Float64[Tensor, " c"]
    mean_: Float64[Tensor, " d"]
    scale_: Float64[Tensor, " d"]
    n_iter_: int
    converged_: bool

    def __init__(self, C: float = 1.0, max_iter: int = 1000, tol: float = 1e-3) -> None:
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

    What makes it fast is the scaling. On the principal axes of the standardised features the Hessian is close to diagonal. Dividing each
    weight by the root of that diagonal makes the problem nearly round, so that L-BFGS takes tens of iterations where the raw features take
    hundreds. Where that does not suffice (strongly correlated classes, large C) and the Hessian is small, its Cholesky factor takes the
    diagonal's place. The minimum stays where it was: a rotation keeps `||W||`, and the penalty is taken on W itself. All in float64,
    because a float32 loss stalls the line search near the minimum.
    UsageError as `LinearProbe.fit`.
    """
    require(min(grid, default=0.0) > 0, "C", list(grid), "above 0")
    check_training(X, y)
    classes, targets = torch.unique(y.to(X.device), return_inverse=True)
    mean, scale = moments(X)
    Z = (X.double() - mean).div_(scale)
    variances, axes = torch.linalg.eigh(Z.T @ Z / len(Z))
    axes = axes[:, variances > _FLAT * variances.max()]  # on the other axes nothing varies, and the weights of the minimum are 0
    # the intercept is the weight of a column of ones, which is orthogonal to the centred features
    Z = torch.cat([torch.ones_like(Z[:, :1]), Z @ axes], dim=1)
    W = Z.new_zeros(Z.shape[1], len(classes))
    probes = {}
    for C in progress(sorted(grid), "logistic regression, values of C"):
        if known := [probe for probe in near if probe.C == C and torch.equal(probe.classes_, classes)]:
            raw = known[0].coef_ / known[0].scale_
            W = torch.cat([(known[0].intercept_ + raw @ (mean - known[0].mean_))[None], axes.T @ (raw * scale).T])
        probe = probes[C] = LinearProbe(C, max_iter, tol)
        W, probe.n_iter_, probe.converged_ = _minimum(Z, targets, W, C, max_iter, tol)
        probe.coef_, probe.intercept_ = (axes @ W[1:]).T, W[0]
        probe.mean_, probe.scale_, probe.classes_, probe.n_features_in_ = mean, scale, classes, X.shape[1]
    return [probes[C] for C in grid]


def _minimum(
    Z: Float64[Tensor, "n d"], targets: Int64[Tensor, " n"], W: Float64[Tensor, "d c"], C: float, max_iter: int, tol: float
) -> tuple[Float64[Tensor, "d c"], int, bool]:
    """The weights, from W on, after how many iterations, and whether they converged. The first column of Z is not penalised."""
    penalty = torch.full_like(W[:, :1], 1 / (C * len(Z)))
    penalty[0] = 0
    n_iter, converged, stalled = 0, False, 0
    # the whole Hessian takes the time of about so many iterations, measured on one core: by then it is worth it
    patience = max(20, W.numel() * min(len(Z), _SAMPLE) // (20 * len(Z)))

    while not converged and n_iter < max_iter and stalled < 2:
        small = W.numel() <= _WHOLE
        scaling = Scaling(Z, W, penalty, whole=small and (n_iter >= patience or stalled > 0))

        def objective(flat: np.ndarray, scaling: Scaling = scaling) -> tuple[float, np.ndarray]:
            nonlocal converged
            W = scaling.weights(torch.from_numpy(flat).to(Z.device))
            loss, gradient = cross_entropy(Z, targets, W)
            pull = penalty * W
            gradient = scaling.gradient(gradient + pull)
            converged = bool(gradient.norm() <= max(tol * scaling.gradient(pull).norm().item(), _ROUNDING))
            return (loss + (pull * W).sum() / 2).item(), gradient.cpu().numpy()

        def stop(intermediate_result: OptimizeResult) -> None:
            if converged:  # at the point that the iteration ended with, which was evaluated last
                raise StopIteration

        limit = min(patience if small and n_iter < patience else _RESTART, max_iter - n_iter)
        options = {"maxiter": limit, "maxfun": 10 * max_iter, "gtol": 0.0, "ftol": 0.0, "maxls": 50, "maxcor": 30}
        with threadpool_limits(1, "blas"):  # scipy's own BLAS threads and torch's, in turn, wait for each other: 10 times the time
            start = scaling.coordinates(W).cpu().numpy()
            found = minimize(objective, start, jac=True, method="L-BFGS-B", callback=stop, options=options)
        objective(found.x)
        W, n_iter = scaling.weights(torch.from_numpy(found.x).to(Z.device)), n_iter + int(found.nit)
        stalled += found.nit < limit  # with another scaling it may go on, once
    return W, n_iter, converged


class Scaling:
    """Coordinates u [w = d c] of the weights W [d c] in which the Hessian at W is close to the identity: W = F u, with F' H F = 1.

    F is the inverse of H's Cholesky factor if `whole`, of the root of H's diagonal otherwise.
    """

    def __init__(self, Z: Float64[Tensor, "n d"], W: Float64[Tensor, "d c"], penalty: Float64[Tensor, "d 1"], whole: bool) -> None:
        self.shape, self.whole = W.shape, whole
        self.factor: Tensor
        if self.whole:
            H = hessian(Z[:: max(1, len(Z) // _SAMPLE)], W)
            H.diagonal().add_(penalty.expand_as(W).flatten() + 1e-12)
            self.factor = torch.linalg.cholesky(H)
        else:
            self.factor = (curvature(Z, W) + penalty).clamp(min=1e-12).sqrt().flatten()

    def coordinates(self, W: Float64[Tensor, "d c"]) -> Float64[Tensor, " w"]:
        return self.factor.T @ W.flatten() if self.whole else self.factor * W.flatten()

    def weights(self, u: Float64[Tensor, " w"]) -> Float64[Tensor, "d c"]:
        W = torch.linalg.solve_triangular(self.factor.T, u[:, None], upper=True) if self.whole else u / self.factor
        return W.view(self.shape)

    def gradient(self, G: Float64[Tensor, "d c"]) -> Float64[Tensor, " w"]:
        """The gradient in u of what has the gradient G in W."""
        g = G.flatten()
        return (torch.linalg.solve_triangular(self.factor, g[:, None], upper=False) if self.whole else g / self.factor).flatten()


def hessian(Z: Float64[Tensor, "n d"], W: Float64[Tensor, "d c"]) -> Float64[Tensor, "w w"]:
    """The Hessian of the mean cross-entropy in the flattened W [d c]. Where all intercepts move together it would be 0, and is 1."""
    d, c = W.shape
    total = Z.new_zeros(c, c, d, d)
    for z in torch.split(Z, _ROWS):
        p = (z @ W).softmax(dim=1)
        for i in range(c):  # the blocks of class i and of those from i on
            weights = -p[:, i : i + 1] * p[:, i:]
            weights[:, 0] += p[:, i]
            total[i, i:] += (z.T @ (weights[:, :, None] * z[:, None]).flatten(1)).view(d, c - i, d).transpose(0, 1)
    for i in range(c):
        total[i + 1 :, i] = total[i, i + 1 :]
    total /= len(Z)
    total[:, :, 0, 0] += 1 / c
    return total.permute(2, 0, 3, 1).reshape(d * c, d * c)


def curvature(Z: Float64[Tensor, "n d"], W: Float64[Tensor, "d c"]) -> Float64[Tensor, "d c"]:
    """The diagonal of the Hessian of the mean cross-entropy in W."""
    total = torch.zeros_like(W)
    for z in torch.split(Z, _ROWS):
        p = (z @ W).softmax(dim=1)
        total += z.square().T @ (p * (1 - p))
    return total / len(Z)


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


PARAMETERS: dict[str, Any] = {"C": Positives, "max_iter": Count, "tol": NotNegative, **SLICE}


def run(
    parameters: Mapping[str, Any],
    train: Mapping[str, Float[Tensor, "n _"]],
    y_train: Int64[Tensor, " n"],
    test: Mapping[str, Float[Tensor, "m _"]],
    y_test: Int64[Tensor, " m"],
    held_out: Bool[Tensor, " n"],
) -> dict[str, Found]:
    """The protocol kind `logreg`: `select_and_fit` for every readout."""
    check_readouts(train, y_train, test)
    p, found = parameters, {}
    for spec, X in train.items():
        advice = "use the protocol linear, which reads features batch by batch"
        X = X.to(place_for(memory(*X.shape), f"readout {spec!r}: logistic regression", advice))
        found[spec] = select_and_fit(X, y_train, test[spec], y_test, p["C"], [held_out], p["max_iter"], p["tol"])
    return found


def memory(n: int, d: int) -> int:
    """Bytes that a fit on n rows of d features takes: the rows themselves, three times in float64, and the whole Hessian."""
    return (3 * 8 + 4) * n * d + 4 * 8 * _WHOLE**2


def select_and_fit(
    X: Float[Tensor, "n d"],
    y: Int64[Tensor, " n"],
    X_test: Float[Tensor, "m d"],
    y_test: Int64[Tensor, " m"],
    grid: Sequence[float],
    held_out: Sequence[Bool[Tensor, " n"]],
    max_iter: int = 1000,
    tol: float = 1e-3,
) -> Found:
    """`selection.select` for one readout; of equally good C the smaller one is chosen. UsageError as there and as `LinearProbe.fit`."""
    splits, last = {"train": X, "test": X_test}, list[LinearProbe]()

    def fit(rows: Int64[Tensor, " k"], split: str, asked: Int64[Tensor, " q"]) -> dict[str, Answers]:
        some, labels = (X, y) if len(rows) == len(X) else (X[rows.to(X.device)], y[rows.to(y.device)])
        probes = fit_path(some, labels, axes["C"], max_iter, tol, near=last)
        last[:] = probes
        queries = splits[split][asked.to(splits[split].device)]
        predictions = torch.stack([probe.predict(queries).cpu() for probe in probes])
        details = [{"n_iter": probe.n_iter_, "converged": probe.converged_} for probe in probes]
        parameters = probes[0].coef_.numel() + probes[0].intercept_.numel()
        alive, converged = torch.ones(len(probes), dtype=torch.bool), [probe.converged_ for probe in probes]
        return {"": Answers(predictions[:, :, None], alive, details, converged, parameters)}

    axes = {"C": sorted(grid)}
    return select(axes, fit, y, y_test, held_out)[""]

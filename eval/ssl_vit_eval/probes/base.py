"""What every probe asks of its features and labels: checks that name the offending row, standardisation, scikit-learn's way of scoring."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from tqdm import tqdm

from ssl_vit.errors import UsageError, require
from ssl_vit_eval.distributed import rank

T = TypeVar("T")

_ROWS = 65536  # at once: features may be mapped from disk
_PART = 4096
_CONSTANT = 1e-6  # a spread below this share of the mean is the rounding of float32, not a feature


def check_features(X: Tensor) -> None:
    """Raise UsageError unless `X` is a non-empty floating matrix [n d] of finite numbers; the first bad row is named."""
    require(isinstance(X, Tensor), "X", type(X).__name__, "a tensor [n d] of features; torch.as_tensor makes one of an array")
    if X.ndim != 2 or X.numel() == 0:
        raise UsageError(f"features have shape {list(X.shape)}: a probe needs a non-empty matrix [n d]")
    if not X.is_floating_point():
        raise UsageError(f"features are {X.dtype}: a probe needs floating-point features, convert them with .float()")
    bad = torch.cat([~rows.isfinite().all(dim=1) for rows in torch.split(X, _ROWS)]).nonzero()
    if len(bad):
        raise UsageError(f"features of row {bad[0].item()} are not finite ({len(bad)} of {len(X)} rows): remove or recompute these images")


def check_training(X: Tensor, y: Tensor) -> None:
    """Raise UsageError unless features [n d] and integer labels [n] can train a probe: equal lengths, at least two classes."""
    check_features(X)
    require(isinstance(y, Tensor), "y", type(y).__name__, "a tensor [n] of class indices; torch.as_tensor makes one of an array")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UsageError(f"labels are {y.dtype}: a probe needs integer class indices")
    if y.shape != (len(X),):
        raise UsageError(f"{len(X)} feature rows came with labels of shape {list(y.shape)}: give one label for each row")
    class_targets(y)


def check_readouts(train: Mapping[str, Tensor], y: Tensor, test: Mapping[str, Tensor]) -> None:
    """`check_training` and `check_features` for every readout, which the UsageError names; both splits must be equally wide."""
    for spec, X in train.items():
        split = "train"
        try:
            check_training(X, y)
            split = "test"
            check_features(test[spec])
            if test[spec].shape[1] != X.shape[1]:
                raise UsageError(f"features are {test[spec].shape[1]} wide, {X.shape[1]} in train: read both in the same way")
        except UsageError as error:
            raise UsageError(f"readout {spec!r}: in {split}, {error}") from error


def class_targets(y: Int64[Tensor, " n"]) -> tuple[Int64[Tensor, " c"], Int64[Tensor, " n"]]:
    """The classes and each label's place among them; UsageError for fewer than two."""
    classes, targets = torch.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise UsageError(f"all {len(y)} training labels are {y[0].item()}: a probe needs at least two classes")
    return classes, targets


def moments(X: Float[Tensor, "n d"], rows: Int64[Tensor, " k"] | None = None) -> tuple[Float64[Tensor, " d"], Float64[Tensor, " d"]]:
    """Mean and (biased) standard deviation of these rows, or all, in float64: features are standardised as (x - mean) / deviation.

    A feature that is constant, but for the rounding of float32, has 1. The rows are read once, part by part."""
    rows = torch.arange(len(X), device=X.device) if rows is None else rows.to(X.device)
    origin = X[rows[0]].double()  # around one of the rows, so that a mean far from 0 does not cancel the spread
    first, second = torch.zeros_like(origin), torch.zeros_like(origin)
    for part in torch.split(rows, _PART):
        x = X[part].double() - origin
        first += x.sum(dim=0) / len(rows)
        second += x.square().sum(dim=0) / len(rows)
    mean, std = origin + first, (second - first.square()).clamp(min=0).sqrt()
    return mean, torch.where(std > _CONSTANT * mean.abs(), std, 1.0)


def seeds_of(parameters: Mapping[str, Any]) -> tuple[int, ...]:
    """The seeds of a protocol's replicates, which differ in first weights and in the order of the batches; without `probe_seeds`, one."""
    return tuple(range(parameters["seed"], parameters["seed"] + parameters.get("probe_seeds", 1)))


def progress(steps: Iterable[T], title: str) -> Iterable[T]:
    """The steps, with a bar on stderr if they last longer than a second and that is a terminal; of several processes the first shows it."""
    bar: Iterable[T] = tqdm(steps, title, leave=False, delay=1, disable=True if rank() else None)
    return bar


class Probe(ABC):
    """`predict` and `score` for a probe that sets `classes_` and `n_features_in_` in `fit` and defines `predict_proba`."""

    classes_: Int64[Tensor, " c"]
    n_features_in_: int

    def check_query(self, X: Tensor) -> None:
        """Raise UsageError unless `X` is a matrix that the fitted probe can read: finite, and as wide as the training features."""
        if not hasattr(self, "n_features_in_"):
            raise UsageError(f"this {type(self).__name__} is not fitted: call fit(X, y) first")
        check_features(X)
        if X.shape[1] != self.n_features_in_:
            raise UsageError(
                f"features are {X.shape[1]} wide, the probe was fitted on {self.n_features_in_}: read both with the same readout"
            )

    @abstractmethod
    def predict_proba(self, X: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
        """Class probabilities, columns in the order of `classes_`."""

    def predict(self, X: Float[Tensor, "m d"]) -> Int64[Tensor, " m"]:
        """The class index of each row; of equal probabilities the lower class wins."""
        best = self.predict_proba(X).argmax(dim=1)
        return self.classes_[best]

    def score(self, X: Float[Tensor, "m d"], y: Int64[Tensor, " m"]) -> float:
        """Top-1 accuracy in [0, 1]."""
        predicted = self.predict(X)
        fits = isinstance(y, Tensor) and y.shape == predicted.shape
        require(fits, "y", getattr(y, "shape", type(y).__name__), f"a tensor [{len(predicted)}] of class indices, one for each row of X")
        return (predicted == y.to(predicted.device)).double().mean().item()

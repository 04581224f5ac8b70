"""What every probe asks of its features and labels: checks that name the offending row, and the scikit-learn manner of scoring."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_vit.errors import UsageError

_ROWS = 65536  # at once: features may be mapped from disk


def check_features(X: Tensor) -> None:
    """Raise UsageError unless `X` is a non-empty floating matrix [n d] of finite numbers; the first bad row is named."""
    if X.ndim != 2 or X.numel() == 0:
        raise UsageError(f"features have shape {list(X.shape)}: a probe needs a non-empty matrix [images, width]")
    if not X.is_floating_point():
        raise UsageError(f"features are {X.dtype}: a probe needs floating-point features, convert them with .float()")
    bad = torch.cat([~rows.isfinite().all(dim=1) for rows in torch.split(X, _ROWS)]).nonzero()
    if len(bad):
        raise UsageError(f"features of row {bad[0].item()} are not finite ({len(bad)} of {len(X)} rows): remove or recompute these images")


def check_training(X: Tensor, y: Tensor) -> None:
    """Raise UsageError unless features [n d] and integer labels [n] can train a probe: equal lengths, at least two classes."""
    check_features(X)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UsageError(f"labels are {y.dtype}: a probe needs integer class indices")
    if y.shape != (len(X),):
        raise UsageError(f"{len(X)} feature rows came with labels of shape {list(y.shape)}: give one label for each row")
    if (y == y[0]).all():
        raise UsageError(f"all {len(y)} training labels are {y[0].item()}: a probe needs at least two classes")


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
        return (self.predict(X) == y.to(X.device)).double().mean().item()

"""Controls: what shuffling and projecting do, and what they must leave alone."""

import pytest
import torch

from ssl_vit.errors import UsageError
from ssl_vit_eval.controls import SHUFFLED, check_controls, controls_of, projected, shuffled


def test_shuffled_labels_are_the_same_labels_elsewhere() -> None:
    y = torch.arange(1000) % 7
    other = shuffled(y)
    assert torch.equal(torch.bincount(other), torch.bincount(y))
    assert 0.1 < (other == y).double().mean() < 0.19  # 1 / 7 by chance
    assert torch.equal(other, shuffled(y))


def test_a_projection_is_orthonormal_and_the_same_for_all() -> None:
    basis = projected(torch.eye(48, dtype=torch.float64), 16)  # the matrix itself
    torch.testing.assert_close(basis.T @ basis, torch.eye(16, dtype=torch.float64))
    X = torch.randn(20_000, 48)
    torch.testing.assert_close(projected(X, 16), X @ basis.float(), rtol=1e-5, atol=1e-5)
    # distances shrink by sqrt(16 / 48) on average, none of them to nothing
    ratio = (projected(X[:300], 16) - projected(X[300:600], 16)).norm(dim=1) / (X[:300] - X[300:600]).norm(dim=1)
    assert abs(ratio.square().mean().item() - 1 / 3) < 0.03


def test_only_wide_readouts_are_projected() -> None:
    assert controls_of([], 384, 192) == [""]
    assert controls_of(["width", "shuffled"], 192, 192) == ["", SHUFFLED]
    assert controls_of(["width"], 384, 192) == ["", "projected to 192"]
    with pytest.raises(UsageError, match="unknown control 'shufled'; did you mean 'shuffled'"):
        check_controls(["width", "shufled"])

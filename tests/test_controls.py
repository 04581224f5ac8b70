"""Controls: what shuffling labels and columns does, and what the control of width says of a useless half and of a useful one."""

import pytest
import torch

from ssl_vit.errors import UsageError
from ssl_vit_eval.controls import BESIDE, SHUFFLED, check_controls, controlled, controls_of, shuffled
from ssl_vit_eval.probes.logreg import select_and_fit
from ssl_vit_eval.probes.selection import stratified_slice


def test_shuffled_labels_are_the_same_labels_elsewhere() -> None:
    y = torch.arange(1000) % 7
    other = shuffled(y)
    assert torch.equal(torch.bincount(other), torch.bincount(y))
    assert 0.1 < (other == y).double().mean() < 0.19  # 1 / 7 by chance
    assert torch.equal(other, shuffled(y))


def test_only_what_is_kept_stays_at_its_image() -> None:
    X = torch.arange(1000)[:, None] + 1000.0 * torch.arange(10)  # five parts of two columns: cls at four blocks, gap
    for kept, columns in (("gap", [8, 9]), ("cls@last4", list(range(8)))):
        Z = controlled(X, "cls@last4+gap", kept + BESIDE)
        others = [column for column in range(10) if column not in columns]
        assert torch.equal(Z[:, columns], X[:, columns])
        assert (Z[:, others] == X[:, others]).double().mean() < 0.01
        assert torch.equal(Z[:, others].sort(dim=0).values, X[:, others])
        assert (Z[:, others] % 1000 == Z[:, others[:1]] % 1000).all()  # all of one other image
    assert torch.equal(controlled(X, "cls@last5", "cls" + BESIDE)[:, 8:], X[:, 8:])
    assert controlled(X, "cls@last4+gap", SHUFFLED) is X


def test_which_controls_a_readout_has() -> None:
    assert controls_of([], "cls+gap", True) == [""]
    assert controls_of(["width", "shuffled"], "cls", True) == ["", SHUFFLED]
    assert controls_of(["width"], "cls@last4+gap/pre", True) == ["", "cls@last4 beside shuffled", "gap/pre beside shuffled"]
    assert controls_of(["width"], "cls@last4", True) == ["", "cls beside shuffled"]
    assert controls_of(["width", "shuffled"], "cls+gap", False) == ["", SHUFFLED]  # k-NN fits nothing
    with pytest.raises(UsageError, match="unknown control 'widht'; did you mean 'width'"):
        check_controls(["shuffled", "widht"])


def probed(features: dict[str, torch.Tensor], control: str = "") -> float:
    """The accuracy of logreg on A + B, the first half of 1200 images being train."""
    y, X = features["y"].long(), torch.cat([features["A"], features["B"]], dim=1)
    train, test = (controlled(part, "cls+gap", control) for part in (X[:600], X[600:]))
    found = select_and_fit(train, y[:600], test, y[600:], [0.001, 0.01, 0.1, 1.0], [stratified_slice(y[:600], 0.2)])
    return (found.predictions == y[600:]).double().mean().item()


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_useless_half_takes_nothing_away_and_adds_nothing(scale: float) -> None:
    """A random projection of A + B to the width of A loses 15 points or more here, and more where B has 5 times the scale."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(1200) % 10
    centres, others = torch.randn(2, 10, 24, generator=generator)
    A, useless, useful = torch.randn(3, 1200, 24, generator=generator)
    weak, A, useful = A + 0.5 * centres[y], A + 0.8 * centres[y], useful + 0.5 * others[y]
    basis = torch.linalg.qr(torch.randn(48, 24, generator=generator))[0]
    nothing = torch.zeros_like(A)
    alone = probed({"A": A, "B": nothing, "y": y})
    projected = probed({"A": torch.cat([A, scale * useless], dim=1) @ basis, "B": nothing, "y": y})
    together, control = (probed({"A": A, "B": scale * useless, "y": y}, kept) for kept in ("", "cls" + BESIDE))
    assert projected < alone - 0.15  # what the control must not do
    assert control > alone - 0.04
    assert abs(together - control) < 0.04  # 3 standard errors of a difference of 600 images
    both = {"A": weak, "B": scale * useful, "y": y}
    assert probed(both) - max(probed(both, f"{kept}{BESIDE}") for kept in ("cls", "gap")) > 0.08

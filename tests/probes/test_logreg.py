"""The linear probe against scikit-learn, and its selection against the same steps written out with scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ssl_vit.errors import Failure, UsageError
from ssl_vit_eval import LinearProbe
from ssl_vit_eval.probes import logreg
from ssl_vit_eval.probes.logreg import cross_entropy, curvature, fit_path, hessian, run, select_and_fit
from ssl_vit_eval.probes.selection import stratified_slice


def features(n: int, d: int = 12, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features of very different scales and means, as backbones give them."""
    shared = torch.Generator().manual_seed(99)
    centres, mix = torch.randn(classes, d, generator=shared), torch.randn(d, d, generator=shared)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    X = (centres[y] + 1.5 * torch.randn(n, d, generator=generator)) @ mix
    return X * torch.logspace(-3, 2, d) + torch.arange(d), y


def sklearn_probe(C: float, solver: str = "lbfgs") -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, solver=solver, tol=1e-8, max_iter=10_000))


# at C = 100 scikit-learn's L-BFGS ends a few 1e-5 from the minimum that its Newton solver finds
@pytest.mark.parametrize(
    ("C", "solver", "tolerance"), [(1e-3, "lbfgs", 1e-6), (1.0, "lbfgs", 1e-5), (100.0, "lbfgs", 1e-3), (100.0, "newton-cholesky", 1e-5)]
)
def test_equals_scikit_learn(C: float, solver: str, tolerance: float) -> None:
    X, y = features(400)
    queries, answers = features(200, seed=1)
    probe = LinearProbe(C, tol=1e-8).fit(X, y)
    reference = sklearn_probe(C, solver).fit(X.double().numpy(), y.numpy())
    np.testing.assert_allclose(probe.coef_.numpy(), reference[-1].coef_, atol=tolerance, rtol=0)
    np.testing.assert_allclose(probe.intercept_.numpy(), reference[-1].intercept_, atol=tolerance, rtol=0)
    np.testing.assert_allclose(probe.predict_proba(queries).numpy(), reference.predict_proba(queries.double().numpy()), atol=tolerance)
    assert probe.predict(queries).tolist() == reference.predict(queries.double().numpy()).tolist()
    assert probe.score(queries, answers) == pytest.approx(reference.score(queries.double().numpy(), answers.numpy()))


def test_default_tolerance_gives_the_probabilities_to_a_thousandth() -> None:
    X, y = features(400)
    default, exact = LinearProbe().fit(X, y), LinearProbe(tol=1e-9).fit(X, y)
    assert default.converged_
    assert default.n_iter_ < exact.n_iter_
    torch.testing.assert_close(default.predict_proba(X), exact.predict_proba(X), atol=1e-3, rtol=0)


def test_two_classes_equal_scikit_learn_at_twice_the_C() -> None:
    X, y = features(300, classes=2)
    probe = LinearProbe(C=0.5, tol=1e-8).fit(X, y)
    reference = sklearn_probe(1.0).fit(X.double().numpy(), y.numpy())
    np.testing.assert_allclose(probe.predict_proba(X).numpy(), reference.predict_proba(X.double().numpy()), atol=1e-5)


def test_fewer_images_than_features_and_a_constant_feature() -> None:
    X, y = features(20, d=40)
    X[:, 7] = 3.7
    probe = LinearProbe(tol=1e-8).fit(X, y)
    assert probe.scale_[7] == 1.0
    reference = sklearn_probe(1.0).fit(X.double().numpy(), y.numpy())
    np.testing.assert_allclose(probe.coef_.numpy(), reference[-1].coef_, atol=1e-5)


def test_separable_classes_converge_at_a_large_C() -> None:
    X, y = features(100, d=40)
    probe = LinearProbe(C=1e3).fit(X, y)
    assert probe.converged_
    assert probe.score(X, y) == 1.0


@pytest.mark.parametrize("C", [0.01, 10.0, 1000.0])
def test_converged_means_the_answers_of_scikit_learn_at_a_much_tighter_tolerance(C: float) -> None:
    """Few images for the features, many classes: at C = 1000 a gradient of 1e-4 says nothing, and 7 % of the answers are others'."""
    X, y = features(400, d=60, classes=20)
    queries, _ = features(2000, d=60, classes=20, seed=1)
    probe = LinearProbe(C).fit(X, y)
    assert probe.converged_
    exact = make_pipeline(StandardScaler(), LogisticRegression(C=C, solver="newton-cg", tol=1e-10, max_iter=10_000))
    other = (probe.predict(queries).numpy() != exact.fit(X.double().numpy(), y.numpy()).predict(queries.double().numpy())).mean()
    assert other <= 0.003
    cut = LinearProbe(C, max_iter=probe.n_iter_ - 1).fit(X, y)
    assert not cut.converged_


def test_the_hessian_and_its_diagonal_equal_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    Z, W = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((50, 4), (4, 3)))
    y = torch.randint(3, (50,), generator=generator)
    expected = torch.autograd.functional.hessian(lambda flat: torch.nn.functional.cross_entropy(Z @ flat.view(4, 3), y), W.flatten())
    torch.testing.assert_close(curvature(Z, W).flatten(), expected.diagonal())
    expected[:3, :3] += 1 / 3  # the first column's weights are the intercepts, free to move together
    torch.testing.assert_close(hessian(Z, W), expected)


def test_strongly_correlated_features_converge_at_a_large_C_by_the_whole_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features as a small network's: many, but smooth functions of a few causes that also decide the class."""
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(2000, 24, generator=generator) * torch.arange(1, 25) ** -1.5
    X = torch.tanh(causes @ torch.randn(24, 48, generator=generator))
    y = (causes @ torch.randn(24, 8, generator=generator) + 0.1 * torch.randn(2000, 8, generator=generator)).argmax(dim=1)
    probe = LinearProbe(1000.0).fit(X, y)
    assert probe.converged_
    exact = make_pipeline(StandardScaler(), LogisticRegression(C=1000.0, solver="newton-cholesky", tol=1e-10))
    assert (probe.predict(X).numpy() != exact.fit(X.double().numpy(), y.numpy()).predict(X.double().numpy())).mean() <= 0.001
    monkeypatch.setattr(logreg, "_WHOLE", 0)
    assert LinearProbe(1000.0).fit(X, y).n_iter_ > 3 * probe.n_iter_


def test_too_few_iterations_are_told() -> None:
    X, y = features(200)
    probe = LinearProbe(max_iter=2).fit(X, y)
    assert probe.n_iter_ == 2
    assert not probe.converged_


def test_a_path_equals_single_fits_and_keeps_the_order_of_the_grid() -> None:
    X, y = features(300)
    grid = [1.0, 1e-2, 10.0]
    for C, probe in zip(grid, fit_path(X, y, grid, 1000, 1e-8), strict=True):
        assert probe.C == C
        torch.testing.assert_close(probe.coef_, LinearProbe(C, tol=1e-8).fit(X, y).coef_, atol=1e-5, rtol=0)


def test_cross_entropy_equals_autograd_over_several_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(9000, 5, generator=generator, dtype=torch.float64)
    W = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randint(3, (9000,), generator=generator)
    expected = torch.nn.functional.cross_entropy(Z @ W, y)
    loss, gradient = cross_entropy(Z, y, W.detach())
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, W)[0])


def test_labels_need_not_be_consecutive() -> None:
    X, y = features(200)
    names = torch.tensor([3, 5, 50, 51])
    assert LinearProbe().fit(X, names[y]).predict(X).tolist() == names[LinearProbe().fit(X, y).predict(X)].tolist()


def test_selection_equals_the_steps_written_out() -> None:
    X, y = features(300, d=30)
    X_test, y_test = features(400, d=30, seed=1)
    held_out = stratified_slice(y, fraction=0.3)
    grid = [1e-4, 1e-2, 1.0, 100.0]
    found = select_and_fit(X, y, X_test, y_test, grid, [held_out])

    arrays = [a.double().numpy() for a in (X, X_test)]
    train, slice_ = ~held_out.numpy(), held_out.numpy()
    on_slice = [sklearn_probe(C).fit(arrays[0][train], y.numpy()[train]).score(arrays[0][slice_], y.numpy()[slice_]) for C in grid]
    refitted = [sklearn_probe(C).fit(arrays[0], y.numpy()) for C in grid]
    on_test = [probe.score(arrays[1], y_test.numpy()) for probe in refitted]
    chosen = int(np.argmax(on_slice))
    assert found.grid is not None
    assert found.grid["slice_accuracy"] == pytest.approx(on_slice)
    assert found.grid["test_accuracy"] == pytest.approx(on_test)
    assert grid[chosen] == found.selected["C"]
    assert found.oracle == pytest.approx(max(on_test))
    assert found.predictions.tolist() == refitted[chosen].predict(arrays[1]).tolist()


def test_selection_never_sees_test() -> None:
    X, y = features(300, d=30)
    X_test, y_test = features(100, d=30, seed=1)
    held_out = stratified_slice(y)
    grid = [1e-4, 1e-2, 1.0, 100.0]
    honest = select_and_fit(X, y, X_test, y_test, grid, [held_out])
    shuffled = select_and_fit(X, y, X_test, y_test.roll(1), grid, [held_out])
    assert shuffled.selected == honest.selected
    assert shuffled.grid is not None
    assert honest.grid is not None
    assert shuffled.grid["slice_accuracy"] == honest.grid["slice_accuracy"]
    assert shuffled.grid["test_accuracy"] != honest.grid["test_accuracy"]
    assert shuffled.predictions.tolist() == honest.predictions.tolist()


def test_ties_go_to_the_smaller_C_and_the_edge_is_told() -> None:
    X, y = features(400, d=40)
    X = X + 50 * torch.nn.functional.one_hot(y, 40) * torch.logspace(-3, 2, 40)  # so easy that every C is right
    held_out = stratified_slice(y)
    found = select_and_fit(X, y, X, y, [10.0, 0.1, 1.0], [held_out])
    assert found.grid == {"C": [0.1, 1.0, 10.0], "slice_accuracy": [1.0] * 3, "test_accuracy": [1.0] * 3}
    assert found.selected["C"] == 0.1
    assert found.edge_of_grid
    assert not select_and_fit(X, y, X, y, [0.1], [held_out]).edge_of_grid

    hard, answers = features(300, d=100, seed=3)
    found = select_and_fit(hard, answers, hard, answers, [1e-6, 1e-2, 1e4], [stratified_slice(answers, 0.4)])
    assert found.selected["C"] == 1e-2
    assert not found.edge_of_grid


def test_slice_is_stratified_deterministic_and_spares_single_images() -> None:
    y = torch.tensor([0] * 100 + [1] * 25 + [2] * 3 + [3] * 2 + [4])[torch.randperm(131, generator=torch.Generator().manual_seed(0))]
    held_out = stratified_slice(y, fraction=0.1, seed=0)
    assert torch.bincount(y[held_out], minlength=5).tolist() == [10, 2, 1, 1, 0]
    assert held_out.tolist() == stratified_slice(y, fraction=0.1, seed=0).tolist()
    assert held_out.tolist() != stratified_slice(y, fraction=0.1, seed=1).tolist()
    assert torch.bincount(y[stratified_slice(y, fraction=0.99)], minlength=5).tolist() == [99, 24, 2, 1, 0]


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = features(20)
    held_out = stratified_slice(y)
    with pytest.raises(UsageError, match="slice holds 0 of 20"):
        select_and_fit(X, y, X, y, [0.1, 1.0], [torch.zeros_like(held_out)])
    with pytest.raises(UsageError, match="slice holds 20 of 20"):
        select_and_fit(X, y, X, y, [0.1, 1.0], [torch.ones_like(held_out)])
    with pytest.raises(UsageError, match=r"C is \[0.0, 1.0\]; it must be above 0"):
        select_and_fit(X, y, X, y, [0.0, 1.0], [held_out])
    with pytest.raises(UsageError, match="row 2 are not finite"):
        LinearProbe().fit(X.index_fill(0, torch.tensor([2]), float("nan")), y)
    with pytest.raises(UsageError, match="all 20 training labels are 1"):
        LinearProbe().fit(X, torch.ones_like(y))
    with pytest.raises(UsageError, match="6 wide, the probe was fitted on 12"):
        LinearProbe().fit(X, y).predict(X[:, :6])
    monkeypatch.setattr("ssl_vit_eval.memory.available_memory", lambda: 28 * 20 * 12 - 1)
    with pytest.raises(Failure, match=r"'gap': logistic regression works on .* use the protocol linear"):
        run({"C": [1.0], "max_iter": 9, "tol": 1e-4}, {"gap": X}, y, {"gap": X}, y, held_out)
    with pytest.raises(UsageError, match="between 0 and 1"):
        stratified_slice(y, fraction=1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_answers() -> None:
    X, y = features(500)
    host, device = (fit_path(X.to(where), y.to(where), [0.01, 1000.0], 1000, 1e-5)[1] for where in ("cpu", "cuda"))
    torch.testing.assert_close(device.coef_.cpu(), host.coef_, atol=1e-3, rtol=0)
    found = select_and_fit(X.cuda(), y.cuda(), X.cuda(), y.cuda(), [0.01, 1.0], [stratified_slice(y)])
    assert found.predictions.tolist() == select_and_fit(X, y, X, y, [0.01, 1.0], [stratified_slice(y)]).predictions.tolist()

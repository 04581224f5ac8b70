"""Batches, rates and selection of SGD heads, against the same steps written out with heads trained one by one."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from ssl_vit.errors import UsageError
from ssl_vit_eval.probes import gradient_descent, linear, mlp
from ssl_vit_eval.probes.gradient_descent import Course
from ssl_vit_eval.probes.selection import Diverged, points, stratified_slice
from tests.one_by_one import GRID, LINEAR, MLP, C, M, N, data, features, one_head, orders, standardised


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the references are, to the last bit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_rates_by_hand() -> None:
    course = Course(100, 4.0, 0, 0.0, "epoch", (0,))  # of 250 images: 2 steps an epoch
    half = [1.0, 0.5 + 0.25 * math.sqrt(2), 0.5, 0.5 - 0.25 * math.sqrt(2)]
    assert [course.rate(step, 250) for step in range(8)] == pytest.approx([rate for rate in half for _ in range(2)])
    course = Course(100, 3.0, 0, 1.0, "iteration", (0,))
    assert [course.rate(step, 250) for step in range(6)] == pytest.approx([0.0, 0.5, *half])
    course = Course(100, 0.0, 4, 0.0, "iteration", (0,))
    assert [course.rate(step, 250) for step in range(4)] == pytest.approx(half)
    assert [course.total(n) for n in (1, 250, 10**6)] == [4, 4, 4]
    course = Course(100, 2.5, 0, 0.0, "iteration", (0,))
    assert [(course.batch(n), course.total(n)) for n in (7, 99, 100, 250, 399)] == [(7, 2), (99, 2), (100, 2), (100, 5), (100, 8)]


def test_an_epoch_is_a_new_order_without_its_incomplete_batch() -> None:
    steps = [which for (which,), _ in Course(16, 3.0, 0, 0.0, "iteration", (5,)).steps(N)]
    assert [which.tolist() for which in steps] == [which.tolist() for epoch in orders(N, 16, 3) for which in epoch]
    assert all(len(torch.cat(steps[4 * epoch : 4 * epoch + 4]).unique()) == 64 for epoch in range(3))
    assert len(torch.cat(steps).unique()) == N
    assert [which.sort().values.tolist() for (which,), _ in Course(16, 2.0, 0, 0.0, "iteration", (5,)).steps(3)] == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("side_by_side", [False, True])
def test_selection_equals_the_steps_written_out(side_by_side: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if side_by_side:
        monkeypatch.setitem(gradient_descent.SIDE_BY_SIDE, "cpu", 2**20)
    p = LINEAR | {
        "normalise": "standardise",
        "batch_size": 60,
        "epochs": 20.0,
    }  # one step an epoch, of fewer images where the slice is left out
    train, y, test, y_test, held_out = data()
    names = torch.tensor([3, 5, 50, 51])  # labels need not be consecutive
    found = linear.run(p, train, names[y], test, names[y_test], held_out)
    assert list(found) == list(train)
    places, biased = set(), 0
    for name, X in train.items():
        on_slice, on_test, answers = [], [], []
        X_train, X_slice = standardised(X[~held_out], X[held_out])
        X_all, X_test = standardised(X, test[name])
        for lr, weight_decay in GRID:
            model = one_head(X_train, y[~held_out], lr, weight_decay, p)
            on_slice.append((model(X_slice).argmax(dim=1) == y[held_out]).double().mean().item())
            answers.append(one_head(X_all, y, lr, weight_decay, p)(X_test).argmax(dim=1))
            on_test.append((answers[-1] == y_test).double().mean().item())
        place = int(np.argmax(on_slice))
        places.add(place)
        of = found[name]
        assert of.grid is not None
        assert of.grid["slice_accuracy"] == pytest.approx(on_slice)
        assert of.grid["test_accuracy"] == pytest.approx(on_test)
        assert of.selected == {"lr": GRID[place][0], "weight_decay": GRID[place][1], "batch_size": 60, "iterations": 20}
        assert of.predictions.tolist() == names[answers[place]].tolist()
        assert of.oracle == pytest.approx(max(on_test))
        biased += of.oracle > on_test[place]
        assert of.edge_of_grid == (GRID[place][0] != 2.0 or GRID[place][1] != 0.0)
        assert of.parameters == X.shape[1] * C + C
    assert len(places) > 1
    assert biased  # so that a choice on test would be seen


def test_selection_sees_the_slice_and_never_test() -> None:
    train, y, test, y_test, held_out = data()
    honest = linear.run(LINEAR, train, y, test, y_test, held_out)
    other_test = linear.run(LINEAR, train, y, test, (y_test + 1) % C, held_out)
    other_slice = linear.run(LINEAR, train, torch.where(held_out, (y + 1) % C, y), test, y_test, held_out)
    for name in train:
        a, b, c = honest[name], other_test[name], other_slice[name]
        assert a.grid is not None
        assert b.grid is not None
        assert c.grid is not None
        assert b.selected == a.selected
        assert b.grid["slice_accuracy"] == a.grid["slice_accuracy"]
        assert b.predictions.tolist() == a.predictions.tolist()
        assert b.grid["test_accuracy"] != a.grid["test_accuracy"]
        assert c.grid["slice_accuracy"] != a.grid["slice_accuracy"]
    assert any(other_slice[name].selected != honest[name].selected for name in train)


def test_numbers_do_not_depend_on_the_other_readouts_of_the_call() -> None:
    train, y, test, y_test, held_out = data()
    together = linear.run(LINEAR, train, y, test, y_test, held_out)
    for name in train:
        alone = linear.run(LINEAR, {name: train[name]}, y, {name: test[name]}, y_test, held_out)[name]
        assert alone.grid == together[name].grid
        assert alone.predictions.tolist() == together[name].predictions.tolist()


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_replicates_are_runs_of_other_seeds_and_their_mean_chooses(kind: str, side_by_side: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if side_by_side:
        monkeypatch.setitem(gradient_descent.SIDE_BY_SIDE, "cpu", 2**20)
    train, y, test, y_test, held_out = data()
    module, p = (linear, LINEAR) if kind == "linear" else (mlp, MLP)
    found = module.run(p | {"probe_seeds": 3}, train, y, test, y_test, held_out)
    alone = [module.run(p | {"seed": 5 + number}, train, y, test, y_test, held_out) for number in range(3)]
    for name, of in found.items():
        grids = [run[name].grid for run in alone]
        assert of.grid is not None
        for key in ("slice_accuracy", "test_accuracy"):
            assert of.grid[key] == pytest.approx(np.mean([grid[key] for grid in grids if grid], axis=0))
        setting = {key: of.selected[key] for key in ("lr", "weight_decay")}
        place = points({key: of.grid[key] for key in setting}).index(setting)
        assert place == int(np.argmax(of.grid["slice_accuracy"]))
        assert of.oracle == pytest.approx(max(of.grid["test_accuracy"]))
        chosen = [
            module.run(p | {"seed": 5 + k} | {key: [value] for key, value in setting.items()}, train, y, test, y_test, held_out)
            for k in range(3)
        ]
        assert of.predictions.T.tolist() == [run[name].predictions.tolist() for run in chosen]
        accuracy = [(run[name].predictions == y_test).double().mean().item() for run in chosen]
        assert of.selected["accuracy"] == pytest.approx(accuracy)
        assert of.selected["spread"] == pytest.approx(np.std(accuracy, ddof=1))
        assert len({tuple(run[name].predictions.tolist()) for run in chosen}) > 1


def test_features_on_disk_and_several_chunks_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = LINEAR | {"normalise": "standardise"}
    (X, y), (Q, answers) = features(N, 6), features(M, 6, seed=1)
    held_out = stratified_slice(y, 0.3)
    X, Q = X.float(), Q.float()
    expected = linear.run(p, {"cls": X}, y, {"cls": Q}, answers, held_out)["cls"]
    monkeypatch.setattr(gradient_descent, "available_memory", lambda: 0)  # nothing is held
    monkeypatch.setattr(gradient_descent, "ROWS", 9)
    X.numpy().tofile(tmp_path / "train")
    on_disk = torch.from_numpy(np.memmap(tmp_path / "train", np.float32, "c", shape=(N, 6)))
    found = linear.run(p, {"cls": on_disk}, y, {"cls": Q}, answers, held_out)["cls"]
    assert found.grid == expected.grid
    assert found.predictions.tolist() == expected.predictions.tolist()
    monkeypatch.setattr(gradient_descent, "available_memory", lambda: 2**30)  # held, filled in chunks
    assert linear.run(p, {"cls": on_disk}, y, {"cls": Q}, answers, held_out)["cls"].grid == expected.grid


@pytest.mark.parametrize("missing", [0, 1])
def test_features_are_held_in_a_quarter_of_the_free_memory(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    X = torch.zeros(50, 6)
    monkeypatch.setattr(gradient_descent, "available_memory", lambda: 4 * (2 * 40 * 6 * 4) - missing)
    rows = gradient_descent.Rows([X, X], torch.arange(10, 50), None)
    X += 1
    assert (rows.batch(torch.tensor([0, 39])) == missing).all()


def test_standardisation_equals_scikit_learn_and_keeps_a_constant_feature() -> None:
    X, _ = features(5000, 6)
    X = X * torch.logspace(-3, 2, 6) + torch.logspace(2, -1, 6)
    X[:, 2] = 3.7
    X = X.float()
    X[::2, 2] = X[0, 2].nextafter(torch.tensor(4.0))  # as a sum in another order leaves it
    rows = torch.arange(10, 4990)
    varying = [0, 1, 3, 4, 5]
    standard = gradient_descent.standard_of([X, X + 1], rows)
    scaler = StandardScaler().fit(X.double()[rows].numpy())
    np.testing.assert_allclose(standard.mean[0, 0].numpy(), scaler.mean_, rtol=1e-6)
    np.testing.assert_allclose(standard.scale[0, 0, varying].numpy(), scaler.scale_[varying], rtol=1e-6)
    np.testing.assert_allclose(standard.mean[1, 0].numpy(), scaler.mean_ + 1, rtol=1e-6)
    assert standard.scale[0, 0, 2] == 1.0


def test_a_head_that_diverges_harms_no_other_and_is_not_chosen() -> None:
    train, y, test, y_test, held_out = data()
    expected = linear.run(LINEAR, train, y, test, y_test, held_out)
    found = linear.run(LINEAR | {"lr": [*LINEAR["lr"], 1e308]}, train, y, test, y_test, held_out)
    for name, of in expected.items():
        assert of.grid is not None
        with_diverged = found[name].grid
        assert with_diverged is not None
        assert with_diverged["slice_accuracy"][:6] == of.grid["slice_accuracy"]
        assert with_diverged["test_accuracy"] == [*of.grid["test_accuracy"], 0.0, 0.0]
        assert with_diverged["slice_accuracy"][6:] == [0.0, 0.0]
        assert found[name].predictions.tolist() == of.predictions.tolist()
    with pytest.raises(UsageError, match=r"readout 'cls': training diverged at the learning rates 1e\+308, 1.5e\+308"):
        linear.run(LINEAR | {"lr": [1e308, 1.5e308]}, train, y, test, y_test, held_out)


def test_a_readout_that_diverges_harms_no_other() -> None:
    train, y, test, y_test, held_out = data()
    expected = linear.run(LINEAR, train, y, test, y_test, held_out)
    large = {name: {**of, "gap": 1e200 * of["gap"]} for name, of in (("train", train), ("test", test))}
    with pytest.raises(Diverged, match="readout 'gap': training diverged at the learning rates") as caught:
        linear.run(LINEAR, large["train"], y, large["test"], y_test, held_out)
    assert list(caught.value.found) == [name for name in train if name != "gap"]
    assert all(of.grid == expected[name].grid for name, of in caught.value.found.items())


def test_a_head_that_diverges_when_refitted_is_not_chosen() -> None:
    X, y = features(N, 6)
    held_out = stratified_slice(y, 0.3)
    X[held_out.nonzero()[:5, 0]] = 1e200
    found = linear.run(LINEAR | {"lr": [1e-300, 1.0], "weight_decay": [0.0]}, {"cls": X}, y, {"cls": X}, y, held_out)["cls"]
    assert found.selected["lr"] == 1e-300
    assert found.grid is not None
    assert found.grid["slice_accuracy"][1] == found.grid["test_accuracy"][1] == 0.0


def test_a_head_that_diverges_without_the_slice_is_not_chosen() -> None:
    X, y = features(N, 6)
    held_out = stratified_slice(y, 0.3)
    # One such row in each class: from weights of 0 their first gradients cancel, but not without the one that is in the slice. Then the
    # next logits are 2^1050 / 4 N, infinite; where they cancel but for rounding (2^-50 at most, in any order of the sum), below 2^1000.
    X[:4], y[:4], held_out[:4] = 2.0**525, torch.arange(4), torch.tensor([True, False, False, False])
    p = LINEAR | {"lr": [1e-300, 1.0], "weight_decay": [0.0], "batch_size": N, "epochs": 2.0, "init_std": 0.0}
    assert linear.training(p, X.dtype).fit([X], torch.arange(N), y, C).heads.finite().tolist() == [[True, True]]
    found = linear.run(p, {"cls": X}, y, {"cls": X}, y, held_out)["cls"]
    assert found.selected["lr"] == 1e-300
    assert found.grid is not None
    assert found.grid["slice_accuracy"][1] == found.grid["test_accuracy"][1] == 0.0


def test_the_grid_is_ascending_whatever_the_order_in_the_file() -> None:
    axes = linear.training(LINEAR | {"lr": [10, 0.1, 2.0], "weight_decay": [0.02, 0]}).axes
    assert axes == {"lr": [0.1, 2.0, 10.0], "weight_decay": [0.0, 0.02]}


def test_one_point_is_trained_once_on_all_and_needs_no_slice() -> None:
    X, y = features(6, 5)
    p = LINEAR | {"lr": [2.0], "weight_decay": [0.0], "batch_size": 1024}
    found = linear.run(p, {"cls": X}, y, {"cls": X[:3]}, y[:3], torch.zeros(6, dtype=torch.bool))["cls"]
    assert found.selected == {"lr": 2.0, "weight_decay": 0.0, "batch_size": 6, "iterations": 4}
    assert (found.grid, found.edge_of_grid, found.oracle) == (None, None, None)
    assert found.predictions.tolist() == one_head(X, y, 2.0, 0.0, p)(X[:3]).argmax(dim=1).tolist()


def test_bad_input_is_named() -> None:
    train, y, test, y_test, held_out = data()
    for wrong, message in (
        ({"iterations": 5}, "epochs are 4.0 and iterations 5"),
        ({"epochs": 0.0}, "epochs are 0.0 and iterations 0"),
    ):
        with pytest.raises(UsageError, match=message):
            linear.run(LINEAR | wrong, train, y, test, y_test, held_out)
    with pytest.raises(UsageError, match="slice holds 0 of 70"):
        linear.run(LINEAR, train, y, test, y_test, torch.zeros_like(held_out))
    with pytest.raises(UsageError, match="readout 'gap': in train, features of row 2 are not finite"):
        linear.run(LINEAR, train | {"gap": train["gap"].index_fill(0, torch.tensor(2), math.nan)}, y, test, y_test, held_out)
    with pytest.raises(UsageError, match="readout 'gap': in test, features are 12 wide, 6 in train"):
        linear.run(LINEAR, train, y, test | {"gap": test["cls+gap"]}, y_test, held_out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    train, y, test, y_test, held_out = data()
    host = linear.run(LINEAR | {"normalise": "batchnorm"}, train, y, test, y_test, held_out)
    monkeypatch.undo()
    for name, found in linear.run(LINEAR | {"normalise": "batchnorm"}, train, y, test, y_test, held_out).items():
        assert found.grid == host[name].grid
        assert found.predictions.tolist() == host[name].predictions.tolist()

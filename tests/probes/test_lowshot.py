"""The low-shot probe against scikit-learn on the same images, and how these are drawn."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ssl_vit.errors import UsageError
from ssl_vit_eval.probes.lowshot import draw, folds, run

PARAMETERS: dict[str, Any] = {
    "fraction": 0.0,
    "per_class": 5,
    "draws": 3,
    "seed": 0,
    "C": [1.0, 0.001, 0.03],
    "C_of_single_images": 0.2,
    "folds": 4,
    "max_iter": 1000,
    "tol": 1e-6,
}


def features(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes of very different sizes, labelled 2, 3 and 7."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), n, replacement=True, generator=generator)
    X = 1.2 * torch.eye(3, 8)[place] + torch.randn(n, 8, generator=generator)
    return X * torch.logspace(-2, 2, 8), torch.tensor([2, 3, 7])[place]


TRAIN, TEST = features(300), features(200, seed=1)
APART = torch.arange(300)  # every image a group of its own


def sklearn_scores(C: float, rows: np.ndarray, X: np.ndarray, y: np.ndarray) -> np.ndarray:
    train, labels = TRAIN[0].double().numpy()[rows], TRAIN[1].numpy()[rows]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-8, max_iter=10_000)).fit(train, labels)
    return np.asarray(probe.predict(X) == y)


def test_each_draw_is_scikit_learns_with_C_chosen_inside_the_draw() -> None:
    found = run(PARAMETERS, {"cls": TRAIN[0]}, TRAIN[1], {"cls": TEST[0]}, TEST[1], APART)["cls"]
    grid, test, y_test = [0.001, 0.03, 1.0], TEST[0].double().numpy(), TEST[1].numpy()
    chosen, accuracy, on_folds, on_test = [], [], [], []
    for rows in draw(TRAIN[1], 0.0, 5, 3, 0):
        rows, number = rows.numpy(), folds(TRAIN[1][rows], APART[rows], 4).numpy()
        by_C = []
        for C in grid:
            right: list[bool] = []
            for fold in range(4):
                out = rows[number == fold]
                right += sklearn_scores(C, rows[number != fold], TRAIN[0].double().numpy()[out], TRAIN[1].numpy()[out]).tolist()
            by_C.append(sum(right) / len(right))
        on_folds.append(by_C)
        on_test.append([sklearn_scores(C, rows, test, y_test).mean() for C in grid])
        chosen.append(grid[int(np.argmax(by_C))])
        accuracy.append(on_test[-1][int(np.argmax(by_C))])
    assert len(set(chosen)) > 1  # else choosing once for all draws would pass
    assert accuracy != [max(of_draw) for of_draw in on_test]
    assert found.selected["C"] == chosen
    assert found.selected["accuracy"] == pytest.approx(accuracy)
    assert found.selected["spread"] == pytest.approx(np.std(accuracy, ddof=1))
    assert found.selected["images"] == [15, 15, 15]
    assert found.predictions.shape == (200, 3)
    assert (found.predictions == TEST[1][:, None]).double().mean(dim=0).tolist() == pytest.approx(accuracy)
    assert found.oracle == pytest.approx(np.mean([max(of_draw) for of_draw in on_test]))
    assert found.grid is not None
    assert found.grid["C"] == grid
    assert found.grid["slice_accuracy"] == pytest.approx(np.mean(on_folds, axis=0))
    assert found.grid["test_accuracy"] == pytest.approx(np.mean(on_test, axis=0))
    assert found.edge_of_grid
    assert found.parameters == 9 * 3


def test_selection_and_fits_never_see_test_or_the_rest_of_train() -> None:
    honest = run(PARAMETERS, {"cls": TRAIN[0]}, TRAIN[1], {"cls": TEST[0]}, TEST[1], APART)["cls"]
    drawn = torch.cat(draw(TRAIN[1], 0.0, 5, 3, 0))
    elsewhere = torch.ones(300, dtype=torch.bool).index_fill(0, drawn, False)
    X = TRAIN[0].clone()
    X[elsewhere] = 1e6
    other = run(PARAMETERS, {"cls": X}, TRAIN[1], {"cls": TEST[0]}, TEST[1].roll(1), APART)["cls"]
    assert other.selected["C"] == honest.selected["C"]
    assert other.predictions.tolist() == honest.predictions.tolist()
    assert other.selected["accuracy"] != honest.selected["accuracy"]


def test_draws_are_stratified_disjoint_and_of_the_seed() -> None:
    y = torch.tensor([4] * 200 + [5] * 40 + [9] * 7)[torch.randperm(247, generator=torch.Generator().manual_seed(0))]
    for fraction, per_class, expected in ((0.1, 0, [20, 4, 1]), (0.01, 0, [2, 1, 1]), (0.0, 2, [2, 2, 2])):
        draws = draw(y, fraction, per_class, 3, seed=0)
        for rows in draws:
            assert [int((y[rows] == label).sum()) for label in (4, 5, 9)] == expected
        assert len(torch.unique(torch.cat(draws))) == 3 * sum(expected)
        assert [rows.tolist() for rows in draw(y, fraction, per_class, 3, seed=0)] == [rows.tolist() for rows in draws]
        assert [rows.tolist() for rows in draw(y, fraction, per_class, 3, seed=1)] != [rows.tolist() for rows in draws]
    # a class that runs out starts again, and one that is too small is taken whole, each row once
    nine, all_of_nine = (draw(y, 0.0, per_class, 3, seed=0) for per_class in (3, 30))
    assert len(torch.unique(torch.cat([rows[y[rows] == 9] for rows in nine]))) == 7
    for rows in all_of_nine:
        assert [int((y[rows] == label).sum()) for label in (4, 5, 9)] == [30, 30, 7]
        assert len(torch.unique(rows)) == len(rows)


def test_folds_are_stratified_and_spare_single_images() -> None:
    y = torch.tensor([0] * 8 + [1] * 6 + [2] + [3] * 2)
    number = folds(y, torch.arange(17), 4)
    assert number[y == 2].tolist() == [-1]
    assert torch.bincount(number[number >= 0]).tolist() == [4, 4, 4, 4]
    assert torch.bincount(number[y == 0]).tolist() == [2, 2, 2, 2]
    assert number[y == 3].unique().numel() == 2


def test_no_fold_cuts_a_group_of_overlapping_images() -> None:
    y, groups = torch.tensor([0] * 8 + [1] * 6), torch.tensor([5, 5, 5, 7, 7, 9, 9, 9, 11, 11, 11, 11, 11, 11])
    number = folds(y, groups, 4)
    assert [number[groups == group].unique().numel() for group in (5, 7, 9, 11)] == [1] * 4
    assert sorted(number[groups == group][0].item() for group in (5, 7, 9)) == [0, 1, 2]
    assert number[groups == 11].tolist() == [-1] * 6  # the only group of its class is never held out
    found = run(PARAMETERS, {"cls": TRAIN[0]}, TRAIN[1], {"cls": TEST[0]}, TEST[1], torch.zeros(300, dtype=torch.int64))["cls"]
    assert (found.selected["C"], found.grid) == ([0.2] * 3, None)  # nothing can be held out


def test_one_image_a_class_leaves_nothing_to_choose() -> None:
    found = run({**PARAMETERS, "per_class": 1}, {"cls": TRAIN[0]}, TRAIN[1], {"cls": TEST[0]}, TEST[1], APART)["cls"]
    assert found.selected["C"] == [0.2, 0.2, 0.2]
    assert (found.grid, found.edge_of_grid, found.oracle) == (None, None, None)
    rows = draw(TRAIN[1], 0.0, 1, 3, 0)[1].numpy()
    assert found.selected["accuracy"][1] == pytest.approx(sklearn_scores(0.2, rows, TEST[0].double().numpy(), TEST[1].numpy()).mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 0.1}, "fraction 0.1 and per_class 5; give one of them"),
        ({"per_class": 0}, "fraction 0.0 and per_class 0; give one of them"),
    ],
)
def test_bad_parameters_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run({**PARAMETERS, **change}, {"cls": TRAIN[0]}, TRAIN[1], {"cls": TEST[0]}, TEST[1], APART)

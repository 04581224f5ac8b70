"""Low-shot probe: logistic regression on a few labelled images a class, over several draws of them.

The low-shot evaluation of MSN (Assran et al. 2022: 1 to 5 images a class in several draws, and 1 % of ImageNet) with the referee's
own classifier, `logreg.fit_path`. C is chosen by cross-validation within each draw: a selection slice beside it would hold labels that
the claim of so many images does not count.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_vit.errors import UsageError
from ssl_vit_eval.distributed import device
from ssl_vit_eval.probes.logreg import fit_path
from ssl_vit_eval.probes.selection import Found, choose, record

PARAMETERS: dict[str, type] = {
    "fraction": float,  # of every class, at least one image; 0 where per_class is used
    "per_class": int,  # all images of a class that has fewer; 0 where fraction is used
    "draws": int,
    "seed": int,
    "C": list,
    "C_of_single_images": float,  # where every class has one image, so that nothing can be held out
    "folds": int,
    "max_iter": int,
    "tol": float,
}


def run(
    parameters: Mapping[str, Any],
    train: Mapping[str, Float[Tensor, "n _"]],
    y_train: Int64[Tensor, " n"],
    test: Mapping[str, Float[Tensor, "m _"]],
    y_test: Int64[Tensor, " m"],
    held_out: Bool[Tensor, " n"],
) -> dict[str, Found]:
    """The protocol kind `lowshot`. `Found.predictions` [m draws]; `selected` has for each draw its images, C and accuracy, and the
    accuracy's standard deviation over draws (n - 1). The grid's accuracies are means over draws, and so is the oracle: of each
    draw's best. `held_out` is drawn from like the rest of train. UsageError unless one of fraction and per_class is above 0, and
    for fewer than two draws or folds."""
    p = parameters
    if (p["fraction"] > 0) == (p["per_class"] > 0):
        raise UsageError(f"low-shot got fraction {p['fraction']} and per_class {p['per_class']}; give one of them, and 0 for the other")
    if min(p["draws"], p["folds"]) < 2:
        raise UsageError(f"low-shot got {p['draws']} draws and {p['folds']} folds; give at least 2 of each")
    subsets = draw(y_train, p["fraction"], p["per_class"], p["draws"], p["seed"])
    return {spec: _run(p, X, y_train, test[spec], y_test, subsets) for spec, X in train.items()}


def draw(y: Int64[Tensor, " n"], fraction: float, per_class: int, draws: int, seed: int) -> list[Int64[Tensor, "_"]]:
    """Rows of `draws` training sets, stratified: one permutation of each class, cut one draw after the other, and from its start
    again where the class runs out. So draws are disjoint as far as the classes reach, and their spread is not too small."""
    labels, rng = y.cpu().numpy(), np.random.default_rng(seed)
    chosen: list[list[np.ndarray]] = [[] for _ in range(draws)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(per_class, len(rows)) if per_class else max(1, round(fraction * len(rows)))
        for number, of_draw in enumerate(chosen):
            of_draw.append(np.roll(rows, -number * count)[:count])
    return [torch.from_numpy(np.concatenate(of_draw)) for of_draw in chosen]


def folds(y: Int64[Tensor, " n"], count: int) -> Int64[Tensor, " n"]:
    """The fold in which each row is held out, dealt out class by class; -1, never, for the only row of a class."""
    number, dealt = torch.full_like(y, -1), 0
    for label in torch.unique(y):
        rows = (y == label).nonzero()[:, 0]
        if len(rows) > 1:
            number[rows] = (torch.arange(len(rows), device=y.device) + dealt) % count
            dealt += len(rows)
    return number


def _run(
    p: Mapping[str, Any],
    X: Float[Tensor, "n d"],
    y: Int64[Tensor, " n"],
    X_test: Float[Tensor, "m d"],
    y_test: Int64[Tensor, " m"],
    subsets: list[Int64[Tensor, "_"]],
) -> Found:
    selects = bool((torch.unique(y[subsets[0]], return_counts=True)[1] > 1).any())  # all draws have the same number of a class
    axes = {"C": sorted(p["C"]) if selects else [p["C_of_single_images"]]}
    answers, places, edges, on_folds, on_test = [], [], [], [], []
    for rows in subsets:
        few, labels = X[rows].to(device()), y[rows].to(device())
        fits = fit_path(few, labels, axes["C"], p["max_iter"], p["tol"])
        on_folds.append(_cross_validated(p, few, labels, axes["C"]) if selects else [0.0])
        choice = choose(axes, on_folds[-1])
        places.append(choice.place)
        edges.append(choice.edge)
        predictions = torch.stack([fit.predict(X_test).cpu() for fit in fits])
        answers.append(predictions[places[-1]])
        on_test.append((predictions == y_test.cpu()).double().mean(dim=1).tolist())
    accuracy = [of_draw[place] for of_draw, place in zip(on_test, places, strict=True)]
    selected = {
        "C": [axes["C"][place] for place in places],
        "accuracy": accuracy,
        "spread": statistics.stdev(accuracy),
        "images": [len(rows) for rows in subsets],
    }
    parameters = (X.shape[1] + 1) * len(torch.unique(y))
    if not selects:
        return Found(torch.stack(answers, dim=1), selected, parameters=parameters)
    grid = record(axes, np.mean(on_folds, axis=0).tolist(), np.mean(on_test, axis=0).tolist())
    return Found(torch.stack(answers, dim=1), selected, grid, any(edges), statistics.mean(map(max, on_test)), parameters)


def _cross_validated(p: Mapping[str, Any], X: Float[Tensor, "n d"], y: Int64[Tensor, " n"], grid: list[float]) -> list[float]:
    """The accuracy of each C on the rows held out, fold by fold."""
    number = folds(y, p["folds"])
    right = torch.zeros(len(grid), dtype=torch.int64)
    for fold in torch.unique(number[number >= 0]).tolist():
        out = number == fold
        fits = fit_path(X[~out], y[~out], grid, p["max_iter"], p["tol"])
        right += torch.stack([(fit.predict(X[out]) == y[out]).sum().cpu() for fit in fits])
    return (right / (number >= 0).sum().cpu()).tolist()

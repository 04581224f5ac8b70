"""Low-shot probe: logistic regression on a few labelled images a class, over several draws of them.

The low-shot evaluation of MSN (Assran et al. 2022: 1 to 5 images a class in several draws, and 1 % of ImageNet) with the referee's
own classifier, `logreg.fit_path`. C is chosen by cross-validation within each draw: a selection slice beside it would hold labels that
the claim of so many images does not count.
"""

import statistics
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from ssl_vit.errors import UsageError
from ssl_vit_eval.distributed import device
from ssl_vit_eval.probes.base import check_readouts
from ssl_vit_eval.probes.logreg import select_and_fit
from ssl_vit_eval.probes.selection import Found, Labels, Parameters, Test, Train, Truth
from ssl_vit_eval.schema import Count, Positives

Several = Annotated[int, Field(ge=2, description="a whole number of at least 2")]
PARAMETERS: dict[str, Any] = {
    "fraction": float,  # of every class, at least one image; 0 where per_class is used
    "per_class": int,  # all images of a class that has fewer; 0 where fraction is used
    "draws": Several,
    "seed": int,
    "C": Positives,
    "C_of_single_images": float,  # where every class has one image, so that nothing can be held out
    "folds": Several,
    "max_iter": Count,
    "tol": float,
}


def run(parameters: Parameters, train: Train, y_train: Labels, test: Test, y_test: Truth, groups: Labels) -> dict[str, Found]:
    """The protocol kind `lowshot`. `Found.predictions` [m draws]; `selected` has for each draw its images, C and accuracy, and the
    accuracy's standard deviation over draws (n - 1). The grid's accuracies are means over draws, and so is the oracle: of each
    draw's best. groups: of images that overlap, which no fold cuts. UsageError unless one of fraction and per_class is above 0."""
    p = parameters
    if (p["fraction"] > 0) == (p["per_class"] > 0):
        raise UsageError(f"low-shot got fraction {p['fraction']} and per_class {p['per_class']}; give one of them, and 0 for the other")
    check_readouts(train, y_train, test)
    subsets = draw(y_train, p["fraction"], p["per_class"], p["draws"], p["seed"])
    return {spec: _run(p, X, y_train, test[spec], y_test, groups, subsets) for spec, X in train.items()}


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


def folds(y: Int64[Tensor, " n"], groups: Int64[Tensor, " n"], count: int) -> Int64[Tensor, " n"]:
    """The fold in which each row is held out: groups are dealt out class by class; -1, never, for the only group of a class."""
    number, dealt = torch.full_like(y, -1), 0
    for label in torch.unique(y):
        own = dict.fromkeys(groups[(y == label) & (number < 0)].tolist())
        if len(own) > 1:
            for place, group in enumerate(own):
                number[groups == group] = (place + dealt) % count
            dealt += len(own)
    return number


def _run(
    p: Parameters, X: Float[Tensor, "n d"], y: Labels, X_test: Float[Tensor, "m d"], y_test: Truth, groups: Labels, subsets: list[Tensor]
) -> Found:
    selects = all((folds(y[rows], groups[rows], p["folds"]) >= 0).any() for rows in subsets)
    grid, found = p["C"] if selects else [p["C_of_single_images"]], []
    for rows in subsets:
        number = folds(y[rows], groups[rows], p["folds"])
        held_out = [number == fold for fold in range(p["folds"]) if (number == fold).any()]
        few, labels = X[rows].to(device()), y[rows].to(device())
        found.append(select_and_fit(few, labels, X_test, y_test, grid, held_out, p["max_iter"], p["tol"]))
    predictions = torch.stack([of.predictions for of in found], dim=1)
    accuracy = (predictions == y_test.cpu()[:, None]).double().mean(dim=0).tolist()
    selected = {
        "C": [of.selected["C"] for of in found],
        "accuracy": accuracy,
        "spread": statistics.stdev(accuracy),
        "images": [len(rows) for rows in subsets],
    }
    remarks = tuple(dict.fromkeys(remark for of in found for remark in of.remarks))
    whole = replace(found[0], predictions=predictions, selected=selected, remarks=remarks)
    if not selects:
        return whole
    grids = [of.grid or {} for of in found]
    means = {name: np.mean([of[name] for of in grids], axis=0).tolist() for name in ("slice_accuracy", "test_accuracy")}
    edge, oracle = any(of.edge_of_grid for of in found), statistics.mean(of.oracle or 0.0 for of in found)
    return replace(whole, grid=grids[0] | means, edge_of_grid=edge, oracle=oracle)

"""Protocols: versioned YAML files that say how features are judged, and the one function that carries one out."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from ssl_vit.assets import find_asset, list_assets
from ssl_vit.errors import UsageError, one_of
from ssl_vit_eval.knn import KNNProbe
from ssl_vit_eval.linear import select_and_fit
from ssl_vit_eval.selection import stratified_slice

# every parameter of a kind is in its file, so that the file is the whole rule
PARAMETERS: dict[str, dict[str, type]] = {
    "knn": {"k": int, "temperature": float},
    "logreg": {"grid": list, "max_iter": int, "tol": float, "slice_fraction": float, "slice_seed": int},
}


@dataclass(frozen=True)
class Protocol:
    """A rule: its name, the version that is raised whenever a number could change, its kind (a key of PARAMETERS), its parameters."""

    name: str
    version: int
    kind: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What a protocol gives. Accuracies are fractions: `accuracy` top-1 over images, `macro` the mean of the class accuracies.

    `selected` holds the parameters used; `grid`, `edge_of_grid` and `oracle` are None where nothing was selected.
    """

    predictions: Int64[Tensor, " n"]
    accuracy: float
    macro: float
    selected: dict[str, Any]
    grid: dict[str, Any] | None
    edge_of_grid: bool | None
    oracle: float | None
    seconds: float


def load_protocol(name: str) -> Protocol:
    """The protocol of this name, or in the YAML file at this path (then named after the file).

    UsageError for an unknown name, an unknown, missing or mistyped key, and for a file that bears the name and the version of
    a protocol that comes with ssl_vit but has other parameters: its rows would pass for those.
    """
    path = find_asset("protocols", name)
    protocol = _read(path.stem, path.read_text(encoding="utf-8"))
    if protocol.name in list_assets("protocols"):
        shipped_path = find_asset("protocols", protocol.name)
        shipped = _read(protocol.name, shipped_path.read_text(encoding="utf-8"))
        if protocol != shipped and protocol.version == shipped.version:
            raise UsageError(f"protocol file {name!r} differs from version {shipped.version} of {shipped.name!r}: rename it")
    return protocol


def run_protocol(
    protocol: Protocol,
    X_train: Float[Tensor, "n d"],
    y_train: Int64[Tensor, " n"],
    X_test: Float[Tensor, "m d"],
    y_test: Int64[Tensor, " m"],
    selection_mask: Bool[Tensor, " n"] | None = None,
) -> Result:
    """Fit on train, choose on the slice of train that `selection_mask` marks, and read test once.

    Without a mask a stratified slice is drawn as the protocol says; give one where images overlap, so that the slice holds
    whole groups of them. UsageError for features that the probes refuse.
    """
    start = time.perf_counter()
    p = protocol.parameters
    if protocol.kind == "knn":
        probe = KNNProbe(p["k"], p["temperature"]).fit(X_train, y_train)
        predictions = probe.predict(X_test)
        selected, grid, edge, oracle = {"k": probe.k_, "temperature": p["temperature"]}, None, None, None
    else:
        if selection_mask is None:
            selection_mask = stratified_slice(y_train, p["slice_fraction"], p["slice_seed"])
        found = select_and_fit(X_train, y_train, X_test, y_test, p["grid"], selection_mask, p["max_iter"], p["tol"])
        predictions = found.predictions
        selected = {"C": found.probe.C, "n_iter": found.probe.n_iter_, "converged": found.probe.converged_}
        grid = {"C": found.grid, "slice_accuracy": found.slice_accuracy, "test_accuracy": found.test_accuracy}
        edge, oracle = found.edge_of_grid, found.oracle
    predictions, y_test = predictions.cpu(), y_test.cpu()
    seconds = time.perf_counter() - start
    accuracy, macro = accuracies(predictions, y_test)
    return Result(predictions, accuracy, macro, selected, grid, edge, oracle, seconds)


def accuracies(predictions: Int64[Tensor, " m"], labels: Int64[Tensor, " m"]) -> tuple[float, float]:
    """Micro and macro top-1 accuracy, fractions. Macro is the mean over the classes that have test images."""
    classes = int(torch.maximum(predictions.max(), labels.max())) + 1
    micro = multiclass_accuracy(predictions, labels, num_classes=classes, average="micro").item()
    # torchmetrics' own macro counts a class that is only predicted, never true, as one of accuracy 0
    of_class = multiclass_accuracy(predictions, labels, num_classes=classes, average="none")
    return micro, of_class[torch.unique(labels)].mean().item()


def _read(name: str, text: str) -> Protocol:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"protocol {name!r} is not valid YAML: {' '.join(str(error).split())}") from error
    content = _checked(f"protocol {name!r}", content, {"version": int, "kind": str, "parameters": dict})
    kind = content["kind"]
    if kind not in PARAMETERS:
        raise UsageError(f"protocol {name!r} has the unknown kind {kind!r}: {one_of(kind, PARAMETERS)}")
    return Protocol(name, content["version"], kind, _checked(f"protocol {name!r}, parameters", content["parameters"], PARAMETERS[kind]))


def _checked(where: str, content: object, types: Mapping[str, type]) -> dict[str, Any]:
    """`content` if it is a mapping with exactly these keys and types, whole numbers taken as floats where floats are asked."""
    if not isinstance(content, dict):
        raise UsageError(f"{where} is {content!r}: give a mapping with the keys {', '.join(types)}")
    for key in content:
        if key not in types:
            raise UsageError(f"{where} has the unknown key {key!r}: {one_of(str(key), types)}")
    values = {}
    for key, expected in types.items():
        if key not in content:
            raise UsageError(f"{where} lacks the key {key!r}: add it ({expected.__name__})")
        value = content[key]
        values[key] = value = float(value) if expected is float and type(value) is int else value
        if type(value) is not expected:
            # YAML reads 1e-4 as text: it wants 1.0e-4
            raise UsageError(
                f"{where}: {key} is {value!r}, a {type(value).__name__}: give a {expected.__name__} (0.0001 or 1.0e-4, not 1e-4)"
            )
    return values

"""From what a protocol found to rows: accuracies over images and over classes, their intervals, and all that they are of."""

from collections.abc import Sequence
from typing import Any

import torch

from ssl_vit.provenance import git_revision
from ssl_vit_eval.metrics import METRIC_NAMES, METRICS, accuracies, metric_of
from ssl_vit_eval.probes.selection import Found
from ssl_vit_eval.rows import Key, Row
from ssl_vit_eval.sources import PIXELS, Source
from ssl_vit_eval.splits import Split
from ssl_vit_eval.stats.seeds import accuracy_interval


def make_rows(
    source: Source, key: Key, found: Found, train: Split, test: Split, width: int, seconds: float, deviations: Sequence[str]
) -> list[Row]:
    """The two numbers of one evaluation: top-1 over images and over classes, means over replicates, with their intervals."""
    labels = test.labels
    predictions = found.predictions.reshape(len(labels), -1)
    right = predictions == labels[:, None]
    scores = torch.tensor([accuracies(of.contiguous(), labels) for of in predictions.T], dtype=torch.float64).mean(dim=0).tolist()
    intervals = [accuracy_interval(right), accuracy_interval(right, labels)]
    of_source = {name: getattr(source, name) for name in ("method", "trained_with", "seed", "recipe", "recipe_name", "family", "init")}
    of_probe = {name: getattr(found, name) for name in ("selected", "grid", "edge_of_grid", "parameters", "bank")}
    numbers = {"n_train": len(train.images), "n_test": len(test.images), "width": width, "seconds": round(seconds, 3)}
    names: dict[str, Any] = {"source": source.name, "dataset": train.dataset, "dataset_metric": test.metric, "git": git_revision()}
    common = {**key._asdict(), **of_source, **of_probe, **numbers, **names, "deviations": list(deviations)}
    return [
        Row(metric=metric, value=value, ci_low=interval.low, ci_high=interval.high, oracle=oracle, **common)
        for metric, value, interval, oracle in zip(METRICS, scores, intervals, (found.oracle, None), strict=True)
    ]


def sentence(rows: Sequence[Row]) -> str:
    """What an evaluation found, by the metric of the dataset, on one line of the terminal."""
    row = next(row for row in rows if row.metric == metric_of(row))
    read = row.source if row.read_with == PIXELS else f"{row.source} read with {row.read_with}"
    control = f" ({row.control})" if row.control else ""
    value = f"{METRIC_NAMES[row.metric]} {100 * row.value:.1f} % [{100 * row.ci_low:.1f}, {100 * row.ci_high:.1f}]"
    text = f"{read}{control}, {row.dataset}, {row.protocol}: {value}"
    if row.grid is not None:
        axes = [name for name, values in row.grid.items() if name in row.selected and len(values) > 1]
        chosen = ", ".join(f"{name} {row.selected[name]:g}" for name in axes if isinstance(row.selected[name], int | float))
        oracle = "" if row.oracle is None else f"; oracle {100 * row.oracle:.1f}"  # of top-1 alone
        text += f"  ({chosen or 'chosen in each draw'}{oracle})"
    if row.edge_of_grid:
        text += "  warning: the selected value is on the edge of its grid, a better one may lie beyond"
    return text

"""Evaluations with planted answers, for the tests of the comparison."""

from collections.abc import Sequence

import torch

from ssl_vit_eval.rows import Row, RowStore
from ssl_vit_eval.stats import wilson_interval


def plant(store: RowStore, correct: Sequence[int] | torch.Tensor, **changes: object) -> list[Row]:
    """Append the two rows of one evaluation that is right exactly where `correct` is; the fields of a DINO cell, or as changed."""
    right = torch.as_tensor(correct).bool()
    labels = torch.arange(len(right)) % 3
    accuracy = right.double().mean().item()
    low, high = wilson_interval(int(right.sum()), len(right))
    values: dict[str, object] = {
        "method": "dino",
        "trained_with": "cls",
        "read_with": "cls",
        "dataset": "builtin:photos",
        "protocol": "knn",
        "protocol_version": 1,
        "protocol_hash": "parameters",
        "n_train": 90,
        "n_test": len(right),
        "seed": 0,
        "selected": {"k": 20},
        "grid": None,
        "edge_of_grid": None,
        "oracle": None,
        "deviations": [],
        "seconds": 1.5,
        "recipe": "recipe-hash",
        "family": "family-hash",
        "init": "start",
        "data": "data-hash",
        "transform": "resize32",
        "git": None,
        "source": "toy-cls-s0",
    }
    values |= changes
    values.setdefault("checkpoint", f"weights-of-{values['source']}")
    rows = [
        Row(metric="top1", value=accuracy, ci_low=low, ci_high=high, **values),  # type: ignore[arg-type]
        Row(metric="top1_macro", value=accuracy / 2, ci_low=0.0, ci_high=1.0, **values),  # type: ignore[arg-type]
    ]
    return store.append(rows, torch.where(right, labels, labels + 1), labels)


def plant_random(store: RowStore, correct: Sequence[int] | torch.Tensor, start: str = "start", **changes: object) -> list[Row]:
    """The random-initialised backbone with the weights `start`."""
    fields = {"method": "random", "trained_with": None, "checkpoint": start, "init": None, "source": "random:toy", **changes}
    return plant(store, correct, **fields)

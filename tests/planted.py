"""Evaluations with planted answers, for the tests of the comparison."""

from collections.abc import Callable, Iterable, Sequence

import torch
import yaml

from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.compare.comparison import Comparison, build
from ssl_vit_eval.compare.verdict import Difference, Family
from ssl_vit_eval.report.text import note_text, words_of
from ssl_vit_eval.rows import Row, RowStore
from ssl_vit_eval.stats.seeds import accuracy_interval

PRIMARY = {"recipe": "toy", "data": "builtin:photos", "protocol": "knn", "compare": ["cls", "gap"]}


def plant(store: RowStore, correct: Sequence[int] | torch.Tensor, labels: torch.Tensor | None = None, **changes: object) -> list[Row]:
    """Append the two rows of one evaluation that is right exactly where `correct` is, [n] or [n, replicates]; the fields of a DINO cell, or
    as changed."""
    right = torch.as_tensor(correct).bool().reshape(len(correct), -1)
    labels = torch.arange(len(right)) % 3 if labels is None else labels
    accuracy = right.double().mean().item()
    low, high = accuracy_interval(right)
    predictions = torch.where(right, labels[:, None], labels[:, None] + 1)
    macro = torch.stack([right[labels == label].double().mean() for label in labels.unique()]).mean().item()
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
        Row(metric="top1_macro", value=macro, ci_low=0.0, ci_high=1.0, **values),  # type: ignore[arg-type]
    ]
    return store.append(rows, predictions, labels)


def plant_random(store: RowStore, correct: Sequence[int] | torch.Tensor, start: str = "start", **changes: object) -> list[Row]:
    """The random-initialised backbone with the weights `start`."""
    fields = {"method": "random", "trained_with": None, "checkpoint": start, "init": None, "source": "random:toy", **changes}
    return plant(store, correct, **fields)


def plant_arm(
    store: RowStore, readout: str, seeds: Iterable[int], correct: Callable[[int], torch.Tensor], read_with: str = "", **changes: object
) -> None:
    """One arm of the recipe `toy`, a row pair for each seed; read as it was trained unless another spec is given."""
    for seed in seeds:
        own: dict[str, object] = {"source": f"toy-{ReadoutSpec.parse(readout).slug}-s{seed}", "init": f"start{seed}"}
        plant(store, correct(seed), trained_with=readout, read_with=read_with or readout, seed=seed, **{**own, **changes})


def first(count: int, of: int) -> torch.Tensor:
    """Right answers on the first `count` of `of` images."""
    return torch.arange(of) < count


def compared(store: RowStore, margin: float | None = None) -> Comparison:
    return build([store.folder.parent], margin)


def notes(comparison: Comparison) -> list[str]:
    """What it warns of, in words."""
    return [note_text(note) for note in comparison.notes]


def families(comparison: Comparison, question: str, primary: bool = False) -> list[Family]:
    return [family for family in comparison.families if family.question == question and family.primary == primary]


def only(comparison: Comparison, question: str, primary: bool = False) -> Difference:
    (family,) = families(comparison, question, primary)
    (difference,) = family.differences
    return difference


def words(comparison: Comparison, found: Difference) -> str:
    """The sentence of a difference of one of the families."""
    (family,) = [family for family in comparison.families if any(found is one for one in family.differences)]
    return words_of(family, found, comparison.rule)


def specs(family: Family) -> list[tuple[str, str]]:
    return [(found.a.read_with, found.b.read_with) for found in family.differences]


def declare(store: RowStore, **content: object) -> None:
    store.folder.parent.mkdir(parents=True, exist_ok=True)
    (store.folder.parent / "study.yaml").write_text(yaml.safe_dump(content))


def right(count: int, of: int = 200) -> Callable[[int], torch.Tensor]:
    return lambda seed: first(count, of)


def noisy(accuracy: float, of: int = 200, salt: int = 0) -> Callable[[int], torch.Tensor]:
    return lambda seed: torch.rand(of, generator=torch.Generator().manual_seed(100 * salt + seed)) < accuracy


def plant_three(store: RowStore, seeds: Iterable[int]) -> None:
    plant_arm(store, "register", seeds, right(100))
    plant_arm(store, "cls", seeds, lambda seed: first(160 + seed % 2, 200))
    plant_arm(store, "gap", seeds, right(130))

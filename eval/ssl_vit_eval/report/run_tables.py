"""What was run, as tables: pretrainings and their costs, data sets, what the protocols selected, and every number."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ssl_vit_eval.compare.comparison import Comparison
from ssl_vit_eval.compare.runs import Run
from ssl_vit_eval.report.table import MISSING, Sheet, Value
from ssl_vit_eval.report.text import signed
from ssl_vit_eval.rows import Row, Setting

GONE = Value(MISSING)
SELECTION = (
    "Settings are chosen on a slice of train and frozen. The oracle is the best of the grid on test: it is never used, and its bias is "
    "what choosing on test would have added, in points. A choice at the edge of the grid may have its optimum outside."
)


def pretrainings(comparison: Comparison) -> Sheet:
    """One line a run folder; the weights' hash is known where the run was evaluated."""
    weights = {row.recipe: row.checkpoint for row in comparison.rows if row.trained_with and row.recipe}
    lines = []
    for run in comparison.runs:
        done: dict[str, Any] = run.summary or {}
        seconds = done.get("seconds")
        lines.append(
            [
                Value(run.name),
                Value(run.recipe["readout"]),
                Value("own" if run.recipe.get("backbone", {}).get("cls_position") else "none"),
                Value(str(run.recipe["seed"]), float(run.recipe["seed"])),
                number(done.get("steps"), "{:,}") if done else Value("unfinished"),
                number(done.get("images"), "{:,}"),
                number(seconds, "{:,.0f}"),
                number(done["images"] / seconds if seconds else None, "{:,.0f}"),
                Value(done.get("devices", MISSING)),
                code(done.get("recipe_hash")),
                code(weights.get(done.get("recipe_hash", ""))),
                code(done.get("git")),
            ]
        )
    head = [
        "recipe",
        "trained with",
        "CLS position",
        "seed",
        "steps",
        "images",
        "seconds",
        "images/s",
        "device",
        "recipe hash",
        "weights hash",
        "git",
    ]
    return Sheet("pretrainings", "Pretrainings", head, lines)


def costs(comparison: Comparison) -> Sheet:
    """One line an arm: what a pretraining of it took, mean over its runs, and the time of a probe, mean over its evaluations."""
    arms: dict[tuple[str, str, str], list[Run]] = {}
    for run in comparison.runs:
        arms.setdefault((run.recipe["method"], run.name, run.recipe["readout"]), []).append(run)
    rules = list(dict.fromkeys(row.protocol for row in comparison.rows))
    lines = []
    for arm, runs in arms.items():
        done = [run.summary for run in runs if run.summary]
        hashes = {summary["recipe_hash"] for summary in done}
        own = [row for row in comparison.rows if row.recipe in hashes and row.trained_with and row.metric == "top1"]
        speeds = [summary["images"] / summary["seconds"] for summary in done if summary.get("seconds")]
        lines.append(
            [
                *map(Value, arm),
                number(len(done)),
                number(_mean([summary.get("seconds") for summary in done]), "{:,.0f}"),
                number(_mean(speeds), "{:,.0f}"),
                _prefixed(_mean([summary.get("flops") for summary in done])),
                _prefixed(_mean([summary.get("parameters") for summary in done])),
                Value(", ".join(sorted({summary["devices"] for summary in done if "devices" in summary})) or MISSING),
                *(number(_mean([row.seconds for row in own if row.protocol == rule]), "{:.1f}") for rule in rules),
            ]
        )
    head = ["method", "recipe", "trained with", "finished runs", "seconds", "images/s", "FLOPs", "parameters", "device"]
    note = (
        "A pretraining, mean over the finished runs: seconds and images a second of training, floating-point operations of the training, "
        "parameters of the backbone. A probe: seconds of one evaluation, without the features, mean over readouts and data sets. "
        "Runs of older versions did not count operations and parameters."
    )
    return Sheet("costs", "What an arm costs", [*head, *(f"{rule} probe, s" for rule in rules)], lines, note)


def datasets(rows: Sequence[Row]) -> Sheet:
    """One line a data set and its content."""
    found = dict.fromkeys((row.dataset, row.data, row.n_train, row.n_test) for row in rows)
    lines = [[Value(name), code(data), number(train, "{:,}"), number(test, "{:,}")] for name, data, train, test in found]
    return Sheet("data", "Data sets", ["name", "content hash", "train images", "test images"], lines)


def selections(rows: Sequence[Row]) -> Sheet:
    """One line a protocol and data set: what its evaluations selected, how often at the edge of the grid, and what the oracle would add."""
    lines = []
    for (protocol, version, dataset), of in _by_rule(rows).items():
        grids = dict.fromkeys(map(_grid, of))
        chosen = [key for key in of[0].selected if of[0].grid is None or key in of[0].grid]
        values = Counter(_named(row.selected, chosen) for row in of)
        bias = [100 * (row.oracle - row.value) for row in of if row.oracle is not None]
        lines.append(
            [
                Value(protocol),
                number(version),
                Value(dataset),
                number(len(of)),
                Value("; ".join(grids)),
                Value(", ".join(f"{value} ({count}×)" for value, count in sorted(values.items()))),
                GONE if of[0].edge_of_grid is None else Value(f"{_edges(of)} of {len(of)}", _edges(of) / len(of)),
                Value(signed(fmean(bias)), fmean(bias)) if bias else GONE,
                Value(signed(max(bias)), max(bias)) if bias else GONE,
                Value("; ".join(dict.fromkeys(text for row in of for text in row.deviations)) or MISSING),
            ]
        )
    head = ["protocol", "version", "data set", "evaluations", "grid", "selected", "at the edge", "mean bias", "largest bias", "deviations"]
    return Sheet("selection", "Protocols and what they selected", head, lines, SELECTION)


def selection_warnings(rows: Sequence[Row]) -> list[str]:
    """What of the selection can have cost accuracy, or would have added to it on test by more than a point."""
    found = []
    for (protocol, version, dataset), of in _by_rule(rows).items():
        where = f"{dataset}, {protocol} v{version}"
        if edges := _edges(of):
            found.append(f"{where}: {edges} of {len(of)} choices lie at the edge of the grid; a better value may lie beyond it")
        bias = max((100 * (row.oracle - row.value) for row in of if row.oracle is not None), default=0.0)
        if bias > 1:
            found.append(f"{where}: choosing on test would have added up to {bias:.1f} points to a number")
    return found


def evaluations(rows: Sequence[Row]) -> Sheet:
    """Every top-1, with what was selected for it and its hashes."""
    lines = [
        [
            Value(row.dataset),
            Value(f"{Setting.of(row).rule} v{row.protocol_version}"),
            Value(row.source),
            Value(row.trained_with or MISSING),
            Value(row.read_with),
            number(row.seed),
            number(100 * row.value, "{:.1f}"),
            number(100 * row.ci_low, "{:.1f}"),
            number(100 * row.ci_high, "{:.1f}"),
            Value(_named(row.selected, list(row.selected)) + (", edge of the grid" if row.edge_of_grid else "")),
            number(None if row.oracle is None else 100 * row.oracle, "{:.1f}"),
            number(row.seconds, "{:.1f}"),
            code(row.checkpoint),
            code(row.git),
        ]
        for row in rows
        if row.metric == "top1"
    ]
    head = ["data set", "protocol", "source", "trained", "read", "seed", "top-1, %", "low", "high", "selected", "oracle, %", "seconds"]
    return Sheet("evaluations", f"Every number ({len(lines)} evaluations)", [*head, "weights", "git"], lines)


def number(value: float | int | None, form: str = "{}") -> Value:
    """`value` as `form` shows it; – where there is none."""
    return GONE if value is None else Value(form.format(value), float(value))


def code(text: str | None) -> Value:
    return GONE if text is None else Value(text[:16], style="code")


def _by_rule(rows: Sequence[Row]) -> dict[tuple[str, int, str], list[Row]]:
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        if row.metric == "top1":
            groups.setdefault((Setting.of(row).rule, row.protocol_version, row.dataset), []).append(row)
    return groups


def _edges(rows: Sequence[Row]) -> int:
    return sum(bool(row.edge_of_grid) for row in rows)


def _mean(values: Sequence[float | int | None]) -> float | None:
    """Of those that are there; None where none is."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _prefixed(value: float | None) -> Value:
    """With the prefix of a thousand, a million, ...: `6.11 T`."""
    if value is None:
        return GONE
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    power = min(len(prefixes) - 1, max(0, (len(str(int(value))) - 1) // 3))
    return Value(f"{value / 1000**power:.3g} {prefixes[power]}".rstrip(), float(value))


def _grid(row: Row) -> str:
    """The values that were tried: `C 0.01 … 10 (4)`; nothing was chosen where there is no grid."""
    if row.grid is None:
        return "fixed"
    tried = [(key, values) for key, values in row.grid.items() if key in row.selected]
    return ", ".join(f"{key} {_short(min(values))} … {_short(max(values))} ({len(values)})" for key, values in tried)


def _named(selected: dict[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {_short(selected.get(key))}" for key in keys)


def _short(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)

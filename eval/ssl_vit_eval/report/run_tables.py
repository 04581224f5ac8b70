"""What was run, as tables: pretrainings and their costs, datasets, what the protocols selected, and every number."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from ssl_vit_eval.compare.comparison import Comparison
from ssl_vit_eval.compare.runs import Run
from ssl_vit_eval.metrics import MACRO, TOP1
from ssl_vit_eval.report.table import Forms, Sheet, Shown, frame_of
from ssl_vit_eval.report.text import NOTES, listed, signed
from ssl_vit_eval.rows import Row, Setting

SUMMARY = ("steps", "images", "seconds", "devices", "flops", "parameters", "recipe_hash", "git")  # of a run
SPEED = {"seconds": "{:,.0f}", "images/s": "{:,.0f}"}
_WHERE = ["rule", "protocol_version", "dataset"]


def frame_of_rows(rows: Sequence[Row]) -> pd.DataFrame:
    """A line for each top-1, a column for each field of a row; rule: the protocol and its control; macro: its macro top-1; shares in %."""
    macro = {row.key: 100 * row.value for row in rows if row.metric == MACRO}
    records: list[dict[str, Any]] = [
        vars(row) | {"rule": Setting.of(row).rule, "macro": macro.get(row.key)} for row in rows if row.metric == TOP1
    ]
    for record in records:
        percent = {name: None if record[name] is None else 100 * record[name] for name in ("value", "ci_low", "ci_high", "oracle")}
        record |= percent | {"bias": None if record["oracle"] is None else 100 * (record["oracle"] - record["value"])}
    return frame_of(records)


def frame_of_runs(runs: Sequence[Run]) -> pd.DataFrame:
    """A line for each run: what it is of, and what its summary says, most of which is missing while it is unfinished."""
    records = []
    for run in runs:
        recipe, done = run.recipe, run.summary or {"steps": "unfinished"}
        names = {"method": recipe["method"], "recipe": run.name, "trained with": recipe["readout"], "seed": recipe["seed"]}
        names["CLS position"] = "own" if recipe.get("backbone", {}).get("cls_position") else "none"
        speed = done["images"] / done["seconds"] if done.get("seconds") else None
        records.append({**dict.fromkeys(SUMMARY), **done, **names, "images/s": speed, "finished": bool(run.summary)})
    return frame_of(records)


def pretrainings(comparison: Comparison) -> Sheet:
    """One line a run folder; the weights' hash is known where the run was evaluated."""
    weights = {row.recipe: row.checkpoint for row in comparison.rows if row.trained_with and row.recipe}
    frame = frame_of_runs(comparison.runs)
    frame["weights hash"] = frame["recipe_hash"].map(weights.get)
    columns = ["recipe", "trained with", "CLS position", "seed", "steps", "images", "seconds", "images/s", "device"]
    hashes = ["recipe hash", "weights hash", "git"]
    frame = frame.rename(columns={"devices": "device", "recipe_hash": "recipe hash"})[[*columns, *hashes]]
    forms: Forms = {
        "steps": lambda steps: steps if isinstance(steps, str) else f"{steps:,}",
        "images": "{:,}",
        "seconds": "{:,.0f}",
        "images/s": "{:,.0f}",
    }
    frame = frame.assign(**{name: frame[name].map(_hash) for name in hashes})
    return Sheet("pretrainings", "Pretrainings", frame, forms=forms, styles=_code(*hashes))


def costs(comparison: Comparison) -> Sheet:
    """One line an arm: what a pretraining of it took, mean over its runs, and the time of a probe, mean over its evaluations."""
    of_arm, runs = ["method", "recipe", "trained with"], frame_of_runs(comparison.runs)
    rows = [row for row in comparison.rows if row.metric == TOP1]
    probes = {f"{rule} probe, s": rule for rule in dict.fromkeys(row.protocol for row in rows)}
    means = {"seconds": "seconds", "images/s": "images/s", "FLOPs": "flops", "parameters": "parameters"}
    records = []
    for arm, of in runs.groupby(of_arm, sort=False) if len(runs) else ():
        record = dict(zip(of_arm, arm, strict=True)) | {"finished runs": int(of["finished"].sum())}
        record |= {name: _mean(of[column]) for name, column in means.items()}
        record["device"] = ", ".join(sorted(set(of["devices"].dropna()))) or None
        own = [row for row in rows if row.trained_with and row.recipe in set(of["recipe_hash"].dropna())]
        records.append(record | {name: _mean(row.seconds for row in own if row.protocol == rule) for name, rule in probes.items()})
    frame = frame_of(records, [*of_arm, "finished runs", *means, "device", *probes])
    forms: Forms = {**SPEED, "FLOPs": _prefixed, "parameters": _prefixed, **dict.fromkeys(probes, "{:.1f}")}
    return Sheet("costs", "What an arm costs", frame, NOTES["costs"], forms)


def datasets(rows: pd.DataFrame) -> Sheet:
    """One line a dataset and its content."""
    found = rows[["dataset", "data", "n_train", "n_test"]].drop_duplicates().assign(data=rows["data"].map(_hash))
    found.columns = pd.Index(["name", "content hash", "train images", "test images"])
    return Sheet("data", "Datasets", found, "", {"train images": "{:,}", "test images": "{:,}"}, _code("content hash"))


def selections(rows: pd.DataFrame) -> Sheet:
    """One line a protocol and dataset: what its evaluations selected, how often at the edge of the grid, and what the oracle would add."""
    records = []
    for (rule, version, dataset), of in rows.groupby(_WHERE, sort=False):
        first = of.iloc[0]
        chosen = [key for key in first.selected if first.grid is None or key in first.grid]
        values = Counter(_named(selected, chosen) for selected in of.selected)
        bias = of.bias.dropna().tolist()
        edges = None if first.edge_of_grid is None else sum(map(bool, of.edge_of_grid))
        records.append(
            {
                "protocol": rule,
                "version": version,
                "dataset": dataset,
                "evaluations": len(of),
                "grid": "; ".join(dict.fromkeys(map(_grid, of.grid, of.selected))),
                "selected": ", ".join(f"{value} ({count}×)" for value, count in sorted(values.items())),
                "at the edge": None if edges is None else Shown(edges / len(of), f"{edges} of {len(of)}"),
                "mean bias": fmean(bias) if bias else None,
                "largest bias": max(bias, default=None),
                "deviations": "; ".join(dict.fromkeys(text for texts in of.deviations for text in texts)) or None,
            }
        )
    forms: Forms = {"mean bias": signed, "largest bias": signed}
    return Sheet("selection", "Protocols and what they selected", frame_of(records), NOTES["selection"], forms)


def selection_warnings(rows: pd.DataFrame) -> list[str]:
    """What of the selection can have cost accuracy, or would have added to it on test by more than a point."""
    found = []
    for (rule, version, dataset), of in rows.groupby(_WHERE, sort=False):
        where = f"{dataset}, {rule} v{version}"
        if edges := sum(map(bool, of.edge_of_grid)):
            found.append(f"{where}: {edges} of {len(of)} choices lie at the edge of the grid; a better value may lie beyond it")
        if (bias := max(of.bias.dropna(), default=0.0)) > 1:
            found.append(f"{where}: choosing on test would have added up to {bias:.1f} points to a number")
        cut = of[[selected.get("converged") is False for selected in of.selected]]
        if names := [f"{source} read with {spec}" for source, spec in zip(cut.source, cut.read_with, strict=True)]:
            found.append(f"{where}: {len(names)} of {len(of)} probes did not converge: {listed(names)}")
    return found


def evaluations(rows: pd.DataFrame) -> Sheet:
    """Every top-1 and macro top-1, with what was selected for it and its hashes."""
    edges = [", edge of the grid" if edge else "" for edge in rows.edge_of_grid]
    selected = [_named(of, list(of)) + edge for of, edge in zip(rows.selected, edges, strict=True)]
    columns = {"dataset": "dataset", "rule": "protocol", "source": "source", "trained_with": "trained", "read_with": "read", "seed": "seed"}
    columns |= {"value": "top-1, %", "ci_low": "low", "ci_high": "high", "macro": "macro top-1, %", "selected": "selected"}
    columns |= {"oracle": "oracle, %", "seconds": "seconds", "checkpoint": "weights", "git": "git"}
    rules = [f"{rule} v{version}" for rule, version in zip(rows.rule, rows.protocol_version, strict=True)]
    hashes = {name: rows[name].map(_hash) for name in ("checkpoint", "git")}
    frame = rows.assign(rule=rules, selected=selected, **hashes)[list(columns)].rename(columns=columns)
    forms = dict.fromkeys(("top-1, %", "low", "high", "macro top-1, %", "oracle, %", "seconds"), "{:.1f}")
    return Sheet("evaluations", f"Every number ({len(frame)} evaluations)", frame, "", forms, _code("weights", "git"))


def _code(*columns: str) -> dict[str, Any]:
    return dict.fromkeys(columns, "code")


def _hash(text: str | None) -> str | None:
    """As much of it as is shown."""
    return text and text[:16]


def _mean(values: Iterable[float | int | None]) -> float | None:
    """Of those that are there; None where none is."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _prefixed(value: float | int) -> str:
    """With the prefix of a thousand, a million, ...: `6.11 T`."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    power = min(len(prefixes) - 1, max(0, (len(str(int(value))) - 1) // 3))
    return f"{value / 1000**power:.3g} {prefixes[power]}".rstrip()


def _grid(grid: dict[str, Any] | None, selected: dict[str, Any]) -> str:
    """The values that were tried: `C 0.01 … 10 (4)`; nothing was chosen where there is no grid."""
    if grid is None:
        return "fixed"
    tried = [(key, values) for key, values in grid.items() if key in selected]
    return ", ".join(f"{key} {_short(min(values))} … {_short(max(values))} ({len(values)})" for key, values in tried)


def _named(selected: dict[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {_short(selected.get(key))}" for key in keys)


def _short(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)

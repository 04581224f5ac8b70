"""What was run, as HTML tables: pretrainings, data sets, protocols with what they selected, and every number."""

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from statistics import fmean
from typing import Any

from ssl_vit_eval.comparison import MISSING, Comparison, signed
from ssl_vit_eval.rows import Row


def pretrainings(comparison: Comparison) -> str:
    """One line a run folder; the weights' hash is known where the run was evaluated."""
    if not comparison.runs:
        return ""
    weights = {row.recipe: row.checkpoint for row in comparison.rows if row.trained_with and row.recipe}
    lines = []
    for run in comparison.runs:
        done: dict[str, Any] = run.summary or {}
        seconds = done.get("seconds")
        lines.append(
            [
                run.name,
                run.recipe["readout"],
                run.recipe["seed"],
                f"{done['steps']:,}" if done else "unfinished",
                f"{done['images']:,}" if done else MISSING,
                f"{seconds:,.0f}" if seconds is not None else MISSING,
                f"{done['images'] / seconds:,.0f}" if seconds else MISSING,
                done.get("devices", MISSING),
                _code(done.get("recipe_hash")),
                _code(weights.get(done.get("recipe_hash", ""))),
                _code(done.get("git")),
            ]
        )
    head = ["recipe", "trained with", "seed", "steps", "images", "seconds", "images/s", "device", "recipe hash", "weights hash", "git"]
    return "<h3>Pretrainings</h3>" + _table(head, lines, numbers=(2, 3, 4, 5, 6))


def datasets(rows: Sequence[Row]) -> str:
    """One line a data set and its content."""
    found = dict.fromkeys((row.dataset, row.data, row.n_train, row.n_test) for row in rows)
    lines = [[dataset, _Html(f"<code>{escape(data)}</code>"), f"{train:,}", f"{test:,}"] for dataset, data, train, test in found]
    return "<h3>Data sets</h3>" + _table(["name", "content hash", "train images", "test images"], lines, numbers=(2, 3))


def protocols(rows: Sequence[Row]) -> str:
    """One line a protocol and data set: what its evaluations selected, how often at the edge of the grid, and what the oracle would add."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        if row.metric == "top1":
            groups.setdefault((row.protocol, row.protocol_version, row.dataset), []).append(row)
    lines = []
    for (protocol, version, dataset), of in groups.items():
        grids = list(dict.fromkeys(_grid(row) for row in of))
        chosen = [key for key in of[0].selected if of[0].grid is None or key in of[0].grid]
        values = Counter(_named(row.selected, chosen) for row in of)
        bias = [row.oracle - row.value for row in of if row.oracle is not None]
        lines.append(
            [
                protocol,
                version,
                dataset,
                len(of),
                "; ".join(grids),
                ", ".join(f"{value} ({count}×)" for value, count in sorted(values.items())),
                MISSING if of[0].edge_of_grid is None else f"{sum(bool(row.edge_of_grid) for row in of)} of {len(of)}",
                f"{_points(fmean(bias))} (at most {_points(max(bias))})" if bias else MISSING,
                "; ".join(dict.fromkeys(text for row in of for text in row.deviations)) or MISSING,
            ]
        )
    note = (
        "Settings are chosen on a slice of train and frozen. The oracle is the best of the grid on test: it is never used, and its bias is "
        "what choosing on test would have added, in points. A choice at the edge of the grid may have its optimum outside."
    )
    head = ["protocol", "version", "data set", "evaluations", "grid", "selected", "at the edge", "oracle bias", "deviations"]
    return f'<h3>Protocols</h3><p class="soft">{note}</p>' + _table(head, lines, numbers=(1, 3))


def evaluations(rows: Sequence[Row]) -> str:
    """Every top-1, with what was selected for it and its hashes."""
    lines = [
        [
            row.dataset,
            f"{row.protocol} v{row.protocol_version}",
            row.source,
            row.trained_with or MISSING,
            row.read_with,
            MISSING if row.seed is None else row.seed,
            f"{100 * row.value:.1f} [{100 * row.ci_low:.1f}, {100 * row.ci_high:.1f}]",
            _named(row.selected, list(row.selected)) + (", edge of the grid" if row.edge_of_grid else ""),
            MISSING if row.oracle is None else f"{100 * row.oracle:.1f} ({_points(row.oracle - row.value)})",
            f"{row.seconds:.1f}",
            _code(row.checkpoint),
            _code(row.git),
        ]
        for row in rows
        if row.metric == "top1"
    ]
    head = [
        "data set",
        "protocol",
        "source",
        "trained",
        "read",
        "seed",
        "top-1, %",
        "selected",
        "oracle (bias)",
        "seconds",
        "weights",
        "git",
    ]
    return f"<details><summary>Every number ({len(lines)} evaluations)</summary>{_table(head, lines, numbers=(5, 6, 8, 9))}</details>"


class _Html(str):
    """Text that is escaped already."""


def _code(text: str | None) -> str:
    return MISSING if text is None else _Html(f"<code>{escape(text[:16])}</code>")


def _table(head: Sequence[str], lines: Iterable[Sequence[object]], numbers: Sequence[int]) -> str:
    def tag(name: str, place: int, item: object) -> str:
        return f"<{name}{' class=number' if place in numbers else ''}>{item if isinstance(item, _Html) else escape(str(item))}</{name}>"

    rows = "".join("<tr>" + "".join(tag("td", i, item) for i, item in enumerate(line)) + "</tr>" for line in lines)
    header = "".join(tag("th", i, item) for i, item in enumerate(head))
    return f'<div class="wide"><table class="plain"><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>'


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


def _points(value: float) -> str:
    return signed(100 * value)

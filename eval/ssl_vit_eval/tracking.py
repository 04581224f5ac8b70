"""Weights & Biases: one run for every evaluated source, from its rows.

    job_type  `eval`
    config    `source`, `method`, `trained_with`, `seed`, `checkpoint` (hash of the weights: equal to the `checkpoint` in the summary of
              the pretraining that it comes from), `recipe_hash`, `family`, `init`, `git`
    summary   `DATASET/PROTOCOL/READOUT/METRIC`, shares in [0, 1], and the ends of its 95 % interval with `_low` and `_high` behind it:
              `builtin_photos/knn/cls/top1_low`. A control stands behind its protocol (`knn_shuffled_labels`). READOUT `trained` is the
              readout that the source was trained with, under one name for all of them
    tables    `results`: every row with all of its fields, and its id
    artefact  `predictions-CHECKPOINT`, only if asked for: the Parquet files that the rows name

A source whose rows have been logged is passed over; if there are new ones, the same run is told all of them.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ssl_vit.model.readout import ReadoutSpec
from ssl_vit.train.tracking import TrackedRun, Tracking, say
from ssl_vit_eval.rows import Row, RowStore, Setting
from ssl_vit_eval.sources import PIXELS, Source

RESULTS = "results"  # the name of the table
TRAINED = "trained"


def track_rows(sources: Sequence[Source], store: RowStore, tracking: Tracking) -> None:
    """Log what the store has of each source. What goes wrong with W&B is said and raises nothing."""
    offline = False  # once it is not reached, the other sources do not wait for it
    for source in sources:
        rows = [row for row in store.rows() if (row.checkpoint, row.source) == (source.weights, source.name)]
        part = f"{_plain(source.name)}-{source.weights}"
        tags = dict.fromkeys((*tracking.tags, source.method, *filter(None, [source.trained_with])))
        run = TrackedRun(replace(tracking, tags=tuple(tags)), store.folder, "eval", part)
        content = hashlib.sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest() + "+predictions" * tracking.predictions
        if rows and not run.sent.startswith(content):
            run.start(source.name, config_of(rows[0]), offline)
            offline = offline or run.offline
            _log(run, rows, store)
            run.finish(sent=content)


def _log(run: TrackedRun, rows: Sequence[Row], store: RowStore) -> None:
    if not run.started:
        return
    import wandb

    values = [{"id": row.id, **asdict(row)} for row in rows]
    # a table wants one type a column
    data = [[json.dumps(value) if isinstance(value, dict | list) else value for value in row.values()] for row in values]
    run.log({**summary_of(rows), RESULTS: wandb.Table(columns=list(values[0]), data=data)})
    if run.tracking.predictions:
        files = sorted({store.folder / row.predictions for row in rows})
        run.log_files(f"predictions-{rows[0].checkpoint}", "predictions", files)


def config_of(row: Row) -> dict[str, Any]:
    names = ("source", "method", "trained_with", "seed", "checkpoint", "family", "init", "git")
    return {name: getattr(row, name) for name in names} | {"recipe_hash": row.recipe}


def summary_of(rows: Sequence[Row]) -> dict[str, float]:
    """Values and intervals of one source's rows. Two rows that would share a key have none, which is said: the table tells them apart."""
    values: dict[str, float] = {}
    keys = {row.id: summary_key(row.dataset, Setting.of(row).rule, row.read_with, row.metric) for row in rows}
    shared = {key for key, count in Counter(keys.values()).items() if count > 1}
    if shared:
        say(f"{rows[0].source}: several rows for {', '.join(sorted(shared))} (other versions, data or sizes); only the table has them")
    for row in rows:
        if (key := keys[row.id]) not in shared:
            names = {key}
            if row.trained_with == row.read_with:
                names.add(summary_key(row.dataset, Setting.of(row).rule, TRAINED, row.metric))
            for name in names:
                values |= {name: row.value, f"{name}_low": row.ci_low, f"{name}_high": row.ci_high}
    return values


def summary_key(dataset: str, rule: str, read_with: str, metric: str) -> str:
    """`builtin_photos/knn/cls/top1`. rule: the protocol, as `rows.Setting.rule`; read_with: a spec, `pixels` or `trained`."""
    read = read_with if read_with in (PIXELS, TRAINED) else ReadoutSpec.parse(read_with).slug
    return "/".join(_plain(part) for part in (dataset, rule, read, metric))


def _plain(text: str) -> str:
    """Letters, digits, `_` and `-`: what W&B can sort and filter by, and a file name holds."""
    return re.sub(r"[^\w-]+", "_", text)

"""What `--diagnostics` adds to an evaluation: the numbers of measure.py, and of the rows the accuracy by block and the redundancy."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_vit.files import locked, write_atomically
from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.controls import BESIDE
from ssl_vit_eval.diagnostics.geometry import redundancy
from ssl_vit_eval.diagnostics.measure import VERSION, at_each_block, diagnose
from ssl_vit_eval.rows import Row, RowStore, Setting
from ssl_vit_eval.sources import PIXELS, Source
from ssl_vit_eval.splits import Split


def with_blocks(specs: Sequence[str], depth: int) -> list[str]:
    """The specs, and those of them that read the last block alone at every other block too."""
    return list(dict.fromkeys([*specs, *(name for spec in specs for _, name in at_each_block(spec, depth))]))


def half_precision(specs: Sequence[str]) -> list[str]:
    """Those whose features are stored in half precision, since those of every block are many: behind the final norm they fit into it."""
    return [spec for spec in specs if all(term.norm != "pre" for term in ReadoutSpec.parse(spec).terms)]


def examine(source: Source, test: Split, data: str, transform: str, specs: Sequence[str], store: RowStore) -> Path:
    """Write `diagnostics-SOURCE-WEIGHTS-DATA-TRANSFORM.json` beside the rows, and a figure that it names; the file's path.

    What this version measured before on these weights and images is kept, what comes from rows is always new."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name)
    path = store.folder / f"diagnostics-{name}-{source.weights[:8]}-{data[:8]}-{transform}.json"
    with locked(path.with_suffix(".lock")):  # another evaluation may measure the same, and what it has found is there then
        found: dict[str, Any] = {}
        with suppress(OSError, ValueError, TypeError):  # it is not there, or damaged
            found = dict(json.loads(path.read_text()))
        if (found.get("version"), found.get("readouts")) != (VERSION, list(specs)):
            found = {
                **diagnose(source, test.images, specs, store.folder),
                "dataset": test.dataset,
                "transform": transform,
                "readouts": list(specs),
            }
        assert source.backbone is not None
        place = (source.weights, data, transform, "top1")
        rows = [row for row in store.rows() if (row.checkpoint, row.data, row.transform, row.metric) == place]
        found["accuracy_by_block"] = accuracy_by_block(rows, specs, source.backbone.depth)
        found["redundancy"] = redundancies(rows)
        write_atomically(path, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return path


def by_block(rows: Sequence[Row], specs: Sequence[str], depth: int) -> dict[tuple[Setting, str], dict[int, Row]]:
    """The rows, of one source and metric, of each setting and readout by block, where there are two or more; without controls."""
    known = {(Setting.of(row), row.read_with): row for row in rows if not row.control}
    curves = {}
    for setting in dict.fromkeys(setting for setting, _ in known):
        for spec in specs:
            blocks = {block: known.get((setting, name)) for block, name in at_each_block(spec, depth) if block is not None}
            curves[setting, spec] = {block: row for block, row in blocks.items() if row is not None}
    return {of: curve for of, curve in curves.items() if len(curve) > 1}


def accuracy_by_block(rows: Sequence[Row], specs: Sequence[str], depth: int) -> list[dict[str, Any]]:
    """Top-1 of each readout at each block, for each protocol that has them."""
    found = []
    for (setting, spec), curve in by_block(rows, specs, depth).items():
        points = [{"block": block, "top1": row.value, "ci": [row.ci_low, row.ci_high]} for block, row in curve.items()]
        found.append({"protocol": setting.protocol, "version": setting.version, "readout": spec, "curve": points})
    return found


def redundancies(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each A + B, what it adds at equal width, in points: to the better of A and B beside the other shuffled (the control `width`);
    in k-NN, which fits nothing, to the better of A and B."""
    known = {row.key: row for row in rows}
    found = []
    for row in rows:
        terms = ReadoutSpec.parse(row.read_with).terms if not row.control and row.read_with != PIXELS else ()
        places = [(str(term), "") if row.bank else (row.read_with, f"{term}{BESIDE}") for term in terms]
        keys = [row.key._replace(read_with=read_with, control=control) for read_with, control in places]
        values = [known[key].value for key in keys if key in known]
        if len(values) == len(keys) == 2:
            points = 100 * redundancy(row.value, *values)
            found.append({"protocol": row.protocol, "readout": row.read_with, "width": row.width, "points": points})
    return found

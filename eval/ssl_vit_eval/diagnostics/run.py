"""What `--diagnostics` adds to an evaluation: the numbers of measure.py, and of the rows the accuracy by block and the redundancy."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_vit.files import write_atomically
from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.controls import BESIDE
from ssl_vit_eval.diagnostics.geometry import redundancy
from ssl_vit_eval.diagnostics.measure import VERSION, at_each_block, diagnose
from ssl_vit_eval.rows import Row, RowStore
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
    found = json.loads(path.read_text()) if path.exists() else {}
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


def accuracy_by_block(rows: Sequence[Row], specs: Sequence[str], depth: int) -> list[dict[str, Any]]:
    """Top-1 of each readout at each block, for each protocol that has them."""
    known = {(row.protocol, row.protocol_version, row.protocol_hash, row.read_with): row for row in rows if not row.control}
    curves = []
    for rule in dict.fromkeys(key[:3] for key in known):
        for spec in specs:
            places = [(block, known.get((*rule, name))) for block, name in at_each_block(spec, depth) if block is not None]
            curve = [{"block": block, "top1": row.value, "ci": [row.ci_low, row.ci_high]} for block, row in places if row is not None]
            if len(curve) > 1:
                curves.append({"protocol": rule[0], "version": rule[1], "readout": spec, "curve": curve})
    return curves


def redundancies(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each A + B, what it adds at equal width, in points: to the better of A and B beside the other shuffled (the control `width`);
    in k-NN, which fits nothing, to the better of A and B."""
    known = {(row.protocol, row.protocol_version, row.protocol_hash, row.read_with, row.control): row for row in rows}
    found = []
    for row in rows:
        plain = not row.control and row.read_with != PIXELS
        terms = ReadoutSpec.parse(row.read_with).terms if plain else ()
        places = [(str(term), "") for term in terms] if row.bank else [(row.read_with, f"{term}{BESIDE}") for term in terms]
        keys = [(row.protocol, row.protocol_version, row.protocol_hash, *place) for place in places]
        if len(keys) == 2 and all(key in known for key in keys):
            gain = 100 * redundancy(row.value, *(known[key].value for key in keys))
            found.append({"protocol": row.protocol, "readout": row.read_with, "width": row.width, "points": gain})
    return found

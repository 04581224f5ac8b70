"""How evaluating and comparing grow with the store of rows: `python benchmarks/load.py [--rows 2000 20000 200000]`.

Planted answers, no network: a study of so many rows (two an evaluation) is written as `ssl-vit eval` writes it, asked for what is known
of one dataset, and compared to its report. Seconds of each, seconds a thousand rows, and the peak of the memory; a size in a process of
its own.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

from ssl_vit_eval.report.terminal import compare
from ssl_vit_eval.rows import Row, RowStore

CELLS = [(recipe, readout, seed) for recipe in range(5) for readout in ("cls", "gap", "register", "cls+gap", "cls0") for seed in range(8)]
IMAGES = 200


def fill(store: RowStore, rows: int) -> int:
    """So many rows of 200 cells: datasets are added, with five readouts of each cell by one protocol. How many there were."""
    labels = torch.arange(IMAGES) % 10
    fixed = {
        **{"method": "dino", "protocol": "knn", "protocol_version": 1, "protocol_hash": "p", "n_train": 90, "n_test": IMAGES},
        **{"selected": {"k": 20}, "grid": None, "edge_of_grid": None, "oracle": None, "deviations": [], "seconds": 1.5, "git": None},
    }
    written = 0
    for dataset in itertools.count():
        for (recipe, readout, seed), read_with in itertools.product(CELLS, ("cls", "gap", "register", "cls+gap", "cls0")):
            if written >= rows:
                return dataset
            right = torch.rand(IMAGES, generator=torch.Generator().manual_seed(written)) < 0.7
            name = f"toy{recipe}-{readout}-s{seed}"
            own = {"trained_with": readout, "read_with": read_with, "seed": seed, "family": f"f{recipe}", "init": f"i{recipe}-{seed}"}
            own |= {"source": name, "checkpoint": name, "recipe": name, "dataset": f"set{dataset}", "data": f"data{dataset}"}
            macro = torch.stack([right[labels == label].double().mean() for label in range(10)]).mean().item()
            values = {"top1": right.double().mean().item(), "top1_macro": macro}
            numbers = [{"metric": metric, "value": value, "ci_low": 0.0, "ci_high": 1.0} for metric, value in values.items()]
            found = [Row(**fixed, **own, **number, transform="resize32") for number in numbers]
            store.append(found, torch.where(right, labels, (labels + 1) % 10), labels)
            written += 2
    return 0


def measure(rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, taken = RowStore(Path(folder) / "eval"), {}
        for what, do in (
            ("written", lambda: fill(store, rows)),
            ("known", lambda: store.known("data0")),
            ("compared", lambda: compare([folder], Path(folder) / "report")),
        ):
            begun = time.perf_counter()
            with redirect_stdout(None):
                do()
            taken[what] = round(time.perf_counter() - begun, 2)
    print(json.dumps({"rows": rows, **taken, "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluating and comparing against the number of rows.")
    parser.add_argument("--rows", type=int, nargs="*", default=[2000, 20_000, 200_000])
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for rows in options.rows:
        if options.here:
            measure(rows)
        else:
            subprocess.run([sys.executable, __file__, "--here", "--rows", str(rows)], check=True)


if __name__ == "__main__":
    main()

"""How a study and an evaluation grow: `python benchmarks/load.py [--rows 2000 20000 200000] [--sources 10 50]`.

An evaluation by `ssl-vit eval` of so many random backbones in 20 readouts on 10 datasets of noise, twice: the second finds everything
done. Then a study of 200 cells (mae_smoke at 5 depths, 5 readouts, 8 seeds; two steps each), trained, evaluated and compared by
`ssl-vit study`. Its store gets more rows, as of more datasets, with random answers, and the same command runs again: it trains nothing,
looks what is missing, and compares all rows.

Of each command: processor seconds, which other processes disturb less than the clock, and the peak of its memory (Linux).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from ssl_vit.assets import find_asset
from ssl_vit_eval.metrics import METRICS, accuracies
from ssl_vit_eval.rows import Row, RowStore

STUDY = {
    "recipes": [f"./depth{depth}.yaml" for depth in range(1, 6)],
    "trained_with": ["cls", "gap", "register", "gem", "max"],
    "seeds": list(range(8)),
    "data": ["./data0"],
    "protocols": ["knn"],
    "read_with": ["cls", "gap", "register", "gem", "max"],
}
READOUTS = [
    f"{name}{block}{norm}" for name in ("cls", "gap", "register", "max", "gem") for block in ("", "@block0") for norm in ("", "/pre")
]
CLASSES, IMAGES, SETS = 5, 20, 10


def command(*arguments: str) -> str:
    """Run `ssl-vit` with them: its processor seconds, those by the clock and its peak of memory."""
    begun = time.monotonic()
    with open("said.log", "w") as said:
        process = subprocess.Popen([Path(sys.executable).with_name("ssl-vit"), *arguments], stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
    assert status == 0, Path("said.log").read_text()[-2000:]
    seconds = used.ru_utime + used.ru_stime
    return f"{seconds:.0f} s of a processor, {time.monotonic() - begun:.0f} s by the clock, {used.ru_maxrss / 1e6:.2f} GB"


def draw(folder: Path, seed: int) -> None:
    """A dataset of noise: so many images of each class for train and for test."""
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for label in range(CLASSES):
            of = folder / split / f"class{label}"
            of.mkdir(parents=True)
            for number in range(IMAGES):
                Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(of / f"{number}.png")


def plant(store: RowStore, rows: int) -> None:
    """More rows, until there are so many: the first dataset's again under other names, with other answers."""
    there, rng = store.rows(), torch.Generator().manual_seed(0)
    measured = [row for row in there if row.dataset == "data0" and row.metric == METRICS[0]]
    labels, count, number = store.predictions(measured[0])[1], len(there), len({row.dataset for row in there})
    while count + len(METRICS) <= rows:
        for row in measured[: (rows - count) // len(METRICS)]:
            right = torch.rand(len(labels), generator=rng) < 0.5 + 0.1 * (row.trained_with == "gap")
            answers = torch.where(right, labels, (labels + 1) % CLASSES)
            other = replace(row, dataset=f"data{number}", data=f"{row.data}{number}")
            of = zip(METRICS, accuracies(answers, labels), strict=True)
            found: list[Row] = [replace(other, metric=metric, value=value) for metric, value in of]
            store.append(found, answers, labels)
            count += len(found)
        number += 1


def studied(sizes: list[int]) -> None:
    for depth in range(1, 6):
        recipe = yaml.safe_load(find_asset("recipes", "mae_smoke").read_text())
        recipe["backbone"]["depth"] = depth
        Path(f"depth{depth}.yaml").write_text(yaml.safe_dump(recipe))
    Path("load.yaml").write_text(yaml.safe_dump(STUDY))
    print(f"study: 200 cells trained, evaluated, compared: {command('study', 'load.yaml', '--out', 'load')}", flush=True)
    store = RowStore("load/eval")
    for size in sizes:
        plant(store, size)
        print(f"study: again, on {len(store.rows()):,} rows: {command('study', 'load.yaml', '--out', 'load')}", flush=True)


def evaluated(sources: int) -> None:
    recipe = yaml.safe_load(find_asset("recipes", "mae_smoke").read_text())
    for seed in range(sources):
        Path(f"r{seed}.yaml").write_text(yaml.safe_dump({**recipe, "seed": seed}))
    names = [f"random:r{seed}.yaml" for seed in range(sources)]
    data = [f"./data{number}" for number in range(SETS)]
    asked = ["eval", *names, "--data", *data, "--protocols", "knn", "--readouts", *READOUTS, "--out", f"eval{sources}"]
    for what in ("evaluated", "again"):
        print(f"{sources} sources x {len(READOUTS)} readouts x {SETS} datasets, {what}: {command(*asked)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="A study and an evaluation against the number of rows.")
    parser.add_argument("--rows", type=int, nargs="*", default=[2000, 20_000, 200_000], help="in the study's store, rising")
    parser.add_argument("--sources", type=int, nargs="*", default=[10, 50])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for number in range(SETS):
            draw(Path(f"data{number}"), number)
        for sources in options.sources:
            evaluated(sources)
        if options.rows:
            studied(options.rows)


if __name__ == "__main__":
    main()

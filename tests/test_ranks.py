"""`ssl-vit eval` on several processes, started as torchrun starts them: the same rows and answers as one process, to the last bit."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from PIL import Image

from ssl_vit_eval.features import BATCH
from tests.conftest import RECIPES

N_TRAIN, N_TEST = 2 * BATCH + 188, BATCH + 44  # three and two batches, the last ones smaller: no number of processes divides them
ATTENTIVE = {
    "version": 1,
    "kind": "attentive",
    "parameters": {
        "lr": [0.001, 0.01],
        "weight_decay": [0.0],
        "batch_size": 64,
        "epochs": 1.0,
        "iterations": 0,
        "warmup_epochs": 0.0,
        "seed": 0,
        "slice_fraction": 0.1,
        "slice_seed": 0,
    },
}


def evaluated(ranks: int, folder: Path) -> dict[str, tuple[dict[str, Any], list[list[int]]]]:
    """Every row but for its seconds, and its predictions, by id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ssl_vit", "eval", "random:mae.yaml", "--data", "./pictures", "--out", f"out{ranks}"]
    command += ["--protocols", "knn", "logreg", "tokens.yaml", "--readouts", "cls", "gap", "cls+gap", "abmilp", "--controls", "width"]
    base = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(command, cwd=folder, env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks
    assert "rows: " in outputs[0]
    assert all("rows: " not in output for output in outputs[1:])  # one speaks for all
    found = {}
    for line in (folder / f"out{ranks}" / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        del row["seconds"]
        assert row["id"] not in found
        found[row["id"]] = (row, pq.read_table(folder / f"out{ranks}" / row["predictions"]).to_pandas().values.tolist())
    return found


def test_two_and_three_processes_give_what_one_gives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", N_TRAIN), ("test", N_TEST)):
        for number in range(count):
            level, name = ((105, "dark"), (120, "mid"), (135, "light"))[number % 3]
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            noise = rng.normal(level, 60, (16, 16, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noise).save(folder / f"{number:03}.png")
    (tmp_path / "mae.yaml").write_text(yaml.safe_dump({**RECIPES["mae"], "data": {"source": "./pictures", "batch_size": 8}}))
    (tmp_path / "tokens.yaml").write_text(yaml.safe_dump(ATTENTIVE))

    one = evaluated(1, tmp_path)
    assert len(one) == 2 * (3 + 3 + 2 + 1)  # metrics x (knn + logreg + their projections + attentive)
    knn = [row for row, _ in one.values() if row["protocol"] == "knn"]
    assert {row["bank"] for row in knn} == {N_TRAIN}
    assert all(len(answers) == N_TEST for _, answers in one.values())
    for ranks in (2, 3):
        assert evaluated(ranks, tmp_path) == one

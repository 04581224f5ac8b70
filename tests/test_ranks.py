"""`ssl-vit eval` on several processes, started as torchrun starts them: the same rows and answers as one process, to the last bit."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
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


def started(ranks: int, folder: Path, arguments: list[str]) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of all processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ssl_vit", "eval", "random:mae.yaml", *arguments]
    base = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(command, cwd=folder, env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def evaluated(ranks: int, folder: Path) -> dict[str, tuple[dict[str, Any], list[list[int]]]]:
    """Every row but for its seconds, and its predictions, by id."""
    arguments = ["--data", "./pictures", "--out", f"out{ranks}", "--protocols", "knn", "logreg", "tokens.yaml"]
    codes, outputs = started(ranks, folder, [*arguments, "--readouts", "cls", "gap", "cls+gap", "abmilp", "--controls", "width"])
    assert codes == [0] * ranks
    assert "rows: " in outputs[0]
    assert all("rows: " not in output for output in outputs[1:])  # one speaks for all
    found = {}
    for line in (folder / f"out{ranks}" / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        del row["seconds"]
        assert row["id"] not in found
        found[row["id"]] = (row, pq.read_table(folder / f"out{ranks}" / row["predictions"]).to_pandas().values.tolist())
    return found


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with pictures and a recipe."""
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
    return tmp_path


def test_two_and_three_processes_give_what_one_gives(pictures: Path) -> None:
    one = evaluated(1, pictures)
    assert len(one) == 2 * (3 + 3 + 2 + 1)  # metrics x (knn + logreg + their projections + attentive)
    knn = [row for row, _ in one.values() if row["protocol"] == "knn"]
    assert {row["bank"] for row in knn} == {N_TRAIN}
    assert all(len(answers) == N_TEST for _, answers in one.values())
    for ranks in (2, 3):
        assert evaluated(ranks, pictures) == one


def test_a_picture_that_one_process_cannot_read_ends_them_all(pictures: Path) -> None:
    shutil.copytree(pictures / "pictures", pictures / "damaged")
    file = sorted((pictures / "damaged" / "train").rglob("*.png"))[BATCH + 10]  # in the second batch, which the second process has
    file.write_bytes(file.read_bytes()[:60])
    arguments = ["--data", "./damaged", "./pictures", "--out", "out", "--protocols", "knn", "--readouts", "gap"]
    codes, outputs = started(2, pictures, arguments)
    assert codes == [1, 1]
    assert "random:mae on ./damaged is left out" in outputs[0]
    assert file.name in outputs[0]
    rows = [json.loads(line) for line in (pictures / "out" / "rows.jsonl").read_text().splitlines()]
    assert {row["dataset"] for row in rows} == {"pictures"}
    assert not list((pictures / "out" / "features").glob("*.partial"))

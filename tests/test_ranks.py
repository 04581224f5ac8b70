"""`ssl-vit eval` on several processes, started as torchrun starts them: the same rows and answers as one process, to the last bit."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from ssl_vit_eval.features.extract import BATCH
from ssl_vit_eval.probes import knn
from ssl_vit_eval.probes.neighbours import Vectors
from tests.conftest import BACKBONE, RECIPES
from tests.processes import ranks

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


def started(count: int, arguments: list[str], before: Callable[[], object] | None = None) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of all processes."""
    processes = ranks(count, "eval", "random:mae.yaml", *arguments, before=before)
    return [process.wait() for process in processes], [process.said for process in processes]


def evaluated(count: int) -> dict[str, tuple[dict[str, Any], list[list[int]]]]:
    """Every row but for its seconds, and its predictions, by id."""
    arguments = ["--data", "./pictures", "--out", f"out{count}", "--protocols", "knn", "logreg", "tokens.yaml"]
    codes, outputs = started(count, [*arguments, "--readouts", "cls", "gap", "cls+gap", "abmilp", "--controls", "width"])
    assert codes == [0] * count
    assert "rows: " in outputs[0]
    assert all("rows: " not in output for output in outputs[1:])  # one speaks for all
    found = {}
    for line in Path(f"out{count}", "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        del row["seconds"]
        assert row["id"] not in found
        found[row["id"]] = (row, pq.read_table(Path(f"out{count}", row["predictions"])).to_pandas().values.tolist())
    return found


@pytest.fixture(autouse=True)
def _pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and a recipe, in the current folder."""
    monkeypatch.chdir(tmp_path)
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


@pytest.mark.parametrize("count", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_several_processes_give_what_one_gives(count: int) -> None:
    one = evaluated(1)
    assert len(one) == 2 * (3 + 3 + 2 + 4)  # metrics x (knn + logreg + its controls + attentive)
    knn = [row for row, _ in one.values() if row["protocol"] == "knn"]
    assert {row["bank"] for row in knn} == {N_TRAIN}
    assert all(len(answers) == N_TEST for _, answers in one.values())
    assert evaluated(count) == one


def no_memory_for_cls_and_gap() -> None:
    """On the second process, where k-NN meets features of that width."""
    original = knn.neighbours

    def full(bank: Vectors, *rest: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if os.environ["RANK"] == "1" and bank.X.shape[1] == 2 * BACKBONE["width"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return original(bank, *rest)

    knn.neighbours = full


def test_what_one_process_cannot_do_fails_on_all_and_alone() -> None:
    """An image that it cannot read costs the dataset, a k-NN that its memory is too small for this k-NN."""
    shutil.copytree("pictures", "damaged")
    file = sorted(Path("damaged/train").rglob("*.png"))[BATCH + 10]  # in the second batch, which the second process has
    file.write_bytes(file.read_bytes()[:60])
    arguments = ["--data", "./damaged", "./pictures", "--out", "out", "--protocols", "knn", "--readouts", "cls+gap", "gap"]
    codes, outputs = started(2, arguments, no_memory_for_cls_and_gap)
    assert codes == [1, 1]
    assert "random:mae on ./damaged is left out" in outputs[0]
    assert file.name in outputs[0]
    rows = [json.loads(line) for line in Path("out/rows.jsonl").read_text().splitlines()]
    assert {(row["dataset"], row["read_with"]) for row in rows} == {("pictures", "gap")}
    assert (
        "random:mae on ./pictures is left out: 1 of 2 runs failed, the others are kept: memory ran out (CUDA out of memory)" in outputs[0]
    )
    assert not list(Path("out/features").glob("*.partial"))

"""Clocks that are wrong, are set back or forward: nothing is decided by the time of day."""

import os
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.cli import run
from ssl_vit.data import identity
from ssl_vit.data.sources import load_split
from ssl_vit.weights.checkpoint import read_checkpoint
from ssl_vit_eval.features.store import FeatureFile, FeatureKey, clear_abandoned
from tests.processes import Command
from tests.survival.test_signals import slow_down

CPU = ("--trainer.accelerator", "cpu")
DAY = 86400.0


def set_clock(seconds: float) -> None:
    """The time of day goes so much further, or back, at every look at it; steps are slow."""
    slow_down(0.1)
    looks = count()
    time.time = lambda: 1e9 + seconds * next(looks)


def back() -> None:
    set_clock(-DAY)


def forward() -> None:
    set_clock(DAY)


@pytest.mark.usefixtures("pictures_and_recipes")
@pytest.mark.parametrize("clock", [back, forward])
def test_checkpoints_come_as_often_as_ever(clock: Callable[[], None]) -> None:
    """One each 2 s, of about 20 steps: neither none nor one of each step."""
    command = ("pretrain", "mae.yaml", "--out", "run", *CPU, "--trainer.max_steps", "100000", "--checkpoint_seconds")
    process = Command(*command, "2", before=clock)
    process.wait_for("run/previous.ckpt")
    steps = [read_checkpoint(f"run/{name}.ckpt")["global_step"] for name in ("previous", "last")]
    assert process.wait(0) < 0  # killed
    assert steps[1] - steps[0] >= 2, steps
    assert steps[0] >= 2, steps


@pytest.mark.usefixtures("pictures_and_recipes")
def test_times_of_files_choose_no_checkpoint() -> None:
    """Written while the clock was ahead: the older ones seem the newest."""
    command = ["pretrain", "mae.yaml", *CPU, "--keep_every_epochs", "1", "--checkpoint_seconds", "1e-6", "--out", "run"]
    assert run(command) == 0
    now = time.time()
    for days, name in enumerate(("run.json", "last.ckpt", "previous.ckpt", "epoch-0002.ckpt", "epoch-0001.ckpt")):
        os.utime(f"run/{name}", (now, now + DAY * days))
    weights = read_checkpoint("run/last.ckpt")["state_dict"]
    assert run([*command, "--resume"]) == 0
    assert read_checkpoint("run/last.ckpt")["global_step"] == 7
    for damaged in ("last", "previous"):
        Path(f"run/{damaged}.ckpt").write_bytes(b"")
    assert run([*command, "--resume"]) == 0
    assert read_checkpoint("run/last.ckpt")["global_step"] == 7
    assert all(torch.equal(weights[key], value) for key, value in read_checkpoint("run/last.ckpt")["state_dict"].items())
    assert read_checkpoint("run/previous.ckpt")["global_step"] == 6  # it went on from epoch 2


def test_features_that_another_evaluation_is_writing_are_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this machine's clock is a year ahead of the file system's."""
    key = FeatureKey("network", "data", "train", "resize16", "", "cls", 2, 3)
    one = FeatureFile(tmp_path, key)
    now = time.time
    with one.writing():
        monkeypatch.setattr(time, "time", lambda: now() + 365 * DAY)
        clear_abandoned(tmp_path)
        one.write(0, torch.ones(2, 3))
    assert torch.equal(one.mapped(), torch.ones(2, 3))


@pytest.mark.usefixtures("own_cache")
def test_an_image_replaced_by_an_older_one_is_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes under the same name, and older than the newest: only its own time tells."""
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ssl_vit.data.memory_map.SMALL", 0)
    monkeypatch.setattr(identity, "HASHED_BYTES", 0)
    (tmp_path / "set").mkdir()
    for level in range(3):
        Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8)).save(tmp_path / f"set/{level}.bmp")
    assert load_split(str(tmp_path / "set"), "train", progress=False).images[1].unique().tolist() == [1]
    Image.fromarray(np.full((8, 8, 3), 77, dtype=np.uint8)).save(tmp_path / "set/1.bmp")
    os.utime(tmp_path / "set/1.bmp", (1, 1))
    assert load_split(str(tmp_path / "set"), "train", progress=False).images[1].unique().tolist() == [77]

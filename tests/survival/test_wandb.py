"""W&B away at the start, on the way and at the end, with the waiting times that a user gets: real processes, and a server that refuses
or, worse, accepts and never answers. Others that go wrong with it are in tests/test_tracking.py."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ssl_vit.cli import run
from ssl_vit.train.tracking import STEP
from ssl_vit.weights.checkpoint import read_checkpoint
from tests.fake_wandb import FakeWandb
from tests.processes import Command
from tests.survival.test_signals import slow_down

pytestmark = [pytest.mark.survival, pytest.mark.usefixtures("pictures_and_recipes")]
STEPS = 60
COMMAND = ["pretrain", "mae.yaml", "--trainer.accelerator", "cpu", "--trainer.max_steps", f"{STEPS}", "--trainer.log_every_n_steps", "1"]
COMMAND += ["--trainer.enable_progress_bar", "False", "--resume", "auto", "--out"]
SLACK = 15  # seconds, of a busy machine and of its imports


@contextlib.contextmanager
def gone(server: FakeWandb, kind: str) -> Iterator[None]:
    server.down()
    with socket.socket() as silent:
        if kind == "silent":
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            silent.bind(("127.0.0.1", server.port))
            silent.listen(100)
        yield
    server.up()


def slow_steps() -> None:
    slow_down(0.1)


def steps() -> int:
    file = Path("run/metrics.jsonl")
    return file.read_text().count("\n") if file.exists() else 0


def wait_for(process: Command, step: int) -> float:
    """Until this step is done; the time."""
    until = time.monotonic() + 120
    while steps() < step:
        assert process.running, process.said
        assert time.monotonic() < until, process.said
        time.sleep(0.02)
    return time.monotonic()


@pytest.mark.parametrize("kind", ["refuses", "silent"])
@pytest.mark.parametrize("moment", ["at the start", "on the way", "on the way, and killed", "at the end"])
def test_away(moment: str, kind: str) -> None:
    assert run([*COMMAND, "plain"]) == 0
    with FakeWandb() as server, contextlib.ExitStack() as away:
        if moment == "at the start":
            away.enter_context(gone(server, kind))
        begun = time.monotonic()
        process = Command(*COMMAND, "run", "--wandb", "readouts", before=slow_steps, **server.environment)
        first = wait_for(process, 1)
        if moment == "at the start":
            assert first - begun < 30 + SLACK
        else:
            wait_for(process, STEPS if moment == "at the end" else 20)
            away.enter_context(gone(server, kind))
        if moment == "on the way, and killed":
            wait_for(process, 40)
            process.send(signal.SIGKILL)
        else:
            trained = wait_for(process, STEPS)
            assert process.wait(60 + SLACK) == 0, process.said
            assert time.monotonic() - trained < 60 + SLACK
            (line,) = [line for line in process.said.splitlines() if line.startswith("W&B: ") and "http" not in line.split()[1]]
            assert line.startswith("W&B: offline (" if moment == "at the start" else "W&B: not all of run has arrived (")
        process.wait()
        away.close()  # it is there again
        if moment == "at the start":  # what lies offline is uploaded as the line says
            sync = f"{Path(sys.executable).parent}/{line[line.index('wandb sync') :]}"
            subprocess.run(sync, shell=True, check=True, capture_output=True, timeout=60, env={**os.environ, **server.environment})
        else:
            process = Command(*COMMAND, "run", "--wandb", "readouts", **server.environment)
            assert process.wait() == 0, process.said
        (tracked,) = server.runs.values()
        assert [line[STEP] for line in tracked.history] == list(range(1, STEPS + 1))
    one, other = (read_checkpoint(f"{folder}/last.ckpt")["state_dict"] for folder in ("plain", "run"))
    assert all(torch.equal(one[key], other[key]) for key in one)

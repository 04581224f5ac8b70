"""SIGKILLs of real processes at random moments: the run ends in the same weights, bit for bit, after the same samples in the same views.

A seed says which moments: SSL_VIT_SURVIVAL_SEED, 0 if it is not set."""

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_vit.methods import Method
from ssl_vit.weights.checkpoint import read_checkpoint
from tests.processes import Command, ranks

pytestmark = [pytest.mark.usefixtures("pictures_and_recipes"), pytest.mark.timeout(900)]
SEED = int(os.environ.get("SSL_VIT_SURVIVAL_SEED", "0"))
OPTIONS = ("--trainer.accelerator", "cpu", "--trainer.max_steps", "40", "--checkpoint_seconds", "0.15", "--backbone.drop_path", "0.2")


def watched(out: str) -> None:
    """From now on every step takes a while, and `OUT.RANK` gets a line of it: its number, its samples, and a hash of their views."""
    original = Method.on_train_batch_start

    def noted(self: Method, batch: Any, batch_idx: int) -> None:
        original(self, batch, batch_idx)
        views = self.views(batch)
        digest = hashlib.sha256(b"".join(view.numpy().tobytes() for view in (views if isinstance(views, tuple) else (views,))))
        with open(f"{out}.{self.global_rank}", "a") as file:
            file.write(f"{self.trainer.global_step} {batch.positions.tolist()} {digest.hexdigest()}\n")
        time.sleep(0.03)

    Method.on_train_batch_start = noted  # type: ignore[method-assign]


def seen(out: str, rank: int) -> list[str]:
    """What this rank trained on, step by step; what it trained on twice, because of a kill, was the same."""
    lines = {line for line in Path(f"{out}.{rank}").read_text().splitlines() if len(line.split()[-1]) == 64}  # a kill can cut one
    found = sorted(lines, key=lambda line: int(line.split()[0]))
    assert [int(line.split()[0]) for line in found] == list(range(40))
    return found


def everything(out: str) -> str:
    """A hash of all weights, moments and counts, the centre among them."""
    checkpoint, digest = read_checkpoint(f"{out}/last.ckpt"), hashlib.sha256()
    moments = {f"{index}.{key}": v for index, state in checkpoint["optimizer_states"][0]["state"].items() for key, v in state.items()}
    for key, value in sorted({**checkpoint["state_dict"], **moments}.items()):
        digest.update(key.encode() + torch.as_tensor(value).contiguous().numpy().tobytes())
    return digest.hexdigest()


def begin(count: int, out: str, *options: str) -> list[Command]:
    command = ("pretrain", *options, "--out", out, *OPTIONS, "--resume", "auto")
    before: Callable[[], object] = partial(watched, out)
    if count == 1:
        return [Command(*command, before=before)]
    return ranks(count, *command, "--trainer.devices", f"{count}", "--trainer.strategy", "ddp", before=before)


def uninterrupted(count: int, *options: str) -> float:
    """Seconds that it took, as `whole`."""
    Command("--version").wait()  # the server has imported what it needs
    begun = time.monotonic()
    assert [process.wait() for process in begin(count, "whole", *options)] == [0] * count
    return time.monotonic() - begun


def kill(times: int, count: int, seconds: float, *options: str) -> None:
    """So often, at moments of the time that a whole run takes, in each start that a kill has left something to do; then to the end."""
    moments, killed = random.Random(SEED), 0
    while killed < times:
        processes = begin(count, "cut", *options)
        time.sleep(moments.uniform(0.1, 0.8) * seconds)
        for process in processes:
            process.send(signal.SIGKILL) if process.running else None
        codes = {process.wait() for process in processes}
        assert codes <= {0, -signal.SIGKILL}, [process.said for process in processes]
        killed += codes == {-signal.SIGKILL}
        if Path("cut/run.json").exists() and killed < times:  # nothing is left to be killed at
            shutil.rmtree("cut")
    last = begin(count, "cut", *options)
    assert [process.wait() for process in last] == [0] * count, [process.said for process in last]


STREAM = ("--data.decode", "stream", "--data.workers")
ALL = [
    ("dino", 1, 20, (), ()),
    ("mae", 1, 10, (*STREAM, "0"), (*STREAM, "0")),
    ("dino", 1, 10, (*STREAM, "0"), (*STREAM, "1")),  # equal to a run without workers
    ("mae", 1, 10, (*STREAM, "0"), (*STREAM, "4")),
    ("dino", 2, 5, (), ()),
    ("mae", 2, 5, (*STREAM, "0"), (*STREAM, "1")),
]


@pytest.mark.survival  # tests/train/test_ranks_pretrain.py has a quick one
@pytest.mark.parametrize(("method", "count", "times", "whole", "cut"), ALL)
def test_killed_at_random_moments(method: str, count: int, times: int, whole: tuple[str, ...], cut: tuple[str, ...]) -> None:
    seconds = uninterrupted(count, f"{method}.yaml", *whole)
    kill(times, count, seconds, f"{method}.yaml", *cut)
    assert everything("cut") == everything("whole"), f"seed {SEED}"
    for rank in range(count):
        assert seen("cut", rank) == seen("whole", rank), f"seed {SEED}"

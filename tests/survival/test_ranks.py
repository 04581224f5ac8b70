"""One process of several fails: all of them end within a minute, with a code that is not 0, and the first error is shown."""

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ssl_vit.errors import Failure
from ssl_vit.methods import Method
from tests.processes import Command, ranks

pytestmark = pytest.mark.usefixtures("pictures_and_recipes")
TWO = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "100000")


def fail(rank: int, kind: str) -> None:
    """From now on step 4 fails on this rank."""
    original = Method.on_before_optimizer_step

    def failing(self: Method, optimizer: Any) -> None:
        if (self.global_rank, self.global_step) == (rank, 3):
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise Failure("the image of row 17 is odd") if kind == "one line" else ZeroDivisionError("of a kind that nobody expected")
        original(self, optimizer)

    Method.on_before_optimizer_step = failing  # type: ignore[method-assign]


ALL = [(rank, kind) for kind in ("one line", "any", "killed") for rank in (1, 0)]


@pytest.mark.parametrize(("rank", "kind"), [ALL[0], *(pytest.param(*case, marks=pytest.mark.survival) for case in ALL[1:])])
def test_a_rank_that_fails_ends_all(rank: int, kind: str) -> None:
    started = ranks(2, "pretrain", "mae.yaml", "--out", "run", *TWO, before=partial(fail, rank, kind))
    begun = time.monotonic()
    codes = [process.wait(90) for process in started]
    assert time.monotonic() - begun < 60 + 20  # to start
    assert codes[1 - rank] == 1
    assert codes[rank] == (-signal.SIGKILL if kind == "killed" else 1)
    last = {"one line": "the image of row 17 is odd", "any": "ZeroDivisionError: of a kind that nobody expected; --debug shows where"}
    if kind != "killed":
        assert started[rank].said.splitlines()[-1] == f"ssl-vit: {last[kind]}"
    other = started[1 - rank].said
    line = other.splitlines()[-1]
    assert line.startswith("ssl-vit: another process of this run has ended, or cannot be reached (")
    assert line.endswith("); what went wrong is said by it, or by the system's log")
    assert "Traceback" not in other


def differ() -> None:
    """By the headers that it reads, rank 0 has small images and rank 1 large ones."""
    import ssl_vit.data.stream as stream

    stream.mean_bytes = lambda *_: 2**40 * int(os.environ["RANK"])  # type: ignore[assignment]


@pytest.mark.survival
def test_ranks_that_read_other_headers_decode_in_one_way() -> None:
    started = ranks(2, "pretrain", "mae.yaml", "--out", "run", *TWO[:-1], "7", before=differ)
    assert [process.wait(60) for process in started] == [0, 0], [process.said for process in started]


def test_an_address_in_use_is_said_as_such() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        alone = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = Command("pretrain", "mae.yaml", "--out", "run", *TWO, **alone, TORCHELASTIC_RUN_ID="test", GROUP_RANK="0")
        assert process.wait(100) == 1
    assert "EADDRINUSE" in process.said.splitlines()[-1]
    assert "another process" not in process.said


SCRIPT = """
import os, sys
sys.path[:0] = {path!r}
from tests.survival.test_ranks import fail
fail({rank}, {kind!r})
from ssl_vit.cli import main
main()
"""


@pytest.mark.survival
@pytest.mark.parametrize("launcher", ["Lightning", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_launchers(launcher: str, rank: int) -> None:
    Path("failing.py").write_text(SCRIPT.format(path=sys.path, rank=rank, kind="one line"))
    before = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if launcher == "torchrun" else []
    command = [sys.executable, *before, "failing.py", "pretrain", "mae.yaml", "--out", "run", *TWO]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    begun = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - begun < 60 + 30
    assert done.returncode != 0
    assert "ssl-vit: the image of row 17 is odd" in done.stderr

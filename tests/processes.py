"""`ssl-vit` as processes of their own, forked from a server that has done the imports: these take ten seconds, and tests start many."""

import itertools
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

FORK = multiprocessing.get_context("forkserver")  # it has no thread; its environment is that of the first test that asks
FORK.set_forkserver_preload(
    ["ssl_vit.cli", "ssl_vit.train.pretrain", "ssl_vit_eval.study.run", "ssl_vit_eval.probes.online_knn", "datasets"]
)

THREADS = int(os.environ["OMP_NUM_THREADS"])  # of torch, in every process of the tests; conftest.py sets it

_numbers, begun = itertools.count(), list["Command"]()  # conftest.py ends those that a failed test has left


class Command:
    """`ssl-vit ARGUMENTS` in the current folder and environment, with `variables`; `before` is called first, in its process."""

    def __init__(self, *arguments: str, before: Callable[[], object] | None = None, **variables: str) -> None:
        self.log = Path(f"said-{next(_numbers)}").absolute()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
        self._process = FORK.Process(target=_run, args=(list(arguments), environment, Path.cwd(), self.log, before))
        self._process.start()
        begun.append(self)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    @property
    def said(self) -> str:
        """Its output, and its errors behind it."""
        return "".join(log.read_text() for stream in (1, 2) if (log := self.log.with_suffix(f".{stream}")).exists())

    def wait(self, seconds: float = 300) -> int:
        """Its exit code; it is killed where it takes longer."""
        self._process.join(seconds)
        self._process.kill()
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def wait_for(self, *files: str, seconds: float = 200) -> None:
        """Until there are these files, or it has ended."""
        until = time.monotonic() + seconds
        while self.running and not all(Path(file).exists() for file in files):
            assert time.monotonic() < until, self.said
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


def _run(arguments: list[str], environment: dict[str, str], folder: Path, log: Path, before: Callable[[], object] | None) -> None:
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from ssl_vit.cli import run

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(THREADS)
    multiprocessing.set_start_method("fork", force=True)  # of the data workers, as in a process of its own
    # Lightning reads the variable when it is imported
    rank_zero_only.rank = int(environment.get("RANK", environment.get("SLURM_PROCID", "0")))  # type: ignore[attr-defined]
    for stream in (1, 2):
        with log.with_suffix(f".{stream}").open("w") as said:
            os.dup2(said.fileno(), stream)
    if before is not None:
        before()
    sys.exit(run(arguments))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ranks(count: int, *arguments: str, before: Callable[[], object] | None = None) -> list[Command]:
    """The processes of one node, with what torchrun sets for them."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    return [Command(*arguments, before=before, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]

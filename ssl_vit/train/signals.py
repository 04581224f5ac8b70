"""What Ctrl-C and schedulers send to a run: noted when it comes, and answered at the end of the step, by all processes at the same one."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Trainer

from ssl_vit.errors import Failure, Interrupted, reason

LOOK_SECONDS = 1.0  # between two looks of a GPU at what the others were sent


class Signals:
    """`received`: the number of the first signal since `take`, 0 if there was none."""

    def __init__(self) -> None:
        self.received = 0
        self._all = set[int]()
        self._previous: dict[int, Any] = {}
        self._looked, self._next = (0, 0.0), 0

    def take(self, step: int) -> None:
        """From now on they are noted. Not those that are ignored, as under nohup, nor those that C code handles (None), which could not be
        given back; Python takes none outside of the main thread."""
        self._looked, self._next = (step, time.monotonic()), step
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            previous = signal.getsignal(number)
            # SIGUSR2 is submitit's, where it has a handler
            if previous not in (signal.SIG_IGN, None) and (number != signal.SIGUSR2 or callable(previous)):
                self._previous[number] = signal.signal(number, self._note)

    def give_back(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, frame: Any) -> None:
        self.received = self.received or number
        self._all.add(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once\n")  # print may be what was interrupted

    def agreed(self, trainer: Trainer, step: int, due: bool) -> tuple[int, bool]:
        """The signal to stop for, or 0, and whether a checkpoint is due for any process: the same answer on all of them.

        Asked after every step. Reading the others' waits for a GPU, so that several of them are asked about once a second."""
        if trainer.world_size == 1:
            return self.received, due
        if step < self._next:
            return 0, False
        device, now = trainer.strategy.root_device, time.monotonic()
        seconds = (now - self._looked[1]) / max(1, step - self._looked[0])
        found = torch.tensor([self.received, due, seconds], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        number, any_due, seconds = found.tolist()
        self._looked, self._next = (step, now), step + (1 if device.type == "cpu" else max(1, int(LOOK_SECONDS / max(seconds, 1e-3))))
        return int(number), bool(any_due)

    def leave(self, number: int, message: str) -> None:
        """Once the run is saved: submitit's handler puts its job back into the queue and ends the process; else Interrupted is raised.

        Its signal is looked for first: Slurm sends SIGTERM along with it, for which submitit has a handler that does nothing."""
        for sent in [own for own in (signal.SIGUSR2, signal.SIGUSR1) if own in self._all] + [number]:
            if callable(handler := self._previous.get(sent)) and handler is not signal.default_int_handler:
                handler(sent, None)
                break
        raise Interrupted(message, number)


@contextmanager
def told_of_lost_ranks() -> Iterator[None]:
    """One line where another process has ended: the one that says why is its own. What fails while the group is made, as an address in
    use, is this process's own, and passes."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)
        if not lost or not torch.distributed.is_initialized():
            raise
        said = "what went wrong is said by it, or by the system's log"
        raise Failure(f"another process of this run has ended, or cannot be reached ({reason(error)}); {said}") from error

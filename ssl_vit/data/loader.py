"""What a worker of the streaming loader does: read encoded images, decode them no larger than needed, and make their crops.

Everything is a function of (seed, position), as on the device: no worker has random numbers or an order of its own.
"""

import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from ssl_vit.data.images import decode, header_size
from ssl_vit.data.records import Records
from ssl_vit.data.rng import permutation
from ssl_vit.data.views import Crops, CropTensors
from ssl_vit.errors import Failure, UsageError

log = logging.getLogger(__name__)

# the run stops when more of the images than this cannot be read, and more than a few
MAX_CORRUPT, FEW_CORRUPT = 0.01, 3
_NEIGHBOURS = 100  # corrupt images one after the other that are skipped


def whole_batches(limit: int | float, per_epoch: int) -> int:
    """Lightning's reading of `limit_train_batches` and `overfit_batches`: a whole number above 1, or an int, counts; a share else."""
    return min(int(limit), per_epoch) if isinstance(limit, int) or limit > 1 else int(limit * per_epoch)


def batches_of_an_epoch(source: str, count: int, batch_size: int, limit: int | float) -> int:
    """Global batches that `count` images give under a limit; UsageError if there is none."""
    if batch_size > count:
        raise UsageError(f"data.batch_size is {batch_size}, but {source} holds {count} images; lower it")
    if (batches := whole_batches(limit, count // batch_size)) == 0:
        raise UsageError(f"trainer.limit_train_batches or overfit_batches {limit} is less than one batch; raise it")
    return batches


class Order:
    """Which image stands where: sample p of the stream is image `permutation(seed, p // m)[p % m]` of n, m those of whole batches."""

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
        limit: int | float = 1.0,
        repeat: bool = False,
    ) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.ranks, self.accumulate, self.share = rank, ranks, accumulate, batch_size // (ranks * accumulate)
        self.per_epoch = n // batch_size  # global batches, before the limit
        self.limit, self.repeat = whole_batches(limit, self.per_epoch), repeat
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def step(self, number: int) -> int:
        """The global batch of micro-batch `number`."""
        step = number // self.accumulate
        return step % self.limit if self.repeat else step

    def positions(self, number: int) -> Int64[Tensor, "b"]:
        """This rank's share of micro-batch `number`."""
        part = number % self.accumulate
        start = self.step(number) * self.batch_size + (part * self.ranks + self.rank) * self.share
        return torch.arange(start, start + self.share)

    def rows(self, positions: Int64[Tensor, "b"], skip: int = 0) -> Int64[Tensor, "b"]:
        """The images at positions of one epoch, or the ones `skip` places further in its order."""
        epoch = int(positions[0]) // (self.per_epoch * self.batch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, epoch, self.n)
        return self._order[(positions % (self.per_epoch * self.batch_size) + skip) % self.n]


class Corrupt:
    """The images that cannot be read and that the next one in the order of the epoch stands in for, wherever they are decoded."""

    def __init__(self, count: int, named: bool = True) -> None:
        """count: images of the split; named: whether this process tells the user."""
        self.count, self.named, self.rows = count, named, set[int]()

    def note(self, found: Sequence[tuple[int, str]], seen: int) -> None:
        """(row, reason) of images among the first `seen`: each is named once; Failure when there are too many of them, or nothing else.

        Before all images are seen, chance may have brought many early: the limit then lies three standard deviations higher, so that
        neither the order nor the number of ranks stops a run whose set is within it."""
        for row, reason in found:
            if row not in self.rows and self.named:
                log.warning("%s; the next image in the order stands in for it", reason)
            self.rows.add(row)
        seen = min(seen, self.count)
        allowed = MAX_CORRUPT * seen + 3 * math.sqrt(MAX_CORRUPT * seen) * (seen < self.count)
        if found and (len(self.rows) > max(FEW_CORRUPT, allowed) or len(self.rows) == self.count):
            bad = f"at least {len(self.rows)} of {seen} images cannot be read"
            raise Failure(f"{bad}, more than {MAX_CORRUPT:.0%}; the last one: {found[-1][1]}")


def available_cores() -> int:
    """Of this process; all of the machine where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begin_worker(worker: int) -> None:
    """What a scheduler or Ctrl-C sends to the group is the main process's to answer; workers end with it. Not by torch's own watch alone:
    a worker whose images fill the pipe that nobody reads any more would stay for ever."""
    for name in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    blocked = [signal.SIGTERM] if hasattr(signal, "sigtimedwait") else []  # from the main process it is torch's word to end
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    threading.Thread(target=end_with_main, args=(os.getppid(), blocked), daemon=True).start()


def end_with_main(parent: int, blocked: Sequence[signal.Signals] = ()) -> None:
    """End this process once the main one is gone, or sends one of the blocked signals.

    Its parent tells under fork, where a sibling keeps `is_alive` true; under forkserver, Python 3.14's default, the parent is a server
    that outlives the main process, and `is_alive` tells."""
    main = multiprocessing.parent_process()
    while os.getppid() == parent and (main is None or main.is_alive()):
        if not blocked:
            time.sleep(0.5)
        elif (told := signal.sigtimedwait(blocked, 0.5)) is not None and told.si_pid in (parent, main and main.pid):
            os._exit(0)
    os._exit(1)


@contextmanager
def told_of_lost_workers(taking: bool = True) -> Iterator[None]:
    """One line where the system ended a DataLoader worker; other errors pass. torch's signal handler raises wherever the main thread is.
    taking: images are being taken over from workers, so that a connection that breaks is theirs, and not that of a logger, say."""
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        lost = "DataLoader worker" in str(error) or (taking and not isinstance(error, RuntimeError))
        if isinstance(error, Failure) or not lost:
            raise
        # A killed process closes its connections before its SIGCHLD arrives: torch's handler would raise once more, amid the clean-up
        # after the first error. Without the handler torch still looks every few seconds.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        what = f"a data worker was ended by the system ({' '.join(str(error).split())})"
        raise Failure(f"{what}: out of memory? lower data.workers, and go on with --resume") from error


Cropped = tuple[CropTensors, Int64[Tensor, "b 2"], list[tuple[int, str]]]
"""What a worker makes of a micro-batch: the crops of the plan, the true sizes, and (row, reason) of images that others stand in for."""


class CropDataset(Dataset[Cropped | Failure]):
    """Micro-batches by number."""

    def __init__(self, records: Records, order: Order, plan: tuple[Crops, ...]) -> None:
        self.records, self.order, self.plan = records, order, plan

    def __getitem__(self, number: int) -> Cropped | Failure:
        """A Failure is returned, not raised: DataLoader would wrap it into a traceback."""
        try:
            return self.cropped(self.order.positions(number))
        except Failure as error:
            return error

    def cropped(self, positions: Int64[Tensor, "b"], skip: int = 0) -> Cropped:
        """The crops at `positions` of one epoch. An image that cannot be read is replaced by the next one in the epoch's order."""
        b, rows = len(positions), self.order.rows(positions, skip)
        found = self.records.readable_rows(rows.tolist())
        sizes = torch.ones(b, 2, dtype=torch.int64)
        for i, image in enumerate(found):
            try:
                if not isinstance(image, Failure):
                    sizes[i] = torch.tensor(header_size(image[1], image[0]))
            except Failure as error:
                found[i] = error
        crops = tuple(torch.empty(len(c.views), b, 3, c.size, c.size, dtype=torch.uint8) for c in self.plan)
        boxes = [c.boxes(sizes, positions, self.order.seed) for c in self.plan]
        for i, image in enumerate(found):
            wanted = [(box[:, i], flip[:, i], out[:, i]) for (box, flip), out in zip(boxes, crops, strict=True)]
            try:
                if not isinstance(image, Failure):
                    crop_image(image[1], image[0], sizes[i], wanted)
            except Failure as error:
                found[i] = error
        failed = [i for i, image in enumerate(found) if isinstance(image, Failure)]
        corrupt = [(int(rows[i]), str(found[i])) for i in failed]
        for i in failed:
            if skip + 1 >= min(self.order.n, _NEIGHBOURS):
                raise Failure(f"{skip + 1} images one after the other cannot be read, the last one: {corrupt[-1][1]}")
            other, size, more = self.cropped(positions[i : i + 1], skip + 1)
            sizes[i] = size[0]
            corrupt += more
            for out, made in zip(crops, other, strict=True):
                out[:, i] = made[:, 0]
        return crops, sizes, corrupt


def crop_image(
    data: bytes,
    name: str,
    size: Int64[Tensor, "2"],
    wanted: list[tuple[Int64[Tensor, "_ 4"], Bool[Tensor, "_"], UInt8[Tensor, "_ 3 _ _"]]],
) -> None:
    """Decode an image of upright `size` once, and write its crops: (boxes, whether flipped, where to). Raises Failure as `decode`.

    Antialiased bicubic, as on the device but for the rounding to 8 bits between the two directions. A JPEG is decoded at 1/2, 1/4 or
    1/8 where even the most magnified crop still has at least as many pixels as its view.
    """
    room = min(int(boxes[:, 2:].min()) / out.shape[-1] for boxes, _, out in wanted)
    image = decode(data, name, next((factor for factor in (8, 4, 2) if room >= factor), 1))
    factor = max(round(int(size[0]) / image.height), round(int(size[1]) / image.width))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    for boxes, flips, out in wanted:
        for (top, left, height, width), flip, target in zip(boxes.tolist(), flips.tolist(), out, strict=True):
            side = target.shape[-1]
            if factor == 1:
                region = pixels[:, :, top : top + height, left : left + width]
                crop = interpolate(region, (side, side), mode="bicubic", antialias=True)[0]
            else:  # a box between the pixels, which torch's function does not take
                box = tuple(edge / factor for edge in (left, top, left + width, top + height))
                crop = torch.from_numpy(np.array(image.resize((side, side), Image.Resampling.BICUBIC, box))).permute(2, 0, 1)
            target.copy_(crop.flip(-1) if flip else crop)

"""The pretraining data: an endless stream of global batches whose order is a function of (seed, step), from memory or from workers."""

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import lightning
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch.utils.data import DataLoader

from ssl_vit.data.identity import describe_change, identity
from ssl_vit.data.images import ImageStore
from ssl_vit.data.loader import (
    Corrupt,
    CropDataset,
    Cropped,
    Order,
    available_cores,
    batches_of_an_epoch,
    begin_worker,
    told_of_lost_workers,
)
from ssl_vit.data.records import Records
from ssl_vit.data.sources import load_records, load_split, mean_bytes, open_records
from ssl_vit.data.views import Batch
from ssl_vit.errors import Failure, UsageError, check_numbers, require

# Decoded bytes up to which `auto` decodes once. Not what a machine has free: crops of workers are rounded, so a recipe that streamed
# here and not there would be two.
MEMORY_LIMIT = 8 * 2**30


class Stream:
    """Endless micro-batches of images in memory, this rank's share of each; `len(stream)` an epoch.

    `Order` says which image meets which random numbers: neither the number of ranks nor a resume changes it.
    step: the first global batch. seconds: how long `next` has taken in all. replaced: images of this rank, consumed ones, that others
    stood in for. consumed: micro-batches. pin: hand out page-locked memory, from which a GPU copies while it computes.
    """

    def __init__(self, images: ImageStore, order: Order, step: int = 0, pin: bool = False) -> None:
        self._begin(order, step)
        self.images, self.pin = images, pin

    def _begin(self, order: Order, step: int) -> None:
        self.order, self.consumed, self.seconds, self.replaced = order, step * order.accumulate, 0.0, 0
        self.pin = False  # unless `Stream` is asked to; workers are ahead by themselves

    def __len__(self) -> int:
        return self.order.limit * self.order.accumulate

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as thread:
            coming = None
            while True:
                begin = time.perf_counter()
                batch, replaced = coming.result() if coming else self.batch(self.consumed)
                self.consumed, self.replaced = self.consumed + 1, self.replaced + replaced
                if self.pin:  # the next ones are put together while the GPU computes; on a CPU both would share the cores
                    coming = thread.submit(self.batch, self.consumed)
                self.seconds += time.perf_counter() - begin
                yield batch

    def batch(self, number: int) -> tuple[Batch, int]:
        """Micro-batch `number` of the stream, and for how many of its images others stand in."""
        positions = self.order.positions(number)
        rows, skip, replaced = self.order.rows(positions), 0, 0
        while (corrupt := (self.images.sizes[rows] == 0).any(dim=1)).any():  # the next in the order, as `CropDataset.cropped` takes it
            skip += 1
            replaced += int(corrupt.sum())
            rows = torch.where(corrupt, self.order.rows(positions, skip), rows)
        tensors = (*self.images.batch(rows), positions)
        images, sizes, positions = (tensor.pin_memory() for tensor in tensors) if self.pin else tensors
        return Batch(images, sizes, positions, self.order.step(number)), replaced

    def state_dict(self) -> dict[str, int]:
        """Nothing: the Trainer's step says where the stream stands. Lightning takes a loader without it for one that cannot go on."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class WorkerStream(Stream):
    """The same stream of images that are read, decoded and cropped by `workers` processes as they are needed (0: by this one)."""

    def __init__(self, dataset: CropDataset, workers: int, pin: bool = False, step: int = 0) -> None:
        self._begin(dataset.order, step)
        self._corrupt, self._seen = Corrupt(dataset.order.n), 0
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=itertools.count(self.consumed),  # they go on over the ends of epochs
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=begin_worker,
        )
        self._made: Iterator[Cropped | Failure] | None = None
        self._next: int | None = self.consumed  # what the workers give next; None once they are ended

    def batch(self, number: int) -> tuple[Batch, int]:
        """In order; RuntimeError else. UsageError and Failure in one line: of the images, and for a worker that the system ended."""
        if number != self._next:
            raise RuntimeError(f"micro-batch {number} is asked of workers whose next one is {self._next}")
        self._next += 1
        if self._made is None:
            self._made = iter(self._loader)
        with told_of_lost_workers():
            made = next(self._made)
        if isinstance(made, Failure):
            raise made
        crops, sizes, listed = made  # DataLoader makes lists of its tuples
        corrupt = [(row, reason) for row, reason in listed]
        self._seen += self.order.share
        self._corrupt.note(corrupt, self._seen)
        no_images = torch.empty(len(sizes), 3, 0, 0, dtype=torch.uint8)
        return Batch(no_images, sizes, self.order.positions(number), self.order.step(number), tuple(crops)), len(corrupt)

    def close(self) -> None:
        """End the workers."""
        self._made, self._next = iter(()), None


class ImageData(lightning.LightningDataModule):
    """Images for pretraining; labels are never read.

    Args:
        source: a Hugging Face dataset id, a local imagefolder, Parquet or Arrow folder, or builtin:NAME.
        batch_size: images in a global batch, over all devices.
        split: which split to train on.
        image_column: the column that holds the images; found by its type if not given.
        max_side: images whose shorter side is longer are stored at this one, in pixels, and of a panorama the middle, 4 times as long;
            those that are streamed are cropped as they are.
        decode: memory (decoded once, into a file; cropped on the device), stream (decoded and cropped by workers each time), or auto:
            memory for up to 8 GiB of decoded images, on every machine.
        workers: processes per device that decode when streaming; by default the cores of the device, at most 8. 0: none.
        seed: of the order.
    """

    def __init__(
        self,
        source: str,
        batch_size: int = 256,
        split: str = "train",
        image_column: str | None = None,
        max_side: int = 512,
        decode: Literal["auto", "memory", "stream"] = "auto",
        workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_numbers("data.", locals(), batch_size=PositiveInt, max_side=PositiveInt, workers=NonNegativeInt)
        self.source, self.batch_size, self.split = source, batch_size, split
        self.image_column, self.max_side, self.seed = image_column, max_side, seed
        self.decode, self.workers = decode, workers
        self.images: ImageStore | None = None
        self.records: Records | None = None
        self.identity: dict[str, Any] = {}
        self.streams: list[WorkerStream] = []
        self.limit: int | float = 1.0  # of `Order`, as is `repeat`
        self.repeat = False

    def setup(self, stage: str) -> None:
        """Open the split and, unless it is streamed, decode it."""
        assert self.trainer is not None
        if self.images is not None or self.records is not None:
            return
        module: Any = self.trainer.lightning_module
        decode, main, embedded = self.decode, self.trainer.is_global_zero, self.source.startswith("builtin:")
        streams = bool(module.crop_plan) and not embedded
        require(decode != "stream" or streams, "data.decode", decode, "memory for this method and source")
        if embedded:
            loaded = load_split(self.source, self.split, max_side=self.max_side)
            batches_of_an_epoch(self.source, len(loaded.images), self.batch_size, self.limit)
        else:
            rows = open_records(self.source, self.split, self.image_column)
            batches_of_an_epoch(self.source, len(rows.table), self.batch_size, self.limit)  # before any is decoded
            if decode == "auto":
                small = not streams or len(rows.table) * mean_bytes(rows, self.max_side) <= MEMORY_LIMIT
                decode = self.trainer.strategy.broadcast("memory" if small else "stream")  # a header may be unreadable on one machine
            if decode == "stream":
                self.records = rows
                found = identity(rows)[0] if main else {}  # one process reads or lists the files
                self.identity = self.trainer.strategy.broadcast(found)
                return
            loaded = load_records(rows, self.max_side, progress=main)
        self.images, self.identity = loaded.images, loaded.identity

    @property
    def count(self) -> int:
        """Images of the split, once `setup` has opened it."""
        return len(self.images) if self.images is not None else len(self.records.table)  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        return {"identity": self.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a checkpoint, called once the data are there; UsageError if the run was trained on others."""
        if change := describe_change(state_dict["identity"], self.identity):
            raise UsageError(f"cannot resume on other data: {self.source} changed ({change}); restore it, or start anew with another --out")

    def train_dataloader(self) -> Stream:
        assert self.trainer is not None
        trainer: Any = self.trainer  # here its step is already that of the checkpoint
        ranks, parts = (trainer.global_rank, trainer.world_size), trainer.accumulate_grad_batches
        order = Order(self.count, self.batch_size, self.seed, *ranks, parts, self.limit, self.repeat)
        pin = trainer.strategy.root_device.type == "cuda"
        if self.records is None:
            assert self.images is not None
            return Stream(self.images, order, trainer.global_step, pin)
        dataset = CropDataset(self.records, order, trainer.lightning_module.crop_plan)
        # a Slurm task is bound to the cores of its own device; other launchers share those of the machine
        environment = getattr(trainer.strategy, "cluster_environment", None)  # a single device has none
        sharing = 1 if isinstance(environment, SLURMEnvironment) else trainer.num_devices
        workers = min(8, available_cores() // sharing) if self.workers is None else self.workers
        self.streams.append(WorkerStream(dataset, workers, pin, trainer.global_step))
        return self.streams[-1]

    def teardown(self, stage: str) -> None:
        for stream in self.streams:
            stream.close()

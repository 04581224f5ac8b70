"""The pretraining data: decoded pictures in memory, and an endless stream of global batches whose order is a function of (seed, step)."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import lightning
import torch
from jaxtyping import Int64, UInt8
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ssl_vit.data.images import ImageStore
from ssl_vit.data.rng import permutation
from ssl_vit.data.sources import load_split
from ssl_vit.errors import UsageError, require


class Batch(NamedTuple):
    """One rank's share of a global batch, as decoded: padded to the largest picture, with the true sizes."""

    images: UInt8[Tensor, "b 3 h w"]
    sizes: Int64[Tensor, "b 2"]
    positions: Int64[Tensor, "b"]  # in the stream of samples; what every random number is drawn from
    step: int  # of the global batch, the same on all ranks


class Stream:
    """Endless global batches, this rank's share of each, in `accumulate` micro-batches; an epoch has `len(stream)` micro-batches.

    Sample p of the stream is picture `permutation(seed, p // n)[p % n]`, with n the pictures of an epoch (whole global batches).
    So neither the number of ranks nor a resume changes which picture meets which random numbers.
    step: the first global batch. limit: global batches of an epoch, or the share of them; what is left out comes in the next one.
    repeat: the same first `limit` batches in every epoch. seconds: how long `next` has taken in all.
    """

    def __init__(
        self,
        images: ImageStore,
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
        step: int = 0,
        limit: int | float = 1.0,
        repeat: bool = False,
    ) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.ranks, self.accumulate, self.share = rank, ranks, accumulate, batch_size // (ranks * accumulate)
        self.per_epoch = len(images) // batch_size  # global batches, before the limit
        self.limit, self.repeat = whole_batches(limit, self.per_epoch), repeat
        self.given = step * accumulate  # micro-batches
        self.seconds = 0.0

    def __len__(self) -> int:
        return self.limit * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        ordered, order = -1, torch.empty(0, dtype=torch.int64)
        while True:
            begin = time.perf_counter()
            step, part = divmod(self.given, self.accumulate)
            step = step % self.limit if self.repeat else step
            epoch, number = divmod(step, self.per_epoch)
            if epoch != ordered:
                ordered, order = epoch, permutation(self.seed, epoch, len(self.images))
            start = number * self.batch_size + (part * self.ranks + self.rank) * self.share
            inside = torch.arange(start, start + self.share)
            images, sizes = self.images.batch(order[inside])
            self.given += 1
            self.seconds += time.perf_counter() - begin
            yield Batch(images, sizes, inside + epoch * self.per_epoch * self.batch_size, step)

    def state_dict(self) -> dict[str, int]:
        """Nothing: the Trainer's step says where the stream stands. Lightning takes a loader without it for one that cannot go on."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def whole_batches(limit: int | float, per_epoch: int) -> int:
    """Lightning's reading of `limit_train_batches` and `overfit_batches`: a whole number above 1, or an int, counts; a share else."""
    return min(int(limit), per_epoch) if isinstance(limit, int) or limit > 1 else int(limit * per_epoch)


class ImageData(lightning.LightningDataModule):
    """Pictures for pretraining, decoded once; labels are never read.

    Args:
        source: a Hugging Face dataset id, a local imagefolder, Parquet or Arrow folder, or builtin:NAME.
        batch_size: images in a global batch, over all devices.
        split: which split to train on.
        image_column: the column that holds the pictures; found by its type if not given.
        max_side: pictures whose shorter side is longer are stored at this one, in pixels.
        seed: of the order.
    """

    def __init__(
        self,
        source: str,
        batch_size: int = 256,
        split: str = "train",
        image_column: str | None = None,
        max_side: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require(batch_size > 0, "data.batch_size", batch_size, "above 0")
        require(max_side > 0, "data.max_side", max_side, "above 0")
        self.source, self.batch_size, self.split = source, batch_size, split
        self.image_column, self.max_side, self.seed = image_column, max_side, seed
        self.images: ImageStore | None = None
        self.limit: int | float = 1.0  # of `Stream`, as is `repeat`
        self.repeat = False

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        if self.images is None:
            progress = self.trainer.is_global_zero
            loaded = load_split(self.source, self.split, image_column=self.image_column, max_side=self.max_side, progress=progress)
            self.images = loaded.images
            for notice in loaded.notices:
                rank_zero_info(notice)
        if self.batch_size > len(self.images):
            raise UsageError(f"data.batch_size is {self.batch_size}, but {self.source} holds {len(self.images)} pictures; lower it")
        if whole_batches(self.limit, len(self.images) // self.batch_size) == 0:
            raise UsageError(f"trainer.limit_train_batches or overfit_batches {self.limit} is less than one batch; raise it")

    def train_dataloader(self) -> Stream:
        assert self.images is not None
        assert self.trainer is not None
        trainer = self.trainer  # here its step is already that of the checkpoint
        ranks, parts = (trainer.global_rank, trainer.world_size), trainer.accumulate_grad_batches
        return Stream(self.images, self.batch_size, self.seed, *ranks, parts, trainer.global_step, self.limit, self.repeat)

"""The pretraining data: decoded pictures in memory, and an endless stream of global batches whose order is a function of (seed, step)."""

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
    """Endless global batches, this rank's share of each; an epoch has `len(stream)` of them.

    Sample p of the stream is picture `permutation(seed, p // n)[p % n]`, with n the pictures of an epoch (whole global batches).
    So neither the number of ranks nor a resume changes which picture meets which random numbers.
    Lightning saves and restores `state_dict`, the step that comes next.
    """

    def __init__(self, images: ImageStore, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.share = rank, batch_size // ranks
        self.step = 0

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        ordered, order = -1, torch.empty(0, dtype=torch.int64)
        while True:
            epoch, number = divmod(self.step, len(self))
            if epoch != ordered:
                ordered, order = epoch, permutation(self.seed, epoch, len(self.images))
            start = number * self.batch_size + self.rank * self.share
            inside = torch.arange(start, start + self.share)
            images, sizes = self.images.batch(order[inside])
            self.step += 1
            yield Batch(images, sizes, inside + epoch * len(self) * self.batch_size, self.step - 1)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


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

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        if self.batch_size % self.trainer.world_size:
            raise UsageError(f"data.batch_size {self.batch_size} is not divisible by {self.trainer.world_size} devices; change one of them")
        if self.images is None:
            progress = self.trainer.is_global_zero
            loaded = load_split(self.source, self.split, image_column=self.image_column, max_side=self.max_side, progress=progress)
            self.images = loaded.images
            for notice in loaded.notices:
                rank_zero_info(notice)
        if self.batch_size > len(self.images):
            raise UsageError(f"data.batch_size is {self.batch_size}, but {self.source} holds {len(self.images)} pictures; lower it")

    def train_dataloader(self) -> Stream:
        assert self.images is not None
        assert self.trainer is not None
        return Stream(self.images, self.batch_size, self.seed, self.trainer.global_rank, self.trainer.world_size)

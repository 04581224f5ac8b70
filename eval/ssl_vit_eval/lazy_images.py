"""Images that are decoded when they are asked for, so that evaluation needs no more memory for a larger dataset."""

import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, center_crop, resize

from ssl_vit.data.images import ImageStore, decode, to_tensor
from ssl_vit.errors import Failure, require
from ssl_vit_eval.memory import available_memory

Crop = float | Literal["squash"]
CROP = 224 / 256

# the decoded images of a split are kept if they need at most this share of the memory that is available
MEMORY_SHARE = 0.25
_THREADS = min(8, os.cpu_count() or 1)
_ROWS = 64  # encoded images held at once: a photograph may have 10 MB
_NAMED = 5  # unreadable images in an error; the others are counted,
_SECONDS = 60  # as many as are found in that time

Named = tuple[str, bytes | Image.Image]
"""What errors call an image, and the image itself, encoded or not."""


@dataclass(frozen=True)
class EvalTransform:
    """How an image is brought to a model's size: bicubic with antialiasing on 8-bit pixels, then a centre crop.

    The default is that of DINO's evaluation (Caron et al. 2021, official k-NN and linear protocols). An image that has the model's
    size passes unchanged, whatever the crop.

    Args:
        size: side in px.
        crop: share of the shorter side that the centre crop keeps, above 0 and up to 1; "squash" resizes both sides to `size` and cuts
            nothing off, for datasets whose objects touch the border. UsageError for anything else.
    """

    size: int
    crop: Crop = CROP

    def __post_init__(self) -> None:
        require(self.size > 0, "image_size", self.size, "above 0")
        require(self.crop == "squash" or 0 < self.crop <= 1, "crop", self.crop, 'above 0 and at most 1, or "squash"')

    @property
    def name(self) -> str:
        """What a row calls it: resize224 for the default crop, resize224-crop100, squash224."""
        if self.crop == "squash":
            return f"squash{self.size}"
        return f"resize{self.size}" + ("" if self.crop == CROP else f"-crop{100 * self.crop:g}")

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.size == (self.size, self.size):
            return image
        if self.crop == "squash":
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        image = center_crop(resize(image, round(self.size / self.crop), InterpolationMode.BICUBIC), [self.size, self.size])
        return image


class EncodedImages(ImageStore):
    """The images of a split at one size, [n 3 s s]: read, decoded and transformed when asked for, by a few threads.

    Once decoded they are kept, where all of the split fits in `MEMORY_SHARE`; else they are decoded each time. A corrupt image is
    found when it is asked for: `batch` then raises the Failure of `decode`, which names it; where a minute finds several in the split, one
    that counts them and names the first.
    """

    def __init__(self, read: Callable[[Sequence[int]], Sequence[Named]], count: int, transform: EvalTransform) -> None:
        """`read` gives the images of some rows, in their order; `count` is n."""
        self.sizes = torch.full((count, 2), transform.size)
        self._read, self._transform = read, transform
        self._is_kept = torch.zeros(count, dtype=torch.bool)
        self._bad: tuple[list[str], int] | None = None  # once there was one: what `_unreadable` found, for those who ask again

    def __getitem__(self, index: int) -> UInt8[Tensor, "3 s s"]:
        return self.batch(torch.tensor([index]))[0][0]

    def batch(self, indices: Int64[Tensor, "b"]) -> tuple[UInt8[Tensor, "b 3 s s"], Int64[Tensor, "b 2"]]:
        """The images `indices`, and their (height, width), which is s everywhere."""
        if self._kept is None:
            return self._decoded(indices), self.sizes[indices]
        missing = torch.unique(indices[~self._is_kept[indices]])
        self._kept[missing] = self._decoded(missing)
        self._is_kept[missing] = True
        return self._kept[indices], self.sizes[indices]

    @cached_property
    def _kept(self) -> UInt8[Tensor, "n 3 s s"] | None:
        """The place of the decoded images; the system commits its pages as they are written."""
        shape = (len(self), 3, self._transform.size, self._transform.size)
        return torch.empty(shape, dtype=torch.uint8) if math.prod(shape) <= MEMORY_SHARE * available_memory() else None

    def _decoded(self, rows: Int64[Tensor, "b"]) -> UInt8[Tensor, "b 3 s s"]:
        images = torch.empty(len(rows), 3, self._transform.size, self._transform.size, dtype=torch.uint8)
        # `decode` silences PIL for a moment; threads that do so at the same time would leave the filters as they found each other's
        with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
            warnings.simplefilter("ignore")
            try:
                for start in range(0, len(rows), _ROWS):
                    encoded = self._read(rows[start : start + _ROWS].tolist())
                    for place, image in enumerate(pool.map(self._one, encoded), start):
                        images[place] = image
            except Failure as error:
                self._bad = found, seen = self._bad or self._unreadable(pool)
                bad = list(dict.fromkeys([str(error), *found]))
                if len(bad) == 1:
                    raise
                some = "; ".join(bad[:_NAMED]) + (f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
                least = "at least " * (seen < len(self))
                raise Failure(f"{least}{len(bad)} of {len(self):,} images cannot be read: {some}") from error
        return images

    def _one(self, named: Named) -> UInt8[Tensor, "3 s s"]:
        name, data = named
        return to_tensor(self._transform(decode(data, name)))

    def _unreadable(self, pool: ThreadPoolExecutor) -> tuple[list[str], int]:
        """What is wrong with each image that cannot be read, of how many that a minute could decode: else a user meets them one by one."""

        def failure(named: Named | Failure) -> Failure | None:
            if not isinstance(named, Failure):
                try:
                    self._one(named)
                except Failure as error:
                    return error
                return None
            return named

        def read(row: int) -> Named | Failure:
            try:
                return self._read([row])[0]
            except Failure as error:
                return error

        bad, until = list[str](), time.monotonic() + _SECONDS
        for start in range(0, len(self), _ROWS):
            chunk = range(start, min(start + _ROWS, len(self)))
            bad += [str(error) for error in pool.map(failure, [read(row) for row in chunk]) if error]
            if time.monotonic() > until:
                break
        return bad, chunk.stop

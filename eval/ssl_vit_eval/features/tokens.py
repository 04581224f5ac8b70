"""The tokens of every image of a split, for probes that learn their readout: from a cache on disk, or from the backbone each time."""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Float16, Float32, Int64
from torch import Tensor
from tqdm import tqdm

from ssl_vit.data.images import ImageStore
from ssl_vit.data.transforms import normalise
from ssl_vit.errors import Failure
from ssl_vit.model.backbone import Backbone
from ssl_vit.model.tokens import Tokens
from ssl_vit_eval.distributed import agreed, device, gather_objects, parts, rank
from ssl_vit_eval.features.extract import BATCH
from ssl_vit_eval.features.store import FeatureFile, FeatureKey, clear_abandoned
from ssl_vit_eval.sources import Source

_LARGEST = 65504  # of float16


class TokenReader:
    """The tokens of a split: from numbers mapped from disk, read image by image, or of the backbone, which then runs at every batch.

    `batch(indices)` gives float32 Tokens of these images on the device, without gradient; so does its final norm.
    """

    def __init__(
        self, backbone: Backbone, images: ImageStore, blocks: Sequence[int], packed: Float16[Tensor, "n numbers"] | None = None
    ) -> None:
        """blocks: which blocks to keep, negative from the last. packed: what `pack` made of their sequences; None for datasets whose cache
        would be too large. The backbone is moved to the device and must be in evaluation mode."""
        self._backbone, self._images, self.packed = backbone.to(device()), images, packed
        self.blocks = tuple(sorted({block % backbone.depth for block in blocks}))
        self.width, self.depth = backbone.width, backbone.depth
        self.cls_tokens, self.registers = backbone.cls_tokens, backbone.registers
        self.norm = copy.deepcopy(backbone.norm).requires_grad_(False)

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Int64[Tensor, "b"]) -> Tokens:
        # what is not cached is rounded as the cache rounds, so that the room on the disk does not change a number
        packed = pack(self.sequences(indices)) if self.packed is None else self.packed[indices].to(device())
        return self.named(unpack(packed, len(self.blocks), self.width))

    @torch.no_grad()
    def sequences(self, indices: Int64[Tensor, "b"]) -> Float[Tensor, "b blocks l d"]:
        """Class tokens, registers and patches one after the other, for each block; Failure for an image that gives no finite numbers."""
        pixels, _ = self._images.batch(indices)
        x = normalise(pixels.to(device()).float() / 255, self._backbone.mean, self._backbone.std)
        tokens = self._backbone(x, blocks=self.blocks)
        kept = [tokens.at(block) for block in self.blocks]
        sequences = torch.stack([torch.cat([part.cls, part.registers, part.patches], dim=1) for part in kept], dim=1).float()
        bad = (~torch.isfinite(sequences)).flatten(1).any(dim=1).nonzero()
        if len(bad):
            raise Failure(f"image {int(indices[bad[0]])} gives tokens that are not finite; look at the image and the weights")
        return sequences

    def named(self, sequences: Float[Tensor, "b blocks l d"]) -> Tokens:
        first, rest = self.cls_tokens, self.cls_tokens + self.registers
        found = {
            block: Tokens(x[:, :first], x[:, first:rest], x[:, rest:], self.norm, block, self.depth)
            for block, x in zip(self.blocks, sequences.unbind(dim=1), strict=True)
        }
        deepest = found.pop(self.blocks[-1])
        return Tokens(deepest.cls, deepest.registers, deepest.patches, self.norm, deepest.block, self.depth, others=found)


def open_tokens(source: Source, images: ImageStore, blocks: Sequence[int], folder: Path, key: str, limit: int | None = None) -> TokenReader:
    """The tokens of a split from `folder`, written there first if they are not; streamed if they take more than `limit` bytes.

    key: names the weights, the images and their transform. limit: None for half of the free disk. Called by every process: they share
    the folder and divide the pass. Failure for tokens that are not finite.
    """
    assert source.backbone is not None
    with agreed():  # memory may run out on one process alone
        reader = TokenReader(source.backbone, images, blocks)
        first = reader.sequences(torch.zeros(1, dtype=torch.int64))
    spec = "tokens@" + ",".join(map(str, reader.blocks))
    normalisation = f"{source.backbone.mean} {source.backbone.std}"
    fields = (source.weights, key, "", "", normalisation, spec, len(images), pack(first).shape[1])
    file = FeatureFile(folder, FeatureKey(*fields, dtype="float16"))
    folder.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(folder).free // 2 if limit is None else limit
    # the first process decides: disks may differ
    there, fits = gather_objects((rank() == 0 and file.is_whole(), file.size <= room))[0]
    if not there and not fits:
        return reader
    if not there:
        if rank() == 0:
            clear_abandoned(folder)
        ranges = list(parts(len(images), BATCH))
        with file.writing(), agreed():
            for start, end in tqdm(ranges, f"{source.name}: tokens", leave=False, unit="batch", disable=True if rank() else None):
                file.write(start, pack(reader.sequences(torch.arange(start, end))).cpu())
    with agreed():
        reader.packed = file.mapped()
    return reader


def pack(sequences: Float[Tensor, "b blocks l d"]) -> Float16[Tensor, "b numbers"]:
    """Rows of float16. An image that exceeds float16 (massive activations reach beyond before the final norm) is divided by a power of
    two, which stands in front."""
    x = sequences.flatten(1)
    power = (x.abs().amax(dim=1, keepdim=True) / _LARGEST).log2().ceil().clamp(min=0)
    return torch.cat([power, x * 2.0**-power], dim=1).half()


def unpack(packed: Float16[Tensor, "b numbers"], blocks: int, width: int) -> Float32[Tensor, "b blocks l d"]:
    """What was packed, to float16's precision."""
    numbers = packed.float()
    return (numbers[:, 1:] * 2.0 ** numbers[:, :1]).view(len(numbers), blocks, -1, width)

"""Images of every kind become correct RGB uint8, and those of a split are held decoded in memory.

Rules: EXIF orientation is applied; transparency is composited on white; of an animation the first frame is taken; grey of 16 bits is
scaled to 8; floating-point grey is scaled by 255 when within 0 ... 1 and kept when within 0 ... 255; grey beyond these ranges is
stretched from its own minimum ... maximum.
"""

import io
import warnings
from contextlib import suppress

import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt8
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, resize

from ssl_vit.errors import Failure, reason

# PIL's own warning level; above it a file of a few kilobytes may decode to gigabytes
MAX_PIXELS = 1024**3 // 4 // 3
# the rest of PIL's formats are no sets of images, and one of them (EPS) starts an interpreter
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000")
EXTENSIONS = frozenset([".jpg", ".jpeg", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pbm", ".jp2"])

LONGEST = 4  # how many times `max_side` the longer side of a stored image may have


def decode(image: bytes | Image.Image, name: str = "image", reduction: int = 1) -> Image.Image:
    """Encoded bytes or a PIL image of any mode -> an upright PIL image of mode RGB.

    reduction: by how much (1, 2, 4, 8) a JPEG is decoded smaller, sides rounded up; other formats stay whole. `name` says in errors
    which image it is. Raises Failure for an empty, truncated or corrupt image, for what is no image, and, from its header alone, for
    one of more than `MAX_PIXELS` pixels.
    """
    # PIL's warnings are about large images (refused here) and unreadable EXIF blocks (such an image counts as upright)
    with warnings.catch_warnings(action="ignore"):
        opened = _opened(image, name)
        try:
            if reduction > 1:
                opened.draft(None, (max(opened.width // reduction, 1), max(opened.height // reduction, 1)))
            opened.load()
            upright = opened
            with suppress(Exception):  # an unreadable EXIF block names no orientation
                upright = ImageOps.exif_transpose(opened)
            return _rgb(upright)
        # a damaged file makes PIL raise OSError, SyntaxError, ValueError, struct.error, ..., each format its own
        except Exception as error:
            raise Failure(f"{name} is corrupt: {reason(error)}; remove or replace it") from error


def header_size(image: bytes | Image.Image, name: str = "image") -> tuple[int, int]:
    """(height, width) after EXIF orientation, by the header alone; raises Failure as `decode` does."""
    with warnings.catch_warnings(action="ignore"):
        opened = _opened(image, name)
        try:
            # of a TIFF, PIL's size is upright already
            turned = opened.format != "TIFF" and opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        except Exception:  # an unreadable EXIF block names no orientation
            turned = False
    return (opened.width, opened.height) if turned else (opened.height, opened.width)


def to_tensor(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """An RGB PIL image as a contiguous tensor."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def limit_side(image: Image.Image, max_side: int) -> Image.Image:
    """An image whose shorter side is at most `max_side` px: reduced (bicubic, antialiased) if it was longer, else unchanged. Of a longer
    side the middle `LONGEST * max_side` px stay: a batch is padded to its largest image, and one panorama would fill the memory."""
    image = resize(image, max_side, InterpolationMode.BICUBIC) if min(image.size) > max_side else image
    width, height = (min(side, LONGEST * max_side) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class ImageStore:
    """The decoded images of a split: one flat buffer of [3 h w] one after the other, and their sizes.

    Images of one size are a view of that buffer as [n 3 h w].
    """

    def __init__(self, pixels: UInt8[Tensor, "bytes"], sizes: Int64[Tensor, "n 2"]) -> None:
        """`sizes` are (height, width) in px."""
        self.sizes = sizes
        self._pixels = pixels
        self._ends = (3 * sizes.prod(dim=1)).cumsum(dim=0)
        uniform = len(sizes) > 0 and bool((sizes == sizes[0]).all())
        self._stack = pixels.view(len(sizes), 3, *sizes[0].tolist()) if uniform else None

    @classmethod
    def stacked(cls, images: UInt8[Tensor, "n 3 h w"]) -> "ImageStore":
        """The store of images of one size."""
        return cls(images.reshape(-1), torch.tensor(images.shape[2:]).repeat(len(images), 1))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> UInt8[Tensor, "3 h w"]:
        height, width = self.sizes[index].tolist()
        end = int(self._ends[index])
        return self._pixels[end - 3 * height * width : end].view(3, height, width)

    def batch(self, indices: Int64[Tensor, "b"]) -> tuple[UInt8[Tensor, "b 3 h w"], Int64[Tensor, "b 2"]]:
        """The images `indices`, zero-padded at the right and bottom to the largest of the batch, and their true (height, width)."""
        sizes = self.sizes[indices]
        if self._stack is not None:
            return self._stack.index_select(0, indices), sizes
        height, width = sizes.amax(dim=0).tolist()
        images = torch.zeros(len(indices), 3, height, width, dtype=torch.uint8)
        for image, index, (h, w) in zip(images, indices.tolist(), sizes.tolist(), strict=True):
            image[:, :h, :w] = self[index]
        return images, sizes


def _opened(image: bytes | Image.Image, name: str) -> Image.Image:
    """The image by its header, its pixels not read yet; raises as `decode`."""
    if image == b"":
        raise Failure(f"{name} is empty (0 bytes); remove or replace it")
    try:
        opened = Image.open(io.BytesIO(image), formats=FORMATS) if isinstance(image, bytes) else image
        if opened.width * opened.height > MAX_PIXELS:
            raise Image.DecompressionBombError
    except Image.DecompressionBombError as error:  # PIL's own is for twice as many
        raise Failure(f"{name} is refused unread: it has more than the {MAX_PIXELS:,} pixels allowed; make it smaller") from error
    except Exception as error:
        start = image[:16] if isinstance(image, bytes) else b""
        raise Failure(
            f"{name} is no readable image, or a damaged one (it begins with {start!r}); allowed: {', '.join(FORMATS)}; replace it"
        ) from error
    return opened


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(grey: Shaped[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Grey values of more than 8 bits by the rules of this file's head; PIL's own conversion would saturate them."""
    if not np.isfinite(grey).all():
        raise ValueError("some pixels are not finite")
    low, high = float(grey.min()), float(grey.max())
    ranges = (1.0, 255.0) if grey.dtype.kind == "f" else (65535.0,)
    if low >= 0 and high <= ranges[-1]:
        low, high = 0.0, next(top for top in ranges if high <= top)
    flat, levels = grey.reshape(-1), np.empty(grey.size, dtype=np.uint8)
    for start in range(0, grey.size, 2**20):  # float64 of a whole image of MAX_PIXELS would take gigabytes
        part = flat[start : start + 2**20].astype(np.float64)
        levels[start : start + 2**20] = np.rint((part - low) * 255 / max(high - low, np.finfo(np.float64).tiny))
    return levels.reshape(grey.shape)

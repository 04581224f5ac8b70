"""Two embedded sets of 32 px patches, cut from the real photographs that scikit-image, scikit-learn and matplotlib install.

The class of a patch is the photograph that it was cut from. Every photograph is divided into blocks of about 64 px; each block belongs
to train, to the selection slice (a fifth of train) or to test, and every patch lies wholly inside one block, so no pixel is shared
between the three. Flat patches and near-duplicates are left out. Intervals measured on these sets are within these photographs.

Credits, as the packages state them. Public domain, CC0 or no known restrictions: NASA (astronaut, hubble_deep_field), SpaceX (rocket),
Lav Varshney (camera), Stefan van der Walt (chelsea), Rachel Michetti (coffee), CC0Textures (brick, grass, gravel), Brooklyn Museum
(coins), CMMI (ihc), Mikael Haeggstroem (retina), Paul Mueller et al. (cell), Wikipedia (text). CC BY 2.0: danielbuechele (china),
vultilion (flower). Middlebury stereo benchmark, Scharstein et al. 2014 (motorcycle_left). Not stated: moon, page, grace_hopper.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from torch import Tensor

from ssl_vit.errors import Failure, UsageError, one_of

PATCH = 32
BLOCK = 64
STRIDE = 8
# a fifth of the blocks for test, a fifth of the others for selection: patches of a block are alike, so that a tenth, some five blocks
# a photograph, chose settings by the luck of the draw
TEST_SHARE, SELECTION_SHARE = 0.2, 0.16
# standard deviation of the grey levels (0 ... 255) below which a patch shows sky, black space or blur and nothing else
FLAT = 5.0
# correlation of two patches at 8 x 8 grey pixels above which the later one is a near-duplicate
DUPLICATE = 0.95

_SETS = {
    "photos": (
        *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
        *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg"),
    ),
    "photos-new": ("cell.png", "china.jpg", "flower.jpg", "grace_hopper.jpg", "moon.png", "page.png", "rocket.jpg", "text.png"),
}
# of the files that are not skimage's: package, and folder in it
_ELSEWHERE = dict.fromkeys(("china.jpg", "flower.jpg"), ("sklearn", "datasets/images"))
_ELSEWHERE["grace_hopper.jpg"] = ("matplotlib", "mpl-data/sample_data")
NAMES = tuple(_SETS)
# most patches of one photograph in train and in test
_CAPS = {"photos": (690, 175), "photos-new": (480, 130)}


@dataclass(frozen=True)
class Patches:
    """Patches of one split in a fixed shuffled order: RGB, index of the photograph, (top, left) px in it, in the selection slice or not."""

    images: UInt8[Tensor, "n 3 32 32"]
    labels: Int64[Tensor, "n"]
    corners: Int64[Tensor, "n 2"]
    selection: Bool[Tensor, "n"]


@dataclass(frozen=True)
class Photos:
    """An embedded set: train (with its selection slice flagged), test, and the photographs' names."""

    train: Patches
    test: Patches
    classes: tuple[str, ...]


@cache
def photos(name: str) -> Photos:
    """The embedded set `name`, "photos" or "photos-new"; the same patches on every machine. About two seconds, once.

    Raises UsageError for another name, Failure when an installed package lacks one of the photographs.
    """
    if name not in _SETS:
        raise UsageError(f"no embedded set {name!r}; {one_of(name, NAMES)}")
    classes = tuple(file.partition(".")[0] for file in _SETS[name])
    rows = sorted(row for label, photo in enumerate(classes) for row in _rows(name, photo, label))
    photographs = [photograph(name, photo) for photo in classes]
    train, test = ([row for row in rows if (row[1] == "test") == is_test] for is_test in (False, True))
    return Photos(_patches(train, photographs), _patches(test, photographs), classes)


def photograph(name: str, photo: str) -> UInt8[Tensor, "h w 3"]:
    """The photograph `photo` of set `name` that patches are cut from; grey ones have three equal channels.

    The retina (1,411 px) is read at half size by an integer box filter, so that a 32 px patch shows vessels and not blur.
    """
    file = next(file for file in _SETS[name] if file.partition(".")[0] == photo)
    package, folder = _ELSEWHERE.get(file, ("skimage", "data"))
    # found, not imported: importing these packages takes seconds
    spec = find_spec(package)
    path = Path(spec.origin if spec and spec.origin else package).parent / folder / file
    try:
        image = Image.open(path).convert("RGB")
    except OSError as error:
        raise Failure(f"builtin:{name} needs the photograph {file} of the package {package}: {error}; reinstall {package}") from error
    if max(image.size) > 1024:
        image = image.reduce(2)
    return torch.from_numpy(np.array(image))


# (order, role, label, top, left); the order is a hash, so sorting shuffles
_Row = tuple[bytes, str, int, int, int]


def _order(*key: object) -> bytes:
    """A fixed pseudo-random order that no version of a random number generator can change."""
    return hashlib.blake2b(repr(key).encode(), digest_size=8).digest()


def _rows(name: str, photo: str, label: int) -> Iterator[_Row]:
    """The patches of one photograph that are kept: textured, no near-duplicates, at most `_CAPS` of each role."""
    pixels = photograph(name, photo)
    height, width = pixels.shape[0], pixels.shape[1]
    # test first, so that a near-duplicate across roles is dropped from train and the test set stays as it is
    candidates = sorted(
        ((role, _order(photo, top, left), top, left) for role, top, left in _candidates(photo, height, width)),
        key=lambda row: (["test", "selection", "train"].index(row[0]), row[1]),
    )
    # sums of the three channels: whole numbers, so that no machine's rounding can change a decision
    sums = pixels.sum(dim=2)
    patches = torch.stack([sums[top : top + PATCH, left : left + PATCH] for _, _, top, left in candidates])
    values = patches.flatten(1)
    variance = values.square().sum(dim=1) * PATCH**2 - values.sum(dim=1).square()
    textured = variance >= (3 * FLAT * PATCH**2) ** 2
    kept = iter(_distinct(patches[textured]).tolist())
    train, test = _CAPS[name]
    selection = round(train * SELECTION_SHARE / (1 - TEST_SHARE))
    left_over = {"train": train - selection, "selection": selection, "test": test}
    for (role, order, top, left), is_textured in zip(candidates, textured.tolist(), strict=True):
        if is_textured and next(kept) and left_over[role] > 0:
            left_over[role] -= 1
            yield order, role, label, top, left


def _candidates(photo: str, height: int, width: int) -> Iterator[tuple[str, int, int]]:
    """(role, top, left) of every patch on a grid of `STRIDE` px that lies wholly inside its block."""
    rows, columns = height // BLOCK, width // BLOCK
    blocks = sorted(((row, column) for row in range(rows) for column in range(columns)), key=lambda block: _order("block", photo, block))
    test, selection = round(TEST_SHARE * len(blocks)), max(1, round(SELECTION_SHARE * len(blocks)))
    for rank, (row, column) in enumerate(blocks):
        role = "test" if rank < test else "selection" if rank < test + selection else "train"
        for top in range(row * height // rows, (row + 1) * height // rows - PATCH + 1, STRIDE):
            for left in range(column * width // columns, (column + 1) * width // columns - PATCH + 1, STRIDE):
                yield role, top, left


def _distinct(patches: Int64[Tensor, "n 32 32"]) -> Bool[Tensor, "n"]:
    """Greedy: a patch is kept if its correlation, at 8 x 8 pixels, with every patch kept before it is at most `DUPLICATE`."""
    # whole numbers below 2^53, so that the sums of products are exact in any order
    small = patches.double().reshape(-1, 8, 4, 8, 4).sum(dim=(2, 4)).flatten(1)
    small = small * small.shape[1] - small.sum(dim=1, keepdim=True)
    norms = small.square().sum(dim=1).sqrt()
    close = (small @ small.T > DUPLICATE * norms[:, None] * norms).numpy()
    kept = np.zeros(len(close), dtype=bool)
    for i in range(len(close)):
        kept[i] = not (close[i] & kept).any()
    return torch.from_numpy(kept)


def _patches(rows: list[_Row], photographs: list[UInt8[Tensor, "_ _ 3"]]) -> Patches:
    images = torch.stack([photographs[label][top : top + PATCH, left : left + PATCH] for _, _, label, top, left in rows])
    return Patches(
        images.permute(0, 3, 1, 2).contiguous(),
        torch.tensor([row[2] for row in rows]),
        torch.tensor([row[3:] for row in rows]),
        torch.tensor([row[1] == "selection" for row in rows]),
    )

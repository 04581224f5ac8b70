"""The views of an image that a method trains on, made for a whole batch at once on the device where the images are.

Parameters come from `rng.uniform`, keyed by seed, sample position and view, so that an image has the same views in
whatever batch, rank or worker it turns up. A position is a place in the flat stream of samples (epoch after epoch), not
an index into the dataset, or every epoch would repeat the views of the first.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, restricted_number_type
from torch import Tensor

from ssl_vit.data.rng import uniform, uniform_by_stream
from ssl_vit.data.transforms import (
    CROP_DRAWS,
    colour_jitter,
    constant,
    crop_resize,
    gaussian_blur,
    grey,
    random_resized_crop_boxes,
    solarise,
)
from ssl_vit.errors import check_low_high, check_numbers, require
from ssl_vit.model.compiler import fusible
from ssl_vit.model.precision import exact

JITTER_ORDER_STREAM = -2
VIEW_STREAM = 1000
Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)], docstring="float restricted to be >0 and ≤1")

# which draw of a view decides what, after those of the crop box
FLIP, JITTER, FACTORS, GREY, BLUR, SIGMA, SOLARISE = CROP_DRAWS, CROP_DRAWS + 1, CROP_DRAWS + 2, *range(CROP_DRAWS + 6, CROP_DRAWS + 10)
DRAWS = SOLARISE + 1

CropTensors = tuple[UInt8[Tensor, "_ b 3 _ _"], ...]
"""Crops [v b 3 s s] made by a worker, for each entry of a plan; empty where the device cuts them out of the images."""


class Batch(NamedTuple):
    """One rank's share of a global batch: images as decoded, padded at the bottom and on the right to the largest, with their true
    (height, width); or, where workers crop, `crops` as the method's `crop_plan` lists them, and images of 0 px."""

    images: UInt8[Tensor, "b 3 h w"]
    sizes: Int64[Tensor, "b 2"]
    positions: Int64[Tensor, "b"]  # in the stream of samples; what every random number is drawn from
    step: int  # of the global batch, the same on all ranks
    crops: CropTensors = ()


@dataclass(frozen=True)
class Crops:
    """Random resized crops of one size: `views` are their numbers, each with random numbers of its own; size in pixels."""

    views: range
    scale: tuple[float, float]
    flip: float
    size: int

    def boxes(
        self, sizes: Int64[Tensor, "b 2"], positions: Int64[Tensor, "b"], seed: int
    ) -> tuple[Int64[Tensor, "v b 4"], Bool[Tensor, "v b"]]:
        """(top, left, height, width) and whether flipped, of every view of every image: the same on a device and in a worker."""
        u = _draw(seed, positions, self.views, FLIP + 1)
        return random_resized_crop_boxes(u[..., :CROP_DRAWS], sizes, self.scale), u[..., FLIP] < self.flip


@dataclass(frozen=True)
class SingleCrop:
    """MAE's views (He et al. 2021, appendix A.1): a random resized crop and a flip, nothing else. Sizes in pixels."""

    size: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    flip: float = 0.5

    def __post_init__(self) -> None:
        check_numbers("crop.", vars(self), size=PositiveInt, flip=ClosedUnitInterval)
        check_low_high("crop.", vars(self), scale=Share)

    @property
    def plan(self) -> tuple[Crops, ...]:
        return (Crops(range(1), self.scale, self.flip, self.size),)


@dataclass(frozen=True)
class MultiCrop:
    """DINO's views (Caron et al. 2021, section 3 and the official script): two global crops and `n_local` local ones.

    Sizes in pixels. `jitter` is (brightness, contrast, saturation, hue) as in torchvision's ColorJitter; `blur_p` belongs to
    (global 1, global 2, each local); `blur_sigma` is in pixels of the view; `solarise_p` is for global 2 only.
    """

    global_size: int = 224
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_size: int = 96
    local_scale: tuple[float, float] = (0.05, 0.4)
    n_local: int = 8
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur_p: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise_p: float = 0.2

    def __post_init__(self) -> None:
        probabilities = dict.fromkeys(("flip", "jitter_p", "grey_p", "blur_p", "solarise_p"), ClosedUnitInterval)
        check_numbers("crops.", vars(self), **probabilities, global_size=PositiveInt, local_size=PositiveInt, n_local=NonNegativeInt)
        check_numbers("crops.", vars(self), jitter=NonNegativeFloat)
        require(self.jitter[3] <= 0.5, "crops.jitter", self.jitter, "up to 0.5 in its last number, the hue")
        check_low_high("crops.", vars(self), global_scale=Share, local_scale=Share, blur_sigma=PositiveFloat)

    @property
    def plan(self) -> tuple[Crops, ...]:
        large = Crops(range(2), self.global_scale, self.flip, self.global_size)
        small = Crops(range(2, 2 + self.n_local), self.local_scale, self.flip, self.local_size)
        return (large, small) if self.n_local else (large,)


@fusible
def _choose(x: Float[Tensor, "n 3 s s"], chosen: Bool[Tensor, "v b"], changed: Float[Tensor, "n c s s"]) -> None:
    """Replace, in place, the images that are chosen. All were changed: gathering a few would make a shape depend on data, for which a
    GPU has to wait, and saves a CPU nothing at 32 px and a sixth of the views' time at 224 px."""
    x.lerp_(changed, chosen.view(-1, 1, 1, 1).to(x.dtype))  # by 0 or 1: exact


@fusible
def _choose_grey(x: Float[Tensor, "n 3 s s"], chosen: Bool[Tensor, "v b"]) -> None:
    _choose(x, chosen, grey(x))


@fusible
def _choose_solarised(x: Float[Tensor, "n 3 s s"], chosen: Bool[Tensor, "v b"]) -> None:
    _choose(x, chosen, solarise(x))


def _distort(
    x: Float32[Tensor, "v b 3 s s"],
    u: Float32[Tensor, "v b draws"],
    blur_p: list[float],
    solarise_p: list[float],
    order: list[int],
    config: MultiCrop,
) -> None:
    """Jitter, grey, blur and solarise in place, in the order of the official script; `blur_p` and `solarise_p` are per view."""
    flat, parameters = x.flatten(0, 1), u.flatten(0, 1)
    strength, centre = constant(config.jitter, u), constant((1.0, 1.0, 1.0, 0.0), u)
    low = torch.maximum(centre[:3] - strength[:3], torch.zeros_like(strength[:3]))
    lows = torch.cat([low, -strength[3:]])
    factors = lows + parameters[:, FACTORS:GREY] * (centre + strength - lows)
    sigma = config.blur_sigma[0] + parameters[:, SIGMA] * (config.blur_sigma[1] - config.blur_sigma[0])
    radius = min(math.ceil(3 * config.blur_sigma[1]), x.shape[-1] - 1)

    _choose(flat, u[..., JITTER] < config.jitter_p, colour_jitter(flat, factors, order))
    _choose_grey(flat, u[..., GREY] < config.grey_p)
    _choose(flat, u[..., BLUR] < constant(blur_p, u)[:, None], gaussian_blur(flat, sigma, radius))
    if any(solarise_p):
        _choose_solarised(flat, u[..., SOLARISE] < constant(solarise_p, u)[:, None])


def _draw(seed: int, positions: Int64[Tensor, "b"], views: range, count: int) -> Float32[Tensor, "v b count"]:
    return uniform_by_stream(seed, positions, range(VIEW_STREAM + views.start, VIEW_STREAM + views.stop), count)


def _crop(batch: Batch, seed: int, plan: tuple[Crops, ...], entry: int) -> Float32[Tensor, "v b 3 s s"]:
    """The crops of an entry of the plan in [0, 1]: those that a worker made, else cut here."""
    if batch.crops:
        return batch.crops[entry].to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return crop_resize(batch.images, *plan[entry].boxes(batch.sizes, batch.positions, seed), plan[entry].size)


def jitter_orders(seed: int, step: int) -> list[list[int]]:
    """Of the global and of the local views; drawn on the host."""
    orders: list[list[int]] = uniform(seed, torch.tensor([step]), JITTER_ORDER_STREAM, 8).view(2, 4).argsort(1).tolist()
    return orders


@torch.no_grad()
def multi_crop(batch: Batch, seed: int, config: MultiCrop) -> tuple[Float32[Tensor, "2 b 3 S S"], Float32[Tensor, "v b 3 s s"]]:
    """DINO's global and local views in [0, 1], not normalised; float32 whatever the autocast.

    The order of the four jitters is drawn once a step for the global and once for the local views, from (seed, step), so that it is the
    same on all ranks.
    """
    orders = jitter_orders(seed, batch.step)
    positions, n = batch.positions, config.n_local
    with exact(positions.device):
        global_views = _crop(batch, seed, config.plan, 0)
        u = _draw(seed, positions, range(2), DRAWS)
        _distort(global_views, u, list(config.blur_p[:2]), [0.0, config.solarise_p], orders[0], config)
        if n == 0:
            return global_views, global_views.new_empty(0, len(positions), 3, config.local_size, config.local_size)
        local_views = _crop(batch, seed, config.plan, 1)
        u = _draw(seed, positions, range(2, 2 + n), DRAWS)
        _distort(local_views, u, [config.blur_p[2]] * n, [0.0] * n, orders[1], config)
    return global_views, local_views


@torch.no_grad()
def single_crop(batch: Batch, seed: int, config: SingleCrop) -> Float32[Tensor, "b 3 s s"]:
    """MAE's one view in [0, 1], not normalised; float32 whatever the autocast."""
    with exact(batch.positions.device):
        return _crop(batch, seed, config.plan, 0)[0]

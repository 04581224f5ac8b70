"""Image transforms on whole batches: every image has its own parameters, nothing loops over images, nothing is drawn here.

Each equals its torchvision counterpart for one image at the same parameters. Images are float32 RGB in [0, 1], except
the source of `crop_resize`, which is uint8; boxes are (top, left, height, width) in pixels.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor

from ssl_vit.model.compiler import fusible

TRIES = 10
CROP_DRAWS = 2 * TRIES + 2


def random_resized_crop_boxes(
    u: Float[Tensor, "v b draws"],
    sizes: Int64[Tensor, "b 2"],
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Int64[Tensor, "v b 4"]:
    """Crop boxes by the rule of torchvision's RandomResizedCrop, from `CROP_DRAWS` uniform numbers a box.

    Area uniform in `scale` (share of the image), aspect ratio width / height log-uniform in `ratio`; the first of ten
    tries that fits is taken, else the largest centre crop within `ratio`. `sizes` are (height, width) in pixels.
    """
    # in float64 a last-digit difference between devices cannot move a rounded side
    u, (height, width) = u.double(), sizes.double()[..., None].unbind(1)
    area = height * width * (scale[0] + u[..., :TRIES] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + u[..., TRIES : 2 * TRIES] * (high - low))
    tried_h, tried_w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (tried_h > 0) & (tried_h <= height) & (tried_w > 0) & (tried_w <= width)

    first = fits.int().argmax(-1, keepdim=True)
    found = fits.any(-1, keepdim=True)
    box_h = torch.where(found, tried_h.gather(-1, first), torch.minimum(height, (width / ratio[0]).round()))
    box_w = torch.where(found, tried_w.gather(-1, first), torch.minimum(width, (height * ratio[1]).round()))
    top = torch.where(found, u[..., -2:-1] * (height - box_h + 1), (height - box_h) / 2).floor()
    left = torch.where(found, u[..., -1:] * (width - box_w + 1), (width - box_w) / 2).floor()
    return torch.cat([top, left, box_h, box_w], dim=-1).long()


@fusible
def _bicubic_weights(
    start: Int64[Tensor, "b v"], length: Int64[Tensor, "b v"], flip: Bool[Tensor, "b v"] | None, size: int, out: int
) -> Float32[Tensor, "b v out size"]:
    """Weights of antialiased bicubic resizing of [start, start + length) to `out` pixels, over a line of `size` pixels.

    Keys' cubic with a = -0.5, stretched by the scale when shrinking, cut at the ends of the crop and renormalised.
    """
    start, length = start[..., None, None], length[..., None, None]
    target = torch.arange(out, device=start.device)
    if flip is not None:
        target = torch.where(flip[..., None], target.flip(0), target)
    scale = length.float() / out
    source = torch.arange(size, device=start.device) - start
    distance = (source.float() - scale * (target.float()[..., None] + 0.5)).add_(0.5).div_(scale.clamp(min=1)).abs_()
    # the two pieces of the cubic as truncated powers: outer on distance < 2, and what the inner one adds on distance < 1
    outer = (2 - distance).clamp_(min=0)
    inner = (1 - distance).clamp_(min=0)
    weights = (outer * outer).mul_(outer.sub_(1)).mul_(0.5).addcmul_(inner.square(), 1 - 2 * inner)
    weights.mul_((source >= 0) & (source < length))
    return weights.div_(weights.sum(-1, keepdim=True))


def crop_resize(
    images: UInt8[Tensor, "b 3 h w"], boxes: Int64[Tensor, "v b 4"], flip: Bool[Tensor, "v b"], out: int
) -> Float32[Tensor, "v b 3 out out"]:
    """v crops of each image, resized to `out` x `out` by antialiased bicubic, flipped left to right where `flip`, in [0, 1].

    Two batched matrix products with weights per crop; the source is converted once for all of its crops. Images may be
    padded: only what lies inside a box counts. PIL's clamping of the overshoot is kept.
    """
    (b, _, h, w), v = images.shape, len(boxes)
    top, left, height, width = boxes.permute(2, 1, 0).contiguous()
    vertical = _bicubic_weights(top, height, None, h, out).mul_(1 / 255)
    horizontal = _bicubic_weights(left, width, flip.T.contiguous(), w, out)
    source = images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x = torch.bmm(vertical.view(b, v * out, h), source.view(b, h, 3 * w))
    x = torch.bmm(x.view(b * v, out * 3, w), horizontal.view(b * v, out, w).transpose(1, 2))
    return x.view(b, v, out, 3, out).permute(1, 0, 3, 2, 4).contiguous().clamp_(0, 1)


def constant(values: Sequence[float], like: Tensor) -> Float[Tensor, " n"]:
    """A few numbers as a tensor, filled in where `like` is: a copy from the host would wait for the device."""
    return torch.cat([like.new_full((1,), value) for value in values])


def grey(x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1 h w"]:
    """Luma by ITU-R 601-2."""
    red, green, blue = x.unbind(1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


@fusible
def adjust_brightness(x: Float[Tensor, "n 3 h w"], factor: Float[Tensor, "n"]) -> Float[Tensor, "n 3 h w"]:
    """Blend with black: factor 0 is black, 1 the image."""
    return (x * factor[:, None, None, None]).clamp_(0, 1)


@fusible
def adjust_contrast(x: Float[Tensor, "n 3 h w"], factor: Float[Tensor, "n"]) -> Float[Tensor, "n 3 h w"]:
    """Blend with the mean luma of the image: factor 0 is flat, 1 the image."""
    return torch.lerp(grey(x).mean((2, 3), keepdim=True), x, factor[:, None, None, None]).clamp_(0, 1)


@fusible
def adjust_saturation(x: Float[Tensor, "n 3 h w"], factor: Float[Tensor, "n"]) -> Float[Tensor, "n 3 h w"]:
    """Blend with the luma of each pixel: factor 0 is grey, 1 the image."""
    return torch.lerp(grey(x), x, factor[:, None, None, None]).clamp_(0, 1)


@fusible
def adjust_hue(x: Float[Tensor, "n 3 h w"], shift: Float[Tensor, "n"]) -> Float[Tensor, "n 3 h w"]:
    """Turn the hue by `shift` turns (-0.5 to 0.5), at the same HSV saturation and value."""
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    safe = chroma.clamp(min=1e-12)
    # hue in sixths of a turn; a lerp by 0 or 1 selects exactly, and on CPU faster than torch.where
    hue = (red - green).div_(safe).add_(4)
    hue.lerp_((blue - red).div_(safe).add_(2), (value == green).float())
    hue.lerp_((green - blue).div_(safe), (value == red).float())
    # a channel falls from `value` by up to the chroma as the hue leaves its own: 0 for a third of a turn, a ramp on either side
    sector = (hue + 6 * shift[:, None, None])[:, None] + torch.arange(5, 0, -2, device=x.device)[:, None, None]
    sector.sub_(torch.floor(sector / 6), alpha=6)
    fall = sector.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
    return torch.addcmul(value[:, None], fall, chroma[:, None], value=-1)


def colour_jitter(x: Float[Tensor, "n 3 h w"], factors: Float[Tensor, "n 4"], order: Sequence[int]) -> Float[Tensor, "n 3 h w"]:
    """Brightness (0), contrast (1), saturation (2) and hue (3), by the columns of `factors`, one after the other in `order`."""
    adjustments = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for i in order:
        x = adjustments[i](x, factors[:, i])
    return x


def gaussian_blur(x: Float[Tensor, "n 3 s s"], sigma: Float[Tensor, "n"], radius: int) -> Float[Tensor, "n 3 s s"]:
    """Gaussian blur of `sigma` pixels over 2 * radius + 1 pixels, edges reflected; radius < s. Square images only.

    Blurring a line with reflected edges is one s x s matrix, the same for rows and columns, so two matrix products.
    """
    n, size = len(x), x.shape[-1]
    steps = torch.arange(radius + 1, device=x.device)
    taps = torch.exp(-0.5 * (steps / sigma[:, None]).square())
    # denormal numbers make matrix products several times slower
    taps = taps * (taps > 1e-12)
    taps = taps / (2 * taps.sum(1, keepdim=True) - 1)
    # how often the tap at each distance links pixels i and j: directly, and over the reflection at either end
    i, j = torch.arange(size, device=x.device)[:, None], torch.arange(size, device=x.device)
    over_start = (i + j).masked_fill_(j == 0, size)  # torch.where would copy its scalar from the host
    over_end = (2 * (size - 1) - i - j).masked_fill_(j == size - 1, size)
    distances = torch.stack([(i - j).abs(), over_start, over_end])
    links = (distances == steps[:, None, None, None]).float().sum(1)
    blur = (taps @ links.view(radius + 1, size * size)).view(n, size, size)
    x = torch.bmm(x.reshape(n, 3 * size, size), blur.transpose(1, 2)).view(n, 3, size, size)
    return torch.matmul(blur[:, None], x)


def solarise(x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Invert what is at least 0.5."""
    return torch.minimum(x, 1 - x)


@fusible
def normalise(
    x: Float[Tensor, "*views 3 h w"], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Tensor, "*views 3 h w"]:
    """(x - mean) / std by channel."""
    return (x - constant(mean, x)[:, None, None]) / constant(std, x)[:, None, None]

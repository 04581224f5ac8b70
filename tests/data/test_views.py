"""Whole views against a loop over torchvision's functions with the parameters of each image, and what they may depend on."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ssl_vit.data import views as V
from ssl_vit.data.rng import uniform
from ssl_vit.data.transforms import CROP_DRAWS, random_resized_crop_boxes
from ssl_vit.errors import UsageError

SMALL = V.MultiCrop(global_size=32, local_size=16, n_local=2, blur_p=(1.0, 0.4, 0.5), solarise_p=0.5)
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def batch(b=12, h=36, w=40):
    g = torch.Generator().manual_seed(0)
    # smooth pictures: a threshold such as solarisation's would turn rounding into a visible difference on many pixels of noise
    coarse = torch.rand(b, 3, 5, 5, generator=g)
    images = (torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear") * 255).to(torch.uint8)
    sizes = torch.stack([torch.randint(20, h + 1, (b,), generator=g), torch.randint(20, w + 1, (b,), generator=g)], 1)
    return V.Batch(images, sizes, torch.arange(b) * 7 + 100, 3)


def torchvision_crop(image, size, u, scale, out, flip):
    box = random_resized_crop_boxes(u[None, None, :CROP_DRAWS], size[None], scale)[0, 0].tolist()
    image = F.to_dtype(image[:, : size[0], : size[1]], torch.float32, scale=True)
    x = F.resized_crop(image, *box, [out, out], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    return F.horizontal_flip(x) if u[CROP_DRAWS] < flip else x


def torchvision_view(image, size, u, view, order, c):
    """A view as the official script makes it, for one image.

    Draws: 0-21 box, 22 flip, 23 whether to jitter, 24-27 its factors, 28 grey, 29 whether to blur, 30 sigma, 31 solarise.
    """
    scale, out = (c.global_scale, c.global_size) if view < 2 else (c.local_scale, c.local_size)
    x = torchvision_crop(image, size, u, scale, out, c.flip)
    u = [round(value * 2**24) / 2**24 for value in u.tolist()]
    if u[23] < c.jitter_p:
        lows = [max(0, 1 - s) for s in c.jitter[:3]] + [-c.jitter[3]]
        highs = [1 + s for s in c.jitter[:3]] + [c.jitter[3]]
        for k in order:
            x = ADJUST[k](x, lows[k] + u[24 + k] * (highs[k] - lows[k]))
    if u[28] < c.grey_p:
        x = F.rgb_to_grayscale(x, 3)
    if u[29] < c.blur_p[min(view, 2)]:
        x = F.gaussian_blur(x, [2 * min(6, out - 1) + 1] * 2, [c.blur_sigma[0] + u[30] * (c.blur_sigma[1] - c.blur_sigma[0])] * 2)
    if view == 1 and u[31] < c.solarise_p:
        x = F.solarize(x, 0.5)
    return x


def test_multi_crop_equals_a_loop_over_torchvision():
    source = batch()
    views = [v for group in V.multi_crop(source, 11, SMALL) for v in group]
    orders = uniform(11, torch.tensor([3]), -2, 8)[0].view(2, 4).argsort(1).tolist()
    for view, got in enumerate(views):
        u = uniform(11, source.positions, 1000 + view, 32)
        for i in range(12):
            expected = torchvision_view(source.images[i], source.sizes[i], u[i], view, orders[int(view >= 2)], SMALL)
            torch.testing.assert_close(got[i], expected, atol=1e-5, rtol=0)


def test_single_crop_equals_torchvision():
    source = batch()
    got = V.single_crop(source, 5, V.SingleCrop(size=24))
    u = uniform(5, source.positions, 1000, 23)
    flips = 0
    for i in range(12):
        expected = torchvision_crop(source.images[i], source.sizes[i], u[i], (0.2, 1.0), 24, 0.5)
        torch.testing.assert_close(got[i], expected, atol=2e-6, rtol=0)
        flips += int(u[i, 22] < 0.5)
    assert 0 < flips < 12


def some(source, which):
    return V.Batch(source.images[which], source.sizes[which], source.positions[which], source.step)


def test_two_ranks_see_the_views_of_one_process_bit_for_bit():
    source = batch()
    whole = V.multi_crop(source, 0, SMALL)
    ranks = [V.multi_crop(some(source, slice(i, None, 2)), 0, SMALL) for i in range(2)]
    for group in range(2):
        for i in range(2):
            assert torch.equal(whole[group][:, i::2], ranks[i][group])
    one = V.single_crop(source, 0, V.SingleCrop(32))
    assert torch.equal(one[6:], V.single_crop(some(source, slice(6, None)), 0, V.SingleCrop(32)))


def test_views_change_with_seed_position_step_and_view():
    source = some(batch(), torch.zeros(12, dtype=torch.int64))._replace(positions=torch.arange(12))
    config = V.MultiCrop(global_size=32, n_local=0, jitter_p=1.0, blur_p=(0.0, 0.0, 0.0), solarise_p=0.0, grey_p=0.0)
    (base, _), (seed, _), (step, _), (later, _) = (
        V.multi_crop(source._replace(positions=source.positions + shift, step=step), seed, config)
        for seed, step, shift in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 9999))
    )
    for a, b in ((base, seed), (base, step), (base, later), (base[0], base[1]), (base[:, 0], base[:, 1])):
        assert (a - b).abs().mean() > 1e-4


def test_every_jitter_order_comes_up():
    orders = uniform(0, torch.arange(2000), V.JITTER_ORDER_STREAM, 8).view(4000, 4).argsort(1).unique(dim=0, return_counts=True)[1]
    assert len(orders) == 24
    assert orders.min() > 110
    assert orders.max() < 230


def test_no_local_views():
    global_views, local_views = V.multi_crop(batch(), 0, V.MultiCrop(global_size=16, local_size=8, n_local=0))
    assert global_views.shape == (2, 12, 3, 16, 16)
    assert local_views.shape == (0, 12, 3, 8, 8)


def test_autocast_changes_nothing():
    plain = V.multi_crop(batch(), 0, SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        cast = V.multi_crop(batch(), 0, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_padding_is_never_seen():
    source = batch()
    black, white = source.images.clone(), source.images.clone()
    for i, (h, w) in enumerate(source.sizes.tolist()):
        for padded, value in ((black, 0), (white, 255)):
            padded[i, :, h:] = padded[i, :, :, w:] = value
    a, b = (V.multi_crop(source._replace(images=images), 0, SMALL) for images in (black, white))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (V.SingleCrop, {"scale": (1.0, 0.2)}, r"crop.scale is \(1.0, 0.2\); it must be low, then high"),
        (V.SingleCrop, {"size": 0}, "crop.size is 0; it must be >0"),
        (V.SingleCrop, {"flip": 1.5}, "crop.flip is 1.5; it must be ≥0 and ≤1"),
        (V.MultiCrop, {"global_scale": (0.4, 1.2)}, "crops.global_scale"),
        (V.MultiCrop, {"local_scale": (0.0, 0.4)}, "crops.local_scale"),
        (V.MultiCrop, {"local_size": -1}, "crops.local_size"),
        (V.MultiCrop, {"n_local": -1}, "crops.n_local"),
        (V.MultiCrop, {"grey_p": -0.1}, "crops.grey_p"),
        (V.MultiCrop, {"blur_p": (1.0, 0.1, 2.0)}, "crops.blur_p"),
        (V.MultiCrop, {"blur_sigma": (0.0, 2.0)}, "crops.blur_sigma"),
        (V.MultiCrop, {"jitter": (0.4, 0.4, 0.2, 0.6)}, "crops.jitter"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(config, fields, message):
    with pytest.raises(UsageError, match=message) as error:
        config(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu():
    source = batch()
    cpu = V.multi_crop(source, 0, SMALL)
    cuda = V.multi_crop(
        source._replace(images=source.images.cuda(), sizes=source.sizes.cuda(), positions=source.positions.cuda()), 0, SMALL
    )
    for a, b in zip(cpu, cuda, strict=True):
        torch.testing.assert_close(a, b.cpu(), atol=1e-4, rtol=0)

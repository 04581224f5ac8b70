"""Batched transforms against torchvision, one image at a time at the same parameters."""

import pytest
import torch
from scipy import stats
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from ssl_vit.data import transforms as T

RATIO = (3 / 4, 4 / 3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=6, size=16):
    """Noise, greys and pictures with flat and saturated areas, where hue and ties between channels are delicate."""
    x = torch.rand(n, 3, size, size, generator=generator())
    x[1] = (x[1] * 2 - 0.5).clamp(0, 1)
    x[2] = x[2, :1]
    x[3] = (x[3] * 3).round() / 3
    x[4, 0] = x[4, 1]
    x[5, :, :8], x[5, :, 8:] = 0, 1
    return x


def drawn_boxes(n, height, width, scale):
    u = torch.rand(1, n, T.CROP_DRAWS, generator=generator())
    return T.random_resized_crop_boxes(u, torch.tensor([[height, width]]).expand(n, 2), scale)[0]


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(48, 64, (0.4, 1.0)), (32, 32, (0.05, 0.4)), (20, 60, (0.2, 1.0)), (90, 40, (0.3, 1.0))]
)
def test_boxes_are_distributed_as_torchvisions(height, width, scale):
    n = 3000
    torch.manual_seed(0)
    crop = RandomResizedCrop(8, scale, RATIO)
    image = torch.zeros(3, height, width)
    params = [crop.make_params([image]) for _ in range(n)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in params]).double()
    ours = drawn_boxes(n, height, width, scale).double()
    for value in (*range(4), lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: 2 * b[:, 0] + b[:, 2] - b[:, 1]):
        a, b = (value(x) if callable(value) else x[:, value] for x in (ours, theirs))
        assert stats.ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width", "scale"), [(10, 101, (0.9, 1.0)), (101, 10, (0.9, 1.0)), (1, 1, (0.2, 1.0))])
def test_boxes_that_never_fit_fall_back_to_torchvisions_centre_crop(height, width, scale):
    params = RandomResizedCrop(8, scale, RATIO).make_params([torch.zeros(3, height, width)])
    expected = torch.tensor([params["top"], params["left"], params["height"], params["width"]])
    assert (drawn_boxes(50, height, width, scale) == expected).all()


def test_an_image_within_the_ratios_falls_back_to_the_whole():
    # ratio draws of 0: every try is upright and too tall
    box = T.random_resized_crop_boxes(torch.zeros(1, 1, T.CROP_DRAWS), torch.tensor([[31, 40]]), (1.0, 1.0))
    assert box[0, 0].tolist() == [0, 0, 31, 40]


def test_boxes_lie_inside_images_of_any_size():
    sizes = torch.randint(1, 300, (5000, 2), generator=generator())
    boxes = T.random_resized_crop_boxes(torch.rand(2, 5000, T.CROP_DRAWS, generator=generator()), sizes, (0.05, 1.0))
    start, length = boxes[..., :2], boxes[..., 2:]
    assert (start >= 0).all()
    assert (length > 0).all()
    assert (start + length <= sizes).all()


def test_the_corners_of_the_unit_cube_are_inside_too():
    u = torch.full((1, 1, T.CROP_DRAWS), 1 - 2.0**-24)
    for draws in (u, torch.zeros_like(u)):
        box = T.random_resized_crop_boxes(draws, torch.tensor([[37, 41]]), (0.05, 0.4))[0, 0]
        assert box[0] + box[2] <= 37
        assert box[1] + box[3] <= 41


@pytest.mark.parametrize("out", [8, 32, 50])
def test_crop_resize_equals_torchvision(out):
    b, v, h, w = 12, 3, 40, 56
    images = torch.randint(0, 256, (b, 3, h, w), dtype=torch.uint8, generator=generator())
    sizes = torch.tensor([[40, 56], [33, 47], [40, 20]]).repeat(4, 1)
    boxes = T.random_resized_crop_boxes(torch.rand(v, b, T.CROP_DRAWS, generator=generator(1)), sizes, (0.05, 1.0))
    flip = torch.rand(v, b, generator=generator(2)) < 0.5
    got = T.crop_resize(images, boxes, flip, out)
    for k in range(v):
        for i in range(b):
            # an image in a padded batch, and alone at its true size
            image = F.to_dtype(images[i, :, : sizes[i, 0], : sizes[i, 1]], torch.float32, scale=True)
            expected = F.resized_crop(image, *boxes[k, i].tolist(), [out, out], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
            expected = F.horizontal_flip(expected) if flip[k, i] else expected
            torch.testing.assert_close(got[k, i], expected, atol=2e-6, rtol=0)


def test_a_crop_of_the_output_size_is_copied():
    images = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8, generator=generator())
    got = T.crop_resize(images, torch.tensor([[[3, 5, 12, 12]]]), torch.tensor([[False]]), 12)
    torch.testing.assert_close(got[0, 0], images[0, :, 3:15, 5:17] / 255, atol=1e-6, rtol=0)


FACTORS = torch.tensor([0.0, 0.3, 0.6, 1.0, 1.3, 1.4])


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_adjustments_equal_torchvisions(name):
    factors = FACTORS if name != "hue" else torch.tensor([-0.5, -0.1, 0.0, 0.07, 0.1, 0.5])
    for roll in range(6):
        x = pictures().roll(roll, 0)
        expected = torch.stack([getattr(F, f"adjust_{name}")(x[i], factors[i].item()) for i in range(6)])
        torch.testing.assert_close(getattr(T, f"adjust_{name}")(x, factors), expected, atol=1e-6, rtol=0)


def test_colour_jitter_applies_its_columns_in_order():
    x, shift = pictures(), torch.tensor([0.1, -0.1, 0.05, 0.0, -0.05, 0.1])
    factors = torch.stack([FACTORS, FACTORS.flip(0), FACTORS.roll(2), shift], 1)
    expected = x
    for name, column in (("hue", 3), ("brightness", 0), ("saturation", 2), ("contrast", 1)):
        expected = torch.stack([getattr(F, f"adjust_{name}")(e, f.item()) for e, f in zip(expected, factors[:, column], strict=True)])
    torch.testing.assert_close(T.colour_jitter(x, factors, [3, 0, 2, 1]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "radius"), [(16, 6), (7, 6), (5, 1), (40, 6)])
def test_gaussian_blur_equals_torchvisions(size, radius):
    x = torch.rand(6, 3, size, size, generator=generator())
    sigma = torch.tensor([0.1, 0.3, 0.44, 0.7, 1.0, 2.0])
    expected = torch.stack([F.gaussian_blur(x[i], [2 * radius + 1] * 2, [sigma[i].item()] * 2) for i in range(6)])
    torch.testing.assert_close(T.gaussian_blur(x, sigma, radius), expected, atol=1e-6, rtol=0)


def test_grey_solarise_and_normalise_equal_torchvisions():
    x = pictures()
    torch.testing.assert_close(T.grey(x), F.rgb_to_grayscale(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(T.solarise(x), F.solarize(x, 0.5), atol=0, rtol=0)
    mean, std = (0.4, 0.5, 0.3), (0.2, 0.25, 0.3)
    torch.testing.assert_close(T.normalise(x, mean, std), F.normalize(x, list(mean), list(std)), atol=1e-6, rtol=0)
    torch.testing.assert_close(T.normalise(x.view(2, 3, 3, 16, 16), mean, std).view_as(x), F.normalize(x, list(mean), list(std)))


def test_transforms_leave_their_input_alone_and_take_no_image():
    x = pictures()
    before, none, nothing = x.clone(), x[:0], torch.zeros(0)
    for transform in (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue):
        transform(x, FACTORS / 2)
        assert transform(none, nothing).shape == none.shape
    T.gaussian_blur(x, FACTORS + 0.1, 3)
    assert T.gaussian_blur(none, nothing, 3).shape == none.shape
    T.solarise(x)
    assert torch.equal(x, before)

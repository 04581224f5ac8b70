"""Decoding against independent references: PIL's own transposition, numpy arithmetic, torchvision's transforms."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import functional as tv

from ssl_vit.data.images import ImageStore, decode, header_size, limit_side, to_tensor
from ssl_vit.errors import Failure, UsageError
from ssl_vit_eval.lazy_images import EvalTransform


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode(data))


def test_grey_rgb_and_one_bit_pictures_keep_their_values() -> None:
    rgb = noise(5, 7)
    assert (pixels(encode(Image.fromarray(rgb))) == rgb).all()
    grey = rgb[:, :, 0]
    assert (pixels(encode(Image.fromarray(grey))) == grey[:, :, None]).all()
    bits = grey > 127
    assert (pixels(encode(Image.fromarray(bits))) == bits[:, :, None] * 255).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_composited_on_white(mode: str) -> None:
    values = noise(6, 5, len(mode))
    colour, alpha = values[:, :, :-1].astype(float), values[:, :, -1:] / 255
    expected = colour * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(encode(Image.fromarray(values, mode))) - expected).max() <= 1


def test_transparent_palette_entry_is_white_and_others_keep_their_colour() -> None:
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for transparency in (1, bytes([255, 0, 255])):
        expected = [[[10, 20, 30], [255, 255, 255]], [[70, 80, 90], [255, 255, 255]]]
        assert pixels(encode(picture, transparency=transparency)).tolist() == expected


def test_colour_key_of_an_rgb_png_is_transparent() -> None:
    picture = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert pixels(encode(picture, transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_cmyk_is_converted() -> None:
    inks = noise(4, 4, 4)
    expected = (255 - inks[:, :, :3].astype(float)) * (255 - inks[:, :, 3:]) / 255
    assert np.abs(pixels(encode(Image.fromarray(inks, "CMYK"), "TIFF")) - expected).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_saturated(format: str) -> None:
    grey = np.array([[0, 256, 1000], [32768, 65000, 65535]], dtype=np.uint16)
    found = pixels(encode(Image.fromarray(grey), format))
    assert (found == np.rint(grey / 257)[:, :, None]).all()


def test_32_bit_grey_of_16_bit_range_is_scaled_and_beyond_stretched() -> None:
    grey = np.array([[0, 1000, 65535]], dtype=np.int32)
    assert pixels(encode(Image.fromarray(grey), "TIFF"))[0, :, 0].tolist() == [0, 4, 255]
    grey = np.array([[-100, 0, 100_000]], dtype=np.int32)
    assert pixels(encode(Image.fromarray(grey), "TIFF"))[0, :, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 7.0, 200.0], [0, 7, 200]), ([-1.0, 0.0, 1.0], [0, 128, 255]), ([5e3, 5e3, 9e3], [0, 0, 255])],
)
def test_float_tiff_follows_the_stated_rule(values: list[float], expected: list[int]) -> None:
    found = pixels(encode(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))
    assert found[0, :, 0].tolist() == expected


def test_float_tiff_with_nan_is_refused() -> None:
    with pytest.raises(Failure, match=r"a\.tif is corrupt: some pixels are not finite"):
        decode(encode(Image.fromarray(np.array([[np.nan, 1]], dtype=np.float32)), "TIFF"), "a.tif")


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {}))
    assert (pixels(data) == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(noise(16, 24)), format, exif=exif)
    raw = Image.open(io.BytesIO(encode(Image.fromarray(noise(16, 24)), format)))
    # the definition: how the stored rows and columns lie in the upright picture
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }[orientation]
    assert (pixels(data) == upright(np.asarray(raw))).all()
    assert header_size(data) == pixels(data).shape[:2]


def test_pil_images_are_taken_too() -> None:
    image = Image.fromarray(noise(4, 6))
    assert (np.asarray(decode(image)) == pixels(encode(image))).all()
    assert header_size(encode(image)) == header_size(image) == (4, 6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x is empty"),
        (b"<!DOCTYPE html><html></html>", "x is no readable image, or a damaged one .it begins with b'<!DOCTYPE"),
        (encode(Image.fromarray(noise(64, 64)))[:3000], "x is corrupt"),
        (encode(Image.fromarray(noise(64, 64)), "JPEG")[:1500], "x is corrupt: .*truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "x is no readable image"),
    ],
)
def test_broken_pictures_give_one_line_with_their_name(data: bytes, message: str) -> None:
    with pytest.raises(Failure, match=message) as caught:
        decode(data, "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [10_000, 30_000])  # beyond our limit, and beyond PIL's own
def test_bomb_is_refused_from_its_header(side: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    # the pixels are absent: only a refusal from the header can name the limit
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")
    for read in (decode, header_size):
        with pytest.raises(Failure, match="x is refused unread"):
            read(bomb, "x")


@pytest.mark.parametrize(("height", "width", "size"), [(50, 70, 32), (31, 90, 32), (300, 200, 224), (37, 37, 32), (33, 32, 32)])
@pytest.mark.parametrize(("crop", "resized"), [(None, 256 / 224), (1.0, 1.0), (0.9, 1 / 0.9)])
def test_eval_transform_is_torchvisions_resize_and_centre_crop(
    height: int, width: int, size: int, crop: float | None, resized: float
) -> None:
    picture = Image.fromarray(noise(height, width))
    expected = tv.resize(picture, [round(size * resized)], interpolation=tv.InterpolationMode.BICUBIC)
    transform = EvalTransform(size) if crop is None else EvalTransform(size, crop)
    assert (np.asarray(transform(picture)) == np.asarray(tv.center_crop(expected, [size]))).all()


def test_squash_resizes_both_sides_and_cuts_nothing_off() -> None:
    picture = Image.fromarray(noise(50, 90))
    expected = tv.resize(picture, [32, 32], interpolation=tv.InterpolationMode.BICUBIC)
    assert (np.asarray(EvalTransform(32, "squash")(picture)) == np.asarray(expected)).all()


@pytest.mark.parametrize("crop", [224 / 256, 1.0, 0.5, "squash"])
def test_eval_transform_passes_pictures_of_the_models_size(crop: float | str) -> None:
    picture = Image.fromarray(noise(32, 32))
    assert EvalTransform(32, crop)(picture) is picture


def test_eval_transforms_are_told_apart_by_name() -> None:
    transforms = [
        EvalTransform(224),
        EvalTransform(224, 0.875),
        EvalTransform(32, 1.0),
        EvalTransform(224, 0.95),
        EvalTransform(32, "squash"),
    ]
    assert [transform.name for transform in transforms] == ["resize224", "resize224", "resize32-crop100", "resize224-crop95", "squash32"]


@pytest.mark.parametrize(
    ("size", "crop", "message"), [(0, 1.0, "image_size is 0"), (32, 0.0, "crop is 0.0"), (32, 1.1, "at most 1, or .squash")]
)
def test_impossible_eval_transforms_are_refused(size: int, crop: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EvalTransform(size, crop)


def test_limit_side_reduces_the_shorter_side_and_never_enlarges() -> None:
    picture = Image.fromarray(noise(60, 90))
    assert limit_side(picture, 60) is picture
    expected = tv.resize(picture, [40], interpolation=tv.InterpolationMode.BICUBIC)
    assert limit_side(picture, 40).size == (60, 40)
    assert (np.asarray(limit_side(picture, 40)) == np.asarray(expected)).all()


def test_uniform_store_gives_the_pictures_asked_for() -> None:
    stack = torch.from_numpy(noise(7 * 3 * 4, 5, 1)).view(7, 3, 4, 5)
    store = ImageStore.stacked(stack)
    indices = torch.tensor([6, 0, 6])
    found, sizes = store.batch(indices)
    assert len(store) == 7
    assert torch.equal(found, stack[indices])
    assert sizes.tolist() == [[4, 5]] * 3


def test_ragged_store_pads_at_right_and_bottom() -> None:
    arrays = [noise(height, width, seed=height) + (noise(height, width) == 0) for height, width in ((4, 6), (8, 3), (5, 5))]
    tensors = [to_tensor(Image.fromarray(array)) for array in arrays]
    store = ImageStore(torch.cat([tensor.view(-1) for tensor in tensors]), torch.tensor([tensor.shape[1:] for tensor in tensors]))
    found, sizes = store.batch(torch.tensor([2, 1]))
    assert found.shape == (2, 3, 8, 5)
    assert sizes.tolist() == [[5, 5], [8, 3]]
    for image, number in zip(found, (2, 1), strict=True):
        height, width = arrays[number].shape[:2]
        assert (image[:, :height, :width].permute(1, 2, 0).numpy() == arrays[number]).all()
        assert image[:, height:].sum() == image[:, :, width:].sum() == 0
    assert torch.equal(store[1], tensors[1])


def test_unreadable_exif_counts_as_upright(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Image.Image) -> Image.Image:
        raise struct.error("unpack requires a buffer")

    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    array = noise(4, 6)
    assert (pixels(encode(Image.fromarray(array))) == array).all()

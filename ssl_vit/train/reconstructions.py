"""What a masked autoencoder makes of masked images, as a figure."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize, to_pil_image
from torchvision.utils import make_grid

from ssl_vit.data.transforms import normalise
from ssl_vit.data.views import SingleCrop
from ssl_vit.errors import UsageError
from ssl_vit.files import write_atomically
from ssl_vit.methods.mae import MAE, DecoderConfig, masked, random_keep
from ssl_vit.model.backbone import patchify
from ssl_vit.model.config import BackboneConfig
from ssl_vit.weights.checkpoint import read_checkpoint

MASK_SEED, MASK_GREY = 0, 0.55
TILE = 96  # px: small images are enlarged to it by a whole factor, large ones reduced
GAP, LABEL = 4, 128
PARTS: dict[str, Any] = {"backbone": BackboneConfig, "decoder": DecoderConfig, "crop": SingleCrop}
ROWS = ("original", "masked", "reconstruction", "with visible patches")


def save_reconstructions(checkpoint: Path, images: UInt8[Tensor, "n 3 s s"], path: Path) -> None:
    """Draw what the masked autoencoder in `checkpoint` makes of the images (one column each, under a fixed mask) as a PNG.

    Where the target is normalised by patch, the prediction gets each patch's own true mean and deviation back: the model predicts
    the structure inside a patch and is told its brightness and contrast. UsageError for a checkpoint that is not MAE's and for
    images that are not of its size.
    """
    model = _load_mae(checkpoint)
    size = model.backbone.image_size
    if images.shape[-1] != size:
        raise UsageError(f"images of {images.shape[-1]} px came for {checkpoint}, which was trained at {size} px: resize them to {size} px")
    pixels = images.float() / 255
    x = normalise(pixels, model.backbone.mean, model.backbone.std)
    keep = random_keep(MASK_SEED, torch.arange(len(images)), model.n_patches, model.n_keep)
    hidden = masked(keep, model.n_patches)[:, :, None]
    predicted = _predicted_pixels(model, x, keep)
    true = patchify(pixels, model.backbone.patch)
    rows = [true, torch.where(hidden, MASK_GREY, true), predicted, torch.where(hidden, predicted, true)]
    drawn = _draw([_unpatchify(row, model.backbone.patch) for row in rows])
    write_atomically(path, lambda file: drawn.save(file, "PNG", optimize=True))


def _load_mae(path: Path) -> MAE:
    checkpoint = read_checkpoint(path)
    recipe: dict[str, Any] = checkpoint["ssl_vit"]["recipe"]
    if recipe["method"] != "mae":
        raise UsageError(f"{path} was trained by {recipe['method']}: reconstructions need a checkpoint of method mae")
    parts = {name: TypeAdapter(kind).validate_python(recipe[name]) for name, kind in PARTS.items()}
    model = MAE(recipe["readout"], mask_ratio=recipe["mask_ratio"], norm_pixels=recipe["norm_pixels"], seed=recipe["seed"], **parts)
    model.load_state_dict(checkpoint["state_dict"])
    return model.eval()


@torch.no_grad()
def _predicted_pixels(model: MAE, x: Float[Tensor, "b 3 s s"], keep: Int64[Tensor, "b k"]) -> Float[Tensor, "b n p"]:
    """The prediction as RGB in [0, 1]; x is normalised by the backbone's mean and std."""
    predicted = model.predict_pixels(x, keep)
    if model.norm_pixels:
        patches = patchify(x, model.backbone.patch)
        predicted = predicted * (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt() + patches.mean(dim=-1, keepdim=True)
    repeats = predicted.shape[-1] // 3  # a patch is pixel after pixel, of three channels each
    std, mean = (x.new_tensor(values).repeat(repeats) for values in (model.backbone.std, model.backbone.mean))
    return (predicted * std + mean).clamp(0, 1)


def _unpatchify(patches: Float[Tensor, "b n p"], patch: int) -> Float[Tensor, "b 3 s s"]:
    """The inverse of `patchify`, for square images."""
    b, n, _ = patches.shape
    side = round(n**0.5)
    return patches.reshape(b, side, side, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).reshape(b, 3, side * patch, side * patch)


def _draw(rows: list[Float[Tensor, "n 3 s s"]]) -> Image.Image:
    size = rows[0].shape[-1]
    tile = size * max(1, round(TILE / size)) if size <= TILE else TILE
    kind = InterpolationMode.NEAREST if size <= TILE else InterpolationMode.LANCZOS
    tiles = [resize(to_pil_image((image * 255).round().byte()), [tile, tile], kind) for row in rows for image in row]
    grid = make_grid([pil_to_tensor(image) for image in tiles], nrow=len(rows[0]), padding=GAP, pad_value=255)
    sheet: Image.Image = to_pil_image(F.pad(grid[:, GAP:, GAP:], (LABEL, 0, 0, 0), value=255))
    for number, name in enumerate(ROWS):
        place = (0, number * (tile + GAP) + tile // 2)
        ImageDraw.Draw(sheet).text(place, name, fill="#30363d", font=ImageFont.load_default(12), anchor="lm")
    return sheet

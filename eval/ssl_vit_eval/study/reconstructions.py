"""What a masked autoencoder makes of masked images, as a picture."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssl_vit.data.transforms import normalise
from ssl_vit.data.views import SingleCrop
from ssl_vit.errors import UsageError
from ssl_vit.methods.mae import MAE, DecoderConfig, masked, random_keep
from ssl_vit.model.backbone import patchify
from ssl_vit.model.config import BackboneConfig
from ssl_vit.weights.checkpoint import read_checkpoint

MASK_SEED = 0

MASK_GREY = 0.55

TILE = 96  # px: small pictures are enlarged to it by a whole factor, large ones reduced

GAP, LABEL = 4, 128

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
        raise UsageError(
            f"pictures of {images.shape[-1]} px came for {checkpoint}, which was trained at {size} px: resize them to {size} px"
        )
    pictures = images.float() / 255
    x = normalise(pictures, model.backbone.mean, model.backbone.std)
    keep = random_keep(MASK_SEED, torch.arange(len(images)), model.n_patches, model.n_keep)
    hidden = masked(keep, model.n_patches)[:, :, None]
    predicted = _predicted_pixels(model, x, keep)
    true = patchify(pictures, model.backbone.patch)
    rows = [true, torch.where(hidden, MASK_GREY, true), predicted, torch.where(hidden, predicted, true)]
    path.parent.mkdir(parents=True, exist_ok=True)
    _draw([_unpatchify(row, model.backbone.patch) for row in rows]).save(path, optimize=True)


def _load_mae(path: Path) -> MAE:
    checkpoint = read_checkpoint(path)
    recipe: dict[str, Any] = checkpoint["ssl_vit"]["recipe"]
    if recipe["method"] != "mae":
        raise UsageError(f"{path} was trained by {recipe['method']}: reconstructions need a checkpoint of method mae")
    parts = {"backbone": BackboneConfig, "decoder": DecoderConfig, "crop": SingleCrop}
    # a checkpoint holds lists where the configs have tuples
    configs = {
        name: config(**{key: tuple(value) if isinstance(value, list) else value for key, value in recipe[name].items()})
        for name, config in parts.items()
    }
    model = MAE(recipe["readout"], mask_ratio=recipe["mask_ratio"], norm_pixels=recipe["norm_pixels"], seed=recipe["seed"], **configs)
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
    resample = Image.Resampling.NEAREST if size <= TILE else Image.Resampling.LANCZOS
    sheet = Image.new("RGB", (LABEL + len(rows[0]) * (tile + GAP), len(rows) * (tile + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, row) in enumerate(zip(ROWS, rows, strict=True)):
        top = i * (tile + GAP)
        draw.text((0, top + tile // 2), name, fill="#30363d", font=ImageFont.load_default(12), anchor="lm")
        for j, picture in enumerate((row * 255).round().byte().permute(0, 2, 3, 1).numpy()):
            sheet.paste(Image.fromarray(picture).resize((tile, tile), resample), (LABEL + j * (tile + GAP), top))
    return sheet

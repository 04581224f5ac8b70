"""What a masked autoencoder fills in, as a picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.views import SingleCrop
from ssl_vit.errors import UsageError
from ssl_vit.methods import MAE
from ssl_vit.methods.mae import DecoderConfig
from ssl_vit.model.config import BackboneConfig
from ssl_vit.train.reconstructions import GAP, LABEL, MASK_GREY, TILE, save_reconstructions
from ssl_vit.weights.checkpoint import FORMAT


def mae(norm_pixels: bool = True) -> MAE:
    return MAE(
        "gap",
        backbone=BackboneConfig(image_size=16, patch=4, width=24, depth=1, heads=2),
        decoder=DecoderConfig(width=16, depth=1, heads=2),
        crop=SingleCrop(size=16),
        norm_pixels=norm_pixels,
    )


def saved(model: MAE, path: Path) -> Path:
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


def tiles(path: Path, images: int, size: int) -> torch.Tensor:
    """[row image size size 3], one pixel of each enlarged one."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    step, scale = TILE + GAP, TILE // size
    rows = [[pixels[r * step : r * step + TILE, LABEL + i * step : LABEL + i * step + TILE] for i in range(images)] for r in range(4)]
    return torch.stack([torch.stack(row) for row in rows])[:, :, ::scale, ::scale]


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_a_perfect_prediction_reconstructs_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm_pixels: bool) -> None:
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(MAE, "predict_pixels", lambda self, x, keep: self.targets(x))
    save_reconstructions(saved(mae(norm_pixels), tmp_path / "last.ckpt"), images, tmp_path / "new" / "picture.png")
    original, masked, predicted, pasted = tiles(tmp_path / "new" / "picture.png", 3, 16)
    assert torch.equal(original, images.permute(0, 2, 3, 1))
    assert (predicted.int() - original.int()).abs().max() <= 1
    assert (pasted.int() - original.int()).abs().max() <= 1
    hidden = (masked == round(255 * MASK_GREY)).all(dim=-1)
    assert hidden.flatten(1).sum(dim=1).tolist() == [12 * 16] * 3  # three quarters of 16 patches of 4 x 4 px
    assert torch.equal(masked[~hidden], original[~hidden])


def test_visible_patches_are_pasted_and_the_mask_is_fixed(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    checkpoint = saved(mae(), tmp_path / "last.ckpt")
    for name in ("a.png", "b.png"):
        save_reconstructions(checkpoint, images, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    original, masked, predicted, pasted = tiles(tmp_path / "a.png", 2, 16)
    hidden = (masked == round(255 * MASK_GREY)).all(dim=-1)
    assert torch.equal(pasted[~hidden], original[~hidden])
    assert torch.equal(pasted[hidden], predicted[hidden])
    assert not torch.equal(predicted[~hidden], original[~hidden])


def test_reconstructions_need_a_mae_and_its_size(tmp_path: Path) -> None:
    checkpoint = saved(mae(), tmp_path / "last.ckpt")
    with pytest.raises(UsageError, match=r"32 px came for .*trained at 16 px"):
        save_reconstructions(checkpoint, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), tmp_path / "a.png")
    dino = tmp_path / "dino.ckpt"
    torch.save({"ssl_vit": {"format": FORMAT, "recipe": {"method": "dino"}}, "state_dict": {}}, dino)
    with pytest.raises(UsageError, match="trained by dino"):
        save_reconstructions(dino, torch.zeros(1, 3, 16, 16, dtype=torch.uint8), tmp_path / "a.png")

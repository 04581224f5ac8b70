"""`init:`: student and teacher, or MAE's encoder, start from given weights; what does not fit is refused in one line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from ssl_vit import load_backbone
from ssl_vit.data.views import MultiCrop, SingleCrop
from ssl_vit.errors import Failure, UsageError
from ssl_vit.methods.base import Method
from ssl_vit.methods.dino import DINO, HeadConfig
from ssl_vit.methods.mae import MAE, DecoderConfig
from ssl_vit.model.config import BackboneConfig
from ssl_vit.weights import checkpoint
from ssl_vit.weights.checkpoint import split_network
from ssl_vit.weights.export import export
from tests.conftest import TINY
from tests.model.test_positions import authors
from tests.weights import test_official as official

OFFICIAL = BackboneConfig(
    name="vit_tiny_patch16_224",
    image_size=official.SIZE,
    patch=official.PATCH,
    width=official.WIDTH,
    depth=official.DEPTH,
    heads=official.HEADS,
)


def dino(config: BackboneConfig, **more: Any) -> DINO:
    crops = MultiCrop(global_size=config.image_size, local_size=8, n_local=1)
    return DINO("cls", config, HeadConfig(hidden=8, bottleneck=8, prototypes=16), crops, **more)


def saved(module: Method, path: Path) -> str:
    content: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("cls_position", [False, True])
@torch.no_grad()
def test_student_and_teacher_start_there(tmp_path: Path, cls_position: bool) -> None:
    config = replace(TINY, cls_position=cls_position, mean=(0.4, 0.5, 0.6))
    source = saved(dino(config), tmp_path / "last.ckpt")
    torch.manual_seed(1)
    module, images = dino(replace(TINY, mean=(0.4, 0.5, 0.6)), init=source).eval(), torch.randn(2, 3, 16, 16)
    expected = load_backbone(source)
    assert (expected.mean, expected.vit.no_embed_class) == ((0.4, 0.5, 0.6), not cls_position)
    for network in (module.student, module.teacher):
        for part in ("cls", "registers", "patches"):
            torch.testing.assert_close(getattr(network.backbone(images), part), getattr(expected(images), part), rtol=0, atol=1e-6)
    assert module.recipe["init"] == source
    mae = MAE("gap", replace(TINY, mean=(0.4, 0.5, 0.6)), DecoderConfig(16, 1, 2), SingleCrop(size=16), init=source)
    torch.testing.assert_close(mae.backbone.eval()(images).patches, expected(images).patches, rtol=0, atol=1e-6)


def written(source: str) -> None:
    """The file or folder of that name, in the current folder."""
    if source.endswith(".pth"):
        networks = [{f"backbone.{key}": value for key, value in official.plain().items()} for _ in range(2)]
        contents = {
            "dino": official.plain(),
            "mae": {"model": official.mae()},
            "full": dict(zip(("teacher", "student"), networks, strict=True)),
        }
        torch.save(contents[source.removesuffix(".pth")], source)
        return
    module = dino(replace(TINY, cls_position=True))
    for parameter in module.student.backbone.vit.blocks.parameters():  # else it would be the teacher
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    saved(module, Path("last.ckpt"))
    if source == "exported":
        export("last.ckpt", source)


@pytest.mark.filterwarnings("ignore:.*positions interpolated")
@pytest.mark.parametrize("grow", [0, 8])
@pytest.mark.parametrize("source", ["last.ckpt:student", "exported", "dino.pth", "mae.pth", "full.pth", "full.pth:student"])
@torch.no_grad()
def test_every_source_of_load_backbone(source: str, grow: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, which = split_network(source)
    written(path)
    own = OFFICIAL if path.endswith(".pth") else TINY
    config = replace(own, image_size=own.image_size + grow, drop_path=0.1)
    torch.manual_seed(1)
    images = torch.randn(2, 3, config.image_size, config.image_size)
    expected = load_backbone(path, which=which, image_size=config.image_size)(images).normed
    first = dino(replace(config, cls_position=True), init=source).eval()
    second = MAE("gap", config, DecoderConfig(16, 1, 2), SingleCrop(size=config.image_size), init=source).eval()
    for backbone in (first.student.backbone, first.teacher.backbone, second.backbone):
        found = backbone(images).normed
        for part in ("cls", "registers", "patches"):
            torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=0, atol=1e-5)


def test_positions_are_resized(tmp_path: Path) -> None:
    first = dino(TINY)
    source = saved(first, tmp_path / "last.ckpt")
    module = dino(replace(TINY, image_size=24), init=source)
    expected = authors(first.teacher.backbone.vit.pos_embed, 4, 6)
    torch.testing.assert_close(module.student.backbone.vit.pos_embed, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 32}, "cls_token is (1, 1, 24) there and (1, 1, 32) here"),
        ({"heads": 3}, "vit.blocks.0.attn is ('', [2]) there and ('', [3]) here"),
        ({"registers": 0}, "reg_token is (1, 2, 24) there and None here"),
        ({"depth": 4}, "blocks.3.norm1.weight is None there and (24,) here"),
        ({"std": (0.5, 0.5, 0.5)}, "std is (0.229, 0.224, 0.225) there and (0.5, 0.5, 0.5) here"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    source = saved(dino(TINY), tmp_path / "last.ckpt")
    with pytest.raises(UsageError) as error:
        dino(replace(TINY, **change), init=source)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_of_timm_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = checkpoint.load_backbone
    monkeypatch.setattr(checkpoint, "load_backbone", lambda *args, **more: fetch(*args, pretrained=False, **more))
    config = BackboneConfig(name="vit_tiny_patch16_224", image_size=32, patch=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    module = MAE("cls", config, DecoderConfig(16, 1, 2), SingleCrop(size=32), init="timm:vit_tiny_patch16_224")
    assert module.backbone.depth == 12


def test_offline_is_a_state_of_one_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checkpoint, "hub_answers", lambda: False)
    with pytest.raises(Failure, match="cannot fetch some weights"), checkpoint._quick_offline_error("some weights", online=True):
        raise OSError("not in the cache")
    assert not constants.HF_HUB_OFFLINE

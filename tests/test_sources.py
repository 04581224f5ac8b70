"""Sources: the token layout of timm's families, the sizes of images, and that the readout named is the readout read."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from ssl_vit import load_backbone
from ssl_vit.errors import UsageError
from ssl_vit.model.backbone import Backbone
from ssl_vit.model.readout import readout
from ssl_vit_eval.sources import Source, _run_name, open_source
from tests.weights.test_export import checkpoint


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def source_of(backbone: Backbone, trained_with: str | None = None) -> Source:
    return Source("it", "timm", trained_with, None, backbone.image_size, "hash", None, None, None, backbone)


# where timm's documentation and code put each family's tokens: class tokens first, then registers, then patches
FAMILIES = {
    "vit_tiny_patch16_224": (1, 0, "norm"),
    "deit_tiny_distilled_patch16_224": (2, 0, "norm"),  # class and distillation token
    "beit_base_patch16_224": (1, 0, "fc_norm"),
    "beitv2_base_patch16_224": (1, 0, "fc_norm"),
    "eva02_tiny_patch14_224": (1, 0, "fc_norm"),
    "vit_small_patch14_reg4_dinov2": (1, 4, "norm"),
    "vit_base_patch16_siglip_224": (0, 0, "norm"),
    "vit_base_patch16_rope_reg1_gap_256": (0, 1, "fc_norm"),  # a register in front, no class token
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_readouts_find_their_tokens_in_every_family(name: str) -> None:
    t, r, norm = FAMILIES[name]
    size = 56 if "patch14" in name else 64
    backbone = load_backbone(f"timm:{name}", pretrained=False, depth=2, image_size=size)
    for parameter in backbone.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))  # tokens that start as zeros are told apart
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
    x: Tensor = backbone.vit.forward_features((pixels / 255 - mean) / std)
    x = backbone.vit.fc_norm(x) if norm == "fc_norm" else x
    assert x.shape[1] == t + r + 16
    expected = {"gap": x[:, t + r :].mean(1)}
    if t:
        expected |= {"cls": x[:, :t].mean(1), f"cls{t - 1}": x[:, t - 1]}
    if r:
        expected |= {"register": x[:, t : t + r].mean(1), f"register{r - 1}": x[:, t + r - 1]}
    source = source_of(backbone)
    features = source.features(pixels, list(expected))
    for spec, values in expected.items():
        torch.testing.assert_close(features[spec], values, rtol=0, atol=2e-5)
        assert source.width(spec) == values.shape[1]
    has = source.readouts(None)
    assert {"cls": t > 0, "register": r > 0, "gap": True} == {spec: spec in has for spec in ("cls", "register", "gap")}
    missing = [f"cls{t}", f"register{r}", *(["cls"] if t == 0 else []), *(["register"] if r == 0 else [])]
    for spec in missing:
        with pytest.raises(UsageError, match=f"needs .*choose one of: {', '.join(has)}"):
            source.readouts([spec])


@torch.no_grad()
def test_timm_models_at_another_size_say_that_positions_are_interpolated() -> None:
    trained = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, dynamic_img_size=True, class_token=True).eval()
    torch.save(trained.state_dict(), "weights.pth")
    overlay = {"file": "weights.pth", "num_classes": 0, "custom_load": False}
    with pytest.warns(UserWarning, match="timm:vit_tiny_patch16_224: positions interpolated from 224 px to 96 px"):
        backbone = load_backbone("timm:vit_tiny_patch16_224", image_size=96, depth=2, pretrained_cfg_overlay=overlay)
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(backbone(images).normed.cls[:, 0], trained.forward_features(images)[:, 0])
    assert backbone.image_size == 96
    with pytest.raises(UsageError, match="image size 100 is not divisible by the patch of timm:vit_tiny_patch16_224, 16 px; choose 96"):
        load_backbone("timm:vit_tiny_patch16_224", pretrained=False, image_size=100)


@torch.no_grad()
def test_images_of_another_size_than_the_model_was_opened_for() -> None:
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    vit = source_of(load_backbone("timm:vit_tiny_patch16_224", pretrained=False, depth=1))
    with pytest.warns(UserWarning, match="64 x 64 px: positions interpolated from 224 px"):
        assert vit.features(pixels, ["gap"])["gap"].shape == (1, 192)
    beit = load_backbone("timm:beit_base_patch16_224", pretrained=False, depth=1)  # its relative positions are of one size
    with pytest.raises(UsageError, match="it was opened for images of 224 px, got 64; give --image-size 64"):
        source_of(beit).features(pixels, ["gap"])


@torch.no_grad()
def test_checkpoints_at_another_size() -> None:
    checkpoint(readout="gap")
    small, large = open_source("run/last.ckpt"), open_source("run/last.ckpt", image_size=24)
    assert (small.image_size, large.image_size, small.weights == large.weights) == (16, 24, True)
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    with pytest.warns(UserWarning, match="24 x 24 px: positions interpolated from 16 px"):
        assert large.features(pixels, ["gap"])["gap"].shape == (2, 24)
    for name in ("run/last.ckpt", "timm:vit_tiny_patch16_224"):
        with pytest.raises(UsageError, match=r"image size 18 is not divisible by the patch of"):
            open_source(name, image_size=18)


@pytest.mark.parametrize("spec", ["ep", "simpool_cls", "map+cls", "gap/pre"])
@torch.no_grad()
def test_the_trained_readout_is_read_with_its_own_parameters(spec: str) -> None:
    module = checkpoint(readout=spec)
    source = open_source("run/last.ckpt")
    assert source.trained_with == spec
    assert source.readouts(["trained"]) == [spec]
    assert spec in source.readouts(None)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (module.backbone.mean, module.backbone.std))
    arm = module.teacher
    expected = arm.readout(arm.backbone((pixels / 255 - mean) / std, blocks=arm.readout.spec.blocks))
    features = source.features(pixels, [spec, "cls"])
    torch.testing.assert_close(features[spec], expected, rtol=0, atol=1e-5)
    assert features[spec].shape == (3, source.width(spec))
    torch.testing.assert_close(features["cls"], readout("cls")(arm.backbone((pixels / 255 - mean) / std)), rtol=0, atol=1e-5)


def test_parameters_that_were_not_trained_are_not_made_up() -> None:
    checkpoint(readout="ep")
    source, pixels = open_source("run/last.ckpt"), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    for spec in ("ep_cls", "ep/pre", "ep+cls", "simpool"):
        assert source.readouts([spec]) == [spec]  # a protocol may train it
        with pytest.raises(
            UsageError, match="has parameters, which run has not trained; evaluate it with --protocols attentive, or choose"
        ):
            source.features(pixels, [spec])


def test_a_source_never_reads_another_readout_than_it_says() -> None:
    checkpoint(readout="ep")
    source, pixels = open_source("run/last.ckpt"), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert source.backbone is not None
    for trained_with in ("gap", "ep/pre", None):
        with pytest.raises(ValueError, match="but its backbone brings"):
            replace(source, trained_with=trained_with).features(pixels, ["ep"])
    with pytest.raises(ValueError, match="was trained with ep, but its backbone brings None"):
        replace(source, backbone=load_backbone("run/last.ckpt", pretrained=False)).features(pixels, ["ep"])


def test_names_that_are_no_source() -> None:
    checkpoint("mae", "gap")
    Path("empty").mkdir()
    for name, message in {
        "run": r"run is a folder, not a checkpoint; name the file in it: run/last\.ckpt",
        "empty": "it holds no",
        "run/last.ckpt:student": "holds no student: it holds one network, trained with mae",
        "run/last.ckpt:studnet": r"run/last.ckpt has no network 'studnet'; did you mean ':student'\?",
        "run/lats.ckpt": r"there is no checkpoint run/lats.ckpt; did you mean 'run/last.ckpt'\? give a",
        "pixels:big": "needs a side in pixels above 0",
        "timm:vit_tinny_patch16_224": "did you mean",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_source(name)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/alpha/last.ckpt", "alpha"),
        ("runs/alpha/epoch-0010.ckpt", "alpha-epoch-0010"),
        ("runs/alpha/previous.ckpt", "alpha-previous"),
        ("last.ckpt", "last"),
        ("copy.ckpt", "copy"),
    ],
)
def test_checkpoints_of_one_folder_have_names_of_their_own(path: str, name: str) -> None:
    assert _run_name(Path(path)) == name

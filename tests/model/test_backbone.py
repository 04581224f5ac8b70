"""The backbone: named tokens, the masked forward against the full one, other image sizes, token layouts of timm's families."""

import time
from dataclasses import replace

import pytest
import timm
import torch
from huggingface_hub import constants

from ssl_vit.data.stream import Batch
from ssl_vit.data.views import SingleCrop
from ssl_vit.errors import Failure, UsageError
from ssl_vit.methods import MAE
from ssl_vit.model.backbone import Backbone, build_backbone, patchify
from ssl_vit.model.config import BackboneConfig
from ssl_vit.weights.checkpoint import load_backbone
from tests.conftest import TINY


@pytest.mark.parametrize("cls_tokens", [0, 1])
@pytest.mark.parametrize("registers", [0, 1, 3])
def test_token_counts(cls_tokens: int, registers: int) -> None:
    model = build_backbone(replace(TINY, cls_tokens=cls_tokens, registers=registers)).eval()
    tokens = model(torch.randn(2, 3, 16, 16), blocks=(0, -1))
    assert tokens.cls.shape == (2, cls_tokens, 24)
    assert tokens.registers.shape == (2, registers, 24)
    assert tokens.patches.shape == (2, 16, 24)
    assert (model.cls_tokens, model.registers, tokens.block, tokens.at(0).block) == (cls_tokens, registers, 2, 0)


def test_final_norm_matches_timm(backbone: Backbone) -> None:
    images = torch.randn(2, 3, 16, 16)
    full = backbone.vit.forward_features(images)
    tokens = backbone(images).normed
    torch.testing.assert_close(torch.cat([tokens.cls, tokens.registers, tokens.patches], dim=1), full)


@pytest.mark.parametrize("config", [TINY, replace(TINY, cls_tokens=0, registers=0)])
def test_masked_forward_with_all_patches_is_the_full_forward(config: BackboneConfig) -> None:
    model = build_backbone(config).eval()
    images = torch.randn(3, 3, 16, 16)
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    full, kept = model(images, blocks=(1, -1)), model(images, blocks=(1, -1), keep=order)
    for block in (1, 2):
        expected = full.at(block).patches.gather(1, order[:, :, None].expand(-1, -1, 24))
        torch.testing.assert_close(kept.at(block).patches, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(kept.at(block).cls, full.at(block).cls, rtol=0, atol=1e-5)


def test_masked_forward_never_sees_the_hidden_patches(backbone: Backbone) -> None:
    images = torch.randn(2, 3, 16, 16)
    changed = images.clone()
    changed[:, :, 4:, :] = 0  # all but the first row of patches
    keep = torch.tensor([[0, 1, 2], [3, 0, 1]])
    assert torch.equal(backbone(images, keep=keep).patches, backbone(changed, keep=keep).patches)


def test_masked_forward_of_a_model_with_positions_for_its_class_token() -> None:
    model = Backbone(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, reg_tokens=2), image_size=32).eval()
    assert not model.vit.no_embed_class
    images, order = torch.randn(2, 3, 32, 32), torch.tensor([[2, 0, 3, 1]]).expand(2, 4)
    torch.testing.assert_close(model(images, keep=order).cls, model(images).cls, rtol=0, atol=1e-5)


def test_masked_forward_embeds_only_the_kept_patches(backbone: Backbone) -> None:
    lengths: list[int] = []
    backbone.vit.blocks[0].register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    backbone(torch.randn(2, 3, 16, 16), keep=torch.tensor([[0, 5], [7, 1]]))
    assert lengths == [1 + 2 + 2]


def test_patchify_order() -> None:
    images = torch.arange(2 * 3 * 8 * 12).float().view(2, 3, 8, 12)
    patches = patchify(images, 4)
    for row in range(2):
        for column in range(3):
            block = images[1, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(patches[1, 3 * row + column], block.permute(1, 2, 0).flatten())


def test_other_image_sizes_are_said_in_evaluation_only(backbone: Backbone) -> None:
    with pytest.warns(UserWarning, match="24 x 24 px: positions interpolated from 16 px"):
        assert backbone(torch.randn(1, 3, 24, 24)).patches.shape == (1, 36, 24)
    backbone(torch.randn(1, 3, 24, 24))  # said once
    backbone.train()(torch.randn(1, 3, 8, 8))
    with pytest.raises(UsageError, match="not divisible by the patch of 4 px; resize them to 16"):
        backbone(torch.randn(1, 3, 15, 16))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 30}, "image_size is 30; it must be a multiple of backbone.patch, 4, such as 32"),
        ({"width": 25}, "width 25 is not divisible by backbone.heads 2"),
        ({"cls_tokens": 2}, "it must be 0 or 1"),
        ({"registers": -1}, "must be ≥0"),
    ],
)
def test_impossible_sizes(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(TINY, **wrong)


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match="vit_small_patch16_224, vit_small"):
        build_backbone(BackboneConfig(name="vit_smal_patch16_224"))


def test_class_token_and_registers_start_alike(backbone: Backbone) -> None:
    model = build_backbone(replace(TINY, width=384, heads=6, registers=8))
    for token in (model.vit.cls_token, model.vit.reg_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.15)
    registers = torch.nn.functional.normalize(model.vit.reg_token[0], dim=-1)
    assert (registers @ registers.T - torch.eye(8)).abs().max() < 0.3  # not copies of each other


@pytest.mark.parametrize(
    ("name", "cls_tokens", "registers"),
    [
        ("vit_tiny_patch16_224", 1, 0),
        ("deit_tiny_distilled_patch16_224", 2, 0),
        ("vit_small_patch14_reg4_dinov2", 1, 4),
        ("beit_base_patch16_224", 1, 0),
        ("eva02_tiny_patch14_224", 1, 0),
        ("vit_base_patch16_siglip_224", 0, 0),
        ("vit_small_patch16_dinov3", 1, 4),  # timm's Eva class, which does not say how many registers it has
        ("vit_base_patch16_rope_reg1_gap_256", 0, 1),
    ],
)
def test_token_layout_is_read_from_timm_models(name: str, cls_tokens: int, registers: int) -> None:
    model = (
        load_backbone(f"timm:{name}", pretrained=False, depth=1) if "beit" not in name else load_backbone(f"timm:{name}", pretrained=False)
    )
    tokens = model(torch.randn(1, 3, model.image_size, model.image_size))
    assert (tokens.cls.shape[1], tokens.registers.shape[1]) == (cls_tokens, registers)
    assert tokens.patches.shape[1] == (model.image_size // model.patch) ** 2
    assert isinstance(model.norm, torch.nn.LayerNorm)


def test_arguments_that_a_timm_model_does_not_take_are_left_out_aloud() -> None:
    with pytest.warns(UserWarning, match="timm:beit_base_patch16_224 does not take reg_tokens; left out"):
        model = load_backbone("timm:beit_base_patch16_224", pretrained=False, reg_tokens=4, depth=1)
    assert (model.registers, model.depth) == (0, 1)


def test_unknown_timm_model_and_one_without_tokens() -> None:
    with pytest.raises(UsageError, match="timm has no model 'vit_tinny_patch16_224'; did you mean 'vit_tiny_patch16_224'"):
        load_backbone("timm:vit_tinny_patch16_224", pretrained=False)
    with pytest.raises(UsageError, match="not a Vision Transformer that yields tokens"):
        load_backbone("timm:resnet18", pretrained=False)


@pytest.mark.parametrize("offline", [True, False])
def test_weights_that_cannot_be_fetched_fail_fast_and_clearly(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(Failure, match="cannot fetch the weights of timm:vit_tiny_patch16_224: no network"):
        load_backbone("timm:vit_tiny_patch16_224")
    assert time.monotonic() - start < 5


def test_drop_path_leaves_out_the_branches_of_the_images_drawn(batch: Batch) -> None:
    """Against each image alone, its branches left out by hand."""
    model = build_backbone(replace(TINY, drop_path=0.4)).train()
    draws = torch.rand(3, 3, 2)
    images = torch.randn(3, 3, 16, 16)
    found = model(images, draws=draws)
    rates = [0.0, 0.2, 0.4]
    for i in range(3):
        x = model._embed(images[i : i + 1], None)
        for block, rate, (first, second) in zip(model.vit.blocks, rates, draws[i].tolist(), strict=True):
            x = x + block.ls1(block.attn(block.norm1(x))) * (first >= rate) / (1 - rate)
            x = x + block.ls2(block.mlp(block.norm2(x))) * (second >= rate) / (1 - rate)
        torch.testing.assert_close(found.patches[i : i + 1], x[:, 3:])
    assert (draws[:, 1:] < torch.tensor(rates[1:])[:, None]).any()
    module = MAE(backbone=replace(TINY, drop_path=0.4), crop=SingleCrop(16))
    first, second = module.drop_path_draws(batch.positions[:4]), module.drop_path_draws(batch.positions[4:])
    assert torch.equal(torch.cat([first, second]), module.drop_path_draws(batch.positions))
    assert module.drop_path_draws(batch.positions, range(1, 3)).shape == (16, 3, 2)
    assert len(torch.cat([first, second]).unique()) > 40  # no image's draws are another's
    assert MAE(backbone=TINY, crop=SingleCrop(16)).drop_path_draws(batch.positions) is None

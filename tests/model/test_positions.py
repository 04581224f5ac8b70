"""Positions: the authors' interpolation, a class token's own, and what must not change a number: compiling, checkpointing."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.errors import UsageError
from ssl_vit.methods.base import plain
from ssl_vit.model.backbone import build_backbone
from ssl_vit.model.compiler import compile_blocks
from ssl_vit.model.config import BackboneConfig
from ssl_vit.model.positions import bicubic
from ssl_vit.model.precision import exact
from tests.conftest import TINY, unchecked


def authors(table: Tensor, old: int, new: int) -> Tensor:
    """DINO's `interpolate_pos_encoding`, of the patches' positions [1 n d]."""
    image = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (new + 0.1) / old
    return F.interpolate(image, scale_factor=(scale, scale), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize(("old", "new"), [(14, 6), (4, 2), (4, 7), (14, 14)])
def test_bicubic_is_the_authors(old: int, new: int) -> None:
    table = torch.randn(1, old**2, 5, dtype=torch.float64)
    expected = authors(table, old, new)
    torch.testing.assert_close(bicubic((old, old), (new, new), table) @ table, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("cls_position", [False, True])
def test_crops_get_the_authors_positions_in_both_forwards(cls_position: bool) -> None:
    """A smaller image goes through the blocks as written out here, all patches or all of them kept in another order."""
    model = build_backbone(replace(TINY, cls_position=cls_position)).double()
    vit, images = model.vit, torch.randn(2, 3, 8, 8, dtype=torch.float64)
    position = authors(vit.pos_embed[:, -16:], 4, 2)
    patches = vit.patch_embed.proj(images).flatten(2).mT + position
    cls = vit.cls_token + (vit.pos_embed[:, :1] if cls_position else 0)
    x = torch.cat([cls.expand(2, -1, -1), vit.reg_token.expand(2, -1, -1), patches], dim=1)
    for block in vit.blocks:
        x = block(x)
    order = torch.tensor([[2, 0, 3, 1]]).expand(2, 4)
    for tokens, expected in ((model(images), x[:, 3:]), (model(images, keep=order), x[:, 3:][:, order[0]])):
        torch.testing.assert_close(tokens.cls, x[:, :1], rtol=0, atol=1e-12)
        torch.testing.assert_close(tokens.patches, expected, rtol=0, atol=1e-12)


def test_products_of_views_and_positions_are_never_rounded() -> None:
    """On a GPU, `high` is TF32; here both settings are only looked at, and bfloat16 would show in the dtype."""
    x, device = torch.ones(2, 2), torch.device("cpu")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert (x @ x).dtype == torch.bfloat16
            with exact(device):
                assert (x @ x).dtype == torch.float32
                assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_class_token_has_a_position_and_registers_none() -> None:
    model = build_backbone(replace(TINY, cls_position=True, width=384, heads=6))
    position = model.vit.pos_embed
    assert position.shape == (1, 1 + 2 + 16, 384)
    assert position[:, 1:3].abs().max() == 0
    assert position[:, 0].std().item() == pytest.approx(0.02, rel=0.15)
    model(torch.randn(2, 3, 16, 16)).cls.square().sum().backward()
    assert torch.equal(position.grad[:, :1], model.vit.cls_token.grad)
    assert position.grad[:, 1:3].abs().max() == 0
    with pytest.raises(UsageError, match="cls_position is True; it must be false without a class token"):
        replace(TINY, cls_position=True, cls_tokens=0)


def test_without_dynamic_sizes_timm_agrees() -> None:
    """timm's own model with the papers' layout, on its own image size."""
    model = build_backbone(replace(TINY, cls_position=True)).eval()
    images = torch.randn(2, 3, 16, 16)
    vit = timm.create_model(TINY.name, num_classes=0, global_pool="", **{**replace(TINY, cls_position=True).timm_arguments()}).eval()
    vit.load_state_dict(model.vit.state_dict())
    tokens = model(images).normed
    assert torch.equal(vit.forward_features(images), torch.cat([tokens.cls, tokens.registers, tokens.patches], dim=1))


def test_the_recipe_keeps_the_hash_of_earlier_versions() -> None:
    earlier = plain(TINY)
    assert not earlier.keys() & {"cls_position", "mean", "std", "compile", "checkpointing"}
    assert plain(replace(TINY, compile=True, checkpointing=True)) == earlier
    assert plain(replace(TINY, cls_position=True, mean=(0.5, 0.5, 0.5))) == {**earlier, "cls_position": True, "mean": [0.5, 0.5, 0.5]}
    assert BackboneConfig(**earlier) == TINY


def gradients(device: str = "cpu", compiled: bool = False, **changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = build_backbone(replace(TINY, drop_path=0.3, **changes)).train().to(device)
    images = torch.randn(4, 3, 16, 16).to(device)
    torch.manual_seed(1)
    draws = torch.rand(4, 3, 2)
    if compiled:
        compile_blocks(model.vit.blocks)
    with unchecked():
        both = [model(images, draws=draws.to(device)), model(images)]  # what the first dropped is dropped again when it is computed again
    sum(tokens.normed.cls.sin().sum() + tokens.normed.patches.cos().sum() for tokens in both).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_changes_no_gradient() -> None:
    expected, found = gradients(), gradients(checkpointing=True)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler warns about its own code, and would meet an error in its place
def test_compiling_changes_gradients_by_rounding_only() -> None:
    """Fused kernels order sums otherwise: allowed are 64 roundings of float32 at the size of a parameter's largest gradient."""
    expected, found = gradients(), gradients(compiled=True)
    assert expected.keys() == found.keys()  # the names have no prefix
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 64 * 2**-23 * max(value.abs().max().item(), 1), name

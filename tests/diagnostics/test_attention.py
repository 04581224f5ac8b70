"""Attention matrices of every family that shows them, and their statistics on matrices written by hand."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from ssl_vit.model.backbone import Backbone
from ssl_vit_eval.diagnostics.attention import NoAttention, attention_statistics, watched

SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
# name -> arguments, class tokens, registers
FAMILIES: dict[str, tuple[dict[str, Any], int, int]] = {
    "vit_tiny_patch16_224": ({"img_size": 32}, 1, 0),
    "deit_tiny_distilled_patch16_224": ({"img_size": 32}, 2, 0),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 28}, 1, 4),
    "vit_base_patch16_siglip_224": ({"img_size": 32, "global_pool": ""}, 0, 0),
    "beit_base_patch16_224": ({"img_size": 32}, 1, 0),
    "eva02_tiny_patch14_224": ({"img_size": 28}, 1, 0),
    "vit_small_patch16_dinov3": ({"img_size": 32}, 1, 4),
    "vit_base_patch16_rope_reg1_gap_256": ({"img_size": 32, "global_pool": ""}, 0, 1),
}


def family(name: str) -> Backbone:
    arguments, _, _ = FAMILIES[name]
    vit = timm.create_model(name, **{**SMALL, **arguments})
    for parameter in vit.parameters():  # so that layer scale and position biases, which may start at 0, count
        torch.nn.init.normal_(parameter, std=0.2)
    return Backbone(vit, arguments["img_size"]).eval()


def matrices(backbone: Backbone, images: Tensor) -> dict[int, Tensor]:
    seen: dict[int, Tensor] = {}
    with torch.no_grad(), watched(backbone, lambda block, attention: seen.__setitem__(block, attention.clone())):
        backbone(images)
    return seen


def flags(backbone: Backbone) -> list[bool]:
    return [module.fused_attn for module in backbone.modules() if hasattr(module, "fused_attn")]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_shows_its_attention_and_is_left_as_it_was(name: str) -> None:
    backbone, (_, cls, registers) = family(name), FAMILIES[name]
    images = torch.randn(3, 3, backbone.image_size, backbone.image_size)
    with torch.no_grad():
        before, fused = backbone(images), flags(backbone)
        seen = matrices(backbone, images)
        after = backbone(images)
    assert all(fused)
    assert flags(backbone) == fused
    assert torch.equal(before.patches, after.patches)
    assert not any(module._forward_pre_hooks for module in backbone.modules())
    assert list(seen) == [0, 1]
    for attention in seen.values():
        assert attention.shape == (3, 2, cls + registers + 4, cls + registers + 4)
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(3, 2, cls + registers + 4))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_matrices_are_what_mixes_the_values(name: str) -> None:
    """Attention times values, projected, is what the (fused) attention module gave: position biases and rotations are in it."""
    backbone = family(name)
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    seen = matrices(backbone, images)
    kept: dict[str, Tensor] = {}
    module = backbone.vit.blocks[1].attn
    assert isinstance(module.norm if hasattr(module, "norm") else torch.nn.Identity(), torch.nn.Identity)
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: kept.__setitem__("x", inputs[0])),
        module.register_forward_hook(lambda _, inputs, output: kept.__setitem__("out", output)),
    ]
    with torch.no_grad():
        backbone(images)
        if getattr(module, "v_proj", None) is not None:
            values = module.v_proj(kept["x"])
        else:
            bias = module.qkv.bias if getattr(module, "v_bias", None) is None else torch.cat([module.q_bias, module.k_bias, module.v_bias])
            values = torch.nn.functional.linear(kept["x"], module.qkv.weight, bias)[:, :, 48:]
        mixed = seen[1] @ values.unflatten(-1, (2, 12)).transpose(1, 2)
        torch.testing.assert_close(module.proj(mixed.transpose(1, 2).flatten(2)), kept["out"], atol=1e-5, rtol=1e-4)
    for handle in handles:
        handle.remove()


def test_the_matrices_are_the_softmax_written_out(backbone: Backbone) -> None:
    images = torch.randn(2, 3, 16, 16)
    torch.nn.init.normal_(backbone.vit.blocks[2].attn.qkv.weight)
    kept: list[Tensor] = []
    handle = backbone.vit.blocks[2].attn.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    attention = matrices(backbone, images)[2]
    handle.remove()
    qkv = backbone.vit.blocks[2].attn.qkv
    for image, x in enumerate(kept[0]):
        rows = x @ qkv.weight.T + qkv.bias
        for head in range(2):
            q, k = rows[:, 12 * head : 12 * head + 12], rows[:, 24 + 12 * head : 24 + 12 * head + 12]
            torch.testing.assert_close(attention[image, head], torch.softmax(q @ k.T / math.sqrt(12), dim=1))


def test_an_error_inside_restores_the_model(backbone: Backbone) -> None:
    def fail(block: int, attention: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), watched(backbone, fail):
        backbone(torch.randn(1, 3, 16, 16))
    assert all(flags(backbone))
    assert not any(module._forward_pre_hooks for module in backbone.modules())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_small_patch16_18x2_224", {}, "block 0 .ParallelThingsBlock. has 2 attention modules"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, "block 0 mixes its tokens by more than one softmax a head"),
    ],
)
def test_models_that_cannot_be_watched_say_so(name: str, arguments: dict[str, Any], message: str) -> None:
    backbone = Backbone(timm.create_model(name, **SMALL, img_size=32, **arguments), 32).eval()
    fused = flags(backbone)
    with pytest.raises(NoAttention, match=message):
        matrices(backbone, torch.randn(1, 3, 32, 32))
    assert flags(backbone) == fused


def by_hand() -> Tensor:
    """One image, one head; tokens cls, register, and the patches 0 1 / 2 3 of a 2 x 2 grid."""
    return torch.tensor(
        [
            [0.2, 0.1, 0.35, 0.0, 0.0, 0.35],  # cls looks at two opposite corners alike
            [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
            [0.4, 0.1, 0.5, 0.0, 0.0, 0.0],  # patch 0 at itself: 0
            [0.0, 0.6, 0.2, 0.2, 0.0, 0.0],  # patch 1 half at its left neighbour: 0.5
            [0.2, 0.3, 0.0, 0.5, 0.0, 0.0],  # patch 2 at the opposite corner: sqrt 2
            [0.0, 0.0, 0.0, 0.0, 0.25, 0.75],  # patch 3 a quarter at its left neighbour: 0.25
        ]
    )[None, None]


def test_statistics_of_a_matrix_written_by_hand() -> None:
    statistics = attention_statistics(by_hand(), cls=1, registers=1, columns=2)
    expected = {
        "cls_entropy": math.log(2) / math.log(4),
        "cls_effective_patches": 2.0,
        "cls_self": 0.2,
        "cls_spatial_variance": 0.5,  # both corners are sqrt(1/2) from the middle
        "distance": (0 + 0.5 + math.sqrt(2) + 0.25) / 4,
        "cls0_from_patches": 0.6 / 4,
        "cls0_from_all": 1.3 / 6,
        "register0_from_patches": 1.0 / 4,
        "register0_from_all": 1.6 / 6,
    }
    assert {name: pytest.approx(values.item()) for name, values in statistics.items() if values is not None} == expected


def test_heads_and_images_are_kept_apart() -> None:
    uniform, one_hot = torch.full((6, 6), 1 / 6), torch.eye(6)[[3, 3, 3, 3, 3, 3]]
    attention = torch.stack([torch.stack([uniform, one_hot]), torch.stack([one_hot, uniform]), torch.stack([uniform, uniform])])
    statistics = attention_statistics(attention, cls=1, registers=1, columns=2)
    entropy, effective = statistics["cls_entropy"], statistics["cls_effective_patches"]
    assert entropy is not None
    assert effective is not None
    torch.testing.assert_close(entropy, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    torch.testing.assert_close(effective, torch.tensor([[4.0, 1.0], [1.0, 4.0], [4.0, 4.0]]))


def test_distance_on_a_line_and_a_grid_of_other_width() -> None:
    attention = torch.zeros(1, 1, 6, 6)
    attention[0, 0, :, 0] = 1.0  # all look at the first
    line = attention_statistics(attention, cls=0, registers=0, columns=6)["distance"]
    grid = attention_statistics(attention, cls=0, registers=0, columns=3)["distance"]
    assert line is not None
    assert grid is not None
    assert line.item() == pytest.approx(15 / 6)
    assert grid.item() == pytest.approx((0 + 1 + 2 + 1 + math.sqrt(2) + math.sqrt(5)) / 6)


def test_without_class_token_its_statistics_are_none_and_with_two_they_are_means() -> None:
    statistics = attention_statistics(by_hand(), cls=0, registers=2, columns=2)
    assert [name for name, values in statistics.items() if values is None] == [
        "cls_entropy",
        "cls_effective_patches",
        "cls_self",
        "cls_spatial_variance",
    ]
    assert statistics["register1_from_patches"] is not None
    attention = by_hand()
    attention[0, 0, 1] = torch.tensor([0.0, 0.4, 0.15, 0.15, 0.15, 0.15])
    statistics = attention_statistics(attention, cls=2, registers=0, columns=2)
    own, entropy = statistics["cls_self"], statistics["cls_entropy"]
    assert own is not None
    assert entropy is not None
    assert own.item() == pytest.approx((0.2 + 0.4) / 2)
    assert entropy.item() == pytest.approx((0.5 + 1.0) / 2)


def test_no_attention_to_any_patch_stays_finite() -> None:
    attention = torch.zeros(1, 1, 5, 5)
    attention[..., 0] = 1.0
    statistics = attention_statistics(attention, cls=1, registers=0, columns=2)
    assert all(values is not None and values.isfinite().all() for values in statistics.values())

"""MAE against a loop written from the paper, with the same weights; masks, targets, positions; every readout as the global token."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightly.models.utils import get_2d_sine_cosine_positional_embedding

from ssl_vit.data.stream import Batch
from ssl_vit.data.views import SingleCrop
from ssl_vit.errors import UsageError
from ssl_vit.methods import MAE
from ssl_vit.methods.mae import DecoderConfig, mae_loss, masked, random_keep
from ssl_vit.methods.optim import OptimConfig
from ssl_vit.model.positions import sincos_positions
from tests.conftest import TINY

DECODER = DecoderConfig(width=16, depth=2, heads=2)


def tiny(**changes: Any) -> MAE:
    torch.manual_seed(0)
    module = MAE(**{"backbone": TINY, "decoder": DECODER, "crop": SingleCrop(size=16), **changes})
    module.report = lambda loss, **metrics: {}  # type: ignore[method-assign]
    return module


def papers_forward(model: MAE, image: torch.Tensor, keep: list[int]) -> torch.Tensor:
    """Section 3 for one image, without registers: patches, positions, drop, CLS, encoder, mask tokens, unshuffle, decoder."""
    vit, decoder, p = model.backbone.vit, model.decoder, model.backbone.patch
    grid = image.shape[-1] // p
    embedded = []
    for row in range(grid):
        for column in range(grid):
            pixels = image[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
            embedded.append((vit.patch_embed.proj.weight * pixels).sum(dim=(1, 2, 3)) + vit.patch_embed.proj.bias)
    x = torch.stack(embedded) + vit.pos_embed[0]
    x = torch.cat([vit.cls_token[0], x[keep]])[None]
    for block in vit.blocks:
        x = block(x)
    x = decoder.embed(vit.norm(x))[0]
    full = [decoder.mask_token[0, 0]] * grid**2
    for slot, patch in enumerate(keep):
        full[patch] = x[1 + slot]
    y = torch.cat([x[:1], torch.stack(full) + decoder.position[0]])[None]
    for block in decoder.blocks:
        y = block(y)
    return decoder.pixels(decoder.norm(y))[0, 1:]


def test_forward_is_the_papers_when_there_are_no_registers() -> None:
    model = tiny(backbone=replace(TINY, registers=0)).eval()
    images = torch.randn(3, 3, 16, 16)
    keep = random_keep(7, torch.arange(3), 16, 4)
    prediction = model.predict_pixels(images, keep)
    for image, kept, found in zip(images, keep, prediction, strict=True):
        torch.testing.assert_close(found, papers_forward(model, image, kept.tolist()), rtol=0, atol=1e-5)


def test_loss_is_over_masked_patches_only() -> None:
    prediction, target = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    mask = torch.tensor([[True, False, True, True], [False, True, True, True]])
    by_hand = [((prediction[i, j] - target[i, j]) ** 2).mean().item() for i in range(2) for j in range(4) if mask[i, j]]
    assert mae_loss(prediction, target, mask).item() == pytest.approx(np.mean(by_hand))
    changed = prediction.clone()
    changed[~mask] += 100
    assert torch.equal(mae_loss(changed, target, mask), mae_loss(prediction, target, mask))


def test_targets_are_normalised_with_the_unbiased_variance() -> None:
    images = torch.rand(2, 3, 16, 16)
    pixels = images[1, :, 4:8, 8:12].permute(1, 2, 0).flatten().double().numpy()
    expected = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
    np.testing.assert_allclose(tiny().targets(images)[1, 1 * 4 + 2].numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(tiny(norm_pixels=False).targets(images)[1, 6].numpy(), pixels, atol=1e-7)


def test_mask_keeps_a_quarter_differently_for_each_image_and_epoch() -> None:
    keep = random_keep(0, torch.arange(400), 16, 4)
    hidden = masked(keep, 16)
    assert hidden.sum(dim=1).eq(12).all()
    assert all(not hidden[i, keep[i]].any() for i in range(400))
    share = (~hidden).float().mean(dim=0)
    assert (share - 0.25).abs().max() < 0.1  # every patch alike
    assert not torch.equal(keep[:200], random_keep(0, torch.arange(200) + 400, 16, 4))
    assert torch.equal(keep[37:39], random_keep(0, torch.tensor([37, 38]), 16, 4))


@pytest.mark.parametrize(("width", "grid"), [(16, 4), (96, 14)])
def test_positions_match_lightly(width: int, grid: int) -> None:
    expected = get_2d_sine_cosine_positional_embedding(embed_dim=width, grid_size=grid, cls_token=False)
    np.testing.assert_allclose(sincos_positions(width, grid)[0].numpy(), expected, atol=1e-6)


def test_positions_are_fixed_and_initialisation_is_xavier() -> None:
    module = tiny(backbone=replace(TINY, width=192, heads=3))
    assert not module.backbone.vit.pos_embed.requires_grad
    assert torch.equal(module.backbone.vit.pos_embed, sincos_positions(192, 4))
    kernel = module.backbone.vit.patch_embed.proj.weight.flatten(1)
    for weight in (kernel, module.backbone.vit.blocks[0].mlp.fc1.weight):
        bound = (6 / sum(weight.shape)) ** 0.5
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize("readout", ["cls", "gap", "register", "gap/pre", "register1"])
def test_the_global_token_is_the_readout(readout: str, batch: Batch) -> None:
    """One token whatever the readout, so that all arms decode a sequence of the same length; and every parameter is trained."""
    module = tiny(readout=readout)
    lengths: list[int] = []
    module.decoder.blocks.register_forward_hook(lambda m, inputs, output: lengths.append(inputs[0].shape[1]))
    module.training_step(batch, 0).backward()
    assert lengths == [1 + 16]
    assert [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None] == []
    seen: list[torch.Tensor] = []
    module.decoder.embed.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    images, keep = torch.randn(2, 3, 16, 16), random_keep(0, torch.arange(2), 16, 4)
    module.predict_pixels(images, keep)
    tokens = module.backbone(images, keep=keep)
    expected = {
        "cls": tokens.normed.cls[:, 0],
        "gap": tokens.normed.patches.mean(1),
        "gap/pre": tokens.patches.mean(1),
        "register": tokens.normed.registers.mean(1),
        "register1": tokens.normed.registers[:, 1],
    }
    assert torch.equal(seen[0][:, 0], expected[readout])
    assert torch.equal(seen[0][:, 1:], tokens.normed.patches)


@pytest.mark.parametrize("readout", ["max", "gem", "ep", "map_cls/pre"])
def test_every_readout_of_one_token_trains(readout: str, batch: Batch) -> None:
    module = tiny(readout=readout)
    module.training_step(batch, 0).backward()
    assert [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None] == []
    decay, plain = ({id(p) for p in group["params"]} for group in module.configure_optimizers().param_groups)
    for name, parameter in module.readout.named_parameters():
        assert id(parameter) in (decay if parameter.ndim > 1 else plain), name


def test_overfits_one_batch(batch: Batch) -> None:
    module = tiny(optim=OptimConfig(lr=3e-3, min_lr=0.0, warmup_epochs=0.0, weight_decay=0.0, weight_decay_end=0.0))
    smooth = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4) * 255, size=16, mode="bicubic").clamp(0, 255).byte()
    batch = batch._replace(images=smooth)
    optimizer = module.configure_optimizers()
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_optimiser_is_the_papers() -> None:
    module = tiny()
    assert module.configure_optimizers().defaults["betas"] == (0.9, 0.95)
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        num_training_batches=20, estimated_stepping_batches=4000, datamodule=SimpleNamespace(batch_size=4096)
    )
    module.accumulate = 2
    assert module.steps_of(40.0) == 400  # twenty micro-batches an epoch, two a step
    assert module.schedule(400)["lr"] == pytest.approx(1.5e-4 * 4096 / 256)
    assert module.schedule(200)["lr"] == pytest.approx(0.5 * 1.5e-4 * 4096 / 256)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"readout": "cls+gap"}, "must be one token wide"),
        ({"readout": "cls@last2"}, "must be one token wide"),
        ({"readout": "ep@block0"}, "leaves out the last block"),
        ({"readout": "register", "backbone": replace(TINY, registers=0)}, "needs registers > 0"),
        ({"mask_ratio": 1.0}, "keeps 0 of 16 patches"),
        ({"crop": SingleCrop(size=32)}, "crop.size is 32, backbone.image_size 16"),
        ({"backbone": replace(TINY, width=18)}, "multiple of 4, got 18"),
    ],
)
def test_bad_recipes(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny(**wrong)
    with pytest.raises(UsageError, match=r"decoder.width 18 must be a multiple of decoder.heads"):
        DecoderConfig(width=18, heads=4)

"""What only a GPU can show; each skips without one."""

from dataclasses import replace
from typing import Any

import lightning
import pytest
import torch

from ssl_vit.data.stream import Batch
from ssl_vit.data.views import SingleCrop, multi_crop, single_crop
from ssl_vit.methods import DINO
from ssl_vit.methods.dino import dino_loss
from ssl_vit.model.precision import tf32
from tests.conftest import TINY
from tests.methods.test_dino import CROPS, attach, tiny
from tests.methods.test_no_waiting import mae
from tests.model.test_positions import gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def dino() -> DINO:
    return attach(tiny(backbone=replace(TINY, drop_path=0.1)))


def cuda_batch(side: int = 16) -> Batch:
    images = torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8)
    return Batch(images.cuda(), torch.full((8, 2), side).cuda(), torch.arange(8).cuda(), 0)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("build", [dino, mae])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_whole_step_does_not_wait(build: Any, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views, both passes, clipping, AdamW and the teacher's average, in a step whose values are not read."""
    module = build().cuda()
    del module.report
    module.trainer.log_every_n_steps = 10
    step = lambda self, epoch, batch_idx, optimizer: optimizer.step()  # noqa: E731
    monkeypatch.setattr(lightning.LightningModule, "optimizer_step", step)
    optimizer, batch = module.configure_optimizers(), cuda_batch()
    try:
        for mode in ("default", "error"):  # in the first one libraries start, and may wait
            torch.cuda.set_sync_debug_mode(mode)
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
                loss = module.training_step(batch, 0)
            optimizer.zero_grad()
            loss.backward()
            module.on_before_optimizer_step(optimizer)
            if isinstance(module, DINO):
                module.configure_gradient_clipping(optimizer)
            module.optimizer_step(0, 0, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_the_loss_is_not_rounded_to_bfloat16_nor_to_tf32() -> None:
    targets, student = (torch.randn(views, 16, 4096, device="cuda") for views in (2, 6))
    targets = (4 * targets).softmax(-1)
    exact = dino_loss(targets.double(), student.double(), 0.1).item()
    with tf32(), torch.autocast("cuda", dtype=torch.bfloat16):
        loss = dino_loss(targets, student, 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=1e-5)  # TF32 and bfloat16 have 11 and 8 bits


@pytest.mark.filterwarnings("default")  # the compiler warns about its own code
@pytest.mark.parametrize("changes", [{"compiled": True}, {"checkpointing": True}])
def test_compiled_and_recomputed_blocks_give_the_plain_gradients(changes: dict[str, Any]) -> None:
    expected, found = gradients("cuda"), gradients("cuda", **changes)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1024 * 2**-23 * max(value.abs().max().item(), 1), name


def test_views_are_those_of_the_cpu() -> None:
    """Boxes and random numbers are the same; the products sum in another order."""
    on_gpu = cuda_batch(side=40)
    on_cpu = Batch(on_gpu.images.cpu(), on_gpu.sizes.cpu(), on_gpu.positions.cpu(), 0)
    with tf32():  # as in training: it would round them by 5e-4
        views = [(*multi_crop(batch, 3, CROPS), single_crop(batch, 3, SingleCrop(size=16))) for batch in (on_cpu, on_gpu)]
    for expected, found in zip(*views, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)

"""Precision of the loss, the temperature's table, and runs in other precisions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_vit.cli import run
from ssl_vit.errors import UsageError
from ssl_vit.methods import MAE
from ssl_vit.methods.dino import DINO, TeacherConfig, dino_loss
from ssl_vit.methods.mae import DecoderConfig, SingleCrop
from tests.conftest import TINY
from tests.methods.test_dino import CROPS, HEAD, attach, loop_loss, tiny


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_stays_float32(autocast: bool) -> None:
    """Each term -p log q is rounded a few times by 2^-24 of itself and of log q (|log q| <= 2 * max|s| / 0.1 + ln k); the sums of
    pairwise order add a rounding a level. 32 roundings of ln k + 2 max|s| / .1 bound that; a bfloat16 product is off by 2^-9 of it."""
    k = 4096
    targets = (torch.randn(2, 16, k, dtype=torch.float64) * 4).softmax(-1)
    student = torch.rand(6, 16, k, dtype=torch.float64) * 0.4 - 0.2
    exact = dino_loss(targets, student, 0.1)
    inputs = student.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = dino_loss(targets.float(), inputs, 0.1)
    assert loss.dtype == torch.float32
    bound = 32 * 2**-24 * (np.log(k) + 2 * 0.2 / 0.1)
    assert abs(loss.item() - exact.item()) < bound
    loss.backward()
    exact_inputs = student.clone().requires_grad_()
    dino_loss(targets, exact_inputs, 0.1).backward()
    assert inputs.grad is not None
    assert exact_inputs.grad is not None
    scale = exact_inputs.grad.abs().max()
    assert (inputs.grad - exact_inputs.grad).abs().max() < 32 * 2**-24 * (np.log(k) + 4) * scale


def test_loss_of_half_precision_logits_is_that_of_their_float32_values() -> None:
    targets, student = torch.randn(2, 3, 50).softmax(-1), torch.randn(4, 3, 50).bfloat16()
    assert torch.equal(dino_loss(targets, student, 0.1), dino_loss(targets, student.float(), 0.1))
    teacher = targets.double().log() * 0.04
    exact = loop_loss(student.double(), teacher, torch.zeros(50).double(), 0.04)
    assert dino_loss(targets, student, 0.1).item() == pytest.approx(exact, rel=1e-5)


def test_teacher_temperature_is_the_authors_table_by_epoch() -> None:
    """`np.concatenate((np.linspace(start, end, warmup), np.ones(epochs - warmup) * end))[epoch]`; 10 steps an epoch here."""
    module = attach(tiny(teacher=TeacherConfig(temperature=0.07, warmup_temperature=0.04, warmup_epochs=4.0)))
    table = np.concatenate((np.linspace(0.04, 0.07, 4), np.ones(6) * 0.07))
    for step in range(100):
        assert module.schedule(step)["teacher_temperature"] == pytest.approx(table[step // 10], rel=1e-12)
    part = attach(tiny(teacher=TeacherConfig(temperature=0.07, warmup_temperature=0.04, warmup_epochs=0.5)))
    found = [part.schedule(step)["teacher_temperature"] for step in range(7)]
    assert found == pytest.approx([*np.linspace(0.04, 0.07, 5), 0.07, 0.07], rel=1e-12)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("method", ["dino", "mae"])
@pytest.mark.usefixtures("pictures_and_recipes")
def test_every_precision_trains(method: str, precision: str) -> None:
    options = ["--trainer.precision", precision, "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    assert run(["pretrain", f"{method}.yaml", "--out", "run", *options]) == 0
    kinds = {value.dtype for value in torch.load(Path("run/last.ckpt"), weights_only=True)["state_dict"].values()}
    assert kinds == {torch.float64 if precision == "64-true" else torch.float32}


def test_the_last_block_by_its_number() -> None:
    depth = TINY.depth
    assert depth == 3
    assert str(tiny(readout="cls@block2").spec) == "cls"
    module = MAE("gap@block2/pre", TINY, DecoderConfig(16, 1, 2), SingleCrop(size=16))
    assert (str(module.spec), module.recipe["readout"]) == ("gap/pre", "gap/pre")
    with pytest.raises(UsageError, match="'cls@block3' reads more than there is: the depth is 3 blocks; choose @block0 to @block2"):
        DINO("cls@block3", TINY, HEAD, CROPS)
    assert [*tiny(readout="ep@block2").teacher.readout.poolers] == ["ep"]  # as its checkpoint's readout says
    with pytest.raises(UsageError, match="leaves out the last block"):
        MAE("gap@block1", TINY, DecoderConfig(16, 1, 2), SingleCrop(size=16))

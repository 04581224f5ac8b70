"""DINO against loops written from the paper, lightly's loss, and the promises of the recipe: clipping, freezing, EMA, centre, collapse."""

import copy
import logging
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightly.loss import DINOLoss
from torch.nn import functional as F

from ssl_vit.data.stream import Batch
from ssl_vit.data.views import MultiCrop
from ssl_vit.errors import UsageError
from ssl_vit.methods import DINO
from ssl_vit.methods.dino import HeadConfig, TeacherConfig, dino_loss, entropy, information, teacher_targets
from ssl_vit.methods.optim import OptimConfig, clip_each
from tests.conftest import TINY

CROPS = MultiCrop(global_size=16, local_size=8, n_local=2, blur_sigma=(0.1, 0.5))
HEAD = HeadConfig(hidden=32, bottleneck=16, prototypes=64, freeze_epochs=0.0)
OPTIM = OptimConfig(lr=4e-3, min_lr=1e-6, warmup_epochs=0.0, weight_decay=0.04, weight_decay_end=0.4)


def tiny(**changes: Any) -> DINO:
    torch.manual_seed(0)
    return DINO(**{"backbone": TINY, "head": HEAD, "crops": CROPS, "optim": OPTIM, **changes})


def attach(module: DINO, total_steps: int = 100) -> DINO:
    """What the methods ask of a trainer, without one."""
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=0,
        num_training_batches=10,
        log_every_n_steps=1,
        estimated_stepping_batches=total_steps,
        datamodule=SimpleNamespace(batch_size=256),
        precision_plugin=None,
    )
    module.scheduled = module.schedule(0)
    module.report = lambda loss, **metrics: {}  # type: ignore[method-assign]
    return module


def loop_loss(student: torch.Tensor, teacher: torch.Tensor, center: torch.Tensor, teacher_temp: float) -> float:
    """Algorithm 1 with multi-crop, term by term."""
    total, terms = 0.0, 0
    for i in range(2):
        for j in range(len(student)):
            if i == j:
                continue
            for image in range(student.shape[1]):
                p = F.softmax((teacher[i, image] - center) / teacher_temp, dim=0)
                q = F.softmax(student[j, image] / 0.1, dim=0)
                total += -(p * q.log()).sum().item()
                terms += 1
    return total / terms


@pytest.mark.parametrize("views", [2, 5])
def test_loss_is_the_papers(views: int) -> None:
    student, teacher, center = torch.randn(views, 3, 7).double(), torch.randn(2, 3, 7).double(), torch.randn(7).double()
    found = dino_loss(teacher_targets(teacher, center, 0.05), student, 0.1)
    assert found.item() == pytest.approx(loop_loss(student, teacher, center, 0.05), rel=1e-10)


@pytest.mark.parametrize("views", [2, 10])
@pytest.mark.parametrize("prototypes", [16, 1000])
@pytest.mark.parametrize("temperature", [0.04, 0.07])
def test_loss_and_centre_match_lightly(views: int, prototypes: int, temperature: float) -> None:
    reference = DINOLoss(output_dim=prototypes, teacher_temp=temperature, warmup_teacher_temp=temperature, center_momentum=0.9)
    module = tiny(head=replace(HEAD, prototypes=prototypes))
    for _ in range(3):  # the centre moves between the steps
        teacher, student = torch.randn(2, 6, prototypes), torch.randn(views, 6, prototypes)
        expected = reference(list(teacher), list(student))
        found = dino_loss(teacher_targets(teacher, module.center, temperature), student, 0.1)
        module.update_center(teacher)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module.center, reference.center.flatten(), rtol=1e-5, atol=1e-7)


def test_training_step_is_the_loss_of_its_views(batch: Batch) -> None:
    """The whole step against views passed one by one."""
    module = attach(tiny())
    loss = module.training_step(batch, 0)
    fresh = attach(tiny())
    large, small = fresh.views(batch)
    with torch.no_grad():
        teacher = torch.stack([fresh.teacher(view[None])[0] for view in large])
        student = [fresh.student(view[None])[0] for view in [*large, *small]]
    n_views = [view.shape for view in student]
    assert n_views == [(8, 64)] * 4
    assert loss.item() == pytest.approx(loop_loss(torch.stack(student), teacher, torch.zeros(64), 0.04), rel=1e-4)
    torch.testing.assert_close(module.center, 0.1 * teacher.mean(dim=(0, 1)))


def test_loss_starts_near_ln_k() -> None:
    """Cosines of random unit vectors in 256-d have variance 1/256: two views that agree wholly would start at
    ln k - 1/256 / (0.04 * 0.1) + 1/256 / (2 * 0.1**2) = ln k - 0.78, views that do not agree at ln k + 0.2."""
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    module = attach(tiny(head=HeadConfig(hidden=64, bottleneck=256, prototypes=4096)))
    loss = module.training_step(Batch(images, torch.full((16, 2), 16), torch.arange(16), 0), 0)
    assert loss.item() == pytest.approx(math.log(4096) - 0.29, abs=0.55)


def test_teacher_gets_no_gradient_and_starts_as_the_student(batch: Batch) -> None:
    module = attach(tiny(backbone=replace(TINY, drop_path=0.2)))
    for (name, found), theirs in zip(module.student.named_parameters(), module.teacher.parameters(), strict=True):
        assert torch.equal(found, theirs), name
    module.training_step(batch, 0).backward()
    assert all(p.grad is None for p in module.teacher.parameters())
    rates = [block.drop_path1.drop_prob for block in module.student.backbone.vit.blocks[1:]]
    assert rates == pytest.approx([0.1, 0.2])
    assert all(isinstance(block.drop_path1, torch.nn.Identity) for block in module.teacher.backbone.vit.blocks)


@pytest.mark.parametrize(
    "readout", ["cls", "gap/pre", "register", "max", "gap/pooled", "cls+gap", "cls@last2", "ep+gem", "simpool_cls@last2/pre"]
)
def test_every_trainable_parameter_gets_a_gradient(readout: str, batch: Batch) -> None:
    """Otherwise DDP stops: a norm that `/pre` leaves unused is frozen."""
    module = attach(tiny(readout=readout))
    module.training_step(batch, 0).backward()
    assert [name for name, p in module.student.named_parameters() if p.requires_grad and p.grad is None] == []
    assert module.student.backbone.norm.weight.requires_grad == (not readout.endswith("/pre"))


def test_clipping_bounds_each_parameter_on_its_own() -> None:
    parameters = [torch.nn.Parameter(torch.randn(5, 4)), torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2))]
    parameters[0].grad, parameters[1].grad = torch.randn(5, 4) * 10, torch.randn(3) * 0.1
    expected = [parameters[0].grad * 3.0 / (parameters[0].grad.norm() + 1e-6), parameters[1].grad.clone()]
    clip_each(parameters, 3.0)
    torch.testing.assert_close(parameters[0].grad, expected[0])
    assert torch.equal(parameters[1].grad, expected[1])


def test_last_layer_stands_still_at_first(batch: Batch) -> None:
    module = attach(tiny(head=replace(HEAD, freeze_epochs=0.5)))
    for step, frozen in ((0, True), (4, True), (5, False)):
        module.zero_grad()
        module.training_step(batch, 0).backward()
        module.trainer.global_step = step
        module.configure_gradient_clipping(None)
        weights = [p for p in module.student.head.last.parameters() if p.requires_grad]
        assert [p.grad is None for p in weights] == [frozen]
        assert module.student.head.mlp[0].weight.grad is not None


def test_norm_of_the_last_layer() -> None:
    for fixed in (True, False):
        last = tiny(head=replace(HEAD, norm_last_layer=fixed)).student.head.last
        torch.testing.assert_close(last.weight.norm(dim=1), torch.ones(64))
        assert last.parametrizations.weight.original0.requires_grad is not fixed


def test_parameter_groups_and_scaled_rate() -> None:
    module = attach(tiny())
    optimizer = module.configure_optimizers()
    decay, plain = optimizer.param_groups
    names = {id(p): name for name, p in module.named_parameters()}
    assert all(p.ndim == 1 for p in plain["params"])
    assert all(p.ndim > 1 for p in decay["params"])
    assert {names[id(p)].split(".")[0] for group in (decay, plain) for p in group["params"]} == {"student"}
    assert plain["weight_decay"] == 0
    module.trainer.datamodule.batch_size = 512
    assert module.schedule(0)["lr"] == pytest.approx(2 * 4e-3)
    assert module.schedule(0)["weight_decay"] == pytest.approx(0.04)
    assert module.schedule(100)["weight_decay"] == pytest.approx(0.4)
    assert module.schedule(100)["teacher_momentum"] == pytest.approx(1.0)


def test_overfits_one_batch(batch: Batch) -> None:
    """The loss falls towards the entropy of the teacher's targets, which it cannot pass."""
    module = attach(tiny(teacher=TeacherConfig(momentum=1.0), crops=replace(CROPS, jitter_p=0.0, grey_p=0.0, blur_p=(0.0, 0.0, 0.0))))
    teacher = copy.deepcopy(module.teacher.state_dict())
    optimizer = module.configure_optimizers()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = module.training_step(batch, 0)
        module.center.zero_()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        large, _ = module.views(batch)
        targets = teacher_targets(module.teacher(large), module.center, 0.04)
        floor = -(targets * targets.log()).sum(-1).mean().item()
    assert all(torch.equal(a, b) for a, b in zip(teacher.values(), module.teacher.state_dict().values(), strict=True))
    assert losses[-1] - floor < 0.35 * (losses[0] - floor)


@pytest.mark.parametrize("every", [1, 10])
def test_collapse_is_warned_of_once_within_100_steps(every: int, caplog: pytest.LogCaptureFixture) -> None:
    for uniform in (True, False):
        module = attach(tiny())
        targets = torch.full((2, 8, 64), 1 / 64) if uniform else F.one_hot(torch.zeros(2, 8, dtype=torch.long), 64).float()
        values = {"teacher_entropy": entropy(targets).mean().item()}
        values["teacher_information"] = information(targets.mean(dim=(0, 1)), values["teacher_entropy"])
        assert values["teacher_information"] < 1e-6
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for step in range(100):
                module.trainer.global_step = step  # type: ignore[misc]
                module.warn_of_collapse(values if (step + 1) % every == 0 else {})
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "collapsed" in caplog.text


def test_a_teacher_that_recovers_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    module = attach(tiny())
    with caplog.at_level(logging.WARNING):
        for step in range(200):
            module.trainer.global_step = step  # type: ignore[misc]
            module.warn_of_collapse({"teacher_information": 0.0 if step % 40 else 0.5, "teacher_entropy": 1.0})
    assert caplog.records == []


def test_no_collapse_warning_for_a_fresh_model(batch: Batch, caplog: pytest.LogCaptureFixture) -> None:
    module = attach(tiny())
    del module.report
    module.log_dict = lambda values: None  # type: ignore[method-assign, assignment]
    module.warn_of_collapse = looked = Mock(wraps=module.warn_of_collapse)  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        for step in range(60):
            module.trainer.global_step = step  # type: ignore[misc]
            module.training_step(batch, 0)
    assert caplog.records == []
    assert sum("teacher_information" in call.args[0] for call in looked.call_args_list) == 60  # it is looked at


def test_information_is_between_0_and_1_and_counts_answers() -> None:
    targets = F.one_hot(torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]), 64).float()
    assert information(targets.mean(dim=(0, 1)), entropy(targets).mean().item()) == pytest.approx(math.log(4) / math.log(64))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crops": replace(CROPS, global_size=32)}, "crops.global_size is 32, backbone.image_size 16; set both to the same"),
        ({"crops": replace(CROPS, local_size=10)}, "local_size 10 is not divisible by backbone.patch 4"),
        ({"readout": "gap@block0"}, "leaves out the last block"),
        ({"readout": "register", "backbone": replace(TINY, registers=0)}, "needs registers > 0, got 0; set backbone.registers"),
    ],
)
def test_bad_recipes(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny(**wrong)

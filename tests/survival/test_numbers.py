"""A loss or a gradient that is not finite, on any process: no process takes the step, it is counted, and three in a row end the run."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning import Trainer

from ssl_vit.errors import Failure
from ssl_vit.methods import DINO, Method
from ssl_vit.train.callbacks import RunFolder
from ssl_vit.weights.checkpoint import read_checkpoint
from tests.methods.test_no_waiting import dino, mae
from tests.processes import Command, ranks

pytestmark = pytest.mark.usefixtures("pictures_and_recipes")
BAD = float("nan")
OPTIONS = ("--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--checkpoint_seconds", "1e-6")  # a checkpoint every step


def moved(module: Method, loss: float = 1.0, gradient: float = 0.1, teacher: float = 1.0) -> list[torch.Tensor]:
    """A step as Lightning takes it, with this loss, this value in all gradients, and this teacher output; all that it may change."""
    optimizer: Any = module._trainer.optimizer  # type: ignore[union-attr]
    module.report(torch.tensor(loss))
    if isinstance(module, DINO):
        module.update_center(torch.full((2, 8, 64), teacher))
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, gradient) if parameter.requires_grad else None
    module.on_before_optimizer_step(optimizer)
    module.optimizer_step(0, 0, optimizer, lambda: None)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [value.clone() for value in (*module.state_dict().values(), *moments)]


def ready(module: Any, **plugin: Any) -> Method:
    """After a first step that was good, so that weights, moments and centre are those of some step."""
    del module.report
    module.trainer.log_every_n_steps = 100
    module.trainer.optimizer = module.configure_optimizers()
    module.trainer.precision_plugin = SimpleNamespace(**plugin)
    moved(module)
    return module  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [dino, mae])
@pytest.mark.parametrize(
    "bad", [{"loss": BAD, "teacher": BAD}, {"loss": float("inf")}, {"gradient": BAD}, {"gradient": float("inf")}, {"gradient": 1e30}]
)
def test_a_step_that_is_not_finite_changes_nothing(build: Callable[[], Method], bad: dict[str, float]) -> None:
    """Not a weight, a moment, a step count of AdamW, the teacher nor the centre; the next one goes on as if it had not been."""
    module = ready(build())
    torch.manual_seed(0)
    other = ready(build())
    before = moved(module)
    assert all(torch.equal(a, b) for a, b in zip(before, moved(module, **bad), strict=True))
    assert module.skipped() == (1, 1)
    moved(other)
    assert all(torch.equal(a, b) for a, b in zip(moved(module), moved(other), strict=True))
    assert module.skipped() == (1, 0)


def test_the_loss_of_each_micro_batch_of_a_step_counts() -> None:
    module = ready(mae())
    before = moved(module)
    module.report(torch.tensor(BAD))
    assert all(torch.equal(a, b) for a, b in zip(before, moved(module), strict=True))  # whose own loss is finite
    assert module.skipped() == (1, 1)


def test_an_optimiser_without_a_fused_kernel_skips_too() -> None:
    module = ready(mae())
    module.trainer.optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)  # type: ignore[attr-defined]
    before = moved(module)
    assert all(torch.equal(a, b) for a, b in zip(before, moved(module, gradient=BAD), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, moved(module), strict=True))


def test_after_three_in_a_row_no_step_is_taken_and_the_count_is_kept_over_a_resume() -> None:
    module = ready(dino())
    for value in (BAD, BAD, 0.1, BAD, BAD):
        moved(module, gradient=value)
    assert module.skipped() == (4, 2)
    module.on_save_checkpoint(checkpoint := {})
    resumed = dino()
    resumed.on_load_checkpoint(checkpoint)
    resumed = ready(resumed)
    assert resumed.skipped() == (4, 0)  # its first step was good
    before = moved(module)
    for value in (BAD, BAD, BAD, 0.1, 0.1):
        after = moved(module, gradient=value)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert module.skipped() == (9, 5)


def test_a_scaler_of_float16_may_skip_until_its_scale_is_1_and_then_no_step_is_taken() -> None:
    module = ready(dino(), scaler=object())
    for _ in range(17):  # from a scale of 65,536
        moved(module, gradient=float("inf"))
    assert module.skipped() == (17, 17)
    moved(module)
    assert module.skipped() == (17, 0)
    for _ in range(module.max_skipped):
        before = moved(module, gradient=BAD)
    assert all(torch.equal(a, b) for a, b in zip(before, moved(module), strict=True))
    assert module.skipped() == (38, 21)


def test_under_16_mixed_the_advice_names_bf16_mixed(tmp_path: Path) -> None:
    module = ready(mae(), scaler=object())
    for _ in range(module.max_skipped):
        moved(module, gradient=BAD)
    with pytest.raises(Failure, match=r"begin another run with a lower optim\.lr or --trainer\.precision bf16-mixed$"):
        RunFolder(tmp_path, 0)._skipped(module)


def test_once_no_step_is_taken_no_checkpoint_is_written(tmp_path: Path) -> None:
    module = ready(mae())
    for _ in range(3):
        moved(module, gradient=BAD)
    trainer = Mock(spec=Trainer, lightning_module=module)
    with pytest.raises(Failure, match="not finite in step"):
        RunFolder(tmp_path, 0)._save(trainer, tmp_path / "last.ckpt")
    trainer.save_checkpoint.assert_not_called()


def poison(steps: range, what: str, rank: int) -> None:
    """From now on the loss, or one value of a gradient, is not finite in these steps (from 1) on this rank."""
    report, before_step = Method.report, Method.on_before_optimizer_step

    def hit(self: Method) -> bool:
        return self._trainer is not None and self.global_rank == rank and self.global_step + 1 in steps

    def poisoned_loss(self: Method, loss: torch.Tensor, **metrics: Any) -> Any:
        return report(self, loss * BAD if what == "loss" and hit(self) else loss, **metrics)

    def poisoned_gradient(self: Method, optimizer: Any) -> None:
        if what == "gradient" and hit(self):
            next(p for p in self.parameters() if p.grad is not None).grad.view(-1)[0] = BAD  # type: ignore[union-attr]
        before_step(self, optimizer)

    Method.report, Method.on_before_optimizer_step = poisoned_loss, poisoned_gradient  # type: ignore[method-assign]


def run_two(method: str, out: str, steps: range, what: str, *options: str) -> list[Command]:
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "7")
    command = ("pretrain", f"{method}.yaml", "--out", out, *OPTIONS, *two, *options)
    return ranks(2, *command, before=partial(poison, steps, what, 1))


def counted(folder: str) -> list[int]:
    return [json.loads(line)["skipped_steps"] for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("method", "what"), [("dino", "gradient"), pytest.param("mae", "loss", marks=pytest.mark.survival)])
def test_a_bad_number_on_one_rank_of_two_skips_the_step_on_both(method: str, what: str) -> None:
    for process in run_two(method, "run", range(4, 6), what, "--keep_every_epochs", "1"):
        assert process.wait(100) == 0, process.said
    assert counted("run") == [0, 0, 0, 1, 2, 2, 2]
    assert json.loads(Path("run/run.json").read_text())["skipped_steps"] == 2
    before, after = (read_checkpoint(f"run/{name}.ckpt") for name in ("epoch-0001", "last"))
    assert all(value.isfinite().all() for value in after["state_dict"].values())
    assert after["optimizer_states"][0]["state"][0]["step"].item() == 5  # of 7
    assert before["optimizer_states"][0]["state"][0]["step"].item() == 3


@pytest.mark.parametrize("what", ["gradient", pytest.param("loss", marks=pytest.mark.survival)])
def test_three_in_a_row_end_the_run_and_leave_the_last_good_checkpoint(what: str) -> None:
    for process in run_two("mae", "run", range(3, 8), what):
        assert process.wait(100) == 1
        line = process.said.splitlines()[-1]
        assert line.startswith("ssl-vit: the loss or a gradient was not finite in step 3 and those after it")
        good = "; the last good checkpoint is run/last.ckpt of step 2; begin another run with a lower optim.lr and --init run/last.ckpt"
        assert line.endswith(good)
        assert "Traceback" not in process.said
    checkpoint = read_checkpoint("run/last.ckpt")
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert checkpoint["optimizer_states"][0]["state"][0]["step"].item() == 2
    assert not Path("run/run.json").exists()

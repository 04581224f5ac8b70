"""A teacher that gives all images one answer is warned of within 100 steps, and a healthy one never is; in whole runs."""

import logging
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ssl_vit.cli import run
from ssl_vit.methods import dino

COMMAND = ["pretrain", "dino_smoke", "--trainer.accelerator", "cpu", "--trainer.max_steps", "100"]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING and "collapsed" in record.getMessage()]


@pytest.mark.survival  # tests/methods/test_dino.py has the quick ones
@pytest.mark.parametrize(
    ("kind", "every"), [("one prototype", "50"), *((kind, every) for kind in ("uniform", "one prototype") for every in ("1", "10"))]
)
def test_a_collapse_is_warned_of_within_100_steps(
    kind: str, every: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    def collapsed(teacher: torch.Tensor, center: torch.Tensor, temperature: float) -> torch.Tensor:
        one = F.one_hot(torch.zeros(teacher.shape[:-1], dtype=torch.long), teacher.shape[-1]).float()
        return torch.full_like(one, 1 / teacher.shape[-1]) if kind == "uniform" else one

    monkeypatch.setattr(dino, "teacher_targets", collapsed)
    assert run([*COMMAND, "--out", str(tmp_path / "run"), "--trainer.log_every_n_steps", every]) == 0
    assert len(warnings(caplog)) == 1


@pytest.mark.survival
def test_a_healthy_warm_up_is_not_warned_of(caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    """200 steps that are nothing but warm-up."""
    long = ["--trainer.max_steps", "200", "--optim.warmup_epochs", "2", "--trainer.log_every_n_steps", "1"]
    assert run([*COMMAND, *long, "--out", str(tmp_path / "run")]) == 0
    assert warnings(caplog) == []

"""What is logged: values of the global batch, however it is cut."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_vit.cli import run
from tests.methods.test_dino import attach, tiny
from tests.train.test_ranks_pretrain import OPTIONS, several


def logged(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("pictures_and_recipes")
def test_micro_batches_and_devices_log_the_global_batch() -> None:
    command = ["pretrain", "dino.yaml", *OPTIONS, "--trainer.log_every_n_steps", "2", "--trainer.max_steps", "5"]
    assert run([*command, "--out", "whole"]) == 0
    assert run([*command, "--out", "cut", "--accumulate", "2"]) == 0
    several(2, "devices", *command[1:], "--accumulate", "2")
    whole = logged("whole")
    assert [line["step"] for line in whole] == [2, 4, 5]
    for other in ("cut", "devices"):
        for line, expected in zip(logged(other), whole, strict=True):
            # float32 sums in another order, through 5 steps of AdamW; the micro-batches' losses differ by 1e-2 and more
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
            assert line["teacher_information"] == pytest.approx(expected["teacher_information"], rel=1e-2)  # of the mean over them
            assert line.keys() == expected.keys()
            assert all(line[key] == expected[key] for key in ("step", "lr", "weight_decay"))


def test_metrics_are_means_over_the_micro_batches() -> None:
    module = attach(tiny())
    del module.report
    seen: list[dict[str, float]] = []
    module.log_dict = seen.append  # type: ignore[method-assign, assignment]
    module.accumulate = 3
    for step in range(2):
        module.trainer.global_step = step  # type: ignore[misc]
        for part, value in enumerate((1.0, 2.0, 6.0)):
            module.completes_step = part == 2
            read = module.report(torch.tensor(value), other=torch.tensor(10 * value))
            assert read == ({"loss": 3.0, "other": 30.0} if part == 2 else {})
    assert len(seen) == 2

"""What earlier versions wrote is read, or refused with both versions named. `before/` was written by the commit before format 2 of rows:
`mae.yaml` stopped at step 4 of 6, and its evaluation by k-NN."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_vit.cli import run
from ssl_vit.weights.checkpoint import FORMAT
from ssl_vit_eval.rows import RowStore
from tests.conftest import errors


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(Path(__file__).with_name("before"), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("before")
def test_an_earlier_run_is_evaluated_compared_and_gone_on_with() -> None:
    old = RowStore("eval").rows()
    assert len(old) == 8
    assert {row.predictions_hash for row in old} == {None}
    command = ["run/last.ckpt", "random:mae.yaml", "--data", "builtin:photos-new", "--protocols", "knn", "--readouts", "gap", "cls"]
    assert run(["eval", *command, "--out", "eval"]) == 0
    assert [row for row in RowStore("eval").rows() if row in old] == old  # of another decoder's pixels there may be rows beside them
    assert run(["compare", "eval", "run", "--out", "report"]) == 0
    assert run(["pretrain", "mae.yaml", "--out", "run", "--resume", "--trainer.accelerator", "cpu"]) == 0
    assert json.loads(Path("run/run.json").read_text())["steps"] == 6


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        (
            {"format": FORMAT + 1, "versions": "ssl-vit 9.0"},
            f"has checkpoint format {FORMAT + 1}, .*reads {FORMAT}; .* ssl-vit 9.0",
        ),
        ({}, f"has checkpoint format None, .*reads {FORMAT}; .*an unknown version"),
        ("text", f"has checkpoint format None, .*reads {FORMAT}; .*an unknown version"),
    ],
)
@pytest.mark.usefixtures("before")
def test_a_checkpoint_of_another_format_is_refused(entry: Any, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load("run/last.ckpt", weights_only=True)
    shutil.copy("run/last.ckpt", "run/previous.ckpt")  # which could be read, and would take the other's place
    torch.save({**content, "ssl_vit": entry}, "run/last.ckpt")
    for command in (
        ["eval", "run/last.ckpt", "--data", "builtin:photos-new"],
        ["export", "run/last.ckpt", "--out", "exported"],
        ["pretrain", "mae.yaml", "--init", "run/last.ckpt"],
        ["pretrain", "mae.yaml", "--out", "run", "--resume"],
    ):
        assert run(command) == 1
        [line] = errors(capsys)
        assert re.search(named, line), line

"""The global batch is the global batch, however it is cut; and a run goes on exactly, wherever it was stopped."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from ssl_vit.cli import run
from ssl_vit.methods import Method
from ssl_vit.train.pretrain import build_method, parse_recipe, pretrain
from ssl_vit.weights.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("pictures_and_recipes")
CPU = ["--trainer.accelerator", "cpu"]
EPOCHS = ("--trainer.max_steps", "-1", "--trainer.max_epochs", "3")  # of three batches


def train(recipe: str, out: str, *options: str, callback: Callback | None = None) -> dict[str, torch.Tensor]:
    checkpoint = pretrain(recipe, ["--out", out, *options, *CPU], [callback] if callback else [])
    return dict(read_checkpoint(checkpoint)["state_dict"]) if checkpoint.exists() else {}


def run_json(folder: str) -> dict[str, Any]:
    return dict(json.loads(Path(folder, "run.json").read_text()))


def assert_close(method: str, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """All weights together: AdamW turns the last bits of a gradient near 0 into visible steps."""
    parser, config = parse_recipe(f"{method}.yaml", [])
    start = build_method(config, parser.instantiate(config)).state_dict()
    assert one.keys() == other.keys() == start.keys()
    difference, movement = (sum((state[key] - one[key]).square().sum().item() for key in one) for state in (other, start))
    assert difference < 1e-5 * movement


class Stop(Callback):
    """What Lightning's clock does, after so many micro-batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.left -= 1
        trainer.should_stop = self.left <= 0


class Seen(Callback):
    def __init__(self) -> None:
        self.batches: list[tuple[int, list[int]]] = []
        self.epochs: list[int] = []
        self.center: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Method, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((batch.step, batch.positions.tolist()))
        self.epochs.append(trainer.current_epoch)
        if hasattr(module, "center"):
            self.center.append(module.center.clone())


class Kept(Callback):
    """All that step 5 depends on, before it is taken; what a method draws from torch in every step among it."""

    def on_before_backward(self, trainer: Any, module: Any, loss: torch.Tensor) -> None:
        drawn = torch.rand(3)
        if trainer.global_step == 4:
            found = {"weights": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "scheduled": module.scheduled}
            self.found = copy.deepcopy({**found, "drawn": drawn})


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


@pytest.mark.parametrize("method", ["dino", "mae"])
def test_what_is_saved_is_what_is_read(method: str) -> None:
    """Student, teacher, centre, the optimiser's groups and moments, the scheduled values, and what is drawn."""
    whole, resumed = Kept(), Kept()
    train(f"{method}.yaml", "whole", callback=whole)
    train(f"{method}.yaml", "cut", callback=Stop(4))
    train(f"{method}.yaml", "cut", "--resume", callback=resumed)
    assert same(whole.found, resumed.found)
    assert [group["name"] for group in whole.found["optimizer"]["param_groups"]] == ["decay", "no_decay"]
    assert len(whole.found["optimizer"]["state"]) > 0
    parts = {key.partition(".")[0] for key in whole.found["weights"]}
    assert {"student", "teacher", "center"} <= parts or method == "mae"


@pytest.mark.parametrize("method", ["dino", "mae"])
def test_micro_batches_equal_the_whole_batch(method: str) -> None:
    seen, cut = Seen(), Seen()
    options = (*EPOCHS, "--backbone.drop_path", "0.2")
    one = train(f"{method}.yaml", "one", *options, callback=seen)
    four = train(f"{method}.yaml", "four", *options, "--accumulate", "4", callback=cut)
    assert_close(method, one, four)
    together = [[p for _, some in cut.batches[i : i + 4] for p in some] for i in range(0, 36, 4)]
    assert together == [positions for _, positions in seen.batches]
    assert [step for step, _ in cut.batches] == [i // 4 for i in range(36)]
    assert cut.epochs == [i // 12 for i in range(36)]
    assert run_json("one")["images"] == run_json("four")["images"] == 72
    assert run_json("one")["recipe_hash"] == run_json("four")["recipe_hash"]  # of the machine, not of the recipe
    if method == "dino":
        for i, center in enumerate(cut.center):  # still the old one until the last of the four
            torch.testing.assert_close(center, seen.center[i // 4] if i % 4 == 3 else cut.center[i - 1] if i % 4 else center)


@pytest.mark.slow  # test_ranks_pretrain.py holds it in float64
@pytest.mark.parametrize("method", ["dino", "mae"])
def test_two_ranks_of_two_micro_batches_equal_one(method: str) -> None:
    command = [str(Path(sys.executable).parent / "ssl-vit"), "pretrain", f"{method}.yaml", *CPU]
    cut = ["--out", "cut", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--accumulate", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *cut], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one = train(f"{method}.yaml", "one")
    assert_close(method, one, dict(read_checkpoint("cut/last.ckpt")["state_dict"]))


STEPS = ("--trainer.max_steps", "7")
FAST = [("dino", 1, EPOCHS), ("mae", 2, STEPS)]
ALL = [(method, accumulate, length) for method, accumulate in [("dino", 1), ("mae", 1), ("mae", 2)] for length in (EPOCHS, STEPS)]


@pytest.mark.parametrize(
    ("method", "accumulate", "length"), [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in ALL]
)
def test_a_run_that_a_clock_stops_anywhere_goes_on_exactly(method: str, accumulate: int, length: tuple[str, ...]) -> None:
    options = (*length, "--accumulate", str(accumulate))
    whole = train(f"{method}.yaml", "whole", *options)
    steps = run_json("whole")["steps"]
    assert steps == (9 if length == EPOCHS else 7)
    for after in (1, 3, 5, 6) if accumulate == 1 else (1, 4, 6, 7):  # ends of epochs among them
        train(f"{method}.yaml", f"cut{after}", *options, callback=Stop(after))
        assert not Path(f"cut{after}/run.json").exists()
        state = train(f"{method}.yaml", f"cut{after}", "--resume", *options)
        assert [key for key in whole if not torch.equal(state[key], whole[key])] == [], after
        assert run_json(f"cut{after}")["steps"] == steps


def test_a_float64_run_goes_on_exactly() -> None:
    whole = train("mae.yaml", "whole", "--trainer.precision", "64-true")
    train("mae.yaml", "cut", "--trainer.precision", "64-true", callback=Stop(4))
    state = train("mae.yaml", "cut", "--trainer.precision", "64-true", "--resume")
    assert all(value.dtype == torch.float64 for key, value in state.items() if key.endswith("weight"))
    assert [key for key in whole if not torch.equal(state[key], whole[key])] == []


def test_a_run_that_is_stopped_twice_and_cut_otherwise_counts_right() -> None:
    train("mae.yaml", "run", *EPOCHS, callback=Stop(4))
    seen = Seen()
    train("mae.yaml", "run", *EPOCHS, "--resume", "--accumulate", "2", callback=(stop := Stop(3)))
    assert stop.left == 0
    assert read_checkpoint("run/last.ckpt")["global_step"] == 5  # the third micro-batch was half a step
    train("mae.yaml", "run", *EPOCHS, "--resume", "--accumulate", "4", callback=seen)
    assert [step for step, _ in seen.batches] == [5 + i // 4 for i in range(16)]
    assert seen.epochs == [1] * 4 + [2] * 12
    assert run_json("run")["steps"] == 9


def test_overfit_repeats_its_batches_and_limits_count_global_ones() -> None:
    seen = Seen()
    train("dino.yaml", "over", "--trainer.overfit_batches", "2", "--accumulate", "2", callback=seen)
    assert [step for step, _ in seen.batches] == [0, 0, 1, 1] * 3 + [0, 0]
    assert seen.batches[:4] == seen.batches[4:8]
    assert seen.epochs == [i // 4 for i in range(14)]
    for limit, steps in (("2", 2), ("0.7", 2), ("1.0", 3), ("9", 3)):
        limits = ("--trainer.max_steps", "-1", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", limit)
        train("mae.yaml", f"limit{limit}", *limits, "--accumulate", "2")
        assert run_json(f"limit{limit}")["steps"] == steps


def test_checkpoints_are_kept_every_so_many_epochs() -> None:
    options = ("--trainer.max_steps", "13", "--keep_every_epochs", "2", "--accumulate", "2")  # three steps an epoch
    train("mae.yaml", "run", *options, callback=Stop(22))
    assert sorted(path.name for path in Path("run").glob("*.ckpt")) == ["epoch-0002.ckpt", "last.ckpt", "previous.ckpt"]
    train("mae.yaml", "run", *options, "--resume")
    assert sorted(path.name for path in Path("run").glob(".*")) == [".lock"]
    steps = {path.name: read_checkpoint(path)["global_step"] for path in Path("run").glob("*.ckpt")}
    assert steps == {"epoch-0002.ckpt": 6, "epoch-0004.ckpt": 12, "previous.ckpt": 12, "last.ckpt": 13}
    whole = train("mae.yaml", "whole", "--trainer.max_steps", "13", "--accumulate", "2")
    assert all(torch.equal(value, read_checkpoint("run/last.ckpt")["state_dict"][key]) for key, value in whole.items())


def test_resume_auto_starts_or_goes_on_or_has_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    whole = train("mae.yaml", "whole")
    Path("run").mkdir()
    Path("run/.recipe.yaml.partial").touch()  # killed while it wrote its first file
    for stop, steps in ((Stop(2), 2), (Stop(3), 5), (None, 7), (None, 7)):
        state = train("mae.yaml", "run", "--resume", "auto", callback=stop)
        assert read_checkpoint("run/last.ckpt")["global_step"] == steps
    assert all(torch.equal(state[key], value) for key, value in whole.items())
    before = Path("run/last.ckpt").read_bytes()
    assert run(["pretrain", "mae.yaml", "--out", "run", "--resume", "auto"]) == 0
    assert Path("run/last.ckpt").read_bytes() == before
    assert run(["pretrain", "mae.yaml", "--out", "pictures", "--resume", "auto"]) == 2
    assert "already holds something else" in capsys.readouterr().err


def test_seconds_waited_for_data_are_logged() -> None:
    train("mae.yaml", "run", "--trainer.log_every_n_steps", "1", callback=Stop(3))
    train("mae.yaml", "run", "--trainer.log_every_n_steps", "1", "--resume")
    waited = [json.loads(line)["data_seconds"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(waited) == 7
    assert waited == sorted(waited)
    assert 0 < run_json("run")["data_seconds"] < run_json("run")["seconds"]

"""`pretrain --dry-run`: what it tells is what the run then is, and it leaves nothing behind."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl_vit.cli import run
from ssl_vit.data.stream import Batch
from ssl_vit.methods import Method
from ssl_vit.train.cost import step_bytes, training_flops
from ssl_vit.train.pretrain import build_method, parse_recipe

pytestmark = pytest.mark.usefixtures("pictures_and_recipes")


def build(recipe: str, *options: str) -> Method:
    parser, config = parse_recipe(recipe, list(options))
    return build_method(config, parser.instantiate(config))


def fake(module: Method) -> FakeTensorMode:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module._apply(mode.from_tensor)  # type: ignore[no-untyped-call]
    return mode


@pytest.mark.parametrize("method", ["dino", "mae"])
def test_it_tells_what_the_run_then_is(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2", "--accumulate", "2"]
    here = sorted(Path().rglob("*"))
    assert run(["pretrain", f"{method}.yaml", *options, "--dry-run"]) == 0
    assert sorted(Path().rglob("*")) == here
    told = capsys.readouterr().out
    assert run(["pretrain", f"{method}.yaml", *options, "--out", "run", "--trainer.accelerator", "cpu"]) == 0
    summary = json.loads(Path("run/run.json").read_text())
    assert f"{summary['steps']:,} steps, {summary['images']:,} images" in told
    assert f"{summary['parameters'] / 1e6:,.4g} M of the backbone" in told
    assert f"{summary['flops'] / summary['images'] / 1e9:.4g} GFLOP" in told
    assert "8 = 1 devices x 2 micro-batches x 4 images" in told
    assert re.search(r"H100 +\(989 TFLOP/s\)", told)


def test_what_is_not_there_is_not_opened(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["pretrain", "mae.yaml", "--data.source", "owner/name", "--trainer.max_epochs", "3", "--dry-run"]
    assert run([*options, "--trainer.max_steps", "-1"]) == 0
    told = capsys.readouterr().out
    assert "length      not known, --data.source DIR or --trainer.max_steps tell; owner/name is not opened" in told
    assert "a million images on 1 devices" in told
    assert run([*options, "--trainer.max_steps", "-1", "--trainer.limit_train_batches", "5"]) == 0
    assert "15 steps, 120 images" in capsys.readouterr().out
    assert run([*options, "--trainer.max_steps", "2", "--init", "timm:vit_tiny_patch16_224"]) == 0  # nor are weights fetched


@pytest.mark.parametrize(
    ("devices", "nodes", "told"),
    [("2", "2", "4 devices"), ("0,1", "1", "2 devices"), ("[2,3]", "1", "2 devices"), ("3,", "1", "1 devices"), ("-1", "2", "2 devices")],
)
def test_devices_are_counted(devices: str, nodes: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "mae.yaml", f"--trainer.devices={devices}", "--trainer.num_nodes", nodes, "--dry-run"]) == 0
    assert f"8 = {told} x 1 micro-batches" in capsys.readouterr().out


@pytest.mark.parametrize("devices", ["0", "x", "0,x", "[-1]", "1.5", "-2"])
def test_what_names_no_devices_is_refused(devices: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "mae.yaml", f"--trainer.devices={devices}", "--dry-run"]) == 2
    assert "it must be a number above 0, indices such as 0,1 or auto" in capsys.readouterr().err


def test_what_the_run_would_refuse_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "mae.yaml", "--trainer.devices", "3", "--dry-run"]) == 2
    assert "data.batch_size 8 is not divisible by 3 devices" in capsys.readouterr().err
    assert run(["pretrain", "mae.yaml", "--data.batch_size", "100000", "--trainer.max_epochs", "1", "--dry-run"]) == 2
    assert re.search(r"data.batch_size is 100000, but .* holds \d+ images; lower it", capsys.readouterr().err)


@pytest.mark.parametrize("options", [(), ("--backbone.checkpointing", "true")])
@pytest.mark.parametrize("recipe", ["dino_photos", "mae_photos"])
def test_counted_bytes_are_those_that_torch_allocates(recipe: str, options: tuple[str, ...]) -> None:
    """Against the profiler's record of every allocation on the CPU in a real step with 32 images."""
    module = build(recipe, *options)
    size = module.backbone.image_size
    batch = Batch(torch.zeros(32, 3, size, size, dtype=torch.uint8), torch.full((32, 2), size), torch.arange(32), 0)
    module.scheduled = {"teacher_temperature": 1.0}
    views = module.views(batch)
    module.views = lambda batch: views  # type: ignore[method-assign]
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        module.training_step(batch, 0).backward()  # type: ignore[union-attr, no-untyped-call, call-overload]
    now = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    most += sum(view.nbytes for view in (views if isinstance(views, tuple) else (views,)))
    other = build(recipe, *options)
    mode = fake(other)
    assert step_bytes(other, mode, 32, half=False) == pytest.approx(most, rel=0.1)


@pytest.mark.parametrize("recipe", ["dino_smoke", "mae_smoke"])
def test_operations_of_fake_tensors_are_those_of_real_ones(recipe: str) -> None:
    module = build(recipe)
    assert training_flops(module, fake(module)) == training_flops(build(recipe))


def test_half_precision_and_recomputed_blocks_take_less() -> None:
    def bytes_of(*options: str, half: bool = False) -> int:
        module = build("mae_photos", *options)
        return step_bytes(module, fake(module), 32, half)

    assert bytes_of(half=True) < 0.8 * bytes_of()
    assert bytes_of("--backbone.checkpointing", "true") < 0.8 * bytes_of()

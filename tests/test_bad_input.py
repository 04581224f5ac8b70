"""What `ssl-vit pretrain` and `load_backbone` say to wrong input: one line, the right exit code, and nothing written."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_vit.cli import run
from ssl_vit.methods import METHODS
from ssl_vit.train.pretrain import LIKELY, recipe_parser
from ssl_vit.weights.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("pictures_and_recipes")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["dino_photo"], 2, "did you mean 'dino_photos'?"),
        (["nowhere"], 2, "unknown recipe 'nowhere': no such YAML file in /"),
        (["dinos.yaml"], 2, "did you mean 'dino.yaml'? choose one of: dino_cifar10, "),
        (["dino.yaml", "--backbone.widht", "3"], 2, "unknown key 'backbone.widht'; did you mean 'backbone.width'?"),
        (["dino.yaml", "--back.width", "3"], 2, "unknown key 'back.width'"),
        (["dino.yaml", "--bakbone.width", "3"], 2, "did you mean 'backbone.width'? choose one of: accumulate, backbone, "),
        (["dino.yaml", "--readout.x", "3"], 2, "unknown key 'readout.x'; did you mean 'readout'? choose one of: accumulate, backbone, "),
        (["dino.yaml", "--trainer.device", "2"], 2, "did you mean 'trainer.devices'?"),
        (["dino.yaml", "--res"], 2, "unknown key 'res'"),
        (["dino.yaml", "--backbone.width", "wide"], 2, "backbone.width is wide; it must be a whole number or null"),
        (["dino.yaml", "--optim.lr", "abc"], 2, "optim.lr is abc; it must be a number"),
        (["dino.yaml", "--optim.lr=-", "--seed", "1"], 2, "optim.lr is -; it must be a number"),
        (["dino.yaml", "--optim", "{lr: abc}"], 2, "optim.lr is {lr: abc}; it must be a number"),
        (["dino.yaml", "--backbone", "3"], 2, "backbone is 3; it must be KEY: VALUE pairs in braces"),
        (["dino.yaml", "--data.batch_size", "1.5"], 2, "data.batch_size is 1.5; it must be a whole number"),
        (["dino.yaml", "--data.decode", "strem"], 2, "data.decode is strem; it must be auto or memory or stream"),
        (["dino.yaml", "--optim.betas", "3"], 2, "optim.betas is 3; it must be numbers in brackets"),
        (["dino.yaml", "--backbone.checkpointing", "perhaps"], 2, "backbone.checkpointing is perhaps; it must be true or false"),
        (["dino.yaml", "--keep_every_epochs", "0"], 2, "keep_every_epochs is 0; it must be a whole number above 0 or null"),
        (["dino.yaml", "--readout", "rgister"], 2, "did you mean 'register'?"),
        (["dino.yaml", "--readout", "register", "--backbone.registers", "0"], 2, "needs registers > 0, got 0; set backbone.registers"),
        (["dino.yaml", "--backbone.image_size", "18"], 2, "a multiple of backbone.patch, 4, such as 16"),
        (["dino.yaml", "--data.source", "./nowhere"], 2, "/nowhere (given as ./nowhere); give a local folder"),
        (["dino.yaml", "--data.source", "pictuers"], 2, "did you mean 'pictures'? read as a Hugging Face id, the dataset 'pictuers' "),
        (["dino.yaml", "--data.source", "builtin:photo"], 2, "did you mean 'builtin:photos'?"),
        (["dino.yaml", "--data.source", "some/dataset"], 1, "/some/dataset (given as some/dataset); read as a Hugging Face id, the "),
        (["dino.yaml", "--data.split", "trian"], 2, "trian"),
        (["dino.yaml", "--data.batch_size", "64"], 2, "holds 26 images"),
        (["dino.yaml", "--trainer.max_steps", "-1"], 2, "set trainer.max_epochs or trainer.max_steps"),
        (["dino.yaml", "--out", "pictures"], 2, "already holds something else"),
        (["dino.yaml", "--out", "none", "--resume"], 2, "nothing to resume"),
        (["mae.yaml", "--readout", "cls+gap"], 2, "must be one token wide"),
        (["dino.yaml", "--backbone.name", "resnet18"], 2, "is not a Vision Transformer of timm; choose e.g. vit_"),
        (["dino.yaml", "--clip_grad", "-1"], 2, "clip_grad is -1.0; it must be ≥0"),
        (["dino.yaml", "--teacher.momentum", "2"], 2, "teacher.momentum is 2.0; it must be ≥0 and ≤1"),
        (["dino.yaml", "--optim.betas", "[0.9,1]"], 2, "optim.betas is (0.9, 1.0); it must be ≥0 and <1"),
        (["dino.yaml", "--seed", "-1"], 2, "seed is -1; it must be from 0"),
        (["dino.yaml", "--trainer.strategy", "dpp"], 2, "use ddp"),
        (["mae.yaml", "--trainer.strategy", "fsdp"], 2, "use ddp, and --accumulate or --backbone.checkpointing"),
        (["mae.yaml", "--trainer.strategy", "deepspeed_stage_2"], 2, "use ddp"),
        (["mae.yaml", '--trainer.strategy={"class_path": "ModelParallelStrategy"}'], 2, "use ddp"),
        (["mae.yaml", '--trainer.strategy={"class_path": "DDPStrategy", "init_args": {"start_method": "spawn"}}'], 2, "spawned"),
        (["dino.yaml", "--trainer.max_steps", "0"], 2, "trainer.max_steps is 0; it must be above 0"),
        (["dino.yaml", "--trainer.accumulate_grad_batches", "2"], 2, "cut it into micro-batches with --accumulate"),
        (["dino.yaml", "--trainer.reload_dataloaders_every_n_epochs", "1"], 2, "reload_dataloaders_every_n_epochs is 1, which cannot"),
        (["dino.yaml", "--trainer.use_distributed_sampler", "true"], 2, "cannot be honoured; the stream gives every rank its own share"),
        (["dino.yaml", "--trainer.fast_dev_run", "true"], 2, "use --trainer.max_steps 2"),
        (["dino.yaml", "--trainer.strategy", "ddp_spawn"], 2, "use ddp"),
        (["dino.yaml", "--trainer.strategy", "ddp_notebook", "--trainer.devices", "2"], 2, "use ddp"),
        (["dino.yaml", "--accumulate", "0"], 2, "accumulate is 0; it must be a whole number above 0"),
        (["dino.yaml", "--accumulate", "3"], 2, "batch_size 8 is not divisible by 1 device x accumulate 3"),
        (["dino.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "3"], 2, "batch_size 8 is not divisible by 3 devices;"),
        (["dino.yaml", "--trainer.limit_train_batches", "0.1"], 2, "is less than one batch; raise it"),
        (["dino.yaml", "--trainer.limit_train_batches", "1.5"], 2, "trainer.limit_train_batches is 1.5; it must be a number of batches"),
        (["dino.yaml", "--trainer.precision", "bf16-true"], 2, "rounds small steps of the weights away; use bf16-mixed"),
        (["dino.yaml", "--trainer.strategy", "ddp_find_unused_parameters_false"], 2, "would not resume exactly; use ddp"),
        (["dino.yaml", "--trainer.overfit_batches=-1"], 2, "trainer.overfit_batches is -1; it must be a number of batches"),
        (["--readout", "cls"], 2, "the recipe comes first"),
        ([], 2, "which recipe?"),
    ],
)
def test_bad_input_is_one_line(options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert run(["pretrain", *options]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ssl-vit: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert lines[0].count("did you mean") <= 1
    assert sorted(Path().rglob("*")) == before  # nothing written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: dino\nreadot: gap\n", "unknown key 'readot'; did you mean 'readout'?"),
        ("method: dino\nbackbone: {widht: 96}\n", "unknown key 'backbone.widht'; did you mean 'backbone.width'?"),
        ("method: dion\n", "did you mean 'dino'?"),
        ("readout: cls\n", "choose one of: dino, mae"),
        ("a: [\n", "is not YAML"),
        ("- 1\n", "holds [1], not keys with values"),
        ("method: mae\noptim: {lr: abc}\n", "optim.lr is abc; it must be a number"),
        ("method: [mae]\n", "choose one of: dino, mae"),
    ],
)
def test_bad_recipes_are_one_line(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(text)
    assert run(["pretrain", "bad.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_help_starts_with_what_is_changed_most(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "mae.yaml", "--help"]) == 0
    first = capsys.readouterr().out.splitlines()[:14]
    for option, value in (("readout", "(gap)"), ("data.source", "(./pictures)"), ("data.batch_size", "(8)"), ("optim.lr", "(0.02)")):
        assert any(line.startswith(f"  --{option} ") and line.endswith(value) for line in first)
    assert not any(line.endswith(")") for line in first if line.startswith(("  --resume ", "  --accumulate ")))  # the recipe says nothing


def test_help_of_a_recipe_that_lacks_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    Path("begun.yaml").write_text("method: mae\nreadout: gap\ntrainer: {max_epochs: 1}\n")
    assert run(["pretrain", "begun.yaml", "--help"]) == 0
    printed, error = capsys.readouterr()
    assert "--readout             what the loss is attached to: cls, gap, register, ... (gap)\n" in printed
    assert "--data.source SOURCE" in printed  # the whole list
    assert error == ""


def test_what_is_changed_most_are_options() -> None:
    for method in METHODS.values():
        assert LIKELY.keys() <= {*recipe_parser(method).get_defaults().keys()}


def test_checkpoints_that_are_none() -> None:
    Path("empty.ckpt").write_bytes(b"")
    Path("text.ckpt").write_text("hello")
    torch.save({"state_dict": {}}, "other.ckpt")
    torch.save({"ssl_vit": {"format": 99, "versions": {"ssl-vit": "9.0"}}, "state_dict": {}}, "newer.ckpt")
    Path("evil.ckpt").write_bytes(pickle.dumps(_Payload()))
    torch.save(_Payload(), "evil2.ckpt")
    for name, message in {
        "empty": "not a readable checkpoint",
        "text": "not a readable checkpoint",
        "other": "not a checkpoint of ssl-vit",
        "newer": "format 99",
        "evil": "not a readable checkpoint",
        "evil2": "not a readable checkpoint",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            read_checkpoint(f"{name}.ckpt")
    assert not Path("executed").exists()
    with pytest.raises(ValueError, match="there is no checkpoint nowhere"):
        read_checkpoint("nowhere.ckpt")
    with pytest.raises(ValueError, match="is a folder, not a checkpoint"):
        read_checkpoint("pictures")


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


def test_the_command_answers_at_once() -> None:
    """What takes seconds to import comes later, or neither a typo nor Ctrl-C would be answered in that time."""
    code = "import sys, ssl_vit.cli; print(sorted({'torch', 'timm', 'lightning', 'wandb'} & sys.modules.keys()), ssl_vit.readout.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "[] readout\n", done.stderr

"""`ssl-vit pretrain` as its users meet it: recipes, options, interruption, resume, two processes."""

import copy
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Timer

from ssl_vit import Backbone, load_backbone
from ssl_vit.assets import list_assets
from ssl_vit.cli import run
from ssl_vit.errors import Failure
from ssl_vit.methods import METHODS
from ssl_vit.train.callbacks import Progress, RunFolder
from ssl_vit.train.cost import training_flops
from ssl_vit.train.pretrain import build_method, parse_recipe, recipe_parser
from ssl_vit.weights.checkpoint import read_checkpoint
from tests.processes import Command
from tests.train.test_dry_run import fake

pytestmark = pytest.mark.usefixtures("pictures_and_recipes")


def pretrain(*options: str) -> int:
    return run(["pretrain", *options, "--trainer.accelerator", "cpu"])


def weights(folder: str) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(Path(folder) / "last.ckpt")["state_dict"])


@pytest.mark.parametrize("recipe", [name for name in list_assets("recipes") if name.endswith("smoke")])
def test_smoke_recipes(recipe: str) -> None:
    assert pretrain(recipe) == 0
    summary = json.loads(Path(f"runs/{recipe}/run.json").read_text())
    assert summary["steps"] == 2
    _, config = parse_recipe(recipe, [])
    module = build_method(config, recipe_parser(METHODS[config.method]).instantiate(config))
    assert summary["flops"] == training_flops(module) * 2 * 8
    assert summary["parameters"] == sum(len(parameter.flatten()) for parameter in module.backbone.parameters())


@pytest.mark.parametrize("readout", ["cls", "gap"])
def test_flops_are_those_of_the_layers(readout: str) -> None:
    """Counted by hand for MAE: a Linear costs 2 n in out, and as much again for its weights' and (but the first) its input's gradient."""
    parser, config = parse_recipe("mae_smoke", ["--readout", readout])
    module = build_method(config, parser.instantiate(config))
    counted: list[int] = []
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, inputs, out: counted.append(out.numel() * inputs[0].shape[-1]))
    flops = training_flops(module)
    encoder, decoder = module.recipe["backbone"], module.recipe["decoder"]
    patches = (encoder["image_size"] // encoder["patch"]) ** 2
    visible = patches // 4
    embed = 2 * visible * encoder["width"] * 3 * encoder["patch"] ** 2  # of what the encoder sees; no gradient of the pictures
    length, whole = visible + 1 + encoder["registers"], patches + 1
    products = 2 * (encoder["depth"] * length**2 * encoder["width"] + decoder["depth"] * whole**2 * decoder["width"])
    # attention: two products forward, four backward; 2 n n d each. The layers have seen two images, 2 for each multiply-add
    assert flops == 3 * sum(counted) + 2 * embed + 6 * products


@pytest.mark.parametrize("recipe", list_assets("recipes"))
def test_shipped_recipes_parse_and_are_short(recipe: str) -> None:
    _, config = parse_recipe(recipe, [])
    text = Path(__file__).parents[2].joinpath("recipes", f"{recipe}.yaml").read_text()
    assert len(text.splitlines()) <= 30
    header = [line.split()[1] for line in text.splitlines() if line.startswith("# ")]
    assert header[0] in ("command", "1")  # "1 GPU", "8 GPUs", "2 nodes" where the command depends on them
    assert {"cost", "score"} <= set(header)
    assert config.method == recipe.split("_")[0]


IMAGES = {"ILSVRC/imagenet-1k": 1_281_167, "frgfm/imagenette:320px": 9_469, "uoft-cs/cifar10": 50_000}  # of the train split, as published
QUICK = ("mae_cifar10_small", "mae_vitti4_cifar10")  # to count


def cost_line(recipe: str) -> str:
    lines = Path(__file__).parents[2].joinpath("recipes", f"{recipe}.yaml").read_text().splitlines()
    return next(line for line in lines if line.startswith("# cost"))


def images_of(config: Any) -> int:
    trainer, batch = config.trainer, config.data.batch_size
    if trainer.max_epochs in (None, -1):
        return int(trainer.max_steps * batch)
    return int(trainer.max_epochs * (trainer.limit_train_batches or IMAGES[config.data.source] // batch) * batch)


COUNTED = [name for name in list_assets("recipes") if "FLOP" in cost_line(name)]


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in COUNTED])
def test_the_cost_in_a_header_is_the_formula_s(recipe: str) -> None:
    """Three digits each."""
    parser, config = parse_recipe(recipe, [])
    module = build_method(config, parser.instantiate(config))
    flops, images, line = training_flops(module, fake(module)), images_of(config), cost_line(recipe)
    unit, scale = ("PFLOP", 1e15) if "PFLOP" in line else ("EFLOP", 1e18)
    assert line.startswith(
        f"# cost     {flops / 1e9:.3g} GFLOP an image x {images:,} images = {flops * images / scale:.3g} {unit}"
        + (
            f": {flops * images / (0.3 * 989e12) / 3600:.3g} GPU hours at an assumed 30 % of 989 TFLOP/s"
            if unit == "EFLOP"
            else "; by formula"
        )
    )


@pytest.mark.parametrize("recipe", [name for name in list_assets("recipes") if name not in COUNTED])
def test_a_measured_cost_in_a_header_is_of_the_recipe_s_images(recipe: str) -> None:
    _, config = parse_recipe(recipe, [])
    line, images = cost_line(recipe), images_of(config)
    if recipe.endswith("smoke"):
        assert "two steps" in line
        assert config.trainer.max_steps == 2
    else:  # or two digits
        assert f"({images:,} images" in line or f"({float(f'{images:.2g}'):,.0f} images" in line


def test_paper_settings_are_the_defaults() -> None:
    """Spot checks of the defaults against the official scripts, by a recipe that names nothing but the method."""
    Path("dino_paper.yaml").write_text("method: dino\ndata: {source: ./pictures}\n")
    Path("mae_paper.yaml").write_text("method: mae\ndata: {source: ./pictures}\n")
    _, dino = parse_recipe("dino_paper.yaml", [])
    _, mae = parse_recipe("mae_paper.yaml", [])
    assert (dino.head.prototypes, dino.head.hidden, dino.head.bottleneck, dino.teacher.momentum) == (65536, 2048, 256, 0.996)
    assert (dino.crops.n_local, dino.crops.local_size, dino.crops.global_scale, dino.clip_grad) == (8, 96, (0.4, 1.0), 3.0)
    assert (dino.optim.lr, dino.optim.weight_decay_end, dino.backbone.drop_path, dino.backbone.patch) == (5e-4, 0.4, 0.1, 16)
    assert (mae.mask_ratio, mae.decoder.width, mae.decoder.depth, mae.decoder.heads, mae.norm_pixels) == (0.75, 512, 8, 16, True)
    assert (mae.optim.lr, mae.optim.betas, mae.optim.warmup_epochs, mae.crop.scale) == (1.5e-4, (0.9, 0.95), 40.0, (0.2, 1.0))


def test_a_run_folder_and_its_checkpoint() -> None:
    assert pretrain("dino.yaml", "--readout", "gap/pre", "--out", "run", "--trainer.log_every_n_steps", "1") == 0
    assert sorted(p.name for p in Path("run").iterdir()) == [".lock", "last.ckpt", "metrics.jsonl", "recipe.yaml", "run.json"]
    ours = read_checkpoint("run/last.ckpt")["ssl_vit"]
    recipe = yaml.safe_load(Path("run/recipe.yaml").read_text())
    assert ours["recipe"] == recipe
    assert (ours["readout"], recipe["readout"], recipe["data"]["batch_size"], recipe["trainer"]) == (
        "gap/pre",
        "gap/pre",
        8,
        {"max_steps": 7},
    )
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 8))
    assert {"loss", "lr", "weight_decay", "teacher_momentum", "teacher_temperature", "teacher_information"} <= records[0].keys()
    state = weights("run")
    for which in ("teacher", "student"):
        backbone = load_backbone("run/last.ckpt", which=which)
        assert str(backbone.trained_readout.spec) == "gap/pre"
        assert backbone.weights_hash() == hash_without_readout(backbone)
        assert torch.equal(backbone.vit.cls_token, state[f"{which}.backbone.vit.cls_token"])
    assert not torch.equal(state["teacher.backbone.vit.cls_token"], state["student.backbone.vit.cls_token"])
    fresh = load_backbone("run/last.ckpt", pretrained=False)
    assert fresh.trained_readout is None


def hash_without_readout(backbone: Backbone) -> str:
    bare = copy.deepcopy(backbone)
    bare.trained_readout = None
    return bare.weights_hash()


@pytest.mark.parametrize("method", ["dino", "mae"])
def test_a_learned_readout_is_trained_resumed_and_given_back(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (f"{method}.yaml", "--readout", "ep_cls", "--optim.warmup_epochs", "0")
    assert pretrain(*options, "--out", "whole") == 0
    original = RunFolder.on_train_batch_end

    def interrupted(self: RunFolder, trainer: Any, *args: Any) -> None:
        self.signals.received = signal.SIGINT * (trainer.global_step == 4)
        original(self, trainer, *args)

    monkeypatch.setattr(RunFolder, "on_train_batch_end", interrupted)
    assert pretrain(*options, "--out", "cut") == 130
    monkeypatch.setattr(RunFolder, "on_train_batch_end", original)
    assert pretrain(*options, "--out", "cut", "--resume") == 0
    state, resumed = weights("whole"), weights("cut")
    assert [key for key in state if not torch.equal(state[key], resumed[key])] == []

    parser, config = parse_recipe(options[0], list(options[1:]))
    start = build_method(config, parser.instantiate(config)).state_dict()
    for arm in ("teacher", "student") if method == "dino" else (None,):
        backbone = load_backbone("whole/last.ckpt", which=arm)
        trained, prefix = backbone.trained_readout, f"{arm}.readout." if arm else "readout."
        assert (str(trained.spec), trained.training) == ("ep_cls", False)
        assert sorted(trained.state_dict()) == ["poolers.ep_cls.0.queries", "poolers.ep_cls.0.value.weight"]
        for key, value in trained.state_dict().items():
            assert torch.equal(value, state[prefix + key])
            assert not torch.equal(value, start[prefix + key])
        assert backbone.weights_hash() != hash_without_readout(backbone)
    if method == "dino":
        key = "readout.poolers.ep_cls.0.queries"
        teacher, student = ((state[f"{arm}.{key}"] - start[f"{arm}.{key}"]).norm() for arm in ("teacher", "student"))
        assert teacher < student  # the moving average follows


@pytest.mark.parametrize("method", ["dino", "mae"])
def test_the_arm_of_a_learned_readout_shares_its_start_with_the_others(method: str) -> None:
    """Only `readout.*` is its own, drawn after everything that the arms have in common, and drawn alike under every loss."""
    states = {}
    for readout in ("cls", "ep", "class_attention"):
        parser, config = parse_recipe(f"{method}.yaml", [f"--readout={readout}"])
        states[readout] = build_method(config, parser.instantiate(config)).state_dict()
    for arm in ("ep", "class_attention"):
        own = {key for key in states[arm] if "readout." in key}
        assert states[arm].keys() - own == states["cls"].keys()
        assert all(torch.equal(states[arm][key], value) for key, value in states["cls"].items())
        matrices = [states[arm][key] for key in own if key.endswith(("query.weight", "value.weight", "queries"))]
        assert matrices
        assert all(matrix.std().item() == pytest.approx(0.02, rel=0.15) for matrix in matrices)  # not MAE's Xavier, 0.2 here


def test_a_fixed_seed_decides_everything_and_arms_differ_in_nothing_else() -> None:
    """Fair arms: same parameters, same first weights, same sequence length, same first batch; another seed differs."""
    modules = {}
    for name, options in {"cls": [], "gap": ["--readout=gap"], "register": ["--readout=register"], "seed": ["--seed=1"]}.items():
        parser, config = parse_recipe("dino.yaml", options)
        modules[name] = build_method(config, parser.instantiate(config))
    states = {name: module.state_dict() for name, module in modules.items()}
    for arm in ("gap", "register"):
        assert states[arm].keys() == states["cls"].keys()
        assert all(torch.equal(states[arm][key], value) for key, value in states["cls"].items())
        assert modules[arm].initial_hash == modules["cls"].initial_hash
    assert modules["seed"].initial_hash != modules["cls"].initial_hash


@pytest.mark.parametrize(
    ("method", "options"), [("dino", ()), ("mae", ()), pytest.param("dino", ("--accumulate", "2"), marks=pytest.mark.slow)]
)
def test_resume_at_every_step_is_exact(method: str, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after any batch, ends of epochs and the last step included, a resumed run ends in the same weights, bit for bit."""
    assert pretrain(f"{method}.yaml", "--out", "whole", *options) == 0
    expected = weights("whole")
    original = RunFolder.on_train_batch_end
    for stop in range(1, 15 if options else 8):
        batches = 0

        def interrupted(self: RunFolder, *args: Any, stop: int = stop) -> None:
            nonlocal batches
            batches += 1
            self.signals.received = signal.SIGINT * (batches >= stop)
            original(self, *args)

        monkeypatch.setattr(RunFolder, "on_train_batch_end", interrupted)
        assert pretrain(f"{method}.yaml", "--out", f"cut{stop}", *options) == 130
        monkeypatch.setattr(RunFolder, "on_train_batch_end", original)
        assert pretrain(f"{method}.yaml", "--out", f"cut{stop}", "--resume", *options) == 0
        state = weights(f"cut{stop}")
        assert [key for key in expected if not torch.equal(state[key], expected[key])] == [], stop
        assert json.loads(Path(f"cut{stop}/run.json").read_text())["steps"] == 7
        logged = [json.loads(line)["step"] for line in Path(f"cut{stop}/metrics.jsonl").read_text().splitlines()]
        assert logged == [7]


def test_resume_of_an_interrupted_last_step_counted_in_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("mae.yaml", "--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--out", "run")
    original = RunFolder.on_train_batch_end

    def interrupted(self: RunFolder, trainer: Any, *args: Any) -> None:
        self.signals.received = signal.SIGINT * (trainer.global_step == 6)
        original(self, trainer, *args)

    monkeypatch.setattr(RunFolder, "on_train_batch_end", interrupted)
    assert pretrain(*options) == 130
    monkeypatch.setattr(RunFolder, "on_train_batch_end", original)
    assert pretrain(*options, "--resume") == 0
    assert json.loads(Path("run/run.json").read_text())["steps"] == 6


@pytest.mark.parametrize("checks", [1, 3, 4, 6])
def test_a_run_stopped_early_by_the_clock_is_not_finished(checks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock's answers are given, so that no machine is too fast or too slow for it: time is up at its n-th look."""
    elapsed, limit = iter([0.0] * checks), ("--trainer.max_time", "00:01:00:00")
    with monkeypatch.context() as patched:
        patched.setattr(Timer, "time_elapsed", lambda self, stage=None: next(elapsed, 3600.0))
        assert pretrain("mae.yaml", "--out", "run", *limit) == 0
    assert not Path("run/run.json").exists()
    assert pretrain("mae.yaml", "--out", "run", "--resume", *limit) == 0  # of each start, not of all together
    assert json.loads(Path("run/run.json").read_text())["steps"] == 7


def test_a_run_without_time_for_a_step_is_not_finished() -> None:
    assert pretrain("mae.yaml", "--trainer.max_time", "00:00:00:00", "--out", "run") == 0
    assert not Path("run/run.json").exists()
    assert pretrain("mae.yaml", "--out", "run", "--resume") == 0
    assert Path("run/run.json").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again() -> None:
    assert pretrain("mae.yaml", "--out", "run") == 0
    for name in ("last.ckpt", "run.json"):
        Path("run", name).unlink()
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # cut by the kill
    assert pretrain("mae.yaml", "--out", "run", "--resume", "--optim.lr", "0.5") == 2  # another recipe than the one that is there
    assert pretrain("mae.yaml", "--out", "run", "--resume") == 0
    assert [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()] == [7]
    assert Path("run/run.json").exists()


def test_a_start_that_fails_leaves_the_recipe_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which was killed before its first step; the next one with --resume finds a run."""
    assert pretrain("mae.yaml", "--out", "run", "--trainer.max_steps", "1") == 0
    for name in ("last.ckpt", "run.json", "metrics.jsonl"):
        Path("run", name).unlink()

    def fail(*_: object) -> None:
        raise Failure("before the first step")

    monkeypatch.setattr(RunFolder, "on_train_start", fail)
    assert pretrain("mae.yaml", "--out", "run", "--trainer.max_steps", "1", "--resume") == 1
    assert Path("run/recipe.yaml").exists()


def forget_wandb() -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ["WANDB_MODE"] = "offline"


def test_wandb_logger_by_its_name() -> None:
    """Any Trainer flag: here a logger class, offline."""
    logger = ["--trainer.logger", "WandbLogger", "--trainer.logger.project", "tests", "--trainer.logger.save_dir", "logs"]
    Path("logs").mkdir()
    # a process of its own: a test in this one that logged before has left the address of its W&B service
    done = Command("pretrain", "mae.yaml", "--trainer.max_steps", "2", "--out", "run", *logger, before=forget_wandb)
    assert done.wait() == 0, done.said
    assert list(Path("logs/wandb").glob("offline-run-*/*.wandb"))


def test_a_logger_may_write_below_the_run_folder() -> None:
    """As Lightning's default one does, before the run begins."""
    logger = ("--out", "run", "--trainer.max_steps", "1", "--trainer.log_every_n_steps", "1")
    logger += ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "run")
    assert pretrain("mae.yaml", *logger) == 0
    assert list(Path("run/lightning_logs").glob("*/hparams.yaml"))


def test_an_existing_run_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain("mae.yaml", "--out", "run", "--trainer.max_steps", "1") == 0
    before = Path("run/last.ckpt").read_bytes()
    assert pretrain("mae.yaml", "--out", "run", "--trainer.max_steps", "1") == 2
    assert "run already holds a run; add --resume" in capsys.readouterr().err
    assert pretrain("mae.yaml", "--out", "run", "--resume", "--optim.lr", "0.5", "--trainer.max_steps", "1") == 2
    assert "cannot resume run with another recipe (optim.lr 0.02 -> 0.5)" in capsys.readouterr().err
    assert pretrain("mae.yaml", "--out", "run", "--resume", "--trainer.max_steps", "1") == 0
    assert Path("run/last.ckpt").read_bytes() == before


@pytest.mark.parametrize("terminal", [False, True])
def test_one_bar_over_the_whole_run(terminal: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a log file: a few lines without a bar, whatever the number of epochs; the last one says what was seen."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    options = ("--trainer.max_steps", "-1", "--trainer.max_epochs", "30", "--out", "bar")
    assert pretrain("mae.yaml", *options, "--trainer.log_every_n_steps", "1") == 0
    text = capfd.readouterr().err
    bars = {"\r", "|"} & {*text}
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("bar:")]
    assert len(bars) == 2 * terminal
    assert ("decoding pictures" in text) == terminal
    assert len(lines) >= 1 if terminal else 1 <= len(lines) <= 8
    for part in ("720/720", " images/s", "loss=", "data_seconds="):
        assert part in lines[-1]


def test_the_bar_of_a_resumed_run_tells_the_speed_of_this_start() -> None:
    progress = Progress("run")
    trainer = SimpleNamespace(estimated_stepping_batches=100, global_step=90, datamodule=SimpleNamespace(batch_size=8))
    progress._trainer = trainer  # type: ignore[assignment]
    bar = progress.init_train_tqdm()
    assert " 8.00 images/s" in bar.format_meter(**{**bar.format_dict, "n": 92, "elapsed": 2.0})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--trainer.devices", "3"], "data.batch_size 8 is not divisible by 3 devices; use --trainer.devices 2 for the same run, or"),
        (["--accumulate", "3"], "data.batch_size 8 is not divisible by 1 device x accumulate 3; use --data.batch_size 9"),
        (["--trainer.accelerator", "gpu", "--trainer.devices", "800"], "Lightning's Trainer refuses these options: "),
    ],
)
def test_a_recipe_for_other_devices(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "mae.yaml", "--trainer.accelerator", "cpu", *options]) == 2
    errors = capsys.readouterr().err
    assert says in errors
    assert len(errors.splitlines()) == 1


def test_a_mac_s_gpu_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.fabric.accelerators.mps.MPSAccelerator.is_available", lambda: True)
    assert run(["pretrain", "mae.yaml", "--out", "run", "--trainer.accelerator", "mps"]) == 2
    assert capsys.readouterr().err == (
        "ssl-vit: trainer.accelerator is mps, which has no float64, and crops and positions need it; use cpu or cuda\n"
    )


def test_more_devices_than_processes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight devices asked for, in one of three processes that torchrun started; and in one of three tasks of Slurm."""
    torchrun = {"WORLD_SIZE": 3, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 3, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "1"}
    slurm = {
        "SLURM_NTASKS": 3,
        "SLURM_NTASKS_PER_NODE": 3,
        "SLURM_JOB_NAME": "train",
        "SLURM_PROCID": 0,
        "SLURM_LOCALID": 0,
        "SLURM_NODEID": 0,
    }
    for launcher in (torchrun, slurm):
        with monkeypatch.context() as environment:
            for name, value in launcher.items():
                environment.setenv(name, str(value))
            assert pretrain("mae.yaml", "--trainer.devices", "8", "--trainer.strategy", "ddp") == 2
        errors = capsys.readouterr().err
        assert "--trainer.devices" in errors
        assert len(errors.splitlines()) == 1


def test_print_config_shows_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "mae.yaml", "--mask_ratio", "0.5", "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["mask_ratio"], shown["readout"], shown["backbone"]["width"]) == (0.5, "gap", 24)
    assert "devices" in shown["trainer"]
    assert shown["trainer"]["use_distributed_sampler"] is False  # the stream knows its rank

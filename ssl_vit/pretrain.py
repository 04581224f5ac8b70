"""`ssl-vit pretrain RECIPE`: a recipe and command-line options, by Lightning's argument parser, into a trained checkpoint."""

import argparse
import os
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning import Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from ssl_vit.assets import find_asset
from ssl_vit.callbacks import AtomicCheckpointIO, Progress, RunFolder
from ssl_vit.checkpoint import read_checkpoint
from ssl_vit.data import ImageData
from ssl_vit.errors import UsageError, one_of
from ssl_vit.methods import METHODS, Method
from ssl_vit.methods.base import plain

# Of the Trainer's options, those that change the result: they are a part of the recipe, the others of the machine.
TRAINER_IDENTITY = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val", "limit_train_batches")


def parse_recipe(recipe: str, options: list[str]) -> tuple[LightningArgumentParser, Namespace]:
    """The parser of the recipe's method, and recipe and options parsed; UsageError, in one line, for whatever is wrong in them."""
    path = find_asset("recipes", recipe)
    try:
        fields = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {recipe} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict) or fields.get("method") not in METHODS:
        method = fields.get("method") if isinstance(fields, dict) else fields
        raise UsageError(f"recipe {recipe} has method {method!r}; {one_of(str(method), METHODS)}")
    parser = recipe_parser(METHODS[fields["method"]])
    known = list(parser.get_defaults().keys())
    for key in _flatten(fields):
        _check_key(key, known, f"recipe {recipe}: ")
    for option in options:
        if option.startswith("--"):
            _check_key(option[2:].split("=")[0].removesuffix("+"), [*known, "print_config", "help"], "")
    try:
        config = parser.parse_args(["--config", str(path), *options])
    except argparse.ArgumentError as error:
        raise UsageError(" ".join(str(error).split())) from error
    if config.method != fields["method"]:
        raise UsageError(f"--method {config.method} with a recipe for {fields['method']}; choose a recipe of that method")
    return parser, config


def recipe_parser(method: type[Method]) -> LightningArgumentParser:
    """Recipe fields at the top, `data.*` and any Trainer flag as `trainer.*`."""
    description = method.__doc__ or ""
    parser = LightningArgumentParser(prog="ssl-vit pretrain RECIPE", description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help=argparse.SUPPRESS)
    parser.add_argument("--method", type=str, help="dino or mae; a recipe's first line")
    parser.add_argument("--out", type=str | None, default=None, help="run folder; runs/RECIPE if not given")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last.ckpt")
    parser.add_class_arguments(method, None)
    parser.add_lightning_class_args(ImageData, "data")
    parser.link_arguments("seed", "data.seed")
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.set_defaults({"trainer.logger": False, "trainer.enable_model_summary": False, "trainer.log_every_n_steps": 10})
    parser.set_defaults({"trainer.use_distributed_sampler": False})  # the stream knows its rank
    return parser


def build_method(config: Namespace, values: Namespace) -> Method:
    """The LightningModule of a parsed and instantiated recipe, its weights drawn from the recipe's seed alone."""
    method = METHODS[config.method]
    arguments = {key: values[key] for key in method.__init__.__annotations__ if key in values}
    seed_everything(config.seed, verbose=False)
    module = method(**arguments)
    module.init = module.backbone.weights_hash()
    trainer = {key: value for key in TRAINER_IDENTITY if (value := config.trainer[key]) not in (None, -1, 1)}
    data = {key: value for key, value in config.data.items() if key != "seed"}
    module.recipe |= {"data": plain(data), "trainer": trainer}
    return module


def pretrain(recipe: str, options: list[str]) -> Path:
    """Train, and return the path of the checkpoint. A finished run that is resumed is left as it is."""
    parser, config = parse_recipe(recipe, options)
    folder = Path(config.out or Path("runs") / Path(recipe).stem)
    if config.trainer.max_epochs is None and config.trainer.max_steps == -1:
        raise UsageError("the length of the run is not given; set trainer.max_epochs or trainer.max_steps")
    values = parser.instantiate(config)
    module = build_method(config, values)
    record = RunFolder(folder)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("SLURM_PROCID", 0)) == 0:
        _check_folder(folder, record.checkpoint, module.recipe, config.resume)
    if config.resume and (folder / "run.json").exists():
        rank_zero_info(f"{folder} is finished; nothing to do")
        return record.checkpoint
    trainer_options = dict(values.trainer)
    callbacks = trainer_options.pop("callbacks") or []
    plugins = trainer_options.pop("plugins") or []
    trainer = Trainer(
        **trainer_options,
        callbacks=[*(callbacks if isinstance(callbacks, list) else [callbacks]), record, Progress(folder.name)],
        plugins=[*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()],
    )
    for logger in trainer.loggers:
        logger.log_hyperparams(module.recipe)
    trainer.fit(module, datamodule=values.data, ckpt_path=str(record.checkpoint) if config.resume else None, weights_only=True)
    rank_zero_info(f"{record.checkpoint}: {trainer.global_step} steps, trained with {module.spec}")
    return record.checkpoint


def _check_folder(folder: Path, checkpoint: Path, recipe: dict[str, Any], resume: bool) -> None:
    """UsageError if the run would overwrite something, or if there is nothing to resume."""
    if not resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            run = "a run" if (folder / "recipe.yaml").exists() else "something else"
            advice = (
                "add --resume to go on with it, or name another folder with --out" if run == "a run" else "name another folder with --out"
            )
            raise UsageError(f"{folder} already holds {run}; {advice}")
        return
    if not checkpoint.exists():
        raise UsageError(f"nothing to resume: there is no {checkpoint}; leave --resume out to start")
    before = read_checkpoint(checkpoint)["ssl_vit"]["recipe"]
    was, now = dict(_flatten(before, values=True)), dict(_flatten(recipe, values=True))
    changed = [f"{key} {was.get(key)!r} -> {now.get(key)!r}" for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
    if changed:
        raise UsageError(f"cannot resume {checkpoint} with another recipe ({', '.join(changed[:4])}); use the same one, or another --out")


def _flatten(fields: dict[str, Any], prefix: str = "", values: bool = False) -> list[Any]:
    """`{a: {b: 1}}` -> `["a.b"]`, or `[("a.b", 1)]` with values. What hangs below `trainer.NAME` belongs to Lightning."""
    items: list[Any] = []
    for key, value in fields.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and not prefix.startswith("trainer."):
            items += _flatten(value, f"{name}.", values)
        else:
            items.append((name, value) if values else name)
    return items


def _check_key(key: str, known: list[str], where: str) -> None:
    groups = {name.rsplit(".", 1)[0] for name in known if "." in name}
    if key in known or key in groups or ".".join(key.split(".")[:2]) in [k for k in known if k.startswith("trainer.")]:
        return
    group = key.rsplit(".", 1)[0] + "." if "." in key else ""
    siblings = [name for name in known if name.startswith(group)] if group.rstrip(".") in groups else known
    if not group:
        siblings = sorted({name.split(".")[0] for name in known})
    raise UsageError(f"{where}unknown key {key!r}; {one_of(key, siblings)}")

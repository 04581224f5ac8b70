"""`ssl-vit pretrain RECIPE`: a recipe and command-line options, by Lightning's argument parser, into a trained checkpoint."""

import argparse
import glob
import os
import re
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ActionConfigFile, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning import Trainer, seed_everything
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ssl_vit.assets import find_asset, read_yaml
from ssl_vit.data.loader import end_with_main, told_of_lost_workers
from ssl_vit.data.stream import ImageData
from ssl_vit.errors import Interrupted, UsageError, one_of, require
from ssl_vit.files import check_writable, locked
from ssl_vit.methods import METHODS, Method
from ssl_vit.methods.base import plain
from ssl_vit.model.precision import tf32
from ssl_vit.train.callbacks import CHECKPOINT_SECONDS, Progress, RunFolder
from ssl_vit.train.cost import training_flops
from ssl_vit.train.folder import LOCK, AtomicCheckpointIO, check_folder, checkpoints, flatten, is_finished, prepare_folder
from ssl_vit.train.options import check_options, check_share, check_strategy
from ssl_vit.train.signals import told_of_lost_ranks
from ssl_vit.train.tracking import Tracking
from ssl_vit.train.training_log import TrainingLog

# Of the Trainer's options, those that change the result, with their defaults: they are a part of the recipe, the others of the machine.
TRAINER_IDENTITY: dict[str, Any] = {
    **dict.fromkeys(("max_epochs", "min_epochs", "min_steps", "precision", "gradient_clip_val", "gradient_clip_algorithm")),
    **{"limit_train_batches": None, "max_steps": -1, "overfit_batches": 0.0, "sync_batchnorm": False},
}

# what a recipe is likely to change
LIKELY = {
    "readout": "what the loss is attached to: cls, gap, register, ...",
    "seed": "of weights, order and views",
    "out": "the run's folder; default: runs/RECIPE",
    "resume": "go on in that folder; auto: start where there is no run",
    "data.source": "images: a local folder, a Hugging Face id or builtin:NAME",
    "data.batch_size": "images in a step, over all devices",
    "accumulate": "micro-batches that each device cuts its share into",
    "backbone.registers": "register tokens",
    "optim.lr": "the learning rate",
    "trainer.max_epochs": "how long; or --trainer.max_steps",
    "trainer.devices": "GPUs of a machine; above 1 with --trainer.strategy ddp",
    "trainer.precision": "bf16-mixed on recent GPUs",
}

# what a type of an option allows, in words
ALLOWED: dict[Any, str] = {int: "a whole number", PositiveInt: "a whole number above 0", float: "a number", tuple: "numbers in brackets"}
ALLOWED |= {PositiveFloat: "a number above 0", str: "text", bool: "true or false", type(None): "null", list: "a list in brackets"}
ALLOWED[None] = "KEY: VALUE pairs in braces"


def parse_recipe(recipe: str, options: list[str]) -> tuple[LightningArgumentParser, Namespace]:
    """The parser of the recipe's method, and recipe and options parsed; UsageError, in one line, for whatever is wrong in them."""
    path = find_asset("recipes", recipe)
    fields = read_yaml(path)
    method = fields.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise UsageError(f"recipe {recipe} has method {method!r}; {one_of(str(method), METHODS)}")
    parser = recipe_parser(METHODS[method])
    known = list(parser.get_defaults().keys())
    for key in flatten(fields):
        _check_key(key, known, f"recipe {recipe}: ")
    for option in options:
        if option.startswith("--"):
            _check_key(option[2:].split("=")[0].removesuffix("+"), [*known, "print_config", "help"], "")
    try:
        parser.default_config_files = [glob.escape(str(path))]  # so --help shows the recipe's values
        config = parser.parse_args(options)
    except argparse.ArgumentError as error:
        raise UsageError(_refusal(" ".join(str(error).split()), parser, fields, options)) from error
    if config.method != method:
        raise UsageError(f"--method {config.method} with a recipe for {method}; choose a recipe of that method")
    check_strategy(config.trainer.strategy)
    return parser, config


def _refusal(said: str, parser: LightningArgumentParser, fields: dict[str, Any], options: list[str]) -> str:
    """What jsonargparse said of a value, in a user's words: what came for which key, and what its type allows."""
    keys = re.findall(r'Parser key "([\w.]+)"', said)
    given = dict(re.findall(r"--([\w.]+)=(.*?)(?==--|$)", "=".join(options)))
    for kind in [getattr(action, "_typehint", None) for action in parser._actions if action.dest in keys[-1:]]:
        kinds = (kind,) if get_origin(kind) in (None, Literal, tuple, list) else get_args(kind)  # of a union
        words = [ALLOWED.get(get_origin(of) or of) or getattr(part, "__name__", str(part)) for of in kinds for part in get_args(of) or [of]]
        came = given.get(keys[-1], given.get(keys[0], flatten(fields).get(keys[-1])))  # as an option, in its group's, or in the recipe
        said = f"{keys[-1]} is {came}; it must be {' or '.join(dict.fromkeys(words))}"
    return said


def recipe_name(recipe: str) -> str:
    """Of a path, the last part that tells something: a run folder's recipe.yaml is named after the folder."""
    file = Path(recipe)
    return file.parent.name if file.stem == "recipe" and file.parent.name else file.stem


def likely_options(recipe: str) -> str:
    """The options that are changed most, with what the recipe says: the head of `--help`, whose whole list has hundreds of lines.

    Of a recipe that lacks something or is wrong as well: only that it is YAML is asked."""
    said = flatten(read_yaml(find_asset("recipes", recipe)))
    lines = [f"what is changed most (in parentheses: what {recipe} says):"]
    for option, meaning in LIKELY.items():
        lines.append(f"  --{option:20}{meaning}" + (f" ({said[option]})" if said.get(option) is not None else ""))
    return "\n".join(lines) + "\n"


def recipe_parser(method: type[Method]) -> LightningArgumentParser:
    """Recipe fields at the top, `data.*` and any Trainer flag as `trainer.*`."""
    description = (method.__doc__ or "").partition("Args:")[0]
    usage = "ssl-vit pretrain RECIPE [--FIELD VALUE ...]"
    parser = LightningArgumentParser(usage=usage, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help=argparse.SUPPRESS)  # brings --print_config
    parser.add_argument("--method", type=str, help=f"{', '.join(METHODS)}; a recipe's first line")
    parser.add_argument("--out", type=str | None, default=None, help="run folder; runs/RECIPE if not given")
    resume = "go on from the run folder's last.ckpt; auto: start where there is none, as a requeued job does"
    parser.add_argument("--resume", nargs="?", const=True, default=False, type=bool | Literal["auto"], help=resume)
    kept = "keep epoch-NNNN.ckpt after so many epochs each"
    parser.add_argument("--keep_every_epochs", type=PositiveInt | None, default=None, help=kept)
    parser.add_argument("--checkpoint_seconds", type=PositiveFloat, default=CHECKPOINT_SECONDS, help="between two checkpoints")
    parser.add_argument("--accumulate", type=PositiveInt, default=1, help="micro-batches that a device cuts its share of a batch into")
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
    require(0 <= config.seed < 2**32, "seed", config.seed, "from 0 to 4294967295")
    seed_everything(config.seed, verbose=False)
    module = method(**arguments)
    module.initial_hash = module.backbone.weights_hash()
    trainer = {key: value for key, default in TRAINER_IDENTITY.items() if (value := config.trainer[key]) != default}
    data = {key: value for key, value in config.data.items() if key not in ("seed", "workers") and (key != "decode" or value != "auto")}
    module.recipe |= {"data": plain(data), "trainer": trainer}
    return module


def pretrain(recipe: str, options: list[str], callbacks: Sequence[Callback] = (), tracking: Tracking | None = None) -> Path:
    """Train, and return the path of the checkpoint. A finished run that is resumed is left as it is.

    callbacks: what watches the run beside those of `trainer.callbacks`, and is no part of its recipe. tracking: where W&B shows it,
    as `ssl_vit.train.tracking` says; a finished run is logged too."""
    parser, config = parse_recipe(recipe, options)
    folder = Path(config.out or Path("runs") / Path(recipe).stem)
    values = parser.instantiate(config)
    flops = training_flops(build_method(config, values))  # on a model of its own: counting changes gradients and DINO's centre
    module = build_method(config, values)
    module.accumulate, module.recipe_name = config.accumulate, recipe_name(recipe)
    record = RunFolder(folder, flops, config.keep_every_epochs, config.checkpoint_seconds)
    with ExitStack() as holding:

        def begin(resume: bool | str = False) -> None:
            if not holding.enter_context(locked(folder / LOCK, wait=False)):
                raise UsageError(f"another process is training in {folder}; wait until it has ended, or name another folder with --out")
            check_folder(folder, resume, others=False)  # a logger may have begun to write there
            prepare_folder(folder, module.recipe)

        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            check_folder(folder, config.resume)
            if folder.exists():
                begin(config.resume)
            else:
                check_writable(folder)
                record.begin = begin  # once the data are there: a wrong start leaves nothing
        return _train(config, values, module, record, callbacks, tracking)


def _train(
    config: Namespace, values: Namespace, module: Method, record: RunFolder, callbacks: Sequence[Callback], tracking: Tracking | None
) -> Path:
    """The rest of `pretrain`, once the folder is this run's."""
    folder, log = record.folder, TrainingLog(tracking, record.folder) if tracking else None
    if config.resume and is_finished(folder):
        rank_zero_info(f"{folder} is finished; nothing to do")
        if log:
            log.catch_up()
        return record.checkpoint
    values.trainer.callbacks = [*_as_list(values.trainer.callbacks), *callbacks, *([log] if log else [])]
    trainer = build_trainer(values, record)
    for logger in trainer.loggers:
        logger.log_hyperparams(module.recipe)
    resumed = str(record.checkpoint) if config.resume and checkpoints(folder) else None
    if config.resume is True and resumed is None:
        rank_zero_info(f"{folder} holds no checkpoint yet: starting again")
    with tf32(), told_of_lost_workers(taking=False), told_of_lost_ranks():
        trainer.strategy.precision_plugin.convert_module(module)  # Lightning's turn is after loading, and would round float64 weights
        trainer.fit(module, datamodule=values.data, ckpt_path=resumed, weights_only=True)
    rest = "" if record.finish(trainer, module) else f" of {module.total_steps}; go on with --resume"
    rank_zero_info(f"{record.checkpoint}: {trainer.global_step} steps{rest}, trained with {module.spec}")
    if log:
        log.close()
    if number := record.signals.received:  # after the last step
        raise Interrupted(f"stopped after {trainer.global_step} steps and saved {record.checkpoint}", number)
    return record.checkpoint


def build_trainer(values: Namespace, record: RunFolder) -> Trainer:
    """Lightning's Trainer with the run folder, the progress bar and whole-file checkpoints; UsageError for options that it refuses."""
    check_options(values)
    arguments, data = dict(values.trainer), values.data
    # they count global batches, and Lightning would count micro-batches
    limit, overfit = arguments.pop("limit_train_batches"), arguments.pop("overfit_batches")
    data.limit, data.repeat = overfit or (1.0 if limit is None else limit), bool(overfit)
    callbacks, plugins = _as_list(arguments.pop("callbacks")), _as_list(arguments.pop("plugins"))
    if arguments["enable_progress_bar"] is not False:
        callbacks.append(Progress(record.folder.name))
    try:
        arguments |= {"accumulate_grad_batches": values.accumulate, "plugins": [*plugins, AtomicCheckpointIO()]}
        arguments["default_root_dir"] = arguments["default_root_dir"] or record.folder
        trainer = Trainer(**arguments, callbacks=[*callbacks, record])
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UsageError(f"Lightning's Trainer refuses these options: {' '.join(str(error).split())}") from error
    if isinstance(trainer.strategy, DDPStrategy):
        # Else torch lays the gradients out anew after the first step, of a resumed run as well: the ranks of that step would be added
        # in another order, and the run would not be exact.
        trainer.strategy._ddp_kwargs["find_unused_parameters"] = True
    # Lightning's answer to SIGTERM saves nothing, and speaks to the other processes from within the handler; that to Slurm's SIGUSR1
    # leaves hpc_ckpt files, which other runs would start from. train/signals.py has ours.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, LightningEnvironment) and environment.local_rank() > 0:
        threading.Thread(target=end_with_main, args=(os.getppid(),), daemon=True).start()
    if trainer.strategy.root_device.type == "mps":
        raise UsageError("trainer.accelerator is mps, which has no float64, and crops and positions need it; use cpu or cuda")
    check_share(data.batch_size, trainer.world_size, values.accumulate)
    return trainer


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _check_key(key: str, known: list[str], where: str) -> None:
    groups = {name.rsplit(".", 1)[0] for name in known if "." in name}
    if key in known or key in groups or ".".join(key.split(".")[:2]) in [k for k in known if k.startswith("trainer.")]:
        return
    group = key.rsplit(".", 1)[0]
    siblings = [name for name in known if name.startswith(f"{group}.")] if group in groups else {name.split(".")[0] for name in known}
    raise UsageError(f"{where}unknown key {key!r}; {one_of(key, siblings, known if '.' in key else ())}")

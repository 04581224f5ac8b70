"""What the options of a Lightning Trainer may be, where a run folder, the stream of global batches or a resume could not honour them."""

from typing import Any

from jsonargparse import Namespace

from ssl_vit.errors import UsageError, require

# What a Trainer may be asked for and what to use instead of the rest: allowed values, advice
CANNOT_HONOUR: dict[str, tuple[tuple[Any, ...], str]] = {
    "accumulate_grad_batches": ((1,), "data.batch_size is what a step sees: cut it into micro-batches with --accumulate"),
    "reload_dataloaders_every_n_epochs": ((0,), "the stream of images has no end and is never reloaded: leave it out"),
    "use_distributed_sampler": ((False,), "the stream gives every rank its own share: leave it out"),
    "fast_dev_run": ((False, 0), "it would pass for the whole run: use --trainer.max_steps 2 with another --out"),
    "barebones": ((False,), "a run logs and keeps checkpoints: leave it out"),
}

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "DDPStrategy", "SingleDeviceStrategy")


def check_strategy(strategy: str | Namespace) -> None:
    """UsageError unless it is DDP: each device holds the whole model and is a process of its own. Comes before Lightning's own answer,
    which depends on what is installed."""
    name = strategy if isinstance(strategy, str) else strategy.class_path.rpartition(".")[2]
    if name == "ddp_find_unused_parameters_false":
        raise UsageError(f"trainer.strategy is {name}, with which a run would not resume exactly; use ddp")
    spawned = not isinstance(strategy, str) and strategy.init_args.get("start_method", "popen") != "popen"
    if name not in STRATEGIES or spawned:
        raise UsageError(
            f"trainer.strategy is {name}{', spawned' * spawned}, which cannot be honoured: every device holds the whole model, in a "
            "process of its own; use ddp, and --accumulate or --backbone.checkpointing where memory is short"
        )


def check_options(values: Namespace) -> None:
    """UsageError for options of a Trainer that a run folder or the stream of global batches cannot honour."""
    options = values.trainer
    for key, (allowed, advice) in CANNOT_HONOUR.items():
        if options[key] not in allowed:
            raise UsageError(f"trainer.{key} is {options[key]}, which cannot be honoured; {advice}")
    if options.max_epochs in (None, -1) and options.max_steps == -1:
        raise UsageError("the length of the run is not given; set trainer.max_epochs or trainer.max_steps")
    for key in ("max_epochs", "max_steps", "limit_train_batches", "devices", "num_nodes"):
        value = options[key]
        if isinstance(value, int | float) and value <= 0 and (value != -1 or key == "num_nodes"):
            raise UsageError(f"trainer.{key} is {value}; it must be above 0")
    if str(options.precision) in ("bf16-true", "16-true"):
        raise UsageError(f"trainer.precision is {options.precision}, which rounds small steps of the weights away; use bf16-mixed")
    for key in ("limit_train_batches", "overfit_batches"):
        value = options[key]
        holds = value is None or (value >= 0 and (value <= 1 or int(value) == value))
        require(holds, f"trainer.{key}", value, "a number of batches, or a share up to 1")


def check_share(batch_size: int, devices: int, accumulate: int) -> None:
    """UsageError unless a global batch can be cut into equal micro-batches on so many devices."""
    if batch_size % (devices * accumulate):
        parts = f"{devices} device{'s' * (devices > 1)}" + (f" x accumulate {accumulate}" if accumulate > 1 else "")
        near = max(round(batch_size / (devices * accumulate)), 1) * devices * accumulate
        fewer = [count for count in range(1, devices) if batch_size % (count * accumulate) == 0]
        advice = f"; use --trainer.devices {fewer[-1]} for the same run, or" if fewer else "; use"
        raise UsageError(f"data.batch_size {batch_size} is not divisible by {parts}{advice} --data.batch_size {near}")

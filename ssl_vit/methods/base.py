"""What the methods share as LightningModules: optimiser, per-step schedules, logging, and what a checkpoint carries."""

import dataclasses
import inspect
from dataclasses import replace
from typing import Any, cast

import lightning
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ssl_vit.data.rng import uniform_by_stream
from ssl_vit.data.views import Batch, Crops
from ssl_vit.errors import UsageError
from ssl_vit.methods.optim import OptimConfig, adamw
from ssl_vit.methods.schedules import cosine
from ssl_vit.model.backbone import Backbone
from ssl_vit.model.compiler import compile_blocks, compiles
from ssl_vit.model.config import IN_RECIPE_UNLESS_DEFAULT, NOT_IN_RECIPE
from ssl_vit.model.readout import ReadoutSpec
from ssl_vit.provenance import versions
from ssl_vit.weights.checkpoint import FORMAT

DROP_PATH_STREAM = 100  # of the random numbers; view v takes 100 + v
MAX_SKIPPED = 3  # steps in a row that are not finite: after them no step is taken any more
# Of 16-mixed, whose scaler lowers its scale by such steps: from its 65,536 it takes 16 halvings to 1
MAX_SKIPPED_SCALED = 20


class Method(lightning.LightningModule):
    """Base of the methods, and what one has to bring; docs/extend.md shows a whole one.

    name: what `method:` in a recipe says, and its key in METHODS.
    __init__: the recipe's fields as annotated arguments with defaults, among them readout, backbone, optim and seed. It begins with
        `super().__init__(locals())`, and gives the backbone, once built, to `check_readout`. Weights are drawn in one order: first what
        the arms of a study share, at last the readout's own.
    backbone, readout: modules so called, at the top or in a `teacher` (which is judged) and a `student`: checkpoints find them by name.
        `backbone` also gives the one being trained.
    views: the views of a batch, normalised, [b 3 s s] or [v b 3 s s], or a tuple of such, those of the backbone's image_size first;
        f(self.seed, batch.positions, batch.step) and of no other image, so that devices and resumes do not change them.
    training_step: the scalar loss of `views(batch)`, told to `report`. It also runs without a Trainer, on two images, to be counted
        (train/cost.py). Every trainable parameter takes part in it.
    on_train_start, on_before_optimizer_step, on_load_checkpoint, on_save_checkpoint: where a method has its own, it calls this one's.

    A class without name, views, training_step or one of the four arguments is refused when it is made.

    Attributes: spec, the readout its loss is attached to; recipe, the run as a plain dict (the CLI adds data and trainer);
    ramp_offset, the step by which the warm-up of the learning rate is shorter than `warmup` (see schedules.cosine); crop_plan, the crops
    that workers may make (data.decode stream): none where the views need whole images, which only memory gives.
    """

    name: str
    backbone: Backbone
    ramp_offset = 0
    crop_plan: tuple[Crops, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """TypeError, in one line, that names what the class lacks."""
        super().__init_subclass__(**kwargs)
        brings = {"name": isinstance(getattr(cls, "name", None), str)}
        brings |= {what: getattr(cls, what) is not getattr(Method, what) for what in ("views", "training_step")}
        arguments = inspect.signature(cls.__init__).parameters
        brings |= {f"the argument {name}": name in arguments for name in ("readout", "backbone", "optim", "seed")}
        if lacks := [what for what, there in brings.items() if not there]:
            raise TypeError(f"the method {cls.__name__} lacks {', '.join(lacks)}; docs/extend.md shows a whole one")

    def __init__(self, arguments: dict[str, Any]) -> None:
        """arguments: the method's own, by name, as `locals()` has them before anything else is named."""
        super().__init__()
        fields = {key: value for key, value in arguments.items() if key not in ("self", "__class__") and (key, value) != ("init", None)}
        self.spec = ReadoutSpec.parse(fields["readout"])
        self.optim, self.seed, self._compile = cast(OptimConfig, fields["optim"]), int(fields["seed"]), bool(fields["backbone"].compile)
        self.recipe: dict[str, Any] = {"method": self.name, **plain({**fields, "readout": str(self.spec)})}
        self.recipe_name = self.name  # what the comparison calls it where folders have other names
        self.initial_hash: str | None = None  # hash of the backbone's first weights: what a gain over random initialisation is paired by
        self.scheduled: dict[str, float] = {}  # the values of this step
        self.compiled = False  # from the start of a fit on, where `backbone.compile` asks for it
        self.accumulate = 1  # micro-batches of an optimiser step
        self.completes_step = True  # whether this micro-batch is the last one of its step
        self._failed: Tensor | None = None  # on the device: whether a loss of this step was not finite
        self.skip: Tensor | None = None  # on the device: 1.0 where this step is not taken, else 0.0
        self._skipped: Tensor | None = None  # on the device: steps that were not taken, and how many of them are the last ones
        self._skipped_before = (0, 0)  # of the checkpoint
        self._reported: Tensor | None = None  # on the device: the mean so far of what this step reports

    def views(self, batch: Batch) -> Tensor | tuple[Tensor, ...]:
        raise NotImplementedError

    def check_readout(self, backbone: Backbone) -> None:
        """UsageError unless `spec` can be read from this backbone, and reads its last block, which would not be trained otherwise. That
        block goes by one name from here on: of 12 blocks, `cls@block11` becomes `cls`."""
        backbone.check(self.spec)
        last = [replace(term, blocks=(-1,)) if term.blocks == (backbone.depth - 1,) else term for term in self.spec.terms]
        self.spec = ReadoutSpec.parse("+".join(map(str, last)))
        self.recipe["readout"] = str(self.spec)
        if -1 not in self.spec.blocks:
            raise UsageError(f"readout {str(self.spec)!r} leaves out the last block, which nothing would train; choose one that reads it")

    def on_train_start(self) -> None:
        if self._compile and compiles(self.device.type):
            self.compiled, self._compile = True, False
            every = [getattr(part, "blocks", None) for part in self.modules()]
            compile_blocks(block for blocks in every if isinstance(blocks, nn.Sequential) for block in blocks)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self, self.optim)

    def steps_of(self, epochs: float) -> int:
        """Epochs in optimiser steps, at most the whole run."""
        return min(round(epochs * self.trainer.num_training_batches / self.accumulate), self.total_steps)

    @property
    def total_steps(self) -> int:
        return int(self.trainer.estimated_stepping_batches)

    def schedule(self, step: int) -> dict[str, float]:
        """Every scheduled value at an optimiser step; a method adds its own."""
        warmup = self.steps_of(self.optim.warmup_epochs)
        lr = self.optim.lr * self.trainer.datamodule.batch_size / 256  # type: ignore[attr-defined]
        return {
            "lr": cosine(step, self.total_steps, lr, self.optim.min_lr, warmup, warmup - self.ramp_offset),
            "weight_decay": cosine(step, self.total_steps, self.optim.weight_decay, self.optim.weight_decay_end),
        }

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        part = batch_idx % self.accumulate * self.trainer.world_size + self.trainer.global_rank
        torch.manual_seed(hash((self.seed, self.trainer.global_step, part)))  # what a method draws from torch, the same after a resume
        self.completes_step = (batch_idx + 1) % self.accumulate == 0
        self.scheduled = self.schedule(self.trainer.global_step)
        optimizer = self.optimizers()
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = self.scheduled["lr"]
            if group["name"] == "decay":
                group["weight_decay"] = self.scheduled["weight_decay"]

    def drop_path_draws(self, positions: Int64[Tensor, "b"], views: range = range(1)) -> Float[Tensor, "vb depth n"] | None:
        """For the backbone, of the views of all images, view by view: f(seed, position, view), whatever the devices and micro-batches.
        None without drop path."""
        depth, n = self.backbone.depth, self.backbone.draws_of_block
        if not (n and views):
            return None
        streams = range(DROP_PATH_STREAM + views.start, DROP_PATH_STREAM + views.stop)
        return uniform_by_stream(self.seed, positions, streams, depth * n).view(-1, depth, n)

    @property
    def is_read(self) -> bool:
        """Whether the host reads this step's values: every `trainer.log_every_n_steps` steps and at the last; no other step waits."""
        if self._trainer is None:
            return False
        step = self.global_step + 1
        return step % max(1, self.trainer.log_every_n_steps) == 0 or step == self.total_steps  # type: ignore[attr-defined]

    def report(self, loss: Float[Tensor, ""], **metrics: Float[Tensor, ""]) -> dict[str, float]:
        """Note on the device whether the loss is finite. At the end of a step that is read: log the loss, the method's own metrics
        (means over the micro-batches and the ranks) and the schedules, and return those read."""
        failed = ~loss.detach().isfinite()
        self._failed = failed if self._failed is None else self._failed | failed
        if not self.is_read:
            return {}
        part = torch.stack([value.detach().float() for value in (loss, *metrics.values())]) / self.accumulate
        self._reported = part if self._reported is None else self._reported + part
        if not self.completes_step:
            return {}
        means, self._reported = self._read(self._reported), None
        values = dict(zip(("loss", *metrics), means, strict=True))
        self.log_dict({**values, **self.scheduled})
        return values

    def _read(self, own: Float[Tensor, " n"]) -> list[float]:
        """Means over the ranks, by one exchange and one wait."""
        ranks = [own]
        if torch.distributed.is_initialized():
            ranks = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(ranks, own)
        return [sum(value) / len(value) for value in torch.stack(ranks).T.tolist()]

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Decide, on the device and alike on all ranks, whether the step is taken: not where a rank's loss, or the norm of a gradient, is
        not finite, and not after `max_skipped` such steps in a row. The fused kernel then leaves weights, moments and count alone."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bad = ~torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        failed, self._failed = torch.zeros_like(bad) if self._failed is None else self._failed, None
        if torch.distributed.is_initialized():
            ranks = torch.stack([bad, failed]).int()
            torch.distributed.all_reduce(ranks, torch.distributed.ReduceOp.MAX)
            bad, failed = (ranks > 0).unbind()
        if self._skipped is None:
            self._skipped = torch.stack([torch.full((), n, dtype=torch.int64, device=bad.device) for n in self._skipped_before])
        count, in_a_row = self._skipped.unbind()
        skip = bad | failed | (in_a_row >= self.max_skipped)
        self._skipped = torch.stack([count + skip, (in_a_row + 1) * skip])
        self.skip = skip.float()
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = self.skip  # type: ignore[attr-defined]
        elif skip:  # an optimiser of a method's own: the host waits, and there is no gradient for it
            optimizer.zero_grad()

    @property
    def max_skipped(self) -> int:
        """Steps in a row that may be left out: more where a scaler looks for its scale by them."""
        return MAX_SKIPPED if getattr(self.trainer.precision_plugin, "scaler", None) is None else MAX_SKIPPED_SCALED

    def skipped(self) -> tuple[int, int]:
        """Steps that were not taken, those before a resume among them, and how many of them are the last ones. Waits for the device."""
        count, in_a_row = self._skipped_before if self._skipped is None else self._skipped.tolist()
        return count, in_a_row

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        count, in_a_row = checkpoint["ssl_vit"].get("skipped", (0, 0))
        self._skipped_before = (count, in_a_row)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ssl_vit"] = {
            "format": FORMAT,
            "recipe": self.recipe,
            "name": self.recipe_name,
            "readout": str(self.spec),
            "init": self.initial_hash,
            "skipped": [*self.skipped()],
            "mean": list(self.backbone.mean),
            "std": list(self.backbone.std),
            "image_size": self.recipe["backbone"]["image_size"],
            "versions": versions(),
        }


def plain(value: Any) -> Any:
    """Dataclasses as dicts, without the fields that model/config.py leaves out, and tuples as lists: what YAML shows and
    `torch.load(weights_only=True)` takes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [field for field in dataclasses.fields(value) if field.metadata != NOT_IN_RECIPE]
        fields = [(field, getattr(value, field.name)) for field in shown]
        value = {f.name: own for f, own in fields if f.metadata != IN_RECIPE_UNLESS_DEFAULT or own != f.default}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half precision as float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

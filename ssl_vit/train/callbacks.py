"""What a run leaves behind and what it shows: the run folder and the progress bar."""

import io
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from ssl_vit.data.loader import whole_batches
from ssl_vit.errors import Failure, UsageError
from ssl_vit.files import naming, write_atomically
from ssl_vit.methods import Method
from ssl_vit.methods.base import MAX_SKIPPED
from ssl_vit.provenance import git_revision, recipe_hash
from ssl_vit.train.folder import LAST, LOCK
from ssl_vit.train.signals import Signals

CHECKPOINT_SECONDS = 300.0


class RunFolder(Checkpoint):
    """`recipe.yaml`, `last.ckpt` (every so often, at the end, and at a signal to stop), the one before it, `metrics.jsonl`, and
    `run.json` once all steps are done.

    flops: of one image through the method. keep_every_epochs: `epoch-NNNN.ckpt` stays after so many epochs. checkpoint_seconds: between
    two checkpoints."""

    def __init__(
        self, folder: Path, flops: int, keep_every_epochs: int | None = None, checkpoint_seconds: float = CHECKPOINT_SECONDS
    ) -> None:
        super().__init__()
        self.folder, self.flops, self.keep_every_epochs, self.seconds = folder, flops, keep_every_epochs, checkpoint_seconds
        self.checkpoint, self.signals = folder / LAST, Signals()
        self.begin: Callable[[], None] = lambda: None  # what comes before anything is written
        self._saved_step = 0  # of the last good checkpoint
        self._new = False  # whether this start wrote the folder's recipe
        self._total: int | None = None
        self._step = -1  # the last one seen; micro-batches of an accumulated step repeat it
        self._before = {"seconds": 0.0, "data_seconds": 0.0, "replaced": 0}  # by a run that this one goes on with
        self._stream: Any = None
        self._trainer: Any = None
        self._start = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Seconds of the run and those that a rank, on average, has waited for data; unreadable images of all ranks that were replaced."""
        seconds, data_seconds = time.monotonic() - self._start, self._of_stream("seconds", "mean")
        now = {"seconds": seconds, "data_seconds": data_seconds, "replaced": int(self._of_stream("replaced", "sum"))}
        return {key: self._before[key] + value for key, value in now.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before |= state_dict

    def _of_stream(self, what: str, reduce_op: str) -> float:
        """Over the ranks, which have to ask together."""
        if self._stream is None:
            return 0.0
        own = torch.tensor(getattr(self._stream, what), device=self._trainer.strategy.root_device)
        return float(self._trainer.strategy.reduce(own, reduce_op=reduce_op))

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The run goes on after its last optimiser step, also if it was stopped (by a time limit) between two micro-batches."""
        checkpoint["callbacks"].pop("Timer", None)  # trainer.max_time is of each start: a job that is submitted again has all of it
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        parts = trainer.accumulate_grad_batches
        set_loop_counters(checkpoint, whole_batches(data.limit, data.count // data.batch_size) * parts, parts)

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._start = self._saved = time.monotonic()
        if trainer.is_global_zero:
            self.begin()
            self._new = not (self.folder / "recipe.yaml").exists()
            write_atomically(self.folder / "recipe.yaml", yaml.safe_dump(module.recipe, sort_keys=False))

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, Method)
        self._total, self._step, self._stream = module.total_steps, trainer.global_step, trainer.train_dataloader
        self._trainer, self._saved_step = trainer, trainer.global_step
        self.signals.take(self._step)
        if len(set(trainer.strategy.all_gather(torch.tensor(trainer.global_step, device=module.device)).view(-1).tolist())) > 1:
            raise UsageError(f"not all nodes found a run to go on with in {self.folder}; they must share it: name another one with --out")
        self._per_epoch = int(trainer.num_training_batches) // trainer.accumulate_grad_batches
        metrics = self.folder / "metrics.jsonl"
        if trainer.is_global_zero and metrics.exists():  # a resumed run writes the steps after its checkpoint again
            write_atomically(metrics, "".join(json.dumps(record) + "\n" for record in self._records() if record["step"] <= self._step))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(module, Method)
        step = trainer.global_step
        if step == self._step:  # gradients are still being accumulated; a checkpoint would not hold them
            return
        self._step = step
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if step % every == 0 or step == self._total:
            values = {key: float(value) for key, value in trainer.callback_metrics.items()}
            record = {"step": step, **{key: value for key, value in values.items() if math.isfinite(value)}}
            record["skipped_steps"] = self._skipped(module)
            record["data_seconds"] = round(self._before["data_seconds"] + self._of_stream("seconds", "mean"), 3)  # all ranks ask
            if trainer.is_global_zero:
                self.record(record)
        stop, due = self.signals.agreed(trainer, step, time.monotonic() - self._saved > self.seconds)
        epoch_kept = self.keep_every_epochs and step % (self._per_epoch * self.keep_every_epochs) == 0
        if stop and (processes := getattr(trainer.strategy.launcher, "procs", None)):
            processes.clear()  # Lightning ends this process once one that it has started has ended by a signal
        if stop or epoch_kept or (due and not module.skipped()[1]):  # after a step that was not taken, one that was is waited for
            self._save(trainer, self.checkpoint)
        if epoch_kept:
            self._save(trainer, self.folder / f"epoch-{step // self._per_epoch:04}.ckpt")
        if stop:
            self.signals.leave(stop, f"stopped at step {step} and saved {self.checkpoint}")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step > self._saved_step:  # else the checkpoint before would be of the same step
            self._save(trainer, self.checkpoint)

    def _save(self, trainer: Trainer, path: Path) -> None:
        self._skipped(trainer.lightning_module)
        trainer.save_checkpoint(path, weights_only=False)
        self._saved, self._saved_step = time.monotonic(), trainer.global_step

    def _skipped(self, module: LightningModule) -> int:
        """How many steps were not taken so far; Failure after `max_skipped` in a row. Waits for the device."""
        assert isinstance(module, Method)
        count, in_a_row = module.skipped()
        if in_a_row >= module.max_skipped:
            first, saved = self._step - in_a_row + 1, self._saved_step
            good = f"the last good checkpoint is {self.checkpoint} of step {saved}" if saved else "there is no checkpoint yet"
            lower = " or --trainer.precision bf16-mixed" if module.max_skipped > MAX_SKIPPED else ""  # 16-mixed
            raise Failure(
                f"the loss or a gradient was not finite in step {first} and those after it, and none of them was taken; {good}; begin "
                f"another run with a lower optim.lr{lower}" + (f" and --init {self.checkpoint}" if saved else "")
            )
        return count

    def finish(self, trainer: Trainer, module: Method) -> bool:
        """After the fit: write `run.json` if all steps are done, also when a resumed run found nothing left to do."""
        if trainer.global_step < module.total_steps:
            return False
        records = self._records()
        images = trainer.global_step * module.recipe["data"]["batch_size"]
        summary = {
            "steps": trainer.global_step,
            "images": images,
            "flops": images * self.flops,
            "parameters": sum(parameter.numel() for parameter in module.backbone.parameters()),
            **{key: round(value, 2) for key, value in self.state_dict().items()},
            "skipped_steps": module.skipped()[0],
            "devices": f"{trainer.world_size} x {trainer.strategy.root_device.type}",
            "recipe_hash": recipe_hash(module.recipe),
            "data": {key: trainer.datamodule.identity[key] for key in ("count", "hash", "by")},  # type: ignore[attr-defined]
            "git": git_revision(),
            "metrics": records[-1] if records else {},
        }
        if trainer.is_global_zero:
            write_atomically(self.folder / "run.json", json.dumps(summary, indent=1) + "\n")
        return True

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.signals.give_back()
        if self._new and {path.name for path in self.folder.iterdir()} <= {"recipe.yaml", LOCK}:
            (self.folder / "recipe.yaml").unlink()  # nothing was trained: the next start is not asked for --resume

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.signals.give_back()

    def record(self, values: dict[str, Any]) -> None:
        """Add a line to `metrics.jsonl`."""
        path = self.folder / "metrics.jsonl"
        with naming(path), path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def _records(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl; a kill can cut the last one."""
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def set_loop_counters(checkpoint: dict[str, Any], per_epoch: int, accumulate: int) -> None:
    """Set the counters of Lightning's loops to what they are in `on_train_batch_end` of the checkpoint's last optimiser step.

    per_epoch: micro-batches of an epoch. Counters saved at another moment make Lightning count an epoch twice, or not at all."""
    done = checkpoint["global_step"] * accumulate
    epoch = (done - 1) // per_epoch
    loops = checkpoint["loops"]["fit_loop"]
    loops["state_dict"].pop("combined_loader", None)
    batch = loops["epoch_loop.batch_progress"]
    batch["is_last_batch"] = done == (epoch + 1) * per_epoch
    for progress, count, last in ((loops["epoch_progress"], epoch + 1, ("processed", "completed")), (batch, done, ("completed",))):
        within = count if progress is not batch else done - epoch * per_epoch
        for which, number in (("total", count), ("current", within)):
            progress[which] |= {key: number - (key in last) for key in ("ready", "started", "processed", "completed")}
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - 1


class Progress(TQDMProgressBar):
    """Lightning's bar, one over the whole run, in images; loss and seconds waited for data behind it. In a log, a line now and then."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self._log = name, not sys.stderr.isatty()
        self._seconds, self._shown = 20.0 if self._log else 0.5, 0.0  # a log wants few lines, and a GPU need not wait each time

    def init_train_tqdm(self) -> Tqdm:
        images = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        bar = Tqdm(
            total=self.trainer.estimated_stepping_batches,
            initial=self.trainer.global_step,
            unit_scale=images,
            unit=" images",
            desc=self.name,
            dynamic_ncols=True,
            disable=self.is_disabled,
            file=io.StringIO() if self._log else sys.stderr,
            bar_format="{desc}: {n_fmt}/{total_fmt} images [{elapsed}<{remaining}, {rate_fmt}{postfix}]" if self._log else None,
        )
        bar.initial = self.trainer.global_step * images  # tqdm scales all but this, and its rate would count what was trained before
        return bar

    on_train_epoch_start = on_train_epoch_end = Callback.on_train_epoch_start  # nothing: the bar goes on from epoch to epoch

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if time.monotonic() - self._shown > self._seconds or trainer.global_step == trainer.estimated_stepping_batches:
            self._shown = time.monotonic()
            super().on_train_batch_end(trainer, module, outputs, batch, trainer.global_step - 1)
            if self._log and not self.is_disabled:
                print(self.train_progress_bar, file=sys.stderr, flush=True)

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        waited = f"{getattr(trainer.train_dataloader, 'seconds', 0.0):.0f}"
        read = trainer.callback_metrics  # every few steps
        return {**({"loss": f"{float(read['loss']):.3f}"} if "loss" in read else {}), "data_seconds": waited}

    def on_exception(self, *_: Any) -> None:
        """The error begins a line of its own."""
        if self._train_progress_bar is not None:
            self.train_progress_bar.close()

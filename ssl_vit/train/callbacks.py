"""What a run leaves behind and what it shows: the run folder and the progress bar."""

import io
import json
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from ssl_vit.data.loader import whole_batches
from ssl_vit.errors import Interrupted, UsageError
from ssl_vit.files import write_atomically
from ssl_vit.methods import Method
from ssl_vit.provenance import git_revision, recipe_hash

CHECKPOINT_SECONDS, CHECK_EVERY_STEPS = 300.0, 50


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, then renames: the name always holds a whole checkpoint, the old one or the new."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


class RunFolder(Checkpoint):
    """`recipe.yaml`, `last.ckpt` (every five minutes, at the end, and at Ctrl-C in a single process), `metrics.jsonl`, and `run.json`
    once all steps are done. flops: of one image through the method. keep_every_epochs: `epoch-NNNN.ckpt` stays after so many epochs."""

    def __init__(self, folder: Path, flops: int, keep_every_epochs: int | None = None) -> None:
        super().__init__()
        self.folder, self.flops, self.keep_every_epochs = folder, flops, keep_every_epochs
        self.checkpoint = folder / "last.ckpt"
        self.interrupted = False
        self._new = False  # whether this start wrote the folder's recipe
        self._total: int | None = None
        self._step = -1  # the last one seen; micro-batches of an accumulated step repeat it
        self._before = {"seconds": 0.0, "data_seconds": 0.0, "replaced": 0}  # by a run that this one goes on with
        self._stream: Any = None
        self._trainer: Any = None
        self._start = time.monotonic()
        self._previous: Any = None

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
            self._new = not (self.folder / "recipe.yaml").exists()
            write_atomically(self.folder / "recipe.yaml", yaml.safe_dump(module.recipe, sort_keys=False))
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            # several ranks may be at different steps, so there Ctrl-C is left to Lightning
            self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, Method)
        self._total, self._step, self._stream = module.total_steps, trainer.global_step, trainer.train_dataloader
        self._trainer = trainer
        if len(set(trainer.strategy.all_gather(torch.tensor(trainer.global_step, device=module.device)).view(-1).tolist())) > 1:
            raise UsageError(f"not all nodes found a run to go on with in {self.folder}; they must share it: name another one with --out")
        self._per_epoch = int(trainer.num_training_batches) // trainer.accumulate_grad_batches
        metrics = self.folder / "metrics.jsonl"
        if trainer.is_global_zero and metrics.exists():  # a resumed run writes the steps after its checkpoint again
            write_atomically(metrics, "".join(json.dumps(record) + "\n" for record in self._records() if record["step"] <= self._step))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._step:  # gradients are still being accumulated; a checkpoint would not hold them
            return
        self._step = step
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if step % every == 0 or step == self._total:
            record = {"step": step, **{key: float(value) for key, value in trainer.callback_metrics.items()}}
            record["data_seconds"] = round(self._before["data_seconds"] + self._of_stream("seconds", "mean"), 3)  # all ranks ask
            if trainer.is_global_zero:
                with (self.folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
        if self.interrupted:
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
            raise Interrupted(f"stopped at step {step} and saved {self.checkpoint}")
        if step % CHECK_EVERY_STEPS == 0 and trainer.strategy.broadcast(time.monotonic() - self._saved > CHECKPOINT_SECONDS):
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
            self._saved = time.monotonic()
        if self.keep_every_epochs and step % (self._per_epoch * self.keep_every_epochs) == 0:
            for path in (self.checkpoint, self.folder / f"epoch-{step // self._per_epoch:04}.ckpt"):
                trainer.save_checkpoint(path, weights_only=False)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step:
            trainer.save_checkpoint(self.checkpoint, weights_only=False)

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
        if self._new and [path.name for path in self.folder.iterdir()] == ["recipe.yaml"]:
            (self.folder / "recipe.yaml").unlink()  # nothing was trained: the next start is not asked for --resume

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _records(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl; a kill can cut the last one."""
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    def _interrupt(self, signum: int, frame: Any) -> None:
        if self.interrupted:  # a second Ctrl-C does not wait for the step
            raise KeyboardInterrupt
        self.interrupted = True


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
        return Tqdm(
            total=self.trainer.estimated_stepping_batches,
            initial=self.trainer.global_step,
            unit_scale=self.trainer.datamodule.batch_size,  # type: ignore[attr-defined]
            unit=" images",
            desc=self.name,
            dynamic_ncols=True,
            disable=self.is_disabled,
            file=io.StringIO() if self._log else sys.stderr,
            bar_format="{desc}: {n_fmt}/{total_fmt} images [{elapsed}<{remaining}, {rate_fmt}{postfix}]" if self._log else None,
        )

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

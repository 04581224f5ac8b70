"""What a run leaves behind and what it shows: the run folder and the progress bar."""

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
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from tqdm import tqdm

from ssl_vit.files import write_atomically
from ssl_vit.methods import Method
from ssl_vit.provenance import git_revision, recipe_hash

CHECKPOINT_SECONDS, CHECK_EVERY_STEPS = 300.0, 50


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, then renames: the name always holds a whole checkpoint, the old one or the new."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


class Interrupted(Exception):
    """Ctrl-C, after the step was finished and saved."""


class RunFolder(Checkpoint):
    """`recipe.yaml`, `last.ckpt` (every five minutes, at the end, and at Ctrl-C in a single process), `metrics.jsonl`, and `run.json`
    once all steps are done. flops: of one image through the method."""

    def __init__(self, folder: Path, flops: int) -> None:
        super().__init__()
        self.folder, self.flops = folder, flops
        self.checkpoint = folder / "last.ckpt"
        self.interrupted = False
        self._total: int | None = None
        self._step = -1  # the last one seen; micro-batches of an accumulated step repeat it
        self._seconds_before = 0.0
        self._start = time.monotonic()
        self._previous: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds_before + time.monotonic() - self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._start = self._saved = time.monotonic()
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "recipe.yaml", yaml.safe_dump(module.recipe, sort_keys=False))
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            # ranks of a group may stand at different steps; they end as Lightning ends them
            self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, Method)
        self._total, self._step = module.total_steps, trainer.global_step
        metrics = self.folder / "metrics.jsonl"
        if trainer.is_global_zero and metrics.exists():  # a resumed run writes the steps behind its checkpoint again
            write_atomically(metrics, "".join(json.dumps(record) + "\n" for record in self._records() if record["step"] <= self._step))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._step:  # gradients are still being accumulated; a checkpoint would not hold them
            return
        self._step = step
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if trainer.is_global_zero and (step % every == 0 or step == self._total):
            record = {"step": step, **{key: float(value) for key, value in trainer.callback_metrics.items()}}
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        if self.interrupted:
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
            raise Interrupted(f"stopped at step {step} and saved {self.checkpoint}")
        if step % CHECK_EVERY_STEPS == 0 and trainer.strategy.broadcast(time.monotonic() - self._saved > CHECKPOINT_SECONDS):
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
            self._saved = time.monotonic()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.save_checkpoint(self.checkpoint, weights_only=False)

    def finish(self, trainer: Trainer, module: Method) -> bool:
        """After the fit: write `run.json` if all steps are done, also when a resumed run found nothing left to do."""
        if self._total is not None and trainer.global_step < self._total:
            return False
        records = self._records()
        images = trainer.global_step * module.recipe["data"]["batch_size"] * trainer.accumulate_grad_batches
        summary = {
            "steps": trainer.global_step,
            "images": images,
            "flops": images * self.flops,
            "parameters": sum(parameter.numel() for parameter in module.backbone.parameters()),
            "seconds": round(self.state_dict()["seconds"], 2),
            "devices": f"{trainer.world_size} x {trainer.strategy.root_device.type}",
            "recipe_hash": recipe_hash(module.recipe),
            "git": git_revision(),
            "metrics": records[-1] if records else {},
        }
        if trainer.is_global_zero:
            write_atomically(self.folder / "run.json", json.dumps(summary, indent=1) + "\n")
        return True

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


class Progress(ProgressBar):
    """One bar over the whole run: images seen, time left, images per second, loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._bar: tqdm[Any] | None = None

    def disable(self) -> None:
        """Lightning's way of silencing ranks above 0; `on_train_start` asks for the rank itself."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, Method)
        self._images = module.recipe["data"]["batch_size"] * trainer.accumulate_grad_batches
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=module.total_steps * self._images,
            initial=trainer.global_step * self._images,
            desc=self.name,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=terminal,
            mininterval=0.5 if terminal else 20.0,  # a log wants few lines
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self._bar is not None
        seen = trainer.global_step * self._images
        if self._bar.update(seen - self._bar.n):
            self._bar.set_postfix(loss=f"{float(trainer.callback_metrics['loss']):.3f}", refresh=False)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close(trainer)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._close(trainer)

    def _close(self, trainer: Trainer) -> None:
        if self._bar is not None:
            if "loss" in trainer.callback_metrics:
                self._bar.set_postfix(loss=f"{float(trainer.callback_metrics['loss']):.3f}")
            self._bar.close()

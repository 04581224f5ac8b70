"""What a run leaves behind and what it shows: the run folder and the progress bar."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from tqdm import tqdm

from ssl_vit.methods import Method
from ssl_vit.provenance import git_revision, recipe_hash

CHECKPOINT_SECONDS, CHECK_EVERY_STEPS = 300.0, 50


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, then renames: the name always holds a whole checkpoint, the old one or the new."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


class Interrupted(Exception):
    """Ctrl-C, after the step was finished and saved."""


class RunFolder(Checkpoint):
    """`recipe.yaml`, `last.ckpt` (every five minutes, at Ctrl-C and at the end), `metrics.jsonl`, and `run.json` when finished."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.checkpoint = folder / "last.ckpt"
        self._interrupted = False
        self._seconds_before = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds_before + time.monotonic() - self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._start = self._saved = time.monotonic()
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "recipe.yaml").write_text(yaml.safe_dump(module.recipe, sort_keys=False))
        if trainer.world_size == 1:  # ranks of a group may stand at different steps; they end as Lightning ends them
            self._previous = signal.signal(signal.SIGINT, self._interrupt) if _in_main_thread() else None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        metrics = self.folder / "metrics.jsonl"
        if trainer.is_global_zero and metrics.exists():  # a resumed run writes the steps behind its checkpoint again
            lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
            metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= trainer.global_step))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.is_global_zero and (step % every == 0 or step == module.total_steps):
            record = {"step": step, **{key: float(value) for key, value in trainer.callback_metrics.items()}}
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        if self._interrupted:
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
            raise Interrupted(f"stopped at step {step} and saved {self.checkpoint}; go on with --resume")
        if step % CHECK_EVERY_STEPS == 0 and trainer.strategy.broadcast(time.monotonic() - self._saved > CHECKPOINT_SECONDS):
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
            self._saved = time.monotonic()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.save_checkpoint(self.checkpoint, weights_only=False)
        if trainer.is_global_zero:
            assert isinstance(module, Method)
            batch_size = module.recipe["data"]["batch_size"]
            summary = {
                "steps": trainer.global_step,
                "images": trainer.global_step * batch_size * trainer.accumulate_grad_batches,
                "seconds": round(self.state_dict()["seconds"], 2),
                "devices": f"{trainer.world_size} x {module.device.type}",
                "recipe_hash": recipe_hash(module.recipe),
                "git": git_revision(),
                "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
            }
            (self.folder / "run.json").write_text(json.dumps(summary, indent=1) + "\n")

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if getattr(self, "_previous", None) is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _interrupt(self, signum: int, frame: Any) -> None:
        if self._interrupted:  # a second Ctrl-C does not wait for the step
            raise KeyboardInterrupt
        self._interrupted = True


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


class Progress(ProgressBar):
    """One bar over the whole run: images seen, time left, images per second, loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._enabled = True
        self._bar: tqdm[Any] | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

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
            disable=not (self._enabled and trainer.is_global_zero),
        )

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self._bar is not None
        seen = trainer.global_step * self._images
        if self._bar.update(seen - self._bar.n):
            self._bar.set_postfix(loss=f"{float(trainer.callback_metrics['loss']):.3f}", refresh=False)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close(trainer)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if self._bar is not None:
            self._bar.close()

    def _close(self, trainer: Trainer) -> None:
        assert self._bar is not None
        self._bar.set_postfix(loss=f"{float(trainer.callback_metrics['loss']):.3f}")
        self._bar.close()

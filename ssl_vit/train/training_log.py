"""A run folder, mirrored to W&B: while it grows, or once it is finished."""

import json
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from ssl_vit.assets import read_yaml
from ssl_vit.provenance import git_revision, recipe_hash, versions
from ssl_vit.train.tracking import TrackedRun, Tracking
from ssl_vit.weights.checkpoint import load_backbone, read_checkpoint

SUMMARY = ("steps", "images", "flops", "parameters", "seconds", "devices")  # of run.json


class TrainingLog(Callback):
    """Sends nothing but what is in the folder's files, so that a resumed run can go on where W&B stands. Only rank 0 logs."""

    def __init__(self, tracking: Tracking, folder: Path) -> None:
        self.folder = folder
        self.run = TrackedRun(tracking, folder, "pretrain")
        self._position = 0  # in metrics.jsonl

    def start(self, recipe: dict[str, Any]) -> None:
        about = {"source": self.folder.name, "recipe_hash": recipe_hash(recipe), "git": git_revision(), "versions": versions()}
        self.run.start(self.folder.name, {**recipe, **about})

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.start(module.recipe)  # type: ignore[arg-type]

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.send()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.send()
        self.run.finish(failed=True)

    def send(self) -> None:
        """Log the lines that metrics.jsonl has got since the last time."""
        file = self.folder / "metrics.jsonl"
        if not self.run.started or not file.exists():
            return
        with file.open("rb") as lines:
            lines.seek(self._position)
            new = lines.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._position += len(whole)
        steps: dict[int, dict[str, Any]] = {}  # the online k-NN writes a line of its own for a step
        for line in whole.splitlines():
            values = json.loads(line)
            steps.setdefault(values.pop("step"), {}).update(values)
        for step, values in steps.items():
            self.run.log(values, step=step)

    def close(self) -> None:
        """What is known at the end; of a run that stopped before it, only that it stopped."""
        self.send()
        if self.run.started and (self.folder / "run.json").exists():
            content = json.loads((self.folder / "run.json").read_text())
            weights = self._weights()
            init = read_checkpoint(self.folder / "last.ckpt")["ssl_vit"]["init"]
            self.run.summarise({"checkpoint": weights, "init": init, **{key: content[key] for key in SUMMARY}})
            self.run.finish(sent=weights)
        self.run.finish()

    @rank_zero_only
    def catch_up(self) -> None:
        """Of a finished run, log what W&B has not got yet, which may be all."""
        if self.run.sent != self._weights():
            self.start(read_yaml(self.folder / "recipe.yaml"))
            self.close()

    def _weights(self) -> str:
        return load_backbone(str(self.folder / "last.ckpt")).weights_hash()

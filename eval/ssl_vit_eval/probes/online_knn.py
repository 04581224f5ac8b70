"""k-NN while pretraining: a labelled dataset watched from outside, without a trace in the training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float32, Int64, UInt8
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from ssl_vit.data.images import ImageStore
from ssl_vit.data.transforms import normalise
from ssl_vit.errors import UsageError, require
from ssl_vit.methods import Method
from ssl_vit.model.backbone import Backbone
from ssl_vit.model.readout import Readout
from ssl_vit.train.callbacks import RunFolder
from ssl_vit_eval.distributed import merge_parts, parts
from ssl_vit_eval.features.extract import BATCH
from ssl_vit_eval.probes.knn import KNNProbe
from ssl_vit_eval.probes.selection import stratified_slice
from ssl_vit_eval.splits import Split, load_train_test

BANK, QUERIES = 10_000, 2_000  # images at most
SEED = 0


class OnlineKNN(Callback):
    """Top-1 of DINO's k-NN rule (k = 20, T = 0.07) on features of the trained readout: of the teacher where there is one.

    Bank and queries are both of the *train* split, the queries of its selection slice, so that whoever acts on this number has not
    seen test. Both are fixed, stratified by class, and go through the evaluation's transform at the model's size. Every `every` epochs
    and after the last step `knn_top1` goes to the loggers and, on a line of its own, to `metrics.jsonl`; it is the same for any number
    of processes. Training goes on as if it had not been measured: random states, modes and gradients are as before.

    Args:
        data: a hub id, a local folder or builtin:NAME, with labels. What is wrong with it is raised before training starts.
        every: epochs from one measurement to the next.
    """

    def __init__(self, data: str, every: int = 10) -> None:
        require(every > 0, "every", every, "above 0")
        self.data, self.every = data, every

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        assert isinstance(module, Method)
        with isolate_rng():
            self.prepare(trained(module)[0].image_size, progress=trainer.is_global_zero)

    def prepare(self, size: int, progress: bool = False) -> None:
        """Decode this process's parts of bank and queries, at `size` px. UsageError and Failure as `load_train_test`."""
        train, _ = load_train_test(self.data, size=size, progress=progress)
        for notice in train.notices:
            rank_zero_info(notice)
        bank, queries = subsets(train)
        self.bank_labels, self.query_labels = train.labels[bank], train.labels[queries]
        if len(torch.unique(self.bank_labels)) < 2 or len(queries) == 0:
            raise UsageError(f"{self.data}: train holds too little for a k-NN (two classes, two images each); choose another dataset")
        self.bank, self.queries = ([*_own(train.images, rows)] for rows in (bank, queries))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(module, Method)
        epoch_ends = trainer.is_last_batch and (trainer.current_epoch + 1) % self.every == 0
        if not epoch_ends and trainer.global_step < module.total_steps:
            return
        value = self.measure(*trained(module), module.device)
        rank_zero_info(f"step {trainer.global_step}: knn_top1 {value:.1%} on the selection slice of {self.data}")
        for logger in trainer.loggers:
            logger.log_metrics({"knn_top1": value}, step=trainer.global_step)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunFolder) and trainer.is_global_zero:
                callback.record({"step": trainer.global_step, "knn_top1": value})

    def measure(self, backbone: Backbone, readout: Readout, device: torch.device) -> float:
        """Top-1 of the queries, a fraction, the same on every process; all of them call it."""
        with isolate_rng(), torch.no_grad(), evaluating(backbone, readout):
            # begun with nothing, for a process that has no part
            none = torch.empty(0, readout.spec.width(backbone.width), device=device)
            mine = torch.cat([none, *(_features(images, backbone, readout, device) for images in self.bank)])
            probe = KNNProbe().fit(merge_parts(mine, len(self.bank_labels), BATCH), self.bank_labels)
            answers = [probe.predict(_features(images, backbone, readout, device)).cpu() for images in self.queries]
            predicted = merge_parts(torch.cat([self.query_labels[:0], *answers]), len(self.query_labels), BATCH)
            return float((predicted == self.query_labels).double().mean())


def trained(module: Method) -> tuple[Backbone, Readout]:
    """What a checkpoint of this method is read with by default; UsageError if that is not the readout that the loss is attached to."""
    arm: Any = getattr(module, "teacher", module)
    if arm.readout.spec != module.spec:
        raise UsageError(f"the model is trained with {module.spec} but would be read with {arm.readout.spec}; make them the same")
    return arm.backbone, arm.readout


def subsets(train: Split) -> tuple[Int64[Tensor, "bank"], Int64[Tensor, "queries"]]:
    """Rows of train: at most about `BANK` outside its selection slice and `QUERIES` in it, of every class the same share."""
    held_out = stratified_slice(train.labels) if train.selection is None else train.selection
    chosen = []
    for rows, count in (((~held_out).nonzero()[:, 0], BANK), (held_out.nonzero()[:, 0], QUERIES)):
        chosen.append(rows if len(rows) <= count else rows[stratified_slice(train.labels[rows], count / len(rows), SEED)])
    return chosen[0], chosen[1]


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module in the mode that it was in."""
    were = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in were:
            part.training = training


def _own(images: ImageStore, rows: Int64[Tensor, "n"]) -> Iterator[UInt8[Tensor, "b 3 s s"]]:
    for start, end in parts(len(rows), BATCH):
        yield images.batch(rows[start:end])[0]


def _features(images: UInt8[Tensor, "b 3 s s"], backbone: Backbone, readout: Readout, device: torch.device) -> Float32[Tensor, "b width"]:
    x = normalise(images.to(device).float() / 255, backbone.mean, backbone.std)
    z: Tensor = readout(backbone(x, blocks=readout.spec.blocks))
    return z.float()

"""Fine-tuning: a copy of the backbone, a readout and a linear head, trained together as in MAE (He et al. 2022, appendix A.1)."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from timm.data.mixup import Mixup, mixup_target
from timm.layers import DropPath, trunc_normal_
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.data.images import ImageStore
from ssl_vit.data.transforms import normalise
from ssl_vit.data.views import Batch, SingleCrop, single_crop
from ssl_vit.errors import UsageError, require
from ssl_vit.methods.schedules import cosine
from ssl_vit.model.backbone import Backbone
from ssl_vit.model.readout import Readout, ReadoutSpec
from ssl_vit_eval.distributed import device
from ssl_vit_eval.features.extract import BATCH
from ssl_vit_eval.probes.attentive import DIVERGED, classes_of
from ssl_vit_eval.probes.base import class_targets, seeds_of
from ssl_vit_eval.probes.gradient_descent import TRAINED, Course
from ssl_vit_eval.probes.selection import Answers, Found, Labels, Parameters, Slice, Truth, select
from ssl_vit_eval.schema import NotNegative, Positives

PARAMETERS: dict[str, Any] = TRAINED | {
    "lr": Positives,  # for 256 images, at the head: the rate used is lr * batch / 256 * layer_decay ** (layers above)
    "min_lr": float,  # at the last step, at the head
    "weight_decay": float,  # on matrices only
    "layer_decay": float,
    "epochs": NotNegative,
    "warmup_epochs": NotNegative,
    "drop_path": float,  # at the last block, growing from 0 at the first
    "crop_scale": list,  # least and largest share of the image's area
    "mixup": float,  # alpha of its beta distribution; 0 for none
    "cutmix": float,
    "label_smoothing": float,
    "fresh_norm": bool,  # the final norm starts anew
}
_FORWARD = 128  # images of a forward pass: what a batch holds beyond them costs time instead of memory


class Network(nn.Module):
    """Normalised images -> logits [b c]: a trainable copy of the backbone, the readout, a head that starts near zero as MAE's."""

    def __init__(self, backbone: Backbone, spec: ReadoutSpec, classes: int, drop_path: float, fresh_norm: bool) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).requires_grad_(True)
        set_drop_path(self.backbone, drop_path)
        if fresh_norm:
            self.backbone.norm.reset_parameters()  # type: ignore[operator]
        trained = self.backbone.trained_readout  # a learned one goes on from where pretraining left it
        self.readout = trained if trained is not None and trained.spec == spec else Readout(spec, backbone.width)
        self.head = nn.Linear(spec.width(backbone.width), classes)
        trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        logits: Tensor = self.head(self.readout(self.backbone(images, blocks=self.readout.spec.blocks)))
        return logits.float()

    def group_matcher(self, coarse: bool) -> dict[str, str]:
        """For timm: the embeddings are the first layer, then the blocks; final norm, readout and head, which are not named, the last."""
        return {"embeddings": r"backbone\.vit\.(?!blocks\.|norm\.|fc_norm\.)", "blocks": r"backbone\.vit\.blocks\.(\d+)"}


def run(
    parameters: Parameters,
    backbone: Backbone,
    specs: Sequence[str],
    train: ImageStore,
    y_train: Labels,
    test: ImageStore,
    y_test: Truth,
    held_out: Slice,
) -> dict[str, Found]:
    """The protocol kind `finetune`; `backbone` itself stays as it is.

    UsageError for a single class or image, and as `selection.select`.
    """
    axes = {"lr": sorted(map(float, parameters["lr"]))}
    seeds, (classes, targets) = seeds_of(parameters), class_targets(y_train)
    course = _course(parameters, len(y_train))
    details = [{"batch_size": course.batch(len(y_train)), "iterations": course.total(len(y_train))}] * len(axes["lr"])

    def train_all(spec: str, rows: Int64[Tensor, " k"], split: str, asked: Int64[Tensor, " q"]) -> Answers:
        answers, alive = [], []
        for lr, seed in itertools.product(axes["lr"], seeds):
            p = {**parameters, "seed": seed}
            with _seeded(seed):
                network = Network(backbone, ReadoutSpec.parse(spec), len(classes), p["drop_path"], p["fresh_norm"]).to(device())
                fit(network, p, lr, train, rows, targets)
            answers.append(predict(network, train if split == "train" else test, asked, classes))
            alive.append(bool((predict(network, train, rows[:BATCH], classes) != DIVERGED).all()))
        used = sum(p.numel() for p in network.parameters() if p.grad is not None)
        of_seeds = torch.stack(answers).view(-1, len(seeds), len(asked)).transpose(1, 2)
        return Answers(of_seeds, torch.tensor(alive).view(-1, len(seeds)).all(dim=1), details, parameters=used)

    return select(axes, lambda *asked: {spec: train_all(spec, *asked) for spec in specs}, y_train, y_test, [held_out])


def _course(parameters: Mapping[str, Any], n: int) -> Course:
    """Batches of an even number, since mixup takes the images in pairs. UsageError where there are no two."""
    p = parameters
    size = min(p["batch_size"], n) // 2 * 2
    require(size > 0, "batch_size", f"{p['batch_size']}, for {n} training images", "2 or more, as many images must be there")
    return Course(size, p["epochs"], 0, p["warmup_epochs"], "iteration", (p["seed"],))


def fit(
    network: Network, parameters: Mapping[str, Any], lr: float, images: ImageStore, rows: Int64[Tensor, "k"], targets: Int64[Tensor, " n"]
) -> None:
    """Train in place on these rows; targets below the head's width."""
    p, backbone, course, classes = parameters, network.backbone, _course(parameters, len(rows)), network.head.out_features
    size, total = course.batch(len(rows)), course.total(len(rows))
    warmup = round(p["warmup_epochs"] * (len(rows) // size))
    optimizer = torch.optim.AdamW(layer_groups(network, p["layer_decay"], p["weight_decay"]), betas=(0.9, 0.999))
    smoothing = p["label_smoothing"]
    mix = Mixup(p["mixup"], p["cutmix"], label_smoothing=smoothing, num_classes=classes) if p["mixup"] or p["cutmix"] else None
    network.train()
    for step, ((which,), _) in enumerate(course.steps(len(rows))):
        pixels, sizes = (part.to(device()) for part in images.batch(rows[which]))
        labels = targets[rows[which]].to(device())
        positions = torch.arange(step * size, (step + 1) * size, device=device())
        crop = SingleCrop(pixels.shape[-1], (float(p["crop_scale"][0]), float(p["crop_scale"][1])))
        x = normalise(single_crop(Batch(pixels, sizes, positions, step), p["seed"], crop), backbone.mean, backbone.std)
        x, soft = mix(x, labels) if mix else (x, mixup_target(labels, classes, smoothing=smoothing))
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * cosine(step, total, lr * size / 256, p["min_lr"], warmup)
        optimizer.zero_grad()
        for part, soft_part in zip(torch.split(x, _FORWARD), torch.split(soft, _FORWARD), strict=True):
            with torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
                logits = network(part)
            torch.autograd.backward(F.cross_entropy(logits, soft_part, reduction="sum") / size)
        optimizer.step()


@torch.no_grad()
def predict(network: Network, images: ImageStore, rows: Int64[Tensor, "k"], classes: Int64[Tensor, " c"]) -> Int64[Tensor, " k"]:
    """Classes of the rows, from whole images in full precision."""
    network.eval()
    answers = []
    for batch in torch.split(rows, BATCH):
        pixels, _ = images.batch(batch)
        x = normalise(pixels.to(device()).float() / 255, network.backbone.mean, network.backbone.std)
        answers.append(classes_of(network(x), classes))
    return torch.cat(answers)


def layer_groups(network: Network, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups with layer-wise rates (BEiT, Bao et al. 2022, appendix): `lr_scale` is layer_decay to the number of layers above.

    Biases, norms, tokens and positions do not decay."""
    plain = [name for name, _ in network.named_parameters() if name.endswith(("_token", "pos_embed"))]
    groups: list[dict[str, Any]] = param_groups_layer_decay(network, weight_decay, plain, layer_decay=layer_decay)
    return groups


def set_drop_path(backbone: Backbone, rate: float) -> None:
    """Stochastic depth that grows linearly from 0 at the first block to `rate` at the last, whatever the backbone was built with."""
    for number, block in enumerate(backbone.vit.blocks):
        drop = rate * number / max(1, backbone.depth - 1)
        places = [name for name in ("drop_path1", "drop_path2") if hasattr(block, name)]
        if rate > 0 and not places:
            raise UsageError(f"the blocks of this backbone ({type(block).__name__}) have no drop path; set drop_path to 0")
        for name in places:
            setattr(block, name, DropPath(drop) if drop > 0 else nn.Identity())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Weights, drop path and mixup (timm draws it from numpy's global generator) by the seed; the generators get their states
    back, also where memory runs out."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[device().index] if device().type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)

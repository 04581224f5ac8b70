"""Attentive probes: readouts with parameters (ssl_vit/model/poolers.py) and a linear head, trained on the tokens of a frozen backbone.

The optimisation is CAPI's (Darcet et al. 2025, appendix on evaluation): AdamW with betas (0.9, 0.95), linear warm-up and cosine to 0, no
normalisation before the head, the rate and the weight decay of each readout chosen on a slice of train.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.errors import UsageError
from ssl_vit.methods.optim import parameter_groups
from ssl_vit.model.readout import Readout, ReadoutSpec
from ssl_vit.model.tokens import Tokens
from ssl_vit_eval.distributed import device
from ssl_vit_eval.features.extract import BATCH
from ssl_vit_eval.features.tokens import TokenReader
from ssl_vit_eval.probes.batches import Course
from ssl_vit_eval.probes.linear import rates_and_decays
from ssl_vit_eval.probes.selection import Axes, Found, check_slice, choose, points, record

PARAMETERS: dict[str, type] = {
    "lr": list,  # for 256 images: the rate used is lr * batch / 256
    "weight_decay": list,  # on matrices only
    "batch_size": int,
    "epochs": float,
    "iterations": int,  # instead of epochs; the unused one is 0
    "warmup_epochs": float,
    "seed": int,
    "slice_fraction": float,
    "slice_seed": int,
}
BETAS = (0.9, 0.95)
DIVERGED = -1  # the prediction of a probe whose logits are not finite: right for no image


class TokenProbe(nn.Module):
    """A readout of its own parameters, if it has any, and a linear head: Tokens -> logits [b c]."""

    def __init__(self, spec: ReadoutSpec, width: int, classes: int) -> None:
        super().__init__()
        self.readout = Readout(spec, width)
        self.head = nn.Linear(spec.width(width), classes)
        trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tokens) -> Float[Tensor, "b c"]:
        logits: Tensor = self.head(self.readout(tokens))
        return logits


def run(
    parameters: Mapping[str, Any],
    specs: Sequence[str],
    train: TokenReader,
    y_train: Int64[Tensor, " n"],
    test: TokenReader,
    y_test: Int64[Tensor, " m"],
    held_out: Bool[Tensor, " n"],
) -> dict[str, Found]:
    """The protocol kind `attentive`: every readout with every setting, all trained on the same batches, each batch read once.

    Settings are chosen for each readout on the slice of train marked by `held_out`; of one setting nothing is chosen and the slice is
    not touched. UsageError for a single class, an empty slice, and where all settings diverged.
    """
    p, axes = parameters, rates_and_decays(parameters)
    course = Course(p["batch_size"], p["epochs"], p["iterations"], p["warmup_epochs"], "iteration", p["seed"])
    classes, targets = class_targets(y_train)
    everything = torch.arange(len(y_train))

    def trained(rows: Int64[Tensor, "k"]) -> dict[str, list[TokenProbe]]:
        probes = {spec: _start(spec, train.width, len(classes), axes, p["seed"]) for spec in specs}
        fit(probes, axes, course, train, rows, targets)
        return probes

    slice_accuracy: dict[str, list[float]] = {}
    if len(points(axes)) > 1:
        check_slice(held_out)
        answers = predict(trained(everything[~held_out]), train, everything[held_out], classes)
        slice_accuracy = {spec: accuracy(answer, y_train[held_out]) for spec, answer in answers.items()}
    probes = trained(everything)
    answers = predict(probes, test, torch.arange(len(y_test)), classes)
    counts = {spec: sum(p.numel() for p in of_readout[0].parameters()) for spec, of_readout in probes.items()}
    alive = {spec: finite(answer) for spec, answer in predict(probes, train, everything[:BATCH], classes).items()}
    return {
        spec: found(spec, axes, course, slice_accuracy.get(spec), alive[spec], answers[spec], y_test, len(y_train), counts[spec])
        for spec in specs
    }


def _start(spec: str, width: int, classes: int, axes: Axes, seed: int) -> list[TokenProbe]:
    """One probe for each setting, from the same first weights whatever else is trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = TokenProbe(ReadoutSpec.parse(spec), width, classes).to(device())
    return [copy.deepcopy(first) for _ in points(axes)]


def fit(
    probes: Mapping[str, Sequence[TokenProbe]],
    axes: Axes,
    course: Course,
    store: TokenReader,
    rows: Int64[Tensor, "k"],
    targets: Int64[Tensor, " n"],
) -> None:
    """Train all probes in place on these rows, each with its setting.

    One probe after the other within a batch: a `vmap` over the settings copies the tokens for each, and takes 2 to 5 times as long."""
    scale = course.batch(len(rows)) / 256
    groups = [
        {**group, "base_lr": setting["lr"] * scale, "weight_decay": group.get("weight_decay", setting["weight_decay"])}
        for of_readout in probes.values()
        for probe, setting in zip(of_readout, points(axes), strict=True)
        for group in parameter_groups(probe)
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)  # two groups a probe: launches are what a GPU waits for
    for which, rate in course.steps(len(rows)):
        tokens, labels = store.batch(rows[which]), targets[rows[which]].to(device())
        for group in optimizer.param_groups:
            group["lr"] = rate * group["base_lr"]
        optimizer.zero_grad()
        for of_readout in probes.values():
            for probe in of_readout:
                torch.autograd.backward(F.cross_entropy(probe(tokens), labels))
        optimizer.step()


@torch.no_grad()
def predict(
    probes: Mapping[str, Sequence[TokenProbe]],
    store: TokenReader,
    rows: Int64[Tensor, "k"],
    classes: Int64[Tensor, " c"],
) -> dict[str, Int64[Tensor, "settings k"]]:
    """Each probe's class for each of the rows."""
    answers: dict[str, list[Tensor]] = {spec: [] for spec in probes}
    for batch in torch.split(rows, BATCH):
        tokens = store.batch(batch)
        for spec, of_readout in probes.items():
            answers[spec].append(torch.stack([classes_of(probe(tokens), classes) for probe in of_readout]))
    return {spec: torch.cat(parts, dim=1) for spec, parts in answers.items()}


def class_targets(y: Int64[Tensor, " n"]) -> tuple[Int64[Tensor, " c"], Int64[Tensor, " n"]]:
    """The classes and each label's place among them; UsageError for fewer than two."""
    classes, targets = torch.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise UsageError(f"all {len(y)} training labels are {y[0].item()}: a probe needs at least two classes")
    return classes, targets


def classes_of(logits: Float[Tensor, "b c"], classes: Int64[Tensor, " c"]) -> Int64[Tensor, " b"]:
    """The class of the largest logit, on the CPU; DIVERGED where they are not finite."""
    finite = torch.isfinite(logits).all(dim=1).cpu()
    return torch.where(finite, classes[logits.argmax(dim=1).cpu()], DIVERGED)


def finite(predictions: Int64[Tensor, "settings k"]) -> list[bool]:
    """Which settings answer with numbers. Asked of training images: test has no say in what is chosen."""
    return (predictions != DIVERGED).all(dim=1).tolist()


def accuracy(predictions: Int64[Tensor, "settings k"], y: Int64[Tensor, " k"]) -> list[float]:
    return (predictions == y).double().mean(dim=1).tolist()


def found(
    spec: str,
    axes: Axes,
    course: Course,
    slice_accuracy: Sequence[float] | None,
    alive: Sequence[bool],
    predictions: Int64[Tensor, "settings m"],
    y_test: Int64[Tensor, " m"],
    n_train: int,
    parameters: int,
) -> Found:
    """What a trained grid found: the answers of the setting that was best on the slice, or of the only one (slice_accuracy None).

    What is not finite is wrong; a setting that diverged on all of train is not chosen. UsageError where all did."""
    if not any(alive):
        rates = ", ".join(f"{lr:g}" for lr in axes["lr"])
        raise UsageError(f"readout {spec!r}: training diverged at the learning rates {rates}: give smaller ones")
    selects, on_slice = (True, slice_accuracy) if slice_accuracy is not None else (False, [0.0])
    choice = choose(axes, [value if lives else -1.0 for value, lives in zip(on_slice, alive, strict=True)])
    on_test = accuracy(predictions, y_test)
    return Found(
        predictions=predictions[choice.place].clone(),
        selected={**choice.settings, "batch_size": course.batch(n_train), "iterations": course.total(n_train)},
        grid=record(axes, on_slice, on_test) if selects else None,
        edge_of_grid=choice.edge if selects else None,
        oracle=max(on_test) if selects else None,
        parameters=parameters,
    )

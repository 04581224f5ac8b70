"""Attentive probes: readouts with parameters (ssl_vit/model/poolers.py) and a linear head, trained on the tokens of a frozen backbone.

The optimisation is CAPI's (Darcet et al. 2025, appendix on evaluation): AdamW with betas (0.9, 0.95), linear warm-up and cosine to 0, no
normalisation before the head, the rate and the weight decay of each readout chosen on a slice of train.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.methods.optim import parameter_groups
from ssl_vit.model.readout import Readout, ReadoutSpec
from ssl_vit.model.tokens import Tokens
from ssl_vit_eval.distributed import device
from ssl_vit_eval.features.extract import BATCH
from ssl_vit_eval.features.tokens import TokenReader
from ssl_vit_eval.probes.base import class_targets, seeds_of
from ssl_vit_eval.probes.gradient_descent import COURSE, TRAINED, Course
from ssl_vit_eval.probes.linear import rates_and_decays
from ssl_vit_eval.probes.selection import Answers, Axes, Found, Labels, Parameters, Slice, Truth, points, select

# lr for 256 images: the rate used is lr * batch / 256; weight_decay on matrices only; of epochs and iterations the unused one is 0
PARAMETERS: dict[str, Any] = TRAINED | COURSE
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


Probes = Mapping[tuple[str, int], Sequence[TokenProbe]]  # one for each setting, by readout and seed


def run(
    parameters: Parameters,
    specs: Sequence[str],
    train: TokenReader,
    y_train: Labels,
    test: TokenReader,
    y_test: Truth,
    held_out: Slice,
) -> dict[str, Found]:
    """The protocol kind `attentive`: every readout with every setting, all trained on the same batches, each batch read once.

    UsageError for a single class, and as `selection.select`.
    """
    p, axes = parameters, rates_and_decays(parameters)
    course = Course(p["batch_size"], p["epochs"], p["iterations"], p["warmup_epochs"], "iteration", seeds_of(p))
    classes, targets = class_targets(y_train)
    details = [{"batch_size": course.batch(len(y_train)), "iterations": course.total(len(y_train))}] * len(points(axes))

    def train_all(rows: Int64[Tensor, " k"], split: str, asked: Int64[Tensor, " q"]) -> dict[str, Answers]:
        probes = {(spec, seed): _start(spec, train.width, len(classes), axes, seed) for spec in specs for seed in course.seeds}
        fit(probes, axes, course, train, rows, targets)
        answers = predict(probes, train if split == "train" else test, asked, classes)
        on_train = predict(probes, train, rows[:BATCH], classes)
        found = {}
        for spec in specs:
            # asked of training images: test has no say in what is chosen
            alive = torch.stack([(on_train[spec, seed] != DIVERGED).all(dim=1) for seed in course.seeds]).all(dim=0)
            parameters = sum(p.numel() for p in probes[spec, course.seeds[0]][0].parameters())
            of_seeds = torch.stack([answers[spec, seed] for seed in course.seeds], dim=2)
            found[spec] = Answers(of_seeds, alive, details, parameters=parameters)
        return found

    return select(axes, train_all, y_train, y_test, [held_out])


def _start(spec: str, width: int, classes: int, axes: Axes, seed: int) -> list[TokenProbe]:
    """One probe for each setting, from the same first weights whatever else is trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = TokenProbe(ReadoutSpec.parse(spec), width, classes).to(device())
    return [copy.deepcopy(first) for _ in points(axes)]


def fit(probes: Probes, axes: Axes, course: Course, store: TokenReader, rows: Int64[Tensor, "k"], targets: Labels) -> None:
    """Train all probes, by readout and seed, in place on these rows, each with its setting.

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
        for group in optimizer.param_groups:
            group["lr"] = rate * group["base_lr"]
        optimizer.zero_grad()
        for seed, batch in zip(course.seeds, rows[which], strict=True):
            tokens, labels = store.batch(batch), targets[batch].to(device())
            for probe in (probe for (_, own), of_readout in probes.items() if own == seed for probe in of_readout):
                torch.autograd.backward(F.cross_entropy(probe(tokens), labels))
        optimizer.step()


@torch.no_grad()
def predict(
    probes: Probes, store: TokenReader, rows: Int64[Tensor, "k"], classes: Int64[Tensor, " c"]
) -> dict[tuple[str, int], Int64[Tensor, "settings k"]]:
    """Each probe's class for each of the rows."""
    answers: dict[tuple[str, int], list[Tensor]] = {key: [] for key in probes}
    for batch in torch.split(rows, BATCH):
        tokens = store.batch(batch)
        for key, of_readout in probes.items():
            answers[key].append(torch.stack([classes_of(probe(tokens), classes) for probe in of_readout]))
    return {key: torch.cat(parts, dim=1) for key, parts in answers.items()}


def classes_of(logits: Float[Tensor, "b c"], classes: Int64[Tensor, " c"]) -> Int64[Tensor, " b"]:
    """The class of the largest logit, on the CPU; DIVERGED where they are not finite."""
    finite = torch.isfinite(logits).all(dim=1).cpu()
    return torch.where(finite, classes[logits.argmax(dim=1).cpu()], DIVERGED)

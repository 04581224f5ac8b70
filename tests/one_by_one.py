"""Linear heads trained one by one with torch.nn and torch.optim, and the data for it: what the grids of heads are tested against."""

from typing import Any

import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from ssl_vit_eval.probes.selection import stratified_slice

N, M, C = 70, 40, 4  # images of train and test, classes
LINEAR: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": [0.1, 2.0, 10.0],
    "weight_decay": [0.0, 0.02],
    "momentum": 0.9,
    "batch_size": 16,
    "epochs": 4.0,
    "iterations": 0,
    "warmup_epochs": 0.0,
    "schedule": "iteration",
    "normalise": "none",
    "init_std": 0.3,
    "seed": 5,
    "slice_fraction": 0.3,
    "slice_seed": 0,
}
MLP: dict[str, Any] = {"hidden": 7, "lr": [1e-3, 3e-2], "weight_decay": [0.0, 5.0], "batch_size": 16, "iterations": 15, "seed": 5}
GRID = [(lr, weight_decay) for lr in LINEAR["lr"] for weight_decay in LINEAR["weight_decay"]]


def features(n: int, d: int, seed: int = 0, noise: float = 1.5) -> tuple[Tensor, Tensor]:
    """Classes that overlap; features of different scales and means."""
    centres = torch.randn(C, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(C, (n,), generator=torch.Generator().manual_seed(1000 + n))
    X = centres[y] + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return X * torch.logspace(-0.5, 0.5, d) + torch.arange(d) / 3, y


def orders(n: int, size: int, epochs: int) -> list[list[Tensor]]:
    """The batches of every epoch, the incomplete one left out."""
    generator = torch.Generator().manual_seed(5)
    return [[part for part in torch.randperm(n, generator=generator).split(size) if len(part) == size] for _ in range(epochs)]


def one_head(X: Tensor, y: Tensor, lr: float, weight_decay: float, p: dict[str, Any]) -> nn.Sequential:
    """One linear head, in evaluation mode, trained as a probe's script does it. 256 / images a step times the base rate is `lr`."""
    size = min(p["batch_size"], len(X))
    linear = nn.Linear(X.shape[1], C, dtype=torch.float64)
    start = torch.randn(C, X.shape[1], generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        linear.weight.copy_(p["init_std"] * start)
        linear.bias.zero_()
    norm = nn.BatchNorm1d(X.shape[1], affine=False, eps=1e-6, dtype=torch.float64) if p["normalise"] == "batchnorm" else nn.Identity()
    model = nn.Sequential(norm, linear)
    optimizer = torch.optim.SGD(model.parameters(), lr * size / 256, momentum=p["momentum"], weight_decay=weight_decay)
    epochs = orders(len(X), size, int(p["epochs"]))
    steps = len(epochs) * len(epochs[0]) if p["schedule"] == "iteration" else len(epochs)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in epochs:
        for batch in epoch:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[batch]), y[batch]).backward()
            optimizer.step()
            if p["schedule"] == "iteration":
                scheduler.step()
        if p["schedule"] == "epoch":
            scheduler.step()
    return model.eval()


def standardised(X: Tensor, *others: Tensor) -> list[Tensor]:
    scaler = StandardScaler().fit(X.numpy())
    return [torch.from_numpy(scaler.transform(of.numpy())) for of in (X, *others)]


def data() -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Readouts of two widths: train, its labels, test, its labels, the slice."""
    kinds = {"cls": (6, 0, 1.5), "cls+gap": (12, 1, 1.5), "gap": (6, 2, 5.0)}  # width, seed, noise
    train = {name: features(N, d, seed, noise)[0] for name, (d, seed, noise) in kinds.items()}
    test = {name: features(M, d, 10 + seed, noise)[0] for name, (d, seed, noise) in kinds.items()}
    y, y_test = features(N, 6)[1], features(M, 6)[1]
    return train, y, test, y_test, stratified_slice(y, 0.3)

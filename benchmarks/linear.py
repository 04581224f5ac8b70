"""A grid of linear heads against a single one, in one run: `python benchmarks/linear.py [--threads N]`.

13 learning rates x 5 readouts, trained at once by `ssl_vit_eval.probes.linear`, on 50,000 features of width 384 in 10 classes, batches of
1024; on an accelerator where there is one. A single head is trained in three ways: by the same code with one readout and one rate, by
nn.Linear and torch.optim.SGD on indexed rows of a tensor, and by these two with a shuffling DataLoader. Milliseconds a step, the fastest
of the repeats; bringing the features to the device is included. The batches of all are of the same size and number. The goal is a ratio
under 3.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ssl_vit_eval.distributed import device
from ssl_vit_eval.probes import linear

N, WIDTH, CLASSES, BATCH, EPOCHS = 50_000, 384, 10, 1024, 10
STEPS = EPOCHS * (N // BATCH)
RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
PARAMETERS = {
    "optimizer": "sgd",
    "weight_decay": [0.0],
    "momentum": 0.9,
    "batch_size": BATCH,
    "epochs": EPOCHS,
    "iterations": 0,
    "warmup_epochs": 0.0,
    "schedule": "iteration",
    "normalise": "none",
    "init_std": 0.01,
    "seed": 0,
}


def ours(features: list[Tensor], y: Tensor, rates: list[float]) -> None:
    """Readouts side by side where `select` trains them so, that is on an accelerator."""
    training = linear.training(PARAMETERS | {"lr": rates})
    rows = torch.arange(N)
    for group in [features] if device().type == "cuda" else [[X] for X in features]:
        training.fit(group, rows, y, CLASSES)


def separate(X: Tensor, y: Tensor, loader: bool) -> None:
    X, y, head = X if loader else X.to(device()), y if loader else y.to(device()), nn.Linear(WIDTH, CLASSES).to(device())
    optimizer = torch.optim.SGD(head.parameters(), 0.004, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    batches = DataLoader(TensorDataset(X, y), BATCH, shuffle=True, drop_last=True)
    for _ in range(EPOCHS):
        for x, target in batches if loader else ((X[rows], y[rows]) for rows in torch.randperm(N, device=X.device).split(BATCH)[:-1]):
            loss = nn.functional.cross_entropy(head(x.to(device())), target.to(device()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def milliseconds(work: Callable[[], None], repeats: int) -> float:
    """Of a step, in the fastest of the repeats."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best * 1000 / STEPS


def main(threads: int, repeats: int) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    features, y = [torch.randn(N, WIDTH, generator=generator) for _ in range(5)], torch.randint(CLASSES, (N,), generator=generator)
    print(f"{f'ms a step of {BATCH}, {N} x {WIDTH}, {device()}, {threads} thread(s)':56s} {'one':>8s} {'13 x 5':>8s} {'ratio':>6s}")
    torch.set_grad_enabled(False)
    grid = milliseconds(lambda: ours(features, y, RATES), repeats)
    rows: list[tuple[str, float]] = [("a head by the same code", milliseconds(lambda: ours(features[:1], y, RATES[:1]), repeats))]
    rows += [("a readout's 13 heads by the same code", milliseconds(lambda: ours(features[:1], y, RATES), repeats))]
    torch.set_grad_enabled(True)
    rows += [("a head by nn.Linear and SGD, rows of a tensor", milliseconds(lambda: separate(features[0], y, False), repeats))]
    rows += [("a head by nn.Linear and SGD, DataLoader", milliseconds(lambda: separate(features[0], y, True), repeats))]
    for name, one in rows:
        print(f"{name:56s} {one:8.2f} {grid:8.2f} {grid / one:6.1f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    main(**vars(parser.parse_args()))

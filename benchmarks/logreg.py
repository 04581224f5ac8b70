"""Our logistic regression for a grid of 10 C against scikit-learn's, one fit after the other, in one run:
`python benchmarks/logreg.py [--features FILE.npz] [--threads 1]`.

Both sides fit the same standardised features for C from 0.001 to 1000, on all of train, and are read on test: seconds, and the accuracy
of each C. Ours has the tolerance of the protocol logreg; scikit-learn's LogisticRegression (lbfgs) has its own, its default: 0.0001 of
the gradient of the mean loss. Both read float64 features.
FILE.npz holds X_train [n d], y_train [n], X_test [m d], y_test [m]; without it features are drawn: classes that overlap, on correlated
axes whose spread falls by a power law, as a backbone's does.
"""

import argparse
import time
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from ssl_vit_eval.probes.logreg import fit_path

GRID = np.logspace(-3, 3, 10).tolist()
MAX_ITER, TOL = 1000, 1e-3  # of the protocol logreg
Split = tuple[np.ndarray, np.ndarray]


def synthetic(n: int, m: int, d: int, classes: int = 10) -> tuple[Split, Split]:
    rng = np.random.default_rng(0)
    spread = np.arange(1, d + 1) ** -0.5
    centres, axes = 0.15 * rng.standard_normal((classes, d)), np.linalg.qr(rng.standard_normal((d, d)))[0]

    def draw(rows: int) -> Split:
        y = rng.integers(classes, size=rows)
        return (((centres[y] + rng.standard_normal((rows, d))) * spread) @ axes).astype(np.float32), y

    return draw(n), draw(m)


def ours(train: Split, test: Split) -> tuple[float, list[float]]:
    start = time.perf_counter()
    probes = fit_path(torch.from_numpy(train[0]), torch.from_numpy(train[1]), GRID, MAX_ITER, TOL)
    seconds = time.perf_counter() - start
    return seconds, [probe.score(torch.from_numpy(test[0]), torch.from_numpy(test[1])) for probe in probes]


def sklearn_fits(train: Split, test: Split) -> tuple[float, list[float]]:
    start, probes = time.perf_counter(), []
    scaler = StandardScaler().fit(train[0].astype(np.float64))
    X = scaler.transform(train[0].astype(np.float64))
    for C in GRID:
        probes.append(LogisticRegression(C=C, max_iter=MAX_ITER).fit(X, train[1]))
    seconds = time.perf_counter() - start
    return seconds, [probe.score(scaler.transform(test[0].astype(np.float64)), test[1]) for probe in probes]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--features")
    for name, default in {"train": 50_000, "test": 10_000, "width": 192, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    values = parser.parse_args()
    torch.set_num_threads(values.threads)
    if values.features:
        file = np.load(values.features)
        train, test = ((file[f"X_{split}"], file[f"y_{split}"].astype(np.int64)) for split in ("train", "test"))
    else:
        train, test = synthetic(values.train, values.test, values.width)
    # a C that max_iter does not suffice for is in the table as it is
    warnings.simplefilter("ignore", ConvergenceWarning)
    with threadpool_limits(values.threads):
        (a, mine), (b, theirs) = ours(train, test), sklearn_fits(train, test)
    print(f"{f'{len(train[0])} x {train[0].shape[1]}, {len(test[0])} test, {values.threads} threads':44s} {'ours':>8s} {'sklearn':>8s}")
    for C, one, other in zip(GRID, mine, theirs, strict=True):
        print(f"{f'test accuracy in %, C = {C:.3g}':44s} {100 * one:8.2f} {100 * other:8.2f}")
    print(f"{'best of them':44s} {100 * max(mine):8.2f} {100 * max(theirs):8.2f}")
    print(f"{'largest difference in points':44s} {100 * np.abs(np.subtract(mine, theirs)).max():8.2f}")
    print(f"{'seconds for the grid':44s} {a:8.1f} {b:8.1f}   ratio {b / a:.1f}")


if __name__ == "__main__":
    main()

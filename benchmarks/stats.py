"""Seconds of the statistics over 6 seeds × 10,000 images, 10,000 draws, beside the plain crossed bootstrap: `python benchmarks/stats.py`.

The plain one (Owen & Eckles 2012) draws seeds and images and averages what they select; 1000 draws are timed and multiplied by ten. Its
percentiles are printed as well: six seeds, drawn from themselves, make them narrow.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from ssl_vit_eval.stats.images import DRAWS, mcnemar, paired_p, sign_flip
from ssl_vit_eval.stats.seeds import crossed_interval, interquartile_mean, probability_of_improvement, resolvable_seeds

SEEDS, IMAGES = 6, 10_000


def answers(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two arms [seeds, images], right or wrong: 70 and 71 %, 12 % discordant, a difference that varies by a point between seeds."""
    image, a = rng.random((1, IMAGES)), 0.15 * rng.standard_normal((SEEDS, IMAGES))
    b = a + 0.15 * rng.standard_normal((SEEDS, IMAGES))
    shift = 0.71 + 0.01 * rng.standard_normal((SEEDS, 1))
    return torch.from_numpy(image + a < 0.70), torch.from_numpy(image + b < shift)


def plain(differences: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    seeds, images = differences.shape
    return np.array([differences[np.ix_(rng.integers(seeds, size=seeds), rng.integers(images, size=images))].mean() for _ in range(draws)])


def clock(name: str, run: Callable[[], object]) -> None:
    start = time.perf_counter()
    found = run()
    print(f"{name:60s} {time.perf_counter() - start:8.3f} s   {found}")


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    a, b = answers(rng)
    differences = b.double() - a.double()
    signed = differences.numpy()
    sign_flip([1.0])  # imports
    mcnemar(a[0, :10], b[0, :10])
    clock("crossed_interval", lambda: tuple(round(value, 2) for value in crossed_interval(differences[:, None])))

    start = time.perf_counter()
    draws = plain(signed, rng, 1000)
    seconds = (time.perf_counter() - start) * DRAWS / 1000
    interval = [round(float(bound), 2) for bound in np.percentile(100 * draws, [2.5, 97.5])]
    print(f"{'plain crossed bootstrap, 1000 draws × 10':60s} {seconds:8.3f} s   percentiles {interval}")

    clock("crossed_interval, one seed", lambda: tuple(round(value, 2) for value in crossed_interval(differences[None, :1])))
    clock("crossed_interval, one seed, 3 probe seeds", lambda: tuple(round(value, 2) for value in crossed_interval(differences[None, :3])))
    clock("mcnemar, one seed", lambda: mcnemar(b[0], a[0]))
    clock("paired_p of shares of 6 draws", lambda: paired_p(b.double().mean(dim=0), a.double().mean(dim=0)))
    clock("sign_flip, 6 seeds", lambda: sign_flip(differences.mean(dim=1).tolist()))
    clock("sign_flip, 16 seeds", lambda: sign_flip(rng.standard_normal(16).tolist()))
    clock("resolvable_seeds, 8 seeds, first call", lambda: round(resolvable_seeds(1.0, 8, 0.05 / 6), 2))
    scores = rng.random((2, 10, SEEDS)).tolist()
    clock("probability_of_improvement, 10 datasets × 6 seeds", lambda: tuple(round(v, 2) for v in probability_of_improvement(*scores)))
    clock("interquartile_mean, 10 datasets × 6 seeds", lambda: tuple(round(value, 2) for value in interquartile_mean(scores[0])))


if __name__ == "__main__":
    main()

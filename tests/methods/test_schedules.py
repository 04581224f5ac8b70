"""Schedules against the tables of the papers' scripts, written with numpy."""

import numpy as np
import pytest

from ssl_vit.methods.schedules import cosine, linear


def dino_table(base: float, final: float, total: int, warmup: int) -> np.ndarray:
    ramp = np.linspace(0, base, warmup)
    rest = np.arange(total - warmup)
    return np.concatenate([ramp, final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / len(rest)))])


def test_dino_learning_rate() -> None:
    table = dino_table(5e-4, 1e-6, 200, 30)
    assert [cosine(step, 200, 5e-4, 1e-6, 30, 29) for step in range(200)] == pytest.approx(table.tolist(), abs=1e-12)


def test_dino_momentum() -> None:
    assert [cosine(step, 100, 0.996, 1.0) for step in range(100)] == pytest.approx(dino_table(0.996, 1.0, 100, 0).tolist(), abs=1e-12)


def test_mae_learning_rate() -> None:
    """The paper's script adjusts per iteration by the fractional epoch: linear up to epoch 40 of 800, then half a cosine."""
    steps = 5  # an epoch
    for step in range(800 * steps):
        epoch = step / steps
        expected = 1.5e-4 * epoch / 40 if epoch < 40 else 1.5e-4 * 0.5 * (1 + np.cos(np.pi * (epoch - 40) / (800 - 40)))
        assert cosine(step, 800 * steps, 1.5e-4, 0.0, 40 * steps) == pytest.approx(expected, abs=1e-15)


def test_temperature() -> None:
    assert [linear(step, 5, 0.04, 0.07) for step in range(7)] == pytest.approx([*np.linspace(0.04, 0.07, 5), 0.07, 0.07])
    assert linear(0, 0, 0.04, 0.07) == 0.07


@pytest.mark.parametrize(("warmup", "ramp"), [(0, None), (1, 0), (1, 1), (3, 2)])
def test_never_above_the_base_rate(warmup: int, ramp: int | None) -> None:
    values = [cosine(step, 10, 1.0, 0.0, warmup, ramp) for step in range(12)]
    assert max(values) <= 1.0
    assert values[10] == values[11] == 0.0

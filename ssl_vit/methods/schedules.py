"""Per-step schedules: plain functions of the step, so that a resumed run needs no scheduler state."""

import math


def cosine(step: int, total: int, start: float, end: float, warmup: int = 0, ramp: int | None = None) -> float:
    """Linear warm-up from 0 to `start` over `warmup` steps, then a half cosine from `start` to `end` at step `total`.

    ramp: the number of steps that the slope of the warm-up divides by. DINO's table reaches `start` one step before the warm-up ends
    (ramp = warmup - 1, `numpy.linspace`); MAE's formula at its end (ramp = warmup, the default).
    """
    if step < warmup:
        return start * step / max(1, warmup if ramp is None else ramp)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * progress))


def linear(step: int, steps: int, start: float, end: float) -> float:
    """From `start` to `end` in `steps` steps, then constant: DINO's teacher temperature, by epochs or by steps."""
    return end if step >= steps else start + (end - start) * step / max(1, steps - 1)

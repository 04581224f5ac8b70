"""How float32 products are computed on a GPU: rounded to TF32 in training, but not those that make views and positions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32() -> Iterator[None]:
    """Float32 matrix products on a GPU are rounded to TF32, in training alone: not what the same process evaluates after it."""
    with _products("high" if torch.cuda.is_available() else torch.get_float32_matmul_precision()):
        yield


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Products in the precision of their input: no autocast, no TF32. Views must not depend on the device that makes them."""
    with torch.autocast(device.type, enabled=False), _products("highest"):
        yield


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

"""Counter-based random numbers: a number is a hash of (seed, stream, sample position, draw index) and of nothing else.

So crops, jitter and masks do not depend on batch composition, rank, worker, device or on what was drawn before, and a
run resumed from an integer step draws exactly what the uninterrupted run would have drawn. Every use has a stream
number of its own; data order takes -1, the jitter order of `views` -2, view v takes 1000 + v and its drop path 100 + v,
MAE's mask 0.
"""

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

ORDER_STREAM = -1

# splitmix64 (Steele, Lea & Flood 2014), its constants written as signed 64-bit integers: torch int64 wraps around
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FACTOR_1 = 0xBF58476D1CE4E5B9 - 2**64
_FACTOR_2 = 0x94D049BB133111EB - 2**64


def _shift(x: Int64[Tensor, "..."], bits: int) -> Int64[Tensor, "..."]:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """splitmix64's finaliser: a bijection of 64-bit integers in which every input bit moves half of the output bits."""
    x = (x ^ _shift(x, 30)) * _FACTOR_1
    x = (x ^ _shift(x, 27)) * _FACTOR_2
    return x ^ _shift(x, 31)


def _key(*words: int) -> Int64[Tensor, ""]:
    key = torch.zeros((), dtype=torch.int64)
    for word in words:
        key = _mix((key ^ word) + _GOLDEN)
    return key


def uniform(seed: int, positions: Int64[Tensor, "b"], stream: int, count: int) -> Float32[Tensor, "b count"]:
    """`count` numbers in [0, 1), multiples of 2^-24, for each sample position, on the device of `positions`.

    Row i depends on (seed, stream, positions[i]) only, with the same bits on CPU and CUDA.
    """
    return uniform_by_stream(seed, positions, range(stream, stream + 1), count)[0]


def uniform_by_stream(seed: int, positions: Int64[Tensor, "b"], streams: range, count: int) -> Float32[Tensor, "v b count"]:
    """`uniform` of several streams at once: on a GPU, as many kernels as of one."""
    keys = _mix((_key(seed) ^ torch.arange(streams.start, streams.stop, device=positions.device)) + _GOLDEN)
    state = _mix((positions ^ keys[:, None]) + _GOLDEN)
    draws = torch.arange(1, count + 1, device=positions.device) * _GOLDEN
    return _shift(_mix(state[..., None] + draws), 40).to(torch.float32) * 2.0**-24


def permutation(seed: int, epoch: int, n: int) -> Int64[Tensor, "n"]:
    """The order of n samples in an epoch, a function of (seed, epoch): the argsort of one 63-bit hash a sample."""
    return _shift(_mix((torch.arange(n) ^ _key(seed, ORDER_STREAM, epoch)) + _GOLDEN), 1).argsort(stable=True)

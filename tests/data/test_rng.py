"""Counter-based random numbers against a plain Python splitmix64, and their statistics."""

import pytest
import torch
from scipy import stats

from ssl_vit.data.rng import permutation, uniform

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def chain(*words):
    state = 0
    for word in words:
        state = splitmix64(((state ^ (word & MASK)) + GOLDEN) & MASK)
    return state


def test_uniform_is_splitmix64_of_seed_stream_position_and_draw():
    positions = [0, 1, 7, 2**40 + 3]
    got = uniform(3, torch.tensor(positions), -2, 5)
    expected = [[(splitmix64((chain(3, -2, p) + d * GOLDEN) & MASK) >> 40) / 2**24 for d in range(1, 6)] for p in positions]
    assert got.dtype == torch.float32
    assert got.tolist() == expected


def test_numbers_are_pinned():
    """Another value here means that no run of an earlier version can be repeated or resumed."""
    assert (uniform(0, torch.tensor([0, 1]), 0, 2) * 2**24).tolist() == [[2175092, 837519], [14282487, 3132382]]
    assert permutation(0, 0, 8).tolist() == [0, 2, 1, 4, 6, 3, 7, 5]


def test_permutation_sorts_by_hash():
    assert permutation(5, 2, 100).tolist() == sorted(range(100), key=lambda i: chain(5, -1, 2, i) >> 1)


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (1, 1000), (2**31, -2)])
def test_uniform_is_uniform_in_half_open_unit_interval(seed, stream):
    u = uniform(seed, torch.arange(20000), stream, 4)
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u[:, 0].numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(u[0:5000].flatten().numpy(), "uniform").pvalue > 1e-3


def test_neighbours_are_independent():
    n = 50000
    u = uniform(0, torch.arange(n + 1), 0, 2)
    base = u[:-1, 0]
    others = {
        "position": u[1:, 0],
        "draw": u[:-1, 1],
        "stream": uniform(0, torch.arange(n), 1, 1)[:, 0],
        "seed": uniform(1, torch.arange(n), 0, 1)[:, 0],
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1]
        assert abs(correlation) < 4 / n**0.5, name
        # dependence that a correlation would not see: the joint distribution on a grid
        grid = torch.histogramdd(torch.stack([base, other], 1), [8, 8]).hist
        assert stats.chi2_contingency(grid.numpy()).pvalue > 1e-3, name


def test_rows_do_not_depend_on_the_batch():
    positions = torch.tensor([5, 900, 3, 17])
    batch = uniform(7, positions, 2, 6)
    assert all(torch.equal(uniform(7, positions[i : i + 1], 2, 6)[0], batch[i]) for i in range(4))
    assert torch.equal(uniform(7, positions, 2, 3), batch[:, :3])


def test_permutation_is_one_and_changes_with_epoch_and_seed():
    order = permutation(0, 0, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    for other in (permutation(0, 1, 1000), permutation(1, 0, 1000)):
        assert abs(stats.spearmanr(order.numpy(), other.numpy()).statistic) < 0.13
    assert abs(stats.spearmanr(order.numpy(), range(1000)).statistic) < 0.13


def test_permutation_puts_a_sample_anywhere():
    places = [permutation(0, epoch, 50).tolist().index(0) for epoch in range(2000)]
    assert stats.chisquare(torch.bincount(torch.tensor(places), minlength=50).numpy()).pvalue > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same_bits():
    positions = torch.arange(1000)
    assert torch.equal(uniform(3, positions.cuda(), 5, 40).cpu(), uniform(3, positions, 5, 40))

"""The search for neighbours against scikit-learn's, at the borders of its chunks and groups, with equal rows, and within its memory."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from ssl_vit_eval.probes.neighbours import Vectors, neighbours

CPU = torch.device("cpu")


def search(bank: torch.Tensor, queries: torch.Tensor, k: int, chunk: int = 2**24) -> tuple[torch.Tensor, torch.Tensor]:
    parts = neighbours(Vectors(bank, torch.arange(len(bank))), Vectors(queries, torch.arange(len(queries))), k, CPU, chunk)
    similarity, place = zip(*parts, strict=True)
    return torch.cat(similarity), torch.cat(place)


# chunks of 256 queries x 128 or 16 rows of the bank, the last also below k; and of one similarity
@pytest.mark.parametrize(("chunk", "n", "m"), [(2**24, 1025, 3), (2**15, 513, 257), (2**15, 512, 256), (2**12, 127, 600), (1, 40, 2)])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_neighbours_are_those_of_scikit_learn(chunk: int, n: int, m: int, k: int) -> None:
    bank, queries = torch.randn(n, 16, dtype=torch.float64), torch.randn(m, 16, dtype=torch.float64)
    reference = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(bank.numpy())
    distance, expected = reference.kneighbors(queries.numpy())
    similarity, place = search(bank, queries, k, chunk)
    assert place.tolist() == expected.tolist()
    np.testing.assert_allclose(similarity.numpy(), 1 - distance, atol=1e-12)
    single, _ = search(bank.float(), queries.float(), k, chunk)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), 1 - distance, atol=1e-6)


def test_one_bar_goes_over_all_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def progress(parts: list[tuple[int, int]], title: str) -> list[tuple[int, int]]:
        steps.append(len(parts))
        return parts

    monkeypatch.setattr("ssl_vit_eval.probes.neighbours.progress", progress)
    search(torch.randn(512, 16), torch.randn(5000, 16), 5, 2**15)
    assert steps == [3 * 4]  # panels of 2,048 queries, parts of 128 rows


@pytest.mark.parametrize("chunk", [2**24, 2**15, 2**12])
def test_of_equal_rows_the_earlier_are_nearer(chunk: int) -> None:
    bank = torch.eye(4).repeat(256, 1)
    bank[513] = 0.0
    for k in (1, 3, 20):
        similarity, place = search(bank, torch.eye(4), k, chunk)
        assert (similarity == 1).all()
        equal = [[row for row in range(1024) if row % 4 == query and row != 513] for query in range(4)]
        assert place.tolist() == [rows[:k] for rows in equal]
    everywhere = search(torch.ones(1000, 4), torch.ones(3, 4), 20, chunk)[1]
    assert everywhere.tolist() == [list(range(20))] * 3


@pytest.mark.parametrize(("n", "m", "d", "chunk"), [(3000, 700, 16, 2**13), (1100, 600, 1024, 2**18)])
def test_memory_is_bounded_by_the_chunk(n: int, m: int, d: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held, read = [], []
    product, part = torch.mm, Vectors.read
    monkeypatch.setattr(torch, "mm", lambda a, b, out: held.append(out.numel()) or product(a, b, out=out))
    monkeypatch.setattr(Vectors, "read", lambda self, *args: read.append(part(self, *args)) or read[-1])
    search(torch.randn(n, d), torch.randn(m, d), 20, chunk)
    assert sum(held) == n * m
    assert max(held) <= chunk
    assert max(rows.numel() for rows in read) <= 2 * chunk

"""The most similar rows of a bank: exact, in bounded memory, at about the speed of the matrix product."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ssl_vit_eval.probes.base import progress

CHUNK = 2**24  # similarities held at once: 64 MB
QUERIES = 256  # multiplied at once: with fewer the product is slower
_GROUP = 8  # bank rows that are first looked at through their maximum


class Vectors(NamedTuple):
    """Rows of a matrix X [n d], perhaps mapped from disk, that are read part by part as unit vectors.

    rows: which ones, in this order. moments: mean and scale [d] by which they are standardised before.
    """

    X: Tensor
    rows: Tensor
    moments: tuple[Tensor, Tensor] | None = None

    def read(self, start: int, stop: int, on: torch.device, dtype: torch.dtype) -> Float[Tensor, "part d"]:
        x = self.X[self.rows[start:stop].to(self.X.device)].detach().to(on, dtype)  # a copy, so that what follows may be in place
        if self.moments is not None:
            mean, scale = self.moments
            x = x.sub_(mean.to(on)).div_(scale.to(on))
        return F.normalize(x, dim=1, out=x)


def neighbours(
    bank: Vectors, queries: Vectors, k: int, on: torch.device, chunk: int = CHUNK
) -> Iterator[tuple[Float[Tensor, "part k"], Int64[Tensor, "part k"]]]:
    """The k most similar rows of the bank for each query: cosines and places in `bank.rows`, part after part of the queries.

    Most similar first, of equal ones the earlier place. k is at most the bank's rows. float64 for a bank in float64, else float32. What
    is held on the device `on` is of the order of `chunk` numbers: that many similarities, a part of the bank, a part of the queries.
    """
    dtype = torch.float64 if bank.X.dtype == torch.float64 else torch.float32
    n, d = len(bank.rows), bank.X.shape[1]
    height = min(QUERIES, chunk)
    width = max(1, min(n, chunk // height, 2 * chunk // d))
    panel = max(1, chunk // d // height) * height  # queries that meet a part of the bank before the next part is read
    buffer = torch.empty((k + width) * height, dtype=dtype, device=on)
    parts = [(top, start) for top in range(0, len(queries.rows), panel) for start in range(0, n, width)]
    for top, start in progress(parts, "nearest neighbours, parts of queries and bank"):
        if start == 0:
            Q = queries.read(top, top + panel, on, dtype)
            similarity = torch.empty(k, len(Q), dtype=dtype, device=on)
            place = torch.empty(k, len(Q), dtype=torch.int64, device=on)
        B = bank.read(start, start + width, on, dtype)
        known = min(k, start)  # neighbours that the parts before have given: they stand above this part's rows, and compete
        best = min(k, start + len(B))
        for first in range(0, len(Q), height):
            q = slice(first, min(first + height, len(Q)))
            block = buffer[: (known + len(B)) * (q.stop - first)].view(known + len(B), -1)
            block[:known] = similarity[:known, q]
            torch.mm(B, Q[q].T, out=block[known:])
            similarity[:best, q], rows = _largest(block, best)
            new = rows + (start - known)
            place[:best, q] = torch.where(rows < known, place[:, q].gather(0, rows.clamp(max=k - 1)), new) if known else new
        if start + width >= n:
            yield similarity.T, place.T


def _largest(x: Float[Tensor, "n m"], k: int) -> tuple[Float[Tensor, "k m"], Int64[Tensor, "k m"]]:
    """The k largest of each column and their rows, in descending order, of equal ones the lower row first.

    They lie in the k groups of neighbouring rows that have the largest maxima: any other group has k better rows elsewhere, one in each
    of these. So most rows are only looked at by a vectorised maximum, and those are ranked in the same way.
    """
    n = len(x)
    if n <= 2 * _GROUP * k:
        return _ranked(x, k)
    whole = n // _GROUP * _GROUP
    groups = _largest(x[:whole].view(-1, _GROUP, x.shape[1]).amax(dim=1), k)[1].sort(dim=0).values
    rows = (groups[:, None] * _GROUP + torch.arange(_GROUP, device=x.device)[:, None]).flatten(0, 1)
    rest = torch.arange(whole, n, device=x.device)[:, None].expand(-1, x.shape[1])
    rows = torch.cat([rows, rest])
    values, order = _ranked(x.gather(0, rows), k)
    return values, rows.gather(0, order)


def _ranked(x: Float[Tensor, "n m"], k: int) -> tuple[Float[Tensor, "k m"], Int64[Tensor, "k m"]]:
    values, rows = x.topk(min(k + 1, len(x)), dim=0)
    tied = (values[1:] == values[:-1]).any(dim=0)
    if tied.any():  # topk takes any of equal values; a stable sort does not, but is slower
        ordered = x[:, tied].sort(dim=0, descending=True, stable=True)
        values[:, tied], rows[:, tied] = ordered.values[: len(values)], ordered.indices[: len(values)]
    return values[:k], rows[:k]

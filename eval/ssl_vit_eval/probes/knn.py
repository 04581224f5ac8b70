"""k-nearest neighbours by DINO's rule: the k most similar training images vote with weight exp(cosine similarity / temperature)."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float, Float64, Int64
from pydantic import Field
from torch import Tensor

from ssl_vit.errors import require
from ssl_vit_eval.distributed import agreed, device, merge_parts, parts
from ssl_vit_eval.probes.base import Probe, check_readouts, check_training, moments
from ssl_vit_eval.probes.neighbours import CHUNK, QUERIES, Vectors, neighbours
from ssl_vit_eval.probes.selection import SLICE, Answers, Axes, Found, Labels, Parameters, Slice, Test, Train, Truth, points, select
from ssl_vit_eval.schema import Count, Positives

Counts = Annotated[list[Count], Field(min_length=1, description="a list of whole numbers above 0")]
PARAMETERS: dict[str, Any] = {"k": Counts, "temperature": Positives, "standardise": bool, **SLICE}


class KNNProbe(Probe):
    """Weighted k-NN on L2-normalised features, as DINO evaluates (Caron et al. 2021, section 3.2; Wu et al. 2018, section 3.4).

    Scikit-learn manners: `fit(X, y)`, `predict`, `predict_proba`, `score`. All training rows are in the bank; it refers to `X` and holds
    no copy. Of equally similar training rows the earlier one is nearer, of equal votes the lower class wins.

    Args:
        k: neighbours that vote. A bank of fewer rows votes as a whole: `k_` is the number that did.
        temperature: of the weights exp(similarity / temperature).
        chunk: similarities held at once, which bounds the memory: the parts of the bank and of the queries are of that order too.
    """

    k_: int

    def __init__(self, k: int = 20, temperature: float = 0.07, chunk: int = CHUNK) -> None:
        self.k = k
        self.temperature = temperature
        self.chunk = chunk

    def fit(self, X: Float[Tensor, "n d"], y: Int64[Tensor, " n"]) -> "KNNProbe":
        """Keep features [n d] and class indices [n] as the bank; UsageError for non-finite features, an empty set or a single class."""
        require(type(self.k) is int and self.k >= 1, "k", self.k, "a whole number, at least 1")
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "above 0")
        check_training(X, y)
        self.classes_, self._targets = torch.unique(y.to(X.device), return_inverse=True)
        self._bank = Vectors(X, torch.arange(len(X)))
        self.n_features_in_ = X.shape[1]
        self.k_ = min(self.k, len(X))
        return self

    def predict_proba(self, X: Float[Tensor, "m d"]) -> Float64[Tensor, "m c"]:
        """Each class's share of the votes, columns in the order of `classes_`; UsageError where `X` does not fit the bank."""
        self.check_query(X)
        shares = []
        for similarity, rows in neighbours(self._bank, Vectors(X, torch.arange(len(X))), self.k_, self._targets.device, self.chunk):
            votes = next(_votes(similarity, self._targets[rows], len(self.classes_), [self.k_], self.temperature))
            shares.append(votes / votes.sum(dim=1, keepdim=True))
        return torch.cat(shares)


def run(parameters: Parameters, train: Train, y_train: Labels, test: Test, y_test: Truth, held_out: Slice) -> dict[str, Found]:
    """The protocol kind `knn`: k and temperature by the slice of train that `held_out` marks, then test with all of train as the bank.

    A k above the bank's rows is cut to them. Of equally good points the first is chosen, temperatures before k, both in the order of
    their lists. A grid of one point leaves the slice alone. Several processes share the queries, so that all of them must call this.
    UsageError for features, by readout, split and row.
    """
    ks = list(dict.fromkeys(min(k, len(y_train)) for k in parameters["k"]))
    axes = {"temperature": [float(t) for t in parameters["temperature"]], "k": ks}
    check_readouts(train, y_train, test)
    y, splits = y_train.cpu(), {"train": train, "test": test}

    def fit(rows: Int64[Tensor, " bank"], split: str, asked: Int64[Tensor, " queries"]) -> dict[str, Answers]:
        alive, found = torch.ones(len(points(axes)), dtype=torch.bool), {}
        for spec, X in train.items():
            with agreed():  # memory may run out on one process alone
                scaling = moments(X, rows) if parameters["standardise"] else None
                own = torch.cat([asked[:0], *(asked[slice(*part)] for part in parts(len(asked), QUERIES))])
                given = _answers(Vectors(X, rows, scaling), y[rows], Vectors(splits[split][spec], own, scaling), axes)
            given = merge_parts(given, len(asked), QUERIES)
            found[spec] = Answers(given.T[:, :, None], alive, bank=len(rows))
        return found

    return select(axes, fit, y_train, y_test, [held_out], ends={"k": len(y_train)})


def _votes(
    similarity: Float[Tensor, "m k"], labels: Int64[Tensor, "m k"], classes: int, ks: Sequence[int], temperature: float
) -> Iterator[Float64[Tensor, "m c"]]:
    """What the first k neighbours give each class, for every k of `ks` in ascending order. The tensor is the same one each time."""
    # relative to the nearest neighbour, so that a low temperature cannot overflow; the shares stay the same
    weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
    votes = weights.new_zeros(len(weights), classes)
    # one rank after the other: a single scatter would add in no fixed order on a GPU, and break ties by chance
    for rank, (weight, label) in enumerate(zip(weights.T.contiguous(), labels.T.contiguous(), strict=True), start=1):
        votes.scatter_add_(1, label[:, None], weight[:, None])
        if rank in ks:
            yield votes


def _answers(bank: Vectors, y: Int64[Tensor, " bank"], queries: Vectors, axes: Axes) -> Int64[Tensor, "queries points"]:
    """The classes that the bank, whose rows are of the classes y, gives to the queries at every point of the grid, by one search."""
    on = device()
    classes, targets = torch.unique(y, return_inverse=True)
    targets = targets.to(on)
    used = [min(int(k), len(y)) for k in axes["k"]]
    ascending = sorted(set(used))
    answers = [torch.empty(0, len(points(axes)), dtype=torch.int64)]
    for similarity, place in neighbours(bank, queries, ascending[-1], on):
        some = max(1, CHUNK // len(classes))  # votes held at once
        for near, labels in zip(torch.split(similarity, some), torch.split(targets[place], some), strict=True):
            columns = []
            for temperature in axes["temperature"]:
                votes = _votes(near, labels, len(classes), ascending, temperature)
                winners = {k: sums.argmax(dim=1).cpu() for k, sums in zip(ascending, votes, strict=True)}
                columns += [classes[winners[k]] for k in used]
            answers.append(torch.stack(columns, dim=1))
    return torch.cat(answers)

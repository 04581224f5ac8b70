"""k-nearest-neighbour probe by DINO's rule: the k most similar training images vote with weight exp(cosine similarity / temperature)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.errors import UsageError
from ssl_vit_eval.probe import Probe, check_training


class KNNProbe(Probe):
    """Weighted k-NN on L2-normalised features, as DINO evaluates (Caron et al. 2021, section 3.2; Wu et al. 2018, section 3.4).

    Scikit-learn manners: `fit(X, y)`, `predict`, `predict_proba`, `score`. All training rows are in the bank.

    Args:
        k: neighbours that vote. A bank of fewer rows votes as a whole: `k_` is the number that did.
        temperature: of the weights exp(similarity / temperature).
        chunk: similarities held at once, which bounds the memory: queries are taken `chunk / bank rows` at a time.
    """

    k_: int

    def __init__(self, k: int = 20, temperature: float = 0.07, chunk: int = 2**25) -> None:
        self.k = k
        self.temperature = temperature
        self.chunk = chunk

    def fit(self, X: Float[Tensor, "n d"], y: Int64[Tensor, " n"]) -> "KNNProbe":
        """Keep features [n d] and class indices [n] as the bank; UsageError for non-finite features, an empty set or a single class."""
        if self.k < 1 or self.temperature <= 0:
            raise UsageError(f"k-NN got k {self.k} and temperature {self.temperature}: k must be at least 1, the temperature above 0")
        check_training(X, y)
        self.classes_, self._targets = torch.unique(y.to(X.device), return_inverse=True)
        self._bank = _unit(X)
        self.n_features_in_ = X.shape[1]
        self.k_ = min(self.k, len(X))
        return self

    def predict_proba(self, X: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
        """Each class's share of the votes, float64, columns in the order of `classes_`; UsageError where `X` does not fit the bank."""
        self.check_query(X)
        queries = torch.split(_unit(X).to(self._bank), max(1, self.chunk // len(self._bank)))
        return torch.cat([self._votes(part) for part in queries])

    def _votes(self, queries: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
        similarity, neighbours = (queries @ self._bank.T).topk(self.k_, dim=1)
        # relative to the nearest neighbour, so that a low temperature cannot overflow; the shares stay the same
        weights = ((similarity - similarity[:, :1]).double() / self.temperature).exp()
        labels = self._targets[neighbours]
        votes = weights.new_zeros(len(queries), len(self.classes_))
        # one rank after the other: a single scatter would add in no fixed order on a GPU, and break ties by chance
        for weight, label in zip(weights.T, labels.T, strict=True):
            votes.scatter_add_(1, label[:, None], weight[:, None])
        return votes / votes.sum(dim=1, keepdim=True)


def _unit(X: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return F.normalize(X if X.dtype == torch.float64 else X.float(), dim=1)

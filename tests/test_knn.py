"""The k-NN probe against a loop written from the rule, scikit-learn, and inputs that break naive versions."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from ssl_vit.errors import UsageError
from ssl_vit_eval import KNNProbe
from ssl_vit_eval.probe import check_features, check_training


def clusters(n: int, d: int = 16, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes, so that votes are split."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (n,), generator=generator)
    return centres[y] + 2 * torch.randn(n, d, generator=generator), y


def loop(X: torch.Tensor, y: torch.Tensor, queries: torch.Tensor, k: int, temperature: float) -> list[int]:
    """The rule, one query and one neighbour at a time."""
    answers = []
    for q in queries.tolist():
        similar = []
        for x, label in zip(X.tolist(), y.tolist(), strict=True):
            similar.append((sum(a * b for a, b in zip(q, x, strict=True)) / math.hypot(*q) / math.hypot(*x), label))
        votes: dict[int, float] = {}
        for similarity, label in sorted(similar, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
        answers.append(max(votes, key=lambda label: votes[label]))
    return answers


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0)])
def test_equals_a_loop_written_from_the_rule(k: int, temperature: float) -> None:
    X, y = clusters(150)
    queries, _ = clusters(40, seed=1)
    assert KNNProbe(k, temperature).fit(X, y).predict(queries).tolist() == loop(X, y, queries, k, temperature)


def test_equals_scikit_learn_with_the_same_weights() -> None:
    X, y = clusters(600)
    queries, answers = clusters(200, seed=1)
    reference = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07), algorithm="brute")
    reference.fit(X.double().numpy(), y.numpy())
    probe = KNNProbe(k=20, temperature=0.07).fit(X, y)
    np.testing.assert_allclose(probe.predict_proba(queries).numpy(), reference.predict_proba(queries.double().numpy()), atol=1e-4)
    assert probe.predict(queries).tolist() == reference.predict(queries.double().numpy()).tolist()
    assert probe.score(queries, answers) == pytest.approx(reference.score(queries.double().numpy(), answers.numpy()))


def test_the_chunk_changes_memory_and_not_the_answers() -> None:
    X, y = clusters(300)
    queries, _ = clusters(101, seed=1)
    whole = KNNProbe(20).fit(X, y).predict(queries)
    for chunk in (1, 300 * 7, 300 * 101):
        assert KNNProbe(20, chunk=chunk).fit(X, y).predict(queries).tolist() == whole.tolist()


def test_similarities_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    votes = KNNProbe._votes
    monkeypatch.setattr(KNNProbe, "_votes", lambda self, queries: held.append(len(queries) * 300) or votes(self, queries))
    X, y = clusters(300)
    KNNProbe(20, chunk=1000).fit(X, y).predict(X)
    assert sum(held) == 300 * 300
    assert max(held) <= 1000


def test_a_bank_smaller_than_k_votes_as_a_whole_and_says_so() -> None:
    X, y = clusters(7)
    probe = KNNProbe(k=20).fit(X, y)
    assert probe.k_ == 7
    assert probe.predict(X[:1]).tolist() == loop(X, y, X[:1], 7, 0.07)
    assert KNNProbe(k=5).fit(X, y).k_ == 5


def test_a_low_temperature_does_not_overflow() -> None:
    X, y = clusters(100)
    shares = KNNProbe(k=10, temperature=1e-4).fit(X, y).predict_proba(X)
    assert torch.isfinite(shares).all()
    assert shares.argmax(dim=1).tolist() == y.tolist()  # each training image is its own nearest neighbour


def test_equal_votes_go_to_the_lower_class() -> None:
    X = torch.eye(4).repeat(2, 1)
    y = torch.tensor([9, 9, 9, 9, 3, 3, 3, 3])
    assert KNNProbe(k=2).fit(X, y).predict(torch.eye(4)).tolist() == [3, 3, 3, 3]


def test_labels_need_not_be_consecutive() -> None:
    X, y = clusters(100)
    queries, _ = clusters(30, seed=1)
    names = torch.tensor([4, 10, 11, 70, 900])
    probe = KNNProbe().fit(X, names[y])
    assert probe.classes_.tolist() == names.tolist()
    assert probe.predict(queries).tolist() == names[KNNProbe().fit(X, y).predict(queries)].tolist()


def test_half_precision_features_are_compared_in_single() -> None:
    X, y = clusters(100)
    half = X.half()
    assert KNNProbe().fit(half, y).predict(half).tolist() == KNNProbe().fit(half.float(), y).predict(half.float()).tolist()


def test_bad_input_is_named() -> None:
    X, y = clusters(10)
    spoilt = X.clone()
    spoilt[3, 5] = float("nan")
    spoilt[8, 0] = float("inf")
    with pytest.raises(UsageError, match=r"row 3 are not finite \(2 of 10 rows\)"):
        KNNProbe().fit(spoilt, y)
    with pytest.raises(UsageError, match="row 3 are not finite"):
        KNNProbe().fit(X, y).predict(spoilt)
    with pytest.raises(UsageError, match="all 10 training labels are 0"):
        KNNProbe().fit(X, torch.zeros_like(y))
    with pytest.raises(UsageError, match=r"shape \[0, 16\]"):
        KNNProbe().fit(X[:0], y[:0])
    with pytest.raises(UsageError, match="8 wide, the probe was fitted on 16"):
        KNNProbe().fit(X, y).predict(X[:, :8])
    with pytest.raises(UsageError, match="not fitted"):
        KNNProbe().predict(X)
    with pytest.raises(UsageError, match="k must be at least 1"):
        KNNProbe(k=0).fit(X, y)


def test_wrong_types_are_named() -> None:
    X, y = clusters(10)
    with pytest.raises(UsageError, match=r"torch.int64: a probe needs floating-point features"):
        check_features(y[:, None])
    with pytest.raises(UsageError, match=r"labels are torch.float32"):
        check_training(X, y.float())
    with pytest.raises(UsageError, match=r"10 feature rows came with labels of shape \[9\]"):
        check_training(X, y[:9])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_answers() -> None:
    X, y = clusters(2000)
    queries, answers = clusters(500, seed=1)
    host = KNNProbe().fit(X, y)
    device = KNNProbe().fit(X.cuda(), y.cuda())
    torch.testing.assert_close(device.predict_proba(queries.cuda()).cpu(), host.predict_proba(queries), atol=1e-4, rtol=0)
    assert device.score(queries, answers) == pytest.approx(host.score(queries, answers), abs=0.005)

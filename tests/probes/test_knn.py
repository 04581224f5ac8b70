"""k-NN against a loop written from the rule, scikit-learn, and inputs that break naive versions."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ssl_vit.assets import list_assets
from ssl_vit.errors import UsageError
from ssl_vit_eval import KNNProbe, LinearProbe
from ssl_vit_eval.probes.base import check_features, check_training
from ssl_vit_eval.probes.knn import PARAMETERS, run
from ssl_vit_eval.probes.selection import stratified_slice
from ssl_vit_eval.protocols import load_protocol
from tests.conftest import unchecked

RULE = {"k": [1, 3, 20, 60], "temperature": [0.07, 0.02, 1.0], "standardise": False, "slice_fraction": 0.2, "slice_seed": 0}


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
    for chunk in (300, 300 * 7, 300 * 101):
        assert KNNProbe(20, chunk=chunk).fit(X, y).predict(queries).tolist() == whole.tolist()


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
    for k in (0, True):
        with pytest.raises(UsageError, match=f"k is {k}; it must be a whole number, at least 1"):
            KNNProbe(k=k).fit(X, y)


@pytest.mark.parametrize("probe", [KNNProbe(), LinearProbe()])
def test_what_is_no_tensor_of_its_shape_is_named(probe: KNNProbe | LinearProbe) -> None:
    """As a user meets it, without the checks of the tests."""
    X, y = clusters(10)
    with unchecked():
        probe.fit(X, y)
        for call, says in {
            lambda: probe.fit(X.numpy(), y): r"X is ndarray; it must be a tensor \[n d\] of features; torch.as_tensor makes",
            lambda: probe.fit(X.tolist(), y): r"X is list; it must be a tensor \[n d\]",
            lambda: probe.predict(X.numpy()): r"X is ndarray; it must be a tensor \[n d\]",
            lambda: probe.fit(X, y.numpy()): r"y is ndarray; it must be a tensor \[n\] of class indices; torch.as_tensor makes",
            lambda: probe.score(X, y.numpy()): r"y is .*; it must be a tensor \[10\] of class indices, one for each row of X",
            lambda: probe.score(X, y[:, None]): r"y is .*; it must be a tensor \[10\] of class indices, one for each row of X",
            lambda: probe.fit(X[0], y): r"features have shape \[16\]: a probe needs a non-empty matrix \[n d\]",
            lambda: probe.predict(X[None]): r"features have shape \[1, 10, 16\]: a probe needs a non-empty matrix \[n d\]",
            lambda: probe.fit(X, y[:, None]): r"10 feature rows came with labels of shape \[10, 1\]",
        }.items():
            with pytest.raises(UsageError, match=says):
                call()


def test_wrong_types_are_named() -> None:
    X, y = clusters(10)
    with pytest.raises(UsageError, match=r"torch.int64: a probe needs floating-point features"):
        check_features(y[:, None])
    with pytest.raises(UsageError, match=r"labels are torch.float32"):
        check_training(X, y.float())
    with pytest.raises(UsageError, match=r"10 feature rows came with labels of shape \[9\]"):
        check_training(X, y[:9])


def sklearn_knn(k: int, temperature: float, standardise: bool) -> Pipeline:
    weights = lambda distance: np.exp((1 - distance) / temperature)  # noqa: E731
    knn = KNeighborsClassifier(k, metric="cosine", weights=weights, algorithm="brute")
    return make_pipeline(StandardScaler(), knn) if standardise else make_pipeline(knn)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("standardise", [False, True])
def test_the_protocol_is_the_same_steps_written_with_scikit_learn(standardise: bool, missing: bool) -> None:
    """Also with a class that the slice holds whole, as a slice of groups may: its images are answered wrongly there, and are in the bank
    for test."""
    names = torch.tensor([4, 10, 11, 70, 900])
    (X, y), (queries, answers) = clusters(240), clusters(150, seed=2)
    X, queries = (part.double() * torch.logspace(-1, 1, 16) + torch.arange(16) for part in (X, queries))
    X[:, 3] = queries[:, 3] = 2.5
    held_out = stratified_slice(y, 0.2)
    if missing:
        held_out |= y == 2
    y, answers = names[y], names[answers]
    found = run({**RULE, "standardise": standardise}, {"cls": X}, y, {"cls": queries}, answers, held_out)["cls"]

    grid, predictions = {"slice_accuracy": [], "test_accuracy": []}, []
    settings = list(itertools.product(RULE["temperature"], RULE["k"]))
    for temperature, k in settings:
        probe = sklearn_knn(k, temperature, standardise)
        on_slice = probe.fit(X[~held_out].numpy(), y[~held_out].numpy()).predict(X[held_out].numpy())
        grid["slice_accuracy"].append((on_slice == y[held_out].numpy()).mean())
        predictions.append(probe.fit(X.numpy(), y.numpy()).predict(queries.numpy()))
        grid["test_accuracy"].append((predictions[-1] == answers.numpy()).mean())
    chosen = grid["slice_accuracy"].index(max(grid["slice_accuracy"]))
    assert max(grid["test_accuracy"]) > grid["test_accuracy"][chosen]  # or a choice on test would pass

    assert found.grid is not None
    for name, values in grid.items():
        assert found.grid[name] == pytest.approx(values)
    assert (found.grid["temperature"], found.grid["k"]) == (RULE["temperature"], RULE["k"])
    assert found.predictions.tolist() == predictions[chosen].tolist()
    assert found.selected == {"temperature": settings[chosen][0], "k": settings[chosen][1]}
    assert found.oracle == pytest.approx(max(grid["test_accuracy"]))
    assert found.edge_of_grid == (settings[chosen][0] != 0.07 or settings[chosen][1] == 60)
    assert found.bank == 240


def test_equally_good_points_go_to_the_first() -> None:
    X, y = torch.eye(4).repeat(20, 1), torch.arange(4).repeat(20)
    found = run({**RULE, "k": [3, 1]}, {"cls": X}, y, {"cls": X}, y, stratified_slice(y))["cls"]
    assert found.selected == {"temperature": 0.07, "k": 3}
    assert found.oracle == 1.0


def test_a_single_point_leaves_the_slice_alone() -> None:
    (X, y), (queries, answers) = clusters(90), clusters(1, seed=1)
    rule = {**RULE, "k": [20], "temperature": [0.07]}
    found = run(rule, {"cls": X, "gap": -X}, y, {"cls": queries, "gap": queries}, answers, torch.zeros(90, dtype=torch.bool))
    assert (found["cls"].grid, found["cls"].edge_of_grid, found["cls"].oracle) == (None, None, None)
    assert found["cls"].selected == {"temperature": 0.07, "k": 20}
    assert found["cls"].predictions.tolist() == KNNProbe(20).fit(X, y).predict(queries).tolist()
    assert found["gap"].predictions.tolist() == KNNProbe(20).fit(-X, y).predict(queries).tolist()


def test_a_set_smaller_than_k() -> None:
    (X, y), (queries, answers) = clusters(30), clusters(7, seed=1)
    found = run({**RULE, "k": [29, 30, 100, 200]}, {"cls": X}, y, {"cls": queries}, answers, stratified_slice(y))["cls"]
    assert found.grid is not None
    assert found.grid["k"] == [29, 30]  # and the slice was answered by fewer
    assert len(found.grid["test_accuracy"]) == 6
    assert (
        run({**RULE, "k": [50, 60], "temperature": [0.1]}, {"cls": X}, y, {"cls": queries}, answers, ~y.bool())["cls"].selected["k"] == 30
    )


def test_features_mapped_from_disk_stay_as_they_are(tmp_path: Path) -> None:
    (X, y), (queries, answers) = clusters(200), clusters(50, seed=1)
    np.concatenate([X.numpy(), queries.numpy()]).tofile(tmp_path / "features")
    mapped = torch.from_numpy(np.memmap(tmp_path / "features", np.float32, "c", shape=(250, 16)))
    rule, held_out = {**RULE, "standardise": True}, stratified_slice(y)
    found = run(rule, {"cls": mapped[:200]}, y, {"cls": mapped[200:]}, answers, held_out)["cls"]
    expected = run(rule, {"cls": X}, y, {"cls": queries}, answers, held_out)["cls"]
    assert torch.equal(mapped, torch.cat([X, queries]))
    assert (found.grid, found.predictions.tolist()) == (expected.grid, expected.predictions.tolist())


def test_what_the_protocol_refuses() -> None:
    X, y = clusters(60)
    spoilt = X.clone()
    spoilt[3, 5] = float("nan")

    def refused(match: str, train: torch.Tensor = X, y: torch.Tensor = y, test: torch.Tensor = X, held_out: Any = None) -> None:
        held_out = stratified_slice(y) if held_out is None else held_out
        with pytest.raises(UsageError, match=match):
            run(RULE, {"gap": X, "cls": train}, y, {"gap": X, "cls": test}, y, held_out)

    refused("readout 'cls': in train, features of row 3 are not finite", train=spoilt)
    refused("readout 'cls': in test, features of row 3 are not finite", test=spoilt)
    refused("all 60 training labels are 2", y=torch.full((60,), 2))
    refused("holds 0 of 60", held_out=torch.zeros(60, dtype=torch.bool))
    refused("holds 60 of 60", held_out=torch.ones(60, dtype=torch.bool))


def test_the_protocols_that_come_with_it() -> None:
    (X, y), (queries, answers) = clusters(400), clusters(30, seed=1)
    names = [name for name in list_assets("protocols") if name.startswith("knn")]
    assert names == ["knn", "knn-dino", "knn-dinov2", "knn-standardised"]
    for name in names:
        protocol = load_protocol(name)
        assert protocol.parameters.keys() == PARAMETERS.keys()
        assert bool(protocol.deviations) == ("dino" in name)
        assert {10, 20, 100, 200} <= set(protocol.parameters["k"])
        found = run(protocol.parameters, {"cls": X}, y, {"cls": queries}, answers, protocol.held_out(y, None))["cls"]
        assert found.grid is not None
        assert len(found.grid["test_accuracy"]) == len(protocol.parameters["k"]) * len(protocol.parameters["temperature"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_answers() -> None:
    X, y = clusters(2000)
    queries, answers = clusters(500, seed=1)
    host = KNNProbe().fit(X, y)
    device = KNNProbe().fit(X.cuda(), y.cuda())
    torch.testing.assert_close(device.predict_proba(queries.cuda()).cpu(), host.predict_proba(queries), atol=1e-4, rtol=0)
    assert device.score(queries, answers) == pytest.approx(host.score(queries, answers), abs=0.005)
    rule, held_out = {**RULE, "standardise": True}, stratified_slice(y)
    found = run(rule, {"cls": X.cuda()}, y, {"cls": queries.cuda()}, answers, held_out)["cls"]
    assert found.oracle == pytest.approx(run(rule, {"cls": X}, y, {"cls": queries}, answers, held_out)["cls"].oracle, abs=0.005)

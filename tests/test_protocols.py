"""Protocol files, what they refuse, and a run of each kind against the probes and scikit-learn."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from ssl_vit.assets import find_asset, list_assets
from ssl_vit.errors import UsageError
from ssl_vit_eval.metrics import accuracies
from ssl_vit_eval.probes.logreg import select_and_fit
from ssl_vit_eval.probes.selection import Found, choose, points, stratified_slice
from ssl_vit_eval.protocols import KINDS, PRESET, Protocol, load_protocol, load_protocols

KNN = """\
version: 2
kind: knn
parameters:
  k: [5]
  temperature: [0.07]
  standardise: false
  slice_fraction: 0.07
  slice_seed: 0
"""


def features(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), n, replacement=True, generator=generator)
    return 1.2 * torch.eye(3, 8)[y] + torch.randn(n, 8, generator=generator), y


TRAIN, TEST = features(300, 0), features(200, 1)


def run(protocol: Protocol, given: torch.Tensor | None = None) -> Found:
    held_out = protocol.held_out(TRAIN[1], given)
    return KINDS[protocol.kind].run(protocol.parameters, {"cls": TRAIN[0]}, TRAIN[1], {"cls": TEST[0]}, TEST[1], held_out)["cls"]


def test_every_shipped_protocol_says_what_it_is() -> None:
    paths = list_assets("protocols")
    assert {"knn", "logreg", "linear", "attentive", "mlp", "lowshot", "finetune", "dino", "mae", "dinov2"} <= set(paths)
    for name in paths:
        protocol = load_protocol(name)
        assert protocol.name == name
        if protocol.kind == PRESET:
            assert [member.name for member in load_protocols([name])] == protocol.parameters["protocols"]
            continue
        assert protocol.parameters.keys() == KINDS[protocol.kind].parameters.keys()
        assert bool(protocol.deviations) == any(paper in name for paper in ("-dino", "-mae"))  # ours deviate from nothing


@pytest.mark.parametrize("name", ["knn", "knn-standardised", "knn-dino", "logreg", "linear-dino", "linear-mae", "lowshot-5"])
def test_protocols_on_features_learn_an_easy_task(name: str) -> None:
    protocol = load_protocol(name)
    found = run(protocol)
    predictions = found.predictions.reshape(len(TEST[1]), -1)
    assert (predictions == TEST[1][:, None]).double().mean() > (0.5 if name == "lowshot-5" else 0.6)
    assert (found.bank is not None) == (protocol.kind == "knn")
    assert (found.parameters is None) == (protocol.kind == "knn")


def test_a_file_from_before_there_were_probe_seeds_has_one_and_keeps_its_hash(tmp_path: Path) -> None:
    text = find_asset("protocols", "linear").read_text().replace("  probe_seeds: 3\n", "")
    (tmp_path / "mine.yaml").write_text(text.replace("iterations: 5000", "iterations: 5"))
    protocol = load_protocol(str(tmp_path / "mine.yaml"))
    assert "probe_seeds" not in protocol.parameters
    assert run(protocol).predictions.shape == (200,)


def test_presets_and_repetitions_are_carried_out_once() -> None:
    assert [protocol.name for protocol in load_protocols(["knn-dino", "dino", "logreg", "logreg"])] == ["knn-dino", "linear-dino", "logreg"]


def test_the_slice_is_the_one_given_else_a_stratified_one() -> None:
    protocol = load_protocol("logreg")
    first = torch.arange(300) < 60
    for given, expected_slice in ((None, stratified_slice(TRAIN[1], 0.1, 0)), (first, first)):
        found = run(protocol, given)
        p = protocol.parameters
        expected = select_and_fit(*TRAIN, *TEST, p["C"], [expected_slice], p["max_iter"], p["tol"])
        assert found.predictions.tolist() == expected.predictions.tolist()
        assert (found.grid, found.selected) == (expected.grid, expected.selected)
    lowshot, groups = load_protocol("lowshot-5"), torch.arange(300) // 2
    assert torch.equal(lowshot.held_out(TRAIN[1], first), torch.arange(300))
    assert lowshot.held_out(TRAIN[1], first, groups) is groups


def test_a_choice_is_the_first_best_and_tells_its_edge() -> None:
    axes = {"lr": [0.1, 1.0, 10.0], "weight_decay": [0.0, 0.1]}
    assert points(axes)[:3] == [{"lr": 0.1, "weight_decay": 0.0}, {"lr": 0.1, "weight_decay": 0.1}, {"lr": 1.0, "weight_decay": 0.0}]
    assert choose(axes, [0.1, 0.2, 0.9, 0.9, 0.3, 0.1]) == ({"lr": 1.0, "weight_decay": 0.0}, 2, False)  # no decay is no edge
    assert choose(axes, [0.1, 0.2, 0.8, 0.9, 0.3, 0.1]).edge  # the largest decay is
    assert choose(axes, [0.9, 0.2, 0.8, 0.9, 0.3, 0.1]).edge  # the smallest rate, too
    assert not choose({"k": [1.0, 10.0, 20.0], "temperature": [0.07]}, [0.9, 0.1, 0.2]).edge
    assert choose({"k": [1.0, 10.0, 20.0], "temperature": [0.07]}, [0.1, 0.1, 0.2]).edge
    assert not choose({"k": [1.0, 10.0, 20.0], "temperature": [0.07]}, [0.1, 0.1, 0.2], ends={"k": 20.0}).edge  # all of the bank


def test_scores_equal_scikit_learns() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3])
    predictions = torch.tensor([0, 0, 0, 1, 1, 2, 3, 7])  # 2 and 7 are only predicted, 4 to 6 not even that
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        macro = balanced_accuracy_score(labels.numpy(), predictions.numpy())
    assert accuracies(predictions, labels) == pytest.approx((accuracy_score(labels.numpy(), predictions.numpy()), macro))
    assert macro != accuracy_score(labels.numpy(), predictions.numpy())


def test_a_file_is_a_protocol_too(tmp_path: Path) -> None:
    path = tmp_path / "knn5.yaml"
    path.write_text(KNN)
    protocol = load_protocol(str(path))
    assert (protocol.name, protocol.version, protocol.kind) == ("knn5", 2, "knn")
    assert protocol.parameters == yaml.safe_load(KNN)["parameters"]
    path.write_text(KNN + "deviations: [one, two]\n")
    assert load_protocol(str(path)).deviations == ("one", "two")


def test_a_file_may_not_pass_for_a_shipped_protocol(tmp_path: Path) -> None:
    path = tmp_path / "knn.yaml"
    path.write_text(KNN)
    with pytest.raises(UsageError, match="differs from version 2 of 'knn': rename it"):
        load_protocol(str(path))
    path.write_text(find_asset("protocols", "knn").read_text())
    assert load_protocol(str(path)) == load_protocol("knn")
    path.write_text(KNN.replace("version: 2", "version: 3"))
    assert load_protocol(str(path)).version == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  temperature", "  temprature", "unknown key 'temprature'; did you mean 'temperature'"),
        ("  k: [5]\n", "", "lacks the key 'k'"),
        ("kind: knn", "kind: knnn", "kind 'knnn' is unknown; did you mean 'knn'"),
        ("version: 2", "version: one", "version is 'one'; it should be a valid integer"),
        ("0.07\n", "7e-2\n", "slice_fraction is '7e-2'; it should be a valid number .0.0001 or"),
        (KNN, KNN + "deviations: none\n", "deviations is 'none'; give a list"),
        ("k: [5]", "k: true", "k is True; give a list of whole numbers above 0"),
        ("version: 2", "verson: 2", "unknown key 'verson'"),
        (KNN, "- 1", "not keys with values"),
        (KNN, "a: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(KNN.replace(old, new))
    with pytest.raises(UsageError, match=message) as caught:
        load_protocol(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "values", "said"),
    [
        ("linear", "optimizer", ["sdg"], "it should be 'sgd' or 'lars'"),
        ("linear", "normalise", ["batch"], "it should be 'none', 'standardise' or 'batchnorm'"),
        ("linear", "schedule", ["step"], "it should be 'iteration' or 'epoch'"),
        ("linear", "lr", [[], [0.0], ["1e-2"]], "give a list of numbers above 0"),
        ("linear", "weight_decay", [[], [-1.0]], "give a list of numbers from 0"),
        ("linear", "momentum", [1.0], "it should be less than 1"),
        ("linear", "batch_size", [0, 1.5], "give a whole number above 0"),
        ("attentive", "warmup_epochs", [-1.0], "give a number of at least 0"),
        ("mlp", "hidden", [0], "give a whole number above 0"),
        ("mlp", "probe_seeds", [0], "give a whole number above 0"),
        ("finetune", "lr", [[]], "give a list of numbers above 0"),
        ("lowshot-5", "draws", [1], "give a whole number of at least 2"),
        ("lowshot-5", "folds", [1], "give a whole number of at least 2"),
        ("knn", "k", [[], [0, 5], [1.5], ["20"]], "give a list of whole numbers above 0"),
        ("knn", "temperature", [[], [0.0], [0.07, -1.0], [math.inf]], "give a list of numbers above 0"),
        ("logreg", "C", [[], [0.0, 1.0]], "give a list of numbers above 0"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_before_any_work(tmp_path: Path, name: str, key: str, values: list[Any], said: str) -> None:
    content = yaml.safe_load(find_asset("protocols", name).read_text())
    for value in values:
        content["parameters"][key] = value
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(UsageError, match=re.escape(f"parameters: {key} is {value!r}; {said}")):
            load_protocol(str(tmp_path / "mine.yaml"))


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown protocol 'logre'.*did you mean 'logreg'\? choose one of: .*knn"):
        load_protocol("logre")

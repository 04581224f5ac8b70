"""Protocol files, what they refuse, and a run of each kind against the probes and scikit-learn."""

from pathlib import Path

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from ssl_vit.assets import find_asset, list_assets
from ssl_vit.errors import UsageError
from ssl_vit_eval import KNNProbe
from ssl_vit_eval.linear import select_and_fit
from ssl_vit_eval.protocols import PARAMETERS, accuracies, load_protocol, run_protocol
from ssl_vit_eval.selection import stratified_slice

KNN = "version: 1\nkind: knn\nparameters:\n  k: 5\n  temperature: 0.07\n"


def features(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), n, replacement=True, generator=generator)
    return 1.2 * torch.eye(3, 8)[y] + torch.randn(n, 8, generator=generator), y


TRAIN, TEST = features(300, 0), features(200, 1)


def test_every_shipped_protocol_loads_and_runs() -> None:
    assert {"knn", "logreg"} <= set(list_assets("protocols"))
    for name in list_assets("protocols"):
        protocol = load_protocol(name)
        assert protocol.name == name
        assert protocol.parameters.keys() == PARAMETERS[protocol.kind].keys()
        assert run_protocol(protocol, *TRAIN, *TEST).accuracy > 0.5


def test_knn_is_dinos_rule() -> None:
    result = run_protocol(load_protocol("knn"), *TRAIN, *TEST)
    assert result.predictions.tolist() == KNNProbe(20, 0.07).fit(*TRAIN).predict(TEST[0]).tolist()
    assert result.selected == {"k": 20, "temperature": 0.07}
    assert (result.grid, result.edge_of_grid, result.oracle) == (None, None, None)
    assert run_protocol(load_protocol("knn"), TRAIN[0][:9], TRAIN[1][:9], *TEST).selected["k"] == 9
    assert result.seconds > 0


def test_logreg_selects_on_the_given_slice_else_on_a_stratified_one() -> None:
    protocol = load_protocol("logreg")
    grid = protocol.parameters["grid"]
    first = torch.arange(300) < 60
    for mask, expected_mask in ((None, stratified_slice(TRAIN[1], 0.1, 0)), (first, first)):
        result = run_protocol(protocol, *TRAIN, *TEST, mask)
        expected = select_and_fit(*TRAIN, *TEST, grid, expected_mask)
        assert result.predictions.tolist() == expected.predictions.tolist()
        assert result.grid == {"C": grid, "slice_accuracy": expected.slice_accuracy, "test_accuracy": expected.test_accuracy}
        assert result.selected["C"] == expected.probe.C
        assert (result.oracle, result.edge_of_grid) == (expected.oracle, expected.edge_of_grid)
        assert result.accuracy == pytest.approx(expected.accuracy)


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
    assert (protocol.name, protocol.version, protocol.kind) == ("knn5", 1, "knn")
    assert protocol.parameters == {"k": 5, "temperature": 0.07}


def test_a_file_may_not_pass_for_a_shipped_protocol(tmp_path: Path) -> None:
    path = tmp_path / "knn.yaml"
    path.write_text(KNN)
    with pytest.raises(UsageError, match="differs from version 1 of 'knn': rename it"):
        load_protocol(str(path))
    path.write_text(find_asset("protocols", "knn").read_text())
    assert load_protocol(str(path)) == load_protocol("knn")
    path.write_text(KNN.replace("version: 1", "version: 2"))
    assert load_protocol(str(path)).version == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("temperature", "temprature", "unknown key 'temprature': did you mean 'temperature'"),
        ("  k: 5\n", "", "lacks the key 'k'"),
        ("kind: knn", "kind: knnn", "unknown kind 'knnn': did you mean 'knn'"),
        ("version: 1", "version: one", "version is 'one', a str: give a int"),
        ("0.07", "7e-2", "temperature is '7e-2', a str"),
        ("k: 5", "k: true", "k is True, a bool"),
        ("version: 1", "verson: 1", "unknown key 'verson'"),
        (KNN, "- 1", "give a mapping"),
        (KNN, "a: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(KNN.replace(old, new))
    with pytest.raises(UsageError, match=message) as caught:
        load_protocol(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown protocol 'logre'.*did you mean 'logreg'\? choose one of: .*knn"):
        load_protocol("logre")

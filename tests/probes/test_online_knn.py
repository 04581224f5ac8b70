"""The online k-NN: right by a plain loop, and without a trace in the training."""

import csv
import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit import load_backbone, readout
from ssl_vit.errors import UsageError
from ssl_vit.model.readout import ReadoutSpec
from ssl_vit.train.callbacks import RunFolder
from ssl_vit.train.pretrain import build_method, parse_recipe, pretrain
from ssl_vit.weights.checkpoint import read_checkpoint
from ssl_vit_eval.lazy_images import EvalTransform
from ssl_vit_eval.probes import online_knn
from ssl_vit_eval.probes.online_knn import OnlineKNN, evaluating, subsets, trained
from ssl_vit_eval.probes.selection import stratified_slice
from ssl_vit_eval.splits import load_train_test

CLASSES, PER_CLASS = 4, 40


@pytest.fixture(autouse=True)
def labelled(pictures_and_recipes: None, own_cache: None) -> None:
    """Noise around a faint class pattern, so that about half of the answers are right; test holds another kind of pictures."""
    rng = np.random.default_rng(0)
    patterns = rng.normal(0, 12, (CLASSES, 20, 18, 3))
    for label in range(CLASSES):
        for split, count in (("train", PER_CLASS), ("test", 2)):
            Path(f"labelled/{split}/{label}").mkdir(parents=True)
            for number in range(count):
                pixels = (128 + patterns[label] + rng.normal(0, 40, (20, 18, 3))) if split == "train" else np.zeros((20, 18, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(f"labelled/{split}/{label}/{number:02}.png")


def run(recipe: str, out: str, *options: str, callback: OnlineKNN | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    common = ["--out", out, "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]
    pretrain(recipe, [*common, *options], [callback] if callback else [])
    return lines(out)


def lines(out: str) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in json.loads(line).items() if key != "data_seconds"}
        for line in Path(out, "metrics.jsonl").read_text().splitlines()
    ]


def measured(out: str) -> dict[int, float]:
    return {line["step"]: line["knn_top1"] for line in lines(out) if "knn_top1" in line}


def weights(out: str) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(Path(out) / "last.ckpt")["state_dict"])


def by_hand(checkpoint: str, spec: str) -> float:
    """DINO's rule, query by query, on files read with PIL: of each class 4 of its 40 files are queries, the others the bank."""
    files = sorted(Path("labelled/train").rglob("*.png"))
    labels = np.array([int(file.parent.name) for file in files])
    held_out = stratified_slice(torch.from_numpy(labels)).numpy()
    backbone = load_backbone(checkpoint)
    features = []
    for file in files:
        pixels = torch.from_numpy(np.array(EvalTransform(16)(Image.open(file)))).permute(2, 0, 1) / 255
        mean, std = torch.tensor(backbone.mean)[:, None, None], torch.tensor(backbone.std)[:, None, None]
        with torch.no_grad():
            z = readout(spec)(backbone(((pixels - mean) / std)[None]))[0].double().numpy()
        features.append(z / np.linalg.norm(z))
    bank, bank_labels = np.stack(features)[~held_out], labels[~held_out]
    right = []
    for query, label in zip(np.stack(features)[held_out], labels[held_out], strict=True):
        similarity = bank @ query
        votes = np.zeros(CLASSES)
        for neighbour in np.argsort(-similarity)[:20]:
            votes[bank_labels[neighbour]] += np.exp(similarity[neighbour] / 0.07)
        right.append(votes.argmax() == label)
    return float(np.mean(right))


@pytest.mark.parametrize(("method", "spec"), [("dino", "cls"), ("mae", "gap"), ("mae", "register/pre")])
def test_the_number_is_dinos_rule_on_the_trained_readout_and_training_never_notices(method: str, spec: str) -> None:
    options = ("--readout", spec, "--backbone.drop_path", "0.3")
    watched = run(f"{method}.yaml", "watched", *options, callback=OnlineKNN("./labelled", every=1))
    alone = run(f"{method}.yaml", "alone", *options)
    assert [line for line in watched if "knn_top1" not in line] == alone
    one, other = weights("watched"), weights("alone")
    assert [key for key in other if not torch.equal(one[key], other[key])] == []
    assert read_checkpoint("watched/last.ckpt")["ssl_vit"] == read_checkpoint("alone/last.ckpt")["ssl_vit"]
    assert list(measured("watched")) == [3, 6, 7]  # three batches an epoch, and the end
    assert measured("watched")[7] == pytest.approx(by_hand("watched/last.ckpt", spec))
    last = json.loads(Path("watched/run.json").read_text())["metrics"]
    assert {key: value for key, value in last.items() if key != "data_seconds"} == alone[-1]


def test_every_other_epoch_and_to_the_logger() -> None:
    Path("logs").mkdir()
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs")
    run("mae.yaml", "run", *logger, "--trainer.max_steps", "9", callback=OnlineKNN("./labelled", every=2))
    assert list(measured("run")) == [6, 9]
    rows = list(csv.DictReader(next(Path("logs").rglob("metrics.csv")).read_text().splitlines()))
    assert {int(row["step"]): float(row["knn_top1"]) for row in rows if row["knn_top1"]} == measured("run")


def test_accumulated_micro_batches_are_one_step() -> None:
    options = ("--accumulate", "2", "--trainer.max_steps", "8")
    run("mae.yaml", "run", *options, callback=OnlineKNN("./labelled", every=1))
    assert [line["step"] for line in lines("run") if "knn_top1" in line] == [3, 6, 8]


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_measures_what_the_whole_one_does(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run("dino.yaml", "whole", callback=OnlineKNN("./labelled", every=1))
    original = RunFolder.on_train_batch_end

    def interrupted(self: RunFolder, trainer: Any, *args: Any) -> None:
        self.signals.received = signal.SIGINT * (trainer.global_step == stop)
        original(self, trainer, *args)

    monkeypatch.setattr(RunFolder, "on_train_batch_end", interrupted)
    with pytest.raises(Exception, match=f"stopped at step {stop}"):
        run("dino.yaml", "cut", callback=OnlineKNN("./labelled", every=1))
    monkeypatch.setattr(RunFolder, "on_train_batch_end", original)
    run("dino.yaml", "cut", "--resume", callback=OnlineKNN("./labelled", every=1))
    assert lines("cut") == lines("whole")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("./pictures", "holds images but no class folders"),
        ("builtin:potos", "no embedded set 'builtin:potos'"),
        ("./one", "two classes, two images each"),
        ("./few", "two classes, two images each"),
    ],
)
def test_what_is_wrong_with_the_data_is_said_before_training(data: str, message: str) -> None:
    for place in ("one/a/0.png", "one/a/1.png", "one/a/2.png", "few/train/a/0.png", "few/train/b/0.png", "few/test/a/0.png"):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(place)
    with pytest.raises(UsageError, match=message):
        run("mae.yaml", "run", callback=OnlineKNN(data))
    assert not Path("run").exists()


def test_every_needs_to_be_above_0() -> None:
    with pytest.raises(UsageError, match="every is 0"):
        OnlineKNN("./labelled", every=0)


def test_the_teacher_is_read_and_only_with_the_trained_readout() -> None:
    modules = {}
    for method in ("dino", "mae"):
        parser, config = parse_recipe(f"{method}.yaml", [])
        modules[method] = build_method(config, parser.instantiate(config))
    assert trained(modules["dino"]) == (modules["dino"].teacher.backbone, modules["dino"].teacher.readout)
    assert trained(modules["mae"]) == (modules["mae"].backbone, modules["mae"].readout)
    modules["mae"].readout = readout("cls")
    with pytest.raises(UsageError, match="trained with gap but would be read with cls"):
        trained(modules["mae"])
    modules["mae"].spec = ReadoutSpec.parse("cls")
    trained(modules["mae"])


def test_modes_random_states_and_gradients_are_as_before() -> None:
    parser, config = parse_recipe("mae.yaml", [])
    module = build_method(config, parser.instantiate(config)).train()
    module.backbone.vit.blocks[0].eval()
    modes = [part.training for part in module.modules()]
    callback = OnlineKNN("./labelled")
    callback.prepare(16)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    callback.measure(*trained(module), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert [part.training for part in module.modules()] == modes
    assert torch.is_grad_enabled()

    def fail() -> None:
        with evaluating(module.backbone):
            assert not any(part.training for part in module.backbone.modules())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert [part.training for part in module.modules()] == modes


def test_subsets_are_of_train_stratified_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = load_train_test("./labelled", size=16, progress=False)
    assert train.labels is not None
    bank, queries = subsets(train)
    assert sorted([*bank.tolist(), *queries.tolist()]) == list(range(CLASSES * PER_CLASS))
    assert torch.bincount(train.labels[queries]).tolist() == [4] * CLASSES
    monkeypatch.setattr(online_knn, "BANK", 40)
    monkeypatch.setattr(online_knn, "QUERIES", 8)
    fewer_bank, fewer_queries = subsets(train)
    assert torch.bincount(train.labels[fewer_bank]).tolist() == [10] * CLASSES
    assert torch.bincount(train.labels[fewer_queries]).tolist() == [2] * CLASSES
    assert set(fewer_bank.tolist()) < set(bank.tolist())
    assert set(fewer_queries.tolist()) < set(queries.tolist())


def test_a_sets_own_slice_is_what_is_asked() -> None:
    """Patches of one photograph overlap: its queries must come from regions of their own."""
    train, _ = load_train_test("builtin:photos-new", size=32, progress=False)
    assert train.selection is not None
    bank, queries = subsets(train)
    assert bank.tolist() == (~train.selection).nonzero()[:, 0].tolist()
    assert queries.tolist() == train.selection.nonzero()[:, 0].tolist()

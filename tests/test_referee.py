"""`ssl-vit eval` as a command: the cache, the controls, every kind of protocol, learned readouts, sets that fail, diagnostics."""

import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ssl_vit.assets import find_asset
from ssl_vit.cli import run
from ssl_vit_eval.protocols import KINDS
from ssl_vit_eval.rows import RowStore
from ssl_vit_eval.sources import open_source
from tests.conftest import BACKBONE, errors
from tests.processes import Command

pytestmark = pytest.mark.usefixtures("three_classes")


def test_a_second_evaluation_reads_the_features(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "random:mae.yaml", "--data", "./pictures", "--readouts", "cls", "gap", "--cache", "cache"]
    assert run([*command, "--out", "first", "--protocols", "knn"]) == 0
    files = sorted(Path("cache").iterdir())
    assert len(files) == 4  # two readouts, two splits
    assert run([*command, "--out", "second", "--protocols", "knn"]) == 0

    def forward(*_: object, **__: object) -> None:
        raise AssertionError("the backbone is not needed")

    with monkeypatch.context() as without:
        without.setattr("ssl_vit.model.backbone.Backbone.forward", forward)
        without.setattr("ssl_vit_eval.lazy_images.EncodedImages.batch", forward)  # nor are the pictures
        assert run([*command, "--out", "third", "--protocols", "knn", "logreg"]) == 0
    rows = [[row.value for row in RowStore(out).rows() if row.protocol == "knn"] for out in ("first", "second", "third")]
    assert rows[0] == rows[1] == rows[2]

    # cut short, or under the name of another: computed again
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].rename(files[2])
    assert run([*command, "--out", "fourth", "--protocols", "knn"]) == 0
    assert capsys.readouterr().out.count("is cut short, damaged or belongs to something else") == 2
    assert [row.value for row in RowStore("fourth").rows()] == rows[0]


def test_features_that_are_not_finite_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "mae.yaml", "--out", "run", "--trainer.accelerator", "cpu"]) == 0
    checkpoint = torch.load("run/last.ckpt", weights_only=True)
    checkpoint["state_dict"]["backbone.vit.norm.weight"][:] = float("nan")
    torch.save(checkpoint, "run/last.ckpt")
    assert run(["eval", "run/last.ckpt", "--data", "./pictures", "--out", "out", "--readouts", "gap/pre", "gap"]) == 1
    assert "run: pictures train: image 0 read with gap gives features that are not finite" in errors(capsys)[0]
    assert run(["eval", "run/last.ckpt", "--data", "./pictures", "--out", "out", "--readouts", "gap/pre", "--protocols", "knn"]) == 0


def test_controls_are_rows_and_tables_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "random:mae.yaml", "--data", "./pictures", "--out", "out", "--protocols", "logreg", "--readouts", "gap", "cls+gap"]
    assert run([*command, "--controls", "width", "shuffled"]) == 0
    rows = {(row.read_with, row.control): row for row in RowStore("out").rows() if row.metric == "top1"}
    width = BACKBONE["width"]
    expected = {
        ("gap", ""),
        ("gap", "shuffled labels"),
        ("cls+gap", ""),
        ("cls+gap", "shuffled labels"),
        ("cls+gap", "cls beside shuffled"),
        ("cls+gap", "gap beside shuffled"),
    }
    assert rows.keys() == expected
    for control in ("", "cls beside shuffled"):  # as wide, and as many weights
        assert (rows["cls+gap", control].width, rows["cls+gap", control].parameters) == (2 * width, 3 * (2 * width + 1))
    assert run(["compare", "out", "--verbose"]) == 0
    text = capsys.readouterr().out
    assert "logreg, gap beside shuffled" in Path("out/report.html").read_text()
    assert "differ in" not in text


def test_shuffled_labels_leave_chance() -> None:
    for split in ("train", "test"):  # two classes that anything can tell apart
        for name, level in (("black", 0), ("white", 255)):
            folder = Path("plain", split, name)
            folder.mkdir(parents=True)
            for number in range(40):
                noise = np.random.default_rng(number).integers(0, 40, (16, 16, 3))
                Image.fromarray(np.abs(level - noise).astype(np.uint8)).save(folder / f"{number}.png")
    command = ["eval", "random:mae.yaml", "--data", "./plain", "--out", "out", "--readouts", "gap", "--controls", "shuffled"]
    assert run([*command, "--protocols", "knn"]) == 0
    found = {row.control: row.value for row in RowStore("out").rows() if row.metric == "top1"}
    assert found[""] == 1.0
    assert 0.2 < found["shuffled labels"] < 0.8


def test_every_kind_of_protocol_on_one_source(capsys: pytest.CaptureFixture[str]) -> None:
    short = {"epochs": 1, "warmup_epochs": 0, "batch_size": 16, "draws": 2, "folds": 2}
    names = []
    for kind, base in {
        "linear": "linear-dino",
        "mlp": "mlp",
        "attentive": "attentive",
        "finetune": "finetune",
        "lowshot": "lowshot-5",
    }.items():
        content = yaml.safe_load(find_asset("protocols", base).read_text())
        content["parameters"] |= {key: type(value)(short[key]) for key, value in content["parameters"].items() if key in short}
        content["parameters"] |= {key: value[:2] for key, value in content["parameters"].items() if key == "lr"}
        content["parameters"] |= {"iterations": 3} if kind == "mlp" else {}
        names.append(f"{kind}-short.yaml")
        Path(names[-1]).write_text(yaml.safe_dump(content))
    command = [
        "eval",
        "random:mae.yaml",
        "--data",
        "./pictures",
        "--out",
        "out",
        "--protocols",
        "knn",
        *names,
        "--readouts",
        "cls",
        "cls+gap",
    ]
    assert run([*command, "abmilp"]) == 0
    rows = {(row.protocol, row.read_with): row for row in RowStore("out").rows() if row.metric == "top1"}
    fixed = {(name, spec) for name in ("knn", "linear-short", "mlp-short", "lowshot-short") for spec in ("cls", "cls+gap")}
    trains = {(name, spec) for name in ("finetune-short", "attentive-short") for spec in ("cls", "cls+gap", "abmilp")}
    assert rows.keys() == fixed | trains
    assert rows["knn", "cls"].bank == 30
    assert rows["linear-short", "cls"].deviations
    assert rows["knn", "cls"].deviations == []
    width = BACKBONE["width"]
    assert rows["attentive-short", "abmilp"].parameters == width + 3 * (width + 1)
    predictions, labels = RowStore("out").predictions(rows["lowshot-short", "cls"])
    assert predictions.shape == (12, 2)
    assert rows["lowshot-short", "cls"].value == pytest.approx((predictions == labels[:, None]).double().mean().item())
    assert run(["compare", "out"]) == 0
    before = Path("out/rows.jsonl").read_text()
    capsys.readouterr()
    assert run([*command, "abmilp"]) == 0
    assert "done before" in capsys.readouterr().out
    assert Path("out/rows.jsonl").read_text() == before


def test_a_learned_readout_is_read_where_it_was_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "dino.yaml", "--readout", "ep", "--out", "run", "--trainer.accelerator", "cpu"]) == 0
    command = ["eval", "run/last.ckpt", "--data", "./pictures", "--protocols", "knn", "--out", "out"]
    assert run([*command, "--readouts", "trained", "cls"]) == 0
    assert "run: dino, trained with ep" in capsys.readouterr().out
    assert {(row.trained_with, row.read_with) for row in RowStore("out").rows()} == {("ep", "ep"), ("ep", "cls")}
    source = open_source("run/last.ckpt")
    assert source.backbone is not None
    trained = torch.load("run/last.ckpt", weights_only=True)["state_dict"]
    own = source.readout("ep").state_dict()
    assert own
    assert all(torch.equal(value, trained[f"teacher.readout.{key}"]) for key, value in own.items())
    assert run([*command, "--readouts", "simpool"]) == 2
    assert "readout 'simpool' has parameters, which this source has not trained; add --protocols attentive" in errors(capsys)[0]
    assert run(["eval", "run/last.ckpt:student", *command[2:], "--readouts", "cls"]) == 0
    assert {row.source for row in RowStore("out").rows()} == {"run", "run:student"}


def test_a_set_that_cannot_be_had_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    Path("single/train/a").mkdir(parents=True)
    for number in range(10):
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(f"single/train/a/{number}.png")
    Path("mine.yaml").write_text("data: [owner/nowhere, ./single, ./pictures]\n")
    assert run(["eval", "random:mae.yaml", "--suite", "mine.yaml", "--out", "out", "--protocols", "knn", "--readouts", "gap"]) == 1
    captured = capsys.readouterr()
    assert "owner/nowhere is left out: no such folder: " in captured.out
    assert "read as a Hugging Face id, the dataset 'owner/nowhere' cannot be fetched" in captured.out
    assert "training labels are 0: a probe needs at least two classes" in captured.out
    assert "could not be evaluated: random:mae on owner/nowhere, random:mae on " in captured.err
    assert [row.dataset for row in RowStore("out").rows() if row.metric == "top1"] == ["pictures"]


def test_diagnostics_stand_beside_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "eval",
        "random:mae.yaml",
        "--data",
        "./pictures",
        "--out",
        "out",
        "--readouts",
        "cls",
        "cls+gap",
        "gap",
        "--controls",
        "width",
    ]
    assert run([*command, "--diagnostics"]) == 0
    found = json.loads(next(Path("out").glob("diagnostics-*.json")).read_text())
    rows = {(row.protocol, row.read_with, row.control): row.value for row in RowStore("out").rows() if row.metric == "top1"}
    curve = next(of for of in found["accuracy_by_block"] if of["readout"] == "cls" and of["protocol"] == "knn")
    assert [(point["block"], point["top1"]) for point in curve["curve"]] == [
        (0, rows["knn", "cls@block0", ""]),
        (1, rows["knn", "cls", ""]),
    ]
    redundancy = next(of for of in found["redundancy"] if of["protocol"] == "logreg")
    best = max(rows["logreg", "cls+gap", f"{kept} beside shuffled"] for kept in ("cls", "gap"))
    assert redundancy["points"] == pytest.approx(100 * (rows["logreg", "cls+gap", ""] - best))
    assert Path("out", found["picture"]).exists()


@pytest.mark.filterwarnings("ignore:images of 24 x 24 px")
def test_diagnostics_of_two_image_sizes_are_kept_apart() -> None:
    command = [
        "eval",
        "random:mae.yaml",
        "--data",
        "./pictures",
        "--out",
        "out",
        "--readouts",
        "gap",
        "--protocols",
        "knn",
        "--diagnostics",
    ]
    assert run(command) == run([*command, "--image-size", "24"]) == 0
    found = {of["transform"]: of for of in (json.loads(path.read_text()) for path in Path("out").glob("diagnostics-*.json"))}
    assert {transform: of["image_size"] for transform, of in found.items()} == {"resize16": 16, "resize24": 24}
    for transform, of in found.items():
        rows = {row.read_with: row.value for row in RowStore("out").rows() if (row.transform, row.metric) == (transform, "top1")}
        assert [point["top1"] for point in of["accuracy_by_block"][0]["curve"]] == [rows["gap@block0"], rows["gap"]]


@pytest.mark.filterwarnings("ignore:images of 24 x 24 px")
def test_what_changes_a_number_is_a_part_of_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    """Heads, the input's normalisation, the image size, the parameters of a protocol file: none of them is in the weights."""
    assert run(["pretrain", "mae.yaml", "--out", "run", "--trainer.accelerator", "cpu"]) == 0
    Path("mine.yaml").write_text(find_asset("protocols", "knn-dino").read_text())
    command = ["--data", "./pictures", "--out", "out", "--protocols", "mine.yaml", "--readouts", "gap"]
    assert run(["export", "run/last.ckpt", "--out", "exported"]) == 0
    assert run(["eval", "run/last.ckpt", "exported", *command]) == 0
    assert "exported on pictures: done before" in capsys.readouterr().out  # the same network
    config = json.loads(Path("exported/config.json").read_text())
    config["ssl_vit"]["mean"] = [0.4, 0.4, 0.4]
    Path("exported/config.json").write_text(json.dumps(config))
    assert run(["eval", "exported", *command]) == 0
    recipe = yaml.safe_load(Path("mae.yaml").read_text())
    for heads in (2, 4):
        recipe["backbone"]["heads"] = heads
        Path(f"heads{heads}.yaml").write_text(yaml.safe_dump(recipe))
        assert run(["eval", f"random:heads{heads}.yaml", *command]) == 0
    assert run(["eval", "run/last.ckpt", *command, "--image-size", "24"]) == 0
    Path("mine.yaml").write_text(Path("mine.yaml").read_text().replace("[0.07]", "[0.9]"))
    assert run(["eval", "run/last.ckpt", *command]) == 0
    text = capsys.readouterr().out
    assert "done before" not in text
    assert "run: positions interpolated from 16 px to 24 px" in text
    rows = [row for row in RowStore("out").rows() if row.metric == "top1"]
    assert len(rows) == 6
    assert len({row.checkpoint for row in rows}) == 4
    assert {row.transform for row in rows} == {"resize16", "resize24"}
    assert len({row.protocol_hash for row in rows}) == 2


def test_one_run_that_fails_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(find_asset("protocols", "attentive").read_text())
    content["parameters"] |= {"lr": [1.0e38], "epochs": 5, "warmup_epochs": 0, "batch_size": 16}
    Path("diverges.yaml").write_text(yaml.safe_dump(content))
    command = ["eval", "random:mae.yaml", "random:dino.yaml", "--data", "./pictures", "--out", "out", "--readouts", "abmilp", "cls"]
    assert run([*command, "--protocols", "diverges.yaml", "knn"]) == 1
    assert "2 of 3 runs failed, the others are kept: readout 'abmilp': training diverged" in capsys.readouterr().out
    assert [(row.source, row.protocol) for row in RowStore("out").rows() if row.metric == "top1"] == [
        ("random:mae", "knn"),
        ("random:dino", "knn"),
    ]


def test_two_names_of_one_network_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "mae.yaml", "--out", "run", "--trainer.accelerator", "cpu"]) == 0
    shutil.copy("run/last.ckpt", "run/copy.ckpt")
    sources = ["run/last.ckpt", "pixels:16", "pixels:8", "random:mae.yaml", "run/copy.ckpt"]
    assert run(["eval", *sources, "--data", "./pictures", "--out", "out", "--protocols", "knn", "--readouts", "gap"]) == 0
    text = capsys.readouterr().out
    assert text.count("same weights as") == 1
    assert "run/copy.ckpt: same weights as run/last.ckpt, so both have the same rows\n" in text


def sleep_in_logreg() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, such as these tests may be, ignores it
    KINDS["logreg"] = KINDS["logreg"]._replace(run=lambda *_: time.sleep(100))


def test_ctrl_c_says_what_is_kept() -> None:
    """A real process and a real signal, in the second of two runs; its log has lines and no bars."""
    command = ["eval", "random:mae.yaml", "--data", "./pictures", "--out", "out", "--readouts", "gap", "--protocols", "knn", "logreg"]
    process = Command(*command, before=sleep_in_logreg)
    process.wait_for("out/rows.jsonl")
    process.send(signal.SIGINT)
    assert (process.wait(60), process.said.splitlines()[-1]) == (
        130,
        "ssl-vit: interrupted; 2 rows are kept in out/rows.jsonl; the same command goes on",
    )
    assert "Traceback" not in process.said
    again = Command(*command)
    assert again.wait() == 0, again.said
    assert [row.protocol for row in RowStore("out").rows()] == ["knn", "knn", "logreg", "logreg"]
    assert not {"\r", "|"} & {*process.said, *again.said}


def closed_stdout(unbuffered: bool) -> None:
    sys.stdout = os.fdopen(1, "w", buffering=1 if unbuffered else -1, closefd=False)
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)
    os.close(writer)


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    """`ssl-vit compare out | head -1`, where Python holds what is printed back, and where it does not."""
    assert run(["eval", "pixels:16", "--data", "./pictures", "--out", "out", "--protocols", "knn"]) == 0
    for unbuffered in (False, True):
        process = Command("compare", "out", "--out", f"report{unbuffered}", before=partial(closed_stdout, unbuffered))
        assert (process.wait(), process.said) == (141, "")
        assert Path(f"report{unbuffered}/report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocols", "attentive", "--controls", "width"], "--controls change features, which attentive do not read"),
        (["--protocols", "logreg", "--diagnostics"], "--diagnostics reads every block by k-NN"),
        (["--controls", "shufled"], "did you mean 'shuffled'?"),
        (["--suite", "photos", "--train-split", "train"], "split and column names go with --data"),
        (["--data", "builtin:photos", "--train-split", "test"], "split 'test' would be both train and test"),
        (["--image-size", "18"], "18"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = [] if "--data" in arguments or "--suite" in arguments else ["--data", "./pictures"]
    assert run(["eval", "random:mae.yaml", *data, *arguments, "--out", "out"]) == 2
    assert message in errors(capsys)[0]

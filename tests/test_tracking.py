"""W&B from end to end: real runs against a server on loopback, which dies and comes back; kills and resumes; what lies offline."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import wandb
from lightning.pytorch.callbacks import Callback, LambdaCallback

from ssl_vit import load_backbone
from ssl_vit.cli import run
from ssl_vit.errors import Interrupted, UsageError
from ssl_vit.methods.mae import MAE
from ssl_vit.train.pretrain import pretrain
from ssl_vit.train.tracking import STEP, TrackedRun, Tracking, last_step
from ssl_vit.train.training_log import TrainingLog
from ssl_vit.weights.checkpoint import read_checkpoint
from ssl_vit_eval.rows import RowStore
from ssl_vit_eval.tracking import summary_key, summary_of
from tests.fake_wandb import ENTITY, FakeRun, FakeWandb
from tests.processes import Command, ranks

BIN = Path(sys.executable).parent
STEPS = 150
OPTIONS = ["--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "False"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    """A server that this process and its children log to."""
    with FakeWandb() as fake:
        for name, value in {**fake.environment, "WANDB_INIT_TIMEOUT": "60"}.items():  # it is there, but the machine may be busy
            monkeypatch.setenv(name, value)
        wandb.teardown()  # it reads its environment once
        yield fake
        fake.up()  # or wandb's service asks again for minutes before it ends
        wandb.teardown()
        assert fake.unknown == []


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What was said of W&B, by us or by itself."""
    return [line for line in capfd.readouterr().err.splitlines() if re.search("w&b|wandb", line, re.IGNORECASE)]


def steps_of(tracked: FakeRun) -> list[int]:
    return [line[STEP] for line in tracked.history]


def assert_same_weights(one: str, other: str) -> None:
    left, right = (read_checkpoint(Path(folder) / "last.ckpt")["state_dict"] for folder in (one, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def assert_mirrors(tracked: FakeRun, folder: str) -> None:
    """History and summary are those of the run folder: nothing twice, nothing missing."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    assert steps_of(tracked) == [line["step"] for line in lines]
    assert [line["loss"] for line in tracked.history] == pytest.approx([line["loss"] for line in lines])
    summary = json.loads(Path(folder, "run.json").read_text())
    assert all(tracked.summary[key] == pytest.approx(summary[key]) for key in ("steps", "images", "flops", "seconds"))
    assert tracked.summary["checkpoint"] == load_backbone(f"{folder}/last.ckpt").weights_hash()
    assert tracked.summary["init"] == read_checkpoint(Path(folder) / "last.ckpt")["ssl_vit"]["init"]


def slow_down() -> None:
    training_step = MAE.training_step

    def slowly(self: MAE, *arguments: Any) -> Any:
        time.sleep(0.03)
        return training_step(self, *arguments)

    MAE.training_step = slowly  # type: ignore[method-assign]


def at(step: int, action: Callable[[], None]) -> Callback:
    return LambdaCallback(on_train_batch_end=lambda trainer, *_: action() if trainer.global_step == step else None)


@pytest.mark.usefixtures("pictures_and_recipes")
class TestPretraining:
    @pytest.mark.parametrize("mode", ["online", pytest.param("offline", marks=pytest.mark.slow)])
    def test_killed_and_resumed(self, mode: str, server: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ctrl-C at step 10, with its checkpoint; a real process that is killed some steps behind it; and then to the end."""
        # short, so that the kill leaves a part of it on the server or in the file
        for name in ("FILE_STREAM_TRANSMIT", "TRANSACTION_LOG_FLUSH"):
            monkeypatch.setenv(f"WANDB_X_{name}_INTERVAL", "1")
        monkeypatch.setenv("WANDB_MODE", mode)
        options, tracking = [*OPTIONS, "--out", "run", "--trainer.max_steps", f"{STEPS}"], Tracking("readouts")
        with pytest.raises(Interrupted):
            pretrain("mae.yaml", options, [at(10, lambda: signal.raise_signal(signal.SIGINT))], tracking)
        wandb.teardown()  # a child would else log by way of this process
        process = Command("pretrain", "mae.yaml", *options, "--resume", "--wandb", "readouts", before=slow_down)
        while process.running and not arrived(server, 50):
            time.sleep(0.01)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert read_checkpoint(Path("run/last.ckpt"))["global_step"] == 10
        there = max(map(last_step, Path("run/wandb").glob("offline-run-*")), default=0) or max(steps_of(*server.runs.values()))
        assert 10 < there < STEPS  # the premise: of what will be trained again, a part is there already
        pretrain("mae.yaml", [*options, "--resume"], tracking=tracking)
        if mode == "offline":
            assert not server.runs
            folders = sorted(Path("run/wandb").glob("offline-run-*"))
            assert len(folders) == 3
            done = subprocess.run([f"{BIN}/wandb", "sync", *folders], env={**os.environ, "WANDB_MODE": "online"}, capture_output=True)
            assert done.returncode == 0, done.stderr
        (tracked,) = server.runs.values()
        assert_mirrors(tracked, "run")
        assert steps_of(tracked) == list(range(1, STEPS + 1))

    def test_what_a_run_says(self, server: FakeWandb, capfd: pytest.CaptureFixture[str]) -> None:
        pretrain("dino.yaml", [*OPTIONS, "--out", "plain"])
        capfd.readouterr()
        tracking = Tracking("readouts", group="study", tags=("cls", "seed0"))
        pretrain("dino.yaml", [*OPTIONS, "--out", "cells/run"], tracking=tracking)
        (tracked,) = server.runs.values()
        assert (tracked.project, tracked.group, tracked.job_type, tracked.name) == ("readouts", "study", "pretrain", "run")
        assert (tracked.tags, tracked.exit_code) == (["cls", "seed0"], 0)
        config = tracked.config
        assert (config["readout"], config["seed"], config["method"], config["source"]) == ("cls", 0, "dino", "run")
        assert (config["backbone"]["width"], config["versions"]["torch"]) == (24, importlib.metadata.version("torch"))
        assert config["recipe_hash"] == json.loads(Path("cells/run/run.json").read_text())["recipe_hash"]
        assert_mirrors(tracked, "cells/run")
        assert_same_weights("plain", "cells/run")
        assert Path("cells/run/recipe.yaml").read_text() == Path("plain/recipe.yaml").read_text()
        assert not Path("wandb").exists()
        assert said(capfd) == [f"W&B: {server.url}/{ENTITY}/readouts/runs/{tracked.id}"]

        calls = len(server.calls)  # a finished run that was logged is not logged again
        pretrain("dino.yaml", [*OPTIONS, "--out", "cells/run", "--resume"], tracking=tracking)
        assert len(server.calls) == calls
        # one that was not, is
        assert run(["pretrain", "dino.yaml", *OPTIONS, "--out", "plain", "--resume", "--wandb", f"{ENTITY}/other"]) == 0
        (other,) = [tracked for tracked in server.runs.values() if tracked.project == "other"]
        assert_mirrors(other, "plain")

    def test_nobody_there_at_the_start(self, server: FakeWandb, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        server.down()
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
        pretrain("mae.yaml", [*OPTIONS, "--out", "plain"])
        capfd.readouterr()
        begun = time.monotonic()
        pretrain("mae.yaml", [*OPTIONS, "--out", "run"], tracking=Tracking("readouts"))
        assert time.monotonic() - begun < 30
        assert_same_weights("plain", "run")
        (line,) = said(capfd)
        assert line.startswith("W&B: offline (")
        server.up()
        subprocess.run(f"{BIN}/{line[line.index('wandb sync') :]}", shell=True, check=True, capture_output=True, timeout=60)
        (tracked,) = server.runs.values()
        assert_mirrors(tracked, "run")

    @pytest.mark.parametrize("step", [3, 7])  # of 7
    def test_server_dies(self, step: int, server: FakeWandb, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        """Midway or at the end: the training is the same, and the same command sends the rest."""
        monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "2")
        pretrain("mae.yaml", [*OPTIONS, "--out", "plain"])
        tracking = Tracking("readouts")
        pretrain("mae.yaml", [*OPTIONS, "--out", "run"], [at(step, server.down)], tracking)
        assert_same_weights("plain", "run")
        (tracked,) = server.runs.values()
        assert tracked.exit_code is None
        lines = said(capfd)
        assert len(lines) == 2
        assert "not all of run has arrived" in lines[1]
        server.up()
        pretrain("mae.yaml", [*OPTIONS, "--out", "run", "--resume"], tracking=tracking)
        assert_mirrors(tracked, "run")

    def test_without_an_account_or_switched_off(
        self, server: FakeWandb, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv("WANDB_API_KEY")
        for mode, folders in (("online", 1), ("disabled", 0)):
            monkeypatch.setenv("WANDB_MODE", mode)
            wandb.teardown()
            assert run(["pretrain", "mae.yaml", *OPTIONS, "--out", mode, "--wandb", "readouts"]) == 0
            lines = said(capfd)
            assert len(lines) == folders == len(list(Path(mode).glob("wandb/offline-run-*")))
            assert all("WANDB_API_KEY" in line and "wandb sync" in line for line in lines)
        assert not server.runs

    def test_one_line_for_a_step(self) -> None:
        log, sent = TrainingLog(Tracking("readouts"), Path()), []
        log.run = SimpleNamespace(started=True, log=lambda values, step: sent.append((step, values)))  # type: ignore[assignment]
        Path("metrics.jsonl").write_text('{"step": 3, "knn_top1": 0.5}\n{"step": 3, "loss": 2.0}\n{"step": 4, "loss": 1.0}\n')
        with Path("metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')  # half written, as yet
        log.send()
        assert sent == [(3, {"knn_top1": 0.5, "loss": 2.0}), (4, {"loss": 1.0})]

    def test_whatever_goes_wrong_is_one_line(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        """Of W&B's own making, as a file that it cannot read."""
        log = TrackedRun(Tracking("readouts"), Path("run"), "pretrain")
        monkeypatch.setattr(TrackedRun, "_init", Mock(side_effect=AssertionError("of a kind that nobody expected")))
        log.start("run", {})
        log.log({"loss": 1.0}, step=1)
        log.finish()
        assert said(capfd) == ["W&B: starting run failed, and goes on without W&B: of a kind that nobody expected"]

    def test_one_of_two_processes_logs(self, server: FakeWandb) -> None:
        both = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
        for process in ranks(2, "pretrain", "mae.yaml", *OPTIONS, *both, "--out", "two", "--wandb", "readouts"):
            assert process.wait() == 0, process.said
        (tracked,) = server.runs.values()
        assert_mirrors(tracked, "two")


def arrived(server: FakeWandb, steps: int) -> bool:
    """Whether so many steps, of at least 300 bytes each, are on the server or in an offline run's file."""
    files = Path("run/wandb").glob("offline-run-*/run-*.wandb")
    return any(len(tracked.lines) > steps for tracked in server.runs.values()) or any(file.stat().st_size > 300 * steps for file in files)


@pytest.mark.usefixtures("three_classes", "own_cache")
class TestEvaluation:
    def test_rows_become_a_run_of_their_source(self, server: FakeWandb) -> None:
        assert run(["pretrain", "mae.yaml", *OPTIONS, "--out", "toy-gap-s0", "--wandb", "readouts"]) == 0
        command = ["eval", "toy-gap-s0/last.ckpt", "random:mae.yaml", "--data", "./pictures", "--protocols", "knn", "--out", "eval"]
        options = ["--wandb", "readouts", "--readouts"]
        assert run([*command, *options, "gap", "cls"]) == 0
        (pretrained,) = [tracked for tracked in server.runs.values() if tracked.job_type == "pretrain"]
        first, second = evaluated = [tracked for tracked in server.runs.values() if tracked.job_type == "eval"]
        assert (first.name, second.name) == ("toy-gap-s0", "random:mae")
        assert (first.tags, second.tags) == (["mae", "gap"], ["random"])
        assert first.config["checkpoint"] == pretrained.summary["checkpoint"] != second.config["checkpoint"]
        assert first.config["init"] == pretrained.summary["init"] == second.config["checkpoint"]
        assert first.config["recipe_hash"] == pretrained.config["recipe_hash"]
        assert [(run.config["trained_with"], run.config["seed"]) for run in evaluated] == [("gap", 0), (None, 0)]
        rows = [row for row in RowStore("eval").rows() if row.source == "toy-gap-s0"]
        assert len(rows) == 4
        for row in rows:
            key = f"pictures/knn/{row.read_with}/{row.metric}"
            assert [first.summary[f"{key}{end}"] for end in ("", "_low", "_high")] == pytest.approx([row.value, row.ci_low, row.ci_high])
        assert first.summary["pictures/knn/trained/top1"] == first.summary["pictures/knn/gap/top1"]
        assert not any("trained" in key for key in second.summary)
        table = json.loads(first.files[first.summary["results"]["path"]])
        column = {name: [line[place] for line in table["data"]] for place, name in enumerate(table["columns"])}
        assert column["id"] == [row.id for row in rows]
        assert column["value"] == pytest.approx([row.value for row in rows])
        assert not [name for name in server.artifacts if "predictions" in name]

        lines, calls = len(first.lines), len(server.calls)
        assert run([*command, *options, "gap", "cls"]) == 0
        assert len(server.calls) == calls  # nothing new
        assert run([*command, *options, "gap", "cls", "register", "--wandb-predictions"]) == 0
        assert len(server.runs) == 3
        assert len(first.lines) == lines + 1
        assert {"pictures/knn/register/top1", "pictures/knn/cls/top1"} <= first.summary.keys()
        (artifact,) = server.artifacts[f"predictions-{first.config['checkpoint']}"]
        assert artifact["run"] == first.id
        rows = [row for row in RowStore("eval").rows() if row.source == "toy-gap-s0"]
        assert {f"predictions/{name}": content for name, content in artifact["files"].items()} == {
            row.predictions: Path("eval", row.predictions).read_bytes() for row in rows
        }

    def test_server_that_is_gone_does_not_change_a_row(
        self, server: FakeWandb, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        server.down()
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
        begun = time.monotonic()
        sources = ["random:mae.yaml", "random:dino.yaml", "pixels:16"]
        assert run(["eval", *sources, "--data", "./pictures", "--protocols", "knn", "--wandb", "readouts", "--out", "tracked"]) == 0
        assert time.monotonic() - begun < 30
        assert run(["eval", *sources, "--data", "./pictures", "--protocols", "knn", "--out", "plain"]) == 0
        one, other = ([(row.id, row.value) for row in RowStore(name).rows()] for name in ("tracked", "plain"))
        assert one == other
        lines = said(capfd)
        assert ["offline (not reached)" in line for line in lines] == [False, True, True]
        assert all("offline" in line and "wandb sync" in line for line in lines)


def test_keys_are_plain_and_no_two_rows_share_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tests.planted import plant

    store = RowStore(tmp_path)
    plant(store, [1, 1, 1, 0], read_with="cls@last4+gap/pre", trained_with="cls@last4+gap/pre")
    plant(store, [1, 0, 0, 0], control="shuffled labels")
    summary = summary_of(store.rows())
    top1 = {key: value for key, value in summary.items() if key.endswith("top1")}
    assert top1 == {
        "builtin_photos/knn/cls-last4_gap-pre/top1": 0.75,
        "builtin_photos/knn/trained/top1": 0.75,
        "builtin_photos/knn_shuffled_labels/cls/top1": 0.25,
        "builtin_photos/knn_shuffled_labels/trained/top1": 0.25,
    }
    assert summary["builtin_photos/knn/trained/top1_low"] < 0.75 < summary["builtin_photos/knn/trained/top1_high"]
    assert summary_key("org/set v1.0", "knn, shuffled labels", "pixels", "top1") == "org_set_v1_0/knn_shuffled_labels/pixels/top1"
    assert capfd.readouterr().err == ""
    plant(store, [1, 1, 0, 0], protocol_version=2, read_with="gap")
    plant(store, [1, 0, 0, 0], protocol_version=1, read_with="gap")
    assert summary_of(store.rows()) == summary
    assert "several rows for builtin_photos/knn/gap/top1" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["", "/", "a/", "/b", "a/b/c", "a b", "a?b", "https://wandb.ai/a/b"])
def test_what_is_no_project(text: str) -> None:
    with pytest.raises(UsageError, match=r"PROJECT or ENTITY/PROJECT"):
        Tracking.parse(text)
    assert Tracking.parse("a.b-c_1") == Tracking("a.b-c_1")
    assert Tracking.parse("me/it") == Tracking("it", "me")


def test_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "pixels", "--wandb-predictions"]) == 2
    assert run(["pretrain", "mae_smoke", "--wandb", "a/b/c"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "--wandb-predictions needs --wandb PROJECT" in first
    assert "--wandb 'a/b/c' is not a W&B project" in second

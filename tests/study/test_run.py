"""`ssl-vit study` as a command: killed, resumed, shared between processes, refused, compared."""

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssl_vit.cli import run
from ssl_vit.errors import Failure
from ssl_vit.files import locked
from tests.conftest import errors
from tests.processes import Command

pytestmark = pytest.mark.usefixtures("three_classes")


STUDY: dict[str, Any] = {
    "recipes": ["dino.yaml", "mae.yaml"],
    "trained_with": ["cls", "gap"],
    "seeds": [0],
    "data": ["./pictures"],
    "protocols": ["knn"],
    "read_with": ["cls", "gap"],
}


def write(**changes: Any) -> dict[str, Any]:
    Path("study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}))
    return {**STUDY, **changes}


def rows(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "eval/rows.jsonl").read_text().splitlines()]


def outcome(folder: str) -> dict[str, float]:
    found = rows(folder)
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row["value"] for row in found}


def weights(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    files = sorted(Path(folder, "cells").glob("*/last.ckpt"))
    return {file.parent.name: torch.load(file, weights_only=True)["state_dict"] for file in files}


def test_a_study_is_resumed_where_it_was_stopped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import ssl_vit_eval.study.run as study

    write()
    trained: list[str] = []
    original = study.pretrain

    def counted(recipe: str, options: list[str], **others: Any) -> Path:
        trained.append(options[options.index("--out") + 1])
        if len(trained) == 3:
            raise KeyboardInterrupt
        return original(recipe, options, **others)

    monkeypatch.setattr(study, "pretrain", counted)
    assert run(["study", "study.yaml", "--out", "out"]) == 130
    assert not Path("out/report.html").exists()
    finished = {cell: cell.stat().st_mtime_ns for cell in Path("out/cells").glob("*/last.ckpt")}
    assert len(finished) == 2
    assert run(["study", "study.yaml", "--out", "out"]) == 0
    assert len(trained) == 5  # two, the interrupted one twice, the last
    assert all(cell.stat().st_mtime_ns == when for cell, when in finished.items())

    text = capsys.readouterr().out
    assert len(outcome("out")) == 2 * (1 + (4 + 2) * 2)  # metrics x (pixels + (cells + random) x readouts)
    assert re.search(r"^trained with +read cls +read gap", text, re.MULTILINE)
    assert "next: Train" in text
    report = Path("out/report.html").read_text()
    assert "data:image/png;base64" in report  # the reconstructions
    assert "data:image/svg+xml;base64" in report  # the curves
    before = Path("out/eval/rows.jsonl").read_text()
    assert run(["study", "study.yaml", "--out", "out"]) == 0
    assert len(trained) == 5
    assert Path("out/eval/rows.jsonl").read_text() == before
    assert "s in all" in text
    assert "finished before" not in text
    finished = capsys.readouterr().out.splitlines()
    assert finished[-1] == "out was finished before: nothing was trained or evaluated again; its report is out/report.html"
    assert not any("s in all" in line for line in finished)
    assert run(["compare", "out", "--out", "elsewhere"]) == 0
    assert Path("elsewhere/report.html").exists()


@pytest.mark.slow
def test_killed_at_any_moment_a_study_ends_as_if_it_had_not_been() -> None:
    """SIGKILL at random moments within the time that it takes uninterrupted, each time of a new process that goes on with the rest."""
    write(trained_with=["cls"])
    study = ("study", "study.yaml", "--out")
    Command("--version").wait()  # the server has imported what it needs
    begun = time.monotonic()
    whole = Command(*study, "whole")
    assert whole.wait() == 0, whole.said
    seconds = time.monotonic() - begun
    moments, killed = random.Random(0), 0
    while killed < 5:
        code = Command(*study, "out").wait(moments.uniform(0.05, 0.7) * seconds)
        killed += code == -signal.SIGKILL
        if code == 0:  # nothing is left to be killed at
            shutil.rmtree("out")
        assert code in (0, -signal.SIGKILL)
    last = Command(*study, "out")
    assert last.wait() == 0, last.said
    assert outcome("out") == outcome("whole")
    again = weights("out")
    for name, state in weights("whole").items():
        assert all(torch.equal(value, again[name][key]) for key, value in state.items())
    assert Path("out/report.html").exists()


def test_processes_share_a_study() -> None:
    write()
    processes = [Command("study", "study.yaml", "--out", "out") for _ in range(3)]
    codes, logs = [process.wait() for process in processes], [process.said for process in processes]
    assert codes == [0, 0, 0], logs
    assert sum(log.count("3 steps, trained with") for log in logs) == 4  # every cell once
    assert len(outcome("out")) == 2 * (1 + (4 + 2) * 2)


def test_what_another_process_leaves_undone_is_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    @contextmanager
    def taken(lock: Path, wait: bool = True) -> Iterator[bool]:
        yield wait  # the other one has ended, without a word, once it was waited for

    write(recipes=["mae.yaml"], trained_with=["cls"], read_with=["cls"])
    monkeypatch.setattr("ssl_vit_eval.study.run.locked", taken)
    assert run(["study", "study.yaml", "--out", "out"]) == 0
    assert "mae-cls-s0: another process works on it" in capsys.readouterr().out
    assert len(outcome("out")) == 2 * (1 + 2)


def test_what_a_failed_evaluation_leaves_is_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By one process at a time; and the failure is the end of it."""
    write(recipes=["mae.yaml"], trained_with=["cls"], read_with=["cls"])
    study = ["study", "study.yaml", "--out", "out"]

    def fail(*_: object) -> None:
        with locked(Path("out/cells/controls.lock"), wait=False) as free:
            assert not free
        raise Failure("a set cannot be had")

    with monkeypatch.context() as patched:
        patched.setattr("ssl_vit_eval.study.run._evaluate", fail)
        assert run(study) == 1
    assert not Path("out/report.html").exists()  # nothing to compare
    assert run(study) == 0
    Path("out/report.html").unlink()
    capsys.readouterr()
    monkeypatch.setattr("ssl_vit_eval.study.run._evaluate", fail)
    assert run(study) == 1
    assert errors(capsys) == ["ssl-vit: a set cannot be had"]
    assert Path("out/report.html").exists()


def test_token_sets_make_recipes_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    primary = {"recipe": "mae-r4", "data": "pictures", "protocol": "knn", "compare": ["gap", "register"]}
    arms = {"recipes": ["./mae.yaml"], "trained_with": ["gap", "register"], "read_with": ["trained"], "seeds": [3]}
    data = [{"source": "./pictures", "crop": 1}]
    written = write(**arms, tokens=[{"registers": 1}, {"registers": 4}], data=data, controls=["shuffled"], margin=2, primary=primary)
    assert run(["study", "study.yaml", "--out", "out", "--cell", "mae-r4-gap-s3"]) == 0
    (gap,) = (row for row in rows("out") if row["metric"] == "top1" and not row["control"])
    assert (gap["source"], gap["trained_with"], gap["read_with"]) == ("mae-r4-gap-s3", "gap", "gap")
    assert gap["transform"] == "resize16-crop100"
    assert run(["study", "study.yaml", "--out", "out", "--cell", "controls"]) == 0
    assert {row["source"] for row in rows("out")} == {"mae-r4-gap-s3", "pixels:16", "random:mae-r1", "random:mae-r4"}
    assert run(["study", "study.yaml", "--out", "out"]) == 0
    # metrics x plain and shuffled x (pixels + cells read as trained + starts read in both ways)
    assert len(outcome("out")) == 2 * 2 * (1 + 4 + 2 * 2)
    assert weights("out")["mae-r4-register-s3"]["backbone.vit.reg_token"].shape[1] == 4
    kept = yaml.safe_load(Path("out/study.yaml").read_text())
    assert {key: kept[key] for key in written} == written
    assert "mae-r1 gap" in capsys.readouterr().out

    assert run(["study", "study.yaml", "--out", "out", "--cell", "mae-r4-gap-s4"]) == 2
    assert "did you mean 'mae-r4-gap-s3'?" in errors(capsys)[0]
    write(**arms, tokens=[{"registers": 1}, {"registers": 4}], data=data, controls=["shuffled"], margin=1.5, primary=primary)
    assert run(["study", "study.yaml", "--out", "out"]) == 2
    assert "holds a study with other margin" in errors(capsys)[0]


def test_a_study_of_images_that_stream_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_vit.data.stream.MEMORY_LIMIT", 0)
    write(recipes=["mae.yaml"], trained_with=["cls"], read_with=["cls"])
    assert run(["study", "study.yaml", "--out", "out", "--cell", "mae-cls-s0"]) == 0
    assert run(["study", "study.yaml", "--out", "out"]) == 0


def test_a_study_with_a_changed_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write(recipes=["mae.yaml"], trained_with=["cls"])
    assert run(["study", "study.yaml", "--out", "out", "--cell", "mae-cls-s0"]) == 0
    Path("mae.yaml").write_text(Path("mae.yaml").read_text().replace("max_steps: 3", "max_steps: 4"))
    assert run(["study", "study.yaml", "--out", "out"]) == 2
    assert "was trained with another recipe (trainer.max_steps 3 -> 4)" in errors(capsys)[0]


def test_a_damaged_run_json_is_named_and_written_again(capsys: pytest.CaptureFixture[str]) -> None:
    write(recipes=["mae.yaml"], trained_with=["cls"], read_with=["cls"])
    cell, record = ["study", "study.yaml", "--out", "out", "--cell", "mae-cls-s0"], Path("out/cells/mae-cls-s0/run.json")
    assert run(cell) == 0
    before = json.loads(record.read_text())
    record.write_text("")
    assert run(cell) == 1
    assert errors(capsys)[0].startswith("ssl-vit: out/cells/mae-cls-s0/run.json cannot be read (")
    record.unlink()
    assert run(cell) == 0
    assert json.loads(record.read_text())["steps"] == before["steps"]


def test_a_cell_that_began_with_other_weights_than_its_study_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """As on a machine whose libraries draw other numbers."""
    write(recipes=["mae.yaml"], trained_with=["cls"], read_with=["cls"])
    Path("out").mkdir()
    Path("out/.study.yaml.17").touch()  # of a process that was killed
    assert run(["study", "study.yaml", "--out", "out", "--cell", "mae-cls-s0"]) == 0
    content = torch.load("out/cells/mae-cls-s0/last.ckpt", weights_only=True)
    content["ssl_vit"]["init"] = "others"
    torch.save(content, "out/cells/mae-cls-s0/last.ckpt")
    assert run(["study", "study.yaml", "--out", "out"]) == 1
    assert "out/cells/mae-cls-s0 was trained from other initial weights (others) than its study has here" in errors(capsys)[0]


def test_a_study_refuses_before_anything_trains(capsys: pytest.CaptureFixture[str]) -> None:
    primary = {"recipe": "mae", "data": "pictures", "protocol": "knn", "compare": ["cls", "gap"]}
    wrong: dict[str, dict[str, Any]] = {
        "did you mean 'gap'?": {"trained_with": ["cls", "gpa"]},
        "needs registers > 5, got 2": {"trained_with": ["register5"]},
        "needs registers > 7, got 2": {"read_with": ["register7"]},
        "unknown recipe 'mea.yaml'": {"recipes": ["mae.yaml", "mea.yaml"]},
        "unknown protocol 'nkn'": {"protocols": ["nkn"]},
        "unknown control 'widht'": {"controls": ["widht"]},
        "unknown suite 'smal'": {"suites": ["smal"]},
        "it has no data": {"data": []},
        "seeds is 0; give a list": {"seeds": 0},
        "seeds names 1 twice": {"seeds": [1, 1]},
        "trained_with is [1]; give a list of names": {"trained_with": [1]},
        "tokens is [{'register': 4}]; give": {"tokens": [{"register": 4}]},
        "margin is 0; give": {"margin": 0},
        "did you mean 'primary'?": {"primry": primary},
        "primary.recipe 'mea' is not in the study; did you mean 'mae'?": {"primary": {**primary, "recipe": "mea"}},
        "primary.data './pictures' is not": {"primary": {**primary, "data": "./pictures"}},
        "primary.protocol 'logreg' is not": {"primary": {**primary, "protocol": "logreg"}},
        "primary.compare 'register' is not": {"primary": {**primary, "compare": ["cls", "register"]}},
        "primary.compare 'cls' is not": {"primary": primary, "read_with": ["gap"]},
        "names 'cls' twice": {"primary": {**primary, "compare": ["cls", "cls@last1"]}},
        "no embedded set 'builtin:typo'": {"data": ["./pictures", "builtin:typo"]},
        "two recipes of the study are called 'mae-cls-s0'": {"recipes": ["mae.yaml", "./mae.yaml"]},
        "the arm cls+gap is not fair to cls: student.head.mlp.0.weight is [32, 48], not [32, 24]": {
            "recipes": ["dino.yaml"],
            "trained_with": ["cls", "cls+gap"],
        },
    }
    for message, change in wrong.items():
        write(**change)
        assert run(["study", "study.yaml", "--out", "out"]) == 2, message
        lines = errors(capsys)
        assert len(lines) == 1, message
        assert message in lines[0]
        assert not Path("out").exists()
    write()
    assert run(["study", "study.yaml", "--out", "pictures"]) == 2
    assert "already holds something else" in errors(capsys)[0]
    Path("out").mkdir()
    Path("out/study.yaml").write_text(yaml.safe_dump({**STUDY, "seeds": [1]}))
    assert run(["study", "study.yaml", "--out", "out"]) == 2
    assert "holds a study with other seeds" in errors(capsys)[0]

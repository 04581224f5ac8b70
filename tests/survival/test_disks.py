"""An output folder that is read-only, and a disk that is full, for every command: one line, a code that is not 0, and what was there stays.
With room again, the same command ends in what an undisturbed one does."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from ssl_vit.cli import run
from ssl_vit_eval.diagnostics.maps import save_maps
from ssl_vit_eval.rows import RowStore
from tests.conftest import errors
from tests.mounts import read_only, small_disk
from tests.processes import Command

pytestmark = pytest.mark.usefixtures("three_classes", "own_cache")
CPU = ("--trainer.accelerator", "cpu")
PRETRAIN = ("pretrain", "mae.yaml", *CPU, "--out")
EVAL = ("eval", "run/last.ckpt", "random:mae.yaml", "--data", "./pictures", "--protocols", "knn", "logreg", "--readouts", "gap", "cls")
KEPT = "what was there is kept; get the right to do so, or name another folder"
STUDY: dict[str, Any] = {
    "recipes": ["mae.yaml"],
    "trained_with": ["cls", "gap"],
    "seeds": [0],
    "data": ["./pictures"],
    "protocols": ["knn"],
    "read_with": ["cls", "gap"],
}


@pytest.fixture(autouse=True)
def _trained(three_classes: None) -> None:
    assert run([*PRETRAIN, "run"]) == 0
    Path("study.yaml").write_text(yaml.safe_dump(STUDY))


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def last_line(process: Command) -> str:
    assert process.wait() == 1, process.said
    assert "Traceback" not in process.said
    assert process.said.count("ssl-vit: ") == 1
    return process.said.splitlines()[-1]


@pytest.mark.survival
def test_a_read_only_folder() -> None:
    assert run([*PRETRAIN, "out/run"]) == 0
    assert run([*EVAL, "--out", "out/eval"]) == 0
    assert run(["study", "study.yaml", "--out", "out/study"]) == 0
    Path("out/empty").mkdir()
    before = contents("out")
    new = [[*PRETRAIN], [*EVAL, "--out"], ["study", "study.yaml", "--out"], ["quickstart", "--out"]]
    new += [["compare", "out/eval", "--out"], ["export", "run/last.ckpt", "--out"]]
    commands = [[*command, folder] for command in new for folder in ("out/new", "out/empty")]
    commands += [["pretrain", "dino.yaml", "--out", "out/run", *CPU, "--resume"], [*PRETRAIN, "out/run", "--resume"]]
    commands += [[*EVAL, "--diagnostics", "--out", "out/eval"], ["compare", "out/eval"], ["study", "study.yaml", "--out", "out/study"]]
    with read_only("out") as mounts:
        for command in commands:
            line = last_line(Command(*command, before=mounts.enter))
            assert line.startswith("ssl-vit: out/"), command
            assert "(Read-only file system); what was there is kept; get the right to do so, or name another folder" in line
        assert contents("out") == before
        # what reads alone
        assert Command(*EVAL, "--out", "out/eval", before=mounts.enter).wait() == 0
        assert Command("compare", "out/eval", "--out", "report", before=mounts.enter).wait() == 0


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM, errno.EBUSY])
def test_what_the_system_refuses_is_one_line(number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "run/.lock")

    monkeypatch.setattr("ssl_vit.train.pretrain.prepare_folder", refuse)
    assert run([*PRETRAIN, "run", "--resume"]) == 1
    (line,) = errors(capsys)
    assert line.startswith("ssl-vit: run/.lock cannot be ")
    assert line.endswith(f"written ({os.strerror(number)}); {KEPT}")


@pytest.mark.parametrize("command", [PRETRAIN, (*EVAL, "--out")])
def test_it_is_said_before_any_work(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Reading the images may take an hour."""
    access = os.access
    monkeypatch.setattr("os.access", lambda path, mode, **how: mode != os.W_OK and access(path, mode, **how))
    monkeypatch.setattr("ssl_vit.data.records.Records.encoded_rows", pytest.fail)
    monkeypatch.setattr("ssl_vit.data.records.Records.readable_rows", pytest.fail)
    assert run([*command, "new/run"]) == 1
    assert errors(capsys)[0].startswith("ssl-vit: new/run cannot be read or written (Permission denied); ")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="a file's name is asked of Linux")
@pytest.mark.parametrize(
    ("command", "file"),
    [(EVAL, "rows.jsonl"), (("export", "run/last.ckpt"), "config.json"), (("export", "run/last.ckpt"), "model.safetensors")],
)
def test_the_file_that_finds_no_room_is_named(
    command: list[str], file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fsync = os.fsync
    monkeypatch.setattr("os.fsync", lambda opened: full() if file in os.readlink(f"/proc/self/fd/{opened}") else fsync(opened))
    assert run([*command, "--out", "out"]) == 1
    (line,) = errors(capsys)
    assert line.startswith("ssl-vit: disk full: ")
    assert line.endswith(f"/{file} cannot be written, what was there is kept; make room, and the same command goes on")
    assert not RowStore("out").measured()  # all rows of an evaluation, or none


def test_a_figure_that_finds_no_room_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = tmp_path / "maps.png"
    figure.write_bytes(b"the one before")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_maps(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), {"a": torch.ones(1, 4)}, figure)
    assert contents(str(tmp_path))[str(figure)] == b"the one before"


def rows(folder: str) -> dict[str, tuple[float, str | None]]:
    measured = RowStore(folder).measured()
    assert len({row.id for row in measured}) == len(measured)
    return {row.id: (row.value, row.predictions_hash) for row in measured}


def pages(folder: str) -> dict[str, bytes]:
    return {str(Path(name).relative_to(folder)): content for name, content in contents(folder).items()}


def trained(folder: str) -> dict[str, Any]:
    cells = {file.parent.name: torch.load(file, weights_only=True)["state_dict"] for file in Path(folder).glob("cells/*/last.ckpt")}
    return {"rows": rows(f"{folder}/eval"), **{f"{cell}.{key}": value.tolist() for cell, of in cells.items() for key, value in of.items()}}


COMPARE, EXPORT = ("compare", "whole", "--out"), ("export", "run/last.ckpt", "--out")
CACHED = (*EVAL, "--cache", "cache")
CASES: list[tuple[tuple[str, ...], str, Callable[[str], object]]] = [
    ((*CACHED, "--out"), "8k", rows),  # the first predictions
    ((*CACHED, "--out"), "40k", rows),
    ((*CACHED, "--out"), "44k", rows),
    ((*CACHED, "--diagnostics", "--out"), "60k", rows),
    ((*CACHED, "--diagnostics", "--out"), "140k", rows),
    (COMPARE, "12k", pages),
    (COMPARE, "100k", pages),
    (EXPORT, "4k", pages),
    (EXPORT, "60k", pages),
    (("study", "study.yaml", "--out"), "200k", trained),
    (("study", "study.yaml", "--out"), "640k", trained),
]


@pytest.mark.survival
@pytest.mark.parametrize(("command", "size", "what"), CASES, ids=[f"{command[0]}-{size}" for command, size, _ in CASES])
def test_a_full_disk(command: tuple[str, ...], size: str, what: Callable[[str], object]) -> None:
    assert run([*CACHED, *(("--diagnostics",) if "--diagnostics" in command else ()), "--out", "whole"]) == 0
    if command[0] != "eval":
        assert run([*command, "expected"]) == 0
    expected = what("whole" if command[0] == "eval" else "expected")
    with small_disk("full", size) as mounts:
        line = last_line(Command(*command, "full/out", before=mounts.enter))
        assert line.startswith("ssl-vit: disk full: full/")
        assert line.endswith(" cannot be written, what was there is kept; make room, and the same command goes on")
        mounts.sh("mount -o remount,size=100m full")
        process = Command(*command, "full/out", before=mounts.enter)
        assert process.wait() == 0, process.said
        mounts.sh("cp -r full/out copy")
    assert what("copy") == expected
    assert not [name for name in contents("copy") if "partial" in name]


def keep_little_and_know_of_much() -> None:
    from ssl_vit.data import memory_map

    memory_map.SMALL = 0
    memory_map.shutil.disk_usage = lambda _: SimpleNamespace(free=2**40)  # type: ignore[assignment, misc]


class Both:
    def __init__(self, *steps: Callable[[], None]) -> None:
        self.steps = steps

    def __call__(self) -> None:
        for step in self.steps:
            step()


@pytest.mark.survival
@pytest.mark.parametrize("what", ["decoded images", "features"])
def test_a_full_disk_of_a_cache(what: str) -> None:
    """Filled by someone else, after it was asked how much room there is."""
    with small_disk("full", "12k") as mounts:
        before = Both(mounts.enter, keep_little_and_know_of_much)
        command = [*PRETRAIN, "out"] if what == "decoded images" else [*EVAL, "--cache", "full/cache", "--out", "out"]
        line = last_line(Command(*command, before=before, SSL_VIT_CACHE="full/decoded" if what == "decoded images" else "decoded"))
        if what == "decoded images":
            assert line.startswith("ssl-vit: full/decoded/")
            assert line.endswith("cannot be written: No space left on device; make room, or name another folder in SSL_VIT_CACHE")
            assert not Path("out").exists()
        else:
            assert line.startswith("ssl-vit: disk full: full/cache/")
        mounts.sh("mount -o remount,size=100m full && cp -r full copy")
        assert not [name for name in contents("copy") if Path(name).suffix in (".partial", ".images", ".features")]
        process = Command(*command, before=before, SSL_VIT_CACHE="full/decoded")
        assert process.wait() == 0, process.said

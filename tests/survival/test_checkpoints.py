"""Checkpoints are whole or absent, the last two are kept, and a damaged one is named and never used."""

import errno
import json
import logging
import os
import random
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_vit.cli import run
from ssl_vit.errors import Failure
from ssl_vit.files import write_atomically
from ssl_vit.methods import Method
from ssl_vit.train.folder import checkpoints, is_finished, keep, prepare_folder
from ssl_vit.weights.checkpoint import read_checkpoint
from tests.conftest import errors
from tests.processes import Command, ranks
from tests.survival.test_signals import slow_down

pytestmark = pytest.mark.usefixtures("pictures_and_recipes")
CPU = ("--trainer.accelerator", "cpu")
EVERY = ("--checkpoint_seconds", "1e-6")  # one after each step


def pretrain(out: str, *options: str) -> int:
    return run(["pretrain", "mae.yaml", "--out", out, *CPU, *options])


def state(file: str) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(file)["state_dict"])


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def killed(out: str, after: int = 4, *options: str) -> None:
    """A run of 7 steps whose process ends at step `after` + 1, with checkpoints of the two steps before."""
    process = Command("pretrain", "mae.yaml", "--out", out, *CPU, *EVERY, *options, before=kill_at_step_5)
    assert process.wait() == -signal.SIGKILL, process.said


def kill_at_step_5() -> None:
    original = Method.on_before_optimizer_step

    def fatal(self: Method, optimizer: Any) -> None:
        if self.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, optimizer)

    Method.on_before_optimizer_step = fatal  # type: ignore[method-assign]


def test_the_last_two_are_kept_and_the_interval_is_no_part_of_the_recipe() -> None:
    killed("run")
    assert [read_checkpoint(f"run/{name}.ckpt")["global_step"] for name in ("previous", "last")] == [3, 4]
    assert pretrain("run", "--resume", "--checkpoint_seconds", "900") == 0
    assert [read_checkpoint(f"run/{name}.ckpt")["global_step"] for name in ("previous", "last")] == [4, 7]
    assert pretrain("whole") == 0
    assert not Path("whole/previous.ckpt").exists()
    assert equal(state("run/last.ckpt"), state("whole/last.ckpt"))
    read = [json.loads(Path(folder, "run.json").read_text())["recipe_hash"] for folder in ("run", "whole")]
    assert read[0] == read[1]


def test_the_last_two_are_of_two_steps_at_the_end_too() -> None:
    assert pretrain("run", *EVERY) == 0
    assert [read_checkpoint(f"run/{name}.ckpt")["global_step"] for name in ("previous", "last")] == [6, 7]


def test_the_interval_is_kept_by_slow_steps() -> None:
    process = Command("pretrain", "mae.yaml", "--out", "run", *CPU, "--checkpoint_seconds", "0.5", before=take_half_a_second)
    process.wait_for("run/last.ckpt", seconds=60)
    assert read_checkpoint("run/last.ckpt")["global_step"] <= 2


def take_half_a_second() -> None:
    slow_down(0.6)


def test_file_and_folder_are_synced_around_the_rename(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a power cut would undo cannot be tried: only that the system is asked, and when."""
    done, fsync, replace = list[str](), os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), replace(*names)))
    write_atomically(tmp_path / "file", "content")
    assert done == ["sync file", "rename", "sync folder"]


@pytest.mark.parametrize("links", [True, False])
def test_last_ckpt_is_never_missing_while_it_becomes_the_previous_one(links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at any moment where the file system has second names for a file; without them it is kept as well. A kill left the third file."""
    for name, content in (("last.ckpt", b"new"), ("previous.ckpt", b"old"), (".previous.ckpt.partial", b"half")):
        Path(name).write_bytes(content)
    there, replace = list[bool](), os.replace

    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "replace", lambda *names: (replace(*names), there.append(Path("last.ckpt").exists())))
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    keep(Path("last.ckpt"))
    assert Path("previous.ckpt").read_bytes() == b"new"
    assert there == [links]


def test_a_folder_that_cannot_be_synced_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "open", refused)
    write_atomically(Path("file"), "content")
    assert Path("file").read_text() == "content"


def test_the_newest_checkpoint_comes_first() -> None:
    names = ["last.ckpt", "previous.ckpt", "epoch-10000.ckpt", "epoch-9999.ckpt", "epoch-0009.ckpt"]
    for name in reversed(names):
        Path(name).touch()
    assert [path.name for path in checkpoints(Path())] == names


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a flipped bit": lambda data: flipped(data, data.index(a_weight()) + 101, 4),
    "a block of zeros": lambda data: data[:4096] + bytes(4096) + data[8192:],
}


def a_weight() -> bytes:
    return next(value for value in state("run/last.ckpt").values() if value.numel() > 200).numpy().tobytes()


def flipped(data: bytes, byte: int, bit: int) -> bytes:
    return data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]


FAST = "a flipped bit"


@pytest.mark.parametrize("damage", [FAST, *(pytest.param(d, marks=pytest.mark.survival) for d in DAMAGES if d != FAST)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    damage: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    killed("run")
    damaged = DAMAGES[damage](Path("run/last.ckpt").read_bytes())  # type: ignore[no-untyped-call]
    for file in ("run/last.ckpt", "alone.ckpt"):
        Path(file).write_bytes(damaged)
    for command in (["export", "alone.ckpt", "--out", "exported"], ["eval", "alone.ckpt", "--data", "builtin:photos-new"]):
        assert run(command) == 1
        assert errors(capfd)[0].startswith("ssl-vit: alone.ckpt is not a readable checkpoint (")
    assert pretrain("run", "--resume", "auto") == 0
    assert "run/last.ckpt cannot be read (" in caplog.text
    assert ") and is now last.ckpt.damaged: going on from run/previous.ckpt of step 3" in caplog.text
    assert Path("run/last.ckpt.damaged").read_bytes() == damaged
    assert pretrain("whole") == 0
    assert equal(state("run/last.ckpt"), state("whole/last.ckpt"))
    assert json.loads(Path("run/run.json").read_text())["steps"] == 7


@pytest.mark.survival
def test_a_finished_run_whose_last_checkpoint_is_damaged_is_finished_again() -> None:
    killed("run")
    assert pretrain("run", "--resume") == 0
    whole = state("run/last.ckpt")
    Path("run/last.ckpt").write_bytes(b"")
    assert pretrain("run", "--resume") == 0
    assert equal(state("run/last.ckpt"), whole)


def test_a_file_without_checksums_is_said_to_be_one() -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(2)}, "other.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(Failure, match=r"or it was written without checksums \(torch\.serialization\.set_crc32_options\)"):
        read_checkpoint("other.pth")


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_whether_a_run_is_finished_depends_on_no_other_process(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, while and after the first process repairs `last.ckpt`: not finished, and there is something to go on from."""
    killed("run")
    Path("run/run.json").touch()
    assert is_finished(Path("run"))
    damaged = Path("run/last.ckpt")
    damaged.unlink() if damage == "missing" else damaged.write_bytes(b"")
    recipe, replace = read_checkpoint("run/previous.ckpt")["ssl_vit"]["recipe"], os.replace
    found = list[tuple[bool, bool]]()

    def look(*names: Any) -> None:
        if names:
            replace(*names)
        found.append((is_finished(Path("run")), bool(checkpoints(Path("run")))))

    look()
    monkeypatch.setattr(os, "replace", look)
    prepare_folder(Path("run"), recipe)
    look()
    assert found == [(False, True)] * (4 if damage == "damaged" else 3)
    assert read_checkpoint("run/last.ckpt")["global_step"] == 3


def test_a_finished_run_without_its_checkpoints_stays_finished() -> None:
    assert pretrain("run") == 0
    Path("run/last.ckpt").unlink()
    assert pretrain("run", "--resume") == 0
    assert not Path("run/last.ckpt").exists()


def late(rank: int) -> None:
    """This rank looks at the folder, and prepares it, after the other one."""
    if os.environ["RANK"] == f"{rank}":
        time.sleep(4)


@pytest.mark.survival
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_two_ranks_go_on_from_the_checkpoint_before(damage: str, rank: int) -> None:
    killed("run")
    if damage == "missing":
        Path("run/last.ckpt").unlink()
    else:
        assert pretrain("run", "--resume") == 0  # finished
        Path("run/last.ckpt").write_bytes(b"")
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--resume", "auto")
    for process in ranks(2, "pretrain", "mae.yaml", "--out", "run", *CPU, *two, before=partial(late, rank)):
        assert process.wait(90) == 0, process.said
    assert json.loads(Path("run/run.json").read_text())["steps"] == 7
    assert read_checkpoint("run/last.ckpt")["global_step"] == 7


@pytest.mark.survival
def test_without_any_that_can_be_read_nothing_is_trained(capfd: pytest.CaptureFixture[str]) -> None:
    killed("run")
    for name in ("last", "previous"):
        Path(f"run/{name}.ckpt").write_bytes(b"x")
    assert pretrain("run", "--resume", "auto") == 1
    assert errors(capfd)[0].startswith("ssl-vit: run/last.ckpt is not a readable checkpoint (")


@pytest.mark.survival
def test_a_flipped_bit_anywhere_is_found_or_changes_nothing() -> None:
    """300 bits, and every byte of the file's directory and of its records' heads near the end."""
    killed("run")
    data, whole = Path("run/last.ckpt").read_bytes(), state("run/last.ckpt")
    chance, found = random.Random(0), 0
    for byte in [chance.randrange(len(data)) for _ in range(300)] + [*range(len(data) - 300, len(data), 3)]:
        Path("flipped.ckpt").write_bytes(flipped(data, byte, chance.randrange(8)))
        try:
            content = state("flipped.ckpt")
        except Failure:
            found += 1
        else:
            assert equal(content, whole), byte
    assert found > 150


def full_after_step_3() -> None:
    """From step 4 on there is no room for a checkpoint: the system says so in the middle of the file."""
    original, save = Method.on_before_optimizer_step, torch.save
    full = [False]

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 20_000

        def write(self, data: Any) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(self.file.write(data))

        def flush(self) -> None:
            self.file.flush()

    def fill(self: Method, optimizer: Any) -> None:
        full[0] = self.global_step >= 3
        original(self, optimizer)

    def save_some(content: Any, file: Any) -> None:
        save(content, Full(file) if full[0] else file)

    Method.on_before_optimizer_step, torch.save = fill, save_some  # type: ignore[method-assign, assignment]


def test_a_full_disk_keeps_the_last_good_checkpoint() -> None:
    process = Command("pretrain", "mae.yaml", "--out", "run", *CPU, *EVERY, before=full_after_step_3)
    assert process.wait() == 1
    line = process.said.splitlines()[-1]
    assert line == "ssl-vit: disk full: run/last.ckpt cannot be written, what was there is kept; make room, and go on with --resume"
    assert "Traceback" not in process.said
    assert [read_checkpoint(f"run/{name}.ckpt")["global_step"] for name in ("previous", "last")] == [2, 3]
    assert not list(Path("run").glob(".*.partial"))
    assert pretrain("run", "--resume", "auto") == 0
    assert pretrain("whole") == 0
    assert equal(state("run/last.ckpt"), state("whole/last.ckpt"))


MOUNT = 'mkdir full && mount -t tmpfs -o size=600k none full && exec "$@"'


@pytest.mark.survival
def test_a_disk_that_is_really_full() -> None:
    """A file system of 600 KB in a name space of its own, where the system lets us have one."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no name spaces here")
    ours = [str(Path(sys.executable).parent / "ssl-vit"), "pretrain", "mae.yaml", "--out", "full/run", *CPU, *EVERY]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", MOUNT, "sh", *ours, "--trainer.max_steps", "1000"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("ssl-vit: disk full: full/run/"), done.stderr
    assert "Traceback" not in done.stderr


def test_what_was_logged_behind_the_checkpoint_is_logged_again() -> None:
    log = ("--trainer.log_every_n_steps", "1")
    killed("run", 4, *log)
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # which the kill has cut
    assert pretrain("run", "--resume", *log) == 0
    assert [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6, 7]


def test_stale_partial_files_go_at_the_next_start() -> None:
    killed("run")
    for name in (".last.ckpt.partial", ".metrics.jsonl.partial", ".previous.ckpt.partial"):
        Path("run", name).write_bytes(b"half")
    assert pretrain("run", "--resume") == 0
    assert not list(Path("run").glob(".*.partial"))
    Path("new").mkdir()
    Path("new/.recipe.yaml.partial").touch()
    assert pretrain("new") == 0
    assert not list(Path("new").glob(".*.partial"))


@pytest.mark.survival
def test_a_kill_during_a_save_leaves_no_unreadable_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of 60 MB after every step, and the temporary folder on another file system."""
    if Path("/dev/shm").is_dir():
        monkeypatch.setenv("TMPDIR", "/dev/shm")
    options = ("--backbone.width", "240", "--backbone.depth", "6", "--trainer.max_steps", "1000")
    moments, caught = random.Random(0), 0
    for _ in range(20):
        process = Command("pretrain", "mae.yaml", "--out", "run", *CPU, *EVERY, *options, "--resume", "auto")
        process.wait_for("run/.last.ckpt.partial")
        time.sleep(moments.uniform(0.0, 0.3))
        process.send(signal.SIGKILL)
        process.wait()
        caught += Path("run/.last.ckpt.partial").exists()
        for file in Path("run").glob("*.ckpt"):
            read_checkpoint(file)
    assert caught >= 3
    assert read_checkpoint("run/last.ckpt")["global_step"] > 0


def test_a_second_process_is_refused_while_the_first_lives() -> None:
    first = Command("pretrain", "mae.yaml", "--out", "run", *CPU, *EVERY, "--trainer.max_steps", "100000", before=slow_down)
    first.wait_for("run/last.ckpt")
    second = Command("pretrain", "mae.yaml", "--out", "run", *CPU, "--trainer.max_steps", "100000", "--resume")
    assert second.wait(60) == 2
    line = "ssl-vit: another process is training in run; wait until it has ended, or name another folder with --out"
    assert second.said.splitlines() == [line]
    assert first.running
    first.send(signal.SIGKILL)
    first.wait()
    before = Path("run/last.ckpt").stat().st_mtime_ns
    third = Command("pretrain", "mae.yaml", "--out", "run", *CPU, *EVERY, "--trainer.max_steps", "100000", "--resume")
    until = time.monotonic() + 60
    while Path("run/last.ckpt").stat().st_mtime_ns == before:
        assert third.running, third.said
        assert time.monotonic() < until
        time.sleep(0.05)

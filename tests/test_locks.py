"""Locks end with their process, and rows that several processes append at once are all there, whole, whoever is killed."""

import errno
import fcntl
import json
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ssl_vit.files import locked
from ssl_vit_eval.rows import Row, RowStore
from tests.planted import plant
from tests.processes import FORK

RIGHT = torch.arange(300) % 2


def append(folder: Path, first: int, count: int) -> None:
    store = RowStore(folder)
    for number in range(first, first + count):
        plant(store, RIGHT, checkpoint=f"weights {number}")


@pytest.mark.filterwarnings("ignore:.*the last line was cut short")
def test_rows_of_several_processes_are_all_there(tmp_path: Path) -> None:
    count = 12
    plant(RowStore(tmp_path), RIGHT, selected={"much": "x" * 10_000_000})  # an append reads the file: the longer, the likelier two meet
    writers = [FORK.Process(target=append, args=(tmp_path, count * number, count)) for number in range(2)]
    doomed = {number: FORK.Process(target=append, args=(tmp_path, number, 1000)) for number in (1000, 2000)}
    for process in (*doomed.values(), *writers):
        process.start()
    store, moments = RowStore(tmp_path), random.Random(0)
    for number, process in doomed.items():
        while not store.file.exists() or f"weights {number}" not in store.file.read_text():
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.1))
        os.kill(process.pid or 0, signal.SIGKILL)
    for process in (*writers, *doomed.values()):
        process.join()
    assert [process.exitcode for process in writers] == [0, 0]
    plant(store, RIGHT, checkpoint="last")  # clears away what a kill has cut
    lines = [json.loads(line) for line in store.file.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    found = {row.checkpoint for row in store.rows()}
    assert {f"weights {number}" for number in range(2 * count)} | {"weights 1000", "weights 2000", "last"} <= found
    for row in store.rows():
        assert store.predictions(row)[1].tolist() == [number % 3 for number in range(300)]


def test_rows_are_written_under_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for the end of the last line must be alone: it cuts off what follows."""
    add, held = RowStore._add, list[bool]()

    def look(self: RowStore, rows: Sequence[Row]) -> None:
        with locked(tmp_path / "rows.lock", wait=False) as free:
            held.append(not free)
        add(self, rows)

    monkeypatch.setattr(RowStore, "_add", look)
    store = RowStore(tmp_path)
    plant(store, RIGHT, checkpoint="weights")
    store.declare("data", "top1")
    assert held == [True, True]


def hold(lock: Path) -> None:
    with locked(lock) as mine:
        assert mine
        lock.with_name("held").touch()
        time.sleep(600)


def test_a_lock_is_exclusive_and_ends_with_its_process(tmp_path: Path) -> None:
    lock = tmp_path / "cells" / "a.lock"
    process = FORK.Process(target=hold, args=(lock,))
    process.start()
    while not lock.with_name("held").exists():
        time.sleep(0.01)
    with locked(lock, wait=False) as mine:
        assert not mine
    os.kill(process.pid or 0, signal.SIGKILL)
    with locked(lock) as mine:  # waits for the process to be gone
        assert mine
        with locked(lock, wait=False) as again:
            assert not again
    with locked(lock, wait=False) as mine:
        assert mine


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_said(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock", wait=False) as mine:
        assert mine
    assert "nothing guards the folder against a second process" in caplog.text
    with pytest.raises(OSError, match=os.strerror(number)), locked(tmp_path / "lock"):
        pass


def hold_with_child(lock: Path) -> None:
    with locked(lock):
        if child := os.fork():
            lock.with_name("child").write_text(str(child))
            os.rename(lock.with_name("child"), lock.with_name("held"))
        time.sleep(600)


def test_a_child_does_not_keep_the_lock_of_its_killed_parent(tmp_path: Path) -> None:
    """As a data worker, which may live on for a while."""
    process = FORK.Process(target=hold_with_child, args=(tmp_path / "lock",))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    time.sleep(0.2)  # the child has let go
    process.kill()
    process.join()
    child = int((tmp_path / "held").read_text())
    try:
        os.kill(child, 0)  # is there
        with locked(tmp_path / "lock", wait=False) as mine:
            assert mine
    finally:
        os.kill(child, signal.SIGKILL)

"""Images in a file that processes share: equal to decoding one by one, whole or absent, the memory of one for all."""

import errno
import multiprocessing
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data import memory_map
from ssl_vit.data.identity import describe_change
from ssl_vit.data.sources import load_split
from ssl_vit.errors import Failure
from tests.processes import FORK

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(autouse=True)
def _mapped_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 noisy images of two shapes and a panorama; every set goes to the disk."""
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memory_map, "SMALL", 0)
    rng = np.random.default_rng(0)
    (tmp_path / "set").mkdir()
    for i in range(40):
        shape = (500, 20_000, 3) if i == 7 else (40, 60 + i % 2, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "set" / f"{i:02}.png", compress_level=1)


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("processes", [0, 2])
def test_the_file_holds_the_pixels_and_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.setattr(memory_map, "workers", lambda: processes)
    first = load_split(str(tmp_path / "set"), "train", progress=False).images
    for i in range(40):
        expected = np.asarray(Image.open(tmp_path / "set" / f"{i:02}.png"))
        assert (first[i].permute(1, 2, 0).numpy() == expected).all()
    monkeypatch.setattr(memory_map, "decode", None)  # nothing is decoded again
    again = load_split(str(tmp_path / "set"), "train", progress=False).images
    assert torch.equal(again.batch(torch.tensor([3, 0]))[0], first.batch(torch.tensor([3, 0]))[0])
    assert len(left(tmp_path)) == 1


def test_a_file_that_is_not_whole_is_not_read(tmp_path: Path) -> None:
    file, image = tmp_path / "file", np.ones((3, 4, 5), dtype=np.uint8)
    with file.open("wb") as target:
        memory_map._write(target, iter([image, image]))
    assert memory_map._mapped(file, 2) is not None
    whole = file.read_bytes()
    turned = np.array([[4, 5], [-4, -5]], dtype="<i8").tobytes()  # as many pixels
    for damaged in (b"", whole[:20], whole[:-1], whole + b"x", whole[:-32] + turned):
        file.write_bytes(damaged)
        assert memory_map._mapped(file, 2) is None


def test_what_another_decoder_made_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_split(str(tmp_path / "set"), "train", progress=False)
    monkeypatch.setattr(memory_map, "DECODER", memory_map.DECODER + 1)
    load_split(str(tmp_path / "set"), "train", progress=False)
    assert len(left(tmp_path)) == 2


def test_small_sets_are_decoded_alike_without_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)  # a log has no bar
    mapped = load_split(str(tmp_path / "set"), "train", progress=False).images
    (tmp_path / "cache" / left(tmp_path)[0]).unlink()
    assert "decoding set: train: 100%" in capsys.readouterr().err  # whichever process has the lock shows the bar
    monkeypatch.setattr(memory_map, "SMALL", 2**40)
    small = load_split(str(tmp_path / "set"), "train").images
    assert all(torch.equal(small[i], mapped[i]) for i in range(40))
    assert left(tmp_path) == []
    assert "decoding set: train: 100%" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: BinaryIO, images: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(memory_map, "_write", full)
    with pytest.raises(Failure, match=r"cannot be written: No space left on device; make room, or name another folder"):
        load_split(str(tmp_path / "set"), "train", progress=False)
    assert left(tmp_path) == []


def test_a_disk_without_room_is_told_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=3000))
    monkeypatch.setattr(memory_map, "_write", pytest.fail)
    with pytest.raises(Failure, match=r"needs about 0\.0 GiB, and 0\.0 GiB are free there; make room, name another folder"):
        load_split(str(tmp_path / "set"), "train", progress=False)


def test_corrupt_images_are_named_in_every_run_and_a_cut_file_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory_map, "workers", lambda: 1)
    source = str(tmp_path / "set")
    whole = load_split(source, "train", progress=False).images[39].clone()
    file = tmp_path / "cache" / left(tmp_path)[0]
    file.write_bytes(file.read_bytes()[:-100])
    assert torch.equal(load_split(source, "train", progress=False).images[39], whole)
    bad = tmp_path / "set" / "05.png"
    bad.write_bytes(bad.read_bytes()[:200])
    for _ in range(2):  # decoded, and found
        images = load_split(source, "train", progress=True).images
        assert (images.sizes[:, 0] == 0).nonzero().tolist() == [[5]]
        assert torch.equal(images[39], whole)
        [record] = caplog.records
        assert "row 5 (05.png) is corrupt" in record.getMessage()
        caplog.clear()
    assert len(left(tmp_path)) == 2
    for row in (4, 6, 8):
        (tmp_path / "set" / f"{row:02}.png").write_bytes(b"")
    with pytest.raises(Failure, match=r"4 of 40 images cannot be read, more than 1%; the last one: .* row 8 \(08\.png\) is empty"):
        load_split(source, "train", progress=False)
    assert len(left(tmp_path)) == 2


def _as_here(tmp_path: Path) -> None:
    os.environ["SSL_VIT_CACHE"], memory_map.SMALL = str(tmp_path / "cache"), 0


def _rank(tmp_path: Path, barrier: Any, results: Any) -> None:
    _as_here(tmp_path)
    images = load_split(str(tmp_path / "set"), "train", progress=False).images
    int(images._pixels.sum())  # every page is in use
    barrier.wait()
    (entry,) = re.findall(r"[^\n]*\.images\n(?:[A-Z]\w+: [^\n]*\n)+", Path("/proc/self/smaps").read_text())
    results.put({key: int(re.search(rf"^{key}: +(\d+)", entry, re.M)[1]) for key in ("Rss", "Pss", "Private_Dirty")})  # type: ignore[index]
    barrier.wait()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says whose the pages are")
def test_ranks_wait_for_one_and_share_its_pages(tmp_path: Path) -> None:
    barrier, results = FORK.Barrier(3), FORK.Queue()
    ranks = [FORK.Process(target=_rank, args=(tmp_path, barrier, results)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert len(left(tmp_path)) == 1
    for memory in found:
        assert memory["Rss"] > 28_000  # KiB: the panorama alone has 29,297
        assert memory["Pss"] < memory["Rss"] / 2.5
        assert memory["Private_Dirty"] == 0


def test_a_change_is_named(tmp_path: Path) -> None:
    def now() -> dict[str, Any]:
        return load_split(str(tmp_path / "set"), "train", progress=False).identity

    before = now()
    assert describe_change(before, now()) == ""
    Image.new("RGB", (9, 9)).save(tmp_path / "set" / "03b.png")
    assert describe_change(before, now()) == "40 images -> 41, the first that differs is 03b.png"
    (tmp_path / "set" / "03b.png").unlink()
    (tmp_path / "set" / "39.png").rename(tmp_path / "39.png")
    assert describe_change(before, now()) == "40 images -> 39, those from 39.png on are gone"
    Image.new("RGB", (9, 9)).save(tmp_path / "set" / "39.png")
    assert describe_change(before, now()) == "40 images as before, the first that differs is 39.png"


def _stopped_writer(tmp_path: Path) -> None:
    """It writes one image and waits, while the others fill the workers' pipe."""

    def half(file: BinaryIO, images: Any) -> None:
        file.write(next(images).data)
        file.flush()
        time.sleep(1000)

    _as_here(tmp_path)
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own: workers inherit the lock
    memory_map.workers, memory_map._write = lambda: 2, half  # type: ignore[assignment]
    load_split(str(tmp_path / "set"), "train", progress=False)


def test_the_lock_of_a_killed_writer_is_free(tmp_path: Path) -> None:
    writer = FORK.Process(target=_stopped_writer, args=(tmp_path,))
    writer.start()
    deadline = time.monotonic() + 100
    while not (tmp_path / "cache").exists() or not any(path.stat().st_size for path in (tmp_path / "cache").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)  # let the pipe fill; without it the test proves less, and passes
    writer.kill()
    writer.join()
    images = load_split(str(tmp_path / "set"), "train", progress=False).images  # waits for the lock
    assert images.sizes.shape == (40, 2)
    assert [Path(name).suffix for name in left(tmp_path)] == [".images"]

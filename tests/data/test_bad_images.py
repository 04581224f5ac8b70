"""What a user may meet on the way: damaged and absent images, full disks, killed workers and runs; counted, exact, in one line."""

import itertools
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from ssl_vit.data import memory_map
from ssl_vit.data.loader import CropDataset, Order, told_of_lost_workers
from ssl_vit.data.sources import load_split, mean_bytes, open_records
from ssl_vit.data.stream import Stream, WorkerStream
from ssl_vit.errors import Failure
from ssl_vit.train.callbacks import RunFolder
from ssl_vit.weights.checkpoint import read_checkpoint
from tests.data.test_stream import CPU, CROPS, broken, dataset, equal_weights, jpeg, jpegs, pretrain, take
from tests.processes import Command

__all__ = ["jpegs"]
pytestmark = [pytest.mark.usefixtures("jpegs", "own_cache"), pytest.mark.filterwarnings("ignore:This DataLoader will create")]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ssl-vit: ")]
    return line


@pytest.fixture(params=["memory", "stream"])
def decode(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both data paths; in memory, by way of the file that processes share."""
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memory_map, "SMALL", 0)
    return str(request.param)


def test_memory_replaces_the_images_that_the_stream_replaces() -> None:
    order = dataset().order
    for row in order.rows(torch.tensor([8, 9])).tolist():  # side by side in the first epoch
        broken(row)
    Path("jpegs/59.jpg").unlink()
    Path("jpegs/59.jpg").symlink_to("gone.jpg")
    stream, memory = WorkerStream(dataset(), 0), Stream(load_split("./jpegs", "train", progress=False).images, order)
    pairs = list(zip(take(stream, 6), memory, strict=False))
    assert all(torch.equal(a.sizes, b.sizes) and torch.equal(a.positions, b.positions) for a, b in pairs)
    assert memory.replaced == stream.replaced >= 6


def test_replaced_images_are_counted_over_a_resume(decode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in (3, 40):
        broken(row)
    options = ("mae.yaml", "--data.decode", decode, "--out")
    assert pretrain(*options, "whole") == 0
    original = RunFolder.on_train_batch_end

    def interrupted(self: RunFolder, trainer: object, *args: object) -> None:
        self.signals.received = signal.SIGINT * (trainer.global_step == 4)  # type: ignore[attr-defined]
        original(self, trainer, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(RunFolder, "on_train_batch_end", interrupted)
    assert pretrain(*options, "cut") == 130
    monkeypatch.setattr(RunFolder, "on_train_batch_end", original)
    assert pretrain(*options, "cut", "--resume") == 0
    assert equal_weights("whole", "cut")
    counts = [json.loads(Path(f"{run}/run.json").read_text())["replaced"] for run in ("whole", "cut")]
    assert counts[0] == counts[1] >= 4  # two whole epochs


def test_a_corrupt_header_does_not_stop_the_estimate() -> None:
    records = open_records("./jpegs", "train")
    before = mean_bytes(records, None)
    Path("jpegs/10.jpg").write_bytes(b"<html>")
    Path("jpegs/11.jpg").unlink()
    assert abs(mean_bytes(records, None) / before - 1) < 0.02
    for file in Path("jpegs").iterdir():
        file.write_bytes(b"")
    with pytest.raises(Failure, match=r"none of 60 images .* can be read, the last one: "):
        mean_bytes(records, None)


def test_a_start_that_fails_leaves_no_run(decode: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("mae.yaml", "--out", "run", "--data.decode", decode)
    assert pretrain(*options, "--data.batch_size", "61") == 2
    assert "data.batch_size is 61, but ./jpegs holds 60 images; lower it" in error_line(capsys)
    assert not Path("run/recipe.yaml").exists()
    assert not (tmp_path / "cache").exists()  # refused before anything was decoded
    for row in range(0, 60, 2):
        broken(row)
    for _ in range(2):  # the second start is not asked for --resume
        assert pretrain(*options) == 1
        assert "cannot be read, more than 1%" in error_line(capsys)
        assert not Path("run/recipe.yaml").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_micro_batches_of_a_step_are_its_batch(workers: int) -> None:
    records = open_records("./jpegs", "train")
    halves = CropDataset(records, Order(60, 20, 5, accumulate=2), CROPS.plan)
    whole, parts = take(WorkerStream(dataset(), 0), 4), take(WorkerStream(halves, workers), 8)
    images = load_split("./jpegs", "train", progress=False).images
    stored = zip(Stream(images, Order(60, 20, 5)), *[iter(Stream(images, halves.order))] * 2, range(4), strict=False)
    for one, first, second, (a, b, c, _) in zip(whole, parts[::2], parts[1::2], stored, strict=True):
        assert one.step == first.step == second.step == a.step == b.step == c.step
        for batch, halved in ((one, (first, second)), (a, (b, c))):
            assert torch.equal(batch.positions, torch.cat([half.positions for half in halved]))
            assert torch.equal(batch.sizes, torch.cat([half.sizes for half in halved]))
        assert all(torch.equal(x, torch.cat([y, z], 1)) for x, y, z in zip(one.crops, first.crops, second.crops, strict=True))


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("gone.jpg")


def forbidden(file: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    file.chmod(0)


def lying(file: Path) -> None:
    data = bytearray(file.read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (60_000).to_bytes(2, "big") * 2
    file.write_bytes(data)


def panorama(file: Path) -> None:
    file.write_bytes(jpeg(Image.new("RGB", (20_000, 500), "green")))


@pytest.mark.parametrize("change", [dangling, forbidden, lying, panorama])
def test_one_strange_image_does_not_stop_a_run(decode: str, change: Callable[[Path], None], caplog: pytest.LogCaptureFixture) -> None:
    change(Path("jpegs/07.jpg"))
    assert pretrain("mae.yaml", "--out", "run", "--data.decode", decode, "--trainer.max_steps", "3") == 0
    replaced = json.loads(Path("run/run.json").read_text())["replaced"]
    named = [record.getMessage() for record in caplog.records if "07.jpg" in record.getMessage()]
    assert (replaced, len(named)) == ((0, 0) if change is panorama else (1, 1))


def test_of_a_panorama_in_memory_the_middle_stays() -> None:
    panorama(Path("jpegs/07.jpg"))
    images = load_split("./jpegs", "train", max_side=128, progress=False).images
    assert images.sizes[7].tolist() == [128, 512]
    assert images.sizes.amin(1).max() == 128


@pytest.mark.parametrize("change", ["all", "none"])
def test_a_folder_without_a_readable_image(decode: str, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    for file in Path("jpegs").iterdir():
        file.write_bytes(b"") if change == "all" else file.unlink()
    assert pretrain("mae.yaml", "--out", "run", "--data.decode", decode) == (1 if change == "all" else 2)
    assert ("last one: " if change == "all" else "it is empty") in error_line(capsys)


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def test_a_file_more_than_fits_the_disk() -> None:
    """A limit on the size of files in place of a small disk: nothing half written stays, and the run is one line."""
    rng = torch.Generator().manual_seed(0)
    for i in range(3):  # 77 MiB: fewer are not mapped
        pixels = torch.randint(0, 256, (3000, 3000, 3), dtype=torch.uint8, generator=rng)
        Image.fromarray(pixels.numpy()).save(f"jpegs/big{i}.png", compress_level=0)
    options = ("mae.yaml", "--out", "run", "--data.decode", "memory", "--data.max_side", "4000")
    done = Command("pretrain", *options, before=limit, SSL_VIT_CACHE="cache")
    assert done.wait() == 1, done.said
    line = done.said.splitlines()[-1]
    assert line.startswith("ssl-vit: ")
    assert line.endswith("cannot be written: File too large; make room, or name another folder in SSL_VIT_CACHE")
    assert [file.suffix for file in Path("cache").iterdir()] == [".lock"]


LONG = ("mae.yaml", "--keep_every_epochs", "1", "--trainer.max_steps", "100", "--trainer.log_every_n_steps", "1")


def kill(step: int, workers: int, *options: str, worker: bool = False) -> tuple[int, str]:
    """Run into `killed`, and SIGKILL it, or the last of its workers, when it has logged `step`, in the middle of an epoch of three;
    exit code and what it said."""
    log = Path("killed/metrics.jsonl")
    process = Command("pretrain", *LONG, *CPU, "--out", "killed", "--data.workers", str(workers), *options)
    process.wait_for("killed/metrics.jsonl")
    while process.running and f'"step": {step},' not in log.read_text():
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]) if worker else process.pid, signal.SIGKILL)
    return process.wait(100), process.said


@pytest.mark.slow  # test_ranks_pretrain.py has one on other devices
def test_a_killed_run_resumes_exactly_with_other_workers() -> None:
    code, _ = kill(10, 1)
    assert code == -signal.SIGKILL
    assert 3 <= read_checkpoint(Path("killed/last.ckpt"))["global_step"] < 100
    assert pretrain(*LONG, "--out", "killed", "--resume", "--data.workers", "2") == 0
    assert pretrain(*LONG, "--out", "whole") == 0
    assert equal_weights("whole", "killed")


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "then"), [(0, 4), (1, 0), (4, 1)])
def test_runs_and_workers_are_killed(workers: int, then: int) -> None:
    kill(10, workers)
    kill(40, then, "--resume")
    if workers:
        code, errors = kill(80, workers, "--resume", worker=True)
        assert code == 1
        line = errors.splitlines()[-1]
        assert line.startswith("ssl-vit: "), errors
        assert line.count("a data worker was ended by the system") == 1
        assert line.endswith("lower data.workers, and go on with --resume")
        assert "Traceback" not in errors
    assert pretrain(*LONG, "--out", "killed", "--resume", "--data.workers", str(then)) == 0
    assert pretrain(*LONG, "--out", "whole") == 0
    assert equal_weights("whole", "killed")


def test_only_a_broken_connection_to_a_worker_is_a_worker_s() -> None:
    for taking, error, kind in (
        (True, EOFError(), Failure),
        (False, ConnectionRefusedError("a logger's server"), ConnectionRefusedError),
        (False, RuntimeError("DataLoader worker (pid 7) is killed by signal"), Failure),
        (True, RuntimeError("something else"), RuntimeError),
    ):
        with pytest.raises(kind), told_of_lost_workers(taking):
            raise error


def test_a_lost_worker_that_is_noticed_amid_a_step_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(RunFolder, "on_train_batch_end", handler)
    assert pretrain("mae.yaml", "--out", "run") == 1
    assert "a data worker was ended by the system (DataLoader worker (pid 7)" in error_line(capsys)


def test_the_signal_of_a_lost_worker_that_comes_late_raises_nothing() -> None:
    """Its connection breaks first; torch's handler, here one that raises as it does, must not cut the clean-up short."""

    def handler(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal")

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        with pytest.raises(Failure), told_of_lost_workers():
            raise EOFError
        os.kill(os.getpid(), signal.SIGCHLD)
        time.sleep(0.01)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_images_gathered_ahead_are_counted_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU a thread puts the next batch together."""
    order = dataset().order
    broken(order.rows(torch.tensor([8])).item())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    images = load_split("./jpegs", "train", progress=False).images
    ahead, plain = Stream(images, order, pin=True), Stream(images, order)
    for a, b in itertools.islice(zip(ahead, plain, strict=False), 6):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        assert (a.step, ahead.consumed, ahead.replaced) == (b.step, plain.consumed, plain.replaced)
    assert plain.replaced

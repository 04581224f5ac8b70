"""Streaming: the same stream whoever decodes it, exact resume, boxes as on the device, damaged images, lost workers."""

import io
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

import tests.conftest as shared
from ssl_vit.cli import run
from ssl_vit.data.images import decode, header_size, to_tensor
from ssl_vit.data.loader import Corrupt, CropDataset, Order, begin_worker, crop_image
from ssl_vit.data.sources import open_records
from ssl_vit.data.stream import Batch, ImageData, WorkerStream
from ssl_vit.data.views import Crops, MultiCrop, SingleCrop, multi_crop, single_crop
from ssl_vit.errors import Failure
from ssl_vit.train.callbacks import RunFolder
from ssl_vit.weights.checkpoint import read_checkpoint
from tests.processes import FORK, Command, ranks

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores

CROPS = MultiCrop(global_size=32, local_size=16, n_local=3)


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image with structure at all scales, as a photograph has."""
    rng = np.random.default_rng(seed)
    noise = sum(
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (-(-height // k), -(-width // k), 3), dtype=np.uint8)).resize((width, height), 3), float
        )
        for k in (4, 16, 64)
    )
    return Image.fromarray((noise / 3).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


@pytest.fixture
def jpegs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 JPEGs of 80 to 200 px, three of them turned by EXIF, and the two recipes, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("jpegs").mkdir()
    for i in range(60):
        exif = Image.Exif()
        exif[0x0112] = 6 if i % 20 == 7 else 1
        Path(f"jpegs/{i:02}.jpg").write_bytes(jpeg(smooth(80 + 2 * i, 200 - 2 * i, i), exif=exif))
    for name, recipe in shared.RECIPES.items():
        data = {"source": "./jpegs", "batch_size": 20, "decode": "stream", "workers": 0}
        Path(f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "data": data}))


def dataset(plan: tuple[Crops, ...] = CROPS.plan, batch_size: int = 20, rank: int = 0, ranks: int = 1, seed: int = 5) -> CropDataset:
    records = open_records("./jpegs", "train")
    return CropDataset(records, Order(len(records.table), batch_size, seed, rank, ranks), plan)


def take(stream: WorkerStream, steps: int) -> list[Batch]:
    batches = iter(stream)
    found = [next(batches) for _ in range(steps)]
    stream.close()
    return found


def same(a: Batch, b: Batch) -> bool:
    pairs = zip((a.sizes, a.positions, *a.crops), (b.sizes, b.positions, *b.crops), strict=True)
    return a.step == b.step and all(torch.equal(x, y) for x, y in pairs)


def pretrain(*options: str) -> int:
    return run(["pretrain", *options, "--trainer.accelerator", "cpu"])


def weights(folder: str) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(Path(folder) / "last.ckpt")["state_dict"])


def equal_weights(a: str, b: str) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def broken(row: int) -> None:
    """Row `row` (files are in the order of their names) becomes a truncated JPEG."""
    path = Path(f"jpegs/{row:02}.jpg")
    path.write_bytes(path.read_bytes()[:700])


def test_every_epoch_has_an_order_of_its_own() -> None:
    order = Order(20, 5, seed=3)
    first, second = (torch.cat([order.rows(order.positions(step)) for step in range(start, start + 4)]) for start in (0, 4))
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(20))
    assert not torch.equal(first, second)


@pytest.mark.usefixtures("jpegs")
def test_one_stream_for_all_workers_ranks_and_starts() -> None:
    expected = take(WorkerStream(dataset(), 0), 7)  # two epochs and a step
    assert [batch.step for batch in expected] == list(range(7))
    for workers in (1, 4):
        assert all(map(same, expected, take(WorkerStream(dataset(), workers), 7)))
    for step in (1, 3, 5):
        stream = WorkerStream(dataset(), 2, step=step)
        assert all(map(same, expected[step:], take(stream, 7 - step)))
    ranks = [take(WorkerStream(dataset(rank=rank, ranks=2), 0), 4) for rank in range(2)]
    for whole, first, second in zip(expected, *ranks, strict=False):
        assert torch.equal(whole.positions, torch.cat([first.positions, second.positions]))
        assert all(torch.equal(c, torch.cat([a, b], 1)) for c, a, b in zip(whole.crops, first.crops, second.crops, strict=True))


@pytest.mark.usefixtures("jpegs")
def test_the_position_saved_is_the_one_consumed() -> None:
    stream = WorkerStream(dataset(), 2)
    batches = iter(stream)
    for step in range(4):
        assert next(batches).step == step
        assert stream.consumed == step + 1  # whatever the workers have ahead
    stream.close()


@pytest.mark.usefixtures("jpegs")
def test_the_end_of_a_fit_ends_its_workers() -> None:
    """Also where something, as an error's traceback, still holds the stream."""
    data, stream = ImageData("./jpegs", batch_size=20), WorkerStream(dataset(), 1)
    data.streams.append(stream)
    before = set(multiprocessing.active_children())
    next(iter(stream))
    workers = set(multiprocessing.active_children()) - before
    assert workers
    data.teardown("fit")
    assert not workers & set(multiprocessing.active_children())


@pytest.mark.usefixtures("jpegs")
def test_workers_are_asked_in_order() -> None:
    stream = WorkerStream(dataset(), 0, step=2)
    for number in (0, 3):
        with pytest.raises(RuntimeError, match=f"micro-batch {number} is asked of workers whose next one is 2"):
            stream.batch(number)
    assert same(stream.batch(2)[0], take(WorkerStream(dataset(), 0), 3)[2])
    stream.close()
    with pytest.raises(RuntimeError, match="micro-batch 3 is asked of workers whose next one is None"):
        stream.batch(3)


@pytest.mark.usefixtures("jpegs")
def test_boxes_and_pixels_are_those_of_the_device_path() -> None:
    """No reduction at these sizes: rounding to 8 bits between the directions and at the end is all that differs."""
    crops = MultiCrop(global_size=64, local_size=32, n_local=3)
    data = dataset(crops.plan)
    batch = take(WorkerStream(data, 0), 1)[0]
    pictures = [to_tensor(decode(bytes_, name)) for name, bytes_ in data.records.encoded_rows(data.order.rows(batch.positions).tolist())]
    assert batch.sizes.tolist() == [list(picture.shape[1:]) for picture in pictures]
    images = torch.zeros(20, 3, 200, 200, dtype=torch.uint8)
    for image, picture in zip(images, pictures, strict=True):
        image[:, : picture.shape[1], : picture.shape[2]] = picture
    plain = MultiCrop(global_size=64, local_size=32, n_local=3, jitter_p=0.0, grey_p=0.0, blur_p=(0.0, 0.0, 0.0), solarise_p=0.0)
    decoded = batch._replace(images=images, crops=())
    device = multi_crop(decoded, 5, plain)
    unreduced = (
        torch.stack([c.boxes(batch.sizes, batch.positions, 5)[0][..., 2:].amin(dim=(0, 2)) / c.size for c in crops.plan]).amin(0) < 2
    )
    assert unreduced.sum() >= 15
    for made, cut in zip(batch.crops, device, strict=True):
        difference = (made.float() / 255 - cut).abs()[:, unreduced]
        assert difference.max() < 2.5 / 255
        assert difference.mean() < 0.5 / 255
    # colours: the same transforms whoever cropped
    whole = multi_crop(decoded, 5, crops)
    streamed = multi_crop(batch, 5, crops)
    assert all((a - b).abs()[:, unreduced].mean() < 0.02 for a, b in zip(whole, streamed, strict=True))
    single = dataset(SingleCrop(32).plan)
    one = take(WorkerStream(single, 0), 1)[0]
    made = single_crop(one, 5, SingleCrop(32))
    assert torch.equal(made, one.crops[0][0].float() / 255)


@pytest.mark.usefixtures("jpegs")
def test_dino_streams_without_local_views() -> None:
    crops = MultiCrop(global_size=32, n_local=0)
    large, small = multi_crop(take(WorkerStream(dataset(crops.plan), 0), 1)[0], 5, crops)
    assert (large.shape, small.shape) == ((2, 20, 3, 32, 32), (0, 20, 3, 96, 96))


def crop(data: bytes, box: list[int], size: int, flip: bool = False) -> torch.Tensor:
    out = torch.empty(1, 3, size, size, dtype=torch.uint8)
    crop_image(data, "test", torch.tensor(header_size(data)), [(torch.tensor([box]), torch.tensor([flip]), out)])
    return out[0]


@pytest.mark.parametrize(("factor", "least"), [(2, 34.0), (4, 34.0), (8, 34.0)])
def test_a_jpeg_decoded_smaller_gives_the_same_view(factor: int, least: float) -> None:
    """At least `least` dB against the crop of the full decode; the box does not move."""
    data, side = jpeg(smooth(1003, 805)), 64 * factor + 5
    box = [101, 203, side, side + 20]
    seen: list[tuple[int, int]] = []
    original = Image.Image.resize

    def resize(self: Image.Image, *args: object, **kwargs: object) -> Image.Image:
        seen.append(self.size)
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        reduced = crop(data, box, 64)
    assert seen == [(-(-1003 // factor), -(-805 // factor))]
    region = decode(data).crop((203, 101, 203 + side + 20, 101 + side))
    full = to_tensor(region.resize((64, 64), Image.Resampling.BICUBIC))
    error = (reduced.double() - full.double()).square().mean()
    assert 10 * torch.log10(255**2 / error) > least
    assert torch.equal(crop(data, box, 64, flip=True), reduced.flip(-1))


def test_a_turned_jpeg_decoded_smaller_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(smooth(600, 300), exif=exif)
    whole = to_tensor(decode(data).resize((75, 150), Image.Resampling.BICUBIC))
    reduced = crop(data, [0, 0, 600, 300], 75)
    upright = torch.nn.functional.interpolate(whole[None].float(), (75, 75), mode="bicubic", antialias=True)[0]
    assert (reduced - upright).abs().mean() < 3


@pytest.mark.usefixtures("jpegs")
def test_a_damaged_image_is_replaced_by_the_next_in_order(caplog: pytest.LogCaptureFixture) -> None:
    order = dataset().order
    first, second = order.rows(torch.tensor([8, 9])).tolist()
    intact = take(WorkerStream(dataset(), 0), 3)
    broken(first)
    Path(f"jpegs/{second:02}.jpg").write_bytes(b"<html>")
    third = order.rows(torch.tensor([10]))
    expected = dataset(CROPS.plan)
    for workers in (0, 2):
        stream = WorkerStream(dataset(), workers)
        found = take(stream, 6)
        assert stream.replaced == 3 + 2  # side by side in the first epoch alone
        assert torch.equal(found[0].sizes[8:11], intact[0].sizes[10:11].expand(3, 2))
        others = [i for i in range(20) if i not in (8, 9)]
        assert all(torch.equal(a[:, others], b[:, others]) for a, b in zip(found[0].crops, intact[0].crops, strict=True))
    name, data = expected.records.encoded_rows(third.tolist())[0]
    sizes = intact[0].sizes[10:11]
    for plan, made in zip(CROPS.plan, found[0].crops, strict=True):  # the neighbour's pixels with the position's own boxes
        boxes, flips = plan.boxes(sizes, torch.tensor([8]), 5)
        out = torch.empty_like(made[:, 0])
        crop_image(data, name, sizes[0], [(boxes[:, 0], flips[:, 0], out)])
        assert (out.float() - made[:, 8].float()).abs().mean() < 3
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 4  # each of the two once, in each of the two streams
    assert any(f"{first:02}.jpg" in line and "corrupt" in line for line in named)


def test_what_is_too_many_is_not_left_to_chance() -> None:
    """A set of 10,000 with 1 % corrupt may bring 6 of them among its first 100, and 100 in all; not 101, nor half of what is seen."""
    corrupt = Corrupt(10_000)
    corrupt.note([(row, "") for row in range(4)], 100)
    corrupt.note([(row, "") for row in range(100)], 20_000)
    with pytest.raises(Failure, match="101 of 10000 images cannot be read, more than 1%"):
        corrupt.note([(100, "")], 20_000)
    with pytest.raises(Failure, match="50 of 100 images"):
        Corrupt(10_000).note([(row, "") for row in range(50)], 100)
    with pytest.raises(Failure, match="2 of 2 images"):  # a few, but nothing is left
        Corrupt(2).note([(0, ""), (1, "")], 2)


@pytest.mark.usefixtures("jpegs")
def test_pinning_keeps_what_a_worker_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # needs a GPU
    made = dataset()[0]
    assert not isinstance(made, Failure)
    crops, sizes, corrupt = pin_memory((*made[:2], [(1, "why")]))
    assert [(row, why) for row, why in corrupt] == [(1, "why")]
    assert torch.equal(sizes, made[1])
    assert all(torch.equal(a, b) for a, b in zip(crops, made[0], strict=True))


@pytest.mark.usefixtures("jpegs")
def test_too_many_damaged_images_stop_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    for row in range(5):
        broken(row)
    assert pretrain("mae.yaml", "--out", "run") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ssl-vit: ")]
    assert len(lines) == 1
    assert "images cannot be read, more than 1%; the last one: " in lines[0]
    for row in range(60):
        broken(row)
    with pytest.raises(Failure, match="60 images one after the other cannot be read") as error:
        take(WorkerStream(dataset(), 1), 1)
    assert "\n" not in str(error.value)  # without a worker's traceback


@pytest.mark.usefixtures("jpegs")
def test_strange_images() -> None:
    """A panorama, a single row of pixels, and JPEGs whose headers lie about their size, to more and to less."""
    Path("jpegs/00.jpg").write_bytes(jpeg(Image.new("RGB", (20_000, 500), "green")))
    Path("jpegs/01.jpg").write_bytes(jpeg(smooth(300, 1)))
    for row, side in ((2, 60_000), (3, 900)):
        data = bytearray(Path(f"jpegs/{row:02}.jpg").read_bytes())
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = side.to_bytes(2, "big") * 2
        Path(f"jpegs/{row:02}.jpg").write_bytes(data)
    stream = WorkerStream(dataset(), 1)
    batches = take(stream, 3)
    assert 1 <= stream.replaced <= 4
    assert all([*crop.shape[2:]] == [3, 32, 32] for batch in batches for crop in batch.crops[:1])
    assert [500, 20_000] in torch.cat([batch.sizes for batch in batches]).tolist()


@pytest.mark.usefixtures("jpegs")
@pytest.mark.parametrize("method", ["dino", "mae"])
def test_weights_do_not_depend_on_workers_and_resume_is_exact(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretrain(f"{method}.yaml", "--out", "whole") == 0
    for workers in ("1", "4"):
        assert pretrain(f"{method}.yaml", "--out", f"workers{workers}", "--data.workers", workers) == 0
        assert equal_weights("whole", f"workers{workers}")
    original = RunFolder.on_train_batch_end
    for stop, workers in ((1, "2"), (3, "0"), (5, "2")):

        def interrupted(self: RunFolder, trainer: object, *args: object, stop: int = stop) -> None:
            self.signals.received = signal.SIGINT * (trainer.global_step == stop)  # type: ignore[attr-defined]
            original(self, trainer, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(RunFolder, "on_train_batch_end", interrupted)
        assert pretrain(f"{method}.yaml", "--out", f"cut{stop}", "--data.workers", workers) == 130
        monkeypatch.setattr(RunFolder, "on_train_batch_end", original)
        assert pretrain(f"{method}.yaml", "--out", f"cut{stop}", "--resume", "--data.workers", "1") == 0
        assert equal_weights("whole", f"cut{stop}")


@pytest.mark.usefixtures("jpegs")
def test_auto_streams_what_is_above_the_limit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain("mae.yaml", "--out", "stream", "--trainer.max_steps", "2") == 0
    assert pretrain("mae.yaml", "--out", "below", "--trainer.max_steps", "2", "--data.decode", "auto") == 0
    monkeypatch.setattr("ssl_vit.data.stream.MEMORY_LIMIT", 2**20)
    assert pretrain("mae.yaml", "--out", "auto", "--trainer.max_steps", "2", "--data.decode", "auto") == 0
    assert "decode" not in yaml.safe_load(Path("auto/recipe.yaml").read_text())["data"]
    assert equal_weights("auto", "stream")
    assert not equal_weights("below", "stream")  # the crops of workers are rounded
    assert pretrain("mae.yaml", "--out", "other", "--data.workers", "-1") == 2
    assert "data.workers is -1; it must be ≥0" in capsys.readouterr().err
    assert pretrain("mae.yaml", "--out", "other", "--data.source", "builtin:photos") == 2
    assert "data.decode is stream; it must be memory" in capsys.readouterr().err


CPU = ("--trainer.accelerator", "cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("jpegs")
def test_two_gloo_processes_equal_one() -> None:
    options = ("dino.yaml", "--data.workers", "1", "--trainer.max_steps", "4")
    both = ("--out", "two", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.decode", "stream")
    for process in ranks(2, "pretrain", *options, *both, *CPU):
        assert process.wait() == 0, process.said
    assert pretrain(*options, "--out", "one") == 0
    one, two = weights("one"), weights("two")
    assert pretrain(*options, "--out", "other", "--seed", "1") == 0
    other = weights("other")
    difference, scale = (sum((a[key] - one[key]).double().square().sum().item() for key in one) for a in (two, other))
    assert difference < 1e-5 * scale


def _as_python_3_14() -> None:
    multiprocessing.set_start_method("forkserver", force=True)


def running_below(pid: str) -> set[str]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    below = children.read_text().split() if children.exists() else []
    return {*below, *(other for child in below for other in running_below(child))}


def ended(pid: str) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")")[-1].split()[0] == "Z"


@pytest.mark.usefixtures("jpegs")
def test_workers_that_a_server_forks_work_and_end_with_the_run() -> None:
    options = ("mae.yaml", *CPU, "--data.workers", "2", "--trainer.max_steps", "100000", "--out", "run")
    process = Command("pretrain", *options, before=_as_python_3_14)
    process.wait_for("run/metrics.jsonl")
    below = running_below(str(process.pid))
    assert process.running, process.said
    process.send(signal.SIGKILL)
    until = time.monotonic() + 60
    while not all(map(ended, below)):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert len(below) >= 3 or not Path("/proc/self/stat").exists()  # the workers and their server


class Large(torch.utils.data.Dataset[np.ndarray[Any, Any]]):
    """Of images that do not fit into a pipe."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> np.ndarray[Any, Any]:
        return np.zeros(2**22, dtype=np.uint8)


def _take_one(method: str, folder: Path) -> None:
    multiprocessing.set_start_method(method, force=True)
    loader: Any = torch.utils.data.DataLoader(Large(), batch_size=1, num_workers=2, collate_fn=list, worker_init_fn=begin_worker)
    with (folder / "pids").open("w") as file:
        images = iter(loader)
        next(images)
        file.write(" ".join(str(worker.pid) for worker in images._workers))
    if method == "fork" and not os.fork():
        time.sleep(100)  # a child of another kind, as a logger has, which lives on
    (folder / "pids").rename(folder / "workers")
    time.sleep(600)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_whose_images_nobody_takes_end_with_the_main_process(method: str, tmp_path: Path) -> None:
    """Under fork each keeps the pipe of the others open, and torch's own watch waits for ever to write into it; and a sibling that lives
    on makes the main process look alive."""
    process = FORK.Process(target=_take_one, args=(method, tmp_path))
    process.start()
    while not (tmp_path / "workers").exists():
        assert process.is_alive()
        time.sleep(0.05)
    time.sleep(1)  # the pipes are full
    process.kill()
    process.join()
    until, left = time.monotonic() + 20, (tmp_path / "workers").read_text().split()
    while left := [pid for pid in left if not ended(pid)]:
        if time.monotonic() > until:
            for pid in left:
                os.kill(int(pid), signal.SIGKILL)
            pytest.fail("they live on")
        time.sleep(0.1)


@pytest.mark.usefixtures("jpegs")
def test_a_worker_killed_by_the_system_ends_the_run_in_one_line() -> None:
    options = ("mae.yaml", "--data.workers", "2", "--out", "run", "--trainer.max_steps")
    process = Command("pretrain", *options, "100000", *CPU)
    process.wait_for("run/metrics.jsonl")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.wait(0)
        pytest.skip("this system does not list the children of a process")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    assert process.wait(60) == 1
    errors = process.said
    assert errors.count("ssl-vit: ") == 1  # where the signal comes between two steps, behind the progress bar
    assert errors.count("a data worker was ended by the system") == 1
    assert "Traceback" not in errors
    assert json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])["step"] > 0


@pytest.mark.usefixtures("jpegs")
@pytest.mark.parametrize(("environment", "workers"), [(SLURMEnvironment(), 6), (LightningEnvironment(), 3)])
def test_the_cores_of_a_slurm_task_are_its_own(environment: Any, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_vit.data.stream.available_cores", lambda: 6)
    data = ImageData("jpegs", batch_size=4, decode="stream")
    data.records = open_records("jpegs", "train")
    strategy = SimpleNamespace(cluster_environment=environment, root_device=torch.device("cpu"))
    trainer = {"global_rank": 0, "world_size": 2, "num_devices": 2, "accumulate_grad_batches": 1, "global_step": 0, "strategy": strategy}
    data.trainer = SimpleNamespace(**trainer, lightning_module=SimpleNamespace(crop_plan=SingleCrop(8).plan))  # type: ignore[assignment]
    stream = data.train_dataloader()
    assert isinstance(stream, WorkerStream)
    assert stream._loader.num_workers == workers

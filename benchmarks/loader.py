"""JPEGs to views on the host: `python benchmarks/loader.py [--quick] [--workers N]`.

Images a second and core, of 500 x 375 px JPEGs (quality 90, cut from real photographs, with noise) on the local disk, read once before the
clock. Ours: the streaming loader's workers, which read, decode and crop; colour, blur and normalisation follow in batch on the
device, and no core of the host is needed for them beside a GPU. Beside it, turn about with the same number of workers: a DataLoader of
PIL images through torchvision, once with the crops and flips alone (the same work), once with all of the method's transforms (what a
host does without colour on the device). Ratios are medians over the turns, ours / theirs: above 1, ours gives more images.
On a machine without a GPU the last line adds our batched colour on the same cores.

Then what bounds it: milliseconds of one process for an image, and of these decoding, which libjpeg does on either side. And the start and
the memory of 1,000 and 200,000 files in up to 1,000 folders: seconds to list them and for their identity, and the proportional share (PSS)
of main process and two workers together, after some batches. `--turns 0` measures that alone.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from ssl_vit.data import loader
from ssl_vit.data.identity import identity
from ssl_vit.data.loader import CropDataset, Order
from ssl_vit.data.photos import photograph
from ssl_vit.data.sources import open_records
from ssl_vit.data.stream import WorkerStream
from ssl_vit.methods.base import Method
from ssl_vit.methods.dino import DINO, HeadConfig
from ssl_vit.methods.mae import MAE

PHOTOS = ("astronaut", "chelsea", "coffee", "motorcycle_left")
NORMALISE = [T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]


def write_jpegs(folder: Path, count: int) -> None:
    """500 x 375 px, each of another region, enlarged or reduced by up to a half, with sensor noise."""
    rng, pictures = np.random.default_rng(0), [Image.fromarray(photograph("photos", name).numpy()) for name in PHOTOS]
    folder.mkdir(parents=True)
    for number in range(count):
        picture = pictures[number % len(pictures)]
        width = int(rng.integers(240, min(picture.width, picture.height * 4 // 3) + 1))
        left, top = int(rng.integers(0, picture.width - width + 1)), int(rng.integers(0, picture.height - width * 3 // 4 + 1))
        region = picture.resize((500, 375), Image.Resampling.BICUBIC, (left, top, left + width, top + width * 3 // 4))
        noisy = np.asarray(region) + rng.normal(0, 4, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:06}.jpg", quality=90)


class Files(Dataset[Any]):
    """PIL images of the files through a transform; endless."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Any]) -> None:
        self.files, self.transform = sorted(map(str, folder.rglob("*.jpg"))), transform

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.files[index % len(self.files)]) as image:
            return self.transform(image.convert("RGB"))


def crop(size: int, scale: tuple[float, float]) -> list[Any]:
    return [T.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC), T.RandomHorizontalFlip()]


def several(pipelines: list[T.Compose]) -> Callable[[Image.Image], list[torch.Tensor]]:
    return lambda image: [pipeline(image) for pipeline in pipelines]


def torchvision(method: str, colour: bool) -> Callable[[Image.Image], Any]:
    """The authors' transforms; without `colour` the crops and flips, as uint8 tensors."""
    if method == "mae":
        return T.Compose([*crop(224, (0.2, 1.0)), *(NORMALISE if colour else [T.PILToTensor()])])
    pipelines = []
    for view in range(10):
        crops = crop(224, (0.4, 1.0)) if view < 2 else crop(96, (0.05, 0.4))
        jitter = [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), T.RandomGrayscale(0.2)]
        blur = T.RandomApply([T.GaussianBlur(13, (0.1, 2.0))], (1.0, 0.1, 0.5)[min(view, 2)])
        solarise = [T.RandomSolarize(128, 0.2)] if view == 1 else []
        pipelines.append(T.Compose([*crops, *([*jitter, blur, *solarise, *NORMALISE] if colour else [T.PILToTensor()])]))
    return several(pipelines)


def build(method: str) -> Method:
    return MAE() if method == "mae" else DINO(head=HeadConfig(8, 8, 8))


def stream(folder: Path, module: Method, batch: int, workers: int) -> WorkerStream:
    records = open_records(str(folder), "train")
    return WorkerStream(CropDataset(records, Order(len(records.table), batch, 0), module.crop_plan), workers)


def settle() -> None:
    """Wait until all workers have filled their queues: what one side makes ahead must not take the cores of the next."""
    busy = -1
    while True:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        ticks = sum(int(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[11]) for pid in children)
        if ticks == busy:
            return
        busy = ticks
        time.sleep(1)


def compare(method: str, folder: Path, options: argparse.Namespace) -> None:
    module = build(method)
    streams: dict[str, Iterator[Any]] = {"ours, crops": iter(stream(folder, module, options.batch, options.workers))}
    for name, colour in (("torchvision, crops", False), ("torchvision, all", True)):
        files = Files(folder, torchvision(method, colour))
        streams[name] = iter(DataLoader(files, options.batch, num_workers=options.workers, prefetch_factor=2))
    rates: dict[str, list[float]] = {name: [] for name in [*streams, "ours, colour too"]}
    for number in range(options.turns + 1):  # the first turn warms up
        for name in rates:
            batches = streams["ours, crops" if name == "ours, colour too" else name]
            settle()
            while_idle = 3 * options.workers  # whole rounds of the workers; what they made ahead does not count
            for _ in range(while_idle):
                next(batches)
            begin = time.perf_counter()
            for _ in range(options.batches):
                made = next(batches)
                if name == "ours, colour too":
                    module.views(made)
            if number:
                rates[name].append(options.batches * options.batch / (time.perf_counter() - begin) / options.workers)
    for name, values in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(rates["ours, crops"], values, strict=True)]
        ratio = "" if name == "ours, crops" else f"{statistics.median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{method:5s} {name:20s} {statistics.median(values):10.0f} {ratio}", flush=True)


def profile(method: str, folder: Path) -> None:
    """Print the milliseconds of an image in one process, and how many of them are decoding."""
    seconds = {"ours": [0.0, 0.0], "torchvision": [0.0, 0.0]}  # whole, decoding

    def timed(side: str, part: int, work: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        made = work(*arguments)
        seconds[side][part] += time.perf_counter() - begin
        return made

    dataset, theirs = stream(folder, build(method), 32, 0).dataset, Files(folder, torchvision(method, False))
    with mock.patch.object(loader, "decode", partial(timed, "ours", 1, loader.decode)):
        for number in range(4):
            timed("ours", 0, dataset.__getitem__, number)
    for index in range(4 * 32):
        timed("torchvision", 0, theirs.__getitem__, index)
        timed("torchvision", 1, lambda file: Image.open(file).convert("RGB"), theirs.files[index % len(theirs.files)])
    whole = [f"{side} {1000 * all / 128:.1f}, of which decoding {1000 * part / 128:.1f}" for side, (all, part) in seconds.items()]
    print(f"{method:5s} ms an image with the crops alone: {'; '.join(whole)}", flush=True)


def pss(pid: int) -> int:
    """Bytes of a process, pages that others map too counted by their share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def memory(folder: Path) -> None:
    """Print seconds to list the files and for their identity, and MB of this process and its workers, after ten batches."""
    times = [time.perf_counter()]
    records = open_records(str(folder), "train")
    times.append(time.perf_counter())
    by = identity(records)[0]["by"]
    times.append(time.perf_counter())
    batches = stream(folder, build("mae"), 64, 2)
    for _, _ in zip(range(10), batches, strict=False):
        pass
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    total = sum(pss(pid) for pid in [os.getpid(), *map(int, children)])
    count, (opened, known) = len(records.table), (b - a for a, b in pairwise(times))
    print(f"{count:8,d} files: listed in {opened:4.1f} s, known by {by} in {known:4.1f} s; ", end="")
    print(f"PSS of 1 + {len(children)} processes {total / 1e6:6.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="JPEGs to views on the host, ours against PIL + torchvision.")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=16, help="measured batches of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="*", default=[1_000, 200_000], help="files, for memory")
    parser.add_argument("--quick", action="store_true", help="one short turn and 1,000 files: does it run")
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.images, options.batches, options.turns, options.batch, options.counts = 64, 1, 1, 8, [1_000]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.memory:
        memory(options.memory)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "jpegs"
        write_jpegs(folder, options.images)
        size = sum(file.stat().st_size for file in folder.iterdir()) / options.images / 1000
        print(f"torch {torch.__version__}, {options.workers} workers, {options.images} JPEGs of {size:.0f} KB on average")
        if options.turns:
            print(f"{'':5s} {'images / s / core':20s} {'':10s} ours (crops) / this")
            for method in ("mae", "dino"):
                compare(method, folder, options)
        for method in ("mae", "dino"):
            profile(method, folder)
        for count in options.counts:  # hard links: each is a file to the loader
            many, source = Path(name) / str(count), sorted(folder.iterdir())
            for number in range(count):
                place = many / f"{number % 1000:03}" / f"{number:06}.jpg"
                place.parent.mkdir(parents=True, exist_ok=True)
                os.link(source[number % len(source)], place)
            subprocess.run([sys.executable, __file__, "--memory", str(many)], check=True)


if __name__ == "__main__":
    main()

"""The protocols knn and linear at ImageNet's size, on synthetic features: 1,281,167 x 384 of 1,000 classes, 50,000 test images.

    python benchmarks/imagenet_referee.py [--queries 0.1] [--steps 50] > benchmarks/imagenet_referee.log

The bank, the slice, the grid, the classes and the batch are those of the whole run. To be done in minutes on a CPU, k-NN answers a share
of its queries (on test and on the slice), from which the time of all follows by proportion; the linear heads take a few of their steps,
twice, so that the difference is the time of these. The protocol fits twice (without the slice, with it), and reads slice and test.
"""

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ssl_vit_eval.features.store import FeatureFile, FeatureKey
from ssl_vit_eval.memory import available_memory
from ssl_vit_eval.probes import linear, logreg
from ssl_vit_eval.probes.selection import points, stratified_slice
from ssl_vit_eval.protocols import KINDS, load_protocol

TRAIN, TEST, WIDTH, CLASSES = 1_281_167, 50_000, 384, 1000
PART = 65536


@contextmanager
def measured(what: str, whole: float = 1.0) -> Iterator[None]:
    """Print seconds, those of the processor, and the most memory that was this process's own, besides mapped files. whole: how much more
    all of it is."""
    most, done, begun, computed = [0], threading.Event(), time.perf_counter(), time.process_time()

    def watch() -> None:
        while not done.wait(0.1):
            lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
            most[0] = max(most[0], int(lines["RssAnon"].split()[0]))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        seconds, cpu = time.perf_counter() - begun, time.process_time() - computed
        rest = f"   the whole by proportion: {cpu * whole / 3600:,.1f} h of a core" if whole > 1 else ""
        print(f"{what:50} {seconds:7.1f} s  {cpu:7.1f} s of a core  {most[0] / 2**20:5.2f} GiB{rest}", flush=True)


def synthetic(folder: Path, split: str, n: int, centres: torch.Tensor) -> tuple[FeatureFile, torch.Tensor]:
    """Features around a centre for each class, as the pass of `ssl-vit eval` writes them."""
    generator = torch.Generator().manual_seed(len(split))
    y = torch.randint(0, CLASSES, (n,), generator=generator)
    file = FeatureFile(folder, FeatureKey("synthetic", "synthetic", split, "", "", "cls", n, WIDTH))
    with file.writing():
        for start in range(0, n, PART):
            labels = y[start : start + PART]
            file.write(start, centres[labels] + torch.randn(len(labels), WIDTH, generator=generator))
    return file, y


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--queries", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=50)
    values = parser.parse_args()
    free = f"{available_memory() / 2**30:.1f} GiB available, GPU: {torch.cuda.is_available()}"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {free}")
    with TemporaryDirectory() as folder:
        centres = 0.25 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
        (train, y), (test, y_test) = (synthetic(Path(folder), split, n, centres) for split, n in (("train", TRAIN), ("test", TEST)))
        with measured("check of the file (checksum, once on one process)"):
            assert train.is_whole()
        X, Z = {"cls": train.mapped()}, {"cls": test.mapped()}
        with measured("stratified slice of train (once for all sources)"):
            held_out = stratified_slice(y)

        few = torch.arange(round(values.queries * TEST))
        drawn = held_out.nonzero()[:, 0]
        # as many slice queries less; what is left out of the slice stays out of its bank, too
        knn = load_protocol("knn")
        asked = torch.zeros_like(held_out).index_fill_(0, drawn[: round(values.queries * len(drawn))], True)
        with measured(f"knn: {len(few):,} test and {int(asked.sum()):,} slice queries", 1 / values.queries):
            found = KINDS["knn"].run(knn.parameters, X, y, {"cls": Z["cls"][few]}, y_test[few], asked)["cls"]
        print(f"    {found.selected}, top-1 {(found.predictions == y_test[few]).double().mean():.4f}")

        protocol = load_protocol("linear")
        heads, total, features = len(points(linear.rates_and_decays(protocol.parameters))), protocol.parameters["iterations"], [X["cls"]]
        for steps in (1, 1 + values.steps):
            with measured(f"linear: {heads} heads, fit of {steps} of {total:,} steps"):
                training = linear.training({**protocol.parameters, "iterations": steps})
                trained = training.fit(features, torch.arange(TRAIN), y, CLASSES)
        with measured("linear: all heads on a tenth of test", 10):
            trained.predict([Z["cls"]], torch.arange(TEST // 10))
        needed = f"logreg works on {logreg.memory(TRAIN, WIDTH) / 2**30:.1f} GiB"
        print(f"{needed}: on the GPU if they are free there, else in memory, else refused before work")


if __name__ == "__main__":
    main()

"""What twenty readouts cost beside one, in one pass: `python benchmarks/one_pass.py [--images 512] [--threads 1]`.

The same random pictures through the same random ViT, to features on disk: seconds of the pass for `cls`, and of the pass for all the
readouts below, in turn, best of the repeats.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from ssl_vit.data.images import ImageStore
from ssl_vit.model.backbone import build_backbone
from ssl_vit.model.config import BackboneConfig
from ssl_vit_eval.features.extract import cached_features
from ssl_vit_eval.sources import Source

SPECS = [
    *("cls", "gap", "register", "max", "gem", "cls/pre", "gap/pre", "register/pre", "max/pre", "gem/pre"),
    *("cls/pooled", "gap/pooled", "gem/pooled", "cls@block7", "gap@block7", "register@block7"),
    *("cls+gap", "cls@last4+gap", "gap@last4", "cls+gap+register"),
]
MODELS = {
    "ViT-S/16, 224 px, 4 registers": BackboneConfig(registers=4),
    "width 192, 12 blocks, 64 patches of 4 px": BackboneConfig(image_size=32, patch=4, width=192, depth=12, heads=3, registers=4),
}


def seconds(source: Source, images: ImageStore, specs: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cached_features(source, images, specs, Path(folder), "data", "train", "none", "pass")
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    values = parser.parse_args()
    torch.set_num_threads(values.threads)
    print(f"{'seconds for ' + str(values.images) + ' images':44s} {'cls':>8s} {f'{len(SPECS)} readouts':>12s} {'ratio':>8s}")
    for name, config in MODELS.items():
        source = Source(name, "random", None, 0, config.image_size, "weights", None, None, None, build_backbone(config).eval())
        images = ImageStore.stacked(torch.randint(0, 256, (values.images, 3, config.image_size, config.image_size), dtype=torch.uint8))
        seconds(source, images, ["cls"])
        times = [(seconds(source, images, ["cls"]), seconds(source, images, SPECS)) for _ in range(values.repeats)]
        one, every = (min(of) for of in zip(*times, strict=True))
        print(f"{name:44s} {one:8.2f} {every:12.2f} {every / one:8.3f}", flush=True)


if __name__ == "__main__":
    main()

"""Our batched views against torchvision's v2 transforms, image by image, in one run: `python benchmarks/views.py [DEVICE]`.

Milliseconds per source image, best of the repeats, both sides from the same uint8 tensors to float32 in [0, 1], one CPU
thread (torchvision's side always on the CPU, where a data loader would run it; divide by its workers).
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torchvision.transforms import InterpolationMode, v2

from ssl_vit.data.views import Batch, MultiCrop, SingleCrop, multi_crop, single_crop


def milliseconds(work: Callable[[], object], seconds: float = 3.0) -> float:
    """The fastest of the calls that fit into `seconds`, after one that does not count."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best * 1000


def torchvision_crop(size: int, scale: tuple[float, float]) -> list[v2.Transform]:
    return [v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()]


def torchvision_views(config: MultiCrop) -> list[v2.Compose]:
    """One pipeline per view, with the settings of `config`."""
    pipelines = []
    for view in range(2 + config.n_local):
        size, scale = (config.global_size, config.global_scale) if view < 2 else (config.local_size, config.local_scale)
        steps = [
            *torchvision_crop(size, scale),
            v2.RandomApply([v2.ColorJitter(*config.jitter)], config.jitter_p),
            v2.RandomGrayscale(config.grey_p),
            v2.RandomApply([v2.GaussianBlur(13, config.blur_sigma)], config.blur_p[min(view, 2)]),
            v2.RandomSolarize(128, config.solarise_p if view == 1 else 0.0),
            v2.ToDtype(torch.float32, scale=True),
        ]
        pipelines.append(v2.Compose(steps))
    return pipelines


def compare(name: str, ours: Callable[[], object], pipelines: list[v2.Compose], images: torch.Tensor) -> None:
    a = milliseconds(ours) / len(images)
    b = milliseconds(lambda: [torch.stack([pipeline(image) for image in images]) for pipeline in pipelines]) / len(images)
    print(f"{name:44s} {a:10.3f} {b:12.3f} {b / a:8.1f}", flush=True)


def main(device: str) -> None:
    torch.set_num_threads(1)
    print(f"{'ms per image, 1 thread, ours on ' + device:44s} {'ours':>10s} {'torchvision':>12s} {'ratio':>8s}")
    for size, batch, local_crops in ((32, 64, ((32, 2), (16, 8))), (224, 16, ((96, 8),))):
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
        sizes, positions = torch.full((batch, 2), size, device=device), torch.arange(batch, device=device)
        source = Batch(images.to(device), sizes, positions, 0)

        single = SingleCrop(size)
        loop = v2.Compose([*torchvision_crop(size, single.scale), v2.ToDtype(torch.float32, scale=True)])
        one = partial(single_crop, source, 0, single)
        compare(f"crop and flip, {size} px, batch {batch}", one, [loop], images)

        for local_size, n_local in local_crops:
            multi = MultiCrop(global_size=size, local_size=local_size, n_local=n_local)
            both = partial(multi_crop, source, 0, multi)
            compare(f"DINO, 2 x {size} px + {n_local} x {local_size} px, batch {batch}", both, torchvision_views(multi), images)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")

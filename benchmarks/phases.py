"""Where the time of a training step goes: `python benchmarks/phases.py [--methods dino mae] [--only vits16] [--batch 256] [--compile]`.

Without Lightning's loop: the next batch, its way to the device, views, forward, backward, clipping, AdamW, moving average. Each is timed
alone, waiting for the device on either side; in brackets, how long the host was busy with it. Their sum is above the step's own time,
in which host and device overlap. On a GPU follow the kernels of a step and those that take most of it. Sizes and models are those of
`benchmarks/pretrain.py`; images lie in memory.
"""

import argparse
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.pretrain import SIZES, images, ours
from ssl_vit.data.images import ImageStore
from ssl_vit.data.loader import Order
from ssl_vit.data.stream import Stream
from ssl_vit.methods.dino import DINO
from ssl_vit.model.precision import tf32


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def phases(method: str, name: str, batch: int, compiled: bool, half: bool, device: torch.device) -> None:
    size = SIZES[name]
    module: Any = ours(method, size, compiled).to(device)
    module._trainer = SimpleNamespace(global_step=5, log_every_n_steps=10**9, estimated_stepping_batches=1000, num_training_batches=100)
    module.scheduled = defaultdict(lambda: 0.9)
    module.report = lambda loss, **metrics: {}
    module.on_train_start()
    optimizer = module.configure_optimizers()
    pixels = images(max(256, batch), size.backbone.image_size)
    batches = iter(Stream(ImageStore.stacked(pixels), Order(len(pixels), batch, 0), pin=device.type == "cuda"))
    alone: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def step(timed: bool = False) -> None:
        def phase(what: str, action: Callable[[], Any]) -> Any:
            if not timed:
                return action()
            wait(device)
            begin = time.perf_counter()
            result = action()
            host = time.perf_counter() - begin
            wait(device)
            alone[what].append((time.perf_counter() - begin, host))
            return result

        made = phase("next", lambda: next(batches))
        placed = phase("to device", lambda: made._replace(**{k: getattr(made, k).to(device, non_blocking=True) for k in made._fields[:3]}))
        views = phase("views", lambda: module.views(placed))
        with mock.patch.object(module, "views", return_value=views), torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = phase("forward", lambda: module.training_step(placed, 0))
        optimizer.zero_grad()
        phase("backward", loss.backward)
        if isinstance(module, DINO):
            phase("clip", lambda: module.configure_gradient_clipping(optimizer))
        phase("AdamW", optimizer.step)
        if isinstance(module, DINO):
            teacher, student = (list(part.parameters()) for part in (module.teacher, module.student))
            with torch.no_grad():
                phase("average", lambda: torch._foreach_lerp_(teacher, student, 0.1))  # type: ignore[arg-type]

    first = time.perf_counter()
    for _ in range(3):
        step()
    wait(device)
    begin = time.perf_counter()
    for _ in range(8):
        step()
    wait(device)
    seconds = (time.perf_counter() - begin) / 8
    for _ in range(5):
        step(timed=True)
    title = f"{method} {name} batch {batch}{', compiled' if compiled else ''}"
    print(f"{title}: {1e3 * seconds:.1f} ms a step, {batch / seconds:.0f} images/s; {begin - first:.0f} s for the first three steps")
    parts = {what: [1e3 * statistics.median(column) for column in zip(*times, strict=True)] for what, times in alone.items()}
    print("   ms alone (host): " + ", ".join(f"{what} {whole:.1f} ({host:.1f})" for what, (whole, host) in parts.items()), flush=True)
    if device.type == "cuda":
        with torch.profiler.profile() as seen:
            step()
            wait(device)
        kernels = [e for e in seen.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA and not e.key.startswith(("Opt", "#"))]
        busy = sum(e.self_device_time_total for e in kernels) / 1e3
        print(f"   {sum(e.count for e in kernels)} kernels, {busy:.1f} ms of them; the longest:")
        for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:15]:
            print(f"   {e.self_device_time_total / 1e3:8.2f} ms {e.count:5d} x {e.key[:110]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of a training step goes.")
    parser.add_argument("--only", nargs="*", default=["vits16"], choices=SIZES)
    parser.add_argument("--methods", nargs="*", default=["dino", "mae"], choices=["dino", "mae"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--float32", action="store_true", help="no autocast to bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if options.device == 'cuda' else 'CPU'}")
    with tf32():
        for name in options.only:
            for method in options.methods:
                phases(method, name, options.batch, options.compile, not options.float32, torch.device(options.device))


if __name__ == "__main__":
    main()

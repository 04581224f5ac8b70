"""`ssl-vit pretrain RECIPE --dry-run`: what a run would cost. Trains nothing, writes nothing, fetches nothing."""

import tempfile
import time
import warnings
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl_vit.data.folders import local_path
from ssl_vit.data.images import ImageStore
from ssl_vit.data.loader import batches_of_an_epoch
from ssl_vit.data.sources import builtin, open_records
from ssl_vit.data.stream import ImageData
from ssl_vit.errors import require
from ssl_vit.methods import Method
from ssl_vit.train.cost import step_bytes, training_flops
from ssl_vit.train.options import check_options, check_share
from ssl_vit.train.pretrain import build_method, parse_recipe

# TFLOP/s of dense products in 16 bits with sums in 32, as the vendor's data sheets give them: "NVIDIA V100 Tensor Core GPU" (2020, SXM2;
# the PCIe card has 112), "NVIDIA A100 Tensor Core GPU" (2021), "NVIDIA H100 Tensor Core GPU" (2023, SXM; halved, as it counts with
# sparsity), "NVIDIA Ada GPU Architecture" (2023, appendix A)
GPUS = {"V100": 125, "A100": 312, "H100": 989, "RTX 4090": 165}
UTILISATIONS = (0.1, 0.3, 0.45)
GIB = 2**30
STEPS = 4  # timed, of which the first is left out
STEP_SECONDS = 1.0


def dry_run(recipe: str, options: list[str]) -> None:
    """Print method, parameters, operations, length, batch, memory of a device, and hours. UsageError as for the run itself."""
    parser, config = parse_recipe(recipe, options)
    values = parser.instantiate(config)
    check_options(values)
    values.init = None  # whose weights may have to be fetched
    devices, machine = count_devices(config)
    batch, cut = config.data.batch_size, config.accumulate
    check_share(batch, devices, cut)
    module = build_method(config, values)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in module.parameters())
    micro = batch // devices // cut
    parts, flops = measure(module, config, micro, devices)
    steps = total_steps(config, fetch=False)
    images = steps * batch if steps is not None else 1_000_000
    source = config.data.source
    length = f"{steps:,} steps, {images:,} images" if steps is not None else "not known, --data.source DIR or --trainer.max_steps tell"
    here = source.startswith("builtin:") or local_path(source).exists()
    millions = [f"{count / 1e6:,.4g} M" for count in (sum(p.numel() for p in module.backbone.parameters()), trained, whole - trained)]
    print(f"method      {config.method}, readout {module.spec}")
    print(f"parameters  {millions[0]} of the backbone; {millions[1]} trained in all, {millions[2]} not (a teacher, fixed positions)")
    print(f"an image    {flops / 1e9:.4g} GFLOP: products of the forward and backward passes, 2 a multiply-add")
    print(f"length      {length}{'' if here else f'; {source} is not opened: it is no folder on this machine'}")
    print(f"batch       {batch} = {devices} devices x {cut} micro-batches x {micro} images ({machine})")
    print(f"memory      about {sum(parts.values()) / GIB:.2g} GiB a device: {', '.join(f'{b / GIB:.2g} {k}' for k, b in parts.items())}")
    print("            (a step traced without data; CUDA's own, about 1 GiB, and fragmentation come on top)")
    what = "the run" if steps is not None else "a million images"
    print(f"hours       of {what} on {devices} devices at {', '.join(f'{share:.0%}' for share in UTILISATIONS)} of the peak in 16 bits")
    for name, peak in GPUS.items():
        hours = [images * flops / (share * peak * 1e12 * devices) / 3600 for share in UTILISATIONS]
        print(f"            {name:8} ({peak} TFLOP/s)  " + "  ".join(f"{time:8.3g} h" for time in hours))


def measure(module: Method, config: Namespace, micro: int, devices: int) -> tuple[dict[str, int], int]:
    """Bytes of a device by what they are for, with micro-batches of `micro` images, and the operations of an image."""
    kind, _, how = str(config.trainer.precision).partition("-")
    if (kind, how) == ("64", "true"):
        module.double()
    weights = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    gradients = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    module._apply(fake.from_tensor)  # type: ignore[no-untyped-call]
    step = step_bytes(module, fake, micro, half=kind in ("bf16", "16"))
    parts = {"weights": weights, "moments of AdamW": 2 * gradients, f"gradients and a micro-batch of {micro}": step}
    if devices > 1:
        parts["buckets of DDP"] = gradients
    return parts, training_flops(module, fake)


def count_devices(config: Namespace) -> tuple[int, str]:
    """Processes of the run, and how that is known: as named, else those that this machine has."""
    named, nodes = config.trainer.devices, int(config.trainer.num_nodes)
    if str(named) in ("auto", "-1"):
        gpus = 0 if config.trainer.accelerator == "cpu" else torch.cuda.device_count()
        return max(1, gpus) * nodes, "of this machine; --trainer.devices names others"
    indices = named if isinstance(named, list) else str(named).rstrip(",").split(",")
    known = all(str(index).isdigit() for index in indices) and named != "0"
    require(known, "trainer.devices", named, "a number above 0, indices such as 0,1 or auto")
    alone = isinstance(named, int) or str(named).isdigit()
    return (int(named) if alone else len(indices)) * nodes, "as named"


def total_steps(config: Namespace, fetch: bool = True) -> int | None:
    """Optimiser steps of a recipe; None where they are in epochs of a source that is not here. Images are counted, not decoded; fetch:
    also those of a hub id. UsageError as the run's for a source, a batch or a limit."""
    check_options(config)
    trainer, data, count = config.trainer, config.data, 0
    in_epochs, limit = trainer.max_epochs not in (None, -1), trainer.overfit_batches or trainer.limit_train_batches
    if data.source.startswith("builtin:"):
        count = len(builtin(data.source, data.split).images)
    elif in_epochs and (fetch or local_path(data.source).exists()):
        count = len(open_records(data.source, data.split, data.image_column).table)
    if count:
        batches = batches_of_an_epoch(data.source, count, data.batch_size, 1.0 if limit is None else limit)
    elif limit is not None and (isinstance(limit, int) or limit > 1):  # whole batches
        batches = int(limit)
    elif in_epochs:
        return None
    if not in_epochs:
        return int(trainer.max_steps)
    steps = int(trainer.max_epochs) * batches
    return steps if trainer.max_steps == -1 else min(steps, int(trainer.max_steps))


def step_seconds(config: Namespace, values: Namespace) -> float:
    """Seconds of one optimiser step, by a real training of a few batches of synthetic images of the model's size.

    The recipe's batch if that takes `STEP_SECONDS` at most. Else two smaller ones, since a step costs something whatever its batch, and
    the line through both is read at the recipe's. Decoding and reading are not in it.
    """
    whole = config.data.batch_size
    small = min(whole, 4)
    first = _timed(config, values, small)
    large = min(whole, max(2 * small, int(STEP_SECONDS * small / first)))
    second = _timed(config, values, large) if large > small else first
    slope = max(0.0, second - first) / max(1, large - small)
    return float(second + slope * (whole - large))


def _timed(config: Namespace, values: Namespace, batch_size: int) -> float:
    """Median seconds of a batch."""
    method, times = build_method(config, values), list[float]()
    size = method.backbone.image_size

    def note(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    data = ImageData(config.data.source, batch_size)
    data.images = ImageStore.stacked(torch.randint(0, 256, (STEPS * batch_size, 3, size, size), dtype=torch.uint8))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    length = {"max_steps": STEPS, "max_epochs": -1, "limit_train_batches": None, "callbacks": [LambdaCallback(on_train_batch_end=note)]}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, about a training of a few steps
        Trainer(**{**dict(values.trainer), **quiet, **length, "default_root_dir": folder}).fit(method, datamodule=data)
    return median(b - a for a, b in pairwise(times))

"""Training end to end, side by side in one run: `python benchmarks/pretrain.py [--quick] [--only NAME] [--device cuda]`.

Images in memory -> views -> forward, backward, AdamW step, moving average, by Lightning's Trainer on both sides. Beside ours: lightly's
documented modules and transforms; with `--peers stable-pretraining`, its `methods.DINO` and `methods.MAE` with lightly's transforms
(install it first; a run of its own, since its import adds callbacks to every Trainer of the process, ours too). Turn about, block by
block; the ratio is the median of the ratios of neighbouring blocks, so that what else the machine does falls on both.

The same for all: backbone, head, decoder, prototypes, batch, number and size of views, precision, device, and AdamW. Theirs are made image
by image in a DataLoader of as many workers as there are cores, ours in batch on the device from the stream in memory; all have the same
cores. Workers are halted while the others have their turn, and the clock starts when what they had ready before it is used up. Theirs
start from uint8 images in memory, held as PIL images: nothing is decoded.

Columns: milliseconds a step (median block); theirs / ours (above 1: ours is faster); share of the peak = operations of one image by
`ssl_vit.train.cost` x images a second / the best product of 4,096 (CPU: 2,048) square matrices in this run at the same precision;
seconds a step that the training loop waited for its batch. On CUDA there is a third line: forward + backward of a compiled plain timm
ViT over the same tokens (student's views and the teacher's forward for DINO; the visible patches, and the decoder's blocks for MAE).
`--profile` shows instead which operations the time of each side goes into (what the workers of a DataLoader do is not seen).
"""

import argparse
import atexit
import logging
import os
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import lightning
import numpy as np
import timm
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssl_vit.data.images import ImageStore
from ssl_vit.data.loader import Order
from ssl_vit.data.photos import photograph
from ssl_vit.data.stream import Stream
from ssl_vit.data.views import MultiCrop, SingleCrop
from ssl_vit.methods.base import Method
from ssl_vit.methods.dino import DINO, HeadConfig
from ssl_vit.methods.mae import MAE, DecoderConfig
from ssl_vit.model.config import BackboneConfig
from ssl_vit.train.cost import training_flops

PHOTOS = ("astronaut", "chelsea", "coffee", "motorcycle_left")


@dataclass(frozen=True)
class Size:
    """One row: the ViT, the images' side in px, DINO's local views, and the heads."""

    backbone: BackboneConfig
    local: tuple[int, int]  # side, number
    prototypes: int
    decoder: DecoderConfig
    batch: int


SIZES = {
    "width128": Size(
        BackboneConfig(name="vit_tiny_patch16_224", image_size=32, patch=8, width=128, depth=4, heads=4),
        (16, 2),
        1024,
        DecoderConfig(64, 2, 4),
        128,
    ),
    "vitti4": Size(BackboneConfig(name="vit_tiny_patch16_224", image_size=32, patch=4), (16, 2), 4096, DecoderConfig(96, 2, 3), 64),
    "vits16": Size(BackboneConfig(name="vit_small_patch16_224"), (96, 8), 65536, DecoderConfig(), 8),
    "vitb16": Size(BackboneConfig(name="vit_base_patch16_224"), (96, 8), 65536, DecoderConfig(), 8),
}
HIDDEN, BOTTLENECK = 512, 64  # of DINO's head below 224 px; the paper's 2,048 and 256 above


def head(size: Size) -> HeadConfig:
    return HeadConfig(2048, 256, size.prototypes) if size.backbone.image_size == 224 else HeadConfig(HIDDEN, BOTTLENECK, size.prototypes)


def images(count: int, side: int) -> Tensor:
    """uint8 [n 3 s s] squares at random places of real photographs."""
    rng, pictures = np.random.default_rng(0), [photograph("photos", name) for name in PHOTOS]
    found = []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        top, left = (int(rng.integers(0, length - side + 1)) for length in picture.shape[:2])
        found.append(picture[top : top + side, left : left + side].permute(2, 0, 1))
    return torch.stack(found).contiguous()


class Pictures(Dataset[Any]):
    """PIL images in memory through a transform; endless."""

    def __init__(self, pixels: Tensor, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.pictures = [Image.fromarray(pixel.permute(1, 2, 0).numpy()) for pixel in pixels]
        self.transform = transform

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.pictures[index % len(self.pictures)])


def vit(config: BackboneConfig) -> nn.Module:
    """timm's, as lightly's and stable-pretraining's examples build it."""
    given = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
    chosen = {key: value for key, value in given.items() if value is not None}
    sizes = {"img_size": config.image_size, "patch_size": config.patch}
    return timm.create_model(config.name, num_classes=0, dynamic_img_size=True, **sizes, **chosen)


class Peer(lightning.LightningModule):
    """What the peers' documented LightningModules share: AdamW, and a moving average at each step."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


class LightlyDINO(Peer):
    """https://docs.lightly.ai/self-supervised-learning/examples/dino.html, PyTorch Lightning, with this benchmark's ViT and sizes."""

    def __init__(self, size: Size) -> None:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        width, config = vit(size.backbone), head(size)
        sizes = (width.embed_dim, config.hidden, config.bottleneck, config.prototypes)
        self.student_backbone, self.student_head = width, DINOProjectionHead(*sizes, freeze_last_layer=1)
        self.teacher_backbone, self.teacher_head = vit(size.backbone), DINOProjectionHead(*sizes)
        for part in (self.teacher_backbone, self.teacher_head):
            deactivate_requires_grad(part)
        self.criterion = DINOLoss(output_dim=size.prototypes, warmup_teacher_temp_epochs=5)

    def training_step(self, views: list[Tensor], batch_idx: int) -> Tensor:
        from lightly.models.utils import update_momentum

        update_momentum(self.student_backbone, self.teacher_backbone, m=0.996)
        update_momentum(self.student_head, self.teacher_head, m=0.996)
        with torch.no_grad():
            teacher = [self.teacher_head(self.teacher_backbone(view)) for view in views[:2]]
        student = [self.student_head(self.student_backbone(view)) for view in views]
        loss: Tensor = self.criterion(teacher, student, epoch=0)
        return loss

    def on_after_backward(self) -> None:
        self.student_head.cancel_last_layer_gradients(current_epoch=1)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=3.0, gradient_clip_algorithm="norm")


class LightlyMAE(Peer):
    """https://docs.lightly.ai/self-supervised-learning/examples/mae.html, PyTorch Lightning, with this benchmark's ViT and sizes."""

    def __init__(self, size: Size) -> None:
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        super().__init__()
        encoder, decoder = vit(size.backbone), size.decoder
        self.patch, self.length = size.backbone.patch, encoder.patch_embed.num_patches + 1
        self.backbone = MaskedVisionTransformerTIMM(vit=encoder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated there since 1.6, documented still
            self.decoder = MAEDecoderTIMM(
                num_patches=self.length - 1,
                patch_size=self.patch,
                embed_dim=encoder.embed_dim,
                decoder_embed_dim=decoder.width,
                decoder_depth=decoder.depth,
                decoder_num_heads=decoder.heads,
            )
        self.criterion = nn.MSELoss()

    def training_step(self, views: list[Tensor], batch_idx: int) -> Tensor:
        from lightly.models import utils

        pictures = views[0]
        b = len(pictures)
        keep, mask = utils.random_token_mask(size=(b, self.length), mask_ratio=0.75, device=pictures.device)
        encoded = self.decoder.embed(self.backbone.encode(images=pictures, idx_keep=keep))
        masked = utils.repeat_token(self.decoder.mask_token, (b, self.length))
        decoded = self.decoder.decode(utils.set_at_index(masked, keep, encoded.type_as(masked)))
        predicted = self.decoder.predict(utils.get_at_index(decoded, mask))
        target = utils.get_at_index(utils.patchify(pictures, self.patch), mask - 1)
        loss: Tensor = self.criterion(predicted, target)
        return loss


class StableDINO(Peer):
    """stable_pretraining.methods.DINO with its teacher's update."""

    def __init__(self, size: Size) -> None:
        from stable_pretraining.methods.dino import DINO as Theirs

        super().__init__()
        config, backbone = head(size), vit(size.backbone)
        sizes = (config.hidden, config.bottleneck, config.prototypes)
        self.model = Theirs(backbone, *sizes)
        self.model.log = self.model.log_dict = lambda *a, **k: None

    def training_step(self, views: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(global_views=views[:2], local_views=views[2:]).loss
        return loss

    def on_before_zero_grad(self, *args: Any) -> None:
        self.model.backbone.update_teacher()
        self.model.projector.update_teacher()


class StableMAE(Peer):
    """stable_pretraining.methods.MAE."""

    def __init__(self, size: Size) -> None:
        from stable_pretraining.methods.mae import MAE as Theirs

        super().__init__()
        self.model = Theirs(vit(size.backbone), size.decoder.width, size.decoder.depth, size.decoder.heads)

    def training_step(self, views: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(views[0]).loss
        return loss


def transform(method: str, size: Size) -> Callable[[Image.Image], list[Tensor]]:
    from lightly.transforms import DINOTransform, MAETransform

    side, (local, count) = size.backbone.image_size, size.local
    if method == "mae":
        return MAETransform(input_size=side)
    return DINOTransform(global_crop_size=side, local_crop_size=local, n_local_views=count)


def ours(method: str, size: Size, compiled: bool) -> Method:
    side, (local, count) = size.backbone.image_size, size.local
    backbone = replace(size.backbone, compile=True) if compiled else size.backbone
    if method == "mae":
        return MAE(backbone=backbone, decoder=size.decoder, crop=SingleCrop(side))
    return DINO(backbone=backbone, head=head(size), crops=MultiCrop(global_size=side, local_size=local, n_local=count))


class Data(lightning.LightningDataModule):
    """One loader for all fits, and how long it was waited for."""

    def __init__(self, loader: Any, batch_size: int) -> None:
        super().__init__()
        self.loader, self.batch_size, self.waited = loader, batch_size, 0.0
        self.batches: Iterator[Any] = iter(loader)
        self.workers: list[Any] = getattr(self.batches, "_workers", [])
        self.ready = len(self.workers)  # batches that were made in the turns of others
        atexit.register(self.signal, signal.SIGCONT)  # halted ones could not end

    def signal(self, number: int) -> None:
        for worker in self.workers:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, number)

    def __iter__(self) -> Iterator[Any]:
        while True:
            begin = time.perf_counter()
            batch = next(self.batches)
            self.waited += time.perf_counter() - begin
            yield batch

    def train_dataloader(self) -> "Data":
        return self

    def __len__(self) -> int:
        return 10**6


class Clock(lightning.Callback):
    """Seconds of the steps after the first ones, and those of them spent waiting for a batch."""

    def __init__(self, data: Data, first: int) -> None:
        self.data, self.first, self.seconds, self.waited, self.steps = data, first, 0.0, 0.0, 0

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.global_step in (self.first, trainer.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            last = trainer.global_step == trainer.max_steps
            self.seconds = time.perf_counter() - (self.seconds if last else 0.0)
            self.waited = self.data.waited - (self.waited if last else 0.0)
            self.steps = trainer.global_step - self.first


def block(module: lightning.LightningModule, data: Data, steps: int, trainer: dict[str, Any]) -> tuple[float, float]:
    """Seconds a step, and of them waiting, of one fit that goes on with the weights as they are."""
    clock = Clock(data, 2 + data.ready)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    fit = lightning.Trainer(max_steps=clock.first + steps, callbacks=[clock], use_distributed_sampler=False, **quiet, **trainer)
    data.signal(signal.SIGCONT)
    fit.fit(module, datamodule=data)
    data.signal(signal.SIGSTOP)
    return clock.seconds / clock.steps, clock.waited / clock.steps


def profile(side: str, module: lightning.LightningModule, data: Data, trainer: dict[str, Any]) -> None:
    """The operations that most of a few steps' time goes into, as shares of it."""
    block(module, data, 1, trainer)
    with torch.profiler.profile() as seen:
        block(module, data, 3, trainer)
    gpu = trainer["accelerator"] == "gpu"
    kinds = (torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA)
    events = [e for e in seen.key_averages() if e.device_type == kinds[gpu] and not (gpu and e.key.startswith(("Optimizer.", "#")))]
    spent = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in events}
    print(f"{side}: " + ", ".join(f"{key} {spent[key] / sum(spent.values()):.1%}" for key in sorted(spent, key=lambda k: -spent[k])[:12]))


def peak(device: str, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of ten products of square matrices."""
    n = 2048 if device == "cpu" else 4096
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def plain_step(method: str, size: Size, dtype: torch.dtype, batch: int) -> float:
    """Seconds of a compiled plain timm forward + backward over the same tokens, on CUDA."""
    torch._dynamo.config.recompile_limit = 64
    model = vit(size.backbone).cuda()
    for block_ in model.blocks:
        block_.compile()
    patches, (local, count) = model.patch_embed.num_patches, size.local
    width, heads = size.decoder.width, size.decoder.heads
    decoder = nn.Sequential(*[Block(width, heads) for _ in range(size.decoder.depth)]).cuda()
    views = [torch.randn(n * batch, 3, side, side, device="cuda") for side, n in ((size.backbone.image_size, 2), (local, count))]
    visible = torch.randn(batch, patches // 4 + 1, model.embed_dim, device="cuda")
    whole = torch.randn(batch, patches + 1, size.decoder.width, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            if method == "mae":
                loss = model.blocks(visible).float().mean() + decoder(whole).float().mean()
            else:
                with torch.no_grad():
                    model(views[0])
                loss = sum(model(view).float().mean() for view in views)
        loss.backward()

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / 20


def compare(method: str, name: str, options: argparse.Namespace, best: float) -> None:
    size = SIZES[name]
    batch, device, workers = options.batch or size.batch, options.device, options.workers
    pixels = images(max(1024 if size.backbone.image_size == 32 else 256, batch), size.backbone.image_size)
    trainer = {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1, "precision": options.precision}
    flops = training_flops(ours(method, size, False))
    peers: dict[str, Callable[[Size], lightning.LightningModule]] = {
        "lightly": LightlyMAE if method == "mae" else LightlyDINO,
        "stable-pretraining": StableMAE if method == "mae" else StableDINO,
    }
    stream = Stream(ImageStore.stacked(pixels), Order(len(pixels), batch, 0), pin=device == "cuda")
    sides: dict[str, tuple[lightning.LightningModule, Data]] = {"ours": (ours(method, size, options.compile), Data(stream, batch))}
    for peer in options.peers:
        try:
            module = peers[peer](size)
        except Exception as error:
            print(f"{method} {name}: {peer} is left out: {type(error).__name__}: {' '.join(str(error).split())[:120]}", flush=True)
            continue
        loader = DataLoader(
            Pictures(pixels, transform(method, size)),
            batch,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=1 if workers else None,
            pin_memory=device == "cuda",
        )
        sides[peer] = (module, Data(loader, batch))
    if options.profile:
        for side, (module, data) in sides.items():
            profile(f"{method} {name} {side}", module, data, trainer)
        return
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for number in range(options.blocks + 1):  # the first one warms up
        for side, (module, data) in sides.items():
            measured = block(module, data, options.steps, trainer)
            print(f"{method} {name} {side} {number or 'warm-up'}: {1e3 * measured[0]:.1f} ms a step", file=sys.stderr, flush=True)
            if number:
                times[side].append(measured)
    for side, blocks in times.items():
        seconds, waited = (statistics.median(column) for column in zip(*blocks, strict=True))
        ratios = [theirs[0] / mine[0] for theirs, mine in zip(blocks, times["ours"], strict=True)]
        share = f"{flops * batch / seconds / best:8.1%}" if side == "ours" else " " * 8
        spread = f"{statistics.median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{method:5s} {name:9s} {side:19s} {batch:5d} {1e3 * seconds:10.1f} {spread:22s} {share} {waited:9.4f}", flush=True)
    if device == "cuda":
        dtype = torch.bfloat16 if "bf16" in options.precision else torch.float32
        seconds = plain_step(method, size, dtype, batch)
        mine = statistics.median(first for first, _ in times["ours"])
        print(f"{method:5s} {name:9s} {'plain timm':19s} {batch:5d} {1e3 * seconds:10.1f} {seconds / mine:6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Training end to end against lightly and stable-pretraining.")
    parser.add_argument("--only", nargs="*", default=["width128", "vitti4", "vits16"], choices=SIZES)
    parser.add_argument("--peers", nargs="*", default=["lightly"], choices=["lightly", "stable-pretraining"])
    parser.add_argument("--methods", nargs="*", default=["mae", "dino"], choices=["mae", "dino"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--compile", action="store_true", help="ours with `backbone.compile`: blocks, views and loss")
    parser.add_argument("--batch", type=int, help="images a step; 128, 64 and 8 if not given")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--blocks", type=int, default=7, help="measured turns of each side")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of a block")
    parser.add_argument("--profile", action="store_true", help="the share of each operation instead of times")
    parser.add_argument("--quick", action="store_true", help="one block of two steps: does it run")
    options = parser.parse_args()
    if options.quick:
        options.blocks, options.steps = 1, 2
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    best = peak(options.device, torch.bfloat16 if "bf16" in options.precision else torch.float32)
    print(f"torch {torch.__version__}, {options.device}, {options.precision}, {options.workers} workers", end="")
    print(f"; product peak {best / 1e9:.0f} GFLOP/s")
    print(f"{'':5s} {'':9s} {'':19s} {'batch':>5s} {'ms / step':>10s} {'theirs / ours':22s} {'of peak':>8s} {'waited s':>9s}")
    for name in options.only:
        for method in options.methods:
            compare(method, name, options, best)


if __name__ == "__main__":
    main()

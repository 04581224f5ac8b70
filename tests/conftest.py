"""Small models and batches that the tests share. Nothing here or in the tests waits for a hub."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["OMP_NUM_THREADS"] = os.environ.get("SSL_VIT_TEST_THREADS", "1")  # before torch is imported, and for all child processes

import jaxtyping
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ssl_vit.data.stream import Batch
from ssl_vit.model.backbone import Backbone, build_backbone
from ssl_vit.model.config import BackboneConfig
from tests.processes import THREADS, begun


def pytest_configure(config: pytest.Config) -> None:
    """Tests run on the CPU on every machine, but for `-m gpu`."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # ignored in what nohup or a script's & has started, and what is ignored stays so; the tests send them
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def unchecked() -> Iterator[None]:
    """No checks of shapes: not every compiler can follow them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


TINY = BackboneConfig(name="vit_tiny_patch16_224", image_size=16, patch=4, width=24, depth=3, heads=2, registers=2)

BACKBONE = {"name": "vit_tiny_patch16_224", "image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2, "registers": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "dino": {
        "method": "dino",
        "backbone": BACKBONE,
        "head": {"hidden": 32, "bottleneck": 16, "prototypes": 64, "freeze_epochs": 0.5},
        "crops": {"global_size": 16, "local_size": 8, "n_local": 1, "blur_sigma": [0.1, 0.5]},
        "optim": {"lr": 0.02, "warmup_epochs": 1.0},
        "trainer": {"max_steps": 7},
    },
    "mae": {
        "method": "mae",
        "readout": "gap",
        "backbone": BACKBONE,
        "decoder": {"width": 16, "depth": 1, "heads": 2},
        "crop": {"size": 16},
        "optim": {"lr": 0.02, "warmup_epochs": 1.0},
        "trainer": {"max_steps": 7},
    },
}


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    while begun:
        begun.pop().wait(0)


@pytest.fixture(autouse=True)
def _no_cache_of_the_users(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path_factory.getbasetemp() / "ssl_vit_cache"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(THREADS)  # results differ in the last bits between thread counts
    torch.manual_seed(0)


@pytest.fixture
def backbone() -> Backbone:
    return build_backbone(TINY).eval()


@pytest.fixture
def batch() -> Batch:
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    return Batch(images, torch.full((8, 2), 16), torch.arange(8), 0)


@pytest.fixture
def pictures_and_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """26 pictures, three batches an epoch, and the two recipes, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("pictures").mkdir()
    for number in range(26):
        pixels = rng.integers(0, 256, (16 + number % 3, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pictures/{number:02}.png")
    for name, recipe in RECIPES.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "data": {"source": "./pictures", "batch_size": 8}}))


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` converts goes into a folder of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def three_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pictures/{train,test}/{dark,light,mid}` of 16 px, and the two recipes on them, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 12)):
        for level, name in ((105, "dark"), (120, "mid"), (135, "light")):
            folder = Path("pictures") / split / name
            folder.mkdir(parents=True)
            for number in range(count // 3):
                noise = rng.normal(level, 60, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noise).save(folder / f"{number:02}.png")
    for name, recipe in RECIPES.items():
        fields: dict[str, Any] = {**recipe, "trainer": {"max_steps": 3}, "data": {"source": "./pictures", "batch_size": 8}}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(fields))


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the command said of what went wrong."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("ssl-vit: ")]

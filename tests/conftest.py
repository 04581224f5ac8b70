"""Small models and batches that the tests share. Nothing here or in the tests waits for a hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch

from ssl_vit.backbone import Backbone, BackboneConfig, build_backbone
from ssl_vit.methods.base import Batch

TINY = BackboneConfig(name="vit_tiny_patch16_224", image_size=16, patch=4, width=24, depth=3, heads=2, registers=2)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # results differ in the last bits between thread counts
    torch.manual_seed(0)


@pytest.fixture
def backbone() -> Backbone:
    return build_backbone(TINY).eval()


@pytest.fixture
def batch() -> Batch:
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    return Batch(images, torch.full((8, 2), 16), torch.arange(8), 0)

"""`ssl-vit export`: one network of a checkpoint as a folder that `timm.create_model("local-dir:DIR", pretrained=True)` loads."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import nn

from ssl_vit.errors import Failure, UsageError
from ssl_vit.files import write_atomically
from ssl_vit.model.backbone import Backbone
from ssl_vit.model.config import BackboneConfig
from ssl_vit.weights.checkpoint import Which, backbone_of, network_of, read_checkpoint, split_network

# What `model(images)` gives: the readout that was trained, where timm has it, else all tokens after the final norm.
POOLS: dict[str, dict[str, Any]] = {
    "cls": {"global_pool": "token"},
    "gap": {"global_pool": "avg", "fc_norm": False},  # timm would otherwise move the final norm behind this pool
}


def export(source: str, out: str | Path) -> Path:
    """Write `model.safetensors`, `config.json` and, where the trained readout has parameters, `readout.safetensors`; the folder.

    Args:
        source: `CKPT` for the teacher, or the one network that there is; `CKPT:student` for the student of a DINO run.
        out: a folder that does not exist or is empty. It is there complete or not at all.

    timm opens the folder before it is put in place: Failure unless it gives the same tokens, bit for bit.
    UsageError for a source that is not there, one without a student, and for a folder in use.
    """
    folder, (path, which) = Path(out).expanduser(), split_network(source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{out} already holds something; name another folder with --out")
    checkpoint = read_checkpoint(path)
    backbone = backbone_of(checkpoint, path, which)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write(partial, checkpoint["ssl_vit"], backbone, network_of(checkpoint, path, which))
        _verify(partial, backbone)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(folder: Path, entry: dict[str, Any], backbone: Backbone, network: Which | None) -> None:
    """The weights, and what timm reads in config.json: the arguments of `build_backbone`, and how images are brought in."""
    config, side = BackboneConfig.of(entry["recipe"]["backbone"]), backbone.image_size
    told = {
        "architecture": config.name,
        "num_classes": 0,
        "num_features": backbone.width,
        "model_args": {**config.timm_arguments(), **POOLS.get(entry["readout"], {"global_pool": ""})},
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "interpolation": "bicubic",
            "crop_pct": 224 / 256,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "ssl_vit": {**entry, "network": network},
    }
    write_atomically(folder / "config.json", json.dumps(told, indent=2) + "\n")
    _save(folder / "model.safetensors", backbone.vit)
    assert backbone.trained_readout is not None
    if backbone.trained_readout.state_dict():
        _save(folder / "readout.safetensors", backbone.trained_readout)


def _save(path: Path, module: nn.Module) -> None:
    """Not by `save_file`, whose errors are none of the system's: of a full disk we have a line of our own."""
    content = save({key: value.contiguous() for key, value in module.state_dict().items()})
    write_atomically(path, lambda file: file.write(content))


@torch.no_grad()
def _verify(folder: Path, backbone: Backbone) -> None:
    vit = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(0))
    tokens = backbone(images).normed
    if not torch.equal(vit.forward_features(images), torch.cat([tokens.cls, tokens.registers, tokens.patches], dim=1)):
        raise Failure(f"timm {timm.__version__} reads the exported weights as another model; export with the timm of the training")

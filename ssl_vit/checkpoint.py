"""Checkpoints and timm names, turned into a Backbone; nothing is ever unpickled."""

import difflib
import hashlib
import inspect
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import timm
import torch
from huggingface_hub import constants
from timm.models import is_model

from ssl_vit.backbone import Backbone, BackboneConfig, build_backbone
from ssl_vit.errors import Failure, UsageError, one_of, require

FORMAT = 1  # of a checkpoint's "ssl_vit" entry


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The whole checkpoint, loaded with `weights_only=True`. UsageError if it is not there, Failure if it is not one of ours."""
    file = Path(path).expanduser()
    if file.is_dir():
        inside = sorted(p.name for p in file.glob("*.ckpt"))
        advice = f"name the file in it: {', '.join(inside)}" if inside else "it holds no *.ckpt"
        raise UsageError(f"{path} is a folder, not a checkpoint; {advice}")
    if not file.exists():
        raise UsageError(f"there is no checkpoint {path}; give the path of a *.ckpt file, timm:NAME, random:RECIPE or pixels")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file makes the unpickler raise almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise Failure(f"{path} is not a readable checkpoint ({reason}); give a *.ckpt that ssl-vit pretrain wrote") from error
    if not isinstance(checkpoint, dict) or "ssl_vit" not in checkpoint or "state_dict" not in checkpoint:
        raise Failure(f"{path} is not a checkpoint of ssl-vit; give a *.ckpt that ssl-vit pretrain wrote")
    ours = checkpoint["ssl_vit"]
    if ours["format"] != FORMAT:
        raise Failure(f"{path} has checkpoint format {ours['format']}, this version reads {FORMAT}; it was written by {ours['versions']}")
    return checkpoint


def file_hash(path: str | Path) -> str:
    """16 hex digits of the file's SHA-256."""
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def load_backbone(source: str | Path, pretrained: bool = True, which: Literal["teacher", "student"] = "teacher", **kwargs: Any) -> Backbone:
    """A backbone in evaluation mode.

    Args:
        source: the path of a checkpoint, or `timm:NAME`.
        pretrained: False for the same architecture with random weights.
        which: of a DINO checkpoint.
        kwargs: for `timm:NAME`, further arguments of `timm.create_model`; those that the model does not take are left out with a warning.

    Raises UsageError for an unknown name or path, Failure for a file that is not a checkpoint or weights that cannot be fetched.
    """
    require(which in ("teacher", "student"), "which", repr(which), "'teacher' or 'student'")
    text = str(source)
    if text.startswith("timm:"):
        return _load_timm(text.removeprefix("timm:"), pretrained, kwargs).eval()
    if kwargs:
        raise UsageError(f"{source} takes no further arguments, got {', '.join(kwargs)}; a checkpoint knows its own architecture")
    checkpoint = read_checkpoint(source)
    ours = checkpoint["ssl_vit"]
    backbone = build_backbone(BackboneConfig(**ours["recipe"]["backbone"]), drop_path=0.0)
    if pretrained:
        prefix = f"{which}.backbone." if any(key.startswith(f"{which}.") for key in checkpoint["state_dict"]) else "backbone."
        state = {key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)}
        backbone.load_state_dict(state)
        backbone.trained_readout = ours["readout"]
    backbone.mean, backbone.std = (ours["mean"][0], ours["mean"][1], ours["mean"][2]), (ours["std"][0], ours["std"][1], ours["std"][2])
    return backbone.eval()


def _load_timm(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Backbone:
    if not is_model(name.split(".")[0]):
        raise UsageError(
            f"timm has no model {name!r}; {one_of(name, difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.3))}"
        )
    with torch.device("meta"):  # the architecture alone, before any weight is fetched
        kind = timm.create_model(name, pretrained=False)
    reads = inspect.signature(kind.forward_intermediates).parameters if hasattr(kind, "forward_intermediates") else ()
    if "return_prefix_tokens" not in reads or not hasattr(kind.patch_embed, "patch_size"):
        raise UsageError(f"timm:{name} is not a Vision Transformer that yields tokens; choose one such as timm:vit_small_patch16_224")
    kwargs = {"num_classes": 0, **kwargs}
    while True:
        try:
            with _quick_offline_error(f"the weights of timm:{name}", pretrained):
                vit = timm.create_model(name, pretrained=pretrained, **kwargs)
            break
        except TypeError as error:  # "... got an unexpected keyword argument 'reg_tokens'"
            refused = [key for key in kwargs if f"'{key}'" in str(error)]
            if "unexpected keyword" not in str(error) or not refused:
                raise
            warnings.warn(f"timm:{name} does not take {refused[0]}; left out", stacklevel=3)
            kwargs.pop(refused[0])
    config = vit.pretrained_cfg
    size = getattr(vit.patch_embed, "img_size", None) or config["input_size"][1:]
    return Backbone(vit, size[0], mean=config["mean"], std=config["std"])


@contextmanager
def _quick_offline_error(what: str, online: bool) -> Iterator[None]:
    """Say within seconds that the hub is out of reach, instead of retrying for a minute; weights in the cache still load."""
    offline = constants.HF_HUB_OFFLINE
    if online and not offline:
        try:
            socket.create_connection((urlparse(constants.ENDPOINT).hostname or "", 443), timeout=3).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not online or not constants.HF_HUB_OFFLINE:
            raise
        raise Failure(
            f"cannot fetch {what}: no network, and they are not in the cache; fetch them where there is one, or use pretrained=False"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline

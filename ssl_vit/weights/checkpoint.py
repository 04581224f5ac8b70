"""Checkpoints, exported folders, the authors' weight files and timm names, turned into a Backbone; nothing is ever unpickled."""

import argparse
import difflib
import inspect
import json
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import timm
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import is_model
from torch.nn import functional as F

from ssl_vit.data.hub import hub_answers
from ssl_vit.errors import Failure, OtherVersion, UsageError, near_path, one_of, reason, require
from ssl_vit.model.backbone import Backbone, build_backbone
from ssl_vit.model.config import BackboneConfig
from ssl_vit.model.positions import bicubic
from ssl_vit.model.readout import Readout, ReadoutSpec
from ssl_vit.weights.official import UNDERSTOOD, check_size, official_backbone

# What the authors' full checkpoints hold beside tensors, all of it values: a command line in a Namespace with a path, and the
# optimizer's rates as numpy scalars; under the names of numpy 1 and 2, and of Python to 3.12 and from 3.13.
PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    type(np.dtype(np.float64)),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
]
FORMAT = 1  # of a checkpoint's "ssl_vit" entry
Which = Literal["teacher", "student"]


def split_network(text: str) -> tuple[str, Which | None]:
    """`PATH` and `PATH:student` as the path and what follows it; None asks for the teacher, where there are two networks."""
    path = text.removesuffix(":student")
    return path, None if path == text else "student"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint, or an exported folder in the form of one: `ssl_vit` and `state_dict`.

    UsageError if it is not there, Failure if it is not one of ours."""
    content = read_weights(path)
    if not is_ours(content):
        raise Failure(f"{path} is not a checkpoint of ssl-vit; give a *.ckpt that ssl-vit pretrain wrote")
    return dict(content)


def is_ours(content: object) -> bool:
    return isinstance(content, dict) and "ssl_vit" in content and "state_dict" in content


def read_weights(path: str | Path) -> Any:
    """What a checkpoint, an exported folder or another weights file holds, loaded with `weights_only=True`.

    UsageError if it is not there, Failure if it cannot be read or another version of ssl-vit wrote it."""
    content = _read_exported(path) if (Path(path).expanduser() / "config.json").exists() else _read_file(path)
    if is_ours(content):
        entry = content["ssl_vit"] if isinstance(content["ssl_vit"], dict) else {}
        if (found := entry.get("format")) != FORMAT:
            raise OtherVersion(
                f"{path} has checkpoint format {found}, this version of ssl-vit reads {FORMAT}; it was written by "
                f"{entry.get('versions', 'an unknown version')}: use that one, or pretrain again"
            )
    return content


def _read_file(path: str | Path) -> Any:
    file = Path(path).expanduser()
    if file.is_dir():
        inside = sorted(str(p) for p in file.glob("*.ckpt"))
        advice = f"name the file in it: {', '.join(inside)}" if inside else "it holds no *.ckpt and no config.json of ssl-vit export"
        raise UsageError(f"{path} is a folder, not a checkpoint; {advice}")
    if not file.exists():
        before, colon, network = str(path).rpartition(":")
        if colon and Path(before).expanduser().exists():
            raise UsageError(f"{before} has no network {network!r}; {one_of(f':{network}', [':student'])}, or nothing for the teacher's")
        near = near_path(file, more=["pixels"] if file.name == str(path) else [])
        raise UsageError(
            f"there is no checkpoint {path}; {near}give a *.ckpt file (CKPT:student for a DINO student), an exported folder, a weights "
            "file of DINO, MAE or DINOv2, timm:NAME, random:RECIPE or pixels"
        )
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as records:
                if damaged := records.testzip():  # torch does not look at the checksums
                    unless = "or it was written without checksums (torch.serialization.set_crc32_options)"
                    raise zipfile.BadZipFile(f"damaged: {damaged} has another checksum than when it was written, {unless}")
        with warnings.catch_warnings(), torch.serialization.safe_globals(PLAIN):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file makes the unpickler raise almost anything
        raise Failure(f"{path} is not a readable checkpoint ({reason(error)}); give {UNDERSTOOD}") from error


def _read_exported(path: str | Path) -> dict[str, Any]:
    """An exported folder in the form of a checkpoint that holds one network."""
    folder = Path(path).expanduser()
    try:
        entry = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("ssl_vit")
        if entry is None:
            raise Failure(f"{folder} was not written by ssl-vit export: its config.json has no entry ssl_vit; give {UNDERSTOOD}")
        network = entry.get("network", entry.get("arm"))  # named so by earlier versions
        at = f"{network}." if network else ""
        state = {f"{at}backbone.vit.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
        if (folder / "readout.safetensors").exists():
            state |= {f"{at}readout.{key}": value for key, value in load_file(folder / "readout.safetensors").items()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise Failure(f"{folder} is not a readable export ({reason(error)}); export the checkpoint again") from error
    return {"ssl_vit": entry, "state_dict": state}


def load_backbone(
    source: str | Path, pretrained: bool = True, which: Which | None = None, image_size: int | None = None, **kwargs: Any
) -> Backbone:
    """A backbone in evaluation mode.

    Args:
        source: the path of a checkpoint, of an exported folder or of a weights file of DINO, MAE or DINOv2; or `timm:NAME`.
        pretrained: False for the same architecture with random weights.
        which: of a DINO checkpoint; None for the teacher, or for the one network that there is.
        image_size: side in pixels that it will read. Models of ssl-vit take any multiple of the patch as it comes (positions are
            interpolated in the forward); None leaves the others at their own, official files at 224 at most.
        kwargs: for `timm:NAME`, further arguments of `timm.create_model`; those that the model does not take are left out with a warning.

    Raises UsageError for an unknown name, path or size, Failure for a file that is not understood or weights that cannot be fetched.
    """
    text = str(source)
    if text.startswith("timm:"):
        return _load_timm(text.removeprefix("timm:"), pretrained, image_size, kwargs).eval()
    if kwargs:
        raise UsageError(f"{source} takes no further arguments, got {', '.join(kwargs)}; a checkpoint knows its own architecture")
    content = read_weights(source)
    if is_ours(content):
        return backbone_of(content, text, which, image_size, pretrained)
    if not pretrained:
        raise UsageError(f"{source} is nothing but weights; for random ones name the architecture, as timm:NAME or random:RECIPE")
    return official_backbone(content, text, which, image_size)[1]


def start_from(backbone: Backbone, source: str) -> None:
    """Copy the weights that `source` names (one of `load_backbone`'s, or CKPT:student) into a backbone built from a recipe.

    Positions are resized to its grid; a class token's own is added to the token, which gives the same sum.
    UsageError unless architecture and input normalisation are the same."""
    path, which = split_network(source)
    other = load_backbone(path, which=which, image_size=backbone.image_size)
    drawn, given = backbone.vit.state_dict(), other.vit.state_dict()
    if given.get("pos_embed") is not None and "pos_embed" in drawn:
        old, new = other.vit.patch_embed.grid_size, backbone.vit.patch_embed.grid_size
        prefix, table = given["pos_embed"].split([given["pos_embed"].shape[1] - old[0] * old[1], old[0] * old[1]], dim=1)
        if prefix.shape[1] and "cls_token" in given:
            given["cls_token"] = given["cls_token"] + prefix[:, : other.cls_tokens]
        table = table if old == new else bicubic(old, new, table) @ table
        given["pos_embed"] = F.pad(table, (0, 0, drawn["pos_embed"].shape[1] - table.shape[1], 0))
    here, there = (
        {key: tuple(value.shape) for key, value in state.items()} | {**model.settings(), "mean": tuple(model.mean), "std": tuple(model.std)}
        for model, state in ((backbone, drawn), (other, given))
    )
    for key in [*here, *there]:
        if here.get(key) != there.get(key):
            raise UsageError(
                f"init {source} does not fit the recipe's backbone: {key} is {there.get(key)} there and {here.get(key)} here; "
                "change backbone, or name another init"
            )
    backbone.vit.load_state_dict(given)


def backbone_of(
    checkpoint: dict[str, Any], name: str, which: Which | None = None, image_size: int | None = None, pretrained: bool = True
) -> Backbone:
    """The backbone in what `read_weights` found to be a checkpoint of ssl-vit (`name` is for messages)."""
    entry = checkpoint["ssl_vit"]
    backbone = build_backbone(BackboneConfig.of(entry["recipe"]["backbone"]), drop_path=0.0)
    check_size(image_size, backbone.patch, name)
    if pretrained:
        network = network_of(checkpoint, name, which)
        at = f"{network}." if network else ""
        trained = Readout(ReadoutSpec.parse(entry["readout"]), backbone.width)
        for module, prefix in ((backbone, f"{at}backbone."), (trained, f"{at}readout.")):
            state = {key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)}
            try:
                module.load_state_dict(state)
            except RuntimeError as error:
                raise Failure(f"the weights in {name} do not fit its recipe: {' '.join(str(error).split())[:200]}") from error
        backbone.trained_readout = trained
    backbone.mean, backbone.std = tuple(entry["mean"]), tuple(entry["std"])
    return backbone.eval()


def network_of(checkpoint: dict[str, Any], name: str, which: str | None = None) -> Which | None:
    """The network that is read: the one asked for, else the teacher, else the only one; None for MAE's, which has no such name."""
    networks: tuple[Which, ...] = ("teacher", "student")
    require(which in (None, *networks), "which", repr(which), "'teacher' or 'student'")
    there = [network for network in networks if any(key.startswith(f"{network}.") for key in checkpoint["state_dict"])]
    if which is not None and which not in there:
        holds = f"the {there[0]} only" if there else f"one network, trained with {checkpoint['ssl_vit']['recipe']['method']}"
        raise UsageError(f"{name} holds no {which}: it holds {holds}; leave out ':{which}'")
    return next((network for network in there if which in (None, network)), None)


def _load_timm(name: str, pretrained: bool, image_size: int | None, kwargs: dict[str, Any]) -> Backbone:
    if not is_model(name.split(".")[0]):
        raise UsageError(
            f"timm has no model {name!r}; {one_of(name, difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.3))}"
        )
    with torch.device("meta"):  # the architecture alone, before any weight is fetched
        kind = timm.create_model(name, pretrained=False)
    reads = inspect.signature(kind.forward_intermediates).parameters if hasattr(kind, "forward_intermediates") else ()
    if "return_prefix_tokens" not in reads or not hasattr(kind.patch_embed, "patch_size"):
        raise UsageError(f"timm:{name} is not a Vision Transformer that yields tokens; choose one such as timm:vit_small_patch16_224")
    dynamic = {"dynamic_img_size": True} if hasattr(kind, "dynamic_img_size") else {}  # BEiT has no such thing
    kwargs = {"num_classes": 0, **dynamic, **kwargs}
    if image_size is not None and image_size != _side(kind):
        check_size(image_size, kind.patch_embed.patch_size[0], f"timm:{name}")
        kwargs["img_size"] = image_size
        if pretrained:
            warnings.warn(f"timm:{name}: positions interpolated from {_side(kind)} px to {image_size} px", stacklevel=3)
    while True:
        try:
            with _quick_offline_error(f"the weights of timm:{name}", pretrained):
                vit = timm.create_model(name, pretrained=pretrained, **kwargs)
            break
        except TypeError as error:  # "... got an unexpected keyword argument 'reg_tokens'"
            refused = [key for key in kwargs if f"'{key}'" in str(error)]
            if "unexpected keyword" not in str(error) or not refused:
                raise
            if refused[0] == "img_size" and image_size is not None:
                raise UsageError(f"timm:{name} reads {_side(kind)} px only, got {image_size}; leave the image size out") from error
            warnings.warn(f"timm:{name} does not take {refused[0]}; left out", stacklevel=3)
            kwargs.pop(refused[0])
    return Backbone(vit, _side(vit), mean=vit.pretrained_cfg["mean"], std=vit.pretrained_cfg["std"])


def _side(vit: Any) -> int:
    """The side of the images that a model of timm is made for, in pixels."""
    size = getattr(vit.patch_embed, "img_size", None) or vit.pretrained_cfg["input_size"][1:]
    return int(size[0])


@contextmanager
def _quick_offline_error(what: str, online: bool) -> Iterator[None]:
    """Fail within seconds where the hub is out of reach (its client retries for a minute); weights in the cache still load."""
    offline = constants.HF_HUB_OFFLINE
    if online and not offline and not hub_answers():
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        # a proxy that refuses the files is an error of the hub's client or of its HTTP library, which changes with the version
        refused = type(error).__module__.partition(".")[0] in ("huggingface_hub", "httpx", "requests", "urllib3")
        if not online or not (isinstance(error, OSError | RuntimeError) if constants.HF_HUB_OFFLINE else refused):
            raise
        why = "no network, and they are not in the cache" if constants.HF_HUB_OFFLINE else f"{reason(error)}; the cache is"
        raise Failure(
            f"cannot fetch {what}: {why} ({constants.HF_HUB_CACHE}); run the same command once where there "
            "is a network that lets it through, with HF_HOME on a disk that both machines see"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline

"""The authors' weight files of DINO, MAE and DINOv2, recognised by their published keys and turned into a Backbone.

Layouts: DINO (Caron et al. 2021), a plain ViT, or a full checkpoint {"student": ..., "teacher": ...} with heads; MAE (He et al. 2022),
{"model": ...} with or without the decoder; DINOv2 (Oquab et al. 2023), with layer scale, blocks in chunks or not, registers
(Darcet et al. 2023) or not, SwiGLU in the giant.

None of these files says what its loss was attached to, so `trained_readout` stays None.
"""

import math
import re
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.errors import Failure, UsageError
from ssl_vit.model.backbone import Backbone
from ssl_vit.model.positions import bicubic

UNDERSTOOD = 'a *.ckpt of ssl-vit, or DINO (plain or {"student", "teacher"}), MAE ({"model"}) or DINOv2 weights of their authors'
IMAGE_SIZE = 224  # that all three are evaluated at
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}  # by width, as published: no file says it, and MAE's ViT-H has 80 a head
_NEEDED = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "norm.weight": 1, "blocks.0.attn.qkv.weight": 2}  # key: dimensions


def official_backbone(
    content: object, name: str, which: Literal["teacher", "student"] | None = None, image_size: int | None = None
) -> tuple[str, Backbone]:
    """The family (`dino`, `mae` or `dinov2`) of what `torch.load` found in a file, and its encoder.

    Args:
        content: of the file.
        name: of the file, for messages.
        which: of a full DINO checkpoint; the teacher if None.
        image_size: side in pixels that the position table is resized to, with a warning; None for the file's own, at most 224.

    Raises Failure for another layout or a key too many or too few, UsageError for a student or a size that cannot be had.
    """
    state, in_model = _unwrap(content, name, which)
    tensors = all(isinstance(value, Tensor) for value in state.values())
    if not tensors or any(key not in state or state[key].ndim != n for key, n in _NEEDED.items()):
        raise Failure(f"{name} is no weights file that is understood (its keys begin with {_some(state)}); give {UNDERSTOOD}")
    ignored: tuple[str, ...]
    if "blocks.0.ls1.gamma" in state:
        family, ignored = "dinov2", ("mask_token",)
    elif in_model or "decoder_embed.weight" in state or not state["pos_embed"][:, 0].any():  # MAE's class token has a zero position
        family, ignored = "mae", ("mask_token", "decoder_")
    else:
        family, ignored = "dino", ()
    state = {key: value.float() for key, value in state.items() if not key.startswith(ignored)}
    registers = state.pop("register_tokens", None)

    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    grid = math.isqrt(state["pos_embed"].shape[1] - 1)
    native = grid * patch
    size = min(native, IMAGE_SIZE) if image_size is None else image_size
    check_size(size, patch, name)
    if grid**2 + 1 != state["pos_embed"].shape[1]:
        raise Failure(f"{name} has positions for {state['pos_embed'].shape[1]} tokens, which are not a class token and a square of patches")
    if size != native:
        warnings.warn(f"{name}: positions interpolated from {native} px to {size} px", stacklevel=2)
    # Adding the class token's position to the token itself gives the same sums, and a layout without that slot.
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = _resized(state["pos_embed"][:, 1:], grid, size // patch, family, registers is not None)
    if registers is not None:
        state["reg_token"] = registers

    vit = _vit(state, size, width, patch, name)
    _load(vit, state, name, family)
    return family, Backbone(vit, size).eval()


def check_size(image_size: int | None, patch: int, name: str) -> None:
    """UsageError unless images of this side can be cut into patches; None is a model's own side."""
    if image_size is not None and (image_size < patch or image_size % patch):
        near = max(round(image_size / patch), 1) * patch
        raise UsageError(f"image size {image_size} is not divisible by the patch of {name}, {patch} px; choose {near}")


def _unwrap(content: object, name: str, which: str | None) -> tuple[dict[str, Any], bool]:
    """What is said to be the encoder's weights, as `blocks.N.…`, and whether they lay under "model"."""
    inner: Any = content if isinstance(content, Mapping) else {}
    full = isinstance(inner.get("teacher"), Mapping)
    if which == "student" and not full:
        raise UsageError(f"{name} holds one network, not a student and a teacher; leave out ':student'")
    in_model = not full and isinstance(inner.get("model"), Mapping)
    inner = inner.get(which or "teacher") if full else inner["model"] if in_model else inner
    if not isinstance(inner, Mapping):
        raise UsageError(f"{name} holds no {which}; leave out ':{which}'")
    # without what DistributedDataParallel and torch.compile put in front of a module's name
    state = {re.sub(r"(^|\.)(?:(?:module|_orig_mod)\.)+", r"\1", str(key)): value for key, value in inner.items()}
    if full:  # the projection heads lie beside the backbone
        state = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", key): value for key, value in state.items()}, in_model


def _resized(table: Float[Tensor, "1 n d"], old: int, new: int, family: str, registers: bool) -> Float[Tensor, "1 m d"]:
    """Positions [1 old² d] for a grid of new x new, interpolated as each family's authors do when they evaluate."""
    if new == old:
        return table
    if family != "mae" and not registers:
        return bicubic((old, old), (new, new), table) @ table
    image = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(new, new), mode="bicubic", antialias=registers)
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _vit(state: dict[str, Tensor], size: int, width: int, patch: int, name: str) -> VisionTransformer:
    """The architecture that the shapes tell; SwiGLU's keys in `state` get timm's names."""
    depth = 1 + max(int(match[1]) for match in (re.match(r"blocks\.(\d+)\.", key) for key in state) if match)
    heads = HEADS.get(width, width // 64)
    if width not in HEADS:
        if width % 64:
            raise Failure(f"{name} has tokens of width {width}, which no published model has and 64 does not divide; its heads are unknown")
        warnings.warn(f"{name}: no published model is {width} wide; taken to have {heads} heads, of 64 each", stacklevel=3)
    kind: dict[str, Any] = {}
    if "blocks.0.mlp.w12.weight" in state:
        kind = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
        for key in [key for key in state if ".mlp.w" in key]:
            state[key.replace(".w12.", ".fc1.").replace(".w3.", ".fc2.")] = state.pop(key)
    first = state.get("blocks.0.mlp.fc1.weight")
    return VisionTransformer(
        img_size=size,
        patch_size=patch,
        num_classes=0,
        global_pool="",
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=4.0 if first is None else (len(first) + 0.5) / width,  # timm rounds the product down to the hidden width
        init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
        reg_tokens=state["reg_token"].shape[1] if "reg_token" in state else 0,
        no_embed_class=True,
        dynamic_img_size=True,
        weight_init="skip",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **kind,
    )


def _load(vit: VisionTransformer, state: dict[str, Tensor], name: str, family: str) -> None:
    expected = {key: value.shape for key, value in vit.state_dict().items()}
    wrong = {
        "holds what they do not have": state.keys() - expected.keys(),
        "lacks": expected.keys() - state.keys(),
        "has other shapes in": {key for key in expected.keys() & state.keys() if state[key].shape != expected[key]},
    }
    for what, keys in wrong.items():
        if keys:
            raise Failure(f"{name} is laid out like the weights of {family} but {what}: {_some(keys)}; give {UNDERSTOOD}")
    vit.load_state_dict(state)


def _some(keys: Any) -> str:
    names = sorted(keys)
    return (", ".join(names[:3]) or "nothing") + (f" and {len(names) - 3} more" if len(names) > 3 else "")

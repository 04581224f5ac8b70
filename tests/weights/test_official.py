"""The authors' weight files: layouts written here by hand, against a forward pass written here from the papers."""

import argparse
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ssl_vit import load_backbone
from ssl_vit.errors import Failure, UsageError
from ssl_vit.model.config import IMAGENET_MEAN, IMAGENET_STD
from ssl_vit.weights.checkpoint import read_weights
from ssl_vit.weights.official import official_backbone
from ssl_vit_eval.sources import open_source

WIDTH, HEADS, DEPTH, PATCH, GRID = 192, 3, 2, 4, 5
SIZE = PATCH * GRID
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plain(width: int = WIDTH, depth: int = DEPTH, patch: int = PATCH, grid: int = GRID) -> State:
    """DINO's published keys, random; small numbers, so that the LayerNorms' eps counts."""
    state = {
        "cls_token": 0.02 * torch.randn(1, 1, width),
        "pos_embed": 0.02 * torch.randn(1, 1 + grid**2, width),
        "patch_embed.proj.weight": 0.002 * torch.randn(width, 3, patch, patch),
        "patch_embed.proj.bias": 0.01 * torch.randn(width),
        "norm.weight": 1 + 0.1 * torch.randn(width),
        "norm.bias": 0.1 * torch.randn(width),
    }
    for block in range(depth):
        layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, shape in layers.items():
            state[f"blocks.{block}.{name}.weight"] = 0.05 * torch.randn(shape)
            state[f"blocks.{block}.{name}.bias"] = 0.1 * torch.randn(shape[0])
        for norm in ("norm1", "norm2"):
            state[f"blocks.{block}.{norm}.weight"] = 1 + 0.1 * torch.randn(width)
            state[f"blocks.{block}.{norm}.bias"] = 0.1 * torch.randn(width)
    return state


def mae(decoder: bool = True) -> State:
    state = plain()
    state["pos_embed"][:, 0] = 0
    extra = {
        "mask_token": torch.randn(1, 1, 64),
        "decoder_embed.weight": torch.randn(64, WIDTH),
        "decoder_pos_embed": torch.randn(1, 26, 64),
    }
    extra |= {"decoder_blocks.0.norm1.weight": torch.randn(64), "decoder_norm.bias": torch.randn(64)}
    return {**state, **(extra if decoder else {})}


def dinov2(registers: int = 0, swiglu: bool = False) -> State:
    state = {**plain(), "mask_token": torch.randn(1, WIDTH)}
    if registers:
        state["register_tokens"] = 0.02 * torch.randn(1, registers, WIDTH)
    for block in range(DEPTH):
        for scale in ("ls1.gamma", "ls2.gamma"):
            state[f"blocks.{block}.{scale}"] = 0.5 * torch.randn(WIDTH)
        if swiglu:
            for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                del state[f"blocks.{block}.mlp.{name}"]
            state[f"blocks.{block}.mlp.w12.weight"] = 0.05 * torch.randn(2 * 200, WIDTH)
            state[f"blocks.{block}.mlp.w12.bias"] = 0.1 * torch.randn(2 * 200)
            state[f"blocks.{block}.mlp.w3.weight"] = 0.05 * torch.randn(WIDTH, 200)
            state[f"blocks.{block}.mlp.w3.bias"] = 0.1 * torch.randn(WIDTH)
    return state


def chunked(state: State) -> State:
    """One block in each chunk, as DINOv2's own training saves them: blocks.CHUNK.BLOCK, the blocks counted through."""
    return {key.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): value for key, value in state.items()}


def forward(state: State, images: Tensor, heads: int = HEADS) -> Tensor:
    """All tokens after the final norm, [b 1+r+n d] (ViT; registers without a position, Darcet et al. 2023, section 2.2)."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(images, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1]).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    for i in range(sum(key.endswith("norm1.weight") for key in state if key.startswith("blocks."))):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj") * state.get(f"blocks.{i}.ls1.gamma", 1)
        h = norm(x, f"blocks.{i}.norm2")
        if f"blocks.{i}.mlp.w12.weight" in state:
            gate, value = linear(h, f"blocks.{i}.mlp.w12").chunk(2, dim=-1)
            h = linear(gate * gate.sigmoid() * value, f"blocks.{i}.mlp.w3")
        else:
            h = linear(F.gelu(linear(h, f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
        x = x + h * state.get(f"blocks.{i}.ls2.gamma", 1)
    return norm(x, "norm")


@pytest.mark.parametrize(
    ("family", "state", "registers"),
    [
        ("dino", plain, 0),
        ("mae", mae, 0),
        ("mae", lambda: mae(decoder=False), 0),
        ("dinov2", dinov2, 0),
        ("dinov2", lambda: dinov2(registers=4), 4),
        ("dinov2", lambda: dinov2(registers=2, swiglu=True), 2),
    ],
)
@torch.no_grad()
def test_every_layout_gives_the_tokens_of_the_paper(family: str, state: Any, registers: int) -> None:
    weights, images = state(), torch.randn(3, 3, SIZE, SIZE)
    files = {"plain": weights, "model": {"model": weights, "args": argparse.Namespace(lr=0.1), "epoch": 3}} if family == "mae" else {}
    files = files or {"plain": weights, "chunked": chunked(weights), "parallel": {f"module.{key}": value for key, value in weights.items()}}
    for name, content in files.items():
        torch.save(content, f"{name}.pth")
        source = open_source(f"{name}.pth")
        assert source.backbone is not None
        assert (source.name, source.method, source.trained_with, source.image_size) == (name, f"official-{family}", None, SIZE)
        assert (source.backbone.mean, source.backbone.std) == (IMAGENET_MEAN, IMAGENET_STD)
        tokens = source.backbone(images).normed
        assert (tokens.cls.shape[1], tokens.registers.shape[1]) == (1, registers)
        expected = forward(weights, images)
        torch.testing.assert_close(torch.cat([tokens.cls, tokens.registers, tokens.patches], dim=1), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
@torch.no_grad()
def test_a_full_checkpoint_holds_teacher_and_student(wrapper: str) -> None:
    teacher, student, images = plain(), plain(), torch.randn(2, 3, SIZE, SIZE)
    heads = {"head.mlp.0.weight": torch.randn(4, 4), "head.last_layer.weight_g": torch.randn(4, 1)}
    content = {
        "student": {
            wrapper + key: value for key, value in {**{f"backbone.{key}": value for key, value in student.items()}, **heads}.items()
        },
        "teacher": {**{f"backbone.{key}": value for key, value in teacher.items()}, **heads},
        # the authors assign entries of numpy tables to the groups, and keep the command line
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(5e-4), "weight_decay": np.float64(0.04), "params": [0]}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005, local_crops_scale=(0.05, 0.4), output_dir=Path("out/here")),
    }
    torch.save(content, "full.pth")
    for name, state in (("full.pth", teacher), ("full.pth:student", student)):
        source = open_source(name)
        assert source.backbone is not None
        assert source.name == name.replace(".pth", "")
        torch.testing.assert_close(source.backbone(images).normed.cls[:, 0], forward(state, images)[:, 0], rtol=0, atol=2e-5)
    torch.save(teacher, "plain.pth")
    with pytest.raises(UsageError, match="holds one network, not a student and a teacher"):
        open_source("plain.pth:student")


def test_the_heads_of_the_widest_mae_are_80_wide() -> None:
    state = plain(width=1280, depth=1, patch=14, grid=1)
    assert official_backbone({"model": state}, "vit_huge.pth")[1].vit.blocks[0].attn.num_heads == 16
    with pytest.warns(UserWarning, match="no published model is 128 wide; taken to have 2 heads"):
        assert official_backbone(plain(width=128), "other.pth")[1].vit.blocks[0].attn.num_heads == 2


def keys_cubic(old: int, new: int, scale: float) -> Tensor:
    """[new old]: cubic convolution (Keys 1981, a = -3/4) at the pixels' centres, the border repeated."""
    weights = torch.zeros(new, old)
    for i in range(new):
        position = (i + 0.5) / scale - 0.5
        for j in range(int(np.floor(position)) - 1, int(np.floor(position)) + 3):
            x = abs(position - j)
            near = 1.25 * x**3 - 2.25 * x**2 + 1
            far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(j, 0), old - 1)] += near if x <= 1 else far
    return weights


@pytest.mark.parametrize("new", [3, 8])
@pytest.mark.parametrize(("family", "registers"), [("dino", 0), ("mae", 0), ("dinov2", 0), ("dinov2", 4)])
@torch.no_grad()
def test_positions_are_resized_as_the_authors_do(family: str, registers: int, new: int) -> None:
    state = {"dino": plain, "mae": mae, "dinov2": lambda: dinov2(registers)}[family]()
    with pytest.warns(UserWarning, match=f"any.pth: positions interpolated from {SIZE} px to {PATCH * new} px"):
        backbone = official_backbone(state, "any.pth", image_size=PATCH * new)[1]
    grid = state["pos_embed"][0, 1:].view(GRID, GRID, WIDTH)
    if registers:  # antialiased, which is what PIL's bicubic is
        channels = [Image.fromarray(grid[:, :, c].numpy()).resize((new, new), Image.Resampling.BICUBIC) for c in range(WIDTH)]
        expected = torch.stack([torch.from_numpy(np.array(channel)) for channel in channels], dim=-1)
    else:  # MAE samples at new / old, DINO and DINOv2 at (new + 0.1) / old
        rows = keys_cubic(GRID, new, (new if family == "mae" else new + 0.1) / GRID)
        expected = torch.einsum("ih,jw,hwc->ijc", rows, rows, grid)
    resized = {**state, "pos_embed": torch.cat([state["pos_embed"][:, :1], expected.reshape(1, new**2, WIDTH)], dim=1)}
    images = torch.randn(2, 3, PATCH * new, PATCH * new)
    tokens = backbone(images).normed  # says nothing more: the model is of this size now
    assert backbone.image_size == PATCH * new
    torch.testing.assert_close(
        torch.cat([tokens.cls, tokens.registers, tokens.patches], dim=1), forward(resized, images), rtol=0, atol=5e-5
    )


def test_the_default_size_is_224_or_the_smaller_one_of_the_file() -> None:
    torch.save(plain(depth=1, patch=14, grid=37), "vitl14.pth")
    with pytest.warns(UserWarning, match="positions interpolated from 518 px to 224 px"):
        assert load_backbone("vitl14.pth").image_size == 224
    assert open_source("vitl14.pth", image_size=518).image_size == 518
    with pytest.raises(UsageError, match=r"image size 225 is not divisible by the patch of vitl14\.pth, 14 px; choose 224"):
        open_source("vitl14.pth", image_size=225)


def without(state: State, *keys: str) -> State:
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda: {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.bias": torch.zeros(64)},
            r"keys begin with bn1.bias, conv1.weight\); give a",
        ),
        (lambda: {"state_dict": plain()}, r"keys begin with state_dict\)"),
        (lambda: [1, 2], r"keys begin with nothing\)"),
        (lambda: {**plain(), "blocks.0.attn.qkv.weight": torch.zeros(3)}, "no weights file that is understood"),
        (lambda: {**plain(), "head.weight": torch.zeros(9, WIDTH)}, "of dino but holds what they do not have: head.weight"),
        (lambda: {"model": {**plain(), "fc_norm.weight": torch.zeros(9)}}, "of mae but holds what they do not have: fc_norm.weight"),
        (lambda: without(plain(), "blocks.1.norm2.bias", "norm.bias"), "lacks: blocks.1.norm2.bias, norm.bias"),
        (lambda: without(dinov2(), "blocks.1.ls2.gamma"), "of dinov2 but lacks: blocks.1.ls2.gamma"),
        (lambda: {**plain(), "blocks.1.mlp.fc2.weight": torch.zeros(3, 3)}, "has other shapes in: blocks.1.mlp.fc2.weight"),
        (lambda: {**plain(), "pos_embed": torch.zeros(1, 24, WIDTH)}, "positions for 24 tokens"),
        (lambda: plain(width=100), "width 100, which no published model has"),
    ],
)
def test_other_layouts_are_refused_by_name(content: Any, message: str) -> None:
    torch.save(content(), "file.pth")
    with pytest.raises(Failure, match=message) as error:
        load_backbone("file.pth")
    assert "\n" not in str(error.value)


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("core", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_scalars_and_paths_under_the_names_of_every_version(core: str, module: str) -> None:
    """The pickles that numpy 1 and 2, Python up to 3.12 and from 3.13 write, by hand."""
    scalar = f"c{core}\nscalar\n(cnumpy\ndtype\n(X\x02\0\0\0f8K\0K\1tR(K\3X\1\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    text = "(X\x09\0\0\0" + "\0" * 6 + "\xc3\xb0?X\x06\0\0\0latin1"
    data = scalar + "c_codecs\nencode\n" + text + "tRtR"
    path = f"c{module}\nPosixPath\n(X\1\0\0\0ctR"
    torch.save(plain(), "whole.pth")
    with zipfile.ZipFile("whole.pth") as whole, zipfile.ZipFile("old.pth", "w") as old:
        for name in whole.namelist():
            content = whole.read(name)
            if name.endswith("data.pkl"):  # a dict around the weights: {"lr": scalar, "out": path, "teacher": ...}
                body = content.removeprefix(b"\x80\x02").removesuffix(b".")
                around = "X\2\0\0\0lr" + data + "X\3\0\0\0out" + path + "X\5\0\0\0model"
                content = b"\x80\x02}(" + around.encode("latin1") + body + b"u."
            old.writestr(name, content)
    content = read_weights("old.pth")
    assert (content["lr"], str(content["out"])) == (1.0, "c")


def test_other_globals_of_numpy_are_refused() -> None:
    torch.save({"model": plain(), "table": np.arange(3)}, "array.pth")
    with pytest.raises(Failure, match=r"array\.pth is not a readable checkpoint"):
        read_weights("array.pth")


def test_damaged_and_malicious_files_are_refused_unexecuted() -> None:
    torch.save(plain(), "whole.pth")
    Path("cut.pth").write_bytes(Path("whole.pth").read_bytes()[:5000])
    Path("raw.pth").write_bytes(pickle.dumps({"teacher": _Payload()}))
    torch.save({"model": plain(), "args": argparse.Namespace(lr=_Payload())}, "args.pth")
    torch.save({**plain(), "norm.bias": _Payload()}, "value.pth")
    for name in ("cut", "raw", "args", "value"):
        with pytest.raises(Failure, match=f"{name}.pth is not a readable checkpoint .*DINOv2 weights") as error:
            open_source(f"{name}.pth")
        assert "\n" not in str(error.value)
    assert not Path("executed").exists()
    with pytest.raises(UsageError, match="is nothing but weights"):
        load_backbone("whole.pth", pretrained=False)

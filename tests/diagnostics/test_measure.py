"""Diagnostics of whole models: what each number is of, and models whose answer is known."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ssl_vit.data.images import ImageStore
from ssl_vit.data.transforms import normalise
from ssl_vit.errors import Failure, UsageError
from ssl_vit.model.backbone import Backbone, build_backbone
from ssl_vit.model.readout import READOUTS, Entry, readout
from ssl_vit_eval.diagnostics import run as diagnostics_run
from ssl_vit_eval.diagnostics.attention import watched
from ssl_vit_eval.diagnostics.geometry import rankme
from ssl_vit_eval.diagnostics.gradients import DIRECTIONS, gradient_mass
from ssl_vit_eval.diagnostics.maps import save_maps
from ssl_vit_eval.diagnostics.measure import VERSION, diagnose
from ssl_vit_eval.rows import RowStore
from ssl_vit_eval.sources import Source, open_source
from ssl_vit_eval.splits import Split
from tests.conftest import TINY


def source_of(backbone: Backbone) -> Source:
    return Source("a/b c", "random", None, 0, backbone.image_size, backbone.weights_hash(), None, None, None, backbone)


def without_mixing(backbone: Backbone) -> Backbone:
    """Every token depends on its own patch only."""
    for block in backbone.vit.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    return backbone


def test_gradient_of_a_readout_of_one_patch_is_all_there(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READOUTS, "sixth", Entry(lambda tokens: tokens.patches[:, 6], of="patches"))
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    mass = gradient_mass(source_of(without_mixing(backbone)), images, ["sixth", "gap", "cls"])
    torch.testing.assert_close(mass["sixth"], torch.eye(16)[[6, 6, 6]])
    assert (mass["gap"] > 0.01).all()
    torch.testing.assert_close(mass["gap"].sum(dim=1), torch.ones(3))
    assert torch.equal(mass["cls"], torch.zeros(3, 16))  # sees no patch
    assert not backbone._forward_pre_hooks


@pytest.mark.parametrize("spec", ["cls", "cls@block0+gap/pre"])
def test_gradient_mass_is_that_of_the_jacobian(backbone: Backbone, spec: str) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():  # what a caller may have around it
        mass = gradient_mass(source_of(backbone), images, [spec], seed=3)[spec]
    read = readout(spec)
    for image, shares in zip(images, mass, strict=True):
        x = normalise(image[None].float() / 255, backbone.mean, backbone.std)
        jacobian = torch.autograd.functional.jacobian(lambda x: read(backbone(x, blocks=read.spec.blocks))[0], x)[:, 0]
        directions = torch.randn(DIRECTIONS, len(jacobian), generator=torch.Generator().manual_seed(3))
        size = torch.einsum("kd,dchw->kchw", directions, jacobian).abs().sum(dim=(0, 1))
        expected = torch.stack([size[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].sum() for i in range(4) for j in range(4)])
        torch.testing.assert_close(shares, expected / expected.sum(), atol=1e-5, rtol=1e-3)


def columns(picture: Path) -> int:
    with Image.open(picture) as opened:
        return round(opened.size[0] / 90)


def test_a_map_is_drawn_the_way_its_image_is(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[1, 0, :4, 4:] = 255  # the upper right is red
    save_maps(images, {"a": torch.tensor([[0.0, 0.0, 2.0, 0.0], [0.0, 0.3, 0.0, 0.0]])}, tmp_path / "new" / "maps.png")
    with Image.open(tmp_path / "new" / "maps.png") as opened:
        drawn = np.asarray(opened.convert("RGB")).astype(int)
    height = len(drawn)
    red = np.argwhere((drawn == [255, 0, 0]).all(axis=2)).mean(axis=0)
    bright = np.argwhere(np.abs(drawn - [253, 231, 37]).sum(axis=2) < 6)
    upper, lower = (part.mean(axis=0) for part in (bright[bright[:, 0] < 0.55 * height], bright[bright[:, 0] >= 0.55 * height]))
    assert lower[0] == pytest.approx(red[0], abs=2)
    assert lower[1] == pytest.approx(red[1] + 90, abs=2)
    assert upper[1] - lower[1] == pytest.approx(-43, abs=8)  # the lower left of the first
    assert upper[0] - red[0] == pytest.approx(-65, abs=20)


def test_the_maps_drawn_are_of_the_images_beside_them(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    monkeypatch.setattr("ssl_vit_eval.diagnostics.measure.save_maps", lambda images, maps, path: drawn.append((images, maps)))
    source = source_of(backbone)
    diagnose(source, ImageStore.stacked(torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)), ["cls"], tmp_path)
    ((images, maps),) = drawn
    assert len(images) == 8
    torch.testing.assert_close(maps.pop("gradient\ncls"), gradient_mass(source, images, ["cls"])["cls"])
    seen: dict[int, torch.Tensor] = {}
    with torch.no_grad(), watched(backbone, lambda block, attention: seen.__setitem__(block, attention[:, :, 0, 3:].mean(dim=1))):
        backbone(normalise(images.float() / 255, backbone.mean, backbone.std))
    assert list(maps) == [f"attention\nblock {block}" for block in seen]
    for expected, values in zip(seen.values(), maps.values(), strict=True):
        torch.testing.assert_close(values, expected)


def test_everything_at_once(backbone: Backbone, tmp_path: Path) -> None:
    images = ImageStore.stacked(torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8))
    source, specs = source_of(backbone), ["cls", "gap/pre", "cls@last2+gap", "register1"]
    result = diagnose(source, images, specs, tmp_path / "out", n_images=36, seed=5)
    again = diagnose(source, images, specs, tmp_path / "again", n_images=36, seed=5)
    assert json.dumps(result, allow_nan=False) == json.dumps(again)
    other = diagnose(source, images, ["cls"], tmp_path, n_images=36, seed=6)
    assert other["spectra"]["readouts"][0] != result["spectra"]["readouts"][0]
    assert [(result[part]["n"]) for part in ("spectra", "cka", "tokens", "attention", "gradients")] == [36, 36, 36, 36, 32]
    assert result["image_size"] == 16
    assert result["layout"] == {"patch": 4, "width": 24, "depth": 3, "cls_tokens": 1, "registers": 2}

    chosen = torch.randperm(40, generator=torch.Generator().manual_seed(5))[:36]
    x = normalise(images.batch(chosen)[0].float() / 255, backbone.mean, backbone.std)
    backbone.requires_grad_(False)
    tokens = backbone(x, blocks=(0, 1, 2))
    spectra = {(of["readout"], of["block"]): of for of in result["spectra"]["readouts"]}
    assert list(spectra) == [
        *(("cls", block) for block in range(3)),
        *(("gap/pre", block) for block in range(3)),
        ("cls@last2+gap", None),
        *(("register1", block) for block in range(3)),
    ]
    for block in range(3):
        at = tokens.at(block)
        assert spectra["cls", block]["rankme"] == pytest.approx(rankme(backbone.norm(at.cls[:, 0])), rel=1e-4)
        assert spectra["gap/pre", block]["rankme"] == pytest.approx(rankme(at.patches.mean(dim=1)), rel=1e-4)
        assert spectra["register1", block]["rankme"] == pytest.approx(rankme(backbone.norm(at.registers[:, 1])), rel=1e-4)
        of = result["tokens"]["blocks"][block]
        norms = at.patches.norm(dim=-1)
        assert of["block"] == block
        assert of["norms"]["patches"]["median"] == pytest.approx(float(np.median(norms.numpy())), rel=1e-5)
        assert (of["norms"]["cls"]["count"], of["norms"]["registers"]["count"]) == (36, 72)
        for name, (cls, patches) in {
            "pre": (at.cls, at.patches),
            "post": (backbone.norm(at.cls), backbone.norm(at.patches)),
        }.items():
            each = torch.stack([torch.cosine_similarity(cls[i], patches[i]).mean() for i in range(36)])
            assert of["cls_patch_cosine"][name]["mean"] == pytest.approx(each.mean().item(), abs=1e-5)
            assert of["cls_patch_cosine"][name]["std"] == pytest.approx(each.std(correction=0).item(), abs=1e-5)
    assert spectra["cls@last2+gap", None]["width"] == 72
    assert [(pair["a"], pair["b"]) for pair in result["cka"]["pairs"]][:2] == [("cls", "gap/pre"), ("cls", "cls@last2+gap")]
    assert len(result["cka"]["pairs"]) == 6

    attention = result["attention"]
    assert attention["available"]
    for key in ("cls_entropy", "cls_self", "distance", "cls0_from_patches", "register1_from_all"):
        assert np.array(attention[key]["mean"]).shape == np.array(attention[key]["std"]).shape == (3, 2)
    assert list(result["gradients"]["readouts"]) == specs
    assert 0 < result["gradients"]["readouts"]["cls"]["entropy"]["mean"] <= 1

    picture = tmp_path / "out" / result["picture"]
    assert result["picture"].startswith(f"diagnostics-a-b-c-{source.weights[:8]}-")
    assert other["picture"] != result["picture"]  # of other images
    assert picture.stat().st_size < 300_000
    assert columns(picture) == 1 + 3 + 4  # the image, 3 blocks, 4 readouts


def test_uniform_attention_has_entropy_one_at_every_block(backbone: Backbone, tmp_path: Path) -> None:
    for block in backbone.vit.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
    images = ImageStore.stacked(torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8))
    attention = diagnose(source_of(backbone), images, ["cls"], tmp_path)["attention"]
    places = [(i, j) for i in range(4) for j in range(4)]
    distance = np.mean([math.dist(a, b) for a in places for b in places])
    for key, value in {"cls_entropy": 1.0, "cls_effective_patches": 16.0, "cls_self": 1 / 19, "register0_from_patches": 1 / 19}.items():
        np.testing.assert_allclose(attention[key]["mean"], np.full((3, 2), value), rtol=1e-5)
    np.testing.assert_allclose(attention["distance"]["mean"], np.full((3, 2), distance), rtol=1e-5)
    np.testing.assert_allclose(attention["cls_spatial_variance"]["mean"], np.full((3, 2), 2.5), rtol=1e-5)


def test_a_model_without_class_token(tmp_path: Path) -> None:
    backbone = build_backbone(replace(TINY, cls_tokens=0, registers=0)).eval()
    images = ImageStore.stacked(torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8))
    result = diagnose(source_of(backbone), images, ["gap"], tmp_path)
    assert result["tokens"]["blocks"][0]["cls_patch_cosine"] is None
    assert result["tokens"]["blocks"][0]["norms"]["cls"] is None
    assert result["attention"]["cls_entropy"] is None
    assert result["attention"]["distance"] is not None
    assert columns(tmp_path / result["picture"]) == 1 + 1
    json.dumps(result, allow_nan=False)


def test_a_model_that_does_not_show_its_attention_is_diagnosed_otherwise(tmp_path: Path) -> None:
    vit = timm.create_model("vit_small_patch16_18x2_224", embed_dim=24, depth=3, num_heads=2, img_size=16, patch_size=4, num_classes=0)
    backbone = Backbone(vit, 16).eval()
    images = ImageStore.stacked(torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8))
    result = diagnose(source_of(backbone), images, ["cls"], tmp_path)
    assert result["attention"]["available"] is False
    assert "block 0 (ParallelThingsBlock) has 2 attention modules" in result["attention"]["reason"]
    assert result["tokens"]["blocks"][2]["cls_patch_cosine"] is not None


def test_a_trained_readout_with_parameters_is_read_where_it_was_trained(tmp_path: Path) -> None:
    backbone = build_backbone(replace(TINY, depth=8)).eval()
    backbone.trained_readout = readout("ep", backbone.width)
    source = replace(source_of(backbone), trained_with="ep")
    images = ImageStore.stacked(torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8))
    result = diagnose(source, images, ["ep", "gap@block1"], tmp_path)
    assert [(of["readout"], of["block"]) for of in result["spectra"]["readouts"]] == [("ep", None), ("gap@block1", None)]
    assert result["gradients"]["readouts"]["ep"]["entropy"]["mean"] > 0
    assert columns(tmp_path / result["picture"]) == 1 + 6 + 2  # the image, 6 of 8 blocks, 2 readouts


def test_what_cannot_be_diagnosed_is_said(backbone: Backbone, tmp_path: Path) -> None:
    images = ImageStore.stacked(torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8))
    with pytest.raises(UsageError, match="pixels has no tokens to diagnose"):
        diagnose(open_source("pixels"), images, ["cls"], tmp_path)
    with pytest.raises(UsageError, match="got 3 images; give at least 4"):
        diagnose(source_of(backbone), images, ["cls"], tmp_path, n_images=3)
    with pytest.raises(UsageError, match="readout 'cls3' needs cls tokens > 3"):
        diagnose(source_of(backbone), images, ["cls3"], tmp_path)
    handle = backbone.vit.blocks[1].register_forward_hook(lambda _, inputs, x: x.index_fill(0, torch.tensor([2]), float("nan")))
    number = torch.randperm(6, generator=torch.Generator().manual_seed(4))[2]
    with pytest.raises(Failure, match=f"a/b c read with gap@block1 is not finite for test image {number}"):
        diagnose(source_of(backbone), images, ["gap"], tmp_path, seed=4)
    handle.remove()


def test_files_of_older_code_are_measured_again(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(diagnostics_run, "diagnose", lambda *_: measured.append(1) or {"version": VERSION})  # type: ignore[func-returns-value]
    images = ImageStore.stacked(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
    split = Split(images, torch.zeros(4).long(), ("toy",), None, "d", "test", (), lambda: "")
    for older, expected in (({}, 1), ({}, 1), ({"version": VERSION - 1}, 2), ({"readouts": ["gap"]}, 3)):
        for path in tmp_path.glob("*.json"):
            path.write_text(json.dumps({**json.loads(path.read_text()), **older}))
        path = diagnostics_run.examine(source_of(backbone), split, "data", "t", ["cls"], RowStore(tmp_path))
        assert len(measured) == expected
    assert json.loads(path.read_text())["version"] == VERSION
    path.write_text(path.read_text()[:20])  # damaged
    diagnostics_run.examine(source_of(backbone), split, "data", "t", ["cls"], RowStore(tmp_path))
    assert len(measured) == 4


def test_a_second_evaluation_waits_for_the_first_and_measures_nothing(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(*_: object) -> dict[str, object]:
        measured.append(1)
        time.sleep(0.5)
        return {"version": VERSION}

    monkeypatch.setattr(diagnostics_run, "diagnose", measure)
    images = ImageStore.stacked(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
    split = Split(images, torch.zeros(4).long(), ("toy",), None, "d", "test", (), lambda: "")
    with ThreadPoolExecutor(2) as pool:
        of = [pool.submit(diagnostics_run.examine, source_of(backbone), split, "data", "t", ["cls"], RowStore(tmp_path)) for _ in range(2)]
        assert len({examined.result() for examined in of}) == 1
    assert len(measured) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_numbers(backbone: Backbone, tmp_path: Path) -> None:
    images = ImageStore.stacked(torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8))
    result = diagnose(source_of(backbone), images, ["cls"], tmp_path)
    with torch.no_grad():
        X = source_of(backbone.cpu()).features(images.batch(torch.arange(12))[0], ["cls"])["cls"]
    assert result["spectra"]["readouts"][-1]["rankme"] == pytest.approx(rankme(X), rel=1e-3)

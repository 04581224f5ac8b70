"""The report: the terminal's numbers, everything escaped, nothing loaded from elsewhere; and the pictures in it."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from planted import plant, plant_random

from ssl_vit.backbone import BackboneConfig
from ssl_vit.checkpoint import FORMAT
from ssl_vit.errors import UsageError
from ssl_vit.methods import MAE
from ssl_vit.methods.mae import DecoderConfig
from ssl_vit.views import SingleCrop
from ssl_vit_eval import report
from ssl_vit_eval.compare import terminal
from ssl_vit_eval.comparison import build
from ssl_vit_eval.pictures import GAP, LABEL, MASK_GREY, TILE, save_reconstructions
from ssl_vit_eval.report import GAIN, LOSS, write_report
from ssl_vit_eval.rows import RowStore


class Page(HTMLParser):
    """The text of each cell of the tables, all attributes, and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self._in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "td":
            self.cells.append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell &= tag != "td"

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._in_cell:
            self.cells[-1] += data


def answers(accuracy: float, seed: int) -> torch.Tensor:
    return torch.rand(300, generator=torch.Generator().manual_seed(seed)) < accuracy


def write_run(folder: Path, method: str, readout: str, seed: int, picture: bytes | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"method": method, "readout": readout, "seed": seed}))
    finished = {"steps": 30, "images": 1920, "seconds": 4.0, "devices": "1 x cpu", "recipe_hash": "recipe-hash", "git": None}
    (folder / "run.json").write_text(json.dumps(finished))
    lines = [{"step": step, "loss": 1.0 / step, **({"teacher_information": 0.5} if method == "dino" else {})} for step in (10, 20, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if picture:
        (folder / "reconstructions.png").write_bytes(picture)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    store = RowStore(tmp_path / "eval")
    for n, trained_with in enumerate(("cls", "gap")):
        for m, read_with in enumerate(("cls", "gap")):
            plant(store, answers(0.8, 2 * n + m), trained_with=trained_with, read_with=read_with, source=f"toy-{trained_with}-s0")
    plant_random(store, answers(0.6, 9))
    plant_random(store, answers(0.75, 10), read_with="gap")
    plant(
        store,
        answers(0.7, 11),
        protocol="logreg",
        selected={"C": 0.1, "n_iter": 12},
        grid={"C": [0.01, 0.1], "test_accuracy": [0.7, 0.6]},
        edge_of_grid=True,
        oracle=answers(0.7, 11).double().mean().item() + 0.012,
    )
    pixels = {"method": "pixels", "read_with": "pixels", "source": "pixels:32", "checkpoint": "pixels"}
    plant(store, answers(0.3, 12), trained_with=None, init=None, **pixels)
    write_run(tmp_path / "cells" / "toy-cls-s0", "dino", "cls", 0)
    write_run(tmp_path / "cells" / "toy-gap-s0", "dino", "gap", 0)
    return tmp_path


def written(folder: Path) -> Page:
    write_report(build([folder]), folder / "report.html")
    return Page(folder / "report.html")


def test_report_and_terminal_show_the_same_numbers(study: Path) -> None:
    page, text = written(study), terminal(build([study]))
    table = text[: text.index("\n\ndino trained")]
    scores = re.findall(r"\d+\.\d(?=\*|\s|$)", "\n".join(line for line in table.splitlines() if re.match(r"dino \(|pixels", line)))
    below = [item.strip() for line in table.splitlines() if line.startswith("     ") for item in re.split(r"\s{2,}", line.strip())]
    assert len(scores) == len(below) == 7
    assert [cell.replace("\n", "") for cell in page.cells[:7]] == [score + under for score, under in zip(scores, below, strict=True)]
    assert [cell.endswith("○") for cell in page.cells[:4]] == [False, True, False, True]
    for note in build([study]).notes:
        assert note in page.words


def test_macro_and_missing_are_visible(study: Path) -> None:
    page = written(study)
    values = [cell.macro for table in build([study]).tables for cell in table.cells.values()]
    for value in values:
        assert value is not None
        assert f"{100 * value:.1f}" in page.cells
    assert "–" in page.cells  # logreg was read in one way only


def test_nothing_is_loaded_and_nothing_runs(study: Path) -> None:
    page = written(study)
    text = (study / "report.html").read_text()
    assert not {tag for tag, *_ in page.attributes} & {"script", "link", "iframe", "object"}
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data"):
            assert value.startswith(("#", "data:"))
        assert not name.startswith("on")
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)\)", text))
    assert "@import" not in text
    assert str(study) not in text


def test_what_users_name_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert('&')</script>$x_1$"
    store = RowStore(tmp_path / "eval")
    named = {"dataset": bad, "data": bad, "transform": bad, "protocol": bad, "source": bad}
    plant(store, answers(0.8, 0), **named, git=bad, deviations=[bad], selected={bad: bad})
    plant(store, answers(0.8, 0), **named, method="timm", trained_with=None, checkpoint=bad)
    write_run(tmp_path / "cells" / "a<b>$", "dino", "cls", 0)
    page = written(tmp_path)
    assert "<script" not in (tmp_path / "report.html").read_text()
    assert bad in page.words
    assert "dino (a<b>$): loss" in page.words


def test_curves_and_what_was_run(study: Path) -> None:
    page = written(study)
    assert sum(tag == "svg" and name == "viewbox" for tag, name, _ in page.attributes) == 2  # loss and teacher information
    assert "dino (toy): teacher information" in page.words
    assert page.words.count("trained with gap") == 2  # the two legends
    assert page.cells.count("480") == 2  # images a second
    place = next(i for i, cell in enumerate(page.cells) if cell == "C 0.01 … 0.1 (2)")
    assert page.cells[place + 1 : place + 4] == ["C 0.1 (1×)", "1 of 1", "+1.2 (at most +1.2)"]
    assert "weights-of-toy-c" in page.cells


def test_without_runs_the_report_says_so(tmp_path: Path) -> None:
    plant(RowStore(tmp_path), answers(0.8, 0))
    assert "there are no training curves" in written(tmp_path).words


def test_only_the_cautions_that_apply(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "a")
    plant(store, answers(0.8, 0), dataset="cifar10")
    words = written(store.folder).words
    assert "One pretraining seed says nothing" in words
    assert not [text for text in ("photographs", "null control", "decoder") if text in words]
    plant(store, answers(0.8, 0), method="mae", read_with="register", source="mae-cls-s0")
    words = written(store.folder).words
    assert all(text in words for text in ("photographs", "null control", "decoder"))


def test_reconstructions_are_embedded_first_seed_only_and_as_far_as_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(RowStore(tmp_path / "eval"), answers(0.8, 0))
    for readout, seed, size in (("cls", 0, 100), ("cls", 1, 100), ("gap", 0, 101)):
        write_run(tmp_path / "cells" / f"toy-{readout}-s{seed}", "mae", readout, seed, bytes([seed]) * size)
    monkeypatch.setattr(report, "PICTURE_BYTES", 200)
    page = written(tmp_path)
    sources = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert sources == ["data:image/png;base64," + base64.b64encode(bytes(100)).decode()]
    assert "toy-gap-s0/reconstructions.png is too large" in page.words


@pytest.mark.parametrize("background", [GAIN, LOSS])
def test_contrast_of_the_strongest_colours(background: tuple[int, int, int]) -> None:
    def luminance(colour: tuple[int, ...]) -> float:  # WCAG 2
        linear = [(c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = (0x1B, 0x1F, 0x24)
    assert (luminance(background) + 0.05) / (luminance(ink) + 0.05) > 7


def mae(norm_pixels: bool = True) -> MAE:
    return MAE(
        "gap",
        backbone=BackboneConfig(image_size=16, patch=4, width=24, depth=1, heads=2),
        decoder=DecoderConfig(width=16, depth=1, heads=2),
        crop=SingleCrop(size=16),
        norm_pixels=norm_pixels,
    )


def saved(model: MAE, path: Path) -> Path:
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


def tiles(path: Path, images: int, size: int) -> torch.Tensor:
    """[row image size size 3], one pixel of each enlarged one."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    step, scale = TILE + GAP, TILE // size
    rows = [[pixels[r * step : r * step + TILE, LABEL + i * step : LABEL + i * step + TILE] for i in range(images)] for r in range(4)]
    return torch.stack([torch.stack(row) for row in rows])[:, :, ::scale, ::scale]


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_a_perfect_prediction_reconstructs_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm_pixels: bool) -> None:
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(MAE, "predict_pixels", lambda self, x, keep: self.targets(x))
    save_reconstructions(saved(mae(norm_pixels), tmp_path / "last.ckpt"), images, tmp_path / "new" / "picture.png")
    original, masked, predicted, pasted = tiles(tmp_path / "new" / "picture.png", 3, 16)
    assert torch.equal(original, images.permute(0, 2, 3, 1))
    assert (predicted.int() - original.int()).abs().max() <= 1
    assert (pasted.int() - original.int()).abs().max() <= 1
    hidden = (masked == round(255 * MASK_GREY)).all(dim=-1)
    assert hidden.flatten(1).sum(dim=1).tolist() == [12 * 16] * 3  # three quarters of 16 patches of 4 x 4 px
    assert torch.equal(masked[~hidden], original[~hidden])


def test_visible_patches_are_pasted_and_the_mask_is_fixed(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    checkpoint = saved(mae(), tmp_path / "last.ckpt")
    for name in ("a.png", "b.png"):
        save_reconstructions(checkpoint, images, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    original, masked, predicted, pasted = tiles(tmp_path / "a.png", 2, 16)
    hidden = (masked == round(255 * MASK_GREY)).all(dim=-1)
    assert torch.equal(pasted[~hidden], original[~hidden])
    assert torch.equal(pasted[hidden], predicted[hidden])
    assert not torch.equal(predicted[~hidden], original[~hidden])


def test_reconstructions_need_a_mae_and_its_size(tmp_path: Path) -> None:
    checkpoint = saved(mae(), tmp_path / "last.ckpt")
    with pytest.raises(UsageError, match=r"32 px came for .*trained at 16 px"):
        save_reconstructions(checkpoint, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), tmp_path / "a.png")
    dino = tmp_path / "dino.ckpt"
    torch.save({"ssl_vit": {"format": FORMAT, "recipe": {"method": "dino"}}, "state_dict": {}}, dino)
    with pytest.raises(UsageError, match="trained by dino"):
        save_reconstructions(dino, torch.zeros(1, 3, 16, 16, dtype=torch.uint8), tmp_path / "a.png")

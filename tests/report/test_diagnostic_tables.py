"""Diagnostics found again: files of the real `examine` on small backbones, then told, tabled and drawn; numbers against plain loops."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssl_vit.data.images import ImageStore
from ssl_vit.errors import Failure
from ssl_vit.model.backbone import build_backbone
from ssl_vit.model.readout import readout
from ssl_vit_eval.compare.arms import arms_and_notes
from ssl_vit_eval.compare.diagnostic_files import Diagnosis
from ssl_vit_eval.compare.diagnostic_files import find_diagnoses as find
from ssl_vit_eval.diagnostics.run import examine, with_blocks
from ssl_vit_eval.report import diagnostic_tables, plot_blocks
from ssl_vit_eval.report.page import Figures, Text
from ssl_vit_eval.report.plotting import COLOURS, SOFT, Plot
from ssl_vit_eval.report.write import maps
from ssl_vit_eval.rows import Row, RowStore
from ssl_vit_eval.sources import Source
from ssl_vit_eval.splits import Split
from tests.conftest import TINY
from tests.drawing import Drawing
from tests.planted import plant

SPECS = ["cls", "gap"]
DATA = "0123456789abcdef"
START = "abcdef0123456789"


def find_diagnoses(folders: Sequence[Path], rows: Sequence[Row]) -> list[Diagnosis]:
    return find(folders, rows, arms_and_notes(rows)[0])


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """Five images; two seeds trained with cls, one with gap, and the initialisation of seed 0; 20, 40 and 60 % right by block."""
    folder = tmp_path_factory.mktemp("examined")
    store = RowStore(folder)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    test = Split(ImageStore.stacked(images), torch.zeros(5).long(), ("toy",), None, "toys", "test", (), lambda: DATA)
    rows = []
    for number, (spec, seed) in enumerate((("cls", 0), ("cls", 1), ("gap", 0), (None, 0))):
        torch.manual_seed(number)
        backbone = build_backbone(TINY).eval()
        backbone.trained_readout = readout(spec) if spec else None
        name = f"toy-{spec}-s{seed}" if spec else "random:toy"
        weights = START if spec is None else backbone.weights_hash()
        source = Source(name, "dino", spec, seed, 16, weights, None, None, None, backbone)
        fields = {"method": "dino" if spec else "random", "trained_with": spec, "seed": seed, "source": name, "checkpoint": weights}
        fields |= {"init": START if spec and seed == 0 else None, "dataset": "toys", "data": DATA, "transform": "as-is"}
        for read in with_blocks(SPECS, 3):
            block = int(read[-1]) if "block" in read else 2
            right = 20 * (1 + block) + seed + (5 if "gap" in read else 0)
            rows += plant(store, [i < right for i in range(100)], read_with=read, **fields)
        examine(source, test, DATA, "as-is", SPECS, store)
    return folder, rows


@pytest.fixture(scope="module")
def drawn(examined: tuple[Path, list[Row]]) -> dict[str, Plot]:
    """By the first word of their names."""
    plots = plot_blocks.plots(find_diagnoses([examined[0]], examined[1]), examined[1])
    assert len(plots) == 3
    return {plot.name.partition("-")[0]: plot for plot in plots}


def changed(folder: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the diagnostics with other content."""
    to.mkdir(exist_ok=True)
    for file in folder.glob("diagnostics-*.json"):
        content = json.loads(file.read_text())
        change(content)
        (to / file.name).write_text(json.dumps(content))
    return to


def test_files_are_matched_to_arms_by_their_weights(examined: tuple[Path, list[Row]]) -> None:
    folder, rows = examined
    found = find_diagnoses([folder, folder], rows)
    assert [(of.arm.method, of.arm.recipe, of.arm.trained_with, of.seed) for of in found] == [
        ("dino", "toy", "cls", 0),
        ("dino", "toy", "cls", 1),
        ("dino", "toy", "gap", 0),
        ("random", "random:toy", None, 0),
    ]
    assert {of.place for of in found} == {("toys", DATA[:8], "as-is")}
    assert [of.starts for of in found] == [(), (), (), (("dino", "toy"),)]
    assert find_diagnoses([folder / "predictions"], rows) == []
    with pytest.raises(Failure, match="of which no row was found"):
        find_diagnoses([folder], rows[:12])


def test_a_damaged_file_is_named(examined: tuple[Path, list[Row]], tmp_path: Path) -> None:
    for text in ('{"weights": ', "[]", '{"weights": "a"}'):
        (tmp_path / "diagnostics-a.json").write_text(text)
        with pytest.raises(Failure, match=r"cannot read .*diagnostics-a.json: .*; remove it or evaluate again with --diagnostics"):
            find_diagnoses([tmp_path], examined[1])


def story(examined: tuple[Path, list[Row]], tmp_path: Path, blocks: dict[int, list[list[float]]]) -> str:
    """The sentence of the arm cls, whose seeds have these entropies [block][head]."""
    folder, rows = examined
    seeds = {row.checkpoint: row.seed for row in rows if row.trained_with == "cls"}

    def change(content: dict[str, Any]) -> None:
        if content["weights"] in seeds:
            content["attention"]["cls_entropy"]["mean"] = blocks[seeds[content["weights"]] or 0]

    return diagnostic_tables.sentences(find_diagnoses([changed(folder, tmp_path / "changed", change)], rows))[0]


def test_the_story_of_the_attention_is_told_in_numbers(examined: tuple[Path, list[Row]], tmp_path: Path) -> None:
    falling, rising = [[0.9, 0.8], [0.5, 0.7], [0.1, 0.3]], [[0.9, 0.8], [0.85, 0.75], [0.95, 0.65]]
    text = story(examined, tmp_path, {0: falling, 1: rising})
    assert text.startswith("dino (toy), trained with cls, toys: ")
    assert "over 2 seeds 0.850 at the first block, 0.700 in the middle (block 1), 0.500 at the last" in text
    assert text.endswith("lower at every block than before: in 1 of 2 seeds")
    assert story(examined, tmp_path, {0: falling, 1: falling}).endswith("in 2 of 2 seeds")
    level = [[0.9, 0.8], [0.5, 0.7], [0.6, 0.6]]
    assert story(examined, tmp_path, {0: level, 1: rising}).endswith("in 0 of 2 seeds")


def test_attention_that_cannot_be_seen_is_said(examined: tuple[Path, list[Row]], tmp_path: Path) -> None:
    folder, rows = examined

    def hide(content: dict[str, Any]) -> None:
        if content["trained_with"] == "gap":
            content["attention"] = {"n": 5, "available": False, "reason": "why"}
        else:
            content["attention"] |= {"cls_entropy": None, "cls_effective_patches": None}

    found = find_diagnoses([changed(folder, tmp_path / "changed", hide)], rows)
    told = diagnostic_tables.sentences(found)
    assert told[0].endswith("toys: no CLS token, so no attention of it")
    assert told[1].endswith("toys: attention is not shown: why")
    assert "attention" not in [sheet.name for sheet in diagnostic_tables.sheets(found)]
    assert not [plot for plot in plot_blocks.plots(found, rows) if plot.name.startswith("entropy")]


def cell(sheet: diagnostic_tables.Sheet, line: int, column: str) -> tuple[str, float | None]:
    return sheet.shown[column][line], sheet.frame[column][line]


def test_tables_are_means_over_seeds(examined: tuple[Path, list[Row]]) -> None:
    folder, rows = examined
    found = find_diagnoses([folder], rows)
    sheets = {sheet.name: sheet for sheet in diagnostic_tables.sheets(found)}
    assert list(sheets) == ["attention", "geometry", "tokens", "similarity"]  # no projected readout, so no redundancy
    first, second = (of.found for of in found[:2])

    def check(sheet: str, line: int, column: str, number: Callable[[dict[str, Any]], float], digits: int) -> None:
        values = [number(first), number(second)]
        text, value = cell(sheets[sheet], line, column)
        assert value == pytest.approx(statistics.fmean(values))
        assert text == f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}".replace("-", "−")

    check("attention", 0, "entropy, middle", lambda of: float(np.mean(of["attention"]["cls_entropy"]["mean"][1])), 3)
    check("attention", 0, "patches, last", lambda of: float(np.mean(of["attention"]["cls_effective_patches"]["mean"][2])), 1)
    check("tokens", 0, "median norm, patches", lambda of: float(of["tokens"]["blocks"][2]["norms"]["patches"]["median"]), 1)
    check("tokens", 0, "CLS–patch cosine, raw", lambda of: float(of["tokens"]["blocks"][2]["cls_patch_cosine"]["pre"]["mean"]), 3)
    check("similarity", 0, "CKA", lambda of: float(of["cka"]["pairs"][0]["cka"]), 3)
    last = {of["readout"]: of for of in first["spectra"]["readouts"] if of["block"] == 2}
    geometry = sheets["geometry"].shown
    place = next(
        i
        for i, (model, read) in enumerate(zip(geometry["model"], geometry["readout"], strict=True))
        if "with gap" in model and read == "gap"
    )
    assert cell(sheets["geometry"], 1, "readout")[0] == "gap"
    other = next(of for of in found[2].found["spectra"]["readouts"] if (of["readout"], of["block"]) == ("gap", 2))
    assert cell(sheets["geometry"], place, "RankMe")[1] == pytest.approx(other["rankme"])
    assert cell(sheets["geometry"], 1, "RankMe")[1] != pytest.approx(last["gap"]["rankme"])
    assert list(geometry["n"]) == ["5"] * 6
    assert "equal n and width" in sheets["geometry"].note
    assert list(sheets["attention"].shown["model"])[-1] == "random:toy"


def test_seeds_of_other_sizes_are_not_averaged(examined: tuple[Path, list[Row]], tmp_path: Path) -> None:
    folder, rows = examined
    second = next(row.checkpoint for row in rows if (row.trained_with, row.seed) == ("cls", 1))

    def change(content: dict[str, Any]) -> None:
        content["redundancy"] = [{"protocol": "knn", "readout": "cls+gap", "width": 24, "points": 1.5}]
        if content["weights"] == second:
            content["spectra"]["n"] = 4

    sheets = {
        sheet.name: sheet for sheet in diagnostic_tables.sheets(find_diagnoses([changed(folder, tmp_path / "changed", change)], rows))
    }
    lines = [line for line in sheets["geometry"].shown.to_numpy().tolist() if line[0].endswith("with cls")]
    assert [(line[2], line[3], line[6]) for line in lines] == [(spec, n, "1") for n in "54" for spec in SPECS]
    assert cell(sheets["redundancy"], 0, "gain, points") == ("1.500 ± 0.000", 1.5)


def test_networks_of_another_depth_are_other_arms(examined: tuple[Path, list[Row]]) -> None:
    found = find_diagnoses([examined[0]], examined[1])
    other = replace(found[1], found={**found[1].found, "layout": {**found[1].found["layout"], "depth": 2}})
    told = diagnostic_tables.sentences([found[0], other])
    assert [text.partition(", trained")[0] for text in told] == ["dino (toy, 3 blocks)", "dino (toy, 2 blocks)"]


def test_the_picture_of_attention_by_block(examined: tuple[Path, list[Row]], tmp_path: Path) -> None:
    folder, rows = examined
    order = {row.checkpoint: number for number, row in enumerate(rows)}

    def change(content: dict[str, Any]) -> None:
        values = np.random.default_rng(order[content["weights"]]).random((3, 2))
        content["attention"]["cls_entropy"]["mean"] = values.tolist()

    found = find_diagnoses([changed(folder, tmp_path / "changed", change)], rows)
    drawing = Drawing(plot_blocks.plots(found, [])[0].svg)
    x, y = drawing.scale("x"), drawing.scale("y")
    values = [np.array(of.found["attention"]["cls_entropy"]["mean"]) for of in found]
    expected = {COLOURS[0]: np.concatenate(values[:2], axis=1), COLOURS[1]: values[2], SOFT: values[3]}
    curves = {stroke: points for stroke, width, points in drawing.lines if width == 1.5}
    for colour, heads in expected.items():
        assert [x(at) for at, _ in curves[colour]] == pytest.approx([0, 1, 2], abs=0.01)
        assert [y(at) for _, at in curves[colour]] == pytest.approx(heads.mean(axis=1).tolist(), abs=0.02)
    assert {"trained with cls", "trained with gap", "random:toy"} <= {text for text, *_ in drawing.texts}


def test_accuracy_by_block_is_that_of_the_rows(examined: tuple[Path, list[Row]], drawn: dict[str, Plot], tmp_path: Path) -> None:
    folder, rows = examined
    found = find_diagnoses([folder], rows)
    for of in found:
        curves = {spec: list(curve.items()) for (_, spec), curve in plot_blocks.block_curves(of, rows).items()}
        written = {one["readout"]: [(at["block"], at["top1"]) for at in one["curve"]] for one in of.found["accuracy_by_block"]}
        assert curves == written
        assert curves["gap"] == [(block, pytest.approx((25 + 20 * block + (of.seed or 0)) / 100)) for block in range(3)]
    control = plant(RowStore(tmp_path), [True] * 100, control="shuffled labels", checkpoint=found[0].found["weights"], transform="as-is")
    assert plot_blocks.block_curves(found[0], [*rows, *control]) == plot_blocks.block_curves(found[0], rows)

    drawing = Drawing(drawn["blocks"].svg)
    right = float(drawing.root.get("viewBox", "").split()[2]) / 3
    y = drawing.scale("y", right=right)
    cls, gap = ([y(at) for _, at in points] for stroke, width, points in drawing.lines if width == 1.5 and points[0][0] < right)
    assert cls == pytest.approx([20.5, 40.5, 60.5], abs=0.3)  # mean of two seeds
    assert gap == pytest.approx([25.5, 45.5, 65.5], abs=0.3)
    assert "trained with cls, 2 seeds" in drawing.words()

    partly = [row for row in rows if not ("gap" in row.read_with and row.seed == 1)]
    (plot,) = [plot for plot in plot_blocks.plots(found, partly) if plot.name.startswith("blocks")]
    assert plot.note.endswith("Left out, since a seed lacks it: trained with cls read gap.")


def test_similarity_is_drawn_where_all_seeds_have_it(examined: tuple[Path, list[Row]]) -> None:
    folder, rows = examined
    found = find_diagnoses([folder], rows)

    def shown(of: list[Diagnosis]) -> list[str]:
        plots = [plot for plot in plot_blocks.plots(of, rows) if plot.name.startswith("cka")]
        return [text for plot in plots for text, *_ in Drawing(plot.svg).texts if text[:1] in "01−" and "." in text]

    mean = statistics.fmean(of.found["cka"]["pairs"][0]["cka"] for of in found[:2])
    assert shown(found[:2]) == ["1.00", *[f"{mean:.2f}".replace("-", "−")] * 2, "1.00"]
    lacking = replace(found[1], found={**found[1].found, "cka": {"n": 12, "pairs": []}})
    assert shown([found[0], lacking]) == []


def test_maps_of_first_seeds_as_far_as_they_fit(examined: tuple[Path, list[Row]], tmp_path: Path) -> None:
    folder, rows = examined
    found = find_diagnoses([folder], rows)
    sizes = [(folder / of.found["picture"]).stat().st_size for of in found]
    shown = maps(found, sum(sizes))
    plots = [block.plots[0] for block in shown if isinstance(block, Figures)]
    assert [plot.title for plot in plots] == [
        "dino (toy), trained with cls, toys, seed 0 of 2",
        "dino (toy), trained with gap, toys",
        "random:toy, toys",
    ]
    assert plots[0].png == (folder / found[0].found["picture"]).read_bytes()
    first, second, *_ = maps(found, sizes[0] + sizes[2] - 1)
    assert first == shown[0]
    assert isinstance(second, Text)
    assert second.text.endswith(f"{found[2].found['picture']} is too large to be shown here.")
    moved = find_diagnoses([changed(folder, tmp_path / "changed", lambda content: None)], rows)
    assert [block.text[-9:] for block in maps(moved, 10**9) if isinstance(block, Text)] == [" is gone."] * 3

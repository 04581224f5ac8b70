"""Figures: what stands in the SVG is what was given, no two figures of a page disturb each other, nothing is cut off."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.comparison import build
from ssl_vit_eval.compare.runs import Run
from ssl_vit_eval.compare.verdict import Difference, Family, Outcome, Rule, Side
from ssl_vit_eval.report import plot_datasets
from ssl_vit_eval.report.plot_differences import OUTCOMES, forest, paired_seeds
from ssl_vit_eval.report.plot_training import POINTS, training_curves
from ssl_vit_eval.report.plotting import COLOURS, INK, SOFT, Plot, draw, legend, looks, name_of
from ssl_vit_eval.rows import RowStore, Setting
from tests.drawing import Drawing
from tests.planted import plant

BAD = '<b id="x">&"$x_1$ url(#y)'
SETTING = Setting("cifar10", "data-hash", "resize32", "knn", 1, "parameters", "")


def difference(a: str, b: str, points: float, low: float, high: float, outcome: Outcome, of_seeds: tuple[float, ...] = ()) -> Difference:
    sides = [Side(Arm("dino", "toy", spec), spec) for spec in (a, b)]
    return Difference(*sides, points, low, high, 0.03, 0.03, 0.1, tuple(range(len(of_seeds))), of_seeds, 100, 1.0, outcome)


FAMILY = Family(
    "trained with",
    SETTING,
    "dino (toy)",
    "seeds",
    [
        difference("cls", "gap", 2.25, 0.75, 3.75, "better", (1.5, 2.0, 3.25)),
        difference("cls", "register", 0.125, -0.5, 0.75, "no difference", (0.5, -0.25, 0.125)),
        difference("gap", "register", -2.0, -3.5, -0.25, "worse", (-1.0, -2.5, -2.5)),
        difference("gap", "cls+gap", 0.5, -2.5, 3.5, "undecided", (1.0, 0.25, 0.25)),
    ],
)


def toy(name: str = "a", words: str = "title", label: str = "line") -> Plot:
    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        (line,) = axes.plot([0, 1], [0, 1], marker="o")
        axes.set_yticks([0, 1], [label, "b"])
        legend(figure, {label: line, "other": line})

    return draw(name, words, (5.0, 2.0), paint)


def test_the_same_bytes_every_time_and_200_dpi() -> None:
    first, again = forest(FAMILY, Rule()), forest(FAMILY, Rule())
    assert first == again
    with Image.open(io.BytesIO(first.png)) as png:
        view = Drawing(first.svg).root.get("viewBox", "").split()
        np.testing.assert_allclose(png.size, [float(points) * 200 / 72 for points in view[2:]], atol=1)
        assert png.size[0] == round(8.4 * 200)


def test_what_users_name_is_shown_as_it_is() -> None:
    plot = toy(words=BAD, label=BAD)
    drawing = Drawing(plot.svg)
    assert [text for text, *_ in drawing.texts].count(BAD) == 3  # title, tick and legend
    assert plot.file == "plots/a.svg"
    assert Plot("b", BAD, "", b"png").file == "plots/b.png"


@pytest.mark.parametrize("label", ["x" * 200, "many words " * 30])
def test_nothing_is_cut_off(label: str) -> None:
    family = replace(FAMILY, scope=label, differences=[difference("cls", label.strip(), 1.0, 0.5, 1.5, "better")])
    for plot in (toy(words=label, label=label[:30]), forest(family, Rule())):
        with Image.open(io.BytesIO(plot.png)) as png:
            pixels = np.asarray(png.convert("L"))
        for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
            assert edge.min() == 255, plot.title
        assert "".join(label.split()) in "".join(Drawing(plot.svg).words().split())


def test_names_of_files_differ_where_what_they_name_does() -> None:
    names = [name_of("a", "x/y"), name_of("a", "x-y"), name_of("a", "x-y", key=1), name_of("a", "x", "y")]
    assert len(set(names)) == 4
    assert all(re.fullmatch(r"a-x-y-[0-9a-f]{6}", name) for name in names)
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", name_of("a", BAD, "../..", "ä"))


def test_a_readout_looks_the_same_wherever_it_stands() -> None:
    first, other = looks(["gap", "new", "cls"]), looks(["cls", "gap", "register", "more", "new"])
    assert (first["cls"], first["gap"]) == (other["cls"], other["gap"])
    assert len({look.colour for look in other.values()}) == len({look.marker for look in other.values()}) == 5
    assert len({look.dashes for look in other.values()}) == 5
    assert len(set(looks(map(str, range(12))).values())) == 12


def test_a_forest_shows_every_number_where_it_belongs() -> None:
    plot = forest(FAMILY, Rule(margin=1.5))
    drawing = Drawing(plot.svg)
    x = drawing.scale("x")
    intervals = [points for stroke, width, points in drawing.lines if (stroke, width) == (INK, 1.5)]
    heights = [points[0][1] for points in intervals]
    assert heights == sorted(heights)
    assert len(intervals) == 4
    for of, points, height in zip(FAMILY.differences, intervals, heights, strict=True):
        assert [x(at) for at, _ in points] == pytest.approx([of.low, of.high], abs=0.02)
        colour = OUTCOMES[of.outcome][0]
        (mark,) = [x(at) for fill, at, y in drawing.marks if fill == colour and abs(y - height) < 0.5]
        assert mark == pytest.approx(of.points, abs=0.02)
        dots = [x(at) for fill, at, y in drawing.marks if fill == SOFT and 0 < y - height < 15]
        assert dots == pytest.approx(of.of_seeds, abs=0.02)
        (label,) = [text for text, _, y, anchor in drawing.texts if anchor == "end" and abs(y - 3.4 - height) < 2]
        assert label == f"{of.a.read_with} − {of.b.read_with}"
        (numbers,) = [text for text, _, y, anchor in drawing.texts if anchor == "start" and abs(y - 3.4 - height) < 2]
        assert numbers.endswith(f"  {of.outcome}")
    (band,) = [node.get("d", "") for node in drawing.root.iter() if "#e4e8ec" in node.get("style", "") and node.get("clip-path")]
    edges = {round(x(float(at)), 2) for at in re.findall(r"[ML] ([\d.]+)", band)}
    assert edges == {-1.5, 1.5}
    assert "within ±1.5 points" in drawing.words()
    assert len({colour for colour, _ in OUTCOMES.values()}) == len({marker for _, marker in OUTCOMES.values()}) == 4
    assert "+2.2 [0.8, 3.8]  better" in drawing.words()


def test_one_set_of_weights_has_no_dots_and_says_what_its_bars_are() -> None:
    family = replace(FAMILY, unit="images", differences=[difference("cls", "gap", 1.0, 0.5, 1.5, "better", (1.0,))])
    plot = forest(family, Rule())
    assert SOFT not in {fill for fill, *_ in Drawing(plot.svg).marks}
    assert "of these weights only" in plot.note
    assert "Primary comparison" in Drawing(forest(replace(FAMILY, primary=True), Rule()).svg).words()


def scored(tmp_path: Path, right: dict[tuple[str, int], int], **changes: object) -> None:
    """100 images, of which so many are right for each arm, read as trained, and seed."""
    store = RowStore(tmp_path)
    for (spec, seed), count in right.items():
        named = {"source": f"toy-{spec}-s{seed}", "seed": seed, "trained_with": spec, "read_with": spec}
        plant(store, [i < count for i in range(100)], **{**named, **changes})


def test_paired_seeds_join_what_belongs_together(tmp_path: Path) -> None:
    right = {("cls", 0): 71, ("cls", 1): 74, ("cls", 2): 80, ("gap", 0): 70, ("gap", 1): 71, ("gap", 2): 70}
    scored(tmp_path, right, dataset="cifar10")
    scores = build([tmp_path]).scores
    of = replace(FAMILY.differences[0], of_seeds=(1.0, 3.0, 10.0), points=14 / 3)
    (plot,) = paired_seeds(replace(FAMILY, differences=[of, difference("cls", "gap", 1.0, 0.0, 2.0, "undecided", (1.0,))]), Rule(), scores)
    drawing = Drawing(plot.svg)
    y = drawing.scale("y")
    joined = [[round(y(at), 1) for _, at in points] for stroke, width, points in drawing.lines if stroke == SOFT and width == 1.0]
    assert joined == [pytest.approx(pair, abs=0.15) for pair in ([71, 70], [74, 71], [80, 70])]
    (mean,) = [[y(at) for _, at in points] for stroke, width, points in drawing.lines if width == 2.4]
    assert mean == pytest.approx([75, 211 / 3], abs=0.15)
    x = drawing.scale("x", left=250.0)
    dots = [x(at) for fill, at, _ in drawing.marks if fill == SOFT and at > 250]
    assert dots == pytest.approx([1.0, 3.0, 10.0], abs=0.05)
    with pytest.raises(KeyError):
        paired_seeds(FAMILY, Rule(), {side: {0: seeds[0]} for side, seeds in scores.items()})


def test_linear_against_neighbours_seed_by_seed(tmp_path: Path) -> None:
    scored(tmp_path, {("cls", 0): 70, ("cls", 1): 74, ("gap", 0): 60})
    scored(tmp_path, {("cls", 0): 80, ("cls", 1): 83, ("gap", 1): 99}, protocol="logreg")
    scored(tmp_path, {("cls", 0): 10}, protocol="logreg", control="shuffled labels")
    (plot,) = plot_datasets.agreement_plots(build([tmp_path]))
    drawing = Drawing(plot.svg)
    x, y = drawing.scale("x"), drawing.scale("y")
    dots = sorted((x(across), y(up)) for fill, across, up in drawing.marks if fill == COLOURS[0])
    assert dots == [pytest.approx(pair, abs=0.1) for pair in ((70, 80), (74, 83))]
    assert COLOURS[1] not in {fill for fill, *_ in drawing.marks}  # gap has no seed of both


def run(readout: str, seed: int, metrics: list[dict[str, float]]) -> Run:
    return Run(Path(f"toy-{readout}-s{seed}"), {"method": "dino", "readout": readout, "seed": seed}, None, metrics)


def test_curves_show_what_was_logged() -> None:
    long = [{"step": step, "loss": 5.0 - step / 1000} for step in range(0, 2010, 2)]
    runs = [run("cls", 0, [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"step": 20, "knn_top1": 0.25}]), run("gap", 1, long)]
    loss, monitor = training_curves(runs)
    assert [plot.title for plot in (loss, monitor)] == ["dino (toy): loss", "dino (toy): k-NN top-1 while training (share)"]
    assert loss.note.startswith("2 runs")
    drawing = Drawing(loss.svg)
    x, y = drawing.scale("x"), drawing.scale("y")
    short, thinned = ([(x(a), y(b)) for a, b in points] for stroke, _, points in drawing.lines if stroke in COLOURS and len(points) > 1)
    assert short[:2] == [pytest.approx(pair, rel=0.01, abs=2) for pair in ((10, 3.0), (20, 2.0))]
    assert thinned[0] == pytest.approx((0, 5.0), abs=2)
    assert thinned[-1] == pytest.approx((2008, 2.992), rel=0.01)  # the last step is there
    assert len(thinned) <= POINTS + 2
    assert {"trained with cls", "trained with gap"} <= {text for text, *_ in drawing.texts}
    assert training_curves([run("cls", 0, [])]) == []

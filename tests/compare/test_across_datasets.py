"""Across datasets: which of them count, ranks against a plain loop, and what the sheets and figures show of it."""

from itertools import product
from pathlib import Path

import pytest

from ssl_vit_eval.compare.across_datasets import Ranking, rankings
from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.comparison import build
from ssl_vit_eval.report.plot_datasets import ranking_plots
from ssl_vit_eval.report.plotting import COLOURS, SOFT
from ssl_vit_eval.report.score_tables import ranking_sheets
from ssl_vit_eval.report.text import ranking_basis
from ssl_vit_eval.rows import RowStore
from ssl_vit_eval.stats.seeds import interquartile_mean, probability_of_improvement
from tests.drawing import Drawing
from tests.planted import plant, plant_random

CLS, GAP, REGISTER = (Arm("dino", "toy", spec) for spec in ("cls", "gap", "register"))
RIGHT = {  # of 100 images: [dataset][arm] of two seeds
    "a": {"cls": (70, 74), "gap": (60, 62), "register": (71, 73)},  # cls and register tie by their means
    "b": {"cls": (40, 41), "gap": (50, 30), "register": (10, 12)},
    "c": {"cls": (90, 91), "gap": (95, 96), "register": (92, 92)},
}
Counts = dict[str, dict[str, tuple[int, ...]]]


def planted(folder: Path, right: Counts, seeds: tuple[int, ...] = (0, 1), recipe: str = "toy", **changes: object) -> None:
    store = RowStore(folder)
    for dataset, arms in right.items():
        for spec, counts in arms.items():
            for seed, count in zip(seeds, counts, strict=False):
                named = {"dataset": dataset, "data": f"data of {dataset}", "source": f"{recipe}-{spec}-s{seed}", "seed": seed}
                fields = {**named, "trained_with": spec, "read_with": spec, **changes}
                plant(store, [i < count for i in range(100)], **fields)


def of(folder: Path) -> list[Ranking]:
    return rankings(build([folder]))


def test_ranks_are_those_of_the_means_and_ties_share_them(tmp_path: Path) -> None:
    planted(tmp_path, RIGHT)
    planted(tmp_path, {"a": {"cls": (1, 1)}}, read_with="gap")  # not as trained
    planted(tmp_path, RIGHT, control="shuffled labels")
    (found,) = of(tmp_path)
    assert (found.datasets, found.seeds, found.left_out) == (["a", "b", "c"], [0, 1], [])
    ranks: dict[str, list[float]] = {spec: [] for spec in RIGHT["a"]}
    for arms in RIGHT.values():
        for spec, counts in arms.items():
            better = sum(sum(other) > sum(counts) for other in arms.values())
            equal = sum(sum(other) == sum(counts) for other in arms.values())
            ranks[spec].append(better + (1 + equal) / 2)
    assert {str(arm.trained_with): places for arm, places in found.ranks.items()} == ranks
    assert ranks["cls"] == [1.5, 1.0, 3.0]
    assert list(found.ranks) == [CLS, GAP, REGISTER]  # 1.83, 2 and 2.17
    assert "fewer than 3" not in ranking_basis(found)


def test_the_statistics_are_of_the_right_arms_in_the_right_order(tmp_path: Path) -> None:
    planted(tmp_path, RIGHT)
    (found,) = of(tmp_path)
    scores = {Arm("dino", "toy", spec): [[n / 100 for n in arms[spec]] for arms in RIGHT.values()] for spec in RIGHT["a"]}
    assert found.scores == scores
    assert found.floors == pytest.approx([1 / 3] * 3)  # of three classes, without a random backbone
    over_chance = {arm: [[(value - 1 / 3) / (2 / 3) for value in of] for of in values] for arm, values in scores.items()}
    assert found.iqm == {arm: pytest.approx(interquartile_mean(values)) for arm, values in over_chance.items()}
    assert list(found.improvement) == [(CLS, GAP), (CLS, REGISTER), (GAP, REGISTER)]
    for (a, b), estimate in found.improvement.items():
        wins = [[(x > y) + (x == y) / 2 for x, y in product(*pair)] for pair in zip(scores[a], scores[b], strict=True)]
        assert estimate.value == pytest.approx(sum(sum(values) / len(values) for values in wins) / len(wins))
        assert estimate == probability_of_improvement(scores[a], scores[b])
    assert found.improvement[CLS, GAP].value == pytest.approx((1 + 0.5 + 0) / 3)


def test_scores_are_normalised_by_the_random_backbone_of_all_data_sets_or_of_none(tmp_path: Path) -> None:
    planted(tmp_path, RIGHT)
    right = {"a": (20, 30, 40), "b": (5, 10, 0), "c": (60, 80, 85)}
    store = RowStore(tmp_path)
    for dataset, counts in right.items():
        for spec, count in zip(("cls", "gap", "register"), counts, strict=True):
            if (dataset, spec) != ("c", "register"):
                plant_random(store, [i < count for i in range(100)], dataset=dataset, data=f"data of {dataset}", read_with=spec)
    assert of(tmp_path)[0].floors == pytest.approx([1 / 3] * 3)  # one is missing
    plant_random(store, [i < 85 for i in range(100)], dataset="c", data="data of c", read_with="register")
    (found,) = of(tmp_path)
    assert found.floors == pytest.approx([0.30, 0.05, 0.75])
    assert found.normalised(CLS)[2] == pytest.approx([0.6, 0.64])  # 90 and 91 % of images, where the floor is 75 %
    assert found.iqm[CLS] == pytest.approx(interquartile_mean([[4 / 7, 44 / 70], [35 / 95, 36 / 95], [0.6, 0.64]]))


def test_only_complete_data_sets_enter_and_the_others_are_named(tmp_path: Path) -> None:
    lacking = {**RIGHT["a"], "gap": (60,)}
    planted(tmp_path, {**RIGHT, "lacking": lacking})
    planted(tmp_path, {"twice": RIGHT["a"]})
    planted(tmp_path, {"twice": RIGHT["b"]}, transform="resize64")
    planted(tmp_path, {"a": {"cls": (99,), "gap": (1,)}}, seeds=(7,))
    (found,) = of(tmp_path)
    assert (found.datasets, found.seeds) == (["a", "b", "c"], [0, 1])
    assert found.scores[CLS][0] == [0.70, 0.74]
    for text in ("seed 7, which not every arm has", "lacking, which lacks seeds of gap", "twice, measured in 2 versions"):
        assert text in ranking_basis(found)
    assert len(found.left_out) == 3


def test_two_data_sets_only_describe_and_one_is_no_ranking(tmp_path: Path) -> None:
    planted(tmp_path / "two", {name: RIGHT[name] for name in "ab"})
    (found,) = of(tmp_path / "two")
    assert "fewer than 3, so this describes these datasets and says nothing about others" in ranking_basis(found)
    assert "2 seeds of each arm on 2 datasets (a, b)" in ranking_basis(found)
    planted(tmp_path / "one", {"a": RIGHT["a"]})
    assert of(tmp_path / "one") == []
    planted(tmp_path / "arm", {name: {"cls": (50, 51)} for name in "abc"})
    assert of(tmp_path / "arm") == []
    assert ranking_sheets([]) == ranking_plots([]) == []


def test_nothing_to_rank_is_said(tmp_path: Path) -> None:
    planted(tmp_path, {"a": RIGHT["a"], "b": {"cls": (50, 51)}})
    (found,) = of(tmp_path)
    assert ranking_basis(found).startswith("Nothing to rank")
    assert "b, which lacks seeds of gap, register" in ranking_basis(found)
    assert ranking_plots([found]) == []
    assert [len(sheet.frame) for sheet in ranking_sheets([found])] == [0, 0]
    assert "Nothing to rank" in ranking_sheets([found])[0].note


def test_protocols_and_recipes_are_ranked_apart(tmp_path: Path) -> None:
    planted(tmp_path, RIGHT)
    planted(tmp_path, RIGHT, protocol_version=2)
    planted(tmp_path, RIGHT, recipe="masked", method="mae")
    found = [(ranking.method, ranking.recipe, ranking.protocol.version) for ranking in of(tmp_path)]
    assert found == [("dino", "toy", 1), ("dino", "toy", 2), ("mae", "masked", 1)]


def test_sheets_and_figures_show_these_numbers(tmp_path: Path) -> None:
    planted(tmp_path, RIGHT)
    (found,) = of(tmp_path)
    arms, pairs = ranking_sheets([found])
    assert list(arms.shown["trained with"]) == ["cls", "gap", "register"]
    assert list(arms.frame["mean rank"]) == pytest.approx([5.5 / 3, 6 / 3, 6.5 / 3])
    assert arms.frame["interquartile mean, %"][0] == pytest.approx(100 * found.iqm[CLS].value)
    assert list(arms.frame["datasets"]) == [3, 3, 3]
    assert list(pairs.shown.iloc[0])[3:6] == ["cls", "gap", "50.0"]

    ranks, improvement = (Drawing(plot.svg) for plot in ranking_plots([found]))
    x = ranks.scale("x", right=250)
    assert sorted(x(at) for fill, at, _ in ranks.marks if fill == SOFT) == pytest.approx([1, 1, 1.5, 1.5, 2, 2, 3, 3, 3], abs=0.02)
    means = {fill: x(at) for fill, at, _ in ranks.marks if fill in COLOURS and at < 290}
    assert means == pytest.approx(dict(zip(COLOURS, (5.5 / 3, 2.0, 6.5 / 3), strict=False)), abs=0.02)
    right = ranks.scale("x", left=290)
    iqm = {fill: right(at) for fill, at, _ in ranks.marks if fill in COLOURS and at > 290}
    assert iqm == pytest.approx({colour: 100 * found.iqm[arm].value for colour, arm in zip(COLOURS, found.iqm, strict=False)}, abs=0.3)
    x = improvement.scale("x")
    bars = [[x(at) for at, _ in points] for _, width, points in improvement.lines if width == 1.5]
    expected = [[100 * float(bound or 0) for bound in estimate[1:]] for estimate in found.improvement.values()]
    assert bars == [pytest.approx(pair, abs=0.3) for pair in expected]
    labels = [text for text, *_, anchor in improvement.texts if anchor == "end"]
    assert labels == ["cls > gap", "cls > register", "gap > register"]

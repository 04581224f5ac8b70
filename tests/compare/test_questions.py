"""What is subtracted from what: each question its own families, each pair of the right cells."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import binomtest

from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.questions import null_controls
from ssl_vit_eval.compare.runs import Run
from ssl_vit_eval.rows import RowStore
from ssl_vit_eval.sources import family_of
from tests.planted import (
    PRIMARY,
    compared,
    declare,
    families,
    first,
    noisy,
    notes,
    only,
    plant,
    plant_arm,
    plant_random,
    plant_three,
    right,
    specs,
    words,
)


@pytest.fixture
def store(tmp_path: Path) -> RowStore:
    return RowStore(tmp_path / "study" / "eval")


def graded(*on_slice: float) -> dict[str, object]:
    """A grid with these accuracies on the slice, and the lower ones on test the higher they are there."""
    return {"C": [1.0, 2.0], "slice_accuracy": list(on_slice), "test_accuracy": [1 - max(on_slice)] * 2}


def test_the_primary_comparison_is_a_minus_b_as_it_was_declared(store: RowStore) -> None:
    plant_three(store, range(6))
    declare(store, primary={**PRIMARY, "compare": ["gap/post", "cls"]})
    found = only(compared(store), "trained with", primary=True)
    assert (found.a.read_with, found.b.read_with, found.outcome) == ("gap", "cls", "worse")


def test_seeds_that_do_not_overlap_make_no_difference(store: RowStore) -> None:
    plant_arm(store, "cls", [0, 1], right(150))
    plant_arm(store, "gap", [2, 3], right(130))
    declare(store, primary=PRIMARY)
    comparison = compared(store)
    assert families(comparison, "trained with") == families(comparison, "trained with", primary=True) == []
    assert any("have no seed in common" in note for note in notes(comparison))
    assert any("the primary comparison, cls − gap of toy on builtin:photos by knn" in note for note in notes(comparison))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"family": "r4"}, "dino (toy): 2 recipes of this name differ in more than readout and seed"),
        ({"init": "x"}, "dino (toy), trained with cls and dino (toy), trained with gap started from different weights at the same seed"),
    ],
)
def test_arms_that_differ_in_more_than_the_readout_are_not_paired(store: RowStore, change: dict[str, object], said: str) -> None:
    plant_arm(store, "cls", range(2), right(150))
    plant_arm(store, "gap", range(2), right(130), **change)
    comparison = compared(store)
    assert families(comparison, "trained with") == []
    assert any(note.startswith(said) for note in notes(comparison))


def test_settings_are_never_mixed(store: RowStore) -> None:
    for change in (
        {},
        {"protocol_version": 2},
        {"protocol_hash": "x"},
        {"data": "x"},
        {"transform": "resize64"},
        {"data": "y", "dataset": "x"},
    ):
        for readout, count in (("cls", 150), ("gap", 150 - 10 * len(str(change)))):
            plant_arm(store, readout, range(2), right(max(0, count)), **change)
    found = families(compared(store), "trained with")
    assert len({family.setting for family in found}) == len(found) == 6
    assert {found.differences[0].seeds for found in found} == {(0, 1)}


def test_controls_take_no_part(store: RowStore) -> None:
    for readout in ("cls", "gap"):
        plant_arm(store, readout, range(2), right(100), control="shuffled labels")
    plant_random(store, first(80, 200), start="start0")
    plant(store, first(80, 200), method="pixels", trained_with=None, read_with="pixels", source="pixels:32", checkpoint="pixels", init=None)
    assert compared(store).families == []


def test_self_consistency_is_against_the_best_by_the_slice(store: RowStore) -> None:
    plant_arm(store, "cls", range(3), right(150))
    for seed in range(3):  # gap is the better one on the slice in the mean of the seeds, register on test
        plant_arm(store, "cls", [seed], right(140), "gap", grid=graded(0.1, 0.9 - 0.2 * (seed == 0)))
        plant_arm(store, "cls", [seed], right(170), "register", grid=graded(0.8, 0.1))
    plant_arm(store, "cls", range(3), right(199), "cls/pre", grid=graded(1.0, 1.0))  # the same token
    plant_arm(store, "cls", range(3), right(199), "gap@block0", grid=graded(1.0, 1.0))  # of a curve
    plant_arm(store, "cls", [0], right(199), "max", grid=graded(1.0, 1.0))  # of one seed only
    comparison = compared(store)
    found = only(comparison, "self-consistency")
    assert (found.a.read_with, found.b.read_with, found.a.arm, found.b.arm) == ("cls", "gap", *[Arm("dino", "toy", "cls")] * 2)
    assert found.points == pytest.approx(5.0)
    assert found.seeds == (0, 1, 2)
    assert words(comparison, found).endswith("; gap was picked on the slice of train")
    assert "dino (toy), trained with cls: max lacks seeds, and is not among the readouts that it is compared with" in notes(comparison)


def test_another_norm_is_no_other_readout(store: RowStore) -> None:
    for read_with, accuracy in (("gap/pre", 0.5), ("gap", 0.9), ("cls", 0.7)):
        plant_arm(store, "gap/pre", range(2), right(150), read_with, grid=graded(accuracy))
    found = only(compared(store), "self-consistency")
    assert (found.a.read_with, found.b.read_with) == ("gap/pre", "cls")


def test_without_a_slice_the_best_is_picked_on_test_and_that_is_said(store: RowStore) -> None:
    for read_with, count in (("cls", 150), ("gap", 140), ("register", 170)):
        plant_arm(store, "cls", range(3), right(count), read_with, grid=graded(0.5, 0.4) if read_with == "gap" else None)
    comparison = compared(store)
    found = only(comparison, "self-consistency")
    assert (found.b.read_with, found.points) == ("register", pytest.approx(-10.0))
    assert words(comparison, found).endswith("; register was picked on test: the gap is too small by that")


def test_self_consistency_is_one_family_of_all_arms_of_a_recipe(store: RowStore) -> None:
    for readout, read_with in itertools.product(("cls", "gap"), repeat=2):
        plant_arm(store, readout, range(2), right(150 if readout == read_with else 140), read_with)
    comparison = compared(store)
    (family,) = families(comparison, "self-consistency")
    assert (family.scope, specs(family)) == ("dino (toy)", [("cls", "gap"), ("gap", "cls")])
    assert words(comparison, family.differences[0]).endswith("gap is the only other readout")


def test_post_hoc_of_one_set_of_weights_is_about_images(store: RowStore) -> None:
    answers = {"gap": noisy(0.6)(1), "cls": noisy(0.9)(2), "cls+gap": noisy(0.9)(3), "gap@block1": noisy(0.5)(4)}
    for read_with, of in answers.items():
        plant(store, of, method="timm", trained_with=None, read_with=read_with, seed=None, source="timm:vit", init=None, family=None)
    comparison = compared(store)
    (family,) = families(comparison, "read with")
    assert (family.unit, family.scope) == ("images", "timm (timm:vit)")
    assert specs(family) == [("gap", "cls"), ("cls+gap", "cls"), ("gap", "cls+gap")]  # every pair; single blocks are curves
    worse = family.differences[0]
    assert (worse.seeds, worse.of_seeds) == ((), ())
    only_a, only_b = (int((one & ~other).sum()) for one, other in itertools.permutations((answers["gap"], answers["cls"])))
    assert worse.discordance == pytest.approx((only_a + only_b) / 200)
    chi = (abs(only_a - only_b) - 1) ** 2 / (only_a + only_b)  # McNemar's with continuity correction
    assert worse.p == pytest.approx(float(torch.special.erfc(torch.tensor(chi / 2).double().sqrt())), rel=1e-6)
    assert worse.outcome == "worse"
    assert words(comparison, worse).startswith("of these weights, gap is worse than cls")
    exact = family.differences[1]
    only_a, only_b = (int((one & ~other).sum()) for one, other in itertools.permutations((answers["cls+gap"], answers["cls"])))
    if only_a + only_b < 25:
        assert exact.p == pytest.approx(binomtest(only_a, only_a + only_b).pvalue)
    assert np.isfinite(exact.resolvable)


def test_without_cls_the_first_readout_is_the_reference(store: RowStore) -> None:
    for read_with in ("max", "register"):
        plant(store, first(150, 200), method="timm", trained_with=None, read_with=read_with, seed=None, source="timm:vit", init=None)
    assert specs(families(compared(store), "read with")[0]) == [("max", "register")]  # the kinds of tokens come first


def test_post_hoc_of_several_seeds_is_about_seeds(store: RowStore) -> None:
    for read_with, count in (("cls", 150), ("gap", 120)):
        plant_arm(store, "cls", range(6), right(count), read_with)
        plant_arm(store, "gap", [0], right(count), read_with)
    several, one = families(compared(store), "read with")
    assert (several.unit, several.scope) == ("seeds", "dino (toy), trained with cls")
    assert (several.differences[0].seeds, several.differences[0].outcome) == (tuple(range(6)), "worse")
    assert (one.unit, one.scope, one.differences[0].seeds) == ("images", "dino (toy), trained with gap", (0,))


def test_the_place_of_the_norm_is_a_family_of_its_own(store: RowStore) -> None:
    counts = {"cls": 150, "gap": 140, "gap/pre": 120, "gap/pooled": 160, "cls@last2/pre": 100, "gap@last2": 130, "gap@last2/pre": 120}
    for read_with, count in counts.items():
        plant_arm(store, "cls", range(6), right(count), read_with)
    comparison = compared(store)
    (norm,) = families(comparison, "norm")
    assert specs(norm) == [("gap/pre", "gap"), ("gap/pooled", "gap"), ("gap@last2/pre", "gap@last2")]
    assert [found.points for found in norm.differences] == pytest.approx([-10.0, 10.0, -5.0])
    (read,) = families(comparison, "read with")
    # of which one has no other norm beside it
    assert specs(read)[:3] == [("gap", "cls"), ("cls@last2/pre", "cls"), ("gap@last2", "cls")]
    assert specs(read)[3:] == [("gap", "cls@last2/pre"), ("gap", "gap@last2"), ("cls@last2/pre", "gap@last2")]


@pytest.mark.parametrize(
    ("registers", "cls_tokens", "arm", "position", "null"),
    [(1, 1, "", False, True), (1, 1, ":student", False, True), (4, 1, "", False, False), (1, 2, "", False, False), (1, 1, "", True, False)],
)
def test_null_control(store: RowStore, registers: int, cls_tokens: int, arm: str, position: bool, null: bool) -> None:
    for readout, count in (("cls", 150), ("gap", 140), ("register", 120)):
        run = store.folder.parent / "cells" / f"toy-{readout}-s0"
        run.mkdir(parents=True)
        backbone = {"registers": registers, "cls_tokens": cls_tokens, "cls_position": position}
        recipe = {"method": "dino", "readout": readout, "seed": 0, "backbone": backbone}
        for seed in range(6):
            plant_arm(store, readout, [seed], right(count), source=f"toy-{readout}-s{seed}{arm}", family=family_of(recipe))
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    comparison = compared(store)
    (together,) = families(comparison, "trained with")
    if not null:
        assert families(comparison, "null control") == []
        assert len(together.differences) == 3
        return
    assert specs(together) == [("cls", "gap"), ("gap", "register")]
    found = only(comparison, "null control")
    assert (found.corrected, found.outcome) == (2 / 64, "better")
    assert "false alarm by construction" in words(comparison, found)


def test_runs_of_one_name_with_other_tokens_are_no_null_control() -> None:
    runs = [
        Run(Path(f"toy-cls-s{seed}"), {"method": "dino", "readout": "cls", "seed": seed, "backbone": {"registers": r}}, None, [])
        for seed, r in ((0, 1), (1, 1), (2, 4))
    ]
    assert null_controls(runs) == null_controls(runs[:1]) == {runs[0].family}
    assert null_controls(runs[2:]) == set()

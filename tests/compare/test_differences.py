"""From planted rows to differences: points, intervals, tests and verdicts are those of a plain computation."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_vit.errors import Failure, UsageError
from ssl_vit_eval.compare.comparison import build
from ssl_vit_eval.report.first_page import next_step
from ssl_vit_eval.report.terminal import screen
from ssl_vit_eval.report.text import words_of
from ssl_vit_eval.rows import RowStore
from ssl_vit_eval.stats.images import paired_p
from ssl_vit_eval.stats.seeds import crossed_interval, t_test
from tests.planted import PRIMARY, compared, declare, families, first, noisy, only, plant, plant_arm, plant_three, right, specs, words


@pytest.fixture
def store(tmp_path: Path) -> RowStore:
    return RowStore(tmp_path / "study" / "eval")


def test_a_readout_that_is_better_by_so_many_points(store: RowStore) -> None:
    seeds = (10, 3, 7, 0, 5, 2)
    plant_arm(store, "gap", seeds, lambda seed: first(150 - seed, 200) | (torch.arange(200) == 199))
    plant_arm(store, "cls", reversed(seeds), right(150))
    found = only(compared(store), "trained with")
    assert (found.a.arm.trained_with, found.b.arm.trained_with) == ("cls", "gap")
    assert (found.a.read_with, found.b.read_with) == ("cls", "gap")
    assert found.seeds == (0, 2, 3, 5, 7, 10)
    assert found.of_seeds == pytest.approx([100 * (seed - 1) / 200 for seed in found.seeds])
    assert found.points == pytest.approx(np.mean(found.of_seeds))
    assert found.discordance == pytest.approx(np.mean([(seed + 1) / 200 for seed in found.seeds]))
    assert found.images == 200
    # by hand: how many of the sign flips are as far from zero
    flips = [abs(np.dot(signs, found.of_seeds)) for signs in itertools.product((1, -1), repeat=6)]
    assert found.p == found.corrected == pytest.approx(np.mean([flip >= sum(found.of_seeds) - 1e-9 for flip in flips]))
    lines = np.zeros((6, 200))
    for line, seed in zip(lines, found.seeds, strict=True):
        line[150 - seed : 150] += 1
        line[199] -= 1
    interval = crossed_interval(torch.from_numpy(lines)[:, None])
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_a_difference_in_all_seeds_is_a_verdict_of_either_sign(store: RowStore) -> None:
    for dataset, (cls, gap) in {"one": (180, 140), "two": (140, 180)}.items():
        plant_arm(store, "cls", range(6), right(cls), dataset=dataset, data=dataset)
        plant_arm(store, "gap", range(6), right(gap), dataset=dataset, data=dataset)
    declare(store, family="setting")
    comparison = compared(store)
    better, worse = (family.differences[0] for family in families(comparison, "trained with"))
    assert (better.points, better.p, better.outcome) == (pytest.approx(20.0), 2 / 64, "better")
    assert (worse.points, worse.p, worse.outcome) == (pytest.approx(-20.0), 2 / 64, "worse")
    assert words(comparison, better).startswith("cls is better than gap by 20.0 points [")


def test_ties_are_no_difference_only_where_the_images_can_tell(store: RowStore) -> None:
    for dataset, images in {"few": 100, "many": 1000}.items():
        for readout in ("cls", "gap"):
            plant_arm(store, readout, range(6), noisy(0.7, images), dataset=dataset, data=dataset)
    few, many = (family.differences[0] for family in families(compared(store), "trained with"))
    for found in (few, many):
        assert (found.points, found.p, found.discordance) == (0.0, 1.0, 0.0)
        assert found.low < 0 < found.high
    assert (few.outcome, many.outcome) == ("undecided", "no difference")


def test_one_seed_is_two_networks(store: RowStore) -> None:
    a, b = noisy(0.9)(0), noisy(0.4)(1)
    plant_arm(store, "cls", [4], lambda seed: a)
    plant_arm(store, "gap", [4], lambda seed: b)
    comparison = compared(store)
    found = only(comparison, "trained with")
    assert (found.outcome, found.seeds) == ("undecided", (4,))
    assert words(comparison, found).startswith("undecided: one seed of each is two networks")
    assert words(comparison, found).endswith("one comparison needs 6 seeds")
    assert found.resolvable == float("inf")
    assert (found.points, found.low, found.high) == crossed_interval((a.double() - b.double())[None, None])[:3]
    assert found.p < 1e-6
    assert families(comparison, "trained with")[0].unit == "seeds"


def test_many_comparisons_need_more_seeds_than_the_one_that_was_declared(store: RowStore) -> None:
    plant_three(store, range(6))
    comparison = compared(store)
    (family,) = families(comparison, "trained with")
    assert [(found.a.read_with, found.b.read_with) for found in family.differences] == [
        ("cls", "gap"),
        ("cls", "register"),
        ("gap", "register"),
    ]
    for found in family.differences:
        assert (found.outcome, found.corrected) == ("undecided", pytest.approx(3 * 2 / 64))
        assert found.points > 14
        assert "a family of 3 comparisons needs 7 seeds" in words(comparison, found)

    declare(store, primary=PRIMARY)
    comparison = compared(store)
    assert comparison.families[0].primary
    primary = only(comparison, "trained with", primary=True)
    assert (primary.outcome, primary.p, primary.corrected) == ("better", 2 / 64, 2 / 64)
    assert np.isfinite(primary.resolvable)
    (rest,) = families(comparison, "trained with")
    assert specs(rest) == [("cls", "register"), ("gap", "register")]
    assert all(found.corrected == pytest.approx(2 * 2 / 64) and found.outcome == "undecided" for found in rest.differences)
    text = screen(comparison)
    assert text.index("declared: dino (toy), builtin:photos, knn v1: cls is better") < text.index(
        "Which readout to train with (B): 2 undecided"
    )


def test_holm_decides_among_three(store: RowStore) -> None:
    plant_arm(store, "cls", range(8), right(160))
    plant_arm(store, "gap", range(8), lambda seed: first(140 + (30 if seed == 0 else seed % 2), 200))  # one seed the other way round
    plant_arm(store, "register", range(8), right(100))
    (family,) = families(compared(store), "trained with")
    p = [found.p for found in family.differences]
    assert p == pytest.approx([4 / 256, 2 / 256, 2 / 256])
    order, corrected, largest = sorted(range(3), key=p.__getitem__), [0.0] * 3, 0.0
    for rank, place in enumerate(order):
        largest = max(largest, (3 - rank) * p[place])
        corrected[place] = min(1.0, largest)
    assert [found.corrected for found in family.differences] == pytest.approx(corrected)
    assert [found.outcome for found in family.differences] == ["better", "better", "better"]
    plant_arm(store, "gap", [1], right(170), checkpoint="weights-of-toy-gap-s1")  # measured again: now two seeds the other way round
    (family,) = families(compared(store), "trained with")
    assert [found.outcome for found in family.differences] == ["undecided", "better", "better"]


def test_a_comparison_of_one_seed_does_not_count_among_those_of_several(store: RowStore) -> None:
    plant_arm(store, "cls", range(6), right(160))
    plant_arm(store, "gap", range(6), right(130))
    plant_arm(store, "register", [3], right(100))
    comparison = compared(store)
    (family,) = families(comparison, "trained with")
    assert [found.outcome for found in family.differences] == ["better", "undecided", "undecided"]
    assert family.differences[0].corrected == 2 / 64
    assert np.isfinite(family.differences[0].resolvable)
    one = family.differences[1]
    assert (one.seeds, one.of_seeds) == ((3,), pytest.approx((30.0,)))
    assert words(comparison, one).endswith("a family of 3 comparisons needs 7 seeds")


def test_holm_runs_over_the_study_or_as_declared_over_each_setting(store: RowStore) -> None:
    for number, change in enumerate(({}, {"protocol": "logreg"}, {"dataset": "two", "data": "two"})):
        plant_arm(store, "cls", range(7), right(180), **change)
        plant_arm(store, "gap", range(7), right(170 - number), **change)
        plant_arm(store, "cls", range(7), right(180), "gap", **change)
    found = [difference for family in families(compared(store), "trained with") for difference in family.differences]
    assert [(of.p, of.corrected, of.comparisons) for of in found] == [(2 / 128, 3 * 2 / 128, 3)] * 3
    assert {of.comparisons for family in families(compared(store), "read with") for of in family.differences} == {3}  # apart
    assert [of.outcome for of in found] == ["better"] * 3
    plant_arm(store, "cls", range(7), right(180), protocol="linear")
    plant_arm(store, "gap", range(7), right(180), protocol="linear")
    found = [difference for family in families(compared(store), "trained with") for difference in family.differences]
    assert sorted((of.corrected, of.outcome) for of in found) == [(4 * 2 / 128, "undecided")] * 3 + [(1.0, "undecided")]
    declare(store, family="setting")
    found = [difference for family in families(compared(store), "trained with") for difference in family.differences]
    assert sorted((of.corrected, of.outcome, of.comparisons) for of in found)[:3] == [(2 / 128, "better", 1)] * 3
    with pytest.raises(UsageError, match="declared the family setting before the training, so --family study comes too late"):
        build([store.folder.parent], family="study")


def test_no_difference_is_corrected_as_a_difference_is(store: RowStore) -> None:
    """Five seeds can show one equivalence (2^-5 = .031), seven can show three of a family (3 / 128)."""
    for seeds, corrected, outcome in ((range(5), 3 / 32, "undecided"), (range(7), 3 / 128, "no difference")):
        for dataset in ("one", "two", "three"):
            for readout in ("cls", "gap"):
                plant_arm(store, readout, seeds, noisy(0.7, 1500), dataset=dataset, data=dataset)
        found = [family.differences[0] for family in families(compared(store), "trained with")]
        assert [(of.p_beyond, of.corrected_beyond, of.outcome) for of in found] == [(corrected / 3, corrected, outcome)] * 3
        assert max(-found[0].low, found[0].high) < 1.0
        (alone, *_) = families(build([store.folder.parent], family="setting"), "trained with")
        assert alone.differences[0].outcome == "no difference"


def test_three_seeds_can_be_judged_by_students_t_if_that_was_declared(store: RowStore) -> None:
    plant_arm(store, "cls", range(3), lambda seed: first(150 + seed, 200))
    plant_arm(store, "gap", range(3), right(120))
    assert only(compared(store), "trained with").outcome == "undecided"
    declare(store, test="t", level=0.01)
    comparison = compared(store)
    found = only(comparison, "trained with")
    assert (found.outcome, found.corrected < 0.01) == ("better", True)
    assert words_of(families(comparison, "trained with")[0], found, comparison.rule).endswith(
        ", by Student's t over 3 seeds, whose differences are taken as normal"
    )
    assert np.isfinite(found.resolvable)
    for readout in ("cls", "gap"):
        plant_arm(store, readout, range(3), noisy(0.7, 2000), dataset="other", data="other")
    same = families(compared(store), "trained with")[1].differences[0]
    assert (same.outcome, same.p_beyond < 0.001) == ("no difference", True)


def test_the_next_step_is_that_of_the_test(store: RowStore) -> None:
    for readout in ("cls", "gap"):
        plant_arm(store, readout, range(1), noisy(0.7))
    assert next_step(compared(store)).startswith("Train 6 seeds of each arm")
    declare(store, test="t")
    assert next_step(compared(store)).startswith("Train 3 or more seeds of each arm")
    for readout in ("cls", "gap"):
        plant_arm(store, readout, range(1, 3), noisy(0.7, salt=1 + (readout == "gap")))
    assert next_step(compared(store)).startswith("Add seeds where a difference that matters is undecided")


def test_equivalence_within_the_margin(store: RowStore) -> None:
    plant_arm(store, "cls", range(5), noisy(0.7, 2000))
    plant_arm(store, "gap", range(5), lambda seed: noisy(0.7, 2000)(seed) ^ (torch.arange(2000) % 997 == seed))
    found = only(compared(store), "trained with")
    assert found.outcome == "no difference"
    assert max(-found.low, found.high) < 1.0
    assert only(compared(store, margin=0.01), "trained with").outcome == "undecided"
    declare(store, margin=0.01)
    for comparison in (compared(store), compared(store, margin=0.01)):
        assert (comparison.rule.margin, only(comparison, "trained with").outcome) == (0.01, "undecided")
    with pytest.raises(UsageError, match=r"declared the margin 0\.01 before the training, so --margin 2\.0 comes too late"):
        compared(store, margin=2.0)
    declare(store, seeds=[0])
    assert compared(store, margin=2.0).rule.margin == 2.0
    with pytest.raises(UsageError, match=r"--margin: margin is -1\.0"):
        compared(store, margin=-1.0)


def test_several_draws_of_the_training_set_are_shares_of_right_answers(store: RowStore) -> None:
    rng = np.random.default_rng(0)
    answers = {read_with: torch.from_numpy(rng.random((60, 2)) < accuracy) for read_with, accuracy in (("cls", 0.6), ("gap", 0.8))}
    for read_with, draws in answers.items():
        fields = {"method": "timm", "trained_with": None, "seed": None, "source": "timm:vit", "init": None}
        plant(store, draws, read_with=read_with, **fields)
    found = only(compared(store), "read with")
    differences = answers["gap"].double() - answers["cls"].double()
    shares = differences.mean(dim=1).numpy()
    assert found.points == pytest.approx(100 * shares.mean())
    assert found.discordance == pytest.approx((differences != 0).double().mean().item())
    crossed = crossed_interval(differences.T[None])
    assert (found.low, found.high) == (crossed.low, crossed.high)
    assert found.p == max(t_test(crossed), paired_p(torch.from_numpy(shares), torch.zeros(60)))  # for other draws, and for other images


def test_replicates_that_do_not_pair_are_refused(store: RowStore) -> None:
    fields = {"method": "timm", "trained_with": None, "seed": None, "source": "timm:vit", "init": None}
    plant(store, first(30, 60), **fields)
    plant(store, first(30, 60)[:, None].expand(60, 3), read_with="gap", **fields)
    with pytest.raises(Failure, match=r"has 1 replicates in its predictions, timm:vit read with gap .* has 3: evaluate one of them again"):
        compared(store)

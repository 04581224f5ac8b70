"""What is missing, doubled, mixed or wrongly declared is said or refused, never averaged."""

import itertools
from pathlib import Path

import pytest
import torch
import yaml

from ssl_vit.errors import Failure, UsageError
from ssl_vit_eval.compare.comparison import build
from ssl_vit_eval.rows import RowStore
from tests.planted import PRIMARY, compared, declare, families, first, notes, only, plant_arm, plant_three, right


@pytest.fixture
def store(tmp_path: Path) -> RowStore:
    return RowStore(tmp_path / "study" / "eval")


def test_seeds_are_paired_and_what_has_no_partner_is_said(store: RowStore) -> None:
    plant_arm(store, "cls", range(4), right(150))
    plant_arm(store, "gap", (1, 2, 3, 9), right(130))
    comparison = compared(store)
    assert only(comparison, "trained with").seeds == (1, 2, 3)
    (note,) = [note for note in notes(comparison) if "are missing" in note]
    # each arm is read in its own way only, so the other readouts are not missing
    assert note == (
        "dino (toy), builtin:photos, knn v1: 2 of 10 cells are missing (trained with cls, seed 9; trained with gap, seed 0); "
        "what has no partner of the same seed is in no difference"
    )
    plant_arm(store, "cls", [0], right(150), "gap")  # now they are, and the seed of which nothing is there comes first
    (note,) = [note for note in notes(compared(store)) if "are missing" in note]
    assert (
        "11 of 20 cells are missing (trained with cls, seed 9; trained with gap, seed 0; trained with cls, seed 1, read with gap;" in note
    )


def test_a_missing_cell_is_named(store: RowStore) -> None:
    for readout, read_with in itertools.product(("cls", "gap"), repeat=2):
        plant_arm(store, readout, [0, 1] if readout == read_with else [0], right(150), read_with)
    plant_arm(store, "cls", [1], right(150), "gap")
    (note,) = [note for note in notes(compared(store)) if "missing" in note]
    assert "1 of 8 cells are missing (trained with gap, seed 1, read with cls)" in note


def test_the_curves_of_diagnostics_are_no_missing_cells(store: RowStore) -> None:
    plant_arm(store, "cls", [0, 1], right(150))
    plant_arm(store, "cls", [0], right(150), "cls@block0")  # of the first seed, by design
    said = notes(compared(store))
    assert not [note for note in said if "missing" in note]
    assert any(note.startswith("1 of 1 trained cells have no gain") for note in said)


def test_a_learned_readout_is_missing_nowhere_else(store: RowStore) -> None:
    for readout in ("cls", "abmilp"):
        plant_arm(store, readout, [0, 1], right(150), "cls")
    plant_arm(store, "abmilp", [0, 1], right(150), init="with-its-own-parameters")
    comparison = compared(store)
    assert not [note for note in notes(comparison) if "missing" in note]
    assert len(only(comparison, "trained with").seeds) == 2
    plant_arm(store, "cls", [0], right(150), "abmilp")  # so this protocol trains it anew
    assert any("trained with cls, seed 1, read with abmilp" in note for note in notes(compared(store)))


def test_what_was_measured_twice(store: RowStore, tmp_path: Path) -> None:
    elsewhere = RowStore(tmp_path / "study" / "later")
    for readout in ("cls", "gap"):
        plant_arm(store, readout, range(2), right(150))
        plant_arm(elsewhere, readout, range(2), right(150))
    comparison = compared(store)
    assert not any("measured" in note for note in notes(comparison))
    assert only(comparison, "trained with").seeds == (0, 1)
    plant_arm(elsewhere, "gap", [1], right(140))
    plant_arm(elsewhere, "cls", [0], lambda seed: first(150, 200).flip(0))  # as many, but others
    comparison = compared(store)
    value, other = [note for note in notes(comparison) if "measured" in note]
    assert "toy-cls-s0 read with cls, builtin:photos, knn was measured 3 times, always as 75.00 % but with other answers" in other + value
    assert "toy-gap-s1 read with gap, builtin:photos, knn was measured 3 times, as 75.00 % and as 70.00 %: the last counts" in other + value
    assert only(comparison, "trained with").of_seeds == pytest.approx((0.0, 5.0))
    # measured again in the first store too: its earlier line tells of a file that is no longer there
    plant_arm(store, "cls", [0], lambda seed: first(150, 200).flip(0))
    assert [note.partition(" read")[0] for note in notes(compared(store)) if "measured" in note] == ["toy-gap-s1"]


def test_two_checkpoints_of_a_seed_stand_alone(store: RowStore) -> None:
    for readout in ("cls", "gap"):
        plant_arm(store, readout, range(2), right(150))
    plant_arm(store, "gap", [1], right(100), checkpoint="trained again")
    comparison = compared(store)
    assert families(comparison, "trained with") == []
    assert "dino (toy), trained with gap: 2 checkpoints of seed 1 (weights-, trained ); each of its checkpoints stands alone" in notes(
        comparison
    )


def test_primary_that_cannot_be_found_is_said(store: RowStore) -> None:
    plant_three(store, range(2))
    for change in ({"recipe": "other"}, {"data": "builtin:photos-new"}, {"protocol": "logreg"}, {"compare": ["cls", "max"]}):
        declare(store, primary={**PRIMARY, **change})
        comparison = compared(store)
        assert any(note.startswith("the primary comparison") and "no rows of both arms" in note for note in notes(comparison))
        assert len(families(comparison, "trained with")[0].differences) == 3
    for change in ({"protocol_version": 2}, {"control": "projected to 96"}):
        for readout in ("cls", "gap"):
            plant_arm(store, readout, range(2), right(150), **change)
    declare(store, primary=PRIMARY)
    assert any("stands in 2 tables" in note for note in notes(compared(store)))
    declare(store, primary={**PRIMARY, "protocol": "knn", "data": "./some/where/builtin:photos"})  # a folder is called by its last part
    assert any("stands in 2 tables" in note for note in notes(compared(store)))


def test_studies_that_disagree(store: RowStore) -> None:
    plant_three(store, range(2))
    declare(store, primary=PRIMARY, margin=0.5)
    cell = store.folder.parent / "cells" / "x"
    other = store.folder.parent / "more"
    for folder in (cell, other):
        folder.mkdir(parents=True)
    (cell / "study.yaml").write_text(yaml.safe_dump({"margin": 9.0}))  # not a study's
    comparison = compared(store)
    assert (comparison.rule.margin, comparison.families[0].primary) == (0.5, True)
    (other / "study.yaml").write_text(yaml.safe_dump({"primary": {**PRIMARY, "compare": ["cls", "register"]}}))
    comparison = compared(store)
    assert comparison.rule.margin == 1.0
    assert not any(family.primary for family in comparison.families)
    assert any("different values of margin (more 1.0, study 0.5): 1.0 is taken" in note for note in notes(comparison))
    assert any("2 studies declare different primary comparisons" in note for note in notes(comparison))
    assert build([store.folder]).rule.margin == 1.0  # the study's file is not below


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"margin": -1}, "margin is -1; give a number of points"),
        ({"margin": True}, "margin is True"),
        ({"primary": {"recipe": "toy"}}, "primary lacks the key .data."),
        ({"primary": {**PRIMARY, "compare": ["cls"]}}, "compare is .*cls.*; give two readouts"),
        ({"primary": {**PRIMARY, "compare": ["cls", "gpa"]}}, "gpa"),
    ],
)
def test_a_wrong_declaration_is_refused(store: RowStore, content: dict[str, object], said: str) -> None:
    plant_three(store, range(2))
    declare(store, **content)
    with pytest.raises(UsageError, match=said):
        compared(store)


@pytest.mark.parametrize(
    ("labels", "n", "said"), [(torch.zeros(200).long(), 200, "other classes"), (None, 150, "150 test images in its predictions,")]
)
def test_answers_on_other_images_are_refused(store: RowStore, labels: torch.Tensor | None, n: int, said: str) -> None:
    plant_arm(store, "cls", range(2), right(100))
    plant_arm(store, "gap", range(2), right(100, n), labels=labels)
    with pytest.raises(Failure, match=f"toy-gap-s0 read with gap.* has {said}.* toy-cls-s0 read with cls"):
        compared(store)


def test_rows_of_several_revisions_are_said(store: RowStore) -> None:
    plant_arm(store, "cls", range(2), right(100), git="aaaa")
    plant_arm(store, "gap", range(2), right(100), git="aaaa")
    assert not any("revisions" in note for note in notes(compared(store)))
    plant_arm(store, "register", range(2), right(100), git="bbbbbbbbbbbbbbbb")
    (note,) = [note for note in notes(compared(store)) if "revisions" in note]
    assert note == "rows of 2 revisions of the code (aaaa; bbbbbbbb) are compared: dino (toy) on builtin:photos, knn v1"

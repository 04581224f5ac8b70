"""The rule and its words on hand-made differences: every outcome at its bounds, and no text that says otherwise than the numbers."""

from dataclasses import replace
from math import inf

import pytest

from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.verdict import Difference, Family, Question, Remark, Rule, Side, Unit, outcome_of
from ssl_vit_eval.report.score_tables import differences
from ssl_vit_eval.report.text import interval_text, p_text, rule_text, side_name, signed, words_of
from ssl_vit_eval.rows import Setting

RULE = Rule()
CLS, GAP = (Side(Arm("dino", "toy", spec), spec) for spec in ("cls", "gap"))
SETTING = Setting("photos", "hash", "resize32", "knn", 1, "parameters", "")


def difference(
    points: float, low: float, high: float, corrected: float, seeds: int = 6, resolvable: float = 1.5, beyond: float = 0.01
) -> Difference:
    found = Difference(
        CLS,
        GAP,
        points,
        low,
        high,
        p=corrected / 2,
        p_beyond=beyond / 2,
        corrected=corrected,
        corrected_beyond=beyond,
        discordance=0.081,
        seeds=tuple(range(seeds)),
        of_seeds=(points,) * seeds,
        images=10_000,
        resolvable=resolvable,
        outcome="undecided",
    )
    return replace(found, outcome=outcome_of(found, "seeds", RULE))


@pytest.mark.parametrize(
    ("low", "high", "corrected", "outcome"),
    [
        (0.3, 2.1, 0.05, "better"),  # the level belongs to it
        (-2.1, -0.3, 0.05, "worse"),
        (0.3, 2.1, 0.0501, "undecided"),
        (0.0, 2.1, 0.01, "undecided"),  # zero is not excluded
        (-2.1, 0.0, 0.01, "undecided"),
        (0.1, 0.9, 0.01, "better"),  # within the margin, and yet not zero
        (-1.0, 1.0, 0.01, "no difference"),
        (-1.0001, 0.5, 1.0, "undecided"),
        (-0.5, 1.0001, 1.0, "undecided"),
        (0.1, 0.9, 0.06, "no difference"),
        (1.1, 1.9, 0.06, "undecided"),
    ],
)
def test_the_rule_at_its_bounds(low: float, high: float, corrected: float, outcome: str) -> None:
    assert difference((low + high) / 2, low, high, corrected).outcome == outcome
    unsure = difference((low + high) / 2, low, high, corrected, beyond=0.0501)  # a difference beyond the margin is not ruled out
    assert unsure.outcome == ("undecided" if outcome == "no difference" else outcome)


def test_the_margin_is_the_studys() -> None:
    found = difference(0.2, -0.3, 0.7, 1.0)
    assert [outcome_of(found, "seeds", Rule(margin)) for margin in (0.6, 0.7)] == ["undecided", "no difference"]
    assert "within ±0.7 points (x" in rule_text(Rule(0.7))
    assert "p is at most 0.05 and the 95 % interval" in rule_text(RULE)


def test_one_seed_decides_about_its_weights_and_not_about_readouts() -> None:
    for count in (0, 1):
        one = replace(difference(5.0, 4.0, 6.0, 0.001), seeds=(3,) * count)
        assert outcome_of(one, "seeds", RULE) == "undecided"
        assert outcome_of(one, "images", RULE) == "better"
    sentence = words(replace(one, resolvable=inf, outcome="undecided"), 3)
    assert sentence.startswith("undecided: one seed of each is two networks, and says nothing about the readouts; ")
    assert sentence.endswith("; a family of 3 comparisons needs 7 seeds")


def words(
    found: Difference, comparisons: int = 1, remark: Remark | None = None, question: Question = "trained with", unit: Unit = "seeds"
) -> str:
    found = replace(found, comparisons=comparisons, remark=remark)
    return words_of(Family(question, SETTING, "dino (toy)", unit, [found]), found, RULE)


def test_words() -> None:
    assert words(difference(1.2, 0.3, 2.1, 0.03)) == "cls is better than gap by 1.2 points [0.3, 2.1]"
    assert words(difference(-1.2, -2.1, -0.3, 0.03)) == "cls is worse than gap by 1.2 points [0.3, 2.1]"
    assert words(difference(0.5, 0.2, 0.8, 0.03)) == "cls is better than gap by 0.5 points [0.2, 0.8], by less than the margin of 1 point"
    assert words(difference(-0.5, -0.8, -0.2, 0.03)).endswith("by less than the margin of 1 point")
    assert words(difference(0.1, -0.42, 0.3, 1.0)) == "no difference between cls and gap of more than 0.5 points that this study could see"
    assert words(difference(0.1, -0.1, 0.3, 1.0), remark="the only other") == (
        "no difference between cls and gap of more than 0.3 points that this study could see; gap is the only other readout"
    )
    assert words(difference(0.2, -0.9, 1.3, 0.3)) == (
        "undecided: cls − gap lies in [−0.9, 1.3]; a true difference of 1.5 points would have been found four times in five"
    )
    assert words(difference(9.0, 8.0, 10.0, 0.094, resolvable=inf), comparisons=3) == (
        "undecided: cls − gap lies in [8.0, 10.0]; no difference is resolvable: the best corrected p of 6 seeds is .094, "
        "a family of 3 comparisons needs 7 seeds"
    )
    assert words(difference(9.0, 8.0, 10.0, 0.0625, seeds=5, resolvable=inf)).endswith("5 seeds is .062, one comparison needs 6 seeds")
    assert words(difference(0.1, -0.3, 0.5, 1.0, beyond=0.25)) == (
        "undecided: cls − gap lies in [−0.3, 0.5], within the margin, but the corrected p of a difference beyond it is .250"
    )


def test_the_assumption_of_students_t_stands_beside_its_verdicts() -> None:
    rule, found = Rule(test="t"), difference(1.2, 0.3, 2.1, 0.03, seeds=3)
    assumed = ", by Student's t over 3 seeds, whose differences are taken as normal"
    for one in (found, difference(0.1, -0.3, 0.5, 1.0, seeds=3)):
        assert words_of(Family("trained with", SETTING, "dino (toy)", "seeds", [one]), one, rule).endswith(assumed)
    unsure = replace(found, outcome="undecided")
    assert assumed not in words_of(Family("trained with", SETTING, "dino (toy)", "seeds", [unsure]), unsure, rule)
    assert "Student's t, declared in advance, which takes the differences of the seeds as normal" in rule_text(rule)
    assert "exact sign-flip tests" in rule_text(RULE)


def test_what_students_t_needs_is_not_what_the_sign_flip_test_needs() -> None:
    one, two = difference(9.0, 8.0, 10.0, 0.1, seeds=1, resolvable=inf), difference(9.0, 8.0, 10.0, 0.1, seeds=2, resolvable=inf)
    said = [
        words_of(
            Family("trained with", SETTING, "dino (toy)", "seeds", [of]), replace(of, outcome="undecided", comparisons=1000), Rule(test="t")
        )
        for of in (one, two)
    ]
    assert said[0].endswith("says nothing about the readouts; Student's t needs 3 seeds or more")
    assert said[1].endswith("; no difference is resolvable by Student's t: 2 seeds are too few for 1,000 comparisons")
    weights = words(replace(one, outcome="undecided"), comparisons=1, question="read with", unit="images")
    assert weights.endswith("no difference is resolvable by Student's t: the replicates are too few for 1 comparison")


def test_words_of_weights() -> None:
    better = difference(1.2, 0.3, 2.1, 0.03)
    assert words(better, question="read with", unit="images") == "of these weights, cls is better than gap by 1.2 points [0.3, 2.1]"
    same = words(replace(better, outcome="no difference", high=0.7), question="read with", unit="images")
    assert same == "of these weights, no difference between cls and gap of more than 0.7 points that these 10,000 images could see"
    assert words(replace(better, outcome="undecided"), question="norm", unit="images").startswith("undecided: of these weights, cls − gap")


def test_a_null_control_that_is_resolved_is_a_false_alarm() -> None:
    expected = "null control, a difference is not expected to be resolvable: "
    alarm = words(difference(1.2, 0.3, 2.1, 0.03), question="null control", unit="seeds")
    assert alarm.startswith(f"{expected}cls is better than gap by 1.2 points [0.3, 2.1]. This is a false alarm by construction")
    assert "one in 20" in alarm
    assert "the instrument is off" in alarm
    quiet = words(difference(0.1, -0.2, 0.4, 0.7), question="null control", unit="seeds")
    assert quiet.startswith(f"{expected}no difference")
    assert "false alarm" not in quiet


def test_sides_are_named_by_what_differs() -> None:
    assert side_name("trained with", CLS) == side_name("null control", CLS) == "cls"
    assert side_name("self-consistency", Side(CLS.arm, "gap/pre")) == "cls read with gap/pre"
    assert side_name("read with", Side(CLS.arm, "gap/pre")) == side_name("norm", Side(CLS.arm, "gap/pre")) == "gap/pre"


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.3, 2.1, "[0.3, 2.1]"),
        (-2.14, -0.26, "[−2.1, −0.3]"),
        (0.04, 2.1, "[0.04, 2.10]"),  # excludes zero, and is seen to
        (-2.1, -0.004, "[−2.100, −0.004]"),
        (-0.04, 2.1, "[0.0, 2.1]"),
        (-0.2, 1.04, "[−0.20, 1.04]"),  # not within the margin of 1
        (-1.0, 0.96, "[−1.0, 1.0]"),
    ],
)
def test_bounds_are_shown_so_that_they_tell_what_was_decided(low: float, high: float, text: str) -> None:
    assert interval_text(low, high, RULE) == text


def test_p_as_text() -> None:
    values = (0.03125, 0.0009, 0.001, 0.0504, 0.05, 1.0, 0.9996, 0.25)
    assert [p_text(p, RULE) for p in values] == [".031", "< .001", ".001", ".0504", ".050", "1", "1", ".250"]


def test_signs() -> None:
    assert [signed(value) for value in (1.25, -0.04, 0.0, -1.0)] == ["+1.2", "0.0", "0.0", "−1.0"]
    assert signed(-0.04, 2) == "−0.04"


def test_a_table_has_everything_that_the_verdict_was_made_of() -> None:
    family = Family("trained with", SETTING, "dino (toy)", "seeds", [difference(1.2, 0.3, 2.1, 0.032)])
    wanted = ("A", "B", "points", "low", "high", "p", "corrected p", "discordant", "seeds", "images", "verdict of A")
    found = [differences("d", "D", [of], RULE) for of in (family, replace(family, primary=True), replace(family, unit="images"))]
    values = [[*map(sheet.frame.loc[0].get, wanted)] for sheet in found]
    assert values[0] == ["cls", "gap", 1.2, 0.3, 2.1, 0.016, 0.032, pytest.approx(8.1), 6, 10_000, "better"]
    assert values[1] == [*values[0][:6], None, *values[0][7:]]  # not corrected
    assert values[2] == [*values[0][:8], None, *values[0][9:]]
    assert [found[0].shown.loc[0, name] for name in ("points", "p", "corrected p", "discordant")] == ["+1.2", ".016", ".032", "8.1"]
    assert "by 0.06 points [0.03, 0.09]" in words(difference(0.06, 0.03, 0.09, 0.01))

"""From paired differences to a verdict by a rule that is stated beside every verdict; the words are in report/text.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import Field

from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.metrics import METRICS, metric_of
from ssl_vit_eval.rows import Row, Setting
from ssl_vit_eval.schema import STRICT

Question = Literal["trained with", "self-consistency", "read with", "norm", "null control"]
Outcome = Literal["better", "worse", "no difference", "undecided"]
Unit = Literal["seeds", "images"]
Remark = Literal["picked on test", "picked on train", "the only other"]

_TESTS = Literal["sign-flip", "t"]
_SCOPES = Literal["study", "setting"]
Margin = Annotated[float, Field(gt=0, lt=100, description="a number of points above 0 and below 100")]
Level = Annotated[float, Field(gt=0, le=0.05, description="a number above 0, at most 0.05, the level of the intervals")]
Test = Annotated[_TESTS, Field(description=f"one of: {', '.join(get_args(_TESTS))}")]
Scope = Annotated[_SCOPES, Field(description=f"one of: {', '.join(get_args(_SCOPES))}")]


@dataclass(frozen=True)
class Rule:
    """How a study decides; what it does not declare is as here.

    margin: points; a difference below it does not matter to the study. level: of tests after Holm's correction. test: by which a difference
    over several seeds, and the lack of one, are shown: the exact sign-flip test, which takes nothing as known and needs six seeds, or
    Student's t, which three seeds can afford and which takes the differences of the seeds as normal. family: what Holm's correction runs
    over: a question in all settings of the study, or in each setting (and of each arm or recipe) alone.
    """

    __pydantic_config__ = STRICT
    margin: Margin = 1.0
    level: Level = 0.05
    test: Test = "sign-flip"
    family: Scope = "study"


class Side(NamedTuple):
    """One side of a difference: an arm, and the spec that it is read with."""

    arm: Arm
    read_with: str


@dataclass(frozen=True, eq=False)
class Pair:
    """A − B, row by row of the same seed; remark: how B came to be, where that matters for the verdict."""

    a: Side
    b: Side
    rows: list[tuple[Row, Row]]
    remark: Remark | None = None


@dataclass(frozen=True)
class Difference:
    """Accuracy of A minus that of B, paired by image, replicate and pretraining seed; points and shares. The accuracy is the dataset's
    own: see `metric_of`.

    low, high: 95 % interval, over seeds, replicates and images together, of one seed over its replicates and images. p: of no difference;
    over several seeds by the rule's test, of one seed over its images, by McNemar's or a sign-flip test, and where it has several
    replicates also by Student's t over these: the larger p. p_beyond: that the difference is beyond the margin, by two one-sided tests.
    corrected, corrected_beyond: by Holm within the family, the differences of one seed apart from those of several. discordance: share of
    images that just one of them answers rightly, mean over seeds and replicates. of_seeds: the difference of each seed, in the order of
    `seeds`; both are empty for weights without a seed. resolvable: the smallest true difference that this comparison would have called
    better four times in five; infinite where its seeds cannot, however large it is. outcome: of A. comparisons: that are corrected together
    with it; remark: as of its `Pair`.
    """

    a: Side
    b: Side
    points: float
    low: float
    high: float
    p: float
    corrected: float
    discordance: float
    seeds: tuple[int, ...]
    of_seeds: tuple[float, ...]
    images: int
    resolvable: float
    outcome: Outcome
    p_beyond: float = 1.0
    corrected_beyond: float = 1.0
    comparisons: int = 1
    remark: Remark | None = None


@dataclass(frozen=True)
class Family:
    """Differences that answer one question in one setting.

    scope: what all of them are about, e.g. `dino (dino_photos)` or `dino (dino_photos), trained with cls`. unit: whether they are
    about pretrainings ("seeds"), or about the one set of weights that was read ("images"). primary: declared before the training. metric:
    of the differences. pairs: what is subtracted, in the order of the differences, which there are once they are measured.
    """

    question: Question
    setting: Setting
    scope: str
    unit: Unit
    differences: list[Difference]
    primary: bool = False
    metric: str = METRICS[0]
    pairs: Sequence[Pair] = ()

    @classmethod
    def asked(cls, question: Question, setting: Setting, scope: str, pairs: Sequence[Pair], primary: bool = False) -> "Family":
        """Before it is measured."""
        # of two arms, one seed is still about pretrainings, of which it cannot tell anything; of one arm it is about these weights
        several = question in ("trained with", "null control") or any(len(pair.rows) > 1 for pair in pairs)
        return cls(question, setting, scope, "seeds" if several else "images", [], primary, metric_of(pairs[0].rows[0][0]), pairs)

    @property
    def is_corrected(self) -> bool:
        """Not what was declared in advance, nor the null control, which is to show the noise as it is."""
        return not self.primary and self.question != "null control"


def within_margin(low: float, high: float, rule: Rule) -> bool:
    return -rule.margin <= low and high <= rule.margin


def excludes_zero(low: float, high: float) -> bool:
    return low > 0 or high < 0


def outcome_of(difference: Difference, unit: Unit, rule: Rule) -> Outcome:
    """The rule, on the unrounded numbers."""
    low, high = difference.low, difference.high
    if unit == "seeds" and len(difference.seeds) < 2:
        return "undecided"
    if difference.corrected <= rule.level and excludes_zero(low, high):
        return "better" if low > 0 else "worse"
    return "no difference" if difference.corrected_beyond <= rule.level and within_margin(low, high, rule) else "undecided"

"""From paired differences to a verdict by a rule that is stated beside every verdict; the words are in report/text.py."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.rows import Setting

Question = Literal["trained with", "self-consistency", "read with", "norm", "null control"]
Outcome = Literal["better", "worse", "no difference", "undecided"]
Unit = Literal["seeds", "images"]

Test = Literal["sign-flip", "t"]
Scope = Literal["study", "setting"]

RULE = """
A is better than B if the corrected p is at most {level:g} and the 95 % interval of A − B excludes zero. There is no difference of more than
x points that this study could see if the corrected p of a difference beyond ±{margin:g} points is at most {level:g} and the interval lies
within ±{margin:g} points (x is its larger bound, rounded up to 0.1). Everything else is undecided. Over several pretraining seeds, both p
are those of {test}, and the interval is over seeds, probe seeds and images together. Where one set of weights is read in two ways, p is
over images (McNemar's) and, where there are several, over probe seeds (Student's t); the verdict is about these weights only. Two arms of
one seed each are two networks: undecided, whatever their difference. Both p are corrected by Holm {family}; a comparison declared before
the training is not corrected."""
_TESTS = {
    "sign-flip": "exact sign-flip tests over the seeds",
    "t": "Student's t, declared in advance, which takes the differences of the seeds as normal",
}
_FAMILIES = {
    "study": "over all differences of one question in this study, whatever the data set and the protocol",
    "setting": "within one question on one data set by one protocol",
}


@dataclass(frozen=True)
class Rule:
    """How a study decides; what it does not declare is as here.

    margin: points; a difference below it does not matter to the study. level: of tests after Holm's correction. test: by which a difference
    over several seeds, and the lack of one, are shown: the exact sign-flip test, which takes nothing as known and needs six seeds, or
    Student's t, which three seeds can afford and which takes the differences of the seeds as normal. family: what Holm's correction runs
    over: a question in all settings of the study, or in each setting (and of each arm or recipe) alone.
    """

    margin: float = 1.0
    level: float = 0.05
    test: Test = "sign-flip"
    family: Scope = "study"

    @property
    def text(self) -> str:
        """The rule in words, to be shown wherever a verdict is."""
        of = {"test": _TESTS[self.test], "family": _FAMILIES[self.family]}
        return " ".join(RULE.format(level=self.level, margin=self.margin, **of).split())


class Side(NamedTuple):
    """One side of a difference: an arm, and the spec that it is read with."""

    arm: Arm
    read_with: str


@dataclass(frozen=True)
class Difference:
    """Accuracy of A minus that of B, paired by image, replicate and pretraining seed; points and shares. The accuracy is the data set's
    own: see `metric_of`.

    low, high: 95 % interval, over seeds, replicates and images together, of one seed over its replicates and images. p: of no difference;
    over several seeds by the rule's test, of one seed over its images, by McNemar's or a sign-flip test, and where it has several
    replicates also by Student's t over these: the larger p. p_beyond: that the difference is beyond the margin, by two one-sided tests.
    corrected, corrected_beyond: by Holm within the family, the differences of one seed apart from those of several. discordance: share of
    images that just one of them answers rightly, mean over seeds and replicates. of_seeds: the difference of each seed, in the order of
    `seeds`; both are empty for weights without a seed. resolvable: the smallest true difference that this comparison would have called
    better four times in five; infinite where its seeds cannot, however large it is. outcome: of A. comparisons: that are corrected together
    with it; remark: how the difference came to be, where that is to be said.
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
    remark: str = ""


@dataclass(frozen=True)
class Family:
    """Differences that answer one question in one setting.

    scope: what all of them are about, e.g. `dino (dino_photos)` or `dino (dino_photos), trained with cls`. unit: whether they are
    about pretrainings ("seeds"), or about the one set of weights that was read ("images"). primary: declared before the training.
    """

    question: Question
    setting: Setting
    scope: str
    unit: Unit
    differences: list[Difference]
    primary: bool = False

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

"""From paired differences to a verdict by a rule that is stated beside every verdict; the words are in report/text.py."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.rows import Setting

Question = Literal["trained with", "self-consistency", "read with", "norm", "null control"]
Outcome = Literal["better", "worse", "no difference", "undecided"]
Unit = Literal["seeds", "images"]

RULE = """A is better than B if the corrected p is at most {level:g} and the {confidence:g} % interval of A − B excludes zero. There is no
difference of more than x points that this study could see if the interval lies within ±{margin:g} points (x is its larger bound, rounded
up to 0.1). Everything else is undecided. Over several pretraining seeds, p is that of the exact sign-flip test over the seeds, and the
interval is over seeds and images together. Where one set of weights is read in two ways, p is McNemar's, the interval is over images, and
the verdict is about these weights only. Two arms of one seed each are two networks: undecided, whatever their difference. p is corrected
by Holm within a family, which is one question in one setting; a comparison declared before the training is not corrected."""


@dataclass(frozen=True)
class Rule:
    """margin: points; a difference below it does not matter to the study. level: of tests, and of intervals 1 - level."""

    margin: float = 1.0
    level: float = 0.05

    @property
    def text(self) -> str:
        """The rule in words, to be shown wherever a verdict is."""
        return " ".join(RULE.format(level=self.level, margin=self.margin, confidence=100 * (1 - self.level)).split())


class Side(NamedTuple):
    """One side of a difference: an arm, and the spec that it is read with."""

    arm: Arm
    read_with: str


@dataclass(frozen=True)
class Difference:
    """Top-1 of A minus top-1 of B, paired by image and by pretraining seed; points and shares.

    low, high: 95 % interval, over seeds and images together, of one seed over its images. p: exact sign-flip test over seeds, of one
    seed McNemar's over images (of shares, where a protocol has several draws, a paired sign-flip test over images); corrected: by Holm
    within its family, the differences of one seed apart from those of several. discordance: share of images that just one of them
    answers rightly, mean over seeds. of_seeds: the difference of each seed, in the order of `seeds`; both are empty for weights
    without a seed. resolvable: the smallest true difference that this comparison would have called better four times in five; infinite
    where its seeds cannot, however large it is. outcome: of A. comparisons: that are corrected together with it; remark: how the
    difference came to be, where that is to be said.
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
    comparisons: int = 1
    remark: str = ""


@dataclass(frozen=True)
class Family:
    """Differences that answer one question in one setting and are corrected together.

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
    return "no difference" if within_margin(low, high, rule) else "undecided"

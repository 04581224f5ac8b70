"""From paired differences to a verdict in words, by a rule that is stated beside every verdict."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ssl_vit_eval.arms import Arm, Setting

Question = Literal["trained with", "self-consistency", "read with", "norm", "null control"]
Outcome = Literal["better", "worse", "no difference", "undecided"]


@dataclass(frozen=True)
class Rule:
    """margin: points; a difference below it does not matter to the study. level: of tests, and of intervals 1 - level."""

    margin: float = 1.0
    level: float = 0.05


class Side(NamedTuple):
    """One side of a difference: an arm, and the spec that it is read with."""

    arm: Arm
    read_with: str


@dataclass(frozen=True)
class Difference:
    """Top-1 of A minus top-1 of B, paired by image and by pretraining seed; points and shares.

    low, high: 95 % interval, over seeds and images together, of one seed over its images. p: exact sign-flip test over seeds, of one
    seed McNemar's over images; corrected: by Holm within its family. discordance: share of images that just one of them answers
    rightly, mean over seeds. of_seeds: the difference of each seed, in the order of `seeds`. resolvable: the smallest true difference
    that this comparison would have called better four times in five; infinite where its seeds cannot, however large it is.
    outcome: of A; words: the verdict as a sentence.
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
    words: str


@dataclass(frozen=True)
class Family:
    """Differences that answer one question in one setting and are corrected together.

    scope: what all of them are about, e.g. `dino (dino_photos)` or `dino (dino_photos), trained with cls`. unit: whether they are
    about pretrainings ("seeds"), or about the one set of weights that was read ("images"). primary: declared before the training.
    """

    question: Question
    setting: Setting
    scope: str
    unit: Literal["seeds", "images"]
    differences: list[Difference]
    primary: bool = False

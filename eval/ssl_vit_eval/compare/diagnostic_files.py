"""What `ssl-vit eval --diagnostics` wrote, found again: which arm and seed each file is of."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ssl_vit.errors import Failure
from ssl_vit_eval.compare.arms import Arm, Weights, starts, weights_of
from ssl_vit_eval.rows import Row

KEYS = ("weights", "transform", "dataset", "layout", "spectra", "cka", "tokens", "attention", "picture", "readouts", "redundancy")


class Place(NamedTuple):
    """The images that were looked at; data: the first digits of their hash."""

    dataset: str
    data: str
    transform: str


@dataclass(frozen=True)
class Diagnosis:
    """One file of `--diagnostics`, `found`, whose `definitions` say what each number is; seed: of the pretraining.

    starts: for a random initialisation, the (method, recipe) of the arms that were trained from it.
    """

    arm: Arm
    seed: int | None
    place: Place
    file: Path
    found: dict[str, Any]
    starts: tuple[tuple[str, str], ...]

    @property
    def weights(self) -> tuple[str, str]:
        """As `weights_of` a row."""
        return self.found["weights"], self.place.transform

    @property
    def depth(self) -> int:
        """Blocks of the backbone."""
        return int(self.found["layout"]["depth"])


def find_diagnoses(folders: Sequence[str | Path], rows: Sequence[Row], arms: Mapping[Weights, Arm]) -> list[Diagnosis]:
    """Every diagnostics file in and below the folders, by arm and seed in the order of the arms; of the same weights and images the last
    found. arms: of the weights of the rows.

    Failure for a file that cannot be read, and for one whose weights no row is of, since only a row knows the arm.
    """
    firsts, begun, found = {weights_of(row): row for row in reversed(rows)}, starts(rows, arms), {}
    for file in dict.fromkeys(file for folder in folders for file in sorted(Path(folder).rglob("diagnostics-*.json"))):
        content = _read(file)
        key = content["weights"], content["transform"]
        if key not in arms:
            raise Failure(f"{file} is of weights {key[0][:8]}, of which no row was found: compare the folder that has their rows too")
        data = file.stem.removesuffix(f"-{content['transform']}")[-8:]
        place = Place(content["dataset"], data, content["transform"])
        found[key, place] = Diagnosis(arms[key], firsts[key].seed, place, file, content, tuple(arm[:2] for arm in begun.get(key[0], ())))
    order = {key: number for number, key in enumerate(arms)}
    return sorted(found.values(), key=lambda of: (of.place, order[of.weights]))


def by_arm(diagnoses: Sequence[Diagnosis]) -> dict[tuple[Place, Arm], list[Diagnosis]]:
    """The seeds of each arm on the same images; networks of one name but another depth are other arms."""
    depths: dict[Arm, set[int]] = {}
    for of in diagnoses:
        depths.setdefault(of.arm, set()).add(of.depth)
    found: dict[tuple[Place, Arm], list[Diagnosis]] = {}
    for of in diagnoses:
        arm = of.arm if len(depths[of.arm]) == 1 else of.arm._replace(recipe=f"{of.arm.recipe}, {of.depth} blocks")
        found.setdefault((of.place, arm), []).append(of)
    return found


def label(arm: Arm) -> str:
    """`dino (dino_photos), trained with cls`; what was not trained here by its own name alone."""
    return arm.name if arm.trained_with else arm.recipe


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for key in KEYS:
            content[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Failure(f"cannot read {file}: {' '.join(repr(error).split())}; remove it or evaluate again with --diagnostics") from error
    return content

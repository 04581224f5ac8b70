"""What is compared: arms, by the names of their runs, and which weights belong to which."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ssl_vit_eval.compare.runs import recipe_name
from ssl_vit_eval.rows import Row

FIRST = ("cls", "gap", "register")  # then the others as they come


class Arm(NamedTuple):
    """One line of a table; its seeds are averaged.

    recipe: what its runs are called without readout and seed, of other sources their name. trained_with: None for what was not
    trained here; the random initialisation of a recipe has its method and name.
    """

    method: str
    recipe: str
    trained_with: str | None

    @property
    def section(self) -> str:
        """What it shares with the arms that it is compared with: `dino (dino_photos)`."""
        return f"{self.method} ({self.recipe})"

    @property
    def name(self) -> str:
        """`dino (dino_photos), trained with cls`; of what was not trained here the section alone."""
        return f"{self.section}, trained with {self.trained_with}" if self.trained_with else self.section


def ordered(specs: Iterable[str]) -> list[str]:
    """Each spec once, the single kinds of tokens first."""
    found = dict.fromkeys(specs)
    return [spec for spec in FIRST if spec in found] + [spec for spec in found if spec not in FIRST]


def weights_of(row: Row) -> tuple[str, str]:
    return row.checkpoint, row.transform  # raw pixels have no weights, and their size is in the transform


def arms_of(rows: Sequence[Row]) -> dict[tuple[str, str], Arm]:
    """The arm of all weights. Checkpoints of one arm and seed, or of two recipes, are not seeds of one thing: hashes keep them apart."""
    clashing = _clashes(rows)
    return {key: arm._replace(recipe=f"{arm.recipe} {key[0][:8]}") if arm in clashing else arm for key, arm in _named(rows).items()}


def clash_notes(rows: Sequence[Row]) -> list[str]:
    """Why `arms_of` keeps checkpoints of one name apart, a sentence for each arm."""
    return [f"{arm.name}: {why}; each of its checkpoints stands alone" for arm, why in _clashes(rows).items()]


def _named(rows: Sequence[Row]) -> dict[tuple[str, str], Arm]:
    return {weights_of(row): Arm(row.method, recipe_name(row.source, row.trained_with, row.seed), row.trained_with) for row in rows}


def _clashes(rows: Sequence[Row]) -> dict[Arm, str]:
    """Arms whose rows cannot be seeds of one thing, and what they are instead."""
    names = _named(rows)
    checkpoints: dict[tuple[Arm, int | None], dict[str, None]] = defaultdict(dict)
    families: dict[Arm, set[str | None]] = defaultdict(set)
    for row in rows:
        arm = names[weights_of(row)]
        checkpoints[arm, row.seed][row.checkpoint] = None
        families[arm].add(row.family)
    clashes = {arm: f"{len(of)} recipes share its name" for arm, of in families.items() if len(of) > 1}
    for (arm, seed), of in checkpoints.items():
        if len(of) > 1 and arm not in clashes:
            which = "" if seed is None else f" of seed {seed}"
            clashes[arm] = f"{len(of)} checkpoints{which} ({', '.join(key[:8] for key in of)})"
    return clashes

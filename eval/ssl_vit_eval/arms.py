"""What is compared: arms, by the names of their runs, and the settings within which two numbers may stand side by side."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from ssl_vit_eval.rows import Row
from ssl_vit_eval.runs import recipe_name


class Arm(NamedTuple):
    """One line of a table; its seeds are averaged.

    recipe: what its runs are called without readout and seed, of other sources their name. trained_with: None for what was not
    trained here; the random initialisation of a recipe has its method and name.
    """

    method: str
    recipe: str
    trained_with: str | None


class Setting(NamedTuple):
    """What must be equal for two numbers to stand in one table."""

    dataset: str
    data: str
    transform: str
    protocol: str
    version: int
    parameters: str  # hash
    control: str

    @property
    def rule(self) -> str:
        """The protocol, and what was changed of it on purpose."""
        return self.protocol + (f", {self.control}" if self.control else "")

    @classmethod
    def of(cls, row: Row) -> "Setting":
        return cls(row.dataset, row.data, row.transform, row.protocol, row.protocol_version, row.protocol_hash, row.control)


def weights_of(row: Row) -> tuple[str, str]:
    return row.checkpoint, row.transform  # raw pixels have no weights, and their size is in the transform


def arms_of(rows: Sequence[Row]) -> dict[tuple[str, str], Arm]:
    """The arm of all weights. Checkpoints of one arm and seed, or of two recipes, are not seeds of one thing: hashes keep them apart."""
    names = {weights_of(row): Arm(row.method, recipe_name(row.source, row.trained_with, row.seed), row.trained_with) for row in rows}
    same, families = defaultdict(set), defaultdict(set)
    for row in rows:
        same[names[weights_of(row)], row.seed].add(row.checkpoint)
        families[names[weights_of(row)]].add(row.family)
    clashing = {arm for (arm, _), checkpoints in same.items() if len(checkpoints) > 1}
    clashing |= {arm for arm, found in families.items() if len(found) > 1}
    return {key: arm._replace(recipe=f"{arm.recipe} {key[0][:8]}") if arm in clashing else arm for key, arm in names.items()}

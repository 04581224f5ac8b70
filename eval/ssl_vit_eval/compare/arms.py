"""What is compared: arms, and which weights belong to which."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ssl_vit_eval.compare.notes import Note
from ssl_vit_eval.compare.runs import short_name
from ssl_vit_eval.rows import Row

FIRST = ("cls", "gap", "register")  # then the others as they come
Weights = tuple[str, str]


class Arm(NamedTuple):
    """One line of a table; its seeds are averaged.

    recipe: what the folders of its runs are called without readout and seed, or its own name where they differ; of other sources their
    name. trained_with: None for what was not trained here; the random initialisation of a recipe has its method and name.
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


def weights_of(row: Row) -> Weights:
    return row.checkpoint, row.transform  # raw pixels have no weights, and their size is in the transform


def arms_and_notes(rows: Sequence[Row]) -> tuple[dict[Weights, Arm], dict[str, str], list[Note]]:
    """The arm of all weights, what each recipe is called, by family, and notes on what is kept apart.

    Runs are of one recipe where method and `family` are equal, whatever their folders are called; seeds are those of the rows. Two
    checkpoints of one arm and seed are not seeds of one thing: their hashes keep them apart. So do those of recipes that share a name.
    """
    named = {weights_of(row): row for row in rows}
    recipes: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)  # own names by folder, by method, family and network
    for row in named.values():
        network = _recipe(row)[2]
        recipes[_recipe(row)][short_name(row.source, row.trained_with, row.seed).removesuffix(network)] = row.recipe_name or row.method
    names = {recipe: next(iter(of)) if len(of) == 1 else next(iter(of.values())) for recipe, of in recipes.items()}
    places = [Arm(recipe[0], names[recipe] + recipe[2], None) for recipe in recipes]
    shared = dict.fromkeys(place for place in places if places.count(place) > 1)
    names |= {recipe: f"{names[recipe]} {recipe[1][:8]}" for recipe, place in zip(recipes, places, strict=True) if place in shared}

    arms = {key: Arm(row.method, names[_recipe(row)] + _recipe(row)[2], row.trained_with) for key, row in named.items()}
    checkpoints: dict[tuple[Arm, int | None], dict[str, None]] = defaultdict(dict)
    for key, row in named.items():
        checkpoints[arms[key], row.seed][row.checkpoint] = None
    clashes = {arm: (seed, of) for (arm, seed), of in reversed(checkpoints.items()) if len(of) > 1}
    notes = [Note("other recipes", {"arm": place, "count": places.count(place)}) for place in shared]
    notes += [Note("other checkpoints", {"arm": arm, "seed": seed, "checkpoints": list(of)}) for arm, (seed, of) in clashes.items()]
    apart = {key: arm._replace(recipe=f"{arm.recipe} {key[0][:8]}") if arm in clashes else arm for key, arm in arms.items()}
    return apart, {family: name for (_, family, _), name in names.items()}, notes


def starts(rows: Iterable[Row], arms: Mapping[Weights, Arm]) -> dict[str, dict[Arm, None]]:
    """The arms that a random initialisation stands for, by its checkpoint: one of every recipe that began with it."""
    found: dict[str, dict[Arm, None]] = defaultdict(dict)
    for row in rows:
        if row.trained_with and row.init:
            found[row.init][arms[weights_of(row)]._replace(trained_with=None)] = None
    return found


def _recipe(row: Row) -> tuple[str, str, str]:
    """Method, family and network of what was trained here; of other sources their name stands for the family, and no network."""
    if row.trained_with is None:
        return row.method, row.source, ""
    _, colon, network = row.source.partition(":")
    return row.method, row.family or short_name(row.source, row.trained_with, row.seed), colon + network

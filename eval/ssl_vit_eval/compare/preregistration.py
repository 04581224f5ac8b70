"""What a study declared before it trained: the margin below which a difference does not matter, and its one primary comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ssl_vit.assets import read_yaml
from ssl_vit.errors import UsageError
from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.verdict import Rule
from ssl_vit_eval.rows import Setting

_KEYS = ("recipe", "data", "protocol", "compare")


class Primary(NamedTuple):
    """A − B of two arms of a recipe, each read as it was trained, on one data set by one protocol."""

    recipe: str
    data: str
    protocol: str
    compare: tuple[str, str]

    @property
    def name(self) -> str:
        return f"{' − '.join(self.compare)} of {self.recipe} on {self.data} by {self.protocol}"

    def is_in(self, setting: Setting) -> bool:
        # rows name a folder by its last part
        names = (self.data, Path(self.data).name)
        return setting.dataset in names and setting.protocol == self.protocol and not setting.control

    def sides(self, arms: Sequence[Arm]) -> tuple[Arm, Arm] | None:
        """A and B among the arms of one section; None if it is not about them."""
        found = {arm.trained_with: arm for arm in arms if arm.recipe == self.recipe}
        a, b = (found.get(spec) for spec in self.compare)
        return (a, b) if a and b else None


@dataclass(frozen=True)
class Declared:
    """margin: points. primary: None where none was declared. notes: what was not taken over, and why."""

    margin: float
    primary: Primary | None
    notes: list[str]


def find_declared(folders: Sequence[str | Path], asked: float | None = None) -> Declared:
    """What the `study.yaml` in and below the folders say; `asked` is the margin where they say none.

    UsageError for one whose margin or primary is not of the form above, and for a margin that is asked for beside a declared one."""
    below = [(file, file.relative_to(folder)) for folder in map(Path, folders) for file in folder.rglob("study.yaml")]
    files = dict.fromkeys(sorted(file.resolve() for file, path in below if "cells" not in path.parts))
    contents = {file: read_yaml(file) for file in files}
    usual = Rule().margin if asked is None else _margin("--margin", asked)
    for file, content in contents.items():
        if asked is not None and content.get("margin", asked) != asked:
            raise UsageError(
                f"{file} declared a margin of {content['margin']} points before the training, so --margin {asked:g} comes too late"
            )
    margins = {file: _margin(file, content.get("margin", usual)) for file, content in contents.items()}
    primaries = {file: _primary(file, content["primary"]) for file, content in contents.items() if content.get("primary") is not None}
    notes = []
    if len(set(margins.values())) > 1:
        said = ", ".join(f"{file.parent.name} {margin:g}" for file, margin in margins.items())
        notes.append(f"the studies have different margins ({said} points): {usual:g} is taken")
    if len(set(primaries.values())) > 1:
        said = ", ".join(file.parent.name for file in primaries)
        notes.append(f"{len(primaries)} studies declare different primary comparisons ({said}): none counts as declared in advance")
    margin, primary = set(margins.values()), set(primaries.values())
    return Declared(margin.pop() if len(margin) == 1 else usual, primary.pop() if len(primary) == 1 else None, notes)


def _margin(file: Path | str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 100:
        raise UsageError(f"{file}: margin is {value!r}; it must be a number of points between 0 and 100")
    return float(value)


def _primary(file: Path, value: Any) -> Primary:
    if not isinstance(value, dict) or sorted(value) != sorted(_KEYS):
        raise UsageError(f"{file}: primary is {value!r}; it must have the keys {', '.join(_KEYS)}")
    arms = value["compare"]
    if not isinstance(arms, list) or len(arms) != 2:
        raise UsageError(f"{file}: primary compares {arms!r}; give two readouts in brackets, e.g. [cls, gap]")
    a, b = (str(ReadoutSpec.parse(str(arm))) for arm in arms)
    return Primary(str(value["recipe"]), str(value["data"]), str(value["protocol"]), (a, b))

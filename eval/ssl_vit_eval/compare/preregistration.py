"""What a study declared before it trained: the rule of its verdicts, and its one primary comparison."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ssl_vit.assets import read_yaml
from ssl_vit.errors import UsageError
from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.verdict import Rule, Scope, Test
from ssl_vit_eval.rows import Setting

_KEYS = ("recipe", "data", "protocol", "compare")


def _up_to(most: float, what: str) -> tuple[Callable[[object], bool], str]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most, what


RULES: dict[str, tuple[Callable[[object], bool], str]] = {  # what a study file may say of each field of `Rule`
    "margin": _up_to(100.0, "a number of points between 0 and 100"),
    "level": _up_to(0.05, "a number above 0, at most 0.05, the level of the intervals"),
    "test": (lambda value: value in get_args(Test), f"one of: {', '.join(get_args(Test))}"),
    "family": (lambda value: value in get_args(Scope), f"one of: {', '.join(get_args(Scope))}"),
}


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
    """primary: None where none was declared. notes: what was not taken over, and why."""

    rule: Rule
    primary: Primary | None
    notes: list[str]


def find_declared(folders: Sequence[str | Path], margin: float | None = None, family: str | None = None) -> Declared:
    """What the `study.yaml` in and below the folders say; `margin` and `family` are asked for, where they say nothing.

    UsageError for a declaration that is not of the form that `Rule` and `Primary` have, and for one that is asked for beside another."""
    below = [(file, file.relative_to(folder)) for folder in map(Path, folders) for file in folder.rglob("study.yaml")]
    files = dict.fromkeys(sorted(file.resolve() for file, path in below if "cells" not in path.parts))
    contents = {file: read_yaml(file) for file in files}
    asked: dict[str, Any] = {"margin": margin, "family": family}
    rule: dict[str, Any] = {}
    notes = []
    for key, (holds, what) in RULES.items():
        usual = getattr(Rule(), key) if asked.get(key) is None else asked[key]
        if not holds(usual):
            raise UsageError(f"--{key}: {key} is {usual!r}; it must be {what}")
        found = {file: content.get(key, usual) for file, content in contents.items()}
        for file, value in found.items():
            if not holds(value):
                raise UsageError(f"{file}: {key} is {value!r}; it must be {what}")
            if asked.get(key) is not None and value != usual:
                raise UsageError(f"{file} declared the {key} {value} before the training, so --{key} {usual} comes too late")
        different = set(found.values())
        if len(different) > 1:
            said = ", ".join(f"{file.parent.name} {value}" for file, value in found.items())
            notes.append(f"the studies declare different values of {key} ({said}): {usual} is taken")
        value = different.pop() if len(different) == 1 else usual
        rule[key] = value if isinstance(value, str) else float(value)
    primaries = {file: _primary(file, content["primary"]) for file, content in contents.items() if content.get("primary") is not None}
    if len(set(primaries.values())) > 1:
        said = ", ".join(file.parent.name for file in primaries)
        notes.append(f"{len(primaries)} studies declare different primary comparisons ({said}): none counts as declared in advance")
    primary = set(primaries.values())
    return Declared(Rule(**rule), primary.pop() if len(primary) == 1 else None, notes)


def _primary(file: Path, value: Any) -> Primary:
    if not isinstance(value, dict) or sorted(value) != sorted(_KEYS):
        raise UsageError(f"{file}: primary is {value!r}; it must have the keys {', '.join(_KEYS)}")
    arms = value["compare"]
    if not isinstance(arms, list) or len(arms) != 2:
        raise UsageError(f"{file}: primary compares {arms!r}; give two readouts in brackets, e.g. [cls, gap]")
    a, b = (str(ReadoutSpec.parse(str(arm))) for arm in arms)
    return Primary(str(value["recipe"]), str(value["data"]), str(value["protocol"]), (a, b))

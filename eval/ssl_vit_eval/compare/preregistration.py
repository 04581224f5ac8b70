"""What a study declared before it trained: the rule of its verdicts, and its one primary comparison."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ssl_vit.assets import read_yaml
from ssl_vit.errors import UsageError
from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.notes import Note
from ssl_vit_eval.compare.verdict import Rule
from ssl_vit_eval.rows import Setting
from ssl_vit_eval.schema import STRICT, checked


@dataclass(frozen=True)
class Primary:
    """A − B of two arms of a recipe, each read as it was trained, on one dataset by one protocol."""

    __pydantic_config__ = STRICT
    recipe: str
    data: str
    protocol: str
    compare: Annotated[tuple[str, str], Field(description="two readouts in brackets, e.g. [cls, gap]")]

    @classmethod
    def read(cls, value: object, where: str) -> "Primary":
        """What a study file says, its readouts spelt canonically; UsageError for what is wrong in it, after `where`."""
        found = checked(cls, value, where)
        a, b = (str(ReadoutSpec.parse(spec)) for spec in found.compare)
        if a == b:
            raise UsageError(f"{where}.compare names {a!r} twice; name two arms")
        return replace(found, compare=(a, b))

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
    notes: list[Note]


def find_declared(folders: Sequence[str | Path], margin: float | None = None, family: str | None = None) -> Declared:
    """What the `study.yaml` in and below the folders say; `margin` and `family` are asked for, where they say nothing.

    UsageError for a declaration that is not of the form that `Rule` and `Primary` have, and for one that is asked for beside another."""
    below = [(file, file.relative_to(folder)) for folder in map(Path, folders) for file in folder.rglob("study.yaml")]
    files = dict.fromkeys(sorted(file.resolve() for file, path in below if "cells" not in path.parts))
    contents: dict[Path, dict[str, Any]] = {file: read_yaml(file) for file in files}
    asked = {key: value for key, value in (("margin", margin), ("family", family)) if value is not None}
    usual = vars(checked(Rule, asked, ", ".join(f"--{key}" for key in asked)))
    rules = {
        file: vars(checked(Rule, usual | {key: content[key] for key in usual.keys() & content}, str(file)))
        for file, content in contents.items()
    }
    rule, notes = dict[str, Any](), list[Note]()
    for key, value in usual.items():
        for file, found in rules.items():
            if key in asked and found[key] != value:
                raise UsageError(f"{file} declared the {key} {found[key]} before the training, so --{key} {value} comes too late")
        declared = {found[key] for found in rules.values()}
        rule[key] = next(iter(declared)) if len(declared) == 1 else value
        if len(declared) > 1:
            said = {file.parent.name: found[key] for file, found in rules.items()}
            notes.append(Note("other rules", {"key": key, "declared": said, "taken": value}))
    primaries = {
        file: Primary.read(content["primary"], f"{file}: primary")
        for file, content in contents.items()
        if content.get("primary") is not None
    }
    if len(set(primaries.values())) > 1:
        notes.append(Note("other primaries", {"studies": [file.parent.name for file in primaries]}))
    primary = set(primaries.values())
    return Declared(Rule(**rule), primary.pop() if len(primary) == 1 else None, notes)

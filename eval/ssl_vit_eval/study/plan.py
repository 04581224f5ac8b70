"""The study file, and what it asks for: the cells that are trained, the data and protocols that they meet, and what was declared before."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import AfterValidator, Field

from ssl_vit.assets import find_asset, read_yaml
from ssl_vit.data.folders import local_path
from ssl_vit.data.sources import display_name
from ssl_vit.errors import Failure, UsageError, one_of, reason
from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.compare.preregistration import Primary
from ssl_vit_eval.compare.verdict import Level, Margin, Rule, Scope, Test
from ssl_vit_eval.controls import check_controls
from ssl_vit_eval.protocols import Protocol, load_protocols
from ssl_vit_eval.schema import STRICT, checked, unique
from ssl_vit_eval.sources import Source, open_source, random_source
from ssl_vit_eval.suites import Dataset, load_suite, parse_dataset

CONTROL_CELL = "controls"  # the unit of work that evaluates what is not trained
TOKENS = {"registers": "r", "cls_tokens": "c", "patch": "p"}  # fields of `backbone` that make a token set, and their letters in names

_UNIQUE = AfterValidator(unique)
_Names = Annotated[list[str], _UNIQUE, Field(description="a list of names in brackets")]
_Some = Field(min_length=1)
_TokenSet = Annotated[dict[Literal["registers", "cls_tokens", "patch"], int], _Some]
_TOKEN_SETS = f"a list of token sets such as {{registers: 4}}, whole numbers for: {', '.join(TOKENS)}"


@dataclass(frozen=True)
class Study:
    """A study file. Every arm is the recipe with one field changed, `readout`, and the seed.

    recipes: names or files, `./FILE` beside the study; trained_with: readout specs; seeds; protocols, read_with: how every arm is
    evaluated; data: on what, entries as in a suite; suites: names of more.
    tokens: token sets, each applied to every recipe, e.g. `{registers: 1}`; none for the recipe's own.
    controls, diagnostics: as `ssl-vit eval` takes them, the latter for the first seed of every arm.
    margin, level, test, family: how verdicts are made, as `Rule` says.
    primary: the one comparison declared in advance: `{recipe: NAME, data: DATASET, protocol: NAME, compare: [SPEC, SPEC]}`.
    slurm: parameters of submitit.
    """

    __pydantic_config__ = STRICT
    recipes: Annotated[_Names, _Some]
    trained_with: Annotated[_Names, _Some]
    seeds: Annotated[list[int], _UNIQUE, Field(min_length=1, description="a list of whole numbers in brackets")]
    protocols: Annotated[_Names, _Some]
    read_with: Annotated[_Names, _Some]
    data: Annotated[list[Any], _UNIQUE, Field(description="a list of names in brackets")] = field(default_factory=list)
    suites: _Names = field(default_factory=list)
    tokens: Annotated[list[_TokenSet], _UNIQUE, Field(description=_TOKEN_SETS)] = field(default_factory=list)
    controls: _Names = field(default_factory=list)
    diagnostics: Annotated[bool, Field(description="true or false")] = False
    margin: Margin = Rule.margin
    level: Level = Rule.level
    test: Test = Rule.test
    family: Scope = Rule.family
    primary: Annotated[dict[str, Any] | None, Field(description="KEY: VALUE pairs in braces")] = None
    slurm: Annotated[dict[str, Any], Field(description="KEY: VALUE pairs in braces")] = field(default_factory=dict)


class Start(NamedTuple):
    """What the arms of one seed share: recipe is the file, name what cells call it with its token set, options what changes it."""

    recipe: str
    name: str
    options: tuple[str, ...]
    seed: int

    @property
    def token_set(self) -> str:
        """`r4`; empty for the recipe's own."""
        return self.name.removeprefix(Path(self.recipe).stem).removeprefix("-")


@dataclass(frozen=True)
class Cell:
    """One pretraining of a study."""

    start: Start
    readout: str
    folder: Path

    @property
    def options(self) -> list[str]:
        # One device: a study is a loop over small runs; what is spread over several GPUs is pretrained by `ssl-vit pretrain`.
        own = ["--readout", self.readout, "--seed", str(self.start.seed), "--trainer.devices", "1", "--out", str(self.folder)]
        return [*self.start.options, *own]

    @property
    def lock(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.lock")

    @property
    def summary(self) -> dict[str, Any] | None:
        """Its run.json, None while it is unfinished; Failure for one that is damaged."""
        file = self.folder / "run.json"
        try:
            return dict(json.loads(file.read_text())) if file.exists() else None
        except (ValueError, TypeError) as error:
            raise Failure(f"{file} cannot be read ({reason(error)}); remove it: the same command writes it again") from error


@dataclass(frozen=True)
class Plan:
    """A study in its output folder."""

    study: Study
    name: str
    folder: Path
    cells: list[Cell]
    data: list[Dataset]
    rules: list[Protocol]

    @classmethod
    def load(cls, name: str, out: str | None) -> "Plan":
        """Find and read a study; nothing is written. UsageError, in one line, for whatever is wrong in it."""
        file = find_asset("studies", name)
        study = checked(Study, read_yaml(file), f"study {name}")
        if not study.data and not study.suites:
            raise UsageError(f"study {name}: it has no data; give data or suites, in brackets")
        folder = Path(out or Path("runs") / Path(name).stem)
        specs = {str(parsed): parsed.slug for parsed in map(ReadoutSpec.parse, study.trained_with)}
        cells = [
            Cell(Start(recipe, named, options, seed), spec, folder / "cells" / f"{named}-{slug}-s{seed}")
            for recipe in (_beside(file, recipe) for recipe in study.recipes)
            for named, options in _token_sets(Path(recipe).stem, study.tokens)
            for spec, slug in specs.items()
            for seed in study.seeds
        ]
        for number, cell in enumerate(cells):
            if any(other.folder == cell.folder for other in cells[:number]):
                raise UsageError(f"two recipes of the study are called {cell.folder.name!r}; rename one of the files")
        data = [parse_dataset(f"study {name}, dataset {number}", entry, {}, file.parent) for number, entry in enumerate(study.data, 1)]
        data = list(dict.fromkeys([*data, *(dataset for suite in study.suites for dataset in load_suite(suite))]))
        plan = cls(study, Path(name).stem, folder, cells, data, load_protocols(study.protocols))
        plan._check()
        return plan

    @property
    def starts(self) -> list[Start]:
        return list(dict.fromkeys(cell.start for cell in self.cells))

    @property
    def read_with(self) -> list[str]:
        """What controls are read with: `trained` is what the arms are trained with."""
        trained = list(dict.fromkeys(cell.readout for cell in self.cells))
        return list(dict.fromkeys(spec for text in self.study.read_with for spec in (trained if text == "trained" else [text])))

    def cell(self, name: str) -> Cell | None:
        """The cell of this name, None for the controls; UsageError if there is none."""
        cells = {cell.folder.name: cell for cell in self.cells}
        if name not in cells and name != CONTROL_CELL:
            raise UsageError(f"the study has no cell {name!r}; {one_of(name, [*cells, CONTROL_CELL])}")
        return cells.get(name)

    def controls(self, starts: Sequence[Start]) -> list[Source]:
        """Raw pixels at the size of each model, and the backbone of each start without training."""
        randoms = [start_source(start) for start in starts]
        return [*(open_source(f"pixels:{size}") for size in dict.fromkeys(source.image_size for source in randoms)), *randoms]

    def open(self) -> None:
        """Create the study's folder, or find the same study in it. UsageError for another study there, or something else."""
        plan, now = self.folder / "study.yaml", asdict(self.study)
        if plan.exists():
            before = asdict(checked(Study, read_yaml(plan), f"study {plan}"))
            if changed := [key for key, value in now.items() if value != before[key] and key != "slurm"]:
                raise UsageError(f"{self.folder} holds a study with other {', '.join(changed)}; name another folder with --out")
            return
        ours = (".study.yaml", "cells")  # what a kill, or a process beside this one, may have left before study.yaml was there
        if self.folder.exists() and (not self.folder.is_dir() or any(not entry.name.startswith(ours) for entry in self.folder.iterdir())):
            raise UsageError(f"{self.folder} already holds something else; name another folder with --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".study.yaml.{os.getpid()}"
        partial.write_text(yaml.safe_dump(now, sort_keys=False))
        os.replace(partial, plan)

    def _check(self) -> None:
        for dataset in self.data:
            dataset.check()
        check_controls(self.study.controls)
        where = f"study {self.name}: primary"
        if self.study.primary is None:
            return
        declared = Primary.read(self.study.primary, where)
        read = {str(ReadoutSpec.parse(spec)) for spec in self.read_with}
        known = {
            "recipe": ({declared.recipe}, {start.name for start in self.starts}),
            "data": ({declared.data}, {dataset.name or display_name(dataset.source) for dataset in self.data}),
            "protocol": ({declared.protocol}, {rule.name for rule in self.rules}),
            "compare": (set(declared.compare), read & {cell.readout for cell in self.cells}),
        }
        for key, (named, there) in known.items():
            if strange := sorted(named - there):
                raise UsageError(f"{where}.{key} {strange[0]!r} is not in the study; {one_of(strange[0], there)}")


def start_source(start: Start) -> Source:
    """The backbone that the arms of a start begin with, named as they are."""
    return replace(random_source(start.recipe, [*start.options, "--seed", str(start.seed)]), name=f"random:{start.name}")


def _beside(file: Path, recipe: str) -> str:
    return str(file.parent / recipe) if recipe.startswith(".") else str(local_path(recipe))


def _token_sets(recipe: str, sets: Sequence[Mapping[Any, int]]) -> list[tuple[str, tuple[str, ...]]]:
    """The recipe's name with each token set, `dino-r4`, and the options that make it; its own name where none is given."""
    named = []
    for tokens in sets or [{}]:
        suffix = "".join(f"-{TOKENS[key]}{tokens[key]}" for key in TOKENS if key in tokens)
        named.append((recipe + suffix, tuple(part for key in tokens for part in (f"--backbone.{key}", str(tokens[key])))))
    return named

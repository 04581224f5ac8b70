"""Run folders of `ssl-vit pretrain`, as a comparison shows them, and what the recipe of several runs is called."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ssl_vit.errors import Failure
from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.sources import family_of


@dataclass(frozen=True)
class Run:
    """One pretraining: its recipe, the logged steps, and the summary (steps, images, seconds, ...), None while it is unfinished.

    joined: what all runs of its recipe are called together."""

    folder: Path
    recipe: dict[str, Any]
    summary: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    joined: str | None = None

    @property
    def name(self) -> str:
        """What its runs with other readouts and seeds are called as well."""
        return self.joined or short_name(self.folder.name, self.recipe["readout"], self.recipe["seed"])

    @property
    def family(self) -> str:
        """Hash of the recipe without its readout and seed, as in the rows of its checkpoint."""
        return family_of(self.recipe)


def short_name(source: str, trained_with: str | None, seed: int | None) -> str:
    """A run's name without the readout and the seed that a study puts behind it: `dino_photos-cls-s0` is `dino_photos`."""
    if trained_with is None:
        return source
    name, colon, network = source.partition(":")  # a student's is followed by :student
    return name.removesuffix(f"-{ReadoutSpec.parse(trained_with).slug}-s{seed}") + colon + network


def find_runs(folders: Sequence[str | Path], names: Mapping[str, str]) -> list[Run]:
    """Every run in and below the folders, in the order of their names; Failure for a file of a run that cannot be read.

    names: of recipes, by family; runs of another one are called as the first of them."""
    found = {file.resolve(): file.parent for folder in folders for file in sorted(Path(folder).rglob("recipe.yaml"))}
    runs = [_read(folder) for folder in found.values()]
    names = {run.family: run.name for run in reversed(runs)} | dict(names)
    return [replace(run, joined=names[run.family]) for run in runs]


def _read(folder: Path) -> Run:
    metrics, summary = folder / "metrics.jsonl", folder / "run.json"
    file = folder / "recipe.yaml"
    try:
        recipe = _keys(yaml.safe_load(file.read_text(encoding="utf-8")))
        file = summary
        finished = _keys(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None
        file = metrics
        # a kill can cut the last line
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
        return Run(folder, recipe, finished, [_keys(json.loads(line)) for line in lines])
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Failure(f"cannot read {file}: {' '.join(str(error).split())}; remove the run folder or pretrain again") from error


def _keys(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"it holds {content!r}, not keys with values")
    return content

"""Run folders of `ssl-vit pretrain`, as a comparison shows them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ssl_vit.errors import Failure
from ssl_vit.model.readout import ReadoutSpec


@dataclass(frozen=True)
class Run:
    """One pretraining: its recipe, the logged steps, and the summary (steps, images, seconds, ...), None while it is unfinished."""

    folder: Path
    recipe: dict[str, Any]
    summary: dict[str, Any] | None
    metrics: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """What its runs with other readouts and seeds are called as well."""
        return recipe_name(self.folder.name, self.recipe["readout"], self.recipe["seed"])


def recipe_name(source: str, trained_with: str | None, seed: int | None) -> str:
    """A run's name without the readout and the seed that a study puts behind it: `dino_photos-cls-s0` is `dino_photos`."""
    if trained_with is None:
        return source
    name, colon, arm = source.partition(":")  # a student's is followed by :student
    return name.removesuffix(f"-{ReadoutSpec.parse(trained_with).slug}-s{seed}") + colon + arm


def find_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Every run in and below the folders, in the order of their names; Failure for a file of a run that cannot be read."""
    found = {file.resolve(): file.parent for folder in folders for file in sorted(Path(folder).rglob("recipe.yaml"))}
    return [_read(folder) for folder in found.values()]


def _read(folder: Path) -> Run:
    metrics, summary = folder / "metrics.jsonl", folder / "run.json"
    file = folder / "recipe.yaml"
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        file = summary
        finished = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        file = metrics
        # a kill can cut the last line
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
        return Run(folder, recipe, finished, [json.loads(line) for line in lines])
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Failure(f"cannot read {file}: {' '.join(str(error).split())}; remove the run folder or pretrain again") from error

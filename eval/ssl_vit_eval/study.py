"""`ssl-vit study`: a grid of recipes x trained-with x seeds is pretrained, evaluated and compared; what is finished is skipped."""

import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import yaml

from ssl_vit.assets import find_asset, read_yaml
from ssl_vit.errors import UsageError, one_of
from ssl_vit.pretrain import build_method, parse_recipe, pretrain, recipe_changes
from ssl_vit.readout import ReadoutSpec
from ssl_vit.sources import load_split
from ssl_vit_eval.compare import compare
from ssl_vit_eval.evaluate import evaluate, wanted_specs
from ssl_vit_eval.models import open_source, random_source
from ssl_vit_eval.pictures import save_reconstructions
from ssl_vit_eval.protocols import load_protocols
from ssl_vit_eval.suites import Dataset


@dataclass(frozen=True)
class Study:
    """A study file. Every arm is the recipe with one field changed, `readout`, and the seed.

    recipes: names or files; trained_with: readout specs; seeds; data, protocols, read_with: what every arm is evaluated on and how.
    """

    recipes: list[str]
    trained_with: list[str]
    seeds: list[int]
    data: list[str]
    protocols: list[str]
    read_with: list[str]

    @classmethod
    def load(cls, name: str) -> "Study":
        """UsageError for an unknown study, an unknown or missing key, and a value that is not a list of names (of numbers for seeds)."""
        content = read_yaml(find_asset("studies", name))
        keys = [field.name for field in fields(cls)]
        for key in content:
            if key not in keys:
                raise UsageError(f"study {name}: unknown key {key!r}; {one_of(str(key), keys)}")
        for key in keys:
            values, kind = content.get(key), int if key == "seeds" else str
            if not isinstance(values, list) or not values or not all(type(value) is kind for value in values):
                what = "whole numbers" if kind is int else "names"
                raise UsageError(f"study {name}: {key} is {values!r}; give a list of {what} in brackets")
        return cls(**content)


@dataclass(frozen=True)
class Cell:
    """One pretraining of a study."""

    recipe: str
    readout: str
    seed: int
    folder: Path

    @property
    def options(self) -> list[str]:
        # One device: a study is a loop over small runs; what is spread over several GPUs is pretrained by `ssl-vit pretrain`.
        return ["--readout", self.readout, "--seed", str(self.seed), "--trainer.devices", "1", "--out", str(self.folder)]

    @property
    def finished(self) -> bool:
        return (self.folder / "run.json").exists()


def run_study(name: str, out: str | None) -> Path:
    """Run what is missing of a study, and return the path of its report. Wrong names end it before anything trains."""
    start = time.monotonic()
    study = Study.load(name)
    folder = Path(out or Path("runs") / Path(name).stem)
    cells = [
        Cell(recipe, str(ReadoutSpec.parse(spec)), seed, folder / "cells" / f"{Path(recipe).stem}-{ReadoutSpec.parse(spec).slug}-s{seed}")
        for recipe in study.recipes
        for spec in study.trained_with
        for seed in study.seeds
    ]
    data = [Dataset(name) for name in study.data]
    for dataset in data:
        dataset.check()
    rules = load_protocols(study.protocols)
    randoms = [random_source(recipe, ["--seed", str(seed)]) for recipe in study.recipes for seed in study.seeds]
    for source in randoms:
        wanted_specs(source, rules, study.read_with, study.trained_with)
    for cell in cells:
        _check_cell(cell, cells)
    _open_folder(folder, study)

    for number, cell in enumerate(cells, 1):
        what = f"[{number}/{len(cells)}] {cell.recipe}, trained with {cell.readout}, seed {cell.seed}"
        print(f"{what}: done before" if cell.finished else what, flush=True)
        if not cell.finished:
            pretrain(cell.recipe, [*cell.options, "--resume"] if (cell.folder / "recipe.yaml").exists() else cell.options)
        _draw_reconstructions(cell)
    sizes = dict.fromkeys(source.image_size for source in randoms)
    controls = [*(open_source(f"pixels:{size}") for size in sizes), *randoms]
    trained = [open_source(str(cell.folder / "last.ckpt")) for cell in cells]
    print(f"evaluating {len(trained)} backbones and {len(controls)} controls on {', '.join(study.data)}", flush=True)
    evaluate([*controls, *trained], data, study.protocols, study.read_with, folder / "eval", say=lambda line: None)
    report = compare([folder], folder)
    print(f"{time.monotonic() - start:.0f} s in all; a second run skips what is done")
    return report


def _open_folder(folder: Path, study: Study) -> None:
    """Create the study's folder, or find the same study in it."""
    plan = folder / "study.yaml"
    if plan.exists():
        before = read_yaml(plan)
        changed = [key for key, value in asdict(study).items() if value != before.get(key)]
        if changed:
            raise UsageError(f"{folder} holds a study with other {', '.join(changed)}; name another folder with --out")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} already holds something else; name another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    plan.write_text(yaml.safe_dump(asdict(study), sort_keys=False))


def _check_cell(cell: Cell, cells: list[Cell]) -> None:
    """UsageError for a cell that cannot be trained as its recipe says, or whose folder belongs to another recipe."""
    if any(other.folder == cell.folder and other != cell for other in cells):
        raise UsageError(f"two recipes of the study are called {cell.folder.name!r}; rename one of the files")
    parser, config = parse_recipe(cell.recipe, cell.options)
    recipe = build_method(config, parser.instantiate(config)).recipe
    before = cell.folder / "recipe.yaml"
    if before.exists() and (changed := recipe_changes(read_yaml(before), recipe)):
        raise UsageError(f"{cell.folder} was trained with another recipe ({changed}); use the same one, or another --out")


def _draw_reconstructions(cell: Cell) -> None:
    """What a masked autoencoder fills in, on the first pictures of its own training set, for the report."""
    picture = cell.folder / "reconstructions.png"
    recipe = read_yaml(cell.folder / "recipe.yaml")
    if recipe["method"] != "mae" or picture.exists():
        return
    data = recipe["data"]
    split = load_split(
        data["source"], data["split"], image_column=data["image_column"], size=recipe["backbone"]["image_size"], progress=False
    )
    images, _ = split.images.batch(torch.linspace(0, len(split.images) - 1, 8).long())
    save_reconstructions(cell.folder / "last.ckpt", images, picture)

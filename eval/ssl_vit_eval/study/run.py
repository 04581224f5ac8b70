"""`ssl-vit study`: the cells of a plan are pretrained, evaluated and compared; what is finished is skipped.

The folder is the whole state. Any number of processes, on machines that share it, may work on one study at once: a cell belongs to
whoever holds its lock, and a lock ends with its process.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ssl_vit.assets import find_asset, read_yaml
from ssl_vit.errors import Failure
from ssl_vit.files import locked
from ssl_vit.train.pretrain import pretrain
from ssl_vit.train.reconstructions import save_reconstructions
from ssl_vit.train.tracking import Tracking
from ssl_vit_eval.evaluate import evaluate, wanted_specs
from ssl_vit_eval.report.terminal import compare
from ssl_vit_eval.sources import Source, open_source
from ssl_vit_eval.splits import load_images
from ssl_vit_eval.study.fairness import check_fair
from ssl_vit_eval.study.plan import CONTROL_CELL, Cell, Plan, start_source


def run_study(name: str, out: str | None, tracking: Tracking | None = None, verbose: bool = False) -> Path:
    """Run what is missing of a study, and return the path of its report. Wrong names and unfair arms end it before anything trains.

    Cells that another process works on are left to it; then it is waited for, and what it left undone is done here.
    """
    begun = time.monotonic()
    plan = open_plan(name, out)
    rows = plan.folder / "eval" / "rows.jsonl"
    finished = rows.stat().st_size if rows.exists() and all(cell.summary for cell in plan.cells) else None
    taken = []
    for number, cell in enumerate(plan.cells, 1):
        with locked(cell.lock, wait=False) as mine:
            if mine:
                _train(plan, cell, f"[{number}/{len(plan.cells)}]", tracking)
            else:
                taken.append((number, cell))
                print(f"[{number}/{len(plan.cells)}] {cell.folder.name}: another process works on it", flush=True)
    for number, cell in taken:
        with locked(cell.lock):
            _train(plan, cell, f"[{number}/{len(plan.cells)}]", tracking)
    with locked(_controls_lock(plan)):
        controls, trained = plan.controls(plan.starts), [_trained(cell) for cell in plan.cells]
        _check_starts(plan, controls, trained)
        print(f"evaluating {len(trained)} backbones and {len(controls)} controls", flush=True)
        failed = None
        try:
            _evaluate(plan, [*controls, *trained], tracking, ())
        except Failure as error:  # some of it: what there is can be compared
            if not rows.exists():
                raise
            failed = error
        report = compare([plan.folder], plan.folder, verbose=verbose)
    before = f"{plan.folder} was finished before: nothing was trained or evaluated again; its report is {report}"
    print(before if finished == rows.stat().st_size else f"{time.monotonic() - begun:.0f} s in all; a second run skips what is done")
    if failed:
        raise failed
    return report


def run_cell(name: str, out: str | None, cell_name: str, tracking: Tracking | None = None) -> None:
    """Pretrain and evaluate this cell alone, or evaluate the controls; what is done is skipped, what another process does left to it."""
    # an agent of W&B names its own run here, which every `wandb.init` below would take for its own
    for variable in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_SERVICE"):
        os.environ.pop(variable, None)
    plan = open_plan(name, out, cell_name)
    cell = plan.cell(cell_name)
    with locked(cell.lock if cell else _controls_lock(plan), wait=False) as mine:
        if not mine:
            print(f"{cell_name}: another process works on it, so it is left to that one")
        elif cell is None:
            _evaluate(plan, plan.controls(plan.starts), tracking, (CONTROL_CELL,))
        else:
            _train(plan, cell, "", tracking)
            _evaluate(plan, [_trained(cell)], tracking, _tags(cell))
    print(f"when all cells are done: ssl-vit study {name} --out {plan.folder}")


def open_plan(name: str, out: str | None, cell_name: str | None = None) -> Plan:
    """The plan, found sound and its arms fair, in its folder; of one cell, its own start alone is looked at."""
    plan = Plan.load(name, out)
    cell = plan.cell(cell_name) if cell_name else None
    check(plan, [other for other in plan.cells if cell is None or other.start == cell.start])
    plan.open()
    return plan


def check(plan: Plan, cells: Sequence[Cell]) -> None:
    """UsageError for a readout that a model cannot be read with, and for arms that are not fair."""
    for start in {cell.start.name: cell.start for cell in cells}.values():
        wanted_specs(start_source(start), plan.rules, plan.study.read_with, [cell.readout for cell in cells])
    print(check_fair(cells), flush=True)


def _train(plan: Plan, cell: Cell, number: str, tracking: Tracking | None) -> None:
    what = f"{number} {cell.start.name}, trained with {cell.readout}, seed {cell.start.seed}".strip()
    done = cell.summary is not None
    print(f"{what}: done before" if done else what, flush=True)
    own = tracking and replace(tracking, group=plan.name, tags=_tags(cell))
    if not done or own:  # a finished run may not have been logged
        begun = (cell.folder / "recipe.yaml").exists()
        pretrain(cell.start.recipe, [*cell.options, "--resume"] if begun else cell.options, tracking=own)
    _draw_reconstructions(cell)


def _evaluate(plan: Plan, sources: Sequence[Source], tracking: Tracking | None, tags: tuple[str, ...]) -> None:
    """Rows of what the store lacks; of all that is said, only what was left out and why. Failure at the end, if anything was.

    Diagnostics, which describe one network and read it at every block, are for the first seed of every arm."""
    study, failed = plan.study, None
    first = [source for source in sources if study.diagnostics and source.seed == study.seeds[0]]
    for chosen in filter(None, (first, [source for source in sources if source not in first])):
        try:
            evaluate(
                chosen,
                plan.data,
                study.protocols,
                study.read_with if any(source.trained_with for source in chosen) else plan.read_with,
                plan.folder / "eval",
                controls=study.controls,
                diagnostics=chosen is first,
                say=lambda line: print(line) if " left out: " in line else None,
                tracking=tracking and replace(tracking, group=plan.name, tags=tags),
            )
        except Failure as error:
            failed = error
    if failed:
        raise failed


def _check_starts(plan: Plan, controls: Sequence[Source], trained: Sequence[Source]) -> None:
    """Failure for a cell that did not begin with its start's weights, as on a machine whose libraries draw other numbers."""
    weights = {start: source.weights for start, source in zip(plan.starts, controls[-len(plan.starts) :], strict=True)}
    for cell, source in zip(plan.cells, trained, strict=True):
        if source.init != weights[cell.start]:
            raise Failure(
                f"{cell.folder} was trained from other initial weights ({source.init}) than its study has here ({weights[cell.start]}); "
                "train all cells with one version of the libraries: remove this folder"
            )


def _trained(cell: Cell) -> Source:
    return open_source(str(cell.folder / "last.ckpt"))


def _controls_lock(plan: Plan) -> Path:
    return plan.folder / "cells" / f"{CONTROL_CELL}.lock"


def _tags(cell: Cell) -> tuple[str, ...]:
    method = str(read_yaml(find_asset("recipes", cell.start.recipe))["method"])
    return (method, cell.readout, *filter(None, [cell.start.token_set]))


def _draw_reconstructions(cell: Cell) -> None:
    """What a masked autoencoder fills in, on the first images of its own training set, for the report."""
    picture = cell.folder / "reconstructions.png"
    recipe = read_yaml(cell.folder / "recipe.yaml")
    if recipe["method"] != "mae" or picture.exists():
        return
    data = recipe["data"]
    images = load_images(data["source"], data["split"], recipe["backbone"]["image_size"], data["image_column"])
    save_reconstructions(cell.folder / "last.ckpt", images.batch(torch.linspace(0, len(images) - 1, 8).long())[0], picture)

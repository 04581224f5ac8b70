"""`ssl-vit study --dry-run`: what a study will cost. Trains nothing that is kept, and writes nothing."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import pandas as pd
import torch

from ssl_vit.data.folders import local_path
from ssl_vit.train.cost import training_flops
from ssl_vit.train.dry_run import STEPS, step_seconds, total_steps
from ssl_vit.train.pretrain import build_method, parse_recipe
from ssl_vit_eval.controls import controls_of
from ssl_vit_eval.diagnostics.run import with_blocks
from ssl_vit_eval.evaluate import wanted_specs
from ssl_vit_eval.rows import RowStore
from ssl_vit_eval.sources import Source
from ssl_vit_eval.study.plan import Cell, Plan
from ssl_vit_eval.study.run import check

NUMBERS = ["steps", "images", "FLOPs", "time"]


def dry_run(study: str, out: str | None) -> None:
    """Print the cells of a study with steps, images, operations and time, the number of evaluations, the sums, and what is done."""
    plan = Plan.load(study, out)
    check(plan, plan.cells)
    costs = cell_costs(plan.cells)
    for title, of in (("all", costs), ("still to do", costs[costs["from"] != "done"])):
        of = of[of["from"] != ""]
        costs.loc[f"{title}: {len(of)} cells"] = [*of[NUMBERS].sum(), ""]
    formats = dict(zip(NUMBERS, ("{:,.0f}".format, "{:,.0f}".format, "{:.2g}".format, clock), strict=True))
    print(costs.to_string(formatters={name: lambda value, shown=shown: f" {shown(value)}" for name, shown in formats.items()}))
    print("FLOPs: products of forward and backward passes, 2 a multiply-add; time: of one cell on one device")
    print(evaluations(plan))
    if hub := [of.source for of in plan.data if not (of.source.startswith("builtin:") or local_path(of.source).exists())]:
        print(f"data: {', '.join(hub)}: no folder here, so taken for Hugging Face ids, and asked for when the cells are trained")


def cell_costs(cells: Sequence[Cell]) -> pd.DataFrame:
    """`NUMBERS` of each cell, and where its time is `from`: what was measured of finished cells; of the others the mean of finished cells
    of their recipe, else a few steps, timed here."""
    known: dict[str, list[float]] = defaultdict(list)
    for cell in cells:
        if cell.summary:
            known[cell.start.name].append(cell.summary["seconds"])
    costs: dict[str, list[Any]] = {}
    of_start: dict[str, tuple[int, int, float]] = {}  # steps, images, and seconds of a step
    for cell in cells:
        name, done = cell.start.name, cell.summary
        if done:
            costs[cell.folder.name] = [done["steps"], done["images"], done["flops"], done["seconds"], "done"]
            continue
        parser, config = parse_recipe(cell.start.recipe, cell.options)
        values = parser.instantiate(config)
        if name not in of_start:
            steps = total_steps(config) or 0  # never None where sources are opened
            of_start[name] = (steps, steps * config.data.batch_size, 0.0 if known[name] else step_seconds(config, values))
        steps, images, seconds = of_start[name]
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "this CPU"
        source = f"as {len(known[name])} done" if known[name] else f"{STEPS - 1} steps timed on {device}"
        time = fmean(known[name]) if known[name] else steps * seconds
        costs[cell.folder.name] = [steps, images, images * training_flops(build_method(config, values)), time, source]
    return pd.DataFrame.from_dict(costs, orient="index", columns=[*NUMBERS, "from"])


def evaluations(plan: Plan) -> str:
    """How many evaluations the study holds, how many are there, and what the rest takes by the rows that there are."""
    wanted = Counter[str]()
    sources = plan.controls(plan.starts)
    for start, random in zip(plan.starts, sources[-len(plan.starts) :], strict=True):
        sources += [replace(random, method="trained", trained_with=cell.readout) for cell in plan.cells if cell.start == start]
    for source in sources:
        wanted.update(_evaluations(plan, source))
    rows = [row for row in RowStore(plan.folder / "eval").rows() if row.metric == "top1"]
    parts, seconds, unknown = [], 0.0, False
    for rule, count in wanted.items():
        took = [row.seconds for row in rows if row.protocol == rule]
        parts.append(f"{rule} {count:,} ({len(took):,} done)")
        seconds += max(0, count - len(took)) * (fmean(took) if took else 0.0)
        unknown |= count > 0 and not took
    time = f"; the rest takes {clock(seconds)} and the extraction of features, by the rows that are there"
    return f"evaluations: {', '.join(parts)}" + ("; their time is not estimated, since no row tells it yet" if unknown else time)


def _evaluations(plan: Plan, source: Source) -> dict[str, int]:
    """Of one source, by protocol."""
    specs = wanted_specs(source, plan.rules, plan.study.read_with, [cell.readout for cell in plan.cells])
    counts = {}
    for rule in plan.rules:
        diagnosed = plan.study.diagnostics and source.seed == plan.study.seeds[0] and rule.kind == "knn"
        of = with_blocks(specs[rule.name], source.backbone.depth) if diagnosed and source.backbone else specs[rule.name]
        controls = plan.study.controls if rule.reads == "features" else []
        counts[rule.name] = sum(len(controls_of(controls, spec, rule.kind != "knn")) for spec in of) * len(plan.data)
    return counts


def clock(seconds: float) -> str:
    """`48 s`, `12 min`, `3.4 h`, `2.1 days`."""
    for unit, size, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"

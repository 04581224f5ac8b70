"""`ssl-vit compare --wandb`: the verdict as a W&B Report, beside panels of the runs that pretrain, eval and study logged.

Its figures, of the findings and of what MAE fills in, are logged as a run of their own, of job_type `report`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from PIL import Image

from ssl_vit.errors import Failure, UsageError
from ssl_vit.train.tracking import TrackedRun, Tracking
from ssl_vit_eval.compare.comparison import Comparison
from ssl_vit_eval.report import first_page
from ssl_vit_eval.report.page import Block, Bullets, Figures, Heading, Listing, Text
from ssl_vit_eval.report.plotting import Plot
from ssl_vit_eval.report.table import Sheet, markdown
from ssl_vit_eval.report.text import QUESTIONS
from ssl_vit_eval.report.wandb_panels import Panels
from ssl_vit_eval.report.write import difference_blocks, reconstructions


def write_wandb_report(comparison: Comparison, target: str, group: str | None, tables: Sequence[Sheet] = ()) -> str:
    """Save a new W&B Report and return its address.

    target: `ENTITY/PROJECT` that the runs were logged to, or `PROJECT` of the user's own entity. group: of the runs, the study's
    name; None for any. tables: shown as text behind the panels.

    UsageError where wandb-workspaces, a W&B account or the project is missing, or W&B is offline by its settings; Failure where the
    server cannot be reached or refuses the report.
    """
    tracking = Tracking.parse(target)
    try:
        import wandb

        wr = import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise UsageError('--wandb writes a report with wandb-workspaces, which is missing: pip install "ssl-vit[report]"') from error
    # silent: what is to be said we say, and above all nobody is asked for a key
    mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
    if mode != "online":
        raise UsageError(f"a W&B Report lies on the server, but WANDB_MODE is {mode}; unset it, or leave --wandb out")
    try:
        api = wandb.Api()
        tracking = replace(tracking, entity=tracking.entity or api.default_entity, group=group)
        if all(project.name != tracking.project for project in api.projects(tracking.entity)):
            raise UsageError(
                f"W&B has no project {tracking.path} that is yours: log the runs to it first, with --wandb of study, pretrain and eval"
            )
        filled, listings = reconstructions(comparison.runs), [Listing(sheet) for sheet in tables]
        first: list[Block] = [*first_page.lead(comparison), *first_page.blocks(comparison)]
        for question, (heading, _) in QUESTIONS.items():
            of = difference_blocks(comparison, question)
            first += [Heading(heading), *of] if of else []
        last: list[Block] = [Heading("What MAE fills in"), Figures(filled)] if filled else []
        last += [Heading("Tables"), *listings] if listings else []
        title = "Readouts compared " + re.sub(r"[^\w.-]+", "-", group or tracking.project)[:80]  # it becomes a part of the address
        plots = {_key(plot): plot for block in [*first, *last] if isinstance(block, Figures) for plot in block.plots}
        panels = Panels(wr, comparison, tracking, _logged(tracking, title, plots) if plots else None)
        report = wr.Report(
            entity=tracking.entity,
            project=tracking.project,
            title=title,
            description=" ".join(text.text for text in first_page.lead(comparison)),
            blocks=[
                wr.TableOfContents(),
                wr.H1("What this study says"),
                *(shown for block in first for shown in _shown(panels, block)),
                *panels.blocks(),
                *(shown for block in last for shown in _shown(panels, block)),
            ],
            width="fluid",
        )
        report.save()
    except (UsageError, Failure):
        raise
    except Exception as error:  # the two packages raise what they please
        text = " ".join(str(error).split())
        if re.search("not logged in|No API key|No authentication", text):
            raise UsageError("--wandb needs a W&B account: run `wandb login`, or set WANDB_API_KEY") from error
        raise Failure(f"the W&B Report could not be written: {text}; all else is complete, the same command tries again") from error
    return quote(report.url, safe=":/")


def _shown(panels: Panels, block: Block) -> list[Any]:
    """A block of the other reports as W&B's."""
    wr = panels.wr
    match block:
        case Text(text, style, lead):
            words = f"{lead} {text}".strip()
            return [wr.CalloutBlock(f"{style.upper()}. {words}") if block.is_verdict else wr.P(words)]
        case Bullets(items, _, title):
            return [*([wr.H3(title)] if title else []), wr.UnorderedList(items)]
        case Heading(text):
            return [wr.H2(text)]
        case Listing(sheet):
            return [wr.MarkdownBlock(markdown(sheet))]
        case Figures(plots):
            return [panels.media(_key(plot)) for plot in plots]


def _key(plot: Plot) -> str:
    return f"figures/{re.sub(r'[^a-zA-Z0-9_-]+', '_', plot.name)}"  # a dot would begin another level


def _logged(tracking: Tracking, name: str, plots: Mapping[str, Plot]) -> str:
    """The id of a new run that holds the figures."""
    import wandb

    with TemporaryDirectory() as folder:
        run = TrackedRun(tracking, Path(folder), "report")
        run.start(name, {})
        run.log({key: [wandb.Image(Image.open(BytesIO(plot.png)), caption=plot.note or plot.title)] for key, plot in plots.items()})
        run.finish()
        return str(run.state["id"])

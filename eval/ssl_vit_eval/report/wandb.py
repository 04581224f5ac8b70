"""`ssl-vit compare --wandb`: the verdict as a W&B Report, beside panels of the runs that pretrain, eval and study logged.

Its pictures, of the findings and of what MAE fills in, are logged as a run of their own, of job_type `report`.
"""

import re
from collections.abc import Iterable, Sequence
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
from ssl_vit_eval.compare.verdict import Family
from ssl_vit_eval.report import first_page
from ssl_vit_eval.report.first_page import QUESTIONS, families_of
from ssl_vit_eval.report.page import Block, Bullets, Drawings, Grid, Heading, Listing, Picture, Text
from ssl_vit_eval.report.table import Sheet, markdown
from ssl_vit_eval.report.text import line, words_of
from ssl_vit_eval.report.wandb_panels import Panels

PLAIN = ("plain", "soft", "note")  # styles of a text that is no verdict
FIGURES, FILLED = "figures", "reconstructions"
Media = dict[str, list[tuple[str, bytes]]]  # captions and PNG files, by the key that they are logged under


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
        shown = first_page.blocks(comparison)
        title = "Readouts compared " + re.sub(r"[^\w.-]+", "-", group or tracking.project)[:80]  # it becomes a part of the address
        media = _media(comparison, shown)
        filled = [key for key in media if key.startswith(FILLED)]
        panels = Panels(wr, comparison, tracking, _logged(tracking, title, media) if media else None)
        report = wr.Report(
            entity=tracking.entity,
            project=tracking.project,
            title=title,
            description=" ".join(text.text for text in first_page.lead(comparison)),
            blocks=[
                wr.TableOfContents(),
                wr.H1("What this study says"),
                *(wr.P(text.text) for text in first_page.lead(comparison)),
                *(shown_here for block in shown for shown_here in _blocks(panels, block)),
                *_verdicts(wr, comparison),
                *panels.blocks(),
                *([wr.H1("What MAE fills in")] if filled else []),
                *map(panels.media, filled),
                *([wr.H1("Tables")] if tables else []),
                *(wr.MarkdownBlock(markdown(sheet)) for sheet in tables),
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


def _verdicts(wr: Any, comparison: Comparison) -> list[Any]:
    """Every difference, question by question."""
    blocks = []
    for question, words in QUESTIONS.items():
        if families := families_of(comparison, question):
            blocks += [wr.H2(words), *_differences(wr, comparison, families)]
    return blocks


def _differences(wr: Any, comparison: Comparison, families: Iterable[Family]) -> list[Any]:
    blocks = []
    for family in families:
        setting = family.setting
        declared = ", declared before training" if family.primary else ""
        blocks.append(wr.H3(f"{family.scope}: {setting.dataset}, {setting.rule} v{setting.version}{declared}"))
        items = [f"{line(family, of, comparison.rule)}. In words: {words_of(family, of, comparison.rule)}." for of in family.differences]
        blocks.append(wr.UnorderedList(items))
    return blocks


def _blocks(panels: Panels, block: Block) -> list[Any]:
    """A block of the other reports as W&B's."""
    wr = panels.wr
    match block:
        case Text(text, style, lead):
            words = f"{lead} {text}".strip()
            return [wr.P(words) if style in PLAIN else wr.CalloutBlock(f"{style.upper()}. {words}")]
        case Bullets(items):
            return [wr.UnorderedList(items)]
        case Heading(text):
            return [wr.H2(text)]
        case Listing(sheet) | Grid(_, sheet):
            return [wr.MarkdownBlock(markdown(sheet))]
        case Drawings(plots):
            return [panels.media(_key(FIGURES, plot.name)) for plot in plots]
        case Picture(name):
            return [panels.media(_key(FIGURES, name))]


def _media(comparison: Comparison, shown: Sequence[Block]) -> Media:
    """The pictures of the findings, and what MAE fills in, of the first seed of every arm."""
    media: Media = {}
    for block in shown:
        if isinstance(block, Drawings):
            media |= {_key(FIGURES, plot.name): [(plot.note or plot.title, plot.png)] for plot in block.plots}
        elif isinstance(block, Picture):
            media[_key(FIGURES, block.name)] = [(block.caption, block.png)]
    seen = set()
    for run in comparison.runs:
        file, arm = run.folder / "reconstructions.png", (run.name, run.recipe["readout"])
        if arm not in seen and file.is_file():
            seen.add(arm)
            caption = f"trained with {arm[1]}, seed {run.recipe['seed']}"
            media.setdefault(_key(FILLED, run.name), []).append((caption, file.read_bytes()))
    return media


def _key(kind: str, name: str) -> str:
    return f"{kind}/{re.sub(r'[^a-zA-Z0-9_-]+', '_', name)}"  # a dot would begin another level


def _logged(tracking: Tracking, name: str, media: Media) -> str:
    """The id of a new run that holds the pictures."""
    import wandb

    with TemporaryDirectory() as folder:
        run = TrackedRun(tracking, Path(folder), "report")
        run.start(name, {})
        run.log({key: [wandb.Image(Image.open(BytesIO(png)), caption=text) for text, png in of] for key, of in media.items()})
        run.finish()
        return str(run.state["id"])

"""The comparison as a report: one HTML file that needs nothing beside it, the same as Markdown, and every table and plot as files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssl_vit_eval.compare.across_datasets import rankings
from ssl_vit_eval.compare.comparison import Comparison
from ssl_vit_eval.compare.diagnostic_files import find_diagnoses, maps
from ssl_vit_eval.compare.runs import Run
from ssl_vit_eval.compare.verdict import Question
from ssl_vit_eval.report import diagnostic_tables, first_page, page, plot_blocks, plot_datasets
from ssl_vit_eval.report.first_page import about, families_of
from ssl_vit_eval.report.page import PICTURE_BYTES, Block, Bullets, Drawings, Grid, Heading, Listing, Picture, Section, Text
from ssl_vit_eval.report.plot_differences import forest
from ssl_vit_eval.report.plot_training import training_curves
from ssl_vit_eval.report.report_files import replace_files
from ssl_vit_eval.report.run_tables import costs, datasets, evaluations, pretrainings, selection_warnings, selections
from ssl_vit_eval.report.score_grids import full_colour, other_grids, trained_grids
from ssl_vit_eval.report.score_tables import ZERO, differences, norms, ranking_sheets, scores
from ssl_vit_eval.report.table import MISSING, slug, table_files
from ssl_vit_eval.report.text import TITLES, words_of

TITLE = "Which token should carry the image?"
READING = f"""Large: top-1 accuracy on the test images, in %. Small: the gain in points over the same backbone at its random
initialisation, read the same way and paired image by image, with its 95 % bootstrap interval over test images. With several seeds: mean
± standard deviation and n, and the mean gain with the smallest and the largest of the seeds in round brackets. {ZERO} marks a gain whose
interval (or range) includes zero: these images did not show that pretraining helped. {MISSING} is a number that was not measured. Control
rows without colour show the accuracy and its 95 % Wilson interval."""
INTERVALS = """Intervals within a cell are over the test images of that data set only. One pretraining seed says nothing about how much a
method varies from seed to seed."""
PHOTOS = """builtin:photos and builtin:photos-new are patches of a few photographs, the class being the photograph: their intervals hold
within these photographs."""
REGISTER = """register is the mean of all r register tokens: with r = 4, of four class-like tokens. With r = 1 and no position of its own
it is the class token by symmetry, so that its difference from cls is a null control and shows the noise."""
MAE = "MAE's decoder sees the visible patches beside the readout, so expect its trained-with to matter little."
STORY = """The textbook has CLS look broadly in early blocks, selectively in the middle and at little in the end. What the entropy of its
attention over the patches says, 1 for all alike and 0 for a single one:"""
DRAWN: tuple[Question, ...] = ("trained with", "null control")
FEW, MANY = 4, 40  # more plots, or more lines of a table, are folded
MAPS = """First seed of each arm: CLS's attention to the patches, mean over heads, by block; and how much of each readout's input gradient
falls on a patch. Every map runs from 0 to its own maximum: it shows where, not how much."""
CURVES = """Losses are not comparable between methods."""
FILLED = """One fixed mask for all models, first seed only. Where the recipe normalises its target by patch (norm_pixels), the prediction is
shown with each patch's own true mean and deviation: brightness and contrast of a patch are given, its structure is predicted."""


def write_report(comparison: Comparison, folders: Sequence[str | Path], out: Path) -> Path:
    """Write `report.html`, `report.md`, `tables/` and `plots/` into `out`; the path of the first. folders: what was compared.

    What an earlier report left there is replaced, or removed if this one has no such part. Failure and UsageError as `find_diagnoses`
    and `replace_files`.
    """
    sections = [
        Section("findings", "Findings", "What this study says", first_page.blocks(comparison)),
        Section("trained", "Trained × read", "B. Trained with × read with", _trained(comparison)),
        Section("post-hoc", "Post hoc", "A. One frozen backbone, read in every way", _post_hoc(comparison)),
        Section("data-sets", "Data sets", "Across data sets and protocols", _across(comparison)),
        Section("inside", "Inside", "Inside the backbones", _inside(comparison, folders)),
        Section("pretraining", "Pretraining", "What each pretraining did", _pretraining(comparison.runs)),
        Section("costs", "Costs", "What it cost", [Listing(costs(comparison))]),
        Section("selection", "Selection", "What was selected, and what selection on test would have added", _selection(comparison)),
        Section("provenance", "Provenance", "What was run", _provenance(comparison)),
    ]
    sections = [section for section in sections if section.blocks]
    lead = first_page.lead(comparison)
    tables = [block.sheet for section in sections for block in section.blocks if isinstance(block, Listing | Grid)]
    contents: dict[str, bytes] = {
        "report.html": page.page(TITLE, lead, sections).encode(),
        "report.md": page.markdown(TITLE, lead, sections).encode(),
        **{name: text.encode() for name, text in table_files([*tables, scores(comparison)]).items()},
        **page.picture_files(sections),
    }
    replace_files(out, contents)
    return out / "report.html"


def _trained(comparison: Comparison) -> list[Block]:
    scale = full_colour(comparison)
    grids = trained_grids(comparison, scale)
    if not grids:
        return []
    cautions = {
        INTERVALS: True,
        PHOTOS: any(table.setting.dataset.startswith("builtin:photos") for table in comparison.tables),
        REGISTER: any("register" in spec for spec in comparison.read_with),
        MAE: any(method == "mae" for method, _ in comparison.sections),
    }
    what = (
        "Each backbone was pretrained without labels, its loss attached to one readout (trained with), then frozen and judged through "
        "every readout (read with). The outlined diagonal is what is usually published; the rest of a row shows where else the same "
        "backbone carries the image."
    )
    blocks: list[Block] = [
        Text(_line(what)),
        Text(_line(READING), lead="How to read a cell."),
        Bullets([_line(text) for text, needed in cautions.items() if needed], "soft"),
        *grids,
    ]
    blocks += _differences(comparison, "trained with")
    blocks += _differences(comparison, "null control")
    text = (
        "The diagonal against the best other readout of the same backbone, which is picked on the train slice. Worse: the readout that the "
        "loss was attached to is not the one that carries the image best."
    )
    return [*blocks, *_differences(comparison, "self-consistency", text)]


def _post_hoc(comparison: Comparison) -> list[Block]:
    blocks = other_grids(comparison, full_colour(comparison))
    blocks += _differences(comparison, "read with")
    placed = norms(comparison)
    places: list[Block] = [Listing(placed)] if placed.lines else []
    return [*blocks, *places, *_differences(comparison, "norm")]


def _differences(comparison: Comparison, question: Question, text: str = "") -> list[Block]:
    families = families_of(comparison, question)
    if not families:
        return []
    sheet = differences(f"differences-{slug(question)}", TITLES[question], families, comparison.rule)
    words = [f"{about(family)}: {words_of(family, of, comparison.rule)}." for family in families for of in family.differences]
    forests = [forest(family, comparison.rule) for family in families] if question in DRAWN else []
    drawn = [Drawings(forests, f"Drawn ({len(forests)})" if len(forests) > FEW else "")] if forests else []
    return [
        Listing(replace(sheet, note=f"{text} {sheet.note}".strip()), len(sheet.lines) > MANY),
        Bullets(words, title=f"In words ({len(words)})"),
        *drawn,
    ]


def _across(comparison: Comparison) -> list[Block]:
    found = rankings(comparison)
    blocks: list[Block] = [Drawings(plot_datasets.ranking_plots(found)), *map(Listing, ranking_sheets(found))] if found else []
    scatter = plot_datasets.agreement_plots(comparison)
    return [*blocks, Heading("Do k-NN and linear probes agree?"), Drawings(scatter)] if scatter else blocks


def _inside(comparison: Comparison, folders: Sequence[str | Path]) -> list[Block]:
    """Of what was evaluated with --diagnostics."""
    found = find_diagnoses(folders, comparison.rows)
    if not found:
        return []
    blocks: list[Block] = [Text(_line(STORY)), Bullets([f"{text}." for text in diagnostic_tables.sentences(found)])]
    blocks += [Drawings(plot_blocks.plots(found, comparison.rows)), *map(Listing, diagnostic_tables.sheets(found))]
    blocks += [Heading("Where it looks"), Text(_line(MAPS), "soft")]
    for place, (caption, png) in enumerate(maps(found, PICTURE_BYTES // 2)):
        blocks.append(Picture(f"maps-{place}-{slug(caption)}", caption, png) if png else Text(f"{caption}.", "soft"))
    return blocks


def _pretraining(runs: Sequence[Run]) -> list[Block]:
    curves = training_curves(runs)
    blocks: list[Block] = [Text(CURVES, "soft"), Drawings(curves)] if curves else []
    if not curves:
        blocks.append(Text("The compared folders hold no run folders with logged steps, so there are no training curves.", "soft"))
    pictures = _reconstructions(runs)
    return [*blocks, Heading("What MAE fills in"), Text(_line(FILLED), "soft"), *pictures] if pictures else blocks


def _reconstructions(runs: Sequence[Run]) -> list[Picture]:
    """The pictures of the first seed of every arm."""
    found: dict[tuple[str, str], Picture] = {}
    for run in runs:
        file = run.folder / "reconstructions.png"
        arm = (run.name, run.recipe["readout"])
        if arm not in found and file.is_file():
            caption = f"{run.name}, trained with {arm[1]}, seed {run.recipe['seed']}"
            found[arm] = Picture(f"reconstructions-{len(found)}-{slug(*arm)}", caption, file.read_bytes())
    return list(found.values())


def _selection(comparison: Comparison) -> list[Block]:
    warnings = selection_warnings(comparison.rows)
    return [*([Bullets(warnings, "note")] if warnings else []), Listing(selections(comparison.rows))]


def _provenance(comparison: Comparison) -> list[Block]:
    runs: list[Block] = [Listing(pretrainings(comparison))] if comparison.runs else []
    return [*runs, Listing(datasets(comparison.rows)), Listing(evaluations(comparison.rows), folded=True)]


def _line(text: str) -> str:
    return " ".join(text.split())

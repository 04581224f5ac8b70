"""The comparison as a report: one HTML file that needs nothing beside it, the same as Markdown, and every table and plot as files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssl_vit_eval.compare.across_datasets import rankings
from ssl_vit_eval.compare.comparison import Comparison
from ssl_vit_eval.compare.diagnostic_files import Diagnosis, by_arm, find_diagnoses, label
from ssl_vit_eval.compare.runs import Run
from ssl_vit_eval.compare.verdict import Question
from ssl_vit_eval.report import diagnostic_tables, first_page, page, plot_blocks, plot_datasets
from ssl_vit_eval.report.first_page import about, families_of
from ssl_vit_eval.report.page import STORED_BYTES, Block, Bullets, Chapter, Figures, Heading, Listing, Text
from ssl_vit_eval.report.plot_differences import forest
from ssl_vit_eval.report.plot_training import training_curves
from ssl_vit_eval.report.plotting import Plot
from ssl_vit_eval.report.run_tables import costs, datasets, evaluations, frame_of_rows, pretrainings, selection_warnings, selections
from ssl_vit_eval.report.score_tables import differences, norms, ranking_sheets, scores, tables
from ssl_vit_eval.report.table import slug, table_files
from ssl_vit_eval.report.text import QUESTIONS, WORDS, words_of

FEW, MANY = 4, 40  # more plots, or more lines of a table, are folded


def chapters_of(comparison: Comparison, folders: Sequence[str | Path]) -> list[Chapter]:
    """The whole report but its first page. Failure as `find_diagnoses`."""
    rows = frame_of_rows(comparison.rows)
    warnings = selection_warnings(rows)
    contents: dict[str, list[Block]] = {
        "findings": first_page.blocks(comparison),
        "trained": _trained(comparison),
        "post-hoc": _post_hoc(comparison),
        "datasets": _across(comparison),
        "inside": _inside(comparison, folders),
        "pretraining": _pretraining(comparison.runs),
        "costs": [Listing(costs(comparison))],
        "selection": [*([Bullets(warnings, "note")] if warnings else []), Listing(selections(rows))],
        "provenance": [Listing(pretrainings(comparison))] if comparison.runs else [],
    }
    contents["provenance"] += [Listing(datasets(rows)), Listing(evaluations(rows), folded=True)]
    titles: dict[str, tuple[str, str]] = WORDS["chapters"]
    return [Chapter(anchor, titles[anchor][0], titles[anchor][1], blocks) for anchor, blocks in contents.items() if blocks]


def write_report(comparison: Comparison, chapters: Sequence[Chapter], out: Path) -> Path:
    """Write `report.html`, `report.md`, `tables/` and `plots/` into `out`; the path of the first.

    What an earlier report left there is replaced, or removed if this one has no such part. UsageError as `page.replace_files`.
    """
    lead = first_page.lead(comparison)
    sheets = [block.sheet for chapter in chapters for block in chapter.blocks if isinstance(block, Listing)]
    contents: dict[str, bytes] = {
        "report.html": page.page(WORDS["title"], lead, chapters).encode(),
        "report.md": page.markdown(WORDS["title"], lead, chapters).encode(),
        **{name: text.encode() for name, text in table_files([*sheets, scores(comparison)]).items()},
        **page.plot_files(chapters),
    }
    page.replace_files(out, contents)
    return out / "report.html"


def _trained(comparison: Comparison) -> list[Block]:
    found = tables(comparison, "trained-with")
    if not found:
        return []
    cautions = {
        "intervals": True,
        "photos": any(table.setting.dataset.startswith("builtin:photos") for table in comparison.tables),
        "register": any("register" in spec for spec in comparison.read_with),
        "mae": any(method == "mae" for method, _ in comparison.sections),
    }
    return [
        Text(WORDS["what"]),
        Text(WORDS["reading"], lead="How to read a cell."),
        Bullets([WORDS[name] for name, needed in cautions.items() if needed], "soft"),
        *found,
        *difference_blocks(comparison, "trained with"),
        *_forests(comparison, "trained with"),
        *difference_blocks(comparison, "null control"),
        *_forests(comparison, "null control"),
        *difference_blocks(comparison, "self-consistency", WORDS["otherwise"]),
    ]


def _post_hoc(comparison: Comparison) -> list[Block]:
    placed = norms(comparison)
    return [
        *tables(comparison, "post-hoc"),
        *difference_blocks(comparison, "read with"),
        *([Listing(placed)] if len(placed.frame) else []),
        *difference_blocks(comparison, "norm"),
    ]


def difference_blocks(comparison: Comparison, question: Question, text: str = "") -> list[Block]:
    """Every difference of a question, as numbers and in words; `text` leads the note."""
    families = families_of(comparison, question)
    if not families:
        return []
    sheet = differences(f"differences-{slug(question)}", QUESTIONS[question][1], families, comparison.rule)
    words = [f"{about(family)}: {words_of(family, of, comparison.rule)}." for family in families for of in family.differences]
    listing = Listing(replace(sheet, note=f"{text} {sheet.note}".strip()), len(sheet.frame) > MANY)
    return [listing, Bullets(words, title=f"In words ({len(words)})")]


def _forests(comparison: Comparison, question: Question) -> list[Block]:
    forests = [forest(family, comparison.rule) for family in families_of(comparison, question)]
    return [Figures(forests, f"Drawn ({len(forests)})" if len(forests) > FEW else "")] if forests else []


def _across(comparison: Comparison) -> list[Block]:
    found = rankings(comparison)
    blocks: list[Block] = [Figures(plot_datasets.ranking_plots(found)), *map(Listing, ranking_sheets(found))] if found else []
    scatter = plot_datasets.agreement_plots(comparison)
    return [*blocks, Heading("Do k-NN and linear probes agree?"), Figures(scatter)] if scatter else blocks


def _inside(comparison: Comparison, folders: Sequence[str | Path]) -> list[Block]:
    """Of what was evaluated with --diagnostics."""
    found = find_diagnoses(folders, comparison.rows, comparison.arms)
    if not found:
        return []
    blocks: list[Block] = [Text(WORDS["story"]), Bullets([f"{text}." for text in diagnostic_tables.sentences(found)])]
    blocks += [Figures(plot_blocks.plots(found, comparison.rows)), *map(Listing, diagnostic_tables.sheets(found))]
    blocks += [Heading("Where it looks"), Text(WORDS["maps"], "soft")]
    return [*blocks, *maps(found, STORED_BYTES // 2)]


def maps(diagnoses: Sequence[Diagnosis], budget: int) -> list[Block]:
    """The maps of the first seed of every arm on each dataset, as many as fit into `budget` bytes; of the others it is said."""
    blocks: list[Block] = []
    for of, *others in by_arm(diagnoses).values():
        caption = f"{label(of.arm)}, {of.place.dataset}" + (f", seed {of.seed} of {1 + len(others)}" if others else "")
        file = of.file.parent / of.found["picture"]
        png = file.read_bytes() if file.is_file() else b""
        if png and len(png) <= budget:
            budget -= len(png)
            blocks.append(Figures([Plot(f"maps-{len(blocks)}-{slug(caption)}", caption, "", png)]))
        else:
            blocks.append(Text(f"{caption}: {file.name} is {'too large to be shown here' if png else 'gone'}.", "soft"))
    return blocks


def _pretraining(runs: Sequence[Run]) -> list[Block]:
    curves, filled = training_curves(runs), reconstructions(runs)
    blocks: list[Block] = [Text(WORDS["curves"], "soft"), Figures(curves)] if curves else [Text(WORDS["no_curves"], "soft")]
    return [*blocks, Heading("What MAE fills in"), Text(WORDS["filled"], "soft"), Figures(filled)] if filled else blocks


def reconstructions(runs: Sequence[Run]) -> list[Plot]:
    """What MAE filled in, of the first seed of every arm."""
    found: dict[tuple[str, str], Plot] = {}
    for run in runs:
        file, arm = run.folder / "reconstructions.png", (run.name, run.recipe["readout"])
        if arm not in found and file.is_file():
            caption = f"{run.name}, trained with {arm[1]}, seed {run.recipe['seed']}"
            found[arm] = Plot(f"reconstructions-{len(found)}-{slug(*arm)}", caption, "", file.read_bytes())
    return list(found.values())

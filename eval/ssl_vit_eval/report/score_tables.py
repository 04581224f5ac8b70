"""What came out, as tables: tables A and B of every setting, coloured by gain; every score, every difference, ranks across datasets.

And one score as text, the same in the terminal and in the report.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any, Literal

from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.compare.across_datasets import Ranking
from ssl_vit_eval.compare.arms import Arm
from ssl_vit_eval.compare.comparison import Cell, Comparison, Gain, Table
from ssl_vit_eval.compare.verdict import Family, Rule
from ssl_vit_eval.metrics import MACRO
from ssl_vit_eval.report.page import Listing, template
from ssl_vit_eval.report.table import MISSING, Forms, Sheet, Shown, frame_of, slug
from ssl_vit_eval.report.text import METRIC_NAMES, NOTES, p_text, ranking_basis, ranking_title, side_name, signed
from ssl_vit_eval.sources import PIXELS
from ssl_vit_eval.stats.seeds import Estimate

GAIN, LOSS = (120, 178, 226), (240, 178, 122)  # dark text keeps a contrast above 7 : 1 on both
ZERO = "○"  # marks a gain whose interval includes zero
FLOOR = "▽"  # marks a score that raw pixels beat
NORMS = {"post": "norm, then pool (post)", "pre": "no norm (pre)", "pooled": "pool, then norm (pooled)"}


def score_text(cell: Cell) -> str:
    """In %, over several seeds with their standard deviation and number: `71.2`, `71.2 ± 0.4, n = 3`."""
    spread = "" if cell.spread is None else f" ± {100 * cell.spread:.1f}, n = {cell.seeds}"
    return f"{100 * cell.value:.1f}{spread}"


def under_text(cell: Cell) -> str:
    """What stands below the score: the gain where there is one, else the interval over images, as points and %."""
    if cell.gain:
        return gain_text(cell.gain)
    return "" if cell.ci is None else f"[{100 * cell.ci[0]:.1f}, {100 * cell.ci[1]:.1f}]"


def gain_text(gain: Gain) -> str:
    """`+6.1 [4.4, 7.8]`, with the interval of one seed, or `+6.1 (5.0 … 7.1)`, with the range of several; ○ behind it where that, as it
    is shown, includes zero."""
    low, high = (signed(bound).lstrip("+") for bound in (gain.low, gain.high))
    bounds = f"[{low}, {high}]" if gain.seeds == 1 else f"({low} … {high})"
    return f"{signed(gain.points)} {bounds}" + (f" {ZERO}" if round(gain.low, 1) <= 0 <= round(gain.high, 1) else "")


def pixels_of(table: Table) -> dict[Arm, Cell]:
    """The scores of raw pixels."""
    return {arm: cell for (arm, spec), cell in table.cells.items() if spec == PIXELS}


def tables(comparison: Comparison, kind: Literal["trained-with", "post-hoc"]) -> list[Listing]:
    """Of every setting table B, with its controls: trained here, by what they were trained with and how they are read; or table A, where
    there are models which were not trained here: each frozen backbone read in every way."""
    gains = [abs(cell.gain.points) for table in comparison.tables for cell in table.cells.values() if cell.gain]
    scale = max(5.0, *gains) if gains else 0.0  # of full colour, the same in all; no trifle is painted as a gain
    names = Counter[str]()
    found: list[Listing] = []
    for table in comparison.tables:
        name = slug(kind, table.setting.dataset, table.setting.rule)  # settings can differ in what is not in it: the later are numbered
        names[name] += 1
        numbered = f"{name}--{names[name]}" if names[name] > 1 else name
        if listing := _table(comparison, table, numbered, kind == "trained-with", scale, is_first=not found):
            found.append(listing)
    return found


def _table(comparison: Comparison, table: Table, name: str, trained: bool, scale: float, is_first: bool) -> Listing | None:
    """None without a score. Recipes and readouts without any score in a setting are named instead of shown."""
    setting, known = table.setting, {arm for table in comparison.tables for arm in table.arms()}
    arms = comparison.trained(table) if trained else comparison.others(table)
    specs = {spec for arm, spec in table.cells if arm in arms}
    columns = [spec for spec in comparison.read_with if spec in specs and at_last(spec) not in specs - {spec}] or [PIXELS]
    lines = {arm: [table.cells.get((arm, spec)) for spec in columns] for arm in arms if arm in table.arms()}
    here = {arm.section for arm in lines}
    lacking = [arm for arm in arms if arm in known and arm not in lines and (arm.trained_with or arm.section not in here)]
    absent = [spec for spec in comparison.read_with if spec not in specs and at_last(spec) in (spec, None)]
    absent += dict.fromkeys(arm.name if arm.section in here else arm.section for arm in lacking)
    if trained:
        lines |= {arm: [cell, *[None] * (len(columns) - 1)] for arm, cell in pixels_of(table).items()}
    if not lines:
        return None
    about = f"protocol version {setting.version}, {table.n_test:,} test images, {setting.transform}, data {setting.data[:16]}"
    about += f"; not measured here: {', '.join(absent)}" if absent else ""
    if blocks := len(specs - set(columns)):
        about += f"; {blocks} readouts of other blocks: see the curves by block, and tables/scores.csv"

    what, where, metric = "trained with" if trained else "model", f"{setting.dataset} · {setting.rule}", METRIC_NAMES[table.metric]
    labels = {arm: arm.trained_with or ("random init" if trained and arm.method != PIXELS else None) for arm in lines}
    records = []
    for arm, cells in lines.items():
        named: dict[str, Any] = {"method": arm.method, "recipe": arm.recipe, what: labels[arm]}
        records.append(named | {f"read {spec}": cell and _shown(cell) for spec, cell in zip(columns, cells, strict=True)})
    html = template(
        "scores.html",
        **{"title": where, "metric": metric, "about": about, "what": what, "pixels": PIXELS, "missing": MISSING},
        **{"columns": columns, "lines": lines, "labels": labels},
        sections={section: [arm for arm in lines if arm[:2] == section] for section in dict.fromkeys(arm[:2] for arm in lines)},
        **{"score": score_text, "under": under_text, "is_low": lambda cell: cell.below_pixels, "floor": FLOOR, "zero": ZERO},
        **{"legend": trained and scale and is_first, "scale": scale, "colour": lambda points: _colour(points, scale)},
    )
    return Listing(Sheet(name, f"{where}: {metric}, % ({about})", frame_of(records)), html=html)


def _shown(cell: Cell) -> Shown:
    return Shown(100 * cell.value, score_text(cell) + (f" ({under})" if (under := under_text(cell)) else ""))


def at_last(spec: str) -> str | None:
    """The same readout of the last block; None for one that mixes blocks."""
    last = ReadoutSpec.parse(spec).at_block(-1)
    return str(last) if last else None


def _colour(points: float, scale: float) -> str:
    end, share = (GAIN if points > 0 else LOSS), min(1.0, abs(points) / scale)
    return "#" + "".join(f"{round(255 + share * (channel - 255)):02x}" for channel in end)


def scores(comparison: Comparison) -> Sheet:
    """Every cell of every table in one long list, with its spread, macro top-1 and gain."""
    records = []
    for table in comparison.tables:
        setting = table.setting
        for (arm, spec), cell in table.cells.items():
            gain, (low, high) = cell.gain, cell.ci or (None, None)
            place = {**_place(table), "method": arm.method, "recipe": arm.recipe, "trained with": arm.trained_with, "read with": spec}
            top1, macro = (cell.other, cell.value) if table.metric == MACRO else (cell.value, cell.other)
            shares = {"top-1, %": top1, "deviation": cell.spread, "n": None, "low": low, "high": high, "macro top-1, %": macro}
            gains = {"gain": gain.points, "gain low": gain.low, "gain high": gain.high} if gain else dict.fromkeys(GAINS)
            about = {"test images": table.n_test, "version": setting.version, "transform": setting.transform, "data": setting.data[:16]}
            percent = {name: None if share is None else 100 * share for name, share in shares.items()}
            records.append({**place, **percent, "n": cell.seeds, **gains, **about})
    forms: Forms = {**dict.fromkeys(("top-1, %", "deviation", "low", "high", "macro top-1, %"), "{:.1f}"), **dict.fromkeys(GAINS, signed)}
    return Sheet("scores", "Every score", frame_of(records), NOTES["scores"], forms, {"data": "code"})


GAINS = ("gain", "gain low", "gain high")


def differences(name: str, title: str, families: Sequence[Family], rule: Rule) -> Sheet:
    """One line for each difference of the families."""
    records = []
    for family in families:
        own = family.question == "self-consistency"
        for of in family.differences:
            a, b = (side.read_with if own else side_name(family.question, side) for side in (of.a, of.b))
            records.append(
                {
                    **{"of": of.a.arm.name if own else family.scope, **_place(family), "A": a, "B": b},
                    **{"points": of.points, "low": of.low, "high": of.high, "verdict of A": of.outcome},
                    **{"p": of.p, "corrected p": of.corrected if family.is_corrected else None, "discordant": 100 * of.discordance},
                    **{"seeds": len(of.seeds) if family.unit == "seeds" else None, "images": of.images, "resolvable": of.resolvable},
                }
            )
    forms: Forms = {
        **dict.fromkeys(("points", "low", "high"), signed),
        **dict.fromkeys(("p", "corrected p"), partial(p_text, rule=rule)),
        **{"discordant": "{:.1f}", "images": "{:,}", "resolvable": lambda points: "∞" if points == float("inf") else f"{points:.1f}"},
    }
    return Sheet(name, title, frame_of(records), NOTES["differences"], forms, {"verdict of A": "badge"}, only_in_files=("images",))


def _place(of: Table | Family) -> dict[str, Any]:
    return {"dataset": of.setting.dataset, "metric": METRIC_NAMES[of.metric], "protocol": of.setting.rule}


def norms(comparison: Comparison) -> Sheet:
    """Readouts that were read in several places of the final norm, one line each and the places side by side."""
    records = []
    for table in comparison.tables:
        found: dict[tuple[Arm, str], dict[str, Cell]] = {}
        for (arm, spec), cell in table.cells.items():
            if placed := _placed(spec):
                found.setdefault((arm, placed[0]), {})[NORMS[placed[1]]] = cell
        for (arm, spec), of in ((key, of) for key, of in found.items() if len(of) > 1):
            named = {**_place(table), "backbone": arm.name, "readout": spec}
            shown = {norm: Shown(100 * cell.value, score_text(cell)) for norm, cell in of.items()}
            records.append(named | dict.fromkeys(NORMS.values()) | shown)
    return Sheet("norms", "Where the final norm stands: accuracy, %", frame_of(records))


def _placed(spec: str) -> tuple[str, str] | None:
    """The readout with its norm in the default place, and where its norm is; None for terms of several norms, and for pixels."""
    if spec == PIXELS:
        return None
    parsed = ReadoutSpec.parse(spec)
    return (str(parsed.with_norm("post")), parsed.norm) if parsed.norm else None


def ranking_sheets(found: Sequence[Ranking]) -> list[Sheet]:
    """The arms of all rankings, and their pairs; none where nothing was ranked."""
    arms, pairs = [], []
    for of in found:
        place = [of.method, of.recipe, f"{of.protocol.name} v{of.protocol.version}"]
        size = [len(of.datasets), len(of.seeds)]
        arms += [[*place, arm.trained_with, fmean(ranks), *_percent(of.iqm[arm]), *size] for arm, ranks in of.ranks.items()]
        pairs += [[*place, a.trained_with, b.trained_with, *_percent(p), *size] for (a, b), p in of.improvement.items()]
    note = " ".join(f"{ranking_title(of)}: {ranking_basis(of)}" for of in found)
    told = "Intervals (95 %) over seeds, of these datasets."
    first, last = ["method", "recipe", "protocol"], ["low", "high", "datasets", "seeds"]
    forms: Forms = dict.fromkeys(("interquartile mean, %", "P(A > B), %", "low", "high"), "{:.1f}") | {"mean rank": "{:.2f}"}
    ranked = frame_of(arms, [*first, "trained with", "mean rank", "interquartile mean, %", *last])
    about = f"Rank 1 is the best, by the mean over seeds. {told} {note}"
    improved = frame_of(pairs, [*first, "A", "B", "P(A > B), %", *last])
    ties = f"Mean over datasets, ties count half; 50 % is no improvement. {told}"
    sheets = [
        Sheet("rankings", "Across datasets, each arm read as it was trained", ranked, about, forms),
        Sheet("improvement", "Across datasets: the probability that a run of A beats a run of B", improved, ties, forms),
    ]
    return sheets if found else []


def _percent(estimate: Estimate) -> list[float | None]:
    return [None if share is None else 100 * share for share in estimate]

"""Diagnostics in words and tables: attention by block, spectra, tokens, similarity. Descriptions of the arms, never verdicts."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from ssl_vit_eval.compare.diagnostic_files import Diagnosis, by_arm, label
from ssl_vit_eval.report.table import MISSING, Sheet, Shown, frame_of
from ssl_vit_eval.report.text import NOTES, sentence

Found = Iterator[tuple[tuple[str, ...], dict[str, float | None]]]  # what it is of, and the numbers of one seed


def sentences(diagnoses: Sequence[Diagnosis]) -> list[str]:
    """For each arm: is CLS's attention broad early, narrower in the middle, narrowest at the end? Its entropy at three blocks."""
    return [f"{label(arm)}, {place.dataset}: {_story(of)}" for (place, arm), of in by_arm(diagnoses).items()]


def attention(of: Diagnosis, statistic: str = "cls_entropy") -> list[list[float]] | None:
    """[block][head], means over the images; None for a model that does not show its attention, or has no CLS."""
    values = of.found["attention"].get(statistic)
    return None if values is None else values["mean"]


def sheets(diagnoses: Sequence[Diagnosis]) -> list[Sheet]:
    """Tables of all diagnosed arms, a line for each arm and key, means over seeds with their deviation; none without diagnostics."""
    found = []
    for name, (title, keys, measure) in _TABLES.items():
        records = []
        for (place, arm), of in by_arm(diagnoses).items():
            seeds: dict[tuple[str, ...], list[dict[str, float | None]]] = {}
            for one in of:
                for key, numbers in measure(one):
                    seeds.setdefault(key, []).append(numbers)
            for key, many in seeds.items():  # seeds with other keys are other lines
                named = {"model": label(arm), "dataset": place.dataset, **dict(zip(keys, key, strict=True)), "seeds": len(many)}
                records.append(named | {column: _mean([numbers[column] for numbers in many]) for column in many[0]})
        if records:
            found.append(Sheet(name, title, frame_of(records), NOTES[name]))
    return found


def _story(of: list[Diagnosis]) -> str:
    known = [blocks for one in of if (blocks := attention(one)) is not None]
    if not known:
        shown = of[0].found["attention"]
        return "no CLS token, so no attention of it" if shown["available"] else f"attention is not shown: {shown['reason']}"
    places = {"first": 0, "middle": of[0].depth // 2, "last": -1}
    entropy = {name: fmean(head for blocks in known for head in blocks[block]) for name, block in places.items()}
    return sentence("story", seeds=len(known), falls=sum(map(_falls, known)), block=places["middle"], **entropy)


def _falls(blocks: list[list[float]]) -> bool:
    """Whether the mean over heads is lower at every block than at the block before."""
    return len(blocks) > 1 and all(fmean(later) < fmean(earlier) for earlier, later in pairwise(blocks))


def _attention(of: Diagnosis) -> Found:
    at = {"first": 0, "middle": of.depth // 2, "last": -1}
    found = {word: attention(of, statistic) for word, statistic in (("entropy", "cls_entropy"), ("patches", "cls_effective_patches"))}
    if numbers := {f"{word}, {name}": fmean(known[at[name]]) for word, known in found.items() if known is not None for name in at}:
        yield (), dict(numbers)


def _spectra(of: Diagnosis) -> Found:
    for spectrum in of.found["spectra"]["readouts"]:
        if spectrum["block"] in (None, of.depth - 1):
            alpha: dict[str, Any] = spectrum["alpha_req"] or {"alpha": None}
            ranks = f"{alpha['first']}–{alpha['last']}" if "first" in alpha else MISSING
            key = (spectrum["readout"], str(of.found["spectra"]["n"]), str(spectrum["width"]), ranks)
            yield key, {"RankMe": spectrum["rankme"], "α-ReQ": alpha["alpha"]}


def _tokens(of: Diagnosis) -> Found:
    blocks = of.found["tokens"]["blocks"]
    norms, cosine = blocks[-1]["norms"], blocks[-1]["cls_patch_cosine"]
    yield (
        (),
        {
            "median norm, patches": norms["patches"]["median"],
            "median norm, CLS": norms["cls"] and norms["cls"]["median"],
            "outliers, last block, %": 100 * norms["patches"]["outliers"],
            "outliers, worst block, %": max(100 * block["norms"]["patches"]["outliers"] for block in blocks),
            "CLS–patch cosine, raw": cosine and cosine["pre"]["mean"],
            "behind the norm": cosine and cosine["post"]["mean"],
        },
    )


def _similarity(of: Diagnosis) -> Found:
    for pair in of.found["cka"]["pairs"]:
        yield (pair["a"], pair["b"], str(of.found["cka"]["n"])), {"CKA": pair["cka"], "null, 95 %": pair["null_p95"]}


def _redundancy(of: Diagnosis) -> Found:
    for one in of.found["redundancy"]:
        yield (one["protocol"], one["readout"], str(one["width"])), {"gain, points": one["points"]}


_TABLES: dict[str, tuple[str, tuple[str, ...], Callable[[Diagnosis], Found]]] = {  # title, keys of a line, its numbers
    "attention": ("What CLS attends to, by block", (), _attention),
    "geometry": ("Spectra of the readouts", ("readout", "n", "width", "ranks fitted"), _spectra),
    "tokens": ("Tokens: norms, outliers, CLS against patches", (), _tokens),
    "similarity": ("Similarity of the readouts of one backbone", ("A", "B", "n"), _similarity),
    "redundancy": ("What two readouts hold together", ("protocol", "A + B", "width"), _redundancy),
}


def _mean(values: Sequence[float | None]) -> Shown | None:
    """Over seeds, with ± their standard deviation; missing where a seed lacks it."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    mean, digits = fmean(known), 3 if max(map(abs, known)) < 2 else 1
    spread = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return Shown(mean, f"{mean:.{digits}f}{spread}".replace("-", "−"))

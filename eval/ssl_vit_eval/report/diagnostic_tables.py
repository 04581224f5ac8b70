"""Diagnostics in words and tables: attention by block, spectra, tokens, similarity. Descriptions of the arms, never verdicts."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from ssl_vit_eval.compare.diagnostic_files import Diagnosis, by_arm, label
from ssl_vit_eval.report.table import MISSING, Sheet, Value

Line = tuple[tuple[str, ...], dict[str, float | None]]  # what it is of, and the numbers of one seed


def sentences(diagnoses: Sequence[Diagnosis]) -> list[str]:
    """For each arm: is CLS's attention broad early, narrower in the middle, narrowest at the end? Its entropy at three blocks."""
    return [f"{label(arm)}, {place.dataset}: {_story(of)}" for (place, arm), of in by_arm(diagnoses).items()]


def attention(of: Diagnosis, statistic: str = "cls_entropy") -> list[list[float]] | None:
    """[block][head], means over the images; None for a model that does not show its attention, or has no CLS."""
    values = of.found["attention"].get(statistic)
    return None if values is None else values["mean"]


def sheets(diagnoses: Sequence[Diagnosis]) -> list[Sheet]:
    """Tables of all diagnosed arms, means over seeds with their deviation; none without diagnostics."""
    found = [_attention(diagnoses), _geometry(diagnoses), _tokens(diagnoses), _similarity(diagnoses), _redundancy(diagnoses)]
    return [sheet for sheet in found if sheet.lines]


def _story(of: list[Diagnosis]) -> str:
    known = [blocks for one in of if (blocks := attention(one)) is not None]
    if not known:
        shown = of[0].found["attention"]
        return "no CLS token, so no attention of it" if shown["available"] else f"attention is not shown: {shown['reason']}"
    middle = of[0].depth // 2
    values = [fmean(head for blocks in known for head in blocks[block]) for block in (0, middle, -1)]
    seeds = f"over {len(known)} seeds " if len(known) > 1 else ""
    count = sum(map(_falls, known))
    every = f"in {count} of {len(known)} seeds" if len(known) > 1 else ("yes" if count else "no")
    return (
        f"the entropy of CLS's attention over the patches (1: all alike, 0: a single one) is {seeds}{values[0]:.3f} at the first block, "
        f"{values[1]:.3f} in the middle (block {middle}), {values[2]:.3f} at the last; lower at every block than before: {every}"
    )


def _falls(blocks: list[list[float]]) -> bool:
    """Whether the mean over heads is lower at every block than at the block before."""
    return len(blocks) > 1 and all(fmean(later) < fmean(earlier) for earlier, later in pairwise(blocks))


def _attention(diagnoses: Sequence[Diagnosis]) -> Sheet:
    def lines(of: Diagnosis) -> Iterable[Line]:
        at = {"first": 0, "middle": of.depth // 2, "last": -1}
        numbers: dict[str, float | None] = {}
        for word, statistic in (("entropy", "cls_entropy"), ("patches", "cls_effective_patches")):
            blocks = attention(of, statistic)
            if blocks is not None:
                numbers |= {f"{word}, {name}": fmean(blocks[block]) for name, block in at.items()}
        if numbers:
            yield (), numbers

    note = (
        "Entropy of CLS's attention over the patches, renormalised, as a share of log n: 1 is uniform, 0 a single patch; patches: exp(H). "
        "Means over heads, first 256 test images; ± over seeds. Middle: block depth // 2, blocks count from 0."
    )
    return _sheet("attention", "What CLS attends to, by block", (), lines, diagnoses, note)


def _geometry(diagnoses: Sequence[Diagnosis]) -> Sheet:
    def lines(of: Diagnosis) -> Iterable[Line]:
        n = of.found["spectra"]["n"]
        for spectrum in of.found["spectra"]["readouts"]:
            if spectrum["block"] in (None, of.depth - 1):
                alpha: dict[str, Any] = spectrum["alpha_req"] or {"alpha": None}
                ranks = f"{alpha['first']}–{alpha['last']}" if "first" in alpha else MISSING
                yield (spectrum["readout"], str(n), str(spectrum["width"]), ranks), {"RankMe": spectrum["rankme"], "α-ReQ": alpha["alpha"]}

    note = "Compare only at equal n and width (α-ReQ at equal ranks too). They describe the spectrum of the features and are no scores."
    return _sheet("geometry", "Spectra of the readouts", ("readout", "n", "width", "ranks fitted"), lines, diagnoses, note)


def _tokens(diagnoses: Sequence[Diagnosis]) -> Sheet:
    def lines(of: Diagnosis) -> Iterable[Line]:
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

    note = (
        "Of the last block, before the final norm. Outliers: patches whose norm lies above median + 10 MAD. Cosine: mean over patches and "
        "images. Compare only at equal width."
    )
    return _sheet("tokens", "Tokens: norms, outliers, CLS against patches", (), lines, diagnoses, note)


def _similarity(diagnoses: Sequence[Diagnosis]) -> Sheet:
    def lines(of: Diagnosis) -> Iterable[Line]:
        for pair in of.found["cka"]["pairs"]:
            yield (pair["a"], pair["b"], str(of.found["cka"]["n"])), {"CKA": pair["cka"], "null, 95 %": pair["null_p95"]}

    note = "Debiased linear CKA at the last block; 1: the same up to rotation and scale. Null: the images of B shuffled, 95th percentile."
    return _sheet("similarity", "Similarity of the readouts of one backbone", ("A", "B", "n"), lines, diagnoses, note)


def _redundancy(diagnoses: Sequence[Diagnosis]) -> Sheet:
    def lines(of: Diagnosis) -> Iterable[Line]:
        for one in of.found["redundancy"]:
            yield (one["protocol"], one["readout"], str(one["width"])), {"gain, points": one["points"]}

    note = "Top-1 of A + B, projected to the width of one token, minus the better of A and B. Near 0: one holds what the other does."
    return _sheet("redundancy", "What two readouts hold together", ("protocol", "A + B", "width"), lines, diagnoses, note)


def _sheet(
    name: str, title: str, keys: Sequence[str], lines: Callable[[Diagnosis], Iterable[Line]], diagnoses: Sequence[Diagnosis], note: str
) -> Sheet:
    """A line for each arm and key, with each number's mean over the seeds; seeds with other keys are other lines."""
    found, names = [], []
    for (place, arm), of in by_arm(diagnoses).items():
        seeds: dict[tuple[str, ...], list[dict[str, float | None]]] = {}
        for one in of:
            for key, numbers in lines(one):
                seeds.setdefault(key, []).append(numbers)
        for key, many in seeds.items():
            names = list(many[0])
            text = [Value(label(arm)), Value(place.dataset), *map(Value, key), Value(str(len(many)), float(len(many)))]
            found.append([*text, *(_mean([numbers[column] for numbers in many]) for column in names)])
    return Sheet(name, title, ["model", "data set", *keys, "seeds", *names], found, note)


def _mean(values: Sequence[float | None]) -> Value:
    """Over seeds, missing where a seed lacks it; ± their standard deviation."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Value(MISSING)
    mean, digits = fmean(known), 3 if max(map(abs, known)) < 2 else 1
    spread = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return Value(f"{mean:.{digits}f}{spread}".replace("-", "−"), mean)

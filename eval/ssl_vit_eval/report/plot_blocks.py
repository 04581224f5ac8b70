"""What happens from block to block: CLS's attention, the accuracy of each readout; and how alike the readouts are at the end."""

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssl_vit_eval.compare.arms import Arm, ordered
from ssl_vit_eval.compare.diagnostic_files import Diagnosis, Place, by_arm, label
from ssl_vit_eval.diagnostics.measure import at_each_block
from ssl_vit_eval.report.diagnostic_tables import attention
from ssl_vit_eval.report.plotting import SOFT, Look, Plot, draw, legend, looks, name_of, panels, size_of, wrapped
from ssl_vit_eval.rows import Row, Setting

UNTRAINED = Look(SOFT, "x", (1.2, 1.2))


class Group(NamedTuple):
    """The arms of one recipe, with their seeds, and the initialisation that they started from; or all that was not trained here."""

    title: str
    arms: dict[Arm, list[Diagnosis]]


def plots(diagnoses: Sequence[Diagnosis], rows: Sequence[Row]) -> list[Plot]:
    """For each data set that was diagnosed: attention, accuracy by block and protocol, similarity; rows: all that were compared."""
    drawn = []
    for place in dict.fromkeys(of.place for of in diagnoses):
        groups = _groups([of for of in diagnoses if of.place == place])
        drawn += _attention(place, groups)
        for group in groups:
            drawn += [*_accuracy(place, group, rows), *_similarity(place, group)]
    return drawn


def block_curves(of: Diagnosis, rows: Sequence[Row]) -> dict[tuple[Setting, str], dict[int, float]]:
    """Top-1, as a fraction, of each readout at each block that was measured, where there are two or more; without controls."""
    known = {
        (Setting.of(row), row.read_with): row.value
        for row in rows
        if (row.checkpoint, row.transform) == of.weights and row.metric == "top1" and not row.control
    }
    curves = {}
    for setting in dict.fromkeys(setting for setting, _ in known):
        for spec in of.found["readouts"]:
            places = [(block, known.get((setting, name))) for block, name in at_each_block(spec, of.depth) if block is not None]
            curve = {block: value for block, value in places if value is not None}
            if len(curve) > 1:
                curves[setting, spec] = curve
    return curves


def _groups(diagnoses: Sequence[Diagnosis]) -> list[Group]:
    arms = {arm: of for (_, arm), of in by_arm(diagnoses).items()}
    order = ordered(arm.trained_with for arm in arms if arm.trained_with)
    trained = sorted((arm for arm in arms if arm.trained_with), key=lambda arm: order.index(str(arm.trained_with)))
    groups = []
    for section in dict.fromkeys(arm[:2] for arm in arms if arm.trained_with):
        of = [arm for arm in trained if arm[:2] == section]
        of += [arm for arm, seeds in arms.items() if any(section in one.starts for one in seeds)]
        groups.append(Group(of[0].section, {arm: arms[arm] for arm in of}))
    placed = {arm for group in groups for arm in group.arms}
    others = {arm: of for arm, of in arms.items() if arm not in placed}
    return [*groups, Group("not trained here", others)] if others else groups


def _name(arm: Arm) -> str:
    """Within its recipe."""
    return f"trained with {arm.trained_with}" if arm.trained_with else label(arm)


def _attention(place: Place, groups: Sequence[Group]) -> list[Plot]:
    shown = []
    for group in groups:
        known = {arm: [blocks for one in of if (blocks := attention(one))] for arm, of in group.arms.items()}
        if curves := {arm: seeds for arm, seeds in known.items() if seeds}:
            shown.append((group, curves))
    if not shown:
        return []
    look = looks(arm.trained_with or label(arm) for group in groups for arm in group.arms)
    started = {arm for group in groups for arm in group.arms if not arm.trained_with and any(of.starts for of in group.arms[arm])}

    def paint(figure: Figure) -> None:
        handles: dict[str, Artist] = {}
        for axes, (group, curves) in zip(panels(figure, len(shown)), shown, strict=True):
            for arm, seeds in curves.items():
                heads = [[value for blocks in seeds for value in blocks[block]] for block in range(len(seeds[0]))]
                means, spread = [fmean(values) for values in heads], [pstdev(values) for values in heads]
                own = UNTRAINED if arm in started else look[arm.trained_with or label(arm)]
                handles[_name(arm)] = _curve(axes, own, range(len(heads)), means, spread)
            axes.set_title(wrapped(group.title, 3.0))
            axes.set_ylabel("entropy / log n")
            axes.set_ylim(0.0, 1.03)  # all of it, or small changes look large
        legend(figure, handles)

    note = (
        "Entropy of CLS's attention over the n patches. 1: all patches alike, 0: a single one. Lines: mean over images, heads and seeds; "
        "bands: ± one standard deviation over heads and seeds."
    )
    title = f"Where CLS looks, by block: {place.dataset}"
    return [draw(name_of("entropy", place.dataset, key=place), title, size_of(len(shown)), paint, note)]


def _accuracy(place: Place, group: Group, rows: Sequence[Row]) -> list[Plot]:
    """A figure for each protocol, in it a panel for each arm, a line for each readout."""
    curves = {arm: [block_curves(one, rows) for one in of] for arm, of in group.arms.items()}
    settings = dict.fromkeys(setting for seeds in curves.values() for of in seeds for setting, _ in of)
    return [
        _by_readout(setting, group, curves) for setting in settings if setting.dataset == place.dataset and setting.data[:8] == place.data
    ]


def _by_readout(setting: Setting, group: Group, curves: Mapping[Arm, list[dict[tuple[Setting, str], dict[int, float]]]]) -> Plot:
    arms = [arm for arm, seeds in curves.items() if any(known == setting for of in seeds for known, _ in of)]
    found = {arm: ordered(spec for of in curves[arm] for known, spec in of if known == setting) for arm in arms}
    specs = {arm: [spec for spec in found[arm] if all((setting, spec) in of for of in curves[arm])] for arm in arms}
    look = looks(ordered(spec for arm in arms for spec in specs[arm]))
    left_out = [f"{_name(arm)} read {spec}" for arm in arms for spec in found[arm] if spec not in specs[arm]]

    def paint(figure: Figure) -> None:
        handles: dict[str, Artist] = {}
        for axes, arm in zip(panels(figure, len(arms)), arms, strict=True):
            for spec in specs[arm]:
                seeds = [of[setting, spec] for of in curves[arm]]
                values = {block: [100 * of[block] for of in seeds] for block in seeds[0] if all(block in of for of in seeds)}
                means, spread = [fmean(of) for of in values.values()], [pstdev(of) for of in values.values()]
                handles[f"read {spec}"] = _curve(axes, look[spec], list(values), means, spread)
            count = len(curves[arm])
            axes.set_title(wrapped(_name(arm) + (f", {count} seeds" if count > 1 else ""), 3.0))
            axes.set_ylabel("top-1, %")
        legend(figure, handles)

    title = f"Accuracy by block: {group.title} · {setting.dataset} · {setting.rule}"
    name = name_of("blocks", group.title, setting.dataset, setting.protocol, key=setting)
    note = (
        "Blocks count from 0; each is read behind the final norm, unless the readout says otherwise. Lines: mean over seeds; bands: ± "
        "their standard deviation."
    )
    note += f" Left out, since a seed lacks it: {', '.join(left_out)}." if left_out else ""
    return draw(name, title, size_of(len(arms)), paint, note)


def _similarity(place: Place, group: Group) -> list[Plot]:
    """Mean over seeds; a panel for each arm whose seeds were all read in the same ways."""
    matrices = {arm: matrix for arm, of in group.arms.items() if (matrix := _matrix(of)) is not None}
    if not matrices:
        return []

    def paint(figure: Figure) -> None:
        for axes, (arm, (names, values)) in zip(panels(figure, len(matrices), share=False), matrices.items(), strict=True):
            axes.pcolormesh(values, cmap="Blues", vmin=0.0, vmax=1.0, edgecolors="white")
            for (row, column), value in np.ndenumerate(values):
                ink = "white" if value > 0.6 else "black"
                axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
            places = [place + 0.5 for place in range(len(names))]
            axes.set_xticks(places, names, rotation=30, ha="right")
            axes.set_yticks(places, names)
            axes.invert_yaxis()
            axes.grid(visible=False)
            axes.set_title(wrapped(_name(arm), 3.0))

    title = f"Similarity of the readouts (debiased linear CKA): {group.title} · {place.dataset}"
    note = "At the last block, mean over seeds. 1: the same up to rotation and scale. The null of shuffled images is in the table."
    return [draw(name_of("cka", group.title, place.dataset, key=place), title, size_of(len(matrices), height=3.0), paint, note)]


def _matrix(of: Sequence[Diagnosis]) -> tuple[list[str], Float[np.ndarray, "k k"]] | None:
    """CKA of each pair of readouts, mean over seeds; None where a seed lacks one, or there is no pair."""
    seeds = [{(pair["a"], pair["b"]): pair["cka"] for pair in one.found["cka"]["pairs"]} for one in of]
    pairs = list(seeds[0])
    if not pairs or any(list(known) != pairs or None in known.values() for known in seeds):
        return None
    names = ordered(name for pair in pairs for name in pair)
    values = np.eye(len(names))
    for pair in pairs:
        i, j = (names.index(name) for name in pair)
        values[i, j] = values[j, i] = fmean(known[pair] for known in seeds)
    return names, values


def _curve(axes: Axes, look: Look, blocks: Sequence[int], means: Sequence[float], spread: Sequence[float]) -> Artist:
    """A line by block with its spread; the line."""
    low, high = ([mean + sign * width for mean, width in zip(means, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(blocks, low, high, color=look.colour, alpha=0.13, linewidth=0)
    (line,) = axes.plot(blocks, means, color=look.colour, marker=look.marker, dashes=look.dashes, linewidth=1.5, markersize=4.5)
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return line

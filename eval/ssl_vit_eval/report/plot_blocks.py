"""What happens from block to block: CLS's attention, the accuracy of each readout; and how alike the readouts are at the end."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ssl_vit_eval.compare.arms import Arm, ordered
from ssl_vit_eval.compare.diagnostic_files import Diagnosis, Place, by_arm, label
from ssl_vit_eval.diagnostics.run import by_block
from ssl_vit_eval.metrics import metric_of
from ssl_vit_eval.report.diagnostic_tables import attention
from ssl_vit_eval.report.plotting import SOFT, Look, Plot, curve, draw_panels, looks, name_of
from ssl_vit_eval.report.text import METRIC_NAMES, NOTES
from ssl_vit_eval.rows import Row, Setting

UNTRAINED = Look(SOFT, "x", (1.2, 1.2))
Arms = dict[Arm, list[Diagnosis]]  # with their seeds
Curves = dict[tuple[Setting, str], dict[int, float]]  # accuracy, as a fraction, of each readout by block


def plots(diagnoses: Sequence[Diagnosis], rows: Sequence[Row]) -> list[Plot]:
    """For each dataset that was diagnosed: attention, accuracy by block and protocol, similarity; rows: all that were compared."""
    drawn = []
    for place in dict.fromkeys(of.place for of in diagnoses):
        recipes = _recipes([of for of in diagnoses if of.place == place])
        drawn += _attention(place, recipes)
        for title, arms in recipes.items():
            drawn += [*_accuracy(place, title, arms, rows), *_similarity(place, title, arms)]
    return drawn


def block_curves(of: Diagnosis, rows: Sequence[Row]) -> Curves:
    """Each readout at each block that was measured, where there are two or more; without controls."""
    own = [row for row in rows if (row.checkpoint, row.transform) == of.weights and row.metric == metric_of(row)]
    found = by_block(own, of.found["readouts"], of.depth).items()
    return {key: {block: row.value for block, row in curve.items()} for key, curve in found}


def _recipes(diagnoses: Sequence[Diagnosis]) -> dict[str, Arms]:
    """The arms of each recipe and the initialisation that they started from; then all that was not trained here."""
    arms = {arm: of for (_, arm), of in by_arm(diagnoses).items()}
    order = ordered(arm.trained_with for arm in arms if arm.trained_with)
    trained = sorted((arm for arm in arms if arm.trained_with), key=lambda arm: order.index(str(arm.trained_with)))
    found = {}
    for section in dict.fromkeys(arm[:2] for arm in arms if arm.trained_with):
        of = [arm for arm in trained if arm[:2] == section]
        of += [arm for arm, seeds in arms.items() if any(section in one.starts for one in seeds)]
        found[of[0].section] = {arm: arms[arm] for arm in of}
    placed = {arm for of in found.values() for arm in of}
    others = {arm: of for arm, of in arms.items() if arm not in placed}
    return found | ({"not trained here": others} if others else {})


def _name(arm: Arm) -> str:
    """Within its recipe."""
    return f"trained with {arm.trained_with}" if arm.trained_with else label(arm)


def _attention(place: Place, recipes: Mapping[str, Arms]) -> list[Plot]:
    shown: dict[str, dict[Arm, np.ndarray]] = {}  # [seed, block, head], by recipe
    for title, arms in recipes.items():
        for arm, of in arms.items():
            if known := [blocks for one in of if (blocks := attention(one))]:
                shown.setdefault(title, {})[arm] = np.array(known)
    look = looks(arm.trained_with or label(arm) for arms in recipes.values() for arm in arms)
    started = {arm for arms in recipes.values() for arm, of in arms.items() if not arm.trained_with and any(one.starts for one in of)}

    def paint(axes: Axes, curves: Mapping[Arm, np.ndarray]) -> dict[str, Artist]:
        axes.set_ylabel("entropy / log n")
        axes.set_ylim(0.0, 1.03)  # all of it, or small changes look large
        own = {arm: UNTRAINED if arm in started else look[arm.trained_with or label(arm)] for arm in curves}
        return {
            _name(arm): _by_block(axes, own[arm], pd.DataFrame(values.swapaxes(1, 2).reshape(-1, values.shape[1])))
            for arm, values in curves.items()
        }

    title = f"Where CLS looks, by block: {place.dataset}"
    return [draw_panels(name_of("entropy", place.dataset, key=place), title, shown, paint, NOTES["entropy"])] if shown else []


def _accuracy(place: Place, title: str, arms: Arms, rows: Sequence[Row]) -> list[Plot]:
    """A figure for each protocol, in it a panel for each arm, a line for each readout."""
    curves = {arm: [block_curves(one, rows) for one in of] for arm, of in arms.items()}
    settings = dict.fromkeys(setting for seeds in curves.values() for of in seeds for setting, _ in of)
    metrics = {Setting.of(row): metric_of(row) for row in rows}
    return [
        _by_readout(setting, metrics[setting], title, curves)
        for setting in settings
        if setting.dataset == place.dataset and setting.data[:8] == place.data
    ]


def _by_readout(setting: Setting, metric: str, recipe: str, curves: Mapping[Arm, list[Curves]]) -> Plot:
    found = {arm: ordered(spec for of in seeds for known, spec in of if known == setting) for arm, seeds in curves.items()}
    panels: dict[str, dict[str, pd.DataFrame]] = {}  # share of right answers [seed, block], by arm and readout
    left_out = []
    for arm, specs in found.items():
        seeds = f", {len(curves[arm])} seeds" if len(curves[arm]) > 1 else ""
        whole = [spec for spec in specs if all((setting, spec) in of for of in curves[arm])]
        left_out += [f"{_name(arm)} read {spec}" for spec in specs if spec not in whole]
        if specs:
            panels[_name(arm) + seeds] = {spec: pd.DataFrame([of[setting, spec] for of in curves[arm]]) for spec in whole}
    look = looks(ordered(spec for of in panels.values() for spec in of))

    def paint(axes: Axes, readouts: Mapping[str, pd.DataFrame]) -> dict[str, Artist]:
        axes.set_ylabel(f"{METRIC_NAMES[metric]}, %")
        return {f"read {spec}": _by_block(axes, look[spec], 100 * of.dropna(axis="columns")) for spec, of in readouts.items()}

    title = f"Accuracy by block: {recipe} · {setting.dataset} · {setting.rule}"
    note = NOTES["blocks"] + (f" Left out, since a seed lacks it: {', '.join(left_out)}." if left_out else "")
    return draw_panels(name_of("blocks", recipe, setting.dataset, setting.protocol, key=setting), title, panels, paint, note)


def _similarity(place: Place, recipe: str, arms: Arms) -> list[Plot]:
    """Mean over seeds; a panel for each arm whose seeds were all read in the same ways."""
    matrices = {_name(arm): matrix for arm, of in arms.items() if (matrix := _matrix(of)) is not None}

    def paint(axes: Axes, values: pd.DataFrame) -> dict[str, Artist]:
        axes.pcolormesh(values.to_numpy(), cmap="Blues", vmin=0.0, vmax=1.0, edgecolors="white")
        for (row, column), value in np.ndenumerate(values.to_numpy()):
            ink = "white" if value > 0.6 else "black"
            axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
        places = [place + 0.5 for place in range(len(values))]
        axes.set_xticks(places, values.columns, rotation=30, ha="right")
        axes.set_yticks(places, values.columns)
        axes.invert_yaxis()
        axes.grid(visible=False)
        return {}

    title = f"Similarity of the readouts (debiased linear CKA): {recipe} · {place.dataset}"
    name = name_of("cka", recipe, place.dataset, key=place)
    return [draw_panels(name, title, matrices, paint, NOTES["cka"], height=3.0, share=False)] if matrices else []


def _matrix(of: Sequence[Diagnosis]) -> pd.DataFrame | None:
    """CKA of each pair of readouts, mean over seeds; None where a seed lacks one, or there is no pair."""
    seeds = [{(pair["a"], pair["b"]): pair["cka"] for pair in one.found["cka"]["pairs"]} for one in of]
    if not seeds[0] or any(list(known) != list(seeds[0]) or None in known.values() for known in seeds):
        return None
    names = ordered(name for pair in seeds[0] for name in pair)
    values = pd.DataFrame(np.eye(len(names)), names, names)
    for (a, b), cka in pd.DataFrame(seeds).mean().items():
        values.loc[a, b] = values.loc[b, a] = cka
    return values


def _by_block(axes: Axes, look: Look, values: pd.DataFrame) -> Artist:
    """Mean and standard deviation of the lines of a frame with a column for each block."""
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return curve(axes, look, list(values.columns), values.mean().tolist(), values.std(ddof=0).tolist())

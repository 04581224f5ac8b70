"""Do two protocols agree? A linear probe against k-NN: a dot for each arm, readout and seed."""

from collections.abc import Mapping

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval.arms import Arm, Setting, ordered
from ssl_vit_eval.comparison import Comparison
from ssl_vit_eval.models import PIXELS
from ssl_vit_eval.plots import SOFT, Plot, draw, legend, looks, name_of, panels, size_of, wrapped
from ssl_vit_eval.scores import scores_by_seed
from ssl_vit_eval.verdict import Side

Points = dict[str, dict[Side, list[tuple[float, float]]]]  # x and y in %, a point a seed, by recipe
NEIGHBOURS, LINEAR = "knn", ("logreg", "linear")  # how the names of protocols begin


def plots(comparison: Comparison) -> list[Plot]:
    """A figure for each data set and pair of k-NN and linear protocol; readouts of other blocks than the last are left out."""
    by_setting: dict[Setting, dict[Side, dict[int | None, float]]] = {}
    for (setting, side), seeds in scores_by_seed(comparison.rows).items():
        if side.read_with != PIXELS and not setting.control and ReadoutSpec.parse(side.read_with).blocks == (-1,):
            by_setting.setdefault(setting, {})[side] = seeds
    drawn = []
    for x, across in by_setting.items():
        for y, up in by_setting.items():
            if x[:3] == y[:3] and x.protocol.startswith(NEIGHBOURS) and y.protocol.startswith(LINEAR):
                points: Points = {}
                for side in across.keys() & up.keys():
                    both = [(100 * across[side][seed], 100 * up[side][seed]) for seed in across[side].keys() & up[side].keys()]
                    if both:
                        points.setdefault(_group(side.arm), {})[side] = sorted(both)
                if points:
                    drawn.append(_scatter(x, y, points))
    return drawn


def _group(arm: Arm) -> str:
    return arm.section if arm.trained_with else "not trained here"


def _scatter(x: Setting, y: Setting, points: Points) -> Plot:
    arms = ordered(str(side.arm.trained_with) for of in points.values() for side in of if side.arm.trained_with)
    specs = ordered(side.read_with for of in points.values() for side in of)
    colours, markers = looks(arms), looks(specs)

    def paint(figure: Figure) -> None:
        for axes, (title, of) in zip(panels(figure, len(points)), sorted(points.items()), strict=True):
            for (arm, spec), seeds in sorted(of.items(), key=str):
                colour = colours[arm.trained_with].colour if arm.trained_with else SOFT
                fill = colour if arm.trained_with else "none"
                xs, ys = zip(*seeds, strict=True)
                axes.scatter(xs, ys, s=26, marker=markers[spec].marker, facecolor=fill, edgecolor=colour, alpha=0.8)
            axes.set_title(wrapped(title, 3.0))
            axes.set_xlabel(f"{x.protocol}, top-1, %")
            axes.set_ylabel(f"{y.protocol}, top-1, %")
        legend(
            figure,
            _key({f"trained with {arm}": colours[arm].colour for arm in arms}, {f"read {spec}": markers[spec].marker for spec in specs}),
        )

    title = f"Linear probe against k-NN: {x.dataset} · {y.protocol} v{y.version} against {x.protocol} v{x.version}"
    name = name_of("agreement", x.dataset, x.protocol, y.protocol, key=(x, y))
    return draw(
        name, title, size_of(len(points)), paint, "A dot for each arm, readout of the last block, and seed. Hollow: not trained here."
    )


def _key(colours: Mapping[str, str], markers: Mapping[str, str]) -> dict[str, Artist]:
    key: dict[str, Artist] = {name: Line2D([], [], color=colour, linewidth=5) for name, colour in colours.items()}
    for name, marker in markers.items():
        key[name] = Line2D([], [], linestyle="", marker=marker, markerfacecolor="none", markeredgecolor="black")
    return key

"""What a pretraining did, as figures: the curves that it logged."""

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from ssl_vit_eval.compare.runs import Run
from ssl_vit_eval.report.plotting import Plot, curve, draw, legend, looks, name_of
from ssl_vit_eval.report.text import count

CURVES = {  # drawn where a method logs them
    "loss": ("loss", "Losses do not compare between methods."),
    "teacher_information": (
        "teacher information",
        "H(mean teacher output) − mean H(teacher output), as a share of ln k; near 0 the teacher has collapsed.",
    ),
    "knn_top1": ("k-NN top-1 while training (share)", "A monitor with fixed settings, not the protocol of the tables."),
}
POINTS = 200  # of a curve at most, so that long runs do not make the report large


def training_curves(runs: Sequence[Run]) -> list[Plot]:
    """For each recipe and logged curve a figure; in it a line for each run, which looks like its trained-with, seeds alike."""
    drawn = []
    for method, name in dict.fromkeys((run.recipe["method"], run.name) for run in runs):
        of = [run for run in runs if (run.recipe["method"], run.name) == (method, name)]
        for key, (text, note) in CURVES.items():
            logged = [(run.recipe["readout"], [(step["step"], step[key]) for step in run.metrics if key in step]) for run in of]
            if curves := [(spec, points) for spec, points in logged if points]:
                note = f"{count(len(curves), 'run')}, a line each. {note}"
                drawn.append(_curves(name_of("curve", method, name, key), f"{method} ({name}): {text}", curves, note))
    return drawn


def _curves(name: str, title: str, curves: list[tuple[str, list[tuple[int, float]]]], note: str) -> Plot:
    look = looks(spec for spec, _ in curves)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        lines: dict[str, Artist] = {}
        for spec, points in curves:
            steps, values = zip(*points[:: max(1, len(points) // POINTS)], points[-1], strict=True)
            # a curve of one or two values is seen by its markers only
            marker = look[spec].marker if len(points) < 3 else ""
            lines[f"trained with {spec}"] = curve(axes, look[spec], steps, values, marker=marker, linewidth=1.0, alpha=0.85)
        axes.set_xlabel("optimiser step")
        legend(figure, lines)

    return draw(name, title, (4.4, 2.5), paint, note)

"""Figures of attention and input-gradient maps: a row for each image, a column for each map."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from ssl_vit.files import write_atomically

CELL = 0.9  # inches
DPI = 100


def save_maps(images: UInt8[Tensor, "b 3 s s"], maps: Mapping[str, Float[Tensor, "b n"]], path: Path) -> None:
    """Draw the images and their maps (by title; values of the patches, row-major) as a PNG.

    Each map runs from 0 (dark) to its own maximum (bright): maps show where, not how much.
    """
    side = round(next(iter(maps.values())).shape[1] ** 0.5)
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    drawn = {title: values.reshape(len(images), side, side).float().cpu().numpy() for title, values in maps.items()}
    style: Any = {"text.parse_math": False, "font.size": 8}
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(CELL * (1 + len(maps)), CELL * len(images) + 0.5), dpi=DPI, layout=layout)
        grid = figure.subplots(len(images), 1 + len(maps), squeeze=False)
        for row, array in enumerate(arrays):
            grid[row, 0].imshow(array)
            for axes, values in zip(grid[row, 1:], drawn.values(), strict=True):
                axes.imshow(values[row], cmap="viridis", vmin=0, vmax=max(float(values[row].max()), 1e-12), interpolation="nearest")
        for axes, title in zip(grid[0], ("image", *drawn), strict=True):
            axes.set_title(title.replace("+", "+\n"), fontsize=8)
        for axes in grid.flat:
            axes.set_axis_off()
        write_atomically(path, partial(figure.savefig, format="png", metadata={"Software": None}))

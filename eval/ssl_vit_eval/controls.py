"""Controls: the same evaluation with one thing changed, to see what a number owes to it.

shuffled   train labels permuted: what remains is chance, or a leak
width      readouts wider than one token, projected at random to the width of one: what is left of their advantage is not width
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_vit.errors import UsageError, one_of

CONTROLS = ("shuffled", "width")
SHUFFLED = "shuffled labels"
PROJECTED = "projected to"
_ROWS = 8192  # at once: features may be mapped from disk


def check_controls(names: Sequence[str]) -> None:
    for name in names:
        if name not in CONTROLS:
            raise UsageError(f"unknown control {name!r}; {one_of(name, CONTROLS)}")


def controls_of(names: Sequence[str], width: int, token_width: int) -> list[str]:
    """What a row's `control` says for each evaluation of a readout `width` wide: itself (""), then the controls that it can have."""
    found = [""]
    if "shuffled" in names:
        found.append(SHUFFLED)
    if "width" in names and width > token_width:
        found.append(f"{PROJECTED} {token_width}")
    return found


def shuffled(y: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """The same labels on other images, always in the same way."""
    return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]


def projected(X: Float[Tensor, "n d"], width: int) -> Float[Tensor, "n width"]:
    """X through a fixed random matrix with orthonormal columns [d width] (Johnson & Lindenstrauss 1984): distances are kept on average.

    It depends on d and `width` alone, so that train and test, and all readouts of one width, meet the same one."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(X.shape[1], width, generator=generator, dtype=torch.float64))
    return torch.cat([rows @ basis.to(rows) for rows in torch.split(X, _ROWS)])

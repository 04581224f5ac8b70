"""Controls: the same evaluation with one thing changed, to see what a number owes to it.

shuffled   train labels permuted: what remains is chance, or a leak
width      of A + B all but A is taken from other images, then all but B: as wide, as many numbers to fit, and nothing to gain from the
           other half. What A + B is better by is not its width. (A random projection to the width of A would keep half of it.)
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_vit.errors import UsageError, one_of
from ssl_vit.model.readout import ReadoutSpec

CONTROLS = ("shuffled", "width")
SHUFFLED = "shuffled labels"
BESIDE = " beside shuffled"  # behind the term that is kept


def check_controls(names: Sequence[str]) -> None:
    for name in names:
        if name not in CONTROLS:
            raise UsageError(f"unknown control {name!r}; {one_of(name, CONTROLS)}")


def controls_of(names: Sequence[str], spec: str, fitted: bool) -> list[str]:
    """What a row's `control` says for each evaluation of a readout: itself (""), then the controls that it can have.

    fitted: whether the probe fits weights. k-NN does not: width gives it no advantage, so that it has no control of it."""
    found = ["", *[SHUFFLED] * ("shuffled" in names)]
    if fitted and "width" in names:
        parsed = ReadoutSpec.parse(spec)
        kept = parsed.terms if len(parsed.terms) > 1 else parsed.parts[1:][-1:]  # of a term at several blocks, the last one
        found += [f"{term}{BESIDE}" for term in kept]
    return found


def shuffled(y: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """The same labels on other images, always in the same way."""
    return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]


def controlled(X: Float[Tensor, "n d"], spec: str, control: str) -> Float[Tensor, "n d"]:
    """The features of a readout under a control of its width: the columns of all other terms come from other images, one for all."""
    if not control.endswith(BESIDE):
        return X
    parts, kept = ReadoutSpec.parse(spec).parts, ReadoutSpec.parse(control.removesuffix(BESIDE)).parts
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    others = X[order]  # the one copy
    for place, part in enumerate(parts):
        if part in kept:
            columns = slice(place * X.shape[1] // len(parts), (place + 1) * X.shape[1] // len(parts))
            others[:, columns] = X[:, columns]
    return others

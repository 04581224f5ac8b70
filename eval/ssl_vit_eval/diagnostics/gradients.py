"""Where in the image a readout looks: the size of its derivative by the pixels of each patch. Works for every readout, GAP included."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ssl_vit.model.backbone import patchify
from ssl_vit_eval.sources import Source

DIRECTIONS = 4  # maps of other 4 directions correlate by 0.998 with these


@torch.enable_grad()
def gradient_mass(source: Source, images: UInt8[Tensor, "b 3 s s"], specs: Sequence[str], seed: int = 0) -> dict[str, Float[Tensor, "b n"]]:
    """Each patch's share of the input gradient of each readout; shares sum to 1 over the patches of an image.

    |d (v . z) / d x| is summed over the channels and (normalised) pixels of a patch and over `DIRECTIONS` random v ~ N(0, I), which
    weigh all of z alike. The gradient of |z| would not: behind a final LayerNorm |z| is nearly constant, so its gradient vanishes
    for `cls` and not for `gap`, and compares the norms instead of the tokens. Shares are 0 where z does not depend on the image.
    """
    backbone = source.backbone
    assert backbone is not None
    leaves: list[Tensor] = []

    # taken at the backbone's door, so that the readouts are read by the very code that reads features
    def keep(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        leaves.append(inputs[0].requires_grad_())

    handle = backbone.register_forward_pre_hook(keep)
    try:
        features = source.features(images, specs)
    finally:
        handle.remove()
    (x,) = leaves
    masses: dict[str, Tensor] = {}
    for spec, z in features.items():
        directions = torch.randn(DIRECTIONS, z.shape[1], generator=torch.Generator().manual_seed(seed)).to(z)
        gradients = (torch.autograd.grad((z @ v).sum(), x, retain_graph=True)[0].abs() for v in directions)
        mass = sum((patchify(gradient, backbone.patch).sum(dim=-1) for gradient in gradients), x.new_zeros(()))
        masses[spec] = mass / mass.sum(dim=1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    return masses

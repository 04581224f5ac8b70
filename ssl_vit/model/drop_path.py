"""Stochastic depth whose draws belong to the images, not to the batch in which they turn up."""

import torch
from jaxtyping import Float
from timm.layers import DropPath as TimmDropPath
from torch import Tensor, nn


class DropPath(nn.Module):
    """In training, leave a residual branch out for an image with probability `drop_prob`, else divide it by 1 - drop_prob (Huang et al.
    2016, section 3), as timm's does.

    u: numbers in [0, 1), one an image, which `Backbone` sets before each call of a block. None: drawn from torch, which depends on how a
    batch is cut into ranks and micro-batches.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.u: Float[Tensor, " b"] | None = None

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if not self.training:
            return x
        u = torch.rand(len(x), device=x.device) if self.u is None else self.u
        return x * ((u >= self.drop_prob).to(x.dtype) / (1 - self.drop_prob))[:, None, None]


def replace_drop_path(block: nn.Module) -> None:
    """timm's modules by those above."""
    for name, module in list(block.named_modules()):
        if isinstance(module, TimmDropPath):
            block.set_submodule(name, DropPath(module.drop_prob))

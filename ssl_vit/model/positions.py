"""Positions of the patches: MAE's fixed ones, and any for another grid."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.errors import UsageError

_BICUBIC: dict[Any, Tensor] = {}


def bicubic(old: tuple[int, int], new: tuple[int, int], like: Tensor) -> Float[Tensor, "m n"]:
    """The matrix that takes positions [n d] of the grid `old` to those of `new`, [m d], in the dtype and on the device of `like`.

    As in DINO's code (`interpolate_pos_encoding`): bicubic, not antialiased, the new side enlarged by 0.1, which moves the sampled
    points. A constant product, so its backward pass is one too: deterministic, where that of `F.interpolate` is not on CUDA."""
    key = (tuple(old), new, like.dtype, like.device)
    if key in _BICUBIC:
        return _BICUBIC[key]
    unit = torch.eye(old[0] * old[1], dtype=torch.float64, device=like.device).view(-1, 1, *old)
    scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    matrix = F.interpolate(unit, scale_factor=scale, mode="bicubic").flatten(1).T.to(like.dtype).contiguous()
    if type(matrix) is Tensor:  # not a fake one of a tracer
        _BICUBIC[key] = matrix
    return matrix


def sincos_positions(width: int, grid: int) -> Float[Tensor, "1 n d"]:
    """Fixed 2-D sine-cosine positions, row-major: the first half of the channels encodes the column, the second the row."""
    if width % 4:
        raise UsageError(f"sine-cosine positions need a width that is a multiple of 4, got {width}; change backbone.width")
    omega = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid d/2]
    columns, rows = line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float()[None]

"""AdamW as DINO and MAE use it: which parameters decay, how the rate scales, and DINO's clipping."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from ssl_vit.errors import check_numbers
from ssl_vit.model.config import BelowOne


@dataclass(frozen=True)
class OptimConfig:
    """AdamW.

    Args:
        lr: base learning rate for a global batch of 256 images; the rate used is lr * batch_size / 256.
        min_lr: the rate at the last step (cosine), not scaled.
        warmup_epochs: linear warm-up, in epochs; fractions are fine.
        weight_decay: at the first step, on matrices only.
        weight_decay_end: at the last step (cosine).
        betas: AdamW's.
    """

    lr: float
    min_lr: float
    warmup_epochs: float
    weight_decay: float
    weight_decay_end: float
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        least_0 = dict.fromkeys(("min_lr", "warmup_epochs", "weight_decay", "weight_decay_end"), NonNegativeFloat)
        check_numbers("optim.", vars(self), lr=PositiveFloat, betas=BelowOne, **least_0)


def parameter_groups(module: nn.Module) -> list[dict[str, object]]:
    """Two groups of the trainable parameters: with weight decay, and without it (biases, norms and other 1-D parameters)."""
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    plain = {name for name, p in trainable if p.ndim <= 1 or name.endswith(".bias")}
    return [
        {"name": "decay", "params": [p for name, p in trainable if name not in plain]},
        {"name": "no_decay", "params": [p for name, p in trainable if name in plain], "weight_decay": 0.0},
    ]


def adamw(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """torch's AdamW, as one kernel where there is one for the device."""
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in module.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(module), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=fused)
    optimizer._step_supports_amp_scaling = False  # gradients are unscaled before clipping, not in the kernel
    return optimizer


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale every parameter's gradient to a norm of at most `max_norm`, each on its own (DINO's `clip_gradients`).

    Not Lightning's `gradient_clip_val`, which bounds the norm over all parameters together."""
    grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    if grads:
        norms = torch.stack(torch._foreach_norm(grads))
        torch._foreach_mul_(grads, (max_norm / (norms + 1e-6)).clamp(max=1.0).unbind())

"""Linear heads trained by SGD or LARS for a whole grid of learning rates and weight decays at once: the linear probes of DINO (Caron et al.
2021, section 4.1), MAE (He et al. 2022, appendix A.1) and DINOv2 (Oquab et al. 2024, section 7.1) on frozen features."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor

from ssl_vit_eval.distributed import device
from ssl_vit_eval.probes import gradient_descent
from ssl_vit_eval.probes.base import seeds_of
from ssl_vit_eval.probes.gradient_descent import COURSE, TRAINED, Course, Heads, Schedule, Training
from ssl_vit_eval.probes.selection import Parameters, points
from ssl_vit_eval.schema import NotNegative

PARAMETERS: dict[str, Any] = TRAINED | COURSE | {"schedule": Schedule, "init_std": NotNegative, "optimizer": Literal["sgd", "lars"]}
PARAMETERS |= {"momentum": Annotated[float, Field(ge=0, lt=1)], "normalise": Literal["none", "standardise", "batchnorm"]}
_TRUST = 0.001  # of LARS, as in MAE's evaluation
_NORM_EPS, _NORM_MOMENTUM = 1e-6, 0.1  # of the batch norm, as there


def training(parameters: Parameters, dtype: torch.dtype = torch.float32) -> Training:
    """What the parameters of a `linear` protocol ask for; UsageError as `Course`.

    lr: base rates, for 256 images a step: the rate is `lr * images a step / 256`, of a dataset smaller than `batch_size` with that many.
    normalise: nothing, by mean and standard deviation of train, or by a batch norm without parameters, whose running statistics normalise
    what is answered. init_std: of the normal weights that all heads of a width and a seed start from; biases start at 0. The rest:
    `Course`, `LinearHeads`, `seeds_of`.
    """
    p = parameters
    axes = rates_and_decays(p)
    grid = points(axes)

    def build(seeds: Sequence[int], width: int, classes: int, batch: int) -> LinearHeads:
        generators = (torch.Generator().manual_seed(seed) for seed in seeds)
        start = torch.stack([torch.randn(classes, width, generator=of) for of in generators]).to(dtype) * p["init_std"]
        lr = [point["lr"] * batch / 256 for point in grid]
        weight_decay = [point["weight_decay"] for point in grid]
        return LinearHeads(start, lr, weight_decay, p["momentum"], p["optimizer"] == "lars", p["normalise"] == "batchnorm")

    course = Course(p["batch_size"], p["epochs"], p["iterations"], p["warmup_epochs"], p["schedule"], seeds_of(p))
    return Training(axes, course, p["normalise"] == "standardise", build)


run = partial(gradient_descent.run, training)  # the protocol kind `linear`


def rates_and_decays(parameters: Parameters) -> dict[str, list[float]]:
    """The axes of the grid, ascending."""
    return {name: sorted(map(float, parameters[name])) for name in ("lr", "weight_decay")}


class LinearHeads(Heads):
    """W [R, G * c, d] and biases of G heads for each of R readouts and seeds.

    A step is one product for all logits, one for all gradients, and the optimiser written over whole tensors: no autograd, whose
    bookkeeping costs more than the arithmetic of one head. With `lars` (You et al. 2017, in MAE's form) the gradient of each head's
    weight, its decay included, is scaled to 0.001 of the weight's norm before the momentum; a bias has neither decay nor scaling.
    Otherwise the update is that of `torch.optim.SGD`, whose decay includes the bias.

    Args:
        start: the weights that the G heads start from; their dtype is that of all arithmetic.
        lr, weight_decay: of each head.
        norm: batch norm without parameters before the heads (`BatchNorm1d(affine=False, eps=1e-6)`): one for all heads of a readout.
    """

    def __init__(
        self,
        start: Float[Tensor, "r c d"],
        lr: Sequence[float],
        weight_decay: Sequence[float],
        momentum: float,
        lars: bool,
        norm: bool,
    ) -> None:
        r, c, d = start.shape
        self.shape = (r, len(lr), c, d)
        self.parameters = c * d + c
        self.momentum, self.lars = momentum, lars
        start = start.to(device())
        self.weight = start.repeat(1, len(lr), 1)
        self.bias = start.new_zeros(r, len(lr) * c, 1)
        self.weight_buffer, self.bias_buffer = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        # a row for each row of W
        self.lr, self.weight_decay = (start.new_tensor(values).repeat_interleave(c)[:, None] for values in (lr, weight_decay))
        self.decays = max(weight_decay) > 0
        # running mean and variance of the batch norm, as BatchNorm1d starts them
        self.running = (start.new_zeros(r, 1, d), start.new_ones(r, 1, d)) if norm else None

    def step(self, x: Float[Tensor, "r b d"], targets: Int64[Tensor, "r b"], rate: float) -> None:
        r, g, c, _ = self.shape
        b = targets.shape[1]
        if self.running is not None:
            x = self._batch_normed(x)
        # classes before images: with few classes a softmax down the columns is vectorised, one along the rows is not
        residual = torch.baddbmm(self.bias, self.weight, x.mT).view(r, g, c, b).softmax(dim=2)
        # no gradient feels what is below; subnormal numbers, which high rates make many of, would slow a CPU's products tenfold
        torch.threshold_(residual, 1e-30, 0.0)
        residual.scatter_add_(2, targets[:, None, None].expand(r, g, 1, b), residual.new_full((1, 1, 1, 1), -1.0).expand(r, g, 1, b))
        residual = residual.view(r, g * c, b)
        self.bias_buffer.mul_(self.momentum).add_(residual.sum(dim=2, keepdim=True), alpha=1 / b)
        if self.lars:
            gradient = torch.bmm(residual, x).div_(b).addcmul_(self.weight, self.weight_decay)
            self.weight_buffer.mul_(self.momentum).addcmul_(gradient, self._trust(gradient))
        else:
            self.weight_buffer.baddbmm_(residual, x, beta=self.momentum, alpha=1 / b)
            if self.decays:
                self.weight_buffer.addcmul_(self.weight, self.weight_decay)
                self.bias_buffer.addcmul_(self.bias, self.weight_decay)
        self.weight.addcmul_(self.weight_buffer, self.lr, value=-rate)
        self.bias.addcmul_(self.bias_buffer, self.lr, value=-rate)

    def logits(self, x: Float[Tensor, "r m d"]) -> Float[Tensor, "r g c m"]:
        if self.running is not None:
            x = (x - self.running[0]) * (self.running[1] + _NORM_EPS).rsqrt()
        return torch.baddbmm(self.bias, self.weight, x.mT).view(*self.shape[:3], x.shape[1])

    def finite(self) -> Bool[Tensor, "r g"]:
        r, g, _, _ = self.shape
        return torch.isfinite(self.weight.view(r, g, -1)).all(dim=2) & torch.isfinite(self.bias.view(r, g, -1)).all(dim=2)

    def _trust(self, gradient: Float[Tensor, "r gc d"]) -> Float[Tensor, "r gc 1"]:
        r, g, c, _ = self.shape
        weight_norm, norm = (of.view(r, g, -1).norm(dim=2) for of in (self.weight, gradient))
        trust = torch.where((weight_norm > 0) & (norm > 0), _TRUST * weight_norm / norm, 1.0)
        return trust.repeat_interleave(c, dim=1)[:, :, None]

    def _batch_normed(self, x: Float[Tensor, "r b d"]) -> Float[Tensor, "r b d"]:
        assert self.running is not None
        b = x.shape[1]
        var, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        self.running[0].lerp_(mean, _NORM_MOMENTUM)
        self.running[1].lerp_(var * (b / max(1, b - 1)), _NORM_MOMENTUM)  # unbiased there, biased in the batch
        return (x - mean) * (var + _NORM_EPS).rsqrt()

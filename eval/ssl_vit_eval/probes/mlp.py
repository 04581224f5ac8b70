"""A multi-layer perceptron with one hidden layer as a probe: a grid of them trained at once by AdamW on standardised features.

It asks what a readout holds that a linear probe cannot take out. More parameters fit more by chance, too: they are in the row.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ssl_vit_eval.distributed import device
from ssl_vit_eval.probes import gradient_descent
from ssl_vit_eval.probes.base import seeds_of
from ssl_vit_eval.probes.gradient_descent import TRAINED, Course, Heads, Training
from ssl_vit_eval.probes.linear import rates_and_decays
from ssl_vit_eval.probes.selection import Parameters, points
from ssl_vit_eval.schema import Count

PARAMETERS: dict[str, Any] = TRAINED | {"hidden": Count, "iterations": Count}
_BETAS, _EPS = (0.9, 0.999), 1e-8  # of AdamW, as everywhere


def training(parameters: Parameters, dtype: torch.dtype = torch.float32) -> Training:
    """What the parameters of an `mlp` protocol ask for.

    lr: the rates themselves, whatever the batch, which fall to 0 along a half cosine."""
    p = parameters
    axes = rates_and_decays(p)
    lr, weight_decay = ([point[name] for point in points(axes)] for name in ("lr", "weight_decay"))

    def build(seeds: Sequence[int], width: int, classes: int, batch: int) -> MLPHeads:
        return MLPHeads(seeds, (width, p["hidden"], classes), lr, weight_decay, dtype)

    return Training(axes, Course(p["batch_size"], 0.0, p["iterations"], 0.0, "iteration", seeds_of(p)), True, build)


run = partial(gradient_descent.run, training)  # the protocol kind `mlp`


class MLPHeads(Heads):
    """G perceptrons d -> hidden -> c with GELU for each of R readouts and seeds, from the weights that `nn.Linear` would draw by the seed.

    Args:
        seeds: R of them.
        widths: d, hidden, c.
        lr, weight_decay: of each head, as `torch.optim.AdamW` takes them; the decay includes the biases.
    """

    def __init__(
        self, seeds: Sequence[int], widths: tuple[int, int, int], lr: Sequence[float], weight_decay: Sequence[float], dtype: torch.dtype
    ) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.weights: list[Tensor] = []  # W1 [R G hidden d], b1 [R G hidden 1], W2 [R G c hidden], b2 [R G c 1]
        for inputs, outputs in pairwise(widths):
            for columns in (inputs, 1):
                start = torch.stack([torch.rand(outputs, columns, generator=of) for of in generators])
                self.weights.append(((2 * start - 1) / inputs**0.5)[:, None].to(device(), dtype).repeat(1, len(lr), 1, 1))
        self.parameters = sum(weight[0, 0].numel() for weight in self.weights)
        self.first, self.second = ([torch.zeros_like(weight) for weight in self.weights] for _ in range(2))
        self.lr, self.weight_decay = (self.weights[0].new_tensor(values)[:, None, None] for values in (lr, weight_decay))
        self.steps = 0

    def step(self, x: Float[Tensor, "r b d"], targets: Int64[Tensor, "r b"], rate: float) -> None:
        with torch.enable_grad():
            for weight in self.weights:
                weight.requires_grad_()
            logits = self.logits(x)
            r, g, c, b = logits.shape
            # of each head the mean over the batch; a sum over heads leaves each its own gradient
            loss = F.cross_entropy(logits.view(r * g, c, b), targets.repeat_interleave(g, dim=0), reduction="sum") / b
            gradients = torch.autograd.grad(loss, self.weights)
        self.steps += 1
        lr = rate * self.lr
        one, two = (1 - beta**self.steps for beta in _BETAS)  # of a mean that starts from 0 (Kingma & Ba 2015, section 3)
        for weight, gradient, first, second in zip(self.weights, gradients, self.first, self.second, strict=True):
            weight.requires_grad_(False)
            first.lerp_(gradient, 1 - _BETAS[0])
            second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
            weight.mul_(1 - lr * self.weight_decay)
            weight.sub_(lr / one * first / ((second / two).sqrt_().add_(_EPS)))

    def logits(self, x: Float[Tensor, "r m d"]) -> Float[Tensor, "r g c m"]:
        W1, b1, W2, b2 = self.weights
        r, g, hidden, d = W1.shape
        values = torch.baddbmm(b1.view(r, g * hidden, 1), W1.view(r, g * hidden, d), x.mT)
        return b2 + W2 @ F.gelu(values).view(r, g, hidden, x.shape[1])

    def finite(self) -> Bool[Tensor, "r g"]:
        return torch.stack([torch.isfinite(weight).flatten(2).all(dim=2) for weight in self.weights]).all(dim=0)

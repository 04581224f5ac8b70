"""The projection head of DINO and what followed it (Caron et al. 2021, section 3.1 and appendix C)."""

from dataclasses import dataclass

from jaxtyping import Float
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from ssl_vit.errors import check_numbers


@dataclass(frozen=True)
class HeadConfig:
    """The projection head (section 3.1, appendix C): a 3-layer MLP, L2 normalisation, a weight-normalised last layer.

    Args:
        hidden: width of the two hidden layers.
        bottleneck: width before the prototypes.
        prototypes: number of outputs k (`out_dim`).
        norm_last_layer: keep the prototypes' norms fixed at 1; the authors recommend false for ViT-S.
        freeze_epochs: epochs at the start without updates of the last layer.
    """

    hidden: int = 2048
    bottleneck: int = 256
    prototypes: int = 65536
    norm_last_layer: bool = True
    freeze_epochs: float = 1.0

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("hidden", "bottleneck", "prototypes"), PositiveInt)
        check_numbers("head.", vars(self), **sizes, freeze_epochs=NonNegativeFloat)


class Head(nn.Module):
    """[b width] -> [b k] logits before the temperature."""

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = weight_norm(nn.Linear(config.bottleneck, config.prototypes, bias=False))
        gain = self.last.parametrizations.weight.original0
        nn.init.ones_(gain)
        gain.requires_grad = not config.norm_last_layer

    def forward(self, z: Float[Tensor, "b width"]) -> Float[Tensor, "b k"]:
        logits: Tensor = self.last(F.normalize(self.mlp(z), dim=-1))
        return logits

"""MAE (He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"), the decoder's one global token being a chosen readout."""

from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float, Int64
from jsonargparse.typing import PositiveFloat, PositiveInt
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_vit.data.rng import uniform
from ssl_vit.data.transforms import normalise
from ssl_vit.data.views import Batch, SingleCrop, single_crop
from ssl_vit.errors import UsageError, check_numbers
from ssl_vit.methods.base import Method, at_least_float32
from ssl_vit.methods.optim import OptimConfig
from ssl_vit.model.backbone import build_backbone, patchify
from ssl_vit.model.compiler import fusible, fusing
from ssl_vit.model.config import IN_RECIPE_UNLESS_DEFAULT, BackboneConfig
from ssl_vit.model.positions import sincos_positions
from ssl_vit.model.readout import Readout
from ssl_vit.model.tokens import Tokens
from ssl_vit.weights.checkpoint import start_from

MASK_STREAM = 0  # of the random numbers; those of the views are at 1000 and above


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder (section 3): small, and thrown away after pretraining.

    Args:
        width: token width, a multiple of `heads` and of 4.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: hidden width of the blocks' MLPs over `width`.
    """

    width: int = 512
    depth: int = 8
    heads: int = 16
    mlp_ratio: float = field(default=4.0, metadata=IN_RECIPE_UNLESS_DEFAULT)

    def __post_init__(self) -> None:
        check_numbers("decoder.", vars(self), width=PositiveInt, depth=PositiveInt, heads=PositiveInt, mlp_ratio=PositiveFloat)
        if self.width % self.heads or self.width % 4:
            raise UsageError(f"decoder.width {self.width} must be a multiple of decoder.heads ({self.heads}) and of 4")


class Decoder(nn.Module):
    """One global token and the visible patches -> pixels of all patches."""

    def __init__(self, width: int, grid: int, patch: int, config: DecoderConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(width, config.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position = nn.Buffer(sincos_positions(config.width, grid), persistent=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        block = partial(Block, config.width, config.heads, config.mlp_ratio, qkv_bias=True, norm_layer=norm)
        self.blocks = nn.Sequential(*[block() for _ in range(config.depth)])
        self.norm = norm(config.width)
        self.pixels = nn.Linear(config.width, patch * patch * 3)

    def forward(self, token: Float[Tensor, "b d"], visible: Float[Tensor, "b k d"], keep: Int64[Tensor, "b k"]) -> Float[Tensor, "b n p"]:
        x = self.embed(torch.cat([token[:, None], visible], dim=1))
        b, width = len(x), x.shape[-1]
        full = self.mask_token.to(x.dtype).expand(b, self.position.shape[1], width)
        full = full.scatter(1, keep[:, :, None].expand(-1, -1, width), x[:, 1:])
        x = torch.cat([x[:, :1], full + self.position], dim=1)  # the global token's slot has zero position, as the paper's CLS
        out: Tensor = self.pixels(self.norm(self.blocks(x)))
        return out[:, 1:]


class MAE(Method):
    """Masked autoencoding.

    Args:
        readout: the spec (cls, gap, register, ...), one token wide, whose vector is the decoder's global token beside the visible patches.
        backbone: the ViT; its positions are fixed sine-cosines.
        decoder: the decoder.
        crop: the one view of each image.
        mask_ratio: share of the patches that the encoder does not see.
        norm_pixels: predict patches normalised by their own mean and variance.
        optim: AdamW.
        seed: of the weights, the views, the masks and the order of the data.
        init: any source of `load_backbone` that the encoder starts from; decoder and learned readout start fresh.
    """

    name = "mae"
    default_optim = OptimConfig(lr=1.5e-4, min_lr=0.0, warmup_epochs=40.0, weight_decay=0.05, weight_decay_end=0.05, betas=(0.9, 0.95))

    def __init__(
        self,
        readout: str = "cls",
        backbone: BackboneConfig = BackboneConfig(name="vit_base_patch16_224"),
        decoder: DecoderConfig = DecoderConfig(),
        crop: SingleCrop = SingleCrop(),
        mask_ratio: float = 0.75,
        norm_pixels: bool = True,
        optim: OptimConfig = default_optim,
        seed: int = 0,
        init: str | None = None,
    ) -> None:
        super().__init__(locals())
        if crop.size != backbone.image_size:
            raise UsageError(f"crop.size is {crop.size}, backbone.image_size {backbone.image_size}; set both to the same")
        grid = backbone.image_size // backbone.patch
        self.n_patches, self.n_keep = grid**2, int(grid**2 * (1 - mask_ratio))
        if not 0 < self.n_keep < self.n_patches:
            raise UsageError(f"mask_ratio {mask_ratio} keeps {self.n_keep} of {self.n_patches} patches; it must keep some and mask some")
        self.crop, self.norm_pixels, self.crop_plan = crop, norm_pixels, crop.plan
        self.backbone = build_backbone(backbone)
        self.check_readout(self.backbone)
        if self.spec.width(1) != 1:
            raise UsageError(f"readout {readout!r} cannot be MAE's global token: it must be one token wide, e.g. cls, gap or register")
        self.decoder = Decoder(self.backbone.width, grid, backbone.patch, decoder)
        self.initialise()
        if init is not None:
            start_from(self.backbone, init)
        # drawn last, so that what the arms of a study share starts the same; and from its own start, as under any other loss
        self.readout = Readout(self.spec, self.backbone.width)

    def initialise(self) -> None:
        """The authors' start: Xavier for every matrix of encoder and decoder, the patch embedding as a Linear over the flattened
        kernel, fixed positions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        kernel = self.backbone.vit.patch_embed.proj.weight
        nn.init.xavier_uniform_(kernel.data.view(len(kernel), -1))
        nn.init.normal_(self.decoder.mask_token, std=0.02)
        grid = self.backbone.vit.patch_embed.grid_size[0]
        position = self.backbone.vit.pos_embed.data
        position.zero_()[:, -(grid**2) :] = sincos_positions(self.backbone.width, grid)  # a class token's own position is zero
        self.backbone.vit.pos_embed.requires_grad_(False)

    def views(self, batch: Batch) -> Float[Tensor, "b 3 s s"]:
        """One random resized crop, flipped or not; nothing else (section 4, "data augmentation"); normalised."""
        with fusing(self.compiled):
            return normalise(single_crop(batch, self.seed, self.crop), self.backbone.mean, self.backbone.std)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = self.views(batch)
        keep = random_keep(self.seed, batch.positions, self.n_patches, self.n_keep)
        prediction = self.predict_pixels(images, keep, self.drop_path_draws(batch.positions))
        with fusing(self.compiled):
            loss = mae_loss(at_least_float32(prediction), self.targets(images), masked(keep, self.n_patches))
        self.report(loss)
        return loss

    def predict_pixels(
        self, images: Float[Tensor, "b 3 s s"], keep: Int64[Tensor, "b k"], draws: Float[Tensor, "b depth m"] | None = None
    ) -> Float[Tensor, "b n p"]:
        """Encode the kept patches, decode all (section 3). draws: of drop path, as `Backbone` takes them."""
        tokens: Tokens = self.backbone(images, keep=keep, draws=draws)
        prediction: Tensor = self.decoder(self.readout(tokens), tokens.normed.patches, keep)
        return prediction

    def targets(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b n p"]:
        """The patches' pixels, each patch normalised by its own mean and unbiased variance (section 4, "reconstruction target")."""
        patches = patchify(images, self.backbone.patch)
        return own_normalised(patches) if self.norm_pixels else patches


@fusible
def own_normalised(patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b n p"]:
    return (patches - patches.mean(dim=-1, keepdim=True)) / (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def random_keep(seed: int, positions: Int64[Tensor, "b"], n: int, k: int) -> Int64[Tensor, "b k"]:
    """Per image, k of n patches without replacement: the first of an argsort of noise (section 3, "simple implementation")."""
    noise = uniform(seed, positions, MASK_STREAM, n)
    return noise.argsort(dim=1, stable=True)[:, :k]


def masked(keep: Int64[Tensor, "b k"], n: int) -> Bool[Tensor, "b n"]:
    """True where a patch is hidden from the encoder."""
    return torch.ones(len(keep), n, dtype=torch.bool, device=keep.device).scatter(1, keep, False)


@fusible
def mae_loss(prediction: Float[Tensor, "b n p"], target: Float[Tensor, "b n p"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Mean squared error, over the masked patches only (section 3, "reconstruction target")."""
    error = ((prediction - target) ** 2).mean(dim=-1)
    return (error * mask).sum() / mask.sum()

"""The backbone: a timm Vision Transformer that answers with named Tokens. All index arithmetic on the token sequence is here."""

import difflib
import hashlib
import warnings
from itertools import repeat
from typing import Any, cast

import timm
import torch
from jaxtyping import Float, Int64
from timm.layers import DropPath as TimmDropPath
from timm.layers import trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ssl_vit.errors import UsageError
from ssl_vit.model.config import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig, Channels
from ssl_vit.model.positions import bicubic
from ssl_vit.model.precision import exact
from ssl_vit.model.readout import Readout, ReadoutSpec
from ssl_vit.model.tokens import Tokens


class DropPath(nn.Module):
    """Stochastic depth whose draws belong to the images, not to the batch in which they turn up.

    In training, leave a residual branch out for an image with probability `drop_prob`, else divide it by 1 - drop_prob (Huang et al.
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


class Backbone(nn.Module):
    """A timm ViT with named output.

    >>> tokens = backbone(images)                             # the last block's Tokens
    >>> tokens = backbone(images, blocks=spec.blocks)         # and those of other blocks: tokens.at(7)
    >>> tokens = backbone(images, keep=kept)                  # only these patches are embedded and encoded (MAE, section 3)

    Attributes: width d, depth, patch, image_size, cls_tokens t, registers r; mean and std of the input normalisation;
    trained_readout, what its loss was attached to, with the trained parameters (None for a model that is not from here).
    """

    def __init__(self, vit: nn.Module, image_size: int, mean: Channels = IMAGENET_MEAN, std: Channels = IMAGENET_STD) -> None:
        super().__init__()
        self.vit: Any
        self.vit = vit
        self.mean, self.std = mean, std
        self.image_size = image_size
        self.trained_readout: Readout | None = None
        self.width: int = self.vit.embed_dim
        self.depth = len(self.vit.blocks)
        self.patch: int = self.vit.patch_embed.patch_size[0]
        register_token = getattr(self.vit, "reg_token", None)  # not every family of timm counts them (`num_reg_tokens`)
        self.registers: int = 0 if register_token is None else register_token.shape[1]
        self.cls_tokens: int = self.vit.num_prefix_tokens - self.registers
        self.checkpointing = False
        self._notified: set[tuple[int, int]] = set()
        self._drop_paths = [[module for module in block.modules() if isinstance(module, DropPath)] for block in self.vit.blocks]

    @property
    def norm(self) -> nn.Module:
        """The final norm, wherever timm keeps it (`fc_norm` in models that pool before they norm)."""
        own = getattr(self.vit, "norm", None)
        return cast(nn.Module, self.vit.fc_norm if own is None or isinstance(own, nn.Identity) else own)

    def weights_hash(self) -> str:
        """16 hex digits over all that the tokens depend on: the weights, what is done with them, the input normalisation."""
        digest = hashlib.sha256(repr((self.mean, self.std, self.patch)).encode())
        for name, settings in self.settings().items():
            digest.update(repr((name, *settings)).encode())
        for key, value in self.state_dict().items():
            digest.update(repr((key, tuple(value.shape), str(value.dtype))).encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def settings(self) -> dict[str, tuple[str, list[Any]]]:
        """By module: what the tokens depend on and the weights do not show."""
        found = {}
        for name, module in self.named_modules():
            if name.startswith("trained_readout"):  # its parameters, if it has any, are among the weights
                continue
            settings = [getattr(module, key) for key in ("num_heads", "eps", "approximate") if hasattr(module, key)]
            # activations have no weights that would tell them apart; what only training uses (dropout, drop path) is not a part of it
            acts = not any(True for _ in module.parameters()) and not type(module).__name__.startswith(("Identity", "Drop"))
            if settings or acts:
                found[name] = (type(module).__name__ if acts else "", settings)
        return found

    def check(self, spec: ReadoutSpec, name: str = "backbone") -> None:
        """UsageError unless this model can be read as `spec` says."""
        spec.check(self.cls_tokens, self.registers, self.depth, change=name)

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        blocks: tuple[int, ...] = (-1,),
        keep: Int64[Tensor, "b k"] | None = None,
        draws: Float[Tensor, "b depth n"] | None = None,
    ) -> Tokens:
        """Tokens before the final norm.

        images: normalised by mean and std. blocks: which blocks to keep, negative from the last.
        keep: indices of the patches to encode, row-major, one row an image; all of them if None.
        draws: numbers in [0, 1) for the `draws_of_block` drop paths of each block; from torch if None.
        """
        self._notice_other_size(images)
        images = images.to(self.vit.patch_embed.proj.weight.dtype)
        try:
            wanted = sorted({range(self.depth)[block] for block in blocks})
        except IndexError as error:
            raise UsageError(f"blocks {blocks} are not all in this model; its {self.depth} count from 0 to {self.depth - 1}") from error
        if type(self.vit) is VisionTransformer:
            outputs = self._forward_plain(images, wanted, keep, draws)
        elif keep is None:
            outputs = self.vit.forward_intermediates(
                images, indices=wanted, return_prefix_tokens=True, norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True
            )
        else:
            raise UsageError(f"masked forward needs a plain ViT of timm, such as vit_base_patch16_224, got {type(self.vit).__name__}")
        parts = {number: self._named(output, number) for number, output in zip(wanted, outputs, strict=True)}
        deepest = parts.pop(wanted[-1])
        return Tokens(deepest.cls, deepest.registers, deepest.patches, self.norm, deepest.block, self.depth, others=parts)

    def _named(self, output: Any, block: int) -> Tokens:
        if isinstance(output, tuple):
            patches, prefix = output
        else:  # no class token and no register
            patches, prefix = output, output[:, :0]
        return Tokens(prefix[:, : self.cls_tokens], prefix[:, self.cls_tokens :], patches, self.norm, block, self.depth)

    @property
    def draws_of_block(self) -> int:
        """Numbers that a block's drop paths take at most."""
        return max(map(len, self._drop_paths))

    def _through(self, number: int, x: Tensor, draws: Tensor | None) -> Tensor:
        """One block, with its own draws also where it is computed again in the backward pass."""
        drop_paths = self._drop_paths[number]
        for module, u in zip(drop_paths, repeat(None) if draws is None else draws[:, number].unbind(1), strict=False):
            module.u = u
        out: Tensor = self.vit.blocks[number](x)
        return out

    def _forward_plain(self, images: Tensor, wanted: list[int], keep: Tensor | None, draws: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        vit = self.vit
        x = vit.norm_pre(vit.pos_drop(self._embed(images, keep)))
        outputs = []
        for number in range(wanted[-1] + 1):
            again = self.checkpointing and self.training and torch.is_grad_enabled()
            x = checkpoint(self._through, number, x, draws, use_reentrant=False) if again else self._through(number, x, draws)
            if number in wanted:
                outputs.append((x[:, vit.num_prefix_tokens :], x[:, : vit.num_prefix_tokens]))
        return outputs

    def _embed(self, images: Tensor, keep: Tensor | None) -> Float[Tensor, "b _ d"]:
        """Class token, registers and patches, each with its position: what goes into the first block."""
        vit = self.vit
        prefix = [token.expand(len(images), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        if keep is None and not images.is_cuda:
            x = vit.patch_embed(images)
            x = x.flatten(1, 2) if x.ndim == 4 else x
        else:  # the convolution as a matrix product, on the kept patches alone; on a GPU the convolution is slow (benchmarks/gpu.log)
            kernel, patches = vit.patch_embed.proj, patchify(images, self.patch)
            if keep is not None:
                patches = patches.gather(1, keep[:, :, None].expand(-1, -1, 3 * self.patch**2))
            x = vit.patch_embed.norm(F.linear(patches, kernel.weight.permute(0, 2, 3, 1).flatten(1), kernel.bias))
        if vit.pos_embed is not None:
            slots = 0 if vit.no_embed_class else vit.num_prefix_tokens
            position = vit.pos_embed[:, slots:]
            old, new = vit.patch_embed.grid_size, (images.shape[-2] // self.patch, images.shape[-1] // self.patch)
            if new != old:
                with exact(x.device):
                    position = bicubic(old, new, position) @ position
            if keep is not None:
                position = position.expand(len(x), -1, -1).gather(1, keep[:, :, None].expand(-1, -1, self.width))
            x = x + position
            if slots:  # registers have no position: what timm keeps in their slots is not trained
                own = [vit.pos_embed[:, : self.cls_tokens], vit.pos_embed[:, self.cls_tokens : slots].detach()]
                prefix = [torch.cat(prefix, dim=1) + torch.cat(own, dim=1)]
        return torch.cat([*prefix, x], dim=1)

    def _notice_other_size(self, images: Tensor) -> None:
        size = (images.shape[-2], images.shape[-1])
        if any(side % self.patch for side in size):
            shape = f"images of {size[0]} x {size[1]} px"
            raise UsageError(f"{shape} are not divisible by the patch of {self.patch} px; resize them to {self.image_size}")
        # Smaller crops are a part of training (DINO's local views); in evaluation another size is never silent.
        if not self.training and size != (self.image_size, self.image_size) and size not in self._notified:
            self._notified.add(size)
            warnings.warn(f"images of {size[0]} x {size[1]} px: positions interpolated from {self.image_size} px", stacklevel=3)


def patchify(images: Float[Tensor, "b 3 h w"], patch: int) -> Float[Tensor, "b n d"]:
    """Images as rows of patches, d = patch * patch * 3 in the order (row, column, channel) (MAE's `patchify`)."""
    b, c, h, w = images.shape
    grid = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def build_backbone(config: BackboneConfig, drop_path: float | None = None) -> Backbone:
    """A ViT with random weights, as the config says; `drop_path` replaces the config's (0 for a teacher).

    Positions (drawn by timm), class token and registers start at trunc_normal(.02), as the papers' do; registers have no position."""
    names = [name for name in timm.list_models(module="vision_transformer") if name.startswith("vit_")]
    if config.name not in names:
        near = difflib.get_close_matches(config.name, names, n=3, cutoff=0.3)
        raise UsageError(f"backbone.name {config.name!r} is not a Vision Transformer of timm; choose e.g. {', '.join(near or names[:3])}")
    rate = config.drop_path if drop_path is None else drop_path
    try:
        vit = timm.create_model(config.name, num_classes=0, global_pool="", drop_path_rate=rate, **config.timm_arguments())
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"timm cannot build {config.name} with {config}: {error}") from error
    for path, module in list(vit.blocks.named_modules()):
        if isinstance(module, TimmDropPath):
            vit.blocks.set_submodule(path, DropPath(module.drop_prob))
    for token in (vit.cls_token, vit.reg_token):
        if token is not None:  # timm's own start (std 1e-6) would make several registers copies of each other
            trunc_normal_(token, std=0.02)
    if config.cls_position:  # timm then has slots for registers too, which stay zero
        nn.init.zeros_(vit.pos_embed[:, 1 : vit.num_prefix_tokens])
    backbone = Backbone(vit, config.image_size, config.mean, config.std)
    backbone.checkpointing = config.checkpointing
    return backbone

"""What a frozen backbone attends to: its attention matrices, as statistics of each image, block and head."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_vit.errors import Failure
from ssl_vit.model.backbone import Backbone


class NoAttention(Failure):
    """This kind of model does not show its attention matrices."""


@contextmanager
def watched(backbone: Backbone, see: Callable[[int, Float[Tensor, "b heads s s"]], None]) -> Iterator[None]:
    """Inside, a forward of `backbone` calls `see(block, attention)` for each block: after the softmax, [b heads queries keys].

    The matrices are seen one block after the other and are not kept. timm's fused kernel never forms them, so it is switched off
    meanwhile. Raises NoAttention for a model whose blocks do not have one such matrix each; what was switched is restored in any case.
    """
    modules = [_attention_module(block, number) for number, block in enumerate(backbone.vit.blocks)]
    fused = [module.fused_attn for module in modules]
    with ExitStack() as hooks:
        try:
            for number, module in enumerate(modules):
                module.fused_attn = False
                handle = module.attn_drop.register_forward_pre_hook(partial(_show, number, module, see))
                hooks.callback(handle.remove)
            yield
        finally:
            for module, flag in zip(modules, fused, strict=True):
                module.fused_attn = flag


def _attention_module(block: nn.Module, number: int) -> Any:
    """timm's attention of one block, whichever the family: what can be fused, and drops attention weights where it is not."""
    found = [m for m in block.modules() if hasattr(m, "fused_attn") and isinstance(getattr(m, "attn_drop", None), nn.Module)]
    if len(found) != 1:
        raise NoAttention(f"block {number} ({type(block).__name__}) has {len(found)} attention modules that can be watched, it needs 1")
    return found[0]


def _show(number: int, module: Any, see: Callable[[int, Tensor], None], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    attention = inputs[0]
    # differential attention drops 2 x heads matrices and subtracts them afterwards: neither half is what the tokens are mixed by
    if attention.dim() != 4 or attention.shape[1] != module.num_heads or attention.shape[2] != attention.shape[3]:
        raise NoAttention(f"block {number} mixes its tokens by more than one softmax a head (shape {list(attention.shape)})")
    see(number, attention)


def attention_statistics(
    attention: Float[Tensor, "b heads s s"], cls: int, registers: int, columns: int
) -> dict[str, Float[Tensor, "b heads"] | None]:
    """Statistics of each image and head; rows of `attention` are queries, in the order class tokens, registers, patches.

    `columns` patches make a row of the image. Distances are in patches. CLS's are means over the class tokens, None where there are none:

    cls_entropy           H / log n of CLS's attention over the n patches, renormalised to sum 1: 1 is uniform, 0 a single patch
    cls_effective_patches exp(H)
    cls_self              what CLS gives to itself (before renormalising, as are the shares below)
    cls_spatial_variance  squared distance of CLS's attended patches from their mean position, weighted by the attention
    distance              between a patch and the patches that it attends to, weighted by the attention (renormalised over patches),
                          mean over the querying patches (Dosovitskiy et al. 2021, appendix on attention distance)
    TOKEN_from_patches    sink mass of cls0, ..., register0, ...: the share of attention that it gets from a patch, mean over patches
    TOKEN_from_all        the same, mean over all tokens as queries, itself among them
    """
    attention = attention.float()
    prefix = cls + registers
    n = attention.shape[-1] - prefix
    place = torch.arange(n, device=attention.device)
    places = torch.stack([place // columns, place % columns], dim=1).float()
    patches = attention[:, :, prefix:, prefix:]
    far = torch.einsum("bhqk,qk->bhq", patches, torch.cdist(places, places))
    statistics: dict[str, Tensor | None] = {"distance": (far / _positive(patches.sum(dim=-1))).mean(dim=-1)}

    own = cls_attention(attention, cls, registers)
    share = own / _positive(own.sum(dim=-1, keepdim=True))
    entropy = torch.special.entr(share).sum(dim=-1)
    spread = share @ places.square().sum(dim=1) - (share @ places).square().sum(dim=-1)
    of_cls = {
        "cls_entropy": entropy / (math.log(n) or 1.0),
        "cls_effective_patches": entropy.exp(),
        "cls_self": attention.diagonal(dim1=2, dim2=3)[:, :, :cls],
        "cls_spatial_variance": spread,
    }
    for name, values in of_cls.items():
        statistics[name] = values.mean(dim=-1) if cls else None

    names = [f"cls{i}" for i in range(cls)] + [f"register{i}" for i in range(registers)]
    for i, name in enumerate(names):
        statistics[f"{name}_from_patches"] = attention[:, :, prefix:, i].mean(dim=-1)
        statistics[f"{name}_from_all"] = attention[:, :, :, i].mean(dim=-1)
    return statistics


def cls_attention(attention: Float[Tensor, "b heads s s"], cls: int, registers: int) -> Float[Tensor, "b heads t n"]:
    """What each class token gives to each patch."""
    return attention[:, :, :cls, cls + registers :]


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)

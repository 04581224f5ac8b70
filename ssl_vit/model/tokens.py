"""Tokens: the named parts of a Vision Transformer's output, so that no reader counts positions in a sequence."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """One block's output for a batch, before the final norm, and that norm.

    cls        [b t d]  class tokens; t = 0 where the model has none
    registers  [b r d]  register tokens (Darcet et al. 2023); r = 0 where it has none
    patches    [b n d]  patch tokens, never the others; n = the kept ones after a masked forward
    norm                the model's final norm, applied by the readout and nowhere else
    block               which block wrote them, counted from 0
    others              the same for further blocks, if `backbone(images, blocks=...)` named them
    """

    cls: Float[Tensor, "b t d"]
    registers: Float[Tensor, "b r d"]
    patches: Float[Tensor, "b n d"]
    norm: Callable[[Tensor], Tensor]
    block: int
    depth: int
    others: Mapping[int, "Tokens"] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return self.patches.shape[-1]

    def at(self, block: int) -> "Tokens":
        """The tokens of one block; negative numbers count from the last. KeyError if the forward did not keep that block."""
        number = block + self.depth if block < 0 else block
        if number == self.block:
            return self
        if number not in self.others:
            kept = sorted({self.block, *self.others})
            raise KeyError(f"block {block} was not kept, only {kept} of depth {self.depth}; call backbone(images, blocks=spec.blocks)")
        return self.others[number]

    @cached_property
    def normed(self) -> "Tokens":
        """This block's, with the final norm applied to every token (norm first, then pool: `/post`)."""
        cls, registers, patches = self.norm(self.cls), self.norm(self.registers), self.norm(self.patches)
        return replace(self, cls=cls, registers=registers, patches=patches, norm=_already_normed, others={})


def _already_normed(x: Tensor) -> Tensor:
    raise ValueError("these tokens went through the final norm already; reading them through it again would be another readout")

"""Which Vision Transformer is trained: the `backbone` of a recipe."""

from dataclasses import dataclass, field
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt, restricted_number_type

from ssl_vit.errors import UsageError, check_numbers, require

Channels = tuple[float, float, float]
BelowOne = restricted_number_type("BelowOne", float, [(">=", 0), ("<", 1)], docstring="float restricted to be ≥0 and <1")
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
# Which fields a recipe, as it is stored, hashed and compared, leaves out: those that do not change the result, and later ones at
# their default, so that earlier runs keep their hashes and resume.
NOT_IN_RECIPE, IN_RECIPE_UNLESS_DEFAULT = {"recipe": "never"}, {"recipe": "unless default"}


@dataclass(frozen=True)
class BackboneConfig:
    """Which ViT is trained: a timm name, and sizes that replace that model's own where they are given.

    Args:
        name: a Vision Transformer of timm, e.g. vit_small_patch16_224.
        image_size: side of the (global) training view in pixels; a multiple of `patch`.
        patch: side of a patch in pixels.
        width: token width d; a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads.
        cls_tokens: 0 or 1 class token.
        registers: number of register tokens, without positions (Darcet et al. 2023).
        drop_path: stochastic depth of the trained network, growing to this rate at the last block.
        mlp_ratio: hidden width of the blocks' MLPs over the token width.
        cls_position: give the class token a position of its own, as the papers do (MAE's is fixed at zero). Without one it starts
            exchangeable with the registers: with one of them, the register readout is its null control.
        mean: of the input normalisation, per channel.
        std: of the input normalisation, per channel.
        compile: in training, compile the blocks and fuse views and loss. Equal within rounding: no part of the identity; nor is the next.
        checkpointing: compute each block again in the backward pass instead of keeping what is inside it: less memory, more time.
    """

    name: str = "vit_small_patch16_224"
    image_size: int = 224
    patch: int = 16
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    cls_tokens: int = 1
    registers: int = 0
    drop_path: float = 0.0
    mlp_ratio: float | None = field(default=None, metadata=IN_RECIPE_UNLESS_DEFAULT)
    cls_position: bool = field(default=False, metadata=IN_RECIPE_UNLESS_DEFAULT)
    mean: Channels = field(default=IMAGENET_MEAN, metadata=IN_RECIPE_UNLESS_DEFAULT)
    std: Channels = field(default=IMAGENET_STD, metadata=IN_RECIPE_UNLESS_DEFAULT)
    compile: bool = field(default=False, metadata=NOT_IN_RECIPE)
    checkpointing: bool = field(default=False, metadata=NOT_IN_RECIPE)

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("image_size", "patch", "width", "depth", "heads"), PositiveInt)
        check_numbers(
            "backbone.", vars(self), **sizes, registers=NonNegativeInt, mlp_ratio=PositiveFloat, std=PositiveFloat, drop_path=BelowOne
        )
        require(self.cls_tokens == 1 or not self.cls_position, "backbone.cls_position", True, "false without a class token")
        require(self.cls_tokens in (0, 1), "backbone.cls_tokens", self.cls_tokens, "0 or 1")
        near, side = round(self.image_size / self.patch) * self.patch or self.patch, self.image_size
        require(side % self.patch == 0, "backbone.image_size", side, f"a multiple of backbone.patch, {self.patch}, such as {near}")
        if self.width and self.heads and self.width % self.heads:
            raise UsageError(f"backbone.width {self.width} is not divisible by backbone.heads {self.heads}; change one of them")

    @classmethod
    def of(cls, recipe: dict[str, Any]) -> "BackboneConfig":
        """From a stored recipe's `backbone`, whose tuples are lists."""
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in recipe.items()}
        return cls(**fields)

    def timm_arguments(self) -> dict[str, Any]:
        """What `timm.create_model(self.name)` is told, here and in an exported folder."""
        sizes = {"embed_dim": self.width, "depth": self.depth, "num_heads": self.heads, "mlp_ratio": self.mlp_ratio}
        return {
            "img_size": self.image_size,
            "patch_size": self.patch,
            "class_token": self.cls_tokens == 1,
            "reg_tokens": self.registers,
            "no_embed_class": not self.cls_position,
            "dynamic_img_size": True,
            **{key: value for key, value in sizes.items() if value is not None},
        }

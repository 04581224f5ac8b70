"""What is evaluated: checkpoints, timm models and the two controls, each with what a row says of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from ssl_vit.backbone import Backbone
from ssl_vit.checkpoint import load_backbone, read_checkpoint
from ssl_vit.errors import UsageError
from ssl_vit.provenance import recipe_hash
from ssl_vit.readout import Readout, ReadoutSpec, available
from ssl_vit.transforms import normalise

PIXELS = "pixels"


@dataclass(frozen=True)
class Source:
    """One thing that turns images into features.

    name as the user would recognise it; method `dino`, `mae`, `timm`, `random` or `pixels`; trained_with the checkpoint's readout,
    None for what was not trained here; backbone None for raw pixels."""

    name: str
    method: str
    trained_with: str | None
    seed: int | None
    image_size: int
    weights: str  # hash
    recipe: str | None  # hash
    family: str | None  # hash of the recipe without readout and seed
    init: str | None  # hash of the weights that its training started from
    backbone: Backbone | None

    def readouts(self, asked: Sequence[str] | None, trained: Sequence[str] = ()) -> list[str]:
        """The asked specs in canonical form; UsageError if this source cannot be read in one of them.

        `trained` among the asked is this source's own readout; for a control, those of the checkpoints that it stands beside.
        None asks for each readout of one kind of token that the source has."""
        if self.backbone is None:
            for text in asked or ():
                if text != "trained":
                    ReadoutSpec.parse(text)
            return [PIXELS]
        if asked is None:
            return available(self.backbone.cls_tokens, self.backbone.registers)
        own = [self.trained_with] if self.trained_with else list(trained)
        if "trained" in asked and not own:
            raise UsageError(f"{self.name} was not trained with a readout here; name one instead of 'trained', e.g. cls or gap")
        specs = [ReadoutSpec.parse(spec) for text in asked for spec in (own if text == "trained" else [text])]
        for spec in specs:
            self.backbone.check(spec, name=self.name)
        return list(dict.fromkeys(map(str, specs)))

    def features(self, images: UInt8[Tensor, "b 3 s s"], specs: Sequence[str]) -> dict[str, Float[Tensor, "b _"]]:
        """All readouts of a batch from one forward pass."""
        x = images.float() / 255
        if self.backbone is None:
            return {PIXELS: x.flatten(1)}
        readouts = {spec: Readout(ReadoutSpec.parse(spec)) for spec in specs}
        blocks = tuple({block for readout in readouts.values() for block in readout.spec.blocks})
        tokens = self.backbone(normalise(x, self.backbone.mean, self.backbone.std), blocks=blocks)
        return {spec: readout(tokens).float() for spec, readout in readouts.items()}


def open_source(text: str) -> Source:
    """A checkpoint's path, `timm:NAME`, `random:RECIPE` (the recipe's own initialisation) or `pixels` / `pixels:SIZE` (default 32).

    UsageError for a name that is none of them, Failure for a file that is not a checkpoint."""
    if text == PIXELS or text.startswith(f"{PIXELS}:"):
        side = text.partition(":")[2] or "32"
        if not side.isdecimal() or int(side) == 0:
            raise UsageError(f"{text!r} needs a side in pixels above 0, e.g. pixels:32")
        return Source(text, "pixels", None, None, int(side), "pixels", None, None, None, None)
    if text.startswith("random:"):
        return random_source(text.removeprefix("random:"), [])
    if text.startswith("timm:"):
        backbone = load_backbone(text)
        return Source(text, "timm", None, None, backbone.image_size, backbone.weights_hash(), None, None, None, backbone)
    ours = read_checkpoint(text)["ssl_vit"]
    recipe, backbone = ours["recipe"], load_backbone(text)
    return _of_recipe(Path(text).parent.name or Path(text).stem, recipe["method"], ours["readout"], recipe, ours["init"], backbone)


def random_source(recipe: str, options: list[str]) -> Source:
    """The backbone that a recipe starts from: its architecture, its initialisation, its seed, and no training."""
    from ssl_vit.pretrain import build_method, parse_recipe  # lightning's parser, which the other sources do without

    parser, config = parse_recipe(recipe, options)
    module = build_method(config, parser.instantiate(config))
    backbone: Backbone = module.backbone.eval()
    file = Path(recipe)  # of a path, the last part that tells something: a run folder's recipe.yaml is named after the folder
    name = file.parent.name if file.stem == "recipe" and file.parent.name else file.stem
    return _of_recipe(f"random:{name}", "random", None, module.recipe, None, backbone)


def _of_recipe(name: str, method: str, trained_with: str | None, recipe: dict[str, Any], init: str | None, backbone: Backbone) -> Source:
    family = recipe_hash({key: value for key, value in recipe.items() if key not in ("readout", "seed")})
    weights = backbone.weights_hash()
    return Source(name, method, trained_with, recipe["seed"], backbone.image_size, weights, recipe_hash(recipe), family, init, backbone)

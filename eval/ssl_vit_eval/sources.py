"""What is evaluated: checkpoints, exported folders, the authors' weight files, timm models and the two controls, each with what a
row says of it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from ssl_vit.data.transforms import normalise
from ssl_vit.errors import UsageError
from ssl_vit.model.backbone import Backbone
from ssl_vit.model.readout import Readout, ReadoutSpec, available
from ssl_vit.provenance import recipe_hash
from ssl_vit.weights.checkpoint import backbone_of, is_ours, load_backbone, network_of, read_weights, split_network
from ssl_vit.weights.official import check_size, official_backbone
from ssl_vit_eval.distributed import device, in_memory

PIXELS = "pixels"


@dataclass(frozen=True)
class Source:
    """One thing that turns images into features.

    name as the user would recognise it, `:student` behind a student's; method `dino`, `mae`, `official-dino`, `official-mae`,
    `official-dinov2`, `timm`, `random` or `pixels`; trained_with the checkpoint's readout, None for what was not trained here (the
    official files do not say it); image_size the side in pixels of the images that `features` gets; backbone None for raw pixels."""

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
    recipe_name: str | None = None  # of what was trained here; of earlier checkpoints, method and backbone

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
            own = [self.trained_with] if self.trained_with else []
            return list(dict.fromkeys([*available(self.backbone.cls_tokens, self.backbone.registers), *own]))
        own = [self.trained_with] if self.trained_with else list(trained)
        if "trained" in asked and not own:
            raise UsageError(f"{self.name} was not trained with a readout here; name one instead of 'trained', e.g. cls or gap")
        specs = [ReadoutSpec.parse(spec) for text in asked for spec in (own if text == "trained" else [text])]
        for spec in specs:
            self.backbone.check(spec, name=self.name)
        return list(dict.fromkeys(map(str, specs)))

    def width(self, spec: str) -> int:
        """The number of features that a readout gives."""
        return 3 * self.image_size**2 if self.backbone is None else ReadoutSpec.parse(spec).width(self.backbone.width)

    def readout(self, text: str) -> Readout:
        """The readout that a spec names: of the trained one, the very module, with its parameters.

        UsageError for one with parameters that this source has not trained. ValueError if the backbone brings another trained
        readout than `trained_with` says: reading with it would answer a question that nobody asked."""
        assert self.backbone is not None
        spec, trained = ReadoutSpec.parse(text), self.backbone.trained_readout
        if (None if trained is None else str(trained.spec)) != self.trained_with:
            raise ValueError(f"{self.name} was trained with {self.trained_with}, but its backbone brings {trained}")
        if trained is not None and spec == trained.spec:
            return trained
        if spec.learned:
            raise UsageError(
                f"readout {text!r} has parameters, which {self.name} has not trained; evaluate it with --protocols attentive, "
                f"or choose one of: {', '.join(self.readouts(None))}"
            )
        return Readout(spec)

    def features(self, images: UInt8[Tensor, "b 3 s s"], specs: Sequence[str]) -> dict[str, Float[Tensor, "b _"]]:
        """All readouts of a batch from one forward pass. UsageError for images of a side that the model cannot read."""
        x = images.float() / 255
        if self.backbone is None:
            return {PIXELS: x.flatten(1)}
        side, own = images.shape[-1], self.backbone.image_size
        if side != own and not getattr(self.backbone.vit, "dynamic_img_size", False):
            raise UsageError(f"{self.name} was opened for images of {own} px, got {side}; give --image-size {side}")
        readouts = {spec: self.readout(spec) for spec in specs}
        blocks = tuple({block for readout in readouts.values() for block in readout.spec.blocks})
        tokens = self.backbone(normalise(x, self.backbone.mean, self.backbone.std), blocks=blocks)
        return {spec: readout(tokens).float() for spec, readout in readouts.items()}


@contextmanager
def on_device(sources: Iterable[Source]) -> Iterator[None]:
    """Their backbones on this process's accelerator inside; afterwards it has room for others. Failure where it has none for them."""
    backbones = [source.backbone for source in sources if source.backbone is not None]
    try:
        with in_memory():
            for backbone in backbones:
                backbone.to(device())
        yield
    finally:
        for backbone in backbones:
            backbone.cpu()


def open_source(text: str, image_size: int | None = None) -> Source:
    """What one SOURCE of the command line names.

    text: a checkpoint or an exported folder (`CKPT:student` for the student of a DINO run), a weights file of DINO, MAE or DINOv2 as
        their authors publish it (`FILE:student` of a full one), `timm:NAME`, `random:RECIPE` (the recipe's own initialisation) or
        `pixels` / `pixels:SIZE` (default 32).
    image_size: side in pixels of the images that it will get, positions being interpolated, with a warning; None for the source's
        own (official files: at most 224). Raw pixels have their size in their name and keep it.

    UsageError for a name that is none of them or a size that is not a multiple of the patch, Failure for a file that is not understood.
    """
    if text == PIXELS or text.startswith(f"{PIXELS}:"):
        side = text.partition(":")[2] or "32"
        if not side.isdecimal() or int(side) == 0:
            raise UsageError(f"{text!r} needs a side in pixels above 0, e.g. pixels:32")
        return Source(text, "pixels", None, None, int(side), "pixels", None, None, None, None)
    if text.startswith("random:"):
        return random_source(text.removeprefix("random:"), [], image_size)
    if text.startswith("timm:"):
        return _not_ours(text, "timm", load_backbone(text, image_size=image_size))
    path, which = split_network(text)
    content = read_weights(path)
    if not is_ours(content):
        family, backbone = official_backbone(content, path, which, image_size)
        return _not_ours(Path(path).stem + _suffix(which), f"official-{family}", backbone)
    ours, network = content["ssl_vit"], network_of(content, path, which)
    backbone = backbone_of(content, path, which, image_size)
    name = _run_name(Path(path)) + _suffix(network)
    recipe, method = ours["recipe"], ours["recipe"]["method"]
    recipe_name = ours.get("name") or f"{method} {recipe['backbone']['name'].partition('_patch')[0]}"
    return replace(_of_recipe(name, method, ours["readout"], recipe, ours["init"], backbone, image_size), recipe_name=recipe_name)


def random_source(recipe: str, options: list[str], image_size: int | None = None) -> Source:
    """The backbone that a recipe starts from: its architecture, its initialisation, its seed, and no training."""
    from ssl_vit.train.pretrain import build_method, parse_recipe, recipe_name  # lightning's parser, which the other sources do without

    parser, config = parse_recipe(recipe, options)
    module = build_method(config, parser.instantiate(config))
    backbone: Backbone = module.backbone.eval()
    check_size(image_size, backbone.patch, recipe)
    return _of_recipe(f"random:{recipe_name(recipe)}", "random", None, module.recipe, None, backbone, image_size)


def _run_name(path: Path) -> str:
    """A run's last checkpoint is named after its folder, another one after both (`run-epoch-0010`), an exported folder after itself."""
    if path.expanduser().is_dir():
        return path.resolve().name
    return path.parent.name if path.parent.name and path.stem == "last" else "-".join(filter(None, (path.parent.name, path.stem)))


def _suffix(network: str | None) -> str:
    return ":student" if network == "student" else ""


def _not_ours(name: str, method: str, backbone: Backbone) -> Source:
    return Source(name, method, None, None, backbone.image_size, backbone.weights_hash(), None, None, None, backbone)


def _of_recipe(
    name: str,
    method: str,
    trained_with: str | None,
    recipe: dict[str, Any],
    init: str | None,
    backbone: Backbone,
    image_size: int | None,
) -> Source:
    size, weights = image_size or backbone.image_size, backbone.weights_hash()
    return Source(name, method, trained_with, recipe["seed"], size, weights, recipe_hash(recipe), family_of(recipe), init, backbone)


def family_of(recipe: dict[str, Any]) -> str:
    """Hash of a recipe without its readout and seed: what the arms and seeds of one comparison share."""
    return recipe_hash({key: value for key, value in recipe.items() if key not in ("readout", "seed")})

"""Fair arms, asserted before anything trains: the arms of a start differ in what their loss is attached to, and in nothing else."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_vit.assets import read_yaml
from ssl_vit.data.images import ImageStore
from ssl_vit.data.loader import Order
from ssl_vit.data.stream import Stream
from ssl_vit.errors import UsageError
from ssl_vit.methods import Method
from ssl_vit.train.folder import recipe_changes
from ssl_vit.train.pretrain import build_method, parse_recipe
from ssl_vit_eval.study.plan import Cell, Start

IMAGES = 8  # of the first batch: views are functions of the seed and of an image's position in the stream, and of no other image
_OTHER = ("its sequence", "its first batch", "its first views")


class Fact(NamedTuple):
    """shown: what a message says of it; hash: of its values, so that no two models are held at a time."""

    shown: str
    hash: str = ""


class Beginning(NamedTuple):
    """How a training begins: all that arms have to share.

    recipe: without its readout; facts: every parameter and buffer but the readout's own, the length of the first block's sequence, and
    the batch and the views of the first step, of synthetic images. Masks and dropout follow from the seed.
    """

    recipe: dict[str, Any]
    facts: dict[str, Fact]


def check_fair(cells: Sequence[Cell]) -> str:
    """Assert it for the arms of every start, and that what was trained before had this recipe; a sentence that says what was compared.

    UsageError that names the arms and their first difference.
    """
    arms: dict[Start, list[Cell]] = defaultdict(list)
    for cell in cells:
        arms[cell.start].append(cell)
    most: Mapping[str, Fact] = {}
    for start, of in arms.items():
        first = beginning(method_of(of[0]))
        for cell in of[1:]:
            if found := difference(first, beginning(method_of(cell))):
                where = f"{start.name}, seed {start.seed}"
                raise UsageError(f"{where}: the arm {cell.readout} is not fair to {of[0].readout}: {found}; leave it to a study of its own")
        most = max(most, first.facts, key=len)
    held = f"cells: {len(cells)}, starts: {len(arms)}; up to {len(most) - len(_OTHER)} weights and {most['its sequence'].shown}"
    return f"fair arms: equal but for the readout in recipe, initial weights, sequence length, first batch and views ({held})"


def method_of(cell: Cell) -> Method:
    """The cell's method before its first step; UsageError for what it cannot be, or if its folder belongs to another recipe."""
    parser, config = parse_recipe(cell.start.recipe, cell.options)
    method = build_method(config, parser.instantiate(config))
    before = cell.folder / "recipe.yaml"
    if before.exists() and (changed := recipe_changes(read_yaml(before), method.recipe)):
        raise UsageError(f"{cell.folder} was trained with another recipe ({changed}); use the same one, or another --out")
    return method


def beginning(method: Method) -> Beginning:
    size = method.backbone.image_size
    pixels = torch.randint(0, 256, (2 * IMAGES, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = next(iter(Stream(ImageStore.stacked(pixels), Order(len(pixels), IMAGES, method.seed))))
    views = method.views(batch)
    views = (views,) if isinstance(views, Tensor) else views
    with torch.no_grad():
        seen = method.backbone(views[0].flatten(0, -4)[:1])
    weights = {name: value for name, value in method.state_dict().items() if "readout" not in name.split(".")}
    tokens = sum(kind.shape[1] for kind in (seen.cls, seen.registers, seen.patches))
    other = (Fact(f"{tokens} tokens"), Fact("another", _hash(batch.images, batch.sizes, batch.positions)), Fact("others", _hash(*views)))
    facts = {name: Fact(str(list(value.shape)), _hash(value)) for name, value in weights.items()}
    recipe = {key: value for key, value in method.recipe.items() if key != "readout"} | {"seed": method.seed}
    return Beginning(recipe, facts | dict(zip(_OTHER, other, strict=True)))


def difference(a: Beginning, b: Beginning) -> str:
    """The first difference in words, of the recipe, of a shape, of values; empty if there is none."""
    if changed := recipe_changes(a.recipe, b.recipe):
        return f"its recipe differs ({changed})"
    nothing, names = Fact("not there"), list({**a.facts, **b.facts})
    for name in names:
        one, other = a.facts.get(name, nothing), b.facts.get(name, nothing)
        if one.shown != other.shown:
            return f"{name} is {other.shown}, not {one.shown}"
    return next((f"{name} has other values" for name in names if a.facts[name] != b.facts[name]), "")


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

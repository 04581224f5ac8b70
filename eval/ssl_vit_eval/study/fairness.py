"""Fair arms, asserted before anything trains: the arms of a start differ in what their loss is attached to, and in nothing else."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssl_vit.assets import read_yaml
from ssl_vit.data.images import ImageStore
from ssl_vit.data.loader import Order
from ssl_vit.data.stream import Stream
from ssl_vit.errors import UsageError
from ssl_vit.methods import Method
from ssl_vit.train.pretrain import build_method, parse_recipe, recipe_changes
from ssl_vit_eval.study.plan import Cell, Start

PICTURES = 8  # of the first batch: views are functions of the seed and of a picture's position in the stream, and of no other picture


@dataclass(frozen=True)
class Beginning:
    """How a training begins: all that arms have to share. Hashes stand for tensors, so that no two models are held at a time.

    recipe: without its readout; weights: name -> shape and hash of every parameter and buffer but the readout's own; tokens: those
    that enter the first block; batch, views: of the first step, of synthetic pictures; masks and dropout follow from seed.
    """

    recipe: dict[str, Any]
    weights: dict[str, tuple[list[int], str]]
    tokens: int
    batch: str
    views: str
    seed: int


def check_fair(cells: Sequence[Cell]) -> str:
    """Assert it for the arms of every start, and that what was trained before had this recipe; a sentence that says what was compared.

    UsageError that names the arms and their first difference.
    """
    arms: dict[Start, list[Cell]] = defaultdict(list)
    for cell in cells:
        arms[cell.start].append(cell)
    weights = tokens = 0
    for start, of in arms.items():
        first = beginning(build(of[0]))
        for cell in of[1:]:
            if found := difference(first, beginning(build(cell))):
                where = f"{start.name}, seed {start.seed}"
                raise UsageError(f"{where}: the arm {cell.readout} is not fair to {of[0].readout}: {found}; leave it to a study of its own")
        weights, tokens = max(weights, len(first.weights)), max(tokens, first.tokens)
    held = f"{len(cells)} cells, {len(arms)} starts; up to {weights} weights and {tokens} tokens"
    return f"fair arms: equal but for the readout in recipe, initial weights, sequence length, first batch and views ({held})"


def build(cell: Cell) -> Method:
    """The cell's method before its first step; UsageError for what it cannot be, or if its folder belongs to another recipe."""
    parser, config = parse_recipe(cell.start.recipe, cell.options)
    method = build_method(config, parser.instantiate(config))
    before = cell.folder / "recipe.yaml"
    if before.exists() and (changed := recipe_changes(read_yaml(before), method.recipe)):
        raise UsageError(f"{cell.folder} was trained with another recipe ({changed}); use the same one, or another --out")
    return method


def beginning(method: Method) -> Beginning:
    size = method.backbone.image_size
    pixels = torch.randint(0, 256, (2 * PICTURES, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = next(iter(Stream(ImageStore.stacked(pixels), Order(len(pixels), PICTURES, method.seed))))
    views = method.views(batch)
    views = (views,) if isinstance(views, Tensor) else views
    with torch.no_grad():
        seen = method.backbone(views[0].flatten(0, -4)[:1])
    return Beginning(
        recipe={key: value for key, value in method.recipe.items() if key != "readout"},
        weights={
            name: (list(value.shape), _hash(value)) for name, value in method.state_dict().items() if "readout" not in name.split(".")
        },
        tokens=sum(kind.shape[1] for kind in (seen.cls, seen.registers, seen.patches)),
        batch=_hash(batch.images, batch.sizes, batch.positions),
        views=_hash(*views),
        seed=method.seed,
    )


def difference(a: Beginning, b: Beginning) -> str:
    """The first difference in words, empty if there is none."""
    if changed := recipe_changes(a.recipe, b.recipe):
        return f"its recipe differs ({changed})"
    for name in {**a.weights, **b.weights}:
        if name not in a.weights or name not in b.weights:
            return f"it {'lacks' if name in a.weights else 'alone has'} {name}"
        if a.weights[name][0] != b.weights[name][0]:
            return f"{name} is {b.weights[name][0]}, not {a.weights[name][0]}"
    if other := [name for name in a.weights if a.weights[name] != b.weights[name]]:
        return f"{other[0]} starts from other values"
    if a.tokens != b.tokens:
        return f"its sequence has {b.tokens} tokens, not {a.tokens}"
    return next((f"its first {what} are others" for what in ("batch", "views", "seed") if getattr(a, what) != getattr(b, what)), "")


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""`ssl-vit eval --diagnostics`: what is in the tokens of a frozen backbone, without labels. Numbers for a JSON file, and one picture."""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ssl_vit.data.images import ImageStore
from ssl_vit.data.transforms import normalise
from ssl_vit.errors import Failure, UsageError
from ssl_vit.model.backbone import Backbone
from ssl_vit.model.readout import ReadoutSpec
from ssl_vit_eval import distributed
from ssl_vit_eval.diagnostics.attention import NoAttention, attention_statistics, cls_attention, watched
from ssl_vit_eval.diagnostics.geometry import MADS, PERMUTATIONS, RANKS, alpha_req, cka_table, norm_histograms, rankme
from ssl_vit_eval.diagnostics.gradients import DIRECTIONS, gradient_mass
from ssl_vit_eval.diagnostics.maps import save_maps
from ssl_vit_eval.sources import Source

N_SPECTRA, N_TOKENS, N_GRADIENTS, N_PICTURES = 2048, 256, 32, 8
MAP_BLOCKS = 6
VALUES = 2**26  # of all blocks' tokens and one block's attention, held at once

DEFINITIONS = {
    "spread": "standard deviation over images",
    "rankme": "exp(-sum p log p), p = sigma / sum sigma + 1e-7, singular values of the features, not centred; compare at equal n and width",
    "alpha_req": f"-slope of log eigenvalue of the covariance over log rank, ranks {RANKS[0]} to {RANKS[1]} or the last; "
    "compare at equal n, width and range",
    "cka": f"debiased linear CKA (HSIC_1); null: images of b shuffled, {PERMUTATIONS} times",
    "norms": f"of tokens before the final norm; outliers above median + {MADS} MAD",
    "bimodality": "(skewness^2 + 1) / (excess kurtosis + 3 (n - 1)^2 / ((n - 2) (n - 3))); uniform 5/9",
    "cls_patch_cosine": "mean over patches, of raw tokens (pre) and behind the final norm (post)",
    "attention": "[block][head]; entropy H / log n over the n patches, renormalised; distances in patches; sinks as share of attention",
    "gradients": f"share of each patch in |d (v . z) / d pixels|, summed over {DIRECTIONS} random directions v; entropy H / log n",
}


def diagnose(
    source: Source, images: ImageStore, specs: Sequence[str], out: Path, n_images: int = N_SPECTRA, seed: int = 0
) -> dict[str, Any]:
    """All diagnostics of one source on `n_images` (or all) of the images, drawn by `seed`; a dictionary that JSON can hold.

    Images must have the source's size. Spectra and CKA are of all those drawn, attention and norms of the first 256, input gradients
    of the first 32, and the first 8 are drawn as `picture`, a PNG in `out`. A `specs` entry that reads only the last block, without
    parameters, is read at every block too. What a model does not have is None; a model that does not show its attention says so.
    Raises UsageError for raw pixels, for fewer than 4 images and for specs that the source lacks, Failure for features that are not finite.
    """
    if source.backbone is None:
        raise UsageError(f"{source.name} has no tokens to diagnose; give a checkpoint or another backbone")
    if min(n_images, len(images)) < 4:
        raise UsageError(f"diagnostics got {min(n_images, len(images))} images; give at least 4")
    backbone = source.backbone.to(distributed.device())
    specs = source.readouts(specs)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n_images]
    first = {n: chosen[:n] for n in (N_TOKENS, N_GRADIENTS, N_PICTURES)}
    spectra, cka = _features(source, backbone, images, chosen, specs, seed)
    gradients = _gradients(source, backbone, images, first[N_GRADIENTS], specs, seed)
    shown, _ = images.batch(first[N_PICTURES])
    digest = hashlib.sha256(shown.numpy().tobytes()).hexdigest()[:8]  # pictures of several data sets lie side by side
    picture = f"diagnostics-{re.sub(r'[^A-Za-z0-9._-]+', '-', source.name)}-{source.weights[:8]}-{digest}.png"
    result = {
        "source": source.name,
        "weights": source.weights,
        "trained_with": source.trained_with,
        "seed": seed,
        "image_size": source.image_size,
        "layout": {name: getattr(backbone, name) for name in ("patch", "width", "depth", "cls_tokens", "registers")},
        "spectra": {"n": len(chosen), "readouts": spectra},
        "cka": {"n": len(chosen), "pairs": cka},
        "tokens": {"n": len(first[N_TOKENS]), "blocks": _tokens(backbone, images, first[N_TOKENS])},
        "attention": {"n": len(first[N_TOKENS]), **_attention(backbone, images, first[N_TOKENS])},
        "gradients": {"n": len(first[N_GRADIENTS]), "readouts": {spec: _concentration(mass) for spec, mass in gradients.items()}},
        "picture": picture,
        "definitions": DEFINITIONS,
    }
    maps = _cls_maps(backbone, shown)
    maps |= {f"gradient\n{spec}": mass[: len(shown)] for spec, mass in gradients.items()}
    save_maps(shown, maps, out / picture)
    return result


def _features(
    source: Source, backbone: Backbone, images: ImageStore, chosen: Tensor, specs: Sequence[str], seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Spectra of each readout and block, and the similarity of the readouts."""
    names = [(spec, block, name) for spec in specs for block, name in at_each_block(spec, backbone.depth)]
    parts: dict[str, list[Tensor]] = {name: [] for _, _, name in names}
    with torch.no_grad():
        for batch in _batches(backbone, images, chosen, "features"):
            for name, values in source.features(batch, list(parts)).items():
                parts[name].append(values.cpu())
    spectra, last = [], {}
    for spec, block, name in names:
        X = torch.cat(parts[name]).to(distributed.device())
        if not (finite := X.isfinite().all(dim=1)).all():
            raise Failure(f"{source.name} read with {name} is not finite for test image {int(chosen[int(finite.int().argmin())])}")
        spectra.append({"readout": spec, "block": block, "width": X.shape[1], "rankme": rankme(X), "alpha_req": alpha_req(X)})
        last[spec] = X  # of its last block, in the end
    return spectra, cka_table(last, seed=seed)


def at_each_block(text: str, depth: int) -> list[tuple[int | None, str]]:
    """(block, spec) of a spec at every block; (None, spec) alone, if it names its blocks or has parameters, which belong to its own."""
    spec = ReadoutSpec.parse(text)
    if spec.learned or spec.blocks != (-1,):
        return [(None, text)]
    moved = [str(ReadoutSpec(tuple(replace(term, blocks=(block,)) for term in spec.terms))) for block in range(depth - 1)]
    return list(enumerate([*moved, text]))


@torch.no_grad()
def _tokens(backbone: Backbone, images: ImageStore, chosen: Tensor) -> list[dict[str, Any]]:
    """Norms and CLS-patch cosines of each block."""
    kinds = ("patches", "cls", "registers")
    norms: list[dict[str, list[Tensor]]] = [{kind: [] for kind in kinds} for _ in range(backbone.depth)]
    cosines: list[dict[str, list[Tensor]]] = [{"pre": [], "post": []} for _ in range(backbone.depth)]
    for batch in _batches(backbone, images, chosen, "tokens"):
        tokens = backbone(_normalised(backbone, batch), blocks=tuple(range(backbone.depth)))
        for block in range(backbone.depth):
            at = tokens.at(block)
            for kind in kinds:
                norms[block][kind].append(getattr(at, kind).norm(dim=-1))
            for name, read in (("pre", at), ("post", at.normed)):
                cosine = F.cosine_similarity(read.cls[:, :, None], read.patches[:, None], dim=-1)
                cosines[block][name].append(cosine.mean(dim=(1, 2)))
    return [
        {
            "block": block,
            "norms": norm_histograms({kind: torch.cat(values) for kind, values in norms[block].items()}),
            "cls_patch_cosine": {name: _spread(torch.cat(values)) for name, values in cosines[block].items()}
            if backbone.cls_tokens
            else None,
        }
        for block in range(backbone.depth)
    ]


@torch.no_grad()
def _attention(backbone: Backbone, images: ImageStore, chosen: Tensor) -> dict[str, Any]:
    """{available: True, STATISTIC: {mean, std}} by block and head, or {available: False, reason}."""
    seen: list[dict[str, list[Tensor] | None]] = [{} for _ in range(backbone.depth)]

    def see(block: int, attention: Tensor) -> None:
        columns = math.isqrt(attention.shape[-1] - backbone.cls_tokens - backbone.registers)
        for name, values in attention_statistics(attention, backbone.cls_tokens, backbone.registers, columns).items():
            of = seen[block].setdefault(name, None if values is None else [])
            if of is not None and values is not None:
                of.append(values.cpu())

    try:
        with watched(backbone, see):
            for batch in _batches(backbone, images, chosen, "attention"):
                backbone(_normalised(backbone, batch))
    except NoAttention as error:
        return {"available": False, "reason": str(error)}
    blocks = [{name: None if of is None else _spread(torch.cat(of)) for name, of in block.items()} for block in seen]

    def by_block(name: str) -> dict[str, Any] | None:
        values = [block[name] for block in blocks]
        return {key: [of[key] for of in values if of is not None] for key in ("mean", "std")} if None not in values else None

    return {"available": True, **{name: by_block(name) for name in blocks[0]}}


def _gradients(
    source: Source, backbone: Backbone, images: ImageStore, chosen: Tensor, specs: Sequence[str], seed: int
) -> dict[str, Float[Tensor, "b n"]]:
    parts: dict[str, list[Tensor]] = {spec: [] for spec in specs}
    for batch in _batches(backbone, images, chosen, "gradients", share=16):  # what a block keeps for its derivative is 16 times its output
        for spec, mass in gradient_mass(source, batch, specs, seed).items():
            parts[spec].append(mass.cpu())
    return {spec: torch.cat(values) for spec, values in parts.items()}


def _concentration(mass: Float[Tensor, "b n"]) -> dict[str, Any]:
    n = mass.shape[1]
    entropy = torch.special.entr(mass).sum(dim=1)
    return {"entropy": _spread(entropy / (math.log(n) or 1.0)), "effective_patches": _spread(entropy.exp())}


@torch.no_grad()
def _cls_maps(backbone: Backbone, images: UInt8[Tensor, "b 3 s s"]) -> dict[str, Float[Tensor, "b n"]]:
    """CLS's attention to the patches, mean over heads (and class tokens), at up to `MAP_BLOCKS` blocks; none where it cannot be had."""
    count = min(MAP_BLOCKS, backbone.depth)
    blocks = {round(i * (backbone.depth - 1) / max(count - 1, 1)) for i in range(count)} if backbone.cls_tokens else set()
    maps: dict[str, Tensor] = {}

    def see(block: int, attention: Tensor) -> None:
        if block in blocks:
            own = cls_attention(attention, backbone.cls_tokens, backbone.registers)
            maps[f"attention\nblock {block}"] = own.float().mean(dim=(1, 2)).cpu()

    try:
        with watched(backbone, see):
            backbone(_normalised(backbone, images.to(distributed.device())))
    except NoAttention:
        maps.clear()
    return maps


def _batches(backbone: Backbone, images: ImageStore, chosen: Tensor, title: str, share: int = 1) -> Iterator[UInt8[Tensor, "b 3 s s"]]:
    """The chosen images on the device, so many at once that all blocks' tokens and one block's attention stay bounded."""
    side = images.batch(chosen[:1])[0].shape[-1]
    length = (side // backbone.patch) ** 2 + backbone.cls_tokens + backbone.registers
    at_once = VALUES // share // (2 * backbone.depth * length * backbone.width + 16 * length**2)
    for indices in tqdm(torch.split(chosen, min(max(at_once, 1), 256)), desc=title, leave=False):
        yield images.batch(indices)[0].to(distributed.device())


def _normalised(backbone: Backbone, images: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
    return normalise(images.float() / 255, backbone.mean, backbone.std)


def _spread(values: Float[Tensor, "b *rest"]) -> dict[str, Any]:
    """Mean and standard deviation over the images, as lists or numbers."""
    values = values.double()
    return {"mean": values.mean(dim=0).tolist(), "std": values.std(dim=0, correction=0).tolist()}

"""`ssl-vit eval --diagnostics`: what is in the tokens of a frozen backbone, without labels. Numbers for a JSON file, and one figure."""

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
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

VERSION = 2  # of what is measured: raised whenever a number could change, so that files of older code are measured again
N_SPECTRA, N_TOKENS, N_GRADIENTS, N_PICTURES = 2048, 256, 32, 8
MAP_BLOCKS = 6
KINDS = ("patches", "cls", "registers")  # of tokens
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
    of the first 32, and the first 8 are drawn as the PNG `picture` in `out`. A `specs` entry that reads only the last block, without
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
    spectra, cka = _features(source, backbone, images, chosen, specs, seed)
    blocks, attention, maps = _tokens(backbone, images, chosen[:N_TOKENS])
    gradients = _gradients(source, backbone, images, chosen[:N_GRADIENTS], specs, seed)
    shown, _ = images.batch(chosen[:N_PICTURES])
    digest = hashlib.sha256(shown.numpy().tobytes()).hexdigest()[:8]  # figures of several datasets lie side by side
    picture = f"diagnostics-{re.sub(r'[^A-Za-z0-9._-]+', '-', source.name)}-{source.weights[:8]}-{digest}.png"
    result = {
        "version": VERSION,
        "source": source.name,
        "weights": source.weights,
        "trained_with": source.trained_with,
        "seed": seed,
        "image_size": source.image_size,
        "layout": {name: getattr(backbone, name) for name in ("patch", "width", "depth", "cls_tokens", "registers")},
        "spectra": {"n": len(chosen), "readouts": spectra},
        "cka": {"n": len(chosen), "pairs": cka},
        "tokens": {"n": len(chosen[:N_TOKENS]), "blocks": blocks},
        "attention": {"n": len(chosen[:N_TOKENS]), **attention},
        "gradients": {"n": len(chosen[:N_GRADIENTS]), "readouts": {spec: _concentration(mass) for spec, mass in gradients.items()}},
        "picture": picture,
        "definitions": DEFINITIONS,
    }
    maps |= {f"gradient\n{spec}": mass for spec, mass in gradients.items()}
    save_maps(shown, {title: values[: len(shown)] for title, values in maps.items()}, out / picture)
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
    moved = [str(spec.at_block(block)) for block in range(depth - 1)]
    return list(enumerate([*moved, text]))


@torch.no_grad()
def _tokens(backbone: Backbone, images: ImageStore, chosen: Tensor) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Tensor]]:
    """Norms and CLS-patch cosines of each block; {available: True, STATISTIC: {mean, std}} by block and head, or {available: False,
    reason}; and CLS's attention to the patches of each image, mean over heads and class tokens, at up to `MAP_BLOCKS` blocks, by title."""
    depth, prefix = backbone.depth, (backbone.cls_tokens, backbone.registers)
    count = min(MAP_BLOCKS, depth)
    mapped = {round(i * (depth - 1) / max(count - 1, 1)) for i in range(count)} if backbone.cls_tokens else set()
    found: defaultdict[tuple[int, str], list[Tensor]] = defaultdict(list)
    seen: defaultdict[str, list[list[Tensor]]] = defaultdict(lambda: [[] for _ in range(depth)])
    maps: defaultdict[str, list[Tensor]] = defaultdict(list)

    def see(block: int, attention: Tensor) -> None:
        for name, values in attention_statistics(attention, *prefix, math.isqrt(attention.shape[-1] - sum(prefix))).items():
            seen[name][block] += [] if values is None else [values.cpu()]
        if block in mapped:
            maps[f"attention\nblock {block}"].append(cls_attention(attention, *prefix).float().mean(dim=(1, 2)).cpu())

    def measure() -> None:
        for batch in _batches(backbone, images, chosen, "tokens and attention"):
            tokens = backbone(_normalised(backbone, batch), blocks=tuple(range(depth)))
            for block in range(depth):
                at = tokens.at(block)
                for kind in KINDS:
                    found[block, kind].append(getattr(at, kind).norm(dim=-1))
                for name, read in (("pre", at), ("post", at.normed)):
                    cosine = F.cosine_similarity(read.cls[:, :, None], read.patches[:, None], dim=-1)
                    found[block, name].append(cosine.mean(dim=(1, 2)))

    try:
        with watched(backbone, see):
            measure()
        statistics = {name: [_spread(torch.cat(of)) for of in blocks if of] for name, blocks in seen.items()}
        attention: dict[str, Any] = {"available": True}
        for name, of in statistics.items():
            attention[name] = {key: [spread[key] for spread in of] for key in ("mean", "std")} if of else None
    except NoAttention as error:
        for noted in (found, maps):
            noted.clear()
        measure()
        attention = {"available": False, "reason": str(error)}
    blocks = [
        {
            "block": block,
            "norms": norm_histograms({kind: torch.cat(found[block, kind]) for kind in KINDS}),
            "cls_patch_cosine": {n: _spread(torch.cat(found[block, n])) for n in ("pre", "post")} if backbone.cls_tokens else None,
        }
        for block in range(depth)
    ]
    return blocks, attention, {title: torch.cat(of) for title, of in maps.items()}


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


def _batches(backbone: Backbone, images: ImageStore, chosen: Tensor, title: str, share: int = 1) -> Iterator[UInt8[Tensor, "b 3 s s"]]:
    """The chosen images on the device, so many at once that all blocks' tokens and one block's attention stay bounded."""
    side = images.batch(chosen[:1])[0].shape[-1]
    length = (side // backbone.patch) ** 2 + backbone.cls_tokens + backbone.registers
    at_once = VALUES // share // (2 * backbone.depth * length * backbone.width + 16 * length**2)
    for indices in tqdm(torch.split(chosen, min(max(at_once, 1), 256)), desc=title, leave=False, disable=None):
        yield images.batch(indices)[0].to(distributed.device())


def _normalised(backbone: Backbone, images: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
    return normalise(images.float() / 255, backbone.mean, backbone.std)


def _spread(values: Float[Tensor, "b *rest"]) -> dict[str, Any]:
    """Mean and standard deviation over the images, as lists or numbers."""
    values = values.double()
    return {"mean": values.mean(dim=0).tolist(), "std": values.std(dim=0, correction=0).tolist()}

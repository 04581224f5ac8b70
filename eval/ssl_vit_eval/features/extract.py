"""One pass over the images of a split yields the features of every readout, on disk."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from tqdm import tqdm

from ssl_vit.data.images import ImageStore
from ssl_vit.errors import Failure
from ssl_vit_eval.distributed import agreed, device, gather_objects, parts, rank
from ssl_vit_eval.features.store import FeatureFile, FeatureKey
from ssl_vit_eval.sources import Source

BATCH = 256  # images; the same for any number of processes, so that every image is computed in the same company


def cached_features(
    source: Source, images: ImageStore, specs: Sequence[str], folder: Path, data: str, split: str, transform: str, title: str
) -> Mapping[str, Float32[Tensor, "n _"]]:
    """The features of every readout, mapped from `folder`; those that are not there yet come from one pass.

    data: the split's fingerprint. Several processes share the folder and the pass. Failure for features that are not finite."""
    normalisation = "" if source.backbone is None else f"{source.backbone.mean} {source.backbone.std}"
    files = {}
    for spec in specs:
        width = source.width(spec)
        files[spec] = FeatureFile(folder, FeatureKey(source.weights, data, split, transform, normalisation, spec, len(images), width))
    found = {spec: file.read() for spec, file in files.items()}
    # the first process decides what is missing: another evaluation may just be finishing a file
    missing = gather_objects([spec for spec, values in found.items() if values is None])[0]
    if missing:
        extract(source, images, {spec: files[spec] for spec in missing}, title)
    features = {}
    for spec, file in files.items():
        values = file.read() if found[spec] is None else found[spec]
        if values is None:
            raise Failure(f"{title}: {file.path} was lost while it was read; evaluate again")
        features[spec] = values
    return features


@torch.no_grad()
def extract(source: Source, images: ImageStore, files: Mapping[str, FeatureFile], title: str) -> None:
    """One pass over `images`, this process's share of it, into the files of all readouts."""
    if source.backbone is not None:
        source.backbone.to(device())
    with ExitStack() as written:
        for file in files.values():
            written.enter_context(file.writing())
        written.enter_context(agreed())
        for start, batch in tqdm(
            batches(images), total=len(list(parts(len(images), BATCH))), desc=title, leave=False, disable=True if rank() else None
        ):
            for spec, values in source.features(batch.to(device()), list(files)).items():
                files[spec].write(start, _finite(values.cpu(), spec, start, title))


def batches(images: ImageStore) -> Iterator[tuple[int, UInt8[Tensor, "b 3 s s"]]]:
    """This process's batches and where each starts; the next one is decoded while this one is used."""
    ranges = list(parts(len(images), BATCH))
    with ThreadPoolExecutor(1) as ahead:
        waiting = [ahead.submit(images.batch, torch.arange(*ranges[0]))] if ranges else []
        for number, (start, _) in enumerate(ranges):
            batch, _ = waiting.pop().result()
            if number + 1 < len(ranges):
                waiting.append(ahead.submit(images.batch, torch.arange(*ranges[number + 1])))
            yield start, batch


def _finite(values: Float[Tensor, "b width"], spec: str, start: int, title: str) -> Float[Tensor, "b width"]:
    bad = (~torch.isfinite(values)).any(dim=1).nonzero()
    if len(bad):
        raise Failure(
            f"{title}: image {start + int(bad[0])} read with {spec} gives features that are not finite; "
            "look at the image and the weights, or leave this readout out"
        )
    return values

"""One pass over the images of a split yields the features of every readout of every source, on disk."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from ssl_vit.data.images import ImageStore
from ssl_vit.errors import Failure, UsageError
from ssl_vit_eval.distributed import agreed, device, gather_objects, in_memory, parts, rank
from ssl_vit_eval.features.store import FeatureFile, FeatureKey, check_room
from ssl_vit_eval.sources import Source, on_device
from ssl_vit_eval.splits import Split

BATCH = 256  # images; the same for any number of processes, so that every image is computed in the same company


@dataclass(frozen=True)
class Reading:
    """The features that one source gives of one split, by readout spec, and the files that they lie in. name: for messages."""

    source: Source
    files: dict[str, FeatureFile]
    name: str

    @classmethod
    def of(
        cls, source: Source, specs: Sequence[str], split: Split, data: str, transform: str, folder: Path, half: Collection[str]
    ) -> "Reading":
        """data: the fingerprint of the split. half: the specs that are stored in half precision."""
        normalisation = "" if source.backbone is None else f"{source.backbone.mean} {source.backbone.std}"
        key, n = (source.weights, data, split.split, transform, normalisation), len(split.images)
        types = {spec: "float16" if spec in half else "float32" for spec in specs}
        files = {spec: FeatureFile(folder, FeatureKey(*key, spec, n, source.width(spec), dtype=types[spec])) for spec in specs}
        return cls(source, files, f"{source.name}: {split.dataset} {split.split}")

    def features(self) -> dict[str, Float[Tensor, "n _"]]:
        """All of them, mapped from the disk."""
        return {spec: file.mapped() for spec, file in self.files.items()}


Lost = dict[tuple[int, str], Exception]  # what went wrong, by the place of the reading and the readout


def read_all(readings: Sequence[Reading], images: ImageStore) -> Lost:
    """See that the files of all readings are there: what is missing comes from one pass over the images, each decoded once for all.

    Several processes share the folder and the pass; all call it. What went wrong is given back: features that are not finite, no room
    on the disk or in memory, an image that cannot be decoded. Files of the other readouts are whole."""
    # the first process decides what is missing: another evaluation may just be finishing a file
    names = gather_objects([[spec for spec, file in of.files.items() if rank() == 0 and not file.is_whole()] for of in readings])[0]
    todo = {place: {spec: readings[place].files[spec] for spec in of} for place, of in enumerate(names) if of}
    if not todo:
        return {}
    try:
        with agreed():
            check_room([file for files in todo.values() for file in files.values()], ", ".join(readings[place].name for place in todo))
    except Failure as error:
        return {(place, spec): error for place, of in todo.items() for spec in of}
    failed: Lost = {}
    with ExitStack() as stack:
        for of in todo.values():
            for file in of.values():
                stack.enter_context(file.writing())
        _pass(readings, todo, images, failed)
        for other in gather_objects(failed):
            failed = other | failed
        for place, spec in failed:
            todo[place][spec].abandon()
    return failed


@torch.no_grad()
def _pass(readings: Sequence[Reading], todo: Mapping[int, Mapping[str, FeatureFile]], images: ImageStore, failed: Lost) -> None:
    """This process's share of the pass; what went wrong here goes into `failed`."""

    def left(place: int) -> list[str]:
        return [spec for spec in todo[place] if (place, spec) not in failed]

    names = [readings[place].name for place in todo]
    title, total = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), len(list(parts(len(images), BATCH)))
    with ExitStack() as stack:
        for place in todo:
            try:
                stack.enter_context(on_device([readings[place].source]))
            except Failure as error:
                failed |= {(place, spec): error for spec in left(place)}
        try:
            for start, batch in tqdm(batches(images), title, total, leave=False, unit="batch", disable=True if rank() else None):
                for place in filter(left, todo):
                    try:
                        with in_memory():
                            bad = _write(readings[place], {spec: todo[place][spec] for spec in left(place)}, start, batch)
                        failed |= {(place, spec): error for spec, error in bad.items()}
                    except (UsageError, Failure) as error:
                        failed |= {(place, spec): error for spec in left(place)}
        except Failure as error:  # of an image
            failed |= {(place, spec): error for place in todo for spec in left(place)}


def _write(reading: Reading, files: Mapping[str, FeatureFile], start: int, batch: UInt8[Tensor, "b 3 s s"]) -> dict[str, Failure]:
    """What is wrong, by readout; the others are written."""
    failed = {}
    for spec, values in reading.source.features(batch.to(device()), list(files)).items():
        bad = (~torch.isfinite(values)).any(dim=1).nonzero()
        if len(bad):
            failed[spec] = Failure(
                f"{reading.name}: image {start + int(bad[0])} read with {spec} gives features that are not finite; "
                "look at the image and the weights, or leave this readout out"
            )
        else:
            files[spec].write(start, values.cpu())
    return failed


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

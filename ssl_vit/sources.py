"""Where pictures come from: a name typed by the user becomes the decoded pictures, labels and class names of a split.

A source is `builtin:NAME`, a local folder (class folders, Parquet, Arrow; see folders.py) or a Hugging Face dataset id, `owner/name` or
`owner/name:config`. Labels are read only when asked for, which pretraining never does.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int64
from PIL import Image
from torch import Tensor

from ssl_vit import photos
from ssl_vit.columns import TEST_SHARE, Records, divided, read_records, with_classes_of
from ssl_vit.errors import Failure, UsageError, one_of
from ssl_vit.folders import VALIDATION, Tables, hf_datasets, local_tables
from ssl_vit.images import ImageStore, check_memory, decode, eval_transform, header_size, limit_side, to_tensor

_SAMPLE = 256
_BUILTINS = tuple(f"builtin:{name}" for name in photos.NAMES)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Split:
    """The decoded pictures of one split and what is known about them.

    `selection` marks the rows of a train split that are its fixed selection slice, None where the set has none. `fingerprint` is 16 hex
    digits of the stored pictures (encoded bytes, in order), labels and class names. `notices` are sentences to show to the user.
    """

    images: ImageStore
    labels: Int64[Tensor, "n"] | None
    classes: tuple[str, ...] | None
    selection: Bool[Tensor, "n"] | None
    dataset: str
    split: str
    fingerprint: str
    notices: tuple[str, ...]


def load_split(
    source: str,
    split: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: bool = False,
    size: int | None = None,
    max_side: int | None = None,
    progress: bool = True,
) -> Split:
    """One split of `source`, decoded into memory.

    `size` applies the eval transform (pictures of size x size px), `max_side` limits the shorter side in px, neither keeps the pictures
    as they are. Raises UsageError for an unknown source, split or column; Failure for corrupt pictures, missing labels, sets too large
    for the memory, and hub ids that cannot be fetched.
    """
    if source.startswith("builtin:"):
        return _builtin(source, split, labels, size, max_side)
    tables = _tables(source)
    name, notices = _find_split(source, split, list(tables))
    rows = read_records(source, name, tables, image_column, label_column, labels)
    return _decoded(rows, size, max_side, progress, notices)


def load_train_test(
    source: str,
    *,
    train_split: str | None = None,
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    size: int | None = None,
    progress: bool = True,
) -> tuple[Split, Split]:
    """Train and test of `source` with labels, for evaluation; the class ids of test are those of train, matched by name.

    Test is the split named test, else validation (val, valid), else a stratified 20 % of train made with seed 0 and taken out of it;
    `notices` say which. Raises as `load_split` does, and Failure when test holds a class that train lacks.
    """
    if test_split is not None and test_split == (train_split or "train"):
        raise UsageError(f"{source}: split {test_split!r} is asked for as train and as test; choose two different splits")
    if source.startswith("builtin:"):
        train, test = (_builtin(source, split, True, size, None) for split in (train_split or "train", test_split or "test"))
        return train, test
    tables = _tables(source)
    train_name, notices = _find_split(source, train_split or "train", list(tables))
    rest = [name for name in tables if name != train_name]
    train_rows = read_records(source, train_name, tables, image_column, label_column, True)
    if test_split is not None:
        test_name, more = _find_split(source, test_split, list(tables))
        # two names of the same split, or the only split there is
        if test_name == train_name:
            raise UsageError(f"{source}: split {test_name!r} would be both train and test; choose two different splits")
    else:
        found = next((name for name in ("test", *VALIDATION) if name in rest), None)
        test_name, more = found or train_name, tuple[str, ...]()
        if found in VALIDATION:
            more = (f"{source} has no split named test: its split {found!r} is the test set.",)
    if test_name == train_name:
        train_rows, test_rows = divided(train_rows)
        more = (
            f"{source} has no split to test on: a stratified {TEST_SHARE:.0%} of its {train_name!r} (seed 0) is taken out as the test set.",
        )
    else:
        test_rows = read_records(source, test_name, tables, image_column, label_column, True)
        test_rows, lacking = with_classes_of(train_rows, test_rows)
        more += lacking
    return _decoded(train_rows, size, None, progress, notices), _decoded(test_rows, size, None, progress, more)


def check_source(source: str) -> None:
    """UsageError or Failure, as `load_split`, for a name that cannot be one: an unknown builtin, a folder that is not there or holds
    no pictures. A hub id is asked for when it is loaded."""
    if source.startswith("builtin:"):
        _check_builtin(source)
    elif Path(source).expanduser().exists() or not _HUB_ID.fullmatch(source):
        _tables(source)


def _check_builtin(source: str) -> None:
    if source not in _BUILTINS:
        raise UsageError(f"no embedded set {source!r}; {one_of(source, _BUILTINS)}")


def _builtin(source: str, split: str, labels: bool, size: int | None, max_side: int | None) -> Split:
    _check_builtin(source)
    name = source.removeprefix("builtin:")
    if split not in ("train", "test"):
        raise UsageError(f"{source} has no split {split!r}; {one_of(split, ['train', 'test'])}")
    embedded = photos.photos(name)
    part = embedded.train if split == "train" else embedded.test
    images = ImageStore.stacked(part.images)
    if transform := _transform(size, max_side):
        pictures = (to_tensor(transform(Image.fromarray(image.permute(1, 2, 0).numpy()))) for image in part.images)
        images = ImageStore.decoded(pictures, len(part.images), source, False)
    digest = hashlib.blake2b(part.images.numpy().tobytes(), digest_size=8)
    chosen, classes = (part.labels, embedded.classes) if labels else (None, None)
    return Split(
        images, chosen, classes, part.selection if split == "train" else None, source, split, _fingerprint(digest, chosen, classes), ()
    )


def _tables(source: str) -> Tables:
    path = Path(source).expanduser()
    if path.exists():
        return local_tables(path.resolve())
    if source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source) or path.suffix in (".parquet", ".arrow"):
        raise UsageError(
            f"no such folder: {source}; give a local folder, a Hugging Face dataset id (owner/name), or {' or '.join(_BUILTINS)}"
        )
    return _hub_tables(source)


def _hub_tables(source: str) -> Tables:
    datasets = hf_datasets()
    from huggingface_hub import constants, get_session

    name, _, config = source.partition(":")
    advice = f"no folder {source!r} is here either; give a local folder"
    if not constants.HF_HUB_OFFLINE:
        try:
            # `datasets` itself would retry for 23 s before it gives up
            get_session().head(constants.ENDPOINT, timeout=3)
        except Exception as error:
            reason = f"{constants.ENDPOINT} does not answer"
            raise Failure(
                f"the dataset {name!r} cannot be fetched: {reason}; {advice} or set HF_HUB_OFFLINE=1 for a cached copy"
            ) from error
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Failure(f"the dataset {name!r} cannot be fetched{offline}: {reason}; {advice}") from error
    return {str(split): partial(_loaded, table) for split, table in loaded.items()}


def _loaded(table: Any, labels: bool) -> Any:
    return table


def _find_split(source: str, wanted: str, known: list[str]) -> tuple[str, tuple[str, ...]]:
    """The split meant by `wanted`: itself, another name of validation, or for train the only one there is (said in a notice)."""
    if wanted in known:
        return wanted, ()
    if wanted in VALIDATION and (alias := next((name for name in VALIDATION if name in known), None)):
        return alias, ()
    if wanted == "train" and len(known) == 1:
        return known[0], (f"{source} has no split named train: its only split, {known[0]!r}, is used.",)
    raise UsageError(f"{source} has no split {wanted!r}; {one_of(wanted, known)}")


def _transform(size: int | None, max_side: int | None) -> Callable[[Image.Image], Image.Image] | None:
    if size is not None:
        return partial(eval_transform, size=size)
    return partial(limit_side, max_side=max_side) if max_side is not None else None


def _decoded(rows: Records, size: int | None, max_side: int | None, progress: bool, notices: tuple[str, ...]) -> Split:
    count = len(rows.table)
    path = Path(rows.source).expanduser()
    dataset = path.resolve().name if path.exists() else rows.source
    title = f"{dataset}: {rows.split}"
    check_memory(count * _mean_bytes(rows, size, max_side), title)
    digest = hashlib.blake2b(digest_size=8)
    transform = _transform(size, max_side)

    def pictures() -> Iterator[Tensor]:
        for name, data in rows.encoded():
            digest.update(len(data).to_bytes(8, "little") + data)
            picture = decode(data, name)
            yield to_tensor(transform(picture) if transform else picture)

    images = ImageStore.decoded(pictures(), count, f"decoding {title}", progress)
    return Split(images, rows.labels, rows.classes, None, dataset, rows.split, _fingerprint(digest, rows.labels, rows.classes), notices)


def _mean_bytes(rows: Records, size: int | None, max_side: int | None) -> int:
    """Decoded bytes of a picture: by `size`, else the mean by the headers of some spread over the split."""
    if size is not None:
        return 3 * size * size
    sample = torch.linspace(0, len(rows.table) - 1, min(_SAMPLE, len(rows.table))).long()
    total = 0.0
    for name, data in rows.select(sample, rows.split).encoded():
        height, width = header_size(data, name)
        shrink = min(1.0, max_side / min(height, width)) if max_side is not None else 1.0
        total += 3 * height * width * shrink**2
    return round(total / len(sample))


def _fingerprint(digest: "hashlib.blake2b", labels: Tensor | None, classes: tuple[str, ...] | None) -> str:
    if labels is not None:
        digest.update(repr(classes).encode() + labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()

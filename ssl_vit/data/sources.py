"""Where pictures come from: a name typed by the user becomes the pictures, labels and class names of a split.

A source is `builtin:NAME`, a local folder (class folders, Parquet, Arrow; see folders.py; `$NAME/folder` works too) or a Hugging Face
dataset id, `owner/name` or `owner/name:config`. Labels are read only when asked for, which pretraining never does.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Int64
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ssl_vit.data import photos
from ssl_vit.data.columns import TEST_SHARE, Records, divided, joined, read_records, with_classes_of
from ssl_vit.data.folders import VALIDATION, Tables, local_path, local_tables
from ssl_vit.data.hub import hub_tables
from ssl_vit.data.images import CROP, Crop, EvalTransform, ImageStore, check_memory, decode, header_size, limit_side, to_tensor
from ssl_vit.data.lazy import EncodedImages
from ssl_vit.errors import UsageError, one_of

_SAMPLE = 256
_BUILTINS = tuple(f"builtin:{name}" for name in photos.NAMES)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Split:
    """The pictures of one split and what is known about them.

    `selection` marks the rows of a train split that are its fixed selection slice, None where the set has none. `notices` are sentences
    to show to the user. `content` computes the fingerprint.
    """

    images: ImageStore
    labels: Int64[Tensor, "n"] | None
    classes: tuple[str, ...] | None
    selection: Bool[Tensor, "n"] | None
    dataset: str
    split: str
    notices: tuple[str, ...]
    content: Callable[[], str]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the stored pictures (encoded bytes, in order), labels and class names; reads every picture, decodes none."""
        return self.content()


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
    """One split of `source`.

    With `size` the pictures go through the default eval transform to size x size px, and are decoded when they are asked for. Without,
    they are decoded into memory as they are, or reduced to a shorter side of `max_side` px. Raises UsageError for an unknown source,
    split or column; Failure for corrupt pictures, missing labels, sets too large for the memory, and hub ids that cannot be fetched.
    """
    transform = None if size is None else EvalTransform(size)
    if source.startswith("builtin:"):
        return _builtin(source, split, labels, transform, max_side)
    tables = _tables(source)
    name, notices = _find_split(source, split, list(tables))
    rows = read_records(source, name, tables, image_column, label_column, labels)
    return _decoded(rows, max_side, progress, notices) if transform is None else _encoded(rows, transform, progress, notices)


def load_train_test(
    source: str,
    *,
    size: int,
    crop: Crop = CROP,
    train_split: str | None = None,
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    progress: bool = True,
) -> tuple[Split, Split]:
    """Train and test of `source` with labels, for evaluation; the class ids of test are those of train, matched by name.

    The pictures go through `EvalTransform(size, crop)` and are decoded when they are asked for. Test is the split named test, else
    validation (val, valid), else a stratified 20 % of train made with seed 0 and taken out of it; `notices` say which. Several splits
    are joined as `train+validation`. Raises as `load_split` does, and Failure when test holds a class that train lacks.
    """
    transform = EvalTransform(size, crop)
    if test_split is not None and test_split == (train_split or "train"):
        raise UsageError(f"{source}: split {test_split!r} is asked for as train and as test; choose two different splits")
    if source.startswith("builtin:"):
        names = train_split or "train", test_split or "test"
        if names[0] == names[1]:
            raise UsageError(f"{source}: split {names[0]!r} would be both train and test; choose two different splits")
        train, test = (_builtin(source, split, True, transform, None) for split in names)
        return train, test
    tables = _tables(source)

    def read(splits: Sequence[str]) -> Records:
        return joined([read_records(source, split, tables, image_column, label_column, True) for split in splits])

    train_names, notices = _find_splits(source, train_split or "train", list(tables))
    more: tuple[str, ...] = ()
    if test_split is not None:
        test_names, more = _find_splits(source, test_split, list(tables))
        # two names of the same split, or the only split there is
        if both := [name for name in test_names if name in train_names]:
            raise UsageError(f"{source}: split {both[0]!r} would be both train and test; choose two different splits")
    else:
        test_names = [name for name in ("test", *VALIDATION) if name in tables and name not in train_names][:1]
        if test_names and test_names[0] in VALIDATION:
            more = (f"{source} has no split named test: its split {test_names[0]!r} is the test set.",)
    train_rows = read(train_names)
    if test_names:
        test_rows, lacking = with_classes_of(train_rows, read(test_names))
        more += lacking
    else:
        name, (train_rows, test_rows) = train_rows.split, divided(train_rows)
        more = (f"{source} has no split to test on: a stratified {TEST_SHARE:.0%} of its {name!r} (seed 0) is taken out as the test set.",)
    return _encoded(train_rows, transform, progress, notices), _encoded(test_rows, transform, progress, more)


def check_source(source: str) -> None:
    """UsageError or Failure, as `load_split`, for a name that cannot be one: an unknown builtin, a folder that is not there or holds
    no pictures. A hub id is asked for when it is loaded."""
    if source.startswith("builtin:"):
        _check_builtin(source)
    elif local_path(source).exists() or not _HUB_ID.fullmatch(source):
        _tables(source)


def _check_builtin(source: str) -> None:
    if source not in _BUILTINS:
        raise UsageError(f"no embedded set {source!r}; {one_of(source, _BUILTINS)}")


def _builtin(source: str, split: str, labels: bool, transform: EvalTransform | None, max_side: int | None) -> Split:
    _check_builtin(source)
    name = source.removeprefix("builtin:")
    if split not in ("train", "test"):
        raise UsageError(f"{source} has no split {split!r}; {one_of(split, ['train', 'test'])}")
    embedded = photos.photos(name)
    part = embedded.train if split == "train" else embedded.test
    stack = part.images

    def picture(row: int) -> Image.Image:
        return Image.fromarray(stack[row].permute(1, 2, 0).numpy())

    if transform is not None and transform.size != photos.PATCH:
        images: ImageStore = EncodedImages(lambda rows: [(f"{source}, row {row}", picture(row)) for row in rows], len(stack), transform)
    elif max_side is not None and max_side < photos.PATCH:
        images = ImageStore.decoded((to_tensor(limit_side(picture(row), max_side)) for row in range(len(stack))), len(stack), source, False)
    else:
        images = ImageStore.stacked(stack)
    chosen, classes = (part.labels, embedded.classes) if labels else (None, None)

    def content() -> str:
        return _fingerprint(hashlib.blake2b(stack.numpy().tobytes(), digest_size=8), chosen, classes)

    return Split(images, chosen, classes, part.selection if split == "train" else None, source, split, (), content)


def _tables(source: str) -> Tables:
    path = local_path(source)
    if path.exists():
        return local_tables(path.resolve())
    if unset := re.search(r"\$\w+|\$\{\w+\}", str(path)):
        raise UsageError(f"{source} names the environment variable {unset[0].strip('${}')}, which is not set: set it to a folder")
    if "$" in source:
        raise UsageError(f"no such folder: {source}, which is {path} here")
    if source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source) or path.suffix in (".parquet", ".arrow"):
        raise UsageError(
            f"no such folder: {source}; give a local folder, a Hugging Face dataset id (owner/name), or {' or '.join(_BUILTINS)}"
        )
    return hub_tables(source)


def _find_splits(source: str, wanted: str, known: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The splits meant by `train+validation`, each as `_find_split` finds it."""
    found = [_find_split(source, name, known) for name in wanted.split("+")]
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise UsageError(f"{source}: {wanted!r} names a split twice; name each once")
    return names, tuple(notice for _, notices in found for notice in notices)


def _find_split(source: str, wanted: str, known: list[str]) -> tuple[str, tuple[str, ...]]:
    """The split meant by `wanted`: itself, another name of validation, or for train the only one there is (said in a notice)."""
    if wanted in known:
        return wanted, ()
    if wanted in VALIDATION and (alias := next((name for name in VALIDATION if name in known), None)):
        return alias, ()
    if wanted == "train" and len(known) == 1:
        return known[0], (f"{source} has no split named train: its only split, {known[0]!r}, is used.",)
    raise UsageError(f"{source} has no split {wanted!r}; {one_of(wanted, known)}")


def _encoded(rows: Records, transform: EvalTransform, progress: bool, notices: tuple[str, ...]) -> Split:
    dataset = _name(rows.source)

    def content() -> str:
        digest = hashlib.blake2b(digest_size=8)
        title = f"reading {dataset}: {rows.split}"
        for _, data in tqdm(rows.encoded(), title, len(rows.table), leave=False, unit="img", disable=None if progress else True):
            _add(digest, data)
        return _fingerprint(digest, rows.labels, rows.classes)

    images = EncodedImages(rows.encoded_rows, len(rows.table), transform)
    return Split(images, rows.labels, rows.classes, None, dataset, rows.split, notices, content)


def _decoded(rows: Records, max_side: int | None, progress: bool, notices: tuple[str, ...]) -> Split:
    count, dataset = len(rows.table), _name(rows.source)
    title = f"{dataset}: {rows.split}"
    check_memory(count * _mean_bytes(rows, max_side), title)
    digest = hashlib.blake2b(digest_size=8)

    def pictures() -> Iterator[Tensor]:
        for name, data in rows.encoded():
            _add(digest, data)
            picture = decode(data, name)
            yield to_tensor(picture if max_side is None else limit_side(picture, max_side))

    images = ImageStore.decoded(pictures(), count, f"decoding {title}", progress)
    content = partial(_fingerprint, digest, rows.labels, rows.classes)
    return Split(images, rows.labels, rows.classes, None, dataset, rows.split, notices, content)


def _name(source: str) -> str:
    path = local_path(source)
    return path.resolve().name if path.exists() else source


def _mean_bytes(rows: Records, max_side: int | None) -> int:
    """Decoded bytes of a picture, by the headers of some spread over the split."""
    sample = torch.linspace(0, len(rows.table) - 1, min(_SAMPLE, len(rows.table))).long()
    total = 0.0
    for name, data in rows.encoded_rows(sample.tolist()):
        height, width = header_size(data, name)
        shrink = min(1.0, max_side / min(height, width)) if max_side is not None else 1.0
        total += 3 * height * width * shrink**2
    return round(total / len(sample))


def _add(digest: "hashlib.blake2b", data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little") + data)


def _fingerprint(digest: "hashlib.blake2b", labels: Tensor | None, classes: tuple[str, ...] | None) -> str:
    whole = digest.copy()
    if labels is not None:
        whole.update(repr(classes).encode() + labels.numpy().astype("<i8").tobytes())
    return whole.hexdigest()

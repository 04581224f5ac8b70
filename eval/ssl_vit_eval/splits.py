"""Labelled splits: what knows labels between a source of images and the judging of a model. Images are decoded when asked for."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from tqdm import tqdm

from ssl_vit.data import photos
from ssl_vit.data.folders import VALIDATION, hf_datasets, local_path, subfolders
from ssl_vit.data.identity import stored_key
from ssl_vit.data.images import ImageStore
from ssl_vit.data.memory_map import cache_folder
from ssl_vit.data.records import Records, find_column, read_records
from ssl_vit.data.sources import builtin, display_name, find_split, open_tables, pil_images
from ssl_vit.errors import Failure, UsageError, one_of
from ssl_vit.files import write_atomically
from ssl_vit_eval.lazy_images import CROP, Crop, EncodedImages, EvalTransform

# of train, when a dataset has no other split to test on
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Split:
    """The images of one split and what is known about them.

    `selection` marks the rows of a train split that are its fixed selection slice, None where the dataset has none. `notices` are sentences
    to show to the user. `content` computes the fingerprint. `groups`: images of one number may overlap; None where none do. `metric`: that
    its suite declares for the dataset.
    """

    images: ImageStore
    labels: Int64[Tensor, "n"]
    classes: tuple[str, ...]
    selection: Bool[Tensor, "n"] | None
    dataset: str
    split: str
    notices: tuple[str, ...]
    content: Callable[[], str]
    groups: Int64[Tensor, "n"] | None = None
    metric: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the stored images (encoded bytes, in order), labels and class names; reads every image, decodes none."""
        return self.content()


@dataclass(frozen=True)
class Labelled:
    """The rows of a split and their labels, ids of `classes`."""

    rows: Records
    labels: Int64[Tensor, "n"]
    classes: tuple[str, ...]

    def select(self, rows: Int64[Tensor, "m"], split: str) -> "Labelled":
        return Labelled(self.rows.select(rows.tolist(), split), self.labels[rows], self.classes)

    def occurring(self) -> set[str]:
        """The names of the classes that have rows."""
        return {self.classes[label] for label in torch.unique(self.labels).tolist()}


def load_images(source: str, split: str, size: int, image_column: str | None = None) -> ImageStore:
    """The images of one split, labelled or not, at size x size px by the default eval transform; raises as `load_train_test`."""
    if source.startswith("builtin:"):
        return _builtin(source, split, EvalTransform(size)).images
    tables = open_tables(source)
    rows = read_records(source, find_split(source, split, list(tables))[0], tables, image_column)
    return EncodedImages(rows.encoded_rows, len(rows.table), EvalTransform(size))


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

    The images go through `EvalTransform(size, crop)` and are decoded when they are asked for. Test is the split named test, else
    validation (val, valid), else a stratified 20 % of train made with seed 0 and taken out of it; `notices` say which. Several splits
    are joined as `train+validation`. UsageError for what was named wrongly, Failure for images or labels that cannot be used, and when test
    holds a class that train lacks.
    """
    transform = EvalTransform(size, crop)
    if test_split is not None and test_split == (train_split or "train"):
        raise UsageError(f"{source}: split {test_split!r} is asked for as train and as test; choose two different splits")
    if source.startswith("builtin:"):
        names = train_split or "train", test_split or "test"
        if names[0] == names[1]:
            raise UsageError(f"{source}: split {names[0]!r} would be both train and test; choose two different splits")
        train, test = (_builtin(source, split, transform) for split in names)
        return train, test
    tables = open_tables(source)

    def read(splits: Sequence[str]) -> Labelled:
        return joined([read_labels(read_records(source, split, tables, image_column), label_column) for split in splits])

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
        name, (train_rows, test_rows) = train_rows.rows.split, divided(train_rows)
        more = (f"{source} has no split to test on: a stratified {TEST_SHARE:.0%} of its {name!r} (seed 0) is taken out as the test set.",)
    return encoded(train_rows, transform, progress, notices), encoded(test_rows, transform, progress, more)


def _builtin(source: str, split: str, transform: EvalTransform) -> Split:
    part = builtin(source, split)
    stack = part.images

    def read(rows: Sequence[int]) -> list[tuple[str, Any]]:
        return [(f"{source}, row {row}", image) for row, image in zip(rows, pil_images(stack[list(rows)]), strict=True)]

    kept = transform.size == photos.PATCH
    images = ImageStore.stacked(stack) if kept else EncodedImages(read, len(stack), transform)
    classes = photos.photos(source.removeprefix("builtin:")).classes

    def content() -> str:
        return _fingerprint(hashlib.blake2b(stack.numpy().tobytes(), digest_size=8), part.labels, classes)

    # patches of one block of a photograph overlap
    groups = torch.unique(torch.cat([part.labels[:, None], part.corners // photos.BLOCK], dim=1), dim=0, return_inverse=True)[1]
    return Split(images, part.labels, classes, part.selection if split == "train" else None, source, split, (), content, groups)


def _find_splits(source: str, wanted: str, known: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The splits meant by `train+validation`, each as `_find_split` finds it."""
    found = [find_split(source, name, known) for name in wanted.split("+")]
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise UsageError(f"{source}: {wanted!r} names a split twice; name each once")
    return names, tuple(notice for _, notices in found for notice in notices)


def encoded(found: Labelled, transform: EvalTransform, progress: bool, notices: tuple[str, ...]) -> Split:
    """These rows as a split whose images are decoded when they are asked for."""
    rows, labels, classes = found.rows, found.labels, found.classes
    dataset = display_name(rows.source)

    def content() -> str:
        # what was read once is remembered for as long as the files have the same names, sizes and times
        stored = stored_key(rows)
        known = cache_folder() / "fingerprints" / _fingerprint(hashlib.blake2b(stored.encode(), digest_size=16), labels, classes)
        with suppress(OSError):
            if stored:
                return known.read_text()
        digest = hashlib.blake2b(digest_size=8)
        images = (image for some in rows.ranges() for image in rows.encoded_rows(some))
        bar = {"desc": f"reading {dataset}: {rows.split}", "leave": False, "unit": "img", "disable": None if progress else True}
        for _, data in tqdm(images, total=len(rows.table), **bar):
            digest.update(len(data).to_bytes(8, "little") + data)
        found = _fingerprint(digest, labels, classes)
        with suppress(OSError):
            if stored:
                write_atomically(known, found)
        return found

    images = EncodedImages(rows.encoded_rows, len(rows.table), transform)
    return Split(images, labels, classes, None, dataset, rows.split, notices, content)


def _fingerprint(digest: "hashlib.blake2b", labels: Tensor, classes: tuple[str, ...]) -> str:
    digest.update(repr(classes).encode() + labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def read_labels(rows: Records, label_column: str | None) -> Labelled:
    """The labels of a split: of the column given, else of the only ClassLabel or of a usual name, else by class folder.

    Labels are ids of a ClassLabel, or whole numbers or strings, whose sorted values are then the classes. Raises UsageError for an
    unknown or ambiguous column, Failure for labels that are missing (None, -1) or out of range.
    """
    source, split, table = rows.source, rows.split, rows.table
    if table.column_names == ["image"] and (root := local_path(source)).is_dir():
        cell = rows.cells([0]).to_pylist()[0]
        if isinstance(cell, dict) and cell["bytes"] is None:
            if label_column not in (None, "label"):
                raise UsageError(f"{source} has no column {label_column!r}; {one_of(str(label_column), ['image', 'label'])}")
            return _class_folders(rows, root / split if (root / split).is_dir() else root)
    column = find_column(source, table, label_column, "label", "ClassLabel", ("label", "labels", "fine_label"))
    values = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    for row, value in enumerate(values):
        if value is None or value == -1:
            raise Failure(f"{source}: split {split!r}, row {row} has no label ({column} = {value}); choose another split or label column")
    names = getattr(table.features[column], "names", None)
    if names is None:
        kinds = {type(value) for value in values}
        if kinds not in ({int}, {str}):
            found = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise UsageError(f"{source}: column {column!r} holds {found}; labels must be all whole numbers or all names")
        ordered = sorted(set(values))
        id_of = {value: i for i, value in enumerate(ordered)}
        values, names = [id_of[value] for value in values], [str(value) for value in ordered]
    for row, value in enumerate(values):
        if not 0 <= value < len(names):
            raise Failure(
                f"{source}: split {split!r}, row {row} has label {value}, out of range for {len(names)} classes; correct the labels"
            )
    return Labelled(rows, torch.tensor(values, dtype=torch.int64), tuple(names))


def _class_folders(rows: Records, base: Path) -> Labelled:
    """The label of a file is the folder of `base` that it lies in."""
    classes = [folder.name for folder in subfolders(base)]
    if not classes:
        raise UsageError(f"{base} holds images but no class folders, and labels are needed; sort them into one folder per class")
    start = "" if base == local_path(rows.source) else f"{base.name}/"
    paths = [cell["path"].removeprefix(start) for cell in rows.cells(range(len(rows.table))).to_pylist()]
    if loose := next((path for path in paths if "/" not in path), None):
        raise Failure(f"{base / loose} lies beside the class folders, so it has no label; move it into one of them")
    folder_of = [path.split("/", 1)[0] for path in paths]
    if empty := sorted(set(classes) - set(folder_of)):
        raise Failure(f"class folder {empty[0]!r} in {base} holds no images; fill it or remove it")
    ids = {name: i for i, name in enumerate(classes)}
    return Labelled(rows, torch.tensor([ids[name] for name in folder_of]), tuple(classes))


def joined(parts: Sequence[Labelled]) -> Labelled:
    """Several splits as one, one behind the other, called `train+validation`; their classes are matched by name."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0].rows
    classes = tuple(dict.fromkeys(name for part in parts for name in part.classes))
    labels = [torch.tensor([classes.index(name) for name in part.classes])[part.labels] for part in parts]
    table = hf_datasets().concatenate_datasets([part.rows.table.select_columns([first.image_column]) for part in parts])
    rows = replace(first, split="+".join(part.rows.split for part in parts), table=table)
    return Labelled(rows, torch.cat(labels), classes)


def divided(rows: Labelled) -> tuple[Labelled, Labelled]:
    """Train and test out of one split: of every class `TEST_SHARE`, at least one row unless it has only one."""
    generator = torch.Generator().manual_seed(0)
    is_test = torch.zeros(len(rows.labels), dtype=torch.bool)
    for members in torch.split(rows.labels.argsort(stable=True), torch.bincount(rows.labels).tolist()):
        # a class with a single row stays in train
        count = max(round(TEST_SHARE * len(members)), 1) if len(members) > 1 else 0
        is_test[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    share = f"{TEST_SHARE:.0%}"
    return (
        rows.select((~is_test).nonzero().squeeze(1), f"{rows.rows.split} without {share}"),
        rows.select(is_test.nonzero().squeeze(1), f"{share} of {rows.rows.split}"),
    )


def with_classes_of(train: Labelled, test: Labelled) -> tuple[Labelled, tuple[str, ...]]:
    """The test rows with train's class ids, matched by name, and notices about classes that test lacks."""
    in_train, in_test = train.occurring(), test.occurring()
    lacking = sorted(in_train - in_test)
    if strange := sorted(in_test - in_train):
        alone = f" (classes of {train.rows.split!r} alone: {_some(lacking)})" if lacking else ""
        what = f"{'classes' if strange[1:] else 'class'} {_some(strange)}"
        raise Failure(
            f"{test.rows.source}: split {test.rows.split!r} holds the {what}, which {train.rows.split!r} lacks{alone}; "
            "rename, remove or add them"
        )
    ids = torch.tensor([train.classes.index(name) if name in in_train else -1 for name in test.classes])
    notice = f"{test.rows.source}: split {test.rows.split!r} lacks {len(lacking)} of {len(in_train)} classes: {_some(lacking)}."
    return replace(test, labels=ids[test.labels], classes=train.classes), ((notice,) if lacking else ())


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""The records of a split before they are decoded: which column holds the pictures, which the labels, and what the labels are called."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from ssl_vit.data.folders import Tables, hf_datasets, inside, local_path
from ssl_vit.errors import Failure, UsageError, one_of

# of train, when a set has no other split to test on
TEST_SHARE = 0.2

_ROWS = 64  # encoded pictures held at once


@dataclass(frozen=True)
class Records:
    """The rows of a split before they are decoded: a `datasets` table, the column of its pictures, and their labels."""

    source: str
    split: str
    table: Any
    image_column: str
    labels: Int64[Tensor, "n"] | None
    classes: tuple[str, ...] | None

    def select(self, rows: Int64[Tensor, "m"], split: str) -> "Records":
        """Some of the rows, under the split name `split`."""
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, table=self.table.select(rows.tolist()), labels=labels, split=split)

    def occurring(self) -> set[str]:
        """The names of the classes that have rows."""
        assert self.labels is not None
        assert self.classes is not None
        return {self.classes[label] for label in set(self.labels.tolist())}

    def encoded(self) -> Iterator[tuple[str, bytes]]:
        """(name for errors, encoded bytes) of every picture in order; raises as `encoded_rows`."""
        for start in range(0, len(self.table), _ROWS):
            yield from self.encoded_rows(range(start, min(start + _ROWS, len(self.table))))

    def encoded_rows(self, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """The same of some of the pictures, in the order of `rows`; Failure for a row without a picture or with one that is not there."""
        cells = self._cells[rows if isinstance(rows, range) else list(rows)][self.image_column].to_pylist()
        return [self._encoded(row, cell) for row, cell in zip(rows, cells, strict=True)]

    @cached_property
    def _cells(self) -> Any:
        return self.table.select_columns([self.image_column]).with_format("arrow")

    @cached_property
    def _root(self) -> Path:
        """The folder that the files must lie in."""
        path = local_path(self.source).resolve()
        if path.exists():
            return path if path.is_dir() else path.parent
        return Path(hf_datasets().config.HF_CACHE_HOME)

    def _encoded(self, row: int, cell: Any) -> tuple[str, bytes]:
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if isinstance(data, str):
            data, path = None, data
        name = f"{self.source}, split {self.split!r}, row {row}" + (f" ({path})" if path else "")
        if data is None and path is not None:
            try:
                data = inside(Path(path), self._root).read_bytes()
            except OSError as error:
                raise Failure(f"{name} cannot be read: {error.strerror}") from error
        if not isinstance(data, bytes):
            raise Failure(f"{name}: column {self.image_column!r} holds no picture there ({type(cell).__name__}); remove or replace it")
        return name, data


def read_records(source: str, split: str, tables: Tables, image_column: str | None, label_column: str | None, labels: bool) -> Records:
    """The records of a split, with their labels if `labels`.

    A column is the one given, else the only one of the right type, else one of the usual name. Labels are ids of a ClassLabel, or whole
    numbers or strings, whose sorted values are then the classes. Raises UsageError for an unknown or ambiguous column, Failure for an
    empty split and for labels that are missing (None, -1) or out of range.
    """
    table = tables[split](labels)
    if len(table) == 0:
        raise Failure(f"{source}: split {split!r} is empty; choose another split")
    pictures = _find_column(source, table, image_column, "image", "Image", ("image", "img"))
    if not labels:
        return Records(source, split, table, pictures, None, None)
    column = _find_column(source, table, label_column, "label", "ClassLabel", ("label", "labels", "fine_label"))
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
    return Records(source, split, table, pictures, torch.tensor(values, dtype=torch.int64), tuple(names))


def _find_column(source: str, table: Any, given: str | None, what: str, feature: str, usual: tuple[str, ...]) -> str:
    columns = table.column_names
    if given is not None:
        if given not in columns:
            raise UsageError(f"{source} has no column {given!r}; {one_of(given, columns)}")
        return given
    typed = [name for name in columns if type(table.features[name]).__name__ == feature]
    # a usual name decides among several of the type, and stands in where no column has it
    named = [name for name in usual if name in (typed or columns)]
    found = typed if len(typed) == 1 else named[:1]
    if not found:
        raise UsageError(f"{source}: which column is the {what}? name {what}_column; choose one of: {', '.join(columns)}")
    return found[0]


def joined(parts: Sequence[Records]) -> Records:
    """Several splits as one, one behind the other, called `train+validation`; their classes are matched by name."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    classes = tuple(dict.fromkeys(name for part in parts for name in part.classes or ()))
    labels = [torch.tensor([classes.index(name) for name in part.classes or ()])[part.labels] for part in parts]
    table = hf_datasets().concatenate_datasets([part.table.select_columns([first.image_column]) for part in parts])
    return replace(first, split="+".join(part.split for part in parts), table=table, labels=torch.cat(labels), classes=classes)


def divided(rows: Records) -> tuple[Records, Records]:
    """Train and test out of one split: of every class `TEST_SHARE`, at least one row unless it has only one."""
    assert rows.labels is not None
    generator = torch.Generator().manual_seed(0)
    is_test = torch.zeros(len(rows.labels), dtype=torch.bool)
    for label in range(int(rows.labels.max()) + 1):
        members = (rows.labels == label).nonzero().squeeze(1)
        # a class with a single row stays in train
        count = max(round(TEST_SHARE * len(members)), 1) if len(members) > 1 else 0
        is_test[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    share = f"{TEST_SHARE:.0%}"
    return (
        rows.select((~is_test).nonzero().squeeze(1), f"{rows.split} without {share}"),
        rows.select(is_test.nonzero().squeeze(1), f"{share} of {rows.split}"),
    )


def with_classes_of(train: Records, test: Records) -> tuple[Records, tuple[str, ...]]:
    """The test rows with train's class ids, matched by name, and notices about classes that test lacks."""
    assert train.classes is not None
    assert test.classes is not None
    in_train, in_test = train.occurring(), test.occurring()
    if strange := sorted(in_test - in_train):
        raise Failure(
            f"{test.source}: split {test.split!r} holds the class {strange[0]!r}, which {train.split!r} lacks; remove it or add it to train"
        )
    ids = torch.tensor([train.classes.index(name) if name in in_train else -1 for name in test.classes])
    lacking = sorted(in_train - in_test)
    notice = f"{test.source}: split {test.split!r} lacks {len(lacking)} of {len(in_train)} classes: {', '.join(lacking[:10])}."
    return replace(test, labels=ids[test.labels], classes=train.classes), ((notice,) if lacking else ())

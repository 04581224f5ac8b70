"""The records of a split before they are decoded: which column holds the images, and their encoded bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ssl_vit.data.folders import Tables, hf_datasets, inside, local_path
from ssl_vit.errors import Failure, UsageError, one_of

AT_ONCE = 64  # encoded images held at once


@dataclass(frozen=True)
class Records:
    """The rows of a split before they are decoded: a `datasets` table and the column of its images. Can be pickled and forked."""

    source: str
    split: str
    table: Any
    image_column: str

    def select(self, rows: Sequence[int], split: str) -> "Records":
        """Some of the rows, under the split name `split`."""
        return replace(self, table=self.table.select(rows), split=split)

    def ranges(self, length: int = AT_ONCE) -> Iterator[range]:
        """All rows in their order, at most `length` at once."""
        rows = range(len(self.table))
        return (rows[start : start + length] for start in rows[::length])

    def encoded_rows(self, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """(name for errors, encoded bytes) of some images, in the order of `rows`; Failure for a row without an image or with one that
        is not there."""
        found = self.readable_rows(rows)
        if failed := next((image for image in found if isinstance(image, Failure)), None):
            raise failed
        return found  # type: ignore[return-value]

    def readable_rows(self, rows: Sequence[int]) -> list[tuple[str, bytes] | Failure]:
        """The same, with the Failure in place of an image that cannot be read."""
        found: list[tuple[str, bytes] | Failure] = []
        for row, cell in zip(rows, self.cells(rows).to_pylist(), strict=True):
            try:
                found.append(self._encoded(row, cell))
            except Failure as error:
                found.append(error)
        return found

    def cells(self, rows: Sequence[int]) -> Any:
        """The chunked arrow array of some rows of the image column: bytes, or structs of bytes and path."""
        return self._cells[rows if isinstance(rows, range) else list(rows)][self.image_column]

    @cached_property
    def _cells(self) -> Any:
        return self.table.select_columns([self.image_column]).with_format("arrow")

    @cached_property
    def root(self) -> Path:
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
                data = inside(Path(path), self.root).read_bytes()
            except OSError as error:
                raise Failure(f"{name} cannot be read: {error.strerror}; remove or replace it") from error
        if not isinstance(data, bytes):
            raise Failure(f"{name}: column {self.image_column!r} holds no image there ({type(cell).__name__}); remove or replace it")
        return name, data


def read_records(source: str, split: str, tables: Tables, image_column: str | None) -> Records:
    """The records of a split. The column is the one given, else the only one of images, else one of the usual name.

    Raises UsageError for an unknown or ambiguous column, Failure for an empty split.
    """
    table = tables[split]()
    if len(table) == 0:
        raise Failure(f"{source}: split {split!r} is empty; choose another split")
    return Records(source, split, table, find_column(source, table, image_column, "image", "Image", ("image", "img")))


def find_column(source: str, table: Any, column: str | None, what: str, feature: str, usual: tuple[str, ...]) -> str:
    """The `column` asked for, else the only one whose type is `feature`, else one of the `usual` names; UsageError if there is none."""
    columns = table.column_names
    if column is not None:
        if column not in columns:
            raise UsageError(f"{source} has no column {column!r}; {one_of(column, columns)}")
        return column
    typed = [name for name in columns if type(table.features[name]).__name__ == feature]
    # a usual name decides among several of the type, and stands in where no column has it
    named = [name for name in usual if name in (typed or columns)]
    found = typed if len(typed) == 1 else named[:1]
    if not found:
        raise UsageError(f"{source}: which column is the {what}? name {what}_column; choose one of: {', '.join(columns)}")
    return found[0]

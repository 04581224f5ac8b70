"""Rows: one line of `rows.jsonl` for each number, and beside it the per-image predictions that paired tests are computed from."""

import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64
from torch import Tensor

from ssl_vit.errors import Failure, UsageError, reason
from ssl_vit.files import locked, naming, write_atomically
from ssl_vit_eval.schema import STRICT, checked

FORMAT = 2  # of a line: since 2 it says the hash of its predictions; one with a higher number was written by a later version
_TAIL = 4096  # bytes, about two lines
REMOVE = "remove this line; ssl-vit eval measures again what is then missing"


class Key(NamedTuple):
    """What an evaluation depends on: two with the same key give the same predictions."""

    checkpoint: str
    data: str
    transform: str
    protocol: str
    protocol_version: int
    protocol_hash: str
    read_with: str
    control: str

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name the evaluation."""
        return hashlib.sha256(json.dumps(list(self)).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number and what it is of. Values, intervals and oracle are fractions in [0, 1]; `seconds` is the probe's time."""

    __pydantic_config__ = STRICT
    method: str  # "dino", "mae"; of the controls "random" or "pixels"
    trained_with: str | None  # the readout spec in the checkpoint; None for controls
    read_with: str
    dataset: str
    protocol: str
    protocol_version: int
    protocol_hash: str  # of its kind and parameters: a file of the user's may change without its version
    metric: str
    value: float
    ci_low: float
    ci_high: float
    n_train: int
    n_test: int
    seed: int | None  # of pretraining, or of the initialisation of a random backbone
    selected: dict[str, Any]
    grid: dict[str, Any] | None
    edge_of_grid: bool | None
    oracle: float | None  # the best of the grid on test, never used
    deviations: list[str]  # from the paper that the protocol is named after
    seconds: float
    checkpoint: str  # hashes, as are the next four; this one of the weights
    recipe: str | None
    family: str | None  # of the recipe without its readout and seed: what the arms and seeds of one comparison share
    init: str | None  # of the weights that the training started from: a random row with this `checkpoint` is its baseline
    data: str
    transform: str
    git: str | None
    source: str  # as the user named it; of a path the last part only
    control: str = ""  # what was changed to see what a number owes to it: "shuffled labels", "cls beside shuffled"
    width: int | None = None  # of what the probe read
    parameters: int | None = None  # that the probe fitted and uses, a learned readout's among them
    bank: int | None = None  # images that could vote in k-NN
    recipe_name: str | None = None  # of what was trained here; of checkpoints without it, method and backbone
    dataset_metric: str | None = None  # that its suite declares for the dataset; None where the name decides
    predictions: str = ""  # file below the store's folder; filled in by `RowStore.append`, as is its hash
    predictions_hash: str | None = None  # None in rows of format 1

    @cached_property
    def key(self) -> Key:
        """The evaluation that this number comes from."""
        return Key(*(getattr(self, name) for name in Key._fields))

    @cached_property
    def id(self) -> str:
        """Evaluation and metric: rows of equal id are the same number, measured again."""
        return f"{self.key.digest}-{self.metric}"


class Setting(NamedTuple):
    """What must be equal for two numbers to stand in one table."""

    dataset: str
    data: str
    transform: str
    protocol: str
    version: int
    parameters: str  # hash
    control: str

    @property
    def rule(self) -> str:
        """The protocol, and what was changed of it on purpose."""
        return self.protocol + (f", {self.control}" if self.control else "")

    @property
    def name(self) -> str:
        """`cifar10, knn v1`."""
        return f"{self.dataset}, {self.rule} v{self.version}"

    @classmethod
    def of(cls, row: Row) -> "Setting":
        return cls(row.dataset, row.data, row.transform, row.protocol, row.protocol_version, row.protocol_hash, row.control)


class RowStore:
    """`rows.jsonl` and `predictions/` in one folder, which the first `append` creates."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.file = self.folder / "rows.jsonl"
        self._measured, self._last, self._end = list[Row](), b"", 0  # what was read: its rows, its last line, where that ends

    def append(
        self, rows: Sequence[Row], predictions: Int64[Tensor, "n"] | Int64[Tensor, "n draws"], labels: Int64[Tensor, " n"]
    ) -> list[Row]:
        """Add the rows of one evaluation (one for each metric) and its answers; the rows come back with `predictions` filled in.

        predictions: a column for each draw of a protocol that draws several training sets.

        The predictions are complete before a row names them, and the rows are one write: a kill leaves whole lines, or one cut
        last line, which is ignored on reading and cleared away by the next append. Several processes may append at once.
        """
        if len({row.key for row in rows}) != 1:
            raise ValueError("append takes the rows of exactly one evaluation")
        name = f"predictions/{rows[0].key.digest}.parquet"
        draws = predictions.reshape(len(labels), -1).T.tolist()
        columns = {"image": range(len(labels)), "label": labels.tolist()}
        columns |= {f"prediction{number or ''}": answers for number, answers in enumerate(draws)}
        buffer = io.BytesIO()
        pq.write_table(pa.table({column: pa.array(values, pa.int64()) for column, values in columns.items()}), buffer)
        rows = [replace(row, predictions=name, predictions_hash=_digest(buffer.getvalue())) for row in rows]
        with self._locked():
            write_atomically(self.folder / name, lambda file: file.write(buffer.getvalue()))
            self._add(rows)
        return rows

    def declare(self, data: str, metric: str) -> None:
        """Repeat the rows on this data that do not say yet that its suite declares this metric: nothing has to be measured again for it."""
        with self._locked():
            self._add([replace(row, dataset_metric=metric) for row in self.rows() if row.data == data and row.dataset_metric != metric])

    def rows(self) -> list[Row]:
        """Every row, the last of those with the same id; Failure for a line that is not a row of a known format."""
        return list({row.id: row for row in self.measured()}.values())

    def measured(self) -> list[Row]:
        """Every row in the order of writing, also those that were measured again; Failure as `rows`. Lines that were read before are not
        parsed again, unless the last of them is no longer where it was."""
        if not self.file.exists():
            return []
        with open(self.file, "rb") as file:
            file.seek(self._end - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._measured, self._last, self._end = [], b"", 0
                file.seek(0)
            rows, last, end = list[Row](), self._last, self._end
            for number, line in enumerate(file, len(self._measured) + 1):
                if not line.endswith(b"\n"):  # cut, or being written: what comes next would be its other half
                    break
                rows.append(_parse(line.decode(errors="replace"), f"{self.file}, line {number}"))
                last, end = line, end + len(line)
        self._measured, self._last, self._end = self._measured + rows, last, end
        return list(self._measured)

    def cut_line(self) -> str:
        """A sentence about a last line that a kill has cut; empty where there is none."""
        if not self.file.exists():
            return ""
        with open(self.file, "rb") as file:
            cut = _end_of_lines(file) < file.seek(0, os.SEEK_END)
        return f"{self.file}: the last line was cut short and is ignored; evaluate again to have it back" if cut else ""

    def known(self, data: str) -> set[tuple[Key, str]]:
        """The evaluations on this data and their metrics that are there, with their predictions as they were written."""
        rows = [row for row in self.rows() if row.data == data]
        whole = {of: self._is_whole(row) for of, row in {(row.predictions, row.predictions_hash): row for row in rows}.items()}
        return {(row.key, row.metric) for row in rows if whole[row.predictions, row.predictions_hash]}

    def predictions(self, row: Row) -> tuple[Int64[Tensor, "n draws"], Int64[Tensor, " n"]]:
        """Predicted (a column a draw) and true classes of the test images, in their order; Failure where the file is gone or corrupt."""
        path = self.folder / row.predictions
        try:
            content = self._content(row)
            table = pq.ParquetFile(pa.BufferReader(content)).read()
            names = ["label", "prediction", *(name for name in table.column_names if re.fullmatch(r"prediction\d+", name))]
            label, *draws = (torch.from_numpy(table[name].to_numpy().astype(np.int64)) for name in names)
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise Failure(f"cannot read the predictions {path}: {reason(error)}; remove the row or evaluate again") from error
        return torch.stack(draws, dim=1), label

    def _content(self, row: Row) -> bytes:
        """Of the predictions' file; ValueError where it is gone, or not the one that was written with the row."""
        path = self.folder / row.predictions
        if not path.is_file():
            raise ValueError("there is no such file")
        content = path.read_bytes()
        if row.predictions_hash not in (None, _digest(content)):
            raise ValueError("it is not as it was written with the row")
        return content

    def _is_whole(self, row: Row) -> bool:
        with suppress(OSError, ValueError):
            self._content(row)
            return True
        return False

    def _locked(self) -> AbstractContextManager[bool]:
        """Not on the rows themselves: over NFS, closing a file that is read gives its locks back."""
        return locked(self.folder / "rows.lock")

    def _add(self, rows: Sequence[Row]) -> None:
        lines = [json.dumps({"format": FORMAT, "id": row.id, **asdict(row)}, allow_nan=False) + "\n" for row in rows]
        data = memoryview("".join(lines).encode())
        with naming(self.file), open(self.file, "ab+", buffering=0) as file:  # a buffer would be written once more when it is closed
            file.truncate(end := _end_of_lines(file))
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:  # a full disk: all rows of an evaluation, or none
                file.truncate(end)
                raise


def find_rows(folders: Sequence[str | Path]) -> list[tuple[Row, RowStore]]:
    """Every row in and below the folders, with the store that has its predictions; what was measured again (equal ids) as often as it is
    there, the last one last.

    UsageError for a folder that does not exist, or has neither rows nor, beside others that have some, pretrainings.
    """
    found: dict[Path, list[tuple[Row, RowStore]]] = {}  # by file: folders may lie in each other
    lacking = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UsageError(f"there is no folder {str(folder)!r}: give folders that `ssl-vit eval` or `ssl-vit study` wrote to")
        files = sorted(folder.rglob("rows.jsonl"))
        for file in files:
            if file.resolve() not in found:
                store = RowStore(file.parent)
                found[file.resolve()] = [(row, store) for row in store.measured()]
        if not any(found[file.resolve()] for file in files):
            lacking.append(folder)
    rows = [pair for of_file in found.values() for pair in of_file]
    for folder in lacking:
        # beside rows, a run folder is welcome: its training is shown
        if not rows or not any(folder.rglob("recipe.yaml")):
            source = next((str(file) for file in sorted(folder.rglob("last.ckpt"))), "SOURCE")
            where = "runs/eval" if any(folder.iterdir()) else folder
            raise UsageError(
                f"folder {str(folder)!r} holds no rows (rows.jsonl): run `ssl-vit eval {source} --out {where}` first, then compare {where}"
            )
    return rows


def _end_of_lines(file: BinaryIO) -> int:
    """The length of a file without what follows its last complete line; read from the end, since a store may have many lines."""
    start = file.seek(0, os.SEEK_END)
    while start > 0:
        end, start = start, max(start - _TAIL, 0)
        file.seek(start)
        if (at := file.read(end - start).rfind(b"\n")) >= 0:
            return start + at + 1
    return 0


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _parse(line: str, where: str) -> Row:
    try:
        values = json.loads(line)
        version = values.pop("format")
        values.pop("id")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Failure(f"{where} is not a row: {REMOVE}") from error
    if version not in range(1, FORMAT + 1):
        raise Failure(f"{where} has row format {version}, this version of ssl_vit reads 1 to {FORMAT}: update ssl_vit or evaluate again")
    try:
        return checked(Row, values, where)
    except UsageError as error:
        raise Failure(f"{where} is not a row ({str(error).removeprefix(where).strip(' :')}): {REMOVE}") from error

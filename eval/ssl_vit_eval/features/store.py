"""Features on disk, memory-mapped: written by one pass, read by every later evaluation, and never taken for those of something else."""

import json
import mmap
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ssl_vit.errors import Failure
from ssl_vit.files import check_writable, naming
from ssl_vit_eval.distributed import barrier, gather_objects, rank

FORMAT = 1  # raised whenever the pass could give other numbers for the same key
_HEADER = mmap.ALLOCATIONGRANULARITY  # bytes before the numbers, so that these can be mapped
_SUM = 8  # bytes of the checksum
_DAY = 86400  # seconds
_PIECE = 2**24  # bytes read at once


@dataclass(frozen=True)
class FeatureKey:
    """What the features of a split depend on; hashes are as in the rows."""

    checkpoint: str
    data: str
    split: str
    transform: str
    normalisation: str  # mean and std of the input
    spec: str
    rows: int
    width: int
    format: int = FORMAT
    dtype: str = "float32"

    @property
    def text(self) -> str:
        # as it was before there was another dtype
        return json.dumps({name: value for name, value in asdict(self).items() if (name, value) != ("dtype", "float32")})

    @property
    def digest(self) -> str:
        return sha256(self.text.encode()).hexdigest()[:24]


class FeatureFile:
    """One readout's features of one split, [rows width], in a file that says in its header what they are of.

    It is written under another name, each process its own rows, and gets its name when all of them are there.
    """

    def __init__(self, folder: Path, key: FeatureKey) -> None:
        self.key = key
        self.path = folder / f"{key.digest}.features"
        self._row = np.dtype(key.dtype).itemsize * key.width  # bytes
        self._end = _HEADER + self._row * key.rows  # of the numbers; their checksum follows
        self._partial = self.path.with_suffix(".partial")  # until `begin` names it
        self._abandoned = False

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self._end + _SUM

    def is_whole(self) -> bool:
        """Whether it is there, neither cut short nor damaged nor of something else, which is said. Reads all of it: one process asks."""
        if not self.path.is_file():
            return False
        with self.path.open("rb") as file:
            whole = file.read(_HEADER) == self._header() and _checksum(file, self._end) == file.read()
        if not whole:
            print(f"{self.path} is cut short, damaged or belongs to something else; computed again", flush=True)
        return whole

    def mapped(self) -> Float[Tensor, "rows width"]:
        """The features, mapped from a file that is whole; Failure where it was lost."""
        try:
            # mode c: torch wants memory that it may write to; a write would stay in memory and never reach the file
            return torch.from_numpy(np.memmap(self.path, self.key.dtype, "c", _HEADER, (self.key.rows, self.key.width)))
        except (OSError, ValueError) as error:
            raise Failure(f"{self.path} was lost while it was read; evaluate again") from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around the writes of every process; the file gets its name at the end, and is gone if there is no end, or it was abandoned."""
        try:
            self.begin()
            yield
        except BaseException:
            self.abandon()
            raise
        if not self._abandoned:
            self.finish()

    def begin(self) -> None:
        """Make room for the rows; called by every process, as is `finish`."""
        # a name of its own: another evaluation may write the same features at the same time
        self._partial = self.path.with_suffix(f".{gather_objects(uuid4().hex[:12])[0]}.partial")
        self._abandoned = False
        if rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with naming(self._partial), self._partial.open("wb") as file:
                file.write(self._header())
                file.truncate(self._end)
        barrier()

    def abandon(self) -> None:
        """What was written is removed; by every process."""
        self._abandoned = True
        self._partial.unlink(missing_ok=True)

    def finish(self) -> None:
        """All processes have written their rows."""
        barrier()
        if rank() == 0:
            with naming(self._partial), self._partial.open("r+b") as file:
                file.seek(_HEADER)
                file.write(_checksum(file, self._end))
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._partial, self.path)
        barrier()

    def write(self, start: int, features: Float[Tensor, "n width"]) -> None:
        """Rows from `start` on, within `writing`. Not by mapped memory, where a full disk would be a crash and not an error."""
        data = memoryview(features.contiguous().numpy().astype(self.key.dtype, copy=False).data).cast("B")
        offset = _HEADER + self._row * start
        descriptor = os.open(self._partial, os.O_WRONLY)  # for this write only: a pass may write more files than can be open at once
        try:
            with naming(self._partial):
                while data:
                    written = os.pwrite(descriptor, data, offset)
                    data, offset = data[written:], offset + written
        finally:
            os.close(descriptor)

    def _header(self) -> bytes:
        return self.key.text.encode().ljust(_HEADER)


def clear_abandoned(folder: Path) -> None:
    """Remove what processes left half written that were killed a day ago or earlier; not for each file, of which there may be thousands."""
    folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder)  # the next line's error would name a file that nobody knows
    with TemporaryFile(dir=folder) as file:
        now = os.fstat(file.fileno()).st_mtime  # by the clock that the others' times are of: this machine's own may be wrong
    for left in folder.glob("*.partial"):
        with suppress(FileNotFoundError):  # another process was first
            if now - left.stat().st_mtime > _DAY:
                left.unlink()


def check_room(files: Sequence[FeatureFile], what: str) -> None:
    """Failure, before anything is written, where the disk has no room for them; `what` stands before it."""
    folder = files[0].path.parent
    clear_abandoned(folder)
    if (needed := sum(file.size for file in files)) > (free := shutil.disk_usage(folder).free):
        sizes = f"{needed / 2**30:.1f} GiB in {folder}, {free / 2**30:.1f} GiB are free there"
        raise Failure(f"{what} needs {sizes}; name another folder with --cache, or ask for fewer readouts")


def _checksum(file: BinaryIO, end: int) -> bytes:
    """CRC-32 of the file from where it stands to `end`, where it then stands."""
    value = 0
    while piece := file.read(min(_PIECE, end - file.tell())):
        value = zlib.crc32(piece, value)
    return f"{value:0{_SUM}x}".encode()

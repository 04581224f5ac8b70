"""Images of `data.decode: memory`, decoded once per machine by several processes into a file that all map and the next run finds again.

The file holds the pixels of all images one after the other, then their sizes. It lies in $SSL_VIT_CACHE, else in the user's cache folder;
any file there may be deleted when no run uses it.
"""

import itertools
import os
import shutil
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import UInt8
from torch.utils.data import DataLoader
from tqdm import tqdm

from ssl_vit.data.images import ImageStore, decode, limit_side, to_tensor
from ssl_vit.data.loader import Corrupt, available_cores, begin_worker, told_of_lost_workers
from ssl_vit.data.records import Records
from ssl_vit.errors import Failure
from ssl_vit.files import locked, write_atomically

DECODER = 2  # raised when an image decodes to other pixels
SMALL = 64 * 2**20  # bytes that every process may have of its own
_WORKERS, _CHUNK = 16, 8


class _Decoded(torch.utils.data.Dataset[Any]):
    """Decoded images by row; what is wrong with one comes back as its Failure, since a worker would raise it with a traceback."""

    def __init__(self, rows: Records, max_side: int | None) -> None:
        self.rows, self.max_side = rows, max_side

    def __len__(self) -> int:
        return len(self.rows.table)

    def __getitem__(self, row: int) -> UInt8[np.ndarray, "3 h w"] | Failure:
        try:
            [(name, data)] = self.rows.encoded_rows([row])
            image = decode(data, name)
            return to_tensor(image if self.max_side is None else limit_side(image, self.max_side)).numpy()
        except Failure as failure:
            return failure


def decoded(rows: Records, max_side: int | None, key: str, needed: int, title: str, progress: bool) -> ImageStore:
    """The images of `rows`, about `needed` bytes decoded, a corrupt one of 0 px; `key` tells their content. Failure for too many of
    these, and for a full disk."""
    images, count = _Decoded(rows, max_side), len(rows.table)
    corrupt = Corrupt(count, named=progress)
    if needed < SMALL:
        made = [torch.from_numpy(image) for image in _all(images, 0, title, progress, corrupt)]
        return ImageStore(torch.cat([image.flatten() for image in made]), torch.tensor([image.shape[1:] for image in made]))
    file = cache_folder() / f"{key}-{count}-{max_side}-{DECODER}.images"
    try:
        with locked(file.with_suffix(".lock")):
            store = _mapped(file, count)
            if store is None:
                if (free := shutil.disk_usage(file.parent).free) < needed:
                    raise Failure(
                        f"{file} needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free there; make room, name another "
                        "folder in SSL_VIT_CACHE, lower data.max_side, or set data.decode to stream where the method can"
                    )
                corrupt.named = True  # whichever process of the machine decodes shows it
                with closing(_all(images, workers(), title, True, corrupt)) as found:  # or the bar would end behind the error's line
                    write_atomically(file, lambda target: _write(target, found))
                store = _mapped(file, count)
    except OSError as error:
        raise Failure(
            f"{file} ({needed / 2**30:.1f} GiB) cannot be written: {error.strerror}; make room, or name another folder in SSL_VIT_CACHE"
        ) from error
    assert store is not None
    again = (store.sizes[:, 0] == 0).nonzero().flatten().tolist() if not corrupt.rows else []  # decoded by an earlier run or another rank
    corrupt.note([(row, str(images[row])) for row in again], count)
    return store


def cache_folder() -> Path:
    """Where decoded images are kept."""
    own = os.environ.get("SSL_VIT_CACHE")
    return Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ssl_vit"


def workers() -> int:
    """Decoding processes: the processors that this process may use, at most 16; 0 decodes in this process."""
    return min(_WORKERS, cores) if (cores := available_cores()) > 1 else 0


def _all(images: _Decoded, count: int, title: str, progress: bool, corrupt: Corrupt) -> Generator[UInt8[np.ndarray, "3 h w"], None, None]:
    loader: Any = DataLoader(images, batch_size=_CHUNK, num_workers=count, collate_fn=list, worker_init_fn=begin_worker)
    rows, nothing = itertools.count(), np.empty((3, 0, 0), dtype=np.uint8)
    with tqdm(total=len(images), desc=title, unit="img", disable=None if progress else True) as bar, told_of_lost_workers():
        for chunk in loader:
            for image, row in zip(chunk, rows, strict=False):
                if isinstance(image, Failure):
                    corrupt.note([(row, str(image))], len(images))
                yield nothing if isinstance(image, Failure) else image
            bar.update(len(chunk))


def _write(file: BinaryIO, images: Iterator[UInt8[np.ndarray, "3 h w"]]) -> None:
    sizes = []
    for image in images:
        sizes.append(image.shape[1:])
        file.write(np.ascontiguousarray(image).data)
    file.write(np.array(sizes, dtype="<i8").tobytes())


def _mapped(file: Path, count: int) -> ImageStore | None:
    """The store on a file's pages, which all processes share; None for one that is not there or not whole."""
    if not file.exists() or file.stat().st_size < 16 * count:
        return None
    data = np.memmap(file, dtype=np.uint8, mode="r")
    sizes = torch.from_numpy(np.array(data[-16 * count :]).view("<i8").reshape(count, 2))
    if bool((sizes < 0).any()) or int(3 * sizes.prod(dim=1).sum()) != len(data) - 16 * count:
        return None
    with warnings.catch_warnings(action="ignore"):  # torch's: nobody may write to it, and nobody does
        return ImageStore(torch.from_numpy(data[: -16 * count]), sizes)

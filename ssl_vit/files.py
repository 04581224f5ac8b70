"""Files that are whole or absent, and locks between processes."""

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
log = logging.getLogger(__name__)

_held = set[BinaryIO]()  # the files of locks; a child process, as a data worker, does not hold on to them
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from inside names the file: the system's own, of writing and syncing, does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def check_writable(folder: Path) -> None:
    """OSError, before any work, where `folder`, or what there is of the folders above it, cannot be written to."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):  # also of root, where the file system is read-only
        number = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), str(folder))


def write_atomically(path: Path, content: str | Callable[[BinaryIO], object]) -> None:
    """Write beside the target, sync, rename: the name always holds a whole file, the old one or the new. `content` may write it itself.

    OSError, which names the file, where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        system = error if isinstance(error, OSError) else error.__context__  # torch.save puts an error of its own on top
        if not isinstance(system, OSError):
            raise
        system.filename = system.filename or str(path)
        raise system from None
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Else a power cut may take back what was renamed."""
    with suppress(OSError):  # not every file system knows it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock `path` inside the `with`, waiting for it or, without `wait`, yielding False where another process holds it.

    It belongs to the process and not to the file: it goes when the process does, however it ends, and the file stays behind. Shared
    file systems pass it on to the other machines (NFS does, Lustre if it is mounted with `flock`). Where the file system has no locks,
    `wait` raises OSError; without it a warning says so, and True is yielded.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if wait or error.errno not in (errno.EWOULDBLOCK, *NO_LOCKS):
                raise
            if unguarded := error.errno in NO_LOCKS:
                log.warning("%s: no locks here (%s): nothing guards the folder against a second process", path, error.strerror)
            yield unguarded
        else:
            _held.add(file)
            try:
                yield True
            finally:
                _held.discard(file)

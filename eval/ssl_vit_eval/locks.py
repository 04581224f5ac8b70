"""One process at a time, also on several machines that share a folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock `path` inside the `with`, waiting for it or, without `wait`, yielding False where another process holds it.

    It belongs to the process and not to the file: it goes when the process does, however it ends, and the file stays behind. Shared
    file systems pass it on to the other machines (NFS does, Lustre if it is mounted with `flock`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True

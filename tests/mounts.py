"""Folders that are read-only or full for some processes alone: mounts in a name space of their own, which needs no rights. root is held
off by these as everybody is; permissions it may ignore."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest


class Mounts:
    """A name space in which `script`, a shell's, has been run; it is there inside the `with`. Skips the test where the system has none."""

    def __init__(self, script: str) -> None:
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f"{{ {script}; }} >&2 && echo done && exec cat"]
        try:
            self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        except FileNotFoundError:
            pytest.skip("no command unshare here")
        assert self._holder.stdout is not None
        if not self._holder.stdout.readline():
            pytest.skip(f"no name space with mounts of its own here: {self._holder.communicate()[1].strip()}")

    def __enter__(self) -> "Mounts":
        return self

    def __exit__(self, *error: object) -> None:
        self._holder.communicate()

    @property
    def enter(self) -> Callable[[], None]:
        """For `Command(before=...)`: the process sees these mounts."""
        return partial(_enter, self._holder.pid, str(Path.cwd()))

    def sh(self, script: str) -> None:
        """Run there."""
        inside = ["nsenter", "--target", str(self._holder.pid), "--user", "--mount", "--preserve-credentials"]
        subprocess.run([*inside, "sh", "-c", f'cd "$0" && {script}', str(Path.cwd())], check=True)


def _enter(holder: int, folder: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    spaces = [os.open(f"/proc/{holder}/ns/{kind}", os.O_RDONLY) for kind in ("user", "mnt")]
    for space in spaces:
        if libc.setns(space, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(space)
    os.chdir(folder)


def read_only(folder: str) -> Mounts:
    """`folder`, which is there, cannot be written to."""
    return Mounts(f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}")


def small_disk(folder: str, size: str) -> Mounts:
    """`folder` is an empty file system of `size`, as `600k`."""
    return Mounts(f"mkdir -p {folder} && mount -t tmpfs -o size={size} none {folder}")

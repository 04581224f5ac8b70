"""Which images a run was trained on: their number, order and content, in a few lines, so that a resume on others can be refused."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pyarrow.compute as pc
from jaxtyping import UInt8
from torch import Tensor

from ssl_vit.data.records import Records
from ssl_vit.errors import Failure

# encoded bytes up to which every image is read before each run
HASHED_BYTES = 2**30
HASHED_FILES = 20_000  # of their own, each of which must be opened
_PARTS, _ROWS = 64, 4096


def identity(rows: Records) -> tuple[dict[str, Any], str]:
    """`{count, hash, by, parts, names}`, and a key under which decoded images can be found again.

    by: "content", or "names and sizes" for more than `HASHED_BYTES` or `HASHED_FILES`, whose times are all in the key. `hash` is over all
    images, `parts` over each of at most 64 equal ranges of rows, the first image of which is in `names`.
    """
    count, total, times, files, names = len(rows.table), 0, hashlib.blake2b(digest_size=8), False, []

    def listed() -> Iterator[bytes]:
        nonlocal total, files
        for row, (name, size, changed) in enumerate(_stored(rows)):
            total, files = total + size, files or changed > 0
            times.update(changed.to_bytes(8, "little", signed=True))  # each, not the newest: clocks and copies may set one back
            if row % _step(count) == 0:
                names.append(name)
            yield f"{name} {size}".encode()

    found = _hashed("names and sizes", listed(), count) | {"names": names}  # nothing is kept of each image: there may be millions
    if total > HASHED_BYTES or (files and count > HASHED_FILES):
        return found, f"{found['hash']}-{times.hexdigest()}"
    read = (image for some in rows.ranges() for image in rows.readable_rows(some))
    # one that cannot be read counts as empty: whether it may be replaced is decided where images are decoded
    found |= _hashed("content", (b"" if isinstance(image, Failure) else image[1] for image in read), count)
    return found, found["hash"]


def stored_key(rows: Records) -> str:
    """Changes whenever an image may have: with the names, sizes and times of their files, or of the table's files where these hold the
    images. No image is read. Empty where nothing tells, for a table in memory."""
    first = rows.cells([0]).to_pylist()[0]
    digest = hashlib.blake2b(repr((rows.source, rows.split, len(rows.table))).encode(), digest_size=16)
    if isinstance(first, str) or (isinstance(first, dict) and first.get("bytes") is None):
        for stored in _stored(rows):
            digest.update(repr(stored).encode())
        return digest.hexdigest()
    for name in (files := [file["filename"] for file in rows.table.cache_files]):
        status = os.stat(name)
        digest.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
    if (chosen := rows.table._indices) is not None:  # of the table's rows
        digest.update(chosen.column(0).to_numpy().tobytes())
    return digest.hexdigest() if files else ""


def stack_identity(stack: UInt8[Tensor, "n 3 h w"]) -> dict[str, Any]:
    """The same of embedded images."""
    count = len(stack)
    return _hashed("content", (image.numpy().tobytes() for image in stack), count) | {
        "names": [f"row {i}" for i in range(0, count, _step(count))]
    }


def describe_change(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What differs between two identities, as one clause; empty if nothing does."""
    if all(before[key] == after[key] for key in ("by", "count", "hash")):  # names may differ where the content does not
        return ""
    if before["by"] != after["by"]:
        return f"{before['count']} images known by {before['by']} -> {after['count']} known by {after['by']}"
    counts = f"{before['count']} images -> {after['count']}" if before["count"] != after["count"] else f"{after['count']} images as before"
    step = _step(before["count"])
    if step != _step(after["count"]):
        return counts
    pairs = zip(before["parts"], after["parts"], strict=False)
    part = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(before["parts"]), len(after["parts"])))
    if part >= len(after["names"]):
        return f"{counts}, those from {before['names'][part]} on are gone"
    return f"{counts}, the first that differs is " + (after["names"][part] if step == 1 else f"among {step} from {after['names'][part]} on")


def _step(count: int) -> int:
    """Rows in a part: a power of two, so that one image more seldom moves the bounds."""
    return 1 << max(0, (count - 1).bit_length() - _PARTS.bit_length() + 1)


def _hashed(by: str, images: Iterator[bytes], count: int) -> dict[str, Any]:
    step = _step(count)
    whole, part, parts = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8), []
    for row, data in enumerate(images, start=1):
        for digest in (whole, part):
            digest.update(len(data).to_bytes(8, "little") + data)
        if row % step == 0 or row == count:
            parts.append(part.hexdigest())
            part = hashlib.blake2b(digest_size=8)
    return {"count": count, "hash": whole.hexdigest(), "by": by, "parts": parts}


def _stored(rows: Records) -> Iterator[tuple[str, int, int]]:
    """(name, encoded bytes, ns of its file's last change or 0) of every image."""
    for some in rows.ranges(_ROWS):
        cells = rows.cells(some).combine_chunks()
        struct = str(cells.type).startswith("struct")
        data = pc.struct_field(cells, "bytes") if struct else cells
        lengths: list[int | None] = [None] * len(cells)
        paths = pc.struct_field(cells, "path").to_pylist() if struct else [None] * len(cells)
        if "string" in str(data.type):  # also large_string
            paths = data.to_pylist()
        elif "binary" in str(data.type):
            lengths = pc.binary_length(data).to_pylist()
        for row, (path, length) in enumerate(zip(paths, lengths, strict=True), some.start):
            changed = 0
            if length is None and path is not None:
                with suppress(OSError):
                    status = os.stat(rows.root / path)
                    length, changed = status.st_size, status.st_mtime_ns
            yield path or f"row {row}", length or 0, changed

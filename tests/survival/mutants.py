"""Images and Parquet files with damaged bytes, through the readers: `python -m tests.survival.mutants KIND SEED COUNT`.

Prints how many were read and how many were refused, the slowest in seconds, and how far the memory's peak rose, in MB."""

import io
import logging
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from ssl_vit.data.images import decode, header_size
from ssl_vit.data.sources import load_split
from ssl_vit.errors import Failure, UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
FORMATS = {
    "PNG": (("RGB", "RGBA", "LA", "P", "1", "I;16"), ({},)),
    "JPEG": (("RGB", "L", "CMYK"), ({}, {"progressive": True})),
    "WEBP": (("RGB", "RGBA"), ({}, {"lossless": True})),
    "TIFF": (("RGB", "CMYK", "F", "I;16"), ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}, {"compression": "packbits"})),
    "GIF": (("P",), ({},)),
    "BMP": (("RGB",), ({},)),
    "JPEG2000": (("RGB",), ({},)),
}
WORDS = (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\xff\xff", b"\x00\x01\x00\x00")


def encoded(form: str, mode: str, options: dict[str, object]) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(PIXELS).convert(mode)
    image.save(file, form, **options)
    return file.getvalue()


def images() -> list[bytes]:
    return [encoded(form, mode, options) for form, (modes, ways) in FORMATS.items() for mode in modes for options in ways]


def tables() -> list[bytes]:
    cells = [{"bytes": encoded("JPEG", "RGB", {}), "path": f"{number}.jpg"} for number in range(8)]
    files = []
    for compression in ("none", "snappy", "zstd"):
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"image": cells}), file, compression=compression)
        files.append(file.getvalue())
    return files


def mutant(data: bytes, rng: random.Random) -> bytes:
    """One to sixteen changes, half of them in the first 64 or the last 1,000 bytes, where headers stand."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        heads = (range(min(64, len(changed))), range(max(len(changed) - 1000, 0), len(changed)))
        at, few = rng.choice(rng.choice((*heads, range(len(changed)), range(len(changed))))), rng.randrange(1, 16)
        change = rng.randrange(6)
        if change == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            changed[at] = rng.randrange(256)
        elif change == 2:
            changed[at : at + 4] = rng.choice(WORDS)
        elif change == 3:
            changed[at:at] = rng.randbytes(few)
        else:
            del changed[at : at + few if change == 4 else None]
        if not changed:
            break
    return bytes(changed)


def read_image(data: bytes) -> None:
    header_size(data)
    assert decode(data, reduction=len(data) % 2 + 1).mode == "RGB"


def read_table(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.parquet").write_bytes(data)
        load_split(folder, "train", progress=False)


KINDS: dict[str, tuple[Callable[[], list[bytes]], Callable[[bytes], None]]] = {
    "images": (images, read_image),
    "tables": (tables, read_table),
}


def main(kind: str, seed: int, count: int) -> None:
    logging.disable()
    make, read = KINDS[kind]
    whole, rng = make(), random.Random(seed)
    for data in whole:
        read(data)
    before, slowest, came = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0, Counter[str]()
    for _ in range(count):
        data, begin = mutant(rng.choice(whole), rng), time.perf_counter()
        try:
            read(data)
            came["read"] += 1
        except (Failure, UsageError) as error:
            came["refused" if "\n" not in str(error) else "of several lines"] += 1
        slowest = max(slowest, time.perf_counter() - begin)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(came["read"], came["refused"], f"{slowest:.2f}", peak)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

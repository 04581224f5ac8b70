"""Where images come from: a name typed by the user becomes the images of a split. Labels are never read here.

A source is `builtin:NAME`, a local folder (class folders, Parquet, Arrow; see folders.py; `$NAME/folder` works too) or a Hugging Face
dataset id, `owner/name` or `owner/name:config`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from ssl_vit.data import photos
from ssl_vit.data.folders import VALIDATION, Tables, local_path, local_tables
from ssl_vit.data.hub import hub_tables
from ssl_vit.data.identity import identity, stack_identity
from ssl_vit.data.images import ImageStore, header_size, limit_side, to_tensor
from ssl_vit.data.memory_map import decoded
from ssl_vit.data.records import Records, read_records
from ssl_vit.errors import Failure, UsageError, near_path, one_of

_SAMPLE = 256
_BUILTINS = tuple(f"builtin:{name}" for name in photos.NAMES)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Images:
    """The decoded images of one split, and what identity.py says of them."""

    images: ImageStore
    identity: dict[str, Any]


def load_split(source: str, split: str, *, image_column: str | None = None, max_side: int | None = None, progress: bool = True) -> Images:
    """One split of `source`, decoded, images of a longer shorter side reduced to `max_side` px.

    A corrupt image has 0 px there: `Stream` lets another stand in for it. Raises UsageError for an unknown source, split or column;
    Failure for too many corrupt images, sets too large for the disk, and hub ids that cannot be fetched.
    """
    if source.startswith("builtin:"):
        stack = reduced = builtin(source, split).images
        if max_side is not None and max_side < photos.PATCH:
            reduced = torch.stack([to_tensor(limit_side(image, max_side)) for image in pil_images(stack)])
        return Images(ImageStore.stacked(reduced), stack_identity(stack))
    return load_records(open_records(source, split, image_column), max_side, progress)


def load_records(rows: Records, max_side: int | None, progress: bool) -> Images:
    """The same of an opened split."""
    needed, (what, key) = len(rows.table) * mean_bytes(rows, max_side), identity(rows)
    return Images(decoded(rows, max_side, key, needed, f"decoding {display_name(rows.source)}: {rows.split}", progress), what)


def open_records(source: str, split: str, image_column: str | None = None) -> Records:
    """The rows of one split of a folder or hub id, nothing decoded; a line says where another split stands in. Raises as `load_split`."""
    tables = open_tables(source)
    name, notices = find_split(source, split, list(tables))
    for notice in notices:
        rank_zero_info(notice)
    return read_records(source, name, tables, image_column)


def check_source(source: str) -> None:
    """UsageError or Failure, as `load_split`, for a name that cannot be one: an unknown builtin, a folder that is not there or holds
    no images. A hub id is asked for when it is loaded, one that may be a misspelt folder at once; nothing is fetched."""
    if source.startswith("builtin:"):
        check_builtin(source)
    elif (path := local_path(source)).exists() or not _HUB_ID.fullmatch(source) or near_path(path, folders=True):
        open_tables(source, fetch=False)


def check_builtin(source: str) -> None:
    if source not in _BUILTINS:
        raise UsageError(f"no embedded set {source!r}; {one_of(source, _BUILTINS)}")


def builtin(source: str, split: str) -> photos.Patches:
    """The embedded split, already decoded."""
    check_builtin(source)
    if split not in ("train", "test"):
        raise UsageError(f"{source} has no split {split!r}; {one_of(split, ['train', 'test'])}")
    embedded = photos.photos(source.removeprefix("builtin:"))
    return embedded.train if split == "train" else embedded.test


def pil_images(stack: torch.Tensor) -> Iterator[Image.Image]:
    """Of [n 3 h w]."""
    return (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in stack)


def open_tables(source: str, fetch: bool = True) -> Tables:
    """The splits of a folder or hub id; UsageError or Failure where there is nothing. Without `fetch`, a hub id is only asked for."""
    path = local_path(source)
    if path.exists():
        return local_tables(path.resolve())
    if unset := re.search(r"\$\w+|\$\{\w+\}", str(path)):
        raise UsageError(f"{source} names the environment variable {unset[0].strip('${}')}, which is not set: set it to a folder")
    near, where = near_path(path, folders=True), f"no such folder: {path.absolute()} (given as {source})"
    if not _HUB_ID.fullmatch(source) or path.suffix in (".parquet", ".arrow"):
        raise UsageError(f"{where}; {near}give a local folder, a Hugging Face id (owner/name), or {' or '.join(_BUILTINS)}")
    try:
        return hub_tables(source, fetch)
    except Failure as error:
        raise (UsageError if near else Failure)(f"{where}; {near}read as a Hugging Face id, {error}") from error


def find_split(source: str, wanted: str, known: list[str]) -> tuple[str, tuple[str, ...]]:
    """The split meant by `wanted`: itself, another name of validation, or for train the only one there is (said in a notice)."""
    if wanted in known:
        return wanted, ()
    if wanted in VALIDATION and (alias := next((name for name in VALIDATION if name in known), None)):
        return alias, ()
    if wanted == "train" and len(known) == 1:
        return known[0], (f"{source} has no split named train: its only split, {known[0]!r}, is used.",)
    raise UsageError(f"{source} has no split {wanted!r}; {one_of(wanted, known)}")


def display_name(source: str) -> str:
    path = local_path(source)
    return path.resolve().name if path.exists() else source


def mean_bytes(rows: Records, max_side: int | None) -> int:
    """Decoded bytes of an image, by the headers of some spread over the split; Failure if none of them can be read."""
    sample = torch.linspace(0, len(rows.table) - 1, min(_SAMPLE, len(rows.table))).long()
    total, read = 0.0, 0
    for row in sample.tolist():
        try:
            [(name, data)] = rows.encoded_rows([row])
            height, width = header_size(data, name)
        except Failure as error:  # the images that others stand in for are counted where they are decoded
            last = error
            continue
        shrink = min(1.0, max_side / min(height, width)) if max_side is not None else 1.0
        total, read = total + 3 * height * width * shrink**2, read + 1
    if read == 0:
        raise Failure(f"none of {len(sample)} images spread over {rows.source} can be read, the last one: {last}") from last
    return round(total / read)

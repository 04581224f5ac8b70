"""Local folders as tables: class folders of images, Parquet and Arrow files, and what `Dataset.save_to_disk` wrote.

Nothing outside the folder is read: a link or a file name in a metadata file that leads out of it is refused.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from ssl_vit.data.images import EXTENSIONS
from ssl_vit.errors import Failure, UsageError, reason

VALIDATION = ("validation", "val", "valid")
_SPLITS = ("train", "test", *VALIDATION)
_METADATA = ("metadata.csv", "metadata.jsonl")

Tables = dict[str, Callable[[], Any]]
"""Split name -> function that opens its `datasets.Dataset`."""


def hf_datasets() -> Any:
    """The package `datasets`, imported when it is needed, without progress bars of its own."""
    import datasets

    datasets.disable_progress_bars()
    return datasets


def local_path(source: str) -> Path:
    """The path that a source names; `~` and environment variables (`$DATA/cifar10`) are the machine's, not the recipe's."""
    return Path(os.path.expandvars(source)).expanduser()


def inside(path: Path, root: Path) -> Path:
    """`path` (relative ones start at `root`), or Failure if it leads out of `root`."""
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise Failure(f"{path} leads out of {root}, so it is refused; put the file itself into the folder")
    return root / path


def local_tables(path: Path) -> Tables:
    """The splits of a folder (or of one Parquet or Arrow file), opened when asked for.

    Raises UsageError when there is nothing to read, Failure for a link out of the folder and for files that cannot be grouped into splits.
    """
    root = path if path.is_dir() else path.parent
    if (root / "dataset_dict.json").exists() or (root / "state.json").exists():
        return _saved_tables(root)
    files = list(_walk(str(root), str(root))) if path.is_dir() else [str(path)]
    for kind in ("parquet", "arrow"):
        if tables := [Path(file) for file in files if file.endswith(f".{kind}")]:
            return {split: partial(_open_files, kind, split, parts) for split, parts in _grouped(tables, root).items()}
    images = [file for file in files if _suffix(file).lower() in EXTENSIONS]
    if not images:
        found = ", ".join(f"{count} {suffix or 'without extension'}" for suffix, count in Counter(map(_suffix, files)).most_common(5))
        raise UsageError(
            f"{path} holds no images (found: {found or 'nothing, it is empty'}); allowed: class folders of images "
            f"({' '.join(sorted(EXTENSIONS))}), Parquet or Arrow files"
        )
    folders = [folder.name for folder in subfolders(root)]
    if not any(name in _SPLITS for name in folders):
        return {"train": partial(_open_images, root, root, images)}
    by_split = {name: [file for file in images if file.startswith(f"{root / name}{os.sep}")] for name in folders}
    return {name: partial(_open_images, root, root / name, found) for name, found in by_split.items() if found}


def _walk(folder: str, root: str) -> Iterator[str]:
    """The files below a folder in the order of their paths, by one scan of every folder; only links are looked up one by one."""
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        if _hidden(entry.name):
            continue
        if entry.is_symlink():
            inside(Path(entry.path).relative_to(root), Path(root))
            if entry.is_dir():  # a split or class would be missing unnoticed
                raise Failure(f"{entry.path} is a link to a folder; links to folders are not followed: put the folder itself there")
        if entry.is_dir():
            yield from _walk(entry.path, root)
        else:
            yield entry.path


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1]


def subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry.name))


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _grouped(files: list[Path], root: Path) -> dict[str, list[Path]]:
    """Files by split: `train-00000-of-00001.parquet`, `test.parquet`, `val/0000.parquet`; a name that tells nothing is train."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        numbered = re.fullmatch(r"(.+?)-\d{5}-of-\d{5}.*", file.stem)
        folder = file.parent.name if file.parent != root else ""
        stem = re.split(r"[-_.]", file.stem)[0]
        split = numbered[1] if numbered else next((name for name in (stem, folder) if name in _SPLITS), "train")
        groups.setdefault(split, []).append(file)
    for split, parts in groups.items():
        folders = sorted({str(part.parent.relative_to(root)) for part in parts})
        if len(folders) > 1:
            raise Failure(f"{root} holds the split {split!r} in several folders ({', '.join(folders)}); name one of them as the source")
    return groups


def _open_files(kind: str, split: str, files: list[Path], **options: Any) -> Any:
    datasets = hf_datasets()
    try:
        if kind == "arrow":
            with suppress(ValueError):  # the IPC file format, or files of different types: converted as the others are
                return _mapped(files)
        # `datasets` keeps its converted copy in its own cache folder, memory-mapped
        return datasets.load_dataset(kind, data_files={split: [str(file) for file in files]}, split=split, **options)
    except Exception as error:
        raise Failure(f"{files[0]} (split {split!r}) cannot be read as {kind}: {reason(error.__cause__ or error)}") from error


def _mapped(files: list[Path]) -> Any:
    """Arrow files of the stream format where they are; no copy."""
    datasets = hf_datasets()
    table = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    table.data.validate(full=True)  # reads offsets, not images: one that leads out of a damaged file would end the process
    return table


def _saved_tables(root: Path) -> Tables:
    try:
        saved = hf_datasets().load_from_disk(str(root))
    except Exception as error:
        raise Failure(f"{root} cannot be read as a folder of Dataset.save_to_disk: {reason(error)}") from error
    tables = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    return {split: partial(tables.__getitem__, split) for split in tables}


def _open_images(root: Path, base: Path, images: list[str]) -> Any:
    """The table of the images in a folder `base`: its metadata file if there is one, else paths that start at `root`."""
    if metadata := next((base / name for name in _METADATA if (base / name).exists()), None):
        return _open_metadata(root, metadata, images)
    return image_table([image[len(str(root)) + 1 :] for image in images])


def image_table(paths: list[str]) -> Any:
    """A table of one column, `image`, of these files; not by way of a Python object a row."""
    import pyarrow as pa

    datasets = hf_datasets()
    nothing = pa.nulls(len(paths), pa.binary())
    cells = pa.StructArray.from_arrays([nothing, pa.array(paths, pa.string())], ["bytes", "path"])
    info = datasets.DatasetInfo(features=datasets.Features({"image": datasets.Image(decode=False)}))
    return datasets.Dataset(pa.table({"image": cells}), info=info)


def _open_metadata(root: Path, file: Path, images: list[str]) -> Any:
    """metadata.csv or metadata.jsonl beside the `images`: `file_name`, relative to it, and further columns."""
    text: dict[str, Any] = {}
    if file.suffix == ".csv":  # all of it is text: a type guessed from it would make one class of 001 and 1, and none of NA
        datasets = hf_datasets()
        with file.open(newline="", encoding="utf-8") as lines:
            header = next(csv.reader(lines), [])
        text = {"features": datasets.Features({name: datasets.Value("string") for name in header}), "keep_default_na": False}
    table = _open_files("csv" if text else "json", "train", [file], **text)
    names: list[Any] = list(table["file_name"]) if "file_name" in table.column_names else [None]
    if None in names:
        raise Failure(f"{file}: row {names.index(None)} has no file_name (columns: {', '.join(table.column_names)}); every row needs one")
    paths = [str(inside(file.parent / name, root)) for name in names]
    used = set(map(os.path.normpath, paths)).intersection(images)
    if len(used) < len(images):
        rank_zero_info(f"{file} names {len(used)} of the {len(images)} images beside it; no others are used")
    image = image_table(paths)
    rest = table.remove_columns("file_name")
    return hf_datasets().concatenate_datasets([image, rest], axis=1) if rest.column_names else image

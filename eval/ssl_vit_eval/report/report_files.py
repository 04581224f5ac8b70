"""The files of a report in a folder: nothing is overwritten that another program or a person wrote."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ssl_vit.errors import UsageError
from ssl_vit_eval.report.page import MARKDOWN_MARKER, MARKER

FOLDERS = ("tables", "plots")
NAME = r"report\.(html|md)|(tables|plots)/\w[^/\\]*"
OURS = ".ssl-vit-report"  # the names of the files that the last report in a folder consists of


def check_out(out: Path) -> None:
    """UsageError for a folder that a report cannot be written into: a file, or one that holds a report which is not ours."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: name a folder, report.html is written into it")
    for name in ("report.html", "report.md", *(folder for folder in FOLDERS if not (out / folder).is_dir())):
        _check_free(out, name, _before(out))


def _before(out: Path) -> list[str]:
    """What the last report in the folder consists of; a list that was tampered with leads to nothing else."""
    try:
        names = json.loads((out / OURS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name in names if re.fullmatch(NAME, str(name))] if isinstance(names, list) else []


def _check_free(out: Path, name: str, before: Sequence[str]) -> None:
    path = out / name
    if not path.exists() or (name in before and path.is_file()):
        return
    if not (path.is_file() and path.suffix in (".html", ".md") and _marked(path)):
        raise UsageError(f"{path} was not written by ssl-vit compare and is left alone: name another folder with --out")


def _marked(path: Path) -> bool:
    with open(path, encoding="utf-8", errors="replace") as file:
        start = file.read(1000)
    return MARKER in start or MARKDOWN_MARKER in start


def replace_files(out: Path, contents: Mapping[str, bytes]) -> None:
    """Write the files into `out`, each complete before it has its name; what the last report had and this one has not is removed.

    UsageError, before anything is written, as `check_out`, and for a file of one of these names that is not of the last report.
    """
    check_out(out)
    before = _before(out)
    for name in contents:
        _check_free(out, name, before)
    for folder in FOLDERS:
        (out / folder).mkdir(parents=True, exist_ok=True)
    _write(out / OURS, json.dumps([*contents, *(name for name in before if name not in contents)]).encode())  # a kill leaves none unknown
    for name, content in contents.items():
        _write(out / name, content)
    for name in before:
        if name not in contents:
            (out / name).unlink(missing_ok=True)
    _write(out / OURS, json.dumps(list(contents)).encode())


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)

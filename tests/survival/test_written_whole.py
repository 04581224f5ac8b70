"""No file of ours is written under its final name: a kill at any moment leaves the old one, the new one or none, never a half."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssl_vit.cli import run
from ssl_vit_eval.features.store import FeatureFile, FeatureKey
from ssl_vit_eval.rows import RowStore
from tests.planted import plant

APPENDED = {"metrics.jsonl", "rows.jsonl"}  # whose last line, if a kill has cut it, is left out by every reader
_opened: set[Path] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    """The files that are opened to be written, while somebody wants to know."""
    if event != "open" or _opened is None or not isinstance(arguments[0], str):
        return
    path, mode, flags = arguments
    if set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR):
        _opened.add(Path(path).resolve())


sys.addaudithook(_note)


@pytest.fixture
def opened() -> Iterator[set[Path]]:
    global _opened
    _opened = set()
    yield _opened
    _opened = None


def in_place(opened: set[Path], *folders: str) -> set[str]:
    """Of the files in these folders those that were opened under the name they have now."""
    found = [path for path in opened if any(path.is_relative_to(Path(folder).resolve()) for folder in folders)]
    assert found
    return {path.name for path in found if path.is_file() and path.suffix != ".lock" and path.name != ".lock"}


@pytest.mark.survival
def test_no_file_is_written_in_place(three_classes: None, opened: set[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_VIT_CACHE", str(Path("cache").absolute()))
    monkeypatch.setattr("ssl_vit.data.memory_map.SMALL", 0)
    study = {"recipes": ["mae.yaml"], "trained_with": ["cls", "gap"], "seeds": [0], "data": ["./pictures"], "protocols": ["knn"]}
    Path("study.yaml").write_text(yaml.safe_dump({**study, "read_with": ["cls", "gap"], "diagnostics": True}))
    assert run(["study", "study.yaml", "--out", "out"]) == 0
    names = in_place(opened, "out", "cache")
    # the figure of diagnostics gets its name in their JSON file, which follows it
    assert {name for name in names if not (name.startswith("diagnostics-") and name.endswith(".png"))} == APPENDED


def test_rows_and_features_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut would undo cannot be tried: only that the system is asked."""
    synced, fsync = set[int](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.add(os.fstat(descriptor).st_ino), fsync(descriptor)))
    store = RowStore(tmp_path)
    plant(store, torch.arange(300) % 2)
    file = FeatureFile(tmp_path, FeatureKey("weights", "data", "train", "resize", "mean std", "cls", rows=2, width=3))
    with file.writing():
        file.write(0, torch.zeros(2, 3))
    assert {path.stat().st_ino for path in (store.file, file.path)} <= synced

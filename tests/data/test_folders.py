"""Sources that are refused: ways out of the folder, what is not there, what holds no pictures, what cannot be fetched."""

import time
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from ssl_vit.data.sources import open_records
from ssl_vit.errors import Failure, UsageError
from tests.data.test_sources import load, load_both, write

pytestmark = pytest.mark.usefixtures("own_cache")


def out_of_folder_link(root: Path) -> None:
    (root / "cat" / "link.png").symlink_to(root.parent / "outside.png")


def out_of_folder_folder(root: Path) -> None:
    (root / "dog").symlink_to(root.parent / "elsewhere")


def inner_folder_link(root: Path) -> None:
    (root / "dog").symlink_to(root / "cat")


def out_of_folder_metadata(root: Path) -> None:
    (root / "metadata.jsonl").write_text('{"file_name": "../outside.png"}\n')


def out_of_folder_row(root: Path) -> None:
    pointer = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": "../outside.png"}]}, datasets.Features({"image": pointer}))
    rows.to_parquet(root / "train.parquet")


@pytest.mark.parametrize("trap", [out_of_folder_link, out_of_folder_folder, out_of_folder_metadata, inner_folder_link, out_of_folder_row])
def test_ways_out_of_the_folder_are_refused(tmp_path: Path, trap: Callable[[Path], None]) -> None:
    write(tmp_path, "outside.png", "elsewhere/a.png", "root/cat/a.png")
    trap(tmp_path / "root")
    with pytest.raises(Failure, match=r"leads out of|is a link to a folder"):
        load(tmp_path / "root")


def test_a_way_out_in_metadata_is_refused_before_any_image_is_read(tmp_path: Path) -> None:
    """Or it would pass for a corrupt image, of which a few are replaced."""
    write(tmp_path, "outside.png", "root/cat/a.png")
    out_of_folder_metadata(tmp_path / "root")
    with pytest.raises(Failure, match="leads out of"):
        open_records(str(tmp_path / "root"), "train")


def test_link_inside_the_folder_is_read(tmp_path: Path) -> None:
    write(tmp_path, "cat/a.png")
    (tmp_path / "cat" / "b.png").symlink_to("a.png")
    assert len(load(tmp_path).images) == 2


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "owner/", "data/train.parquet"])
def test_missing_folder(source: str) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        load(source)


def test_folder_without_pictures_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no images .found: nothing, it is empty"):
        load(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(UsageError, match=r"found: 1 \.txt"):
        load(tmp_path)


def test_unreadable_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(Failure, match=r"train\.parquet .* cannot be read as parquet"):
        load(tmp_path)


def test_unknown_builtin() -> None:
    with pytest.raises(UsageError, match="did you mean 'builtin:photos'"):
        load("builtin:photo")
    with pytest.raises(UsageError, match="has no split 'val'"):
        load("builtin:photos", "val")
    with pytest.raises(UsageError, match="as train and as test"):
        load_both("builtin:photos", test_split="train")


@pytest.mark.parametrize("offline", [True, False])
def test_hub_without_network_fails_fast(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(Failure, match=r"'nobody/nothing' cannot be fetched.*give a local folder"):
        load("nobody/nothing")
    assert time.monotonic() - start < 5

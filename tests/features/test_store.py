"""Features on disk: what is written comes back, and what is cut short or of something else is never taken for it."""

import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssl_vit.errors import Failure
from ssl_vit_eval.features.store import FeatureFile, FeatureKey, check_room, clear_abandoned

KEY = FeatureKey("weights", "pictures", "train", "resize16", "mean std", "cls", rows=7, width=3)
VALUES = torch.arange(21.0).view(7, 3)


def written(folder: Path, key: FeatureKey = KEY, values: torch.Tensor = VALUES) -> FeatureFile:
    file = FeatureFile(folder, key)
    with file.writing():
        file.write(4, values[4:])
        file.write(0, values[:4])
    return file


def read(file: FeatureFile) -> torch.Tensor | None:
    return file.mapped() if file.is_whole() else None


def test_features_come_back_mapped(tmp_path: Path) -> None:
    assert read(FeatureFile(tmp_path, KEY)) is None
    found = read(written(tmp_path / "new"))
    assert found is not None
    torch.testing.assert_close(found, VALUES, rtol=0, atol=0)
    mapped = Path("/proc/self/maps")
    assert not mapped.exists() or written(tmp_path / "new").path.name in mapped.read_text()
    found[0, 0] = 99.0  # a write stays in memory
    again = read(FeatureFile(tmp_path / "new", KEY))
    assert again is not None
    assert again[0, 0] == 0.0
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".features"]


def test_an_unfinished_pass_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    file = FeatureFile(tmp_path, KEY)

    def stopped() -> None:
        with file.writing():
            file.write(0, VALUES)
            assert not file.path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(tmp_path.iterdir()) == []
    left = [tmp_path / f"{KEY.digest}.{age}.partial" for age in ("old", "new")]
    for path in left:
        path.write_bytes(b"of a process that was killed, or is at work")
    os.utime(left[0], (1, 1))
    clear_abandoned(tmp_path)
    assert [path.exists() for path in left] == [False, True]


def test_two_evaluations_may_write_the_same_features(tmp_path: Path) -> None:
    one, other = FeatureFile(tmp_path, KEY), FeatureFile(tmp_path, KEY)
    with one.writing():
        one.write(0, VALUES)
        with other.writing():
            other.write(0, VALUES[:3])
            other.write(3, VALUES[3:])
    found = read(FeatureFile(tmp_path, KEY))
    assert found is not None
    assert torch.equal(found, VALUES)


def test_damaged_numbers_are_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    content = bytearray(file.path.read_bytes())
    content[-20] ^= 1
    file.path.write_bytes(content)
    assert read(file) is None
    assert "damaged" in capsys.readouterr().out


def test_a_file_with_something_behind_it_is_computed_again(tmp_path: Path) -> None:
    file = written(tmp_path)
    with file.path.open("ab") as target:
        target.write(b"x")
    assert read(file) is None


@pytest.mark.parametrize("size", [0, 10, 4096, 4096 + 83, 4096 + 84, 4096 + 84 + 7])
def test_a_file_that_was_cut_short_is_computed_again(tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    file.path.write_bytes(file.path.read_bytes()[:size])
    assert read(FeatureFile(tmp_path, KEY)) is None
    assert "is cut short, damaged or belongs to something else; computed again" in capsys.readouterr().out
    assert read(written(tmp_path)) is not None


@pytest.mark.parametrize("field", ["checkpoint", "data", "split", "transform", "normalisation", "spec", "format"])
def test_features_of_something_else_are_not_read(tmp_path: Path, field: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(KEY, **{field: 99 if field == "format" else "other"})  # type: ignore[arg-type]
    file = written(tmp_path)
    assert read(FeatureFile(tmp_path, other)) is None  # another file
    assert capsys.readouterr().out == ""
    file.path.rename(FeatureFile(tmp_path, other).path)  # this file under the other's name
    assert read(FeatureFile(tmp_path, other)) is None
    assert "belongs to something else" in capsys.readouterr().out


def test_a_full_disk_is_an_error_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = FeatureFile(tmp_path, KEY)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssl_vit_eval.features.store.os.pwrite", full)
    with pytest.raises(OSError, match="No space left"), file.writing():
        file.write(0, VALUES)
    assert list(tmp_path.iterdir()) == []


def test_a_system_that_writes_a_part_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:5], offset))
    found = read(written(tmp_path))
    assert found is not None
    assert torch.equal(found, VALUES)


def test_a_disk_that_fails_at_the_start_leaves_no_file_and_the_next_writing_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = FeatureFile(tmp_path, KEY)

    def fails() -> None:
        assert len(list(tmp_path.iterdir())) == 1  # what was begun
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ssl_vit_eval.features.store.barrier", fails)
        with pytest.raises(OSError, match="No space left"), file.writing():
            pass
    assert list(tmp_path.iterdir()) == []
    with file.writing():
        file.write(0, VALUES)
    assert file.is_whole()


def test_more_files_are_written_at_once_than_can_be_open(tmp_path: Path) -> None:
    files = [FeatureFile(tmp_path, replace(KEY, spec=str(number))) for number in range(40)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open(os.devnull, os.O_RDONLY)  # the lowest number that is free
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 10, hard))
    try:
        for file in files:
            file.begin()
        for file in files:
            file.write(0, VALUES)
        for file in files:
            file.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(file.is_whole() for file in files)


def test_half_precision_takes_half_the_room_and_is_another_file(tmp_path: Path) -> None:
    half = written(tmp_path, replace(KEY, dtype="float16"), VALUES / 3)
    found = read(half)
    assert found is not None
    assert torch.equal(found, (VALUES / 3).half())
    assert half.size == half.path.stat().st_size == written(tmp_path).size - 2 * VALUES.numel()
    # a key without the field, as earlier versions wrote it, is the same file
    assert '"dtype"' not in KEY.text


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    check_room([FeatureFile(tmp_path, KEY)], "a")
    huge = FeatureFile(tmp_path, replace(KEY, rows=2**40, width=2**10))
    with pytest.raises(
        Failure, match=r"vit: train needs 4194304\.0 GiB in .*, [\d.]+ GiB are free there; name another folder with --cache"
    ):
        check_room([huge], "vit: train")
    assert list(tmp_path.iterdir()) == []

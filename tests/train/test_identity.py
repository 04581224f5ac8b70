"""A run goes on with the images that it began with, or not at all."""

import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from ssl_vit.cli import run
from ssl_vit.data.identity import identity, stored_key
from ssl_vit.data.sources import open_records


@pytest.mark.parametrize("decode", ["memory", "stream"])
@pytest.mark.parametrize("change", ["added", "removed", "replaced", "renamed"])
def test_resume_on_other_images_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, decode: str, change: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(images / f"{number:02}.png")
    workers = ["--data.workers", "0"] if decode == "stream" else []
    command = [
        "pretrain",
        "mae_smoke",
        "--data.source",
        str(images),
        "--data.batch_size",
        "4",
        "--data.decode",
        decode,
        *workers,
        "--out",
        "run",
    ]
    assert run([*command, "--trainer.limit_train_batches", "3"]) == 0
    (tmp_path / "run" / "run.json").unlink()  # as one that was killed at its end
    if change == "added":
        shutil.copy(images / "03.png", images / "0300.png")
    elif change == "removed":
        (images / "07.png").unlink()
    elif change == "replaced":
        shutil.copy(images / "03.png", images / "07.png")
    else:  # in the same place: the same images
        (images / "07.png").rename(images / "070.png")
    capsys.readouterr()
    if change == "renamed":
        assert run([*command, "--trainer.limit_train_batches", "3", "--resume"]) == 0
        return
    assert run([*command, "--trainer.limit_train_batches", "3", "--resume"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot resume on other data" in line
    assert {"added": "12 images -> 13", "removed": "12 images -> 11", "replaced": "07.png"}[change] in line


@pytest.mark.parametrize("limit", ["HASHED_BYTES", "HASHED_FILES"])
def test_of_many_images_names_and_sizes_are_looked_at(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And their times, in the key of what was decoded: a copy with other times is the same to a resume, and decoded again."""
    for number in range(3):
        Image.new("L", (8, 8 + number)).save(tmp_path / f"{number}.png")
    records = open_records(str(tmp_path), "train")
    found, key = identity(records)
    assert (found["by"], key) == ("content", found["hash"])
    monkeypatch.setattr(f"ssl_vit.data.identity.{limit}", 2)
    found, key = identity(records)
    assert found["by"] == "names and sizes"
    os.utime(tmp_path / "1.png", ns=(1, 2**62))
    again, other = identity(records)
    assert again == found
    assert other != key
    (tmp_path / "1.png").write_bytes(b"another size")
    assert identity(records)[0]["hash"] != found["hash"]


def test_the_times_of_a_table_s_files_are_in_what_it_is_remembered_by(tmp_path: Path) -> None:
    images = datasets.Dataset.from_dict({"image": [Image.new("L", (8, 8)), Image.new("L", (8, 9))]})
    images.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "table")
    before = stored_key(open_records(str(tmp_path / "table"), "train"))
    assert before == stored_key(open_records(str(tmp_path / "table"), "train")) != ""
    for file in (tmp_path / "table").glob("*.arrow"):
        os.utime(file, ns=(1, 1))
    assert stored_key(open_records(str(tmp_path / "table"), "train")) != before

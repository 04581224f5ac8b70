"""Every kind of source, its splits, columns and labels, and what is said when something is wrong with it."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.images import to_tensor
from ssl_vit.data.records import read_records
from ssl_vit.data.sources import check_source, find_split, load_split, open_tables
from ssl_vit.errors import Failure, UsageError
from ssl_vit_eval import splits
from ssl_vit_eval.lazy_images import EvalTransform

datasets = pytest.importorskip("datasets")


pytestmark = pytest.mark.usefixtures("own_cache")


def png(value: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (side, side), value).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, *files: str) -> Path:
    """One-colour pictures whose grey value is their number in `files`."""
    for value, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(png(value))
    return root


def table(values: list[int], labels: list[Any], feature: Any = None) -> Any:
    features = datasets.Features({"image": datasets.Image(), "label": feature or datasets.ClassLabel(names=["cat", "dog", "owl"])})
    pictures = [{"bytes": png(value), "path": None} for value in values]
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features)


def greys(split: Any) -> list[int]:
    return [int(split.images[i].float().mean()) for i in range(len(split.images))]


def load(source: Path | str, split: str = "train", **options: Any) -> Any:
    """Labels are the judging side's; the images alone are decoded for pretraining."""
    if not options.pop("labels", False):
        return load_split(str(source), split, progress=False, **options)
    tables = open_tables(str(source))
    rows = read_records(str(source), find_split(str(source), split, list(tables))[0], tables, None)
    return splits.encoded(splits.read_labels(rows, options.get("label_column")), EvalTransform(options.get("size", 8)), False, ())


def load_both(source: Path | str, size: int = 8, **options: Any) -> Any:
    return splits.load_train_test(str(source), size=size, progress=False, **options)


# --- kinds of source


def test_class_folders_with_split_folders(tmp_path: Path) -> None:
    write(
        tmp_path,
        "train/cat/a.png",
        "train/dog/b.png",
        "train/dog/deep/c.JPG",
        "test/dog/d.png",
        "test/cat/e.png",
        ".hidden/x.png",
        "train/cat/notes.txt",
    )
    train, test = load_both(tmp_path)
    assert (train.classes, train.labels.tolist(), greys(train)) == (("cat", "dog"), [0, 1, 1], [0, 1, 2])
    assert (test.classes, test.labels.tolist(), greys(test)) == (("cat", "dog"), [0, 1], [4, 3])
    assert (train.dataset, train.split, test.split, train.notices, test.notices) == (tmp_path.name, "train", "test", (), ())
    assert train.selection is None


def test_class_folders_without_split_folders_and_flat_folders(tmp_path: Path) -> None:
    write(tmp_path / "classes", "cat/a.png", "dog/b.png")
    assert load(tmp_path / "classes", labels=True).labels.tolist() == [0, 1]
    assert greys(load(write(tmp_path / "flat", "a.png", "b.png", "c.png"))) == [0, 1, 2]
    with pytest.raises(UsageError, match="no class folders"):
        load(tmp_path / "flat", labels=True)


@pytest.mark.parametrize("layout", ["{}-00000-of-00001.parquet", "data/{}-00000-of-00001.parquet", "{}/0000.parquet", "{}.parquet"])
def test_parquet_folders(tmp_path: Path, layout: str) -> None:
    for split, values in (("train", [3, 4, 5]), ("val", [6, 7])):
        file = tmp_path / layout.format(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        table(values, [2, 0, 1][: len(values)]).to_parquet(file)
    train = load(tmp_path, labels=True)
    assert (greys(train), train.labels.tolist(), train.classes) == ([3, 4, 5], [2, 0, 1], ("cat", "dog", "owl"))
    assert greys(load(tmp_path, "validation")) == greys(load(tmp_path, "valid")) == [6, 7]


def test_several_parquet_parts_and_a_single_file(tmp_path: Path) -> None:
    for part in range(2):
        table([part], [part]).to_parquet(tmp_path / f"train-0000{part}-of-00002.parquet")
    assert greys(load(tmp_path)) == [0, 1]
    single = load(tmp_path / "train-00001-of-00002.parquet", labels=True)
    assert (greys(single), single.labels.tolist()) == ([1], [1])


def test_a_source_may_start_with_an_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        table([1, 2], [0, 1]).to_parquet(tmp_path / "set" / f"{split}.parquet")
    monkeypatch.setenv("OUR_DATA", str(tmp_path))
    check_source("$OUR_DATA/set")
    train, _ = splits.load_train_test("$OUR_DATA/set", size=8, progress=False)
    assert train.dataset == "set"
    with pytest.raises(UsageError, match=rf"no such folder: {tmp_path}/other \(given as \$OUR_DATA/other\)"):
        check_source("$OUR_DATA/other")
    monkeypatch.delenv("OUR_DATA")
    with pytest.raises(UsageError, match="environment variable OUR_DATA, which is not set"):
        check_source("$OUR_DATA/set")


def test_one_split_in_several_folders_is_refused(tmp_path: Path) -> None:
    for config in ("large", "small"):
        (tmp_path / config).mkdir()
        table([1], [0]).to_parquet(tmp_path / config / "train-00000-of-00001.parquet")
    with pytest.raises(Failure, match=r"'train' in several folders \(large, small\)"):
        load(tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_saved_to_disk(tmp_path: Path, whole: bool) -> None:
    train, test = table([1, 2], [0, 1]), table([3], [1])
    saved = datasets.DatasetDict({"train": train, "test": test}) if whole else train
    saved.save_to_disk(tmp_path / "set")
    assert greys(load(tmp_path / "set")) == [1, 2]
    if whole:
        assert greys(load(tmp_path / "set", "test")) == [3]


def test_loose_arrow_files(tmp_path: Path) -> None:
    table([1, 2], [0, 1]).save_to_disk(tmp_path / "set")
    next((tmp_path / "set").glob("*.arrow")).rename(tmp_path / "test-00000-of-00001.arrow")
    for file in (tmp_path / "set").iterdir():
        file.unlink()
    assert greys(load(tmp_path, "test")) == [1, 2]


def test_metadata_file_gives_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "a.png", "sub/b.png")
    for b, a in (("zebra", "ant"), ("NA", "1"), ("1", "001")):  # text, whatever it looks like
        (tmp_path / "metadata.csv").write_text(f"file_name,label\nsub/b.png,{b}\na.png,{a}\n")
        split = load(tmp_path, labels=True)
        assert (greys(split), split.labels.tolist(), split.classes) == ([1, 0], [1, 0], (a, b))
    assert not caplog.messages
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,ant\n")
    assert greys(load(tmp_path)) == [0]
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,ant\nsub/../a.png,ant\n")  # one file, named twice
    assert greys(load(tmp_path)) == [0, 0]
    assert caplog.messages == [f"{tmp_path / 'metadata.csv'} names 1 of the 2 images beside it; no others are used"] * 2
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,ant\nsub/b.png,bee\na.png,cat\n")
    assert greys(load(tmp_path)) == [0, 1, 0]
    assert len(caplog.messages) == 2
    (tmp_path / "metadata.csv").write_text("file_name,label\n/etc/a.png,ant\n")
    with pytest.raises(Failure, match="leads out of"):
        load(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": "x"}\n{"label": "y"}\n')
    with pytest.raises(Failure, match=r"row 1 has no file_name"):
        load(tmp_path)


@pytest.mark.parametrize(("name", "train", "test"), [("photos", 7948, 2071), ("photos-new", 3299, 848)])
def test_builtin_sets(name: str, train: int, test: int) -> None:
    both = load_both(f"builtin:{name}", size=32)
    assert [len(split.images) for split in both] == [train, test]
    assert [len(split.labels) for split in both] == [train, test]
    assert both[0].selection.sum() > 0
    assert both[1].selection is None
    assert both[0].classes == both[1].classes
    small = splits.load_images(f"builtin:{name}", "test", 16)
    assert small.sizes.tolist() == [[16, 16]] * test
    whole = Image.fromarray(both[1].images[test - 1].permute(1, 2, 0).numpy())
    assert torch.equal(small[test - 1], to_tensor(EvalTransform(16)(whole)))
    assert load(f"builtin:{name}", "test", max_side=16).images.sizes.tolist() == [[16, 16]] * test


# --- splits


def test_validation_serves_as_test_and_is_said(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png")
    _, test = load_both(tmp_path)
    assert test.split == "val"
    assert "no split named test: its split 'val' is the test set" in test.notices[0]


def test_missing_test_is_a_stratified_fifth_of_train(tmp_path: Path) -> None:
    labels = [0] * 40 + [1] * 20 + [2]
    table(list(range(61)), labels).to_parquet(tmp_path / "train.parquet")
    train, test = load_both(tmp_path)
    assert sorted(greys(train) + greys(test)) == list(range(61))
    assert torch.bincount(test.labels, minlength=3).tolist() == [8, 4, 0]
    assert [labels[value] for value in greys(test)] == test.labels.tolist()
    assert "stratified 20% of its 'train' (seed 0)" in test.notices[0]
    assert greys(load_both(tmp_path)[1]) == greys(test)


def test_named_splits_override_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    for split, value in (("train", 1), ("test", 2), ("extra", 3)):
        table([value], [0]).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    train, test = load_both(tmp_path, train_split="extra", test_split="train")
    assert (greys(train), greys(test)) == ([3], [1])
    with pytest.raises(UsageError, match=r"no split 'tset'; did you mean 'test'. choose one of: extra, test, train"):
        load(tmp_path, "tset")
    with pytest.raises(UsageError, match="as train and as test"):
        load_both(tmp_path, test_split="train")


def test_joined_splits(tmp_path: Path) -> None:
    """train + validation, whose class lists differ in order and content; what is joined is not tested on."""
    names = {"train": ["cat", "dog"], "val": ["owl", "dog"], "test": ["dog", "owl", "cat"]}
    for start, (split, classes) in enumerate(names.items()):
        table([10 * start, 10 * start + 1], [0, 1], datasets.ClassLabel(names=classes)).to_parquet(tmp_path / f"{split}.parquet")
    train, test = load_both(tmp_path, train_split="train+validation")
    assert (train.split, train.classes) == ("train+val", ("cat", "dog", "owl"))
    assert [train.classes[label] for label in train.labels] == ["cat", "dog", "owl", "dog"]
    assert (greys(train), greys(test), test.labels.tolist()) == ([0, 1, 10, 11], [20, 21], [1, 2])
    joined, _ = load_both(tmp_path, train_split="val+train", test_split="test")
    assert greys(joined) == [10, 11, 0, 1]
    assert joined.fingerprint != train.fingerprint
    for wrong, message in (
        ({"train_split": "train+val", "test_split": "validation"}, "'val' would be both train and test"),
        ({"train_split": "val+train+validation"}, "names a split twice"),
        ({"train_split": "train+vla"}, "no split 'vla'; did you mean 'val'"),
    ):
        with pytest.raises(UsageError, match=message):
            load_both(tmp_path, **wrong)
    (tmp_path / "test.parquet").unlink()
    made, rest = load_both(tmp_path, train_split="train+val")
    assert sorted(greys(made) + greys(rest)) == [0, 1, 10, 11]
    assert "20% of its 'train+val'" in rest.notices[0]


def test_the_only_split_stands_in_for_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    table([1, 2], [0, 1]).to_parquet(tmp_path / "test.parquet")
    split = load(tmp_path)
    assert greys(split) == [1, 2]
    assert "its only split, 'test', is used" in caplog.text


# --- columns and labels


def test_plain_columns_of_names_and_numbers_become_classes(tmp_path: Path) -> None:
    for name, feature, train, test in (
        ("names", datasets.Value("string"), ["owl", "ant", "owl"], ["owl"]),
        ("numbers", datasets.Value("int64"), [10, 9, 10], [10]),
    ):
        (tmp_path / name).mkdir()
        table([1, 2, 3], train, feature).to_parquet(tmp_path / name / "train.parquet")
        table([4], test, feature).to_parquet(tmp_path / name / "test.parquet")
        splits = load_both(tmp_path / name)
        assert [split.labels.tolist() for split in splits] == [[1, 0, 1], [1]]
        assert splits[0].classes == splits[1].classes == (("ant", "owl") if name == "names" else ("9", "10"))
        assert "lacks 1 of 2 classes" in splits[1].notices[0]


def test_test_ids_are_trains_by_name(tmp_path: Path) -> None:
    table([1, 2], [0, 1], datasets.ClassLabel(names=["cat", "dog"])).to_parquet(tmp_path / "train.parquet")
    table([3, 4], [0, 1], datasets.ClassLabel(names=["dog", "cat"])).to_parquet(tmp_path / "test.parquet")
    assert load_both(tmp_path)[1].labels.tolist() == [1, 0]


def test_class_that_train_lacks_is_named(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/a.png", "test/cat/b.png", "test/emu/c.png")
    with pytest.raises(Failure, match=r"'test' holds the class 'emu', which 'train' lacks; rename"):
        load_both(tmp_path)


def test_empty_class_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/a.png", "train/dog/b.png")
    (tmp_path / "train" / "bee").mkdir()
    with pytest.raises(Failure, match=r"class folder 'bee' in .* holds no images"):
        load(tmp_path, labels=True)


def test_picture_beside_class_folders_is_named(tmp_path: Path) -> None:
    write(tmp_path, "cat/a.png", "stray.png")
    with pytest.raises(Failure, match=r"stray\.png lies beside the class folders"):
        load(tmp_path, labels=True)


@pytest.mark.parametrize(
    ("bad", "message"), [(None, "row 1 has no label"), (-1, "row 1 has no label"), (7, "row 1 has label 7, out of range for 3")]
)
def test_bad_labels_are_named(tmp_path: Path, bad: int | None, message: str) -> None:
    plain = table([1, 2], [0, bad], datasets.Value("int64")).data.table
    features = table([1], [0]).features
    datasets.Dataset(plain.replace_schema_metadata(features.arrow_schema.metadata)).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(Failure, match=message):
        load(tmp_path, labels=True)
    assert len(load(tmp_path).images) == 2


def test_columns_are_found_by_type_and_unknown_or_ambiguous_ones_listed(tmp_path: Path) -> None:
    two = table([1, 2], [0, 1]).rename_columns({"image": "photo", "label": "coarse"})
    two.add_column("fine", [1, 0]).cast_column("fine", datasets.ClassLabel(names=["x", "y"])).to_parquet(tmp_path / "train.parquet")
    assert greys(load(tmp_path)) == [1, 2]
    with pytest.raises(UsageError, match=r"which column is the label. .*choose one of: photo, coarse, fine"):
        load(tmp_path, labels=True)
    assert load(tmp_path, labels=True, label_column="fine").labels.tolist() == [1, 0]
    with pytest.raises(UsageError, match="no column 'foto'; did you mean 'photo'"):
        load(tmp_path, image_column="foto")
    with pytest.raises(Failure, match="row 1: column 'coarse' holds no image there"):
        load(tmp_path, image_column="coarse")


# --- pictures


def test_size_and_max_side(tmp_path: Path) -> None:
    for number, (width, height) in enumerate([(40, 60), (20, 30), (16, 16)]):
        Image.fromarray(np.full((height, width, 3), 50, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    assert load(tmp_path).images.sizes.tolist() == [[60, 40], [30, 20], [16, 16]]
    assert load(tmp_path, max_side=20).images.sizes.tolist() == [[30, 20], [30, 20], [16, 16]]
    assert splits.load_images(str(tmp_path), "train", 16).sizes.tolist() == [[16, 16]] * 3


def test_corrupt_image_is_named(tmp_path: Path) -> None:
    write(tmp_path / "folder", "cat/a.png", "cat/b.png")
    (tmp_path / "folder/cat/b.png").write_bytes(png(1, 64)[:60])
    labelled = load(tmp_path / "folder", labels=True)  # a label belongs to it: none may stand in for it
    with pytest.raises(Failure, match=r"row 1 \(.*b\.png\) is "):
        labelled.images.batch(torch.arange(2))
    broken = datasets.Dataset.from_dict({"image": [b"<html>"]}, features=datasets.Features({"image": datasets.Value("binary")}))
    broken.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(Failure, match=r"none of 1 images .* split 'train', row 0 is no readable image"):
        load(tmp_path / "train.parquet")


def test_fingerprint_tells_pictures_and_labels_apart_and_nothing_else(tmp_path: Path) -> None:
    table([1, 2], [0, 1]).to_parquet(tmp_path / "a.parquet")
    table([1, 2], [0, 1]).to_parquet(tmp_path / "b.parquet")
    table([2, 1], [0, 1]).to_parquet(tmp_path / "c.parquet")
    table([1, 2], [1, 0]).to_parquet(tmp_path / "d.parquet")
    a, b, c, d = (load(tmp_path / f"{name}.parquet", labels=True).fingerprint for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3
    assert len(a) == 16
    assert int(a, 16) >= 0


@pytest.mark.parametrize("kind", ["files", "parquet", "saved"])
def test_pictures_are_decoded_when_asked_for_in_any_order(tmp_path: Path, kind: str) -> None:
    """A corrupt picture hinders neither opening the set, nor hashing it, nor the other pictures; asked for, it is named."""
    greyscale = write(tmp_path / "files", *(f"train/cat/{number:02}.png" for number in range(12)), "test/cat/a.png")
    bad = greyscale / "train/cat/05.png"
    bad.write_bytes(bad.read_bytes()[:45])
    if kind != "files":
        pictures = [{"bytes": file.read_bytes(), "path": None} for file in sorted((greyscale / "train/cat").iterdir())]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])})
        whole = datasets.Dataset.from_dict({"image": pictures, "label": [0] * 12}, features)
        if kind == "saved":
            datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(tmp_path / "saved")
        else:
            (tmp_path / "parquet").mkdir()
            whole.to_parquet(tmp_path / "parquet/train.parquet")
            whole.select([0]).to_parquet(tmp_path / "parquet/test.parquet")
    train, _ = load_both(tmp_path / kind)
    assert len(train.fingerprint) == 16
    assert train.images.batch(torch.tensor([11, 0, 7, 7]))[0].float().mean(dim=(1, 2, 3)).tolist() == [11, 0, 7, 7]
    with pytest.raises(Failure, match=r"split 'train', row 5.* is corrupt"):
        train.images.batch(torch.tensor([4, 5, 6]))


def test_fingerprint_is_the_hash_of_the_stored_bytes_labels_and_classes(tmp_path: Path) -> None:
    """Its definition written out: rows of earlier versions, which decoded everything, keep their hash."""
    write(tmp_path, "train/cat/a.png", "train/dog/b.png", "train/cat/c.png", "test/dog/d.png")
    train, _ = load_both(tmp_path)
    stored = b"".join(len(png(value)).to_bytes(8, "little") + png(value) for value in (0, 2, 1))
    expected = hashlib.blake2b(stored + b"('cat', 'dog')" + np.array([0, 0, 1], dtype="<i8").tobytes(), digest_size=8).hexdigest()
    assert train.fingerprint == load(tmp_path, labels=True, size=4).fingerprint == expected
    assert load(tmp_path).identity["hash"] == hashlib.blake2b(stored, digest_size=8).hexdigest()


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_files_named_in_a_column(tmp_path: Path, kind: str) -> None:
    write(tmp_path, "a.png", "b.png")
    features = datasets.Features({"image": datasets.Value(kind)})
    datasets.Dataset.from_dict({"image": ["b.png", "a.png"]}, features).to_parquet(tmp_path / "train.parquet")
    found = load(tmp_path)
    assert greys(found) == [1, 0]
    assert (found.identity["count"], found.identity["names"]) == (2, ["b.png", "a.png"])


def test_a_real_set() -> None:
    root = os.environ.get("SSL_VIT_DATA")
    if root is None:
        pytest.skip("SSL_VIT_DATA does not name a folder of real sets")
    train, test = load_both(Path(root) / "gtsrb", size=32)
    assert (len(train.images), len(test.images), len(train.classes)) == (3921, 4000, 43)
    assert train.images.batch(torch.arange(4))[0].shape == (4, 3, 32, 32)


def test_a_fingerprint_is_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssl_vit.data.records import Records

    read: list[int] = []
    original = Records.encoded_rows
    monkeypatch.setattr(Records, "encoded_rows", lambda self, rows: read.extend(rows) or original(self, rows))  # type: ignore[func-returns-value]
    folder = write(tmp_path / "set", "cat/1.png", "dog/2.png", "dog/3.png")
    first = load(folder, labels=True).fingerprint
    assert read == [0, 1, 2]
    assert load(folder, labels=True).fingerprint == first
    assert read == [0, 1, 2]
    (folder / "dog/2.png").write_bytes(png(9))
    os.utime(folder / "dog/2.png", ns=(1, 1))
    assert load(folder, labels=True).fingerprint != first
    assert read == [0, 1, 2] * 2
    (folder / "dog").rename(folder / "owl")  # the same images under another label
    assert load(folder, labels=True).fingerprint != first
    parquet = tmp_path / "a.parquet"
    prints = []
    for values in ([1, 2, 3], [1, 2, 3], [1, 4, 3]):
        if len(prints) != 1:
            table(values, [0, 1, 1]).to_parquet(str(parquet))
            os.utime(parquet, ns=(1, len(prints) * 10**9))
        prints.append(load(parquet, labels=True).fingerprint)
    assert prints[0] == prints[1] != prints[2]
    assert len(read) == 9 + 6

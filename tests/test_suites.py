"""Suites: what ships is readable, and what is wrong in one is said."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ssl_vit.assets import find_asset, list_assets
from ssl_vit.data.images import to_tensor
from ssl_vit.errors import UsageError
from ssl_vit.model.backbone import build_backbone
from ssl_vit_eval.evaluate import size_on
from ssl_vit_eval.evaluation import Referee
from ssl_vit_eval.lazy_images import EvalTransform
from ssl_vit_eval.sources import Source
from ssl_vit_eval.suites import Dataset, load_suite
from tests.conftest import TINY


def write_suite(folder: Path, **content: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def write_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number, place in enumerate(["train/ant", "train/bee", "train/bee", "validation/ant", "test/bee", "test/ant"]):
        (folder / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / place / f"{number}.png")


@pytest.mark.parametrize("name", list_assets("suites"))
def test_shipped_suites_are_read(name: str) -> None:
    suite = load_suite(name)
    assert len({dataset.source for dataset in suite}) == len(suite) > 0
    if name != "folder":
        for dataset in suite:
            dataset.check()


def test_the_transfer_sets_are_tested_on_their_official_splits() -> None:
    splits = {dataset.source: (dataset.train_split, dataset.test_split, dataset.label_column) for dataset in load_suite("transfer")}
    assert len(splits) == 11
    assert splits["ILSVRC/imagenet-1k"] == ("train", "validation", "label")  # its test split has no labels
    assert splits["ethz/food101"][1] == "validation"
    assert splits["uoft-cs/cifar100"][2] == "fine_label"
    assert [source for source, (train, _, _) in splits.items() if train == "train+validation"] == [
        *("dpdl-benchmark/oxford_flowers102", "mcimpoi/dtd_split_1", "mteb/FGVCAircraft", "timm/eurosat-rgb")
    ]
    assert all(dataset in load_suite("transfer") for dataset in load_suite("small"))


def test_names_and_mappings_and_what_they_share(tmp_path: Path) -> None:
    entries = [
        "owner/name",
        {"source": "other", "crop": "squash", "label_column": "kind"},
        {"source": "third", "image_size": 96, "crop": 1, "metric": "top1_macro"},
    ]
    suite = load_suite(write_suite(tmp_path, data=entries, image_size=64, crop=0.9))
    assert suite == [
        Dataset("owner/name", image_size=64, crop=0.9),
        Dataset("other", image_size=64, crop="squash", label_column="kind"),
        Dataset("third", image_size=96, crop=1.0, metric="top1_macro"),
    ]
    assert [dataset.transform(64) for dataset in suite] == ["resize64-crop90", "squash64", "resize64-crop100"]
    assert load_suite(write_suite(tmp_path, data=["owner/name"])) == [Dataset("owner/name")]


@pytest.mark.usefixtures("own_cache")
def test_a_folder_starts_at_the_suites_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "set")
    shutil.copy(find_asset("suites", "folder"), tmp_path / "set")
    for place, suite in ((tmp_path, "set/folder.yaml"), (tmp_path / "set", "folder.yaml")):
        monkeypatch.chdir(place)
        (dataset,) = load_suite(suite)
        dataset.check()
        assert dataset.load(16)[0].dataset == "set"
    entry = {"source": "./set", "train_split": "train+validation", "test_split": "test", "crop": "squash", "name": "insects"}
    (dataset,) = load_suite(write_suite(tmp_path, data=[entry]))
    train, test = dataset.load(16)
    assert (train.dataset, test.dataset, train.split, test.split) == ("insects", "insects", "train+validation", "test")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 1, 0], [0, 1])
    picture = Image.open(tmp_path / "set/validation/ant/3.png")
    assert torch.equal(train.images[3], to_tensor(EvalTransform(16, "squash")(picture)))
    assert train.fingerprint != test.fingerprint


def test_a_size_that_a_network_was_not_loaded_with_is_refused() -> None:
    backbone = build_backbone(TINY)
    source = Source("timm:tiny", "timm", None, None, 16, "hash", None, None, None, backbone)
    with pytest.raises(UsageError, match=r"^insects asks for 32 px; use --image-size 32$"):
        size_on(Dataset("insects", image_size=32), source, Mock(spec=Referee))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": []}, r"data is \[\]; give a list of names"),
        ({"dta": ["a"]}, "unknown key 'dta'; did you mean 'data'"),
        ({"data": [3]}, "dataset 1 is 3; give a mapping with the keys source"),
        ({"data": ["a", {"name": "b"}]}, "dataset 2 lacks the key 'source'"),
        ({"data": [{"source": "a", "tset_split": "val"}]}, "dataset 1 has the unknown key 'tset_split'; did you mean 'test_split'"),
        ({"data": [{"source": "a", "image_size": "64"}]}, "image_size is '64'; give a side in pixels"),
        ({"data": [{"source": "a", "image_size": 0}]}, "dataset 1: image_size is 0"),
        ({"data": [{"source": "a", "crop": 1.5}]}, "dataset 1: crop is 1.5"),
        ({"data": ["a"], "crop": "squeeze"}, "crop is 'squeeze'; give a share above 0 and up to 1, or squash"),
        ({"data": [{"source": "a", "metric": "f1"}]}, "dataset 1: metric is 'f1'; give top1 or top1_macro"),
        ({"data": ["a"], "train_split": "val"}, "unknown key 'train_split'"),
    ],
)
def test_wrong_suites_are_refused_in_one_line(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_suite(write_suite(tmp_path, **content))
    assert "\n" not in str(caught.value)

"""The embedded sets: pixels come from the photographs, no pixel is shared between train, selection and test, no flat or double patches."""

import numpy as np
import pytest
import torch

from ssl_vit.data.photos import NAMES, photograph, photos
from ssl_vit.errors import UsageError


@pytest.mark.parametrize(("name", "train", "test", "classes"), [("photos", 7948, 2071, 12), ("photos-new", 3299, 848, 8)])
def test_sizes_balance_and_selection_share(name: str, train: int, test: int, classes: int) -> None:
    data = photos(name)
    assert (len(data.train.labels), len(data.test.labels), len(data.classes)) == (train, test, classes)
    assert not data.test.selection.any()
    assert 0.16 < data.train.selection.double().mean() < 0.24
    for part in (data.train, data.test):
        counts = torch.bincount(part.labels, minlength=classes)
        assert counts.min() * 3 >= counts.max()
    assert torch.bincount(data.train.labels[data.train.selection], minlength=classes).min() >= 20


@pytest.mark.parametrize("name", NAMES)
def test_patches_are_cut_from_their_photograph(name: str) -> None:
    data = photos(name)
    pictures = [photograph(name, photo) for photo in data.classes]
    for part in (data.train, data.test):
        for image, label, (top, left) in zip(part.images[::20], part.labels[::20], part.corners[::20].tolist(), strict=True):
            assert torch.equal(image, pictures[int(label)][top : top + 32, left : left + 32].permute(2, 0, 1))


@pytest.mark.parametrize("name", NAMES)
def test_no_pixel_is_shared_between_train_selection_and_test(name: str) -> None:
    data = photos(name)
    for label, photo in enumerate(data.classes):
        height, width = photograph(name, photo).shape[:2]
        users = np.zeros((3, height, width), dtype=bool)
        for part, is_test in ((data.train, False), (data.test, True)):
            mine = part.labels == label
            for (top, left), selection in zip(part.corners[mine].tolist(), part.selection[mine].tolist(), strict=True):
                users[2 if is_test else int(selection), top : top + 32, left : left + 32] = True
        assert users.any(axis=(1, 2)).all()
        assert users.sum(axis=0).max() == 1


@pytest.mark.parametrize("name", NAMES)
def test_no_flat_patch_and_no_near_duplicate(name: str) -> None:
    data = photos(name)
    patches = torch.cat([data.train.images, data.test.images]).double().mean(dim=1).numpy()
    labels = torch.cat([data.train.labels, data.test.labels]).numpy()
    assert patches.reshape(len(patches), -1).std(axis=1).min() >= 5
    for label in range(len(data.classes)):
        small = patches[labels == label].reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(-1, 64)
        correlation = np.corrcoef(small)
        np.fill_diagonal(correlation, 0)
        assert correlation.max() <= 0.95 + 1e-9


def test_both_sets_have_colour_and_grey_and_share_no_photograph() -> None:
    sets = [photos(name) for name in NAMES]
    assert not set(sets[0].classes) & set(sets[1].classes)
    for data in sets:
        coloured = (data.train.images[:, :1] != data.train.images).flatten(1).any(dim=1)
        photographs_in_colour = len(set(data.train.labels[coloured].tolist()))
        assert 3 <= photographs_in_colour <= len(data.classes) - 3


def test_the_set_is_the_same_each_time() -> None:
    first = photos("photos-new")
    photos.cache_clear()
    again = photos("photos-new")
    assert again is not first
    assert torch.equal(again.train.images, first.train.images)
    assert torch.equal(again.test.corners, first.test.corners)
    # shuffled: the first rows are of many classes
    assert len(set(again.train.labels[:40].tolist())) == len(again.classes)


def test_raw_pixels_alone_do_not_solve_it() -> None:
    data = photos("photos")
    bank, queries = (torch.nn.functional.normalize(part.images.flatten(1).float(), dim=1) for part in (data.train, data.test))
    votes = data.train.labels[(queries @ bank.T).topk(20).indices]
    accuracy = (votes.mode(dim=1).values == data.test.labels).double().mean()
    assert 0.3 < accuracy < 0.5


def test_unknown_set_is_named() -> None:
    with pytest.raises(UsageError, match="did you mean 'photos'"):
        photos("photo")

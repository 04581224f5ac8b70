"""Pictures decoded on demand, against the same pictures decoded one after the other."""

import io
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.images import to_tensor
from ssl_vit.errors import Failure
from ssl_vit_eval import lazy_images
from ssl_vit_eval.lazy_images import MEMORY_SHARE, EncodedImages, EvalTransform

SIZE = 16


class Shelf:
    """Encoded pictures of many sizes, and the rows that were asked for."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.pictures = [Image.fromarray(rng.integers(0, 256, (12 + row % 9, 10 + row % 7, 3), dtype=np.uint8)) for row in range(count)]
        self.asked: list[list[int]] = []

    def read(self, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        self.asked.append(list(rows))
        found = []
        for row in rows:
            buffer = io.BytesIO()
            self.pictures[row].save(buffer, "PNG")
            found.append((f"row {row}", buffer.getvalue()))
        return found

    def expected(self, rows: Sequence[int]) -> torch.Tensor:
        return torch.stack([to_tensor(EvalTransform(SIZE)(self.pictures[row])) for row in rows])


@pytest.mark.parametrize("fits", [True, False])
def test_batches_equal_one_by_one_decoding_and_are_kept_where_they_fit(monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    shelf = Shelf(200)
    needed = 200 * 3 * SIZE * SIZE
    monkeypatch.setattr(lazy_images, "available_memory", lambda: round(needed / MEMORY_SHARE) - (0 if fits else 1))
    images = EncodedImages(shelf.read, 200, EvalTransform(SIZE))
    batches = [[3, 150, 3, 0], list(range(199, 20, -1)), [0, 1, 199], [3]]
    for rows in batches:
        found, sizes = images.batch(torch.tensor(rows))
        assert torch.equal(found, shelf.expected(rows))
        assert sizes.tolist() == [[SIZE, SIZE]] * len(rows)
    asked = [row for rows in shelf.asked for row in rows]
    if fits:
        assert sorted(asked) == sorted({row for rows in batches for row in rows})
    else:
        assert asked == [row for rows in batches for row in rows]
    assert max(map(len, shelf.asked)) <= 64
    assert len(images) == 200
    assert torch.equal(images[77], shelf.expected([77])[0])


def test_what_is_returned_can_be_written_to() -> None:
    shelf = Shelf(5)
    images = EncodedImages(shelf.read, 5, EvalTransform(SIZE))
    images.batch(torch.arange(5))[0].zero_()
    assert torch.equal(images.batch(torch.arange(5))[0], shelf.expected(range(5)))


def test_no_picture_is_an_empty_batch() -> None:
    images = EncodedImages(Shelf(2).read, 2, EvalTransform(SIZE))
    assert images.batch(torch.tensor([], dtype=torch.int64))[0].shape == (0, 3, SIZE, SIZE)


def test_threads_leave_the_warning_filters_alone() -> None:
    images = EncodedImages(Shelf(128).read, 128, EvalTransform(SIZE))
    before = list(warnings.filters)
    images.batch(torch.arange(128))
    assert warnings.filters == before


def test_all_unreadable_images_are_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Shelf(150).read

    def damaged(rows: Sequence[int]) -> list[tuple[str, bytes]]:
        if 140 in rows:
            raise Failure("row 140 is gone")
        return [(name, b"<html>" if row % 20 == 7 else data) for row, (name, data) in zip(rows, read(rows), strict=True)]

    images = EncodedImages(damaged, 150, EvalTransform(8))
    with pytest.raises(Failure, match=r"^9 of 150 images cannot be read: .*row 7 is no.*row 27 .*row 47 .*row 67 .*row 87 .*; and 4 more$"):
        images.batch(torch.arange(10))
    with monkeypatch.context() as patch:
        patch.setattr(lazy_images, "_SECONDS", 0)
        images = EncodedImages(damaged, 150, EvalTransform(8))
        with pytest.raises(Failure, match=r"^at least 3 of 150 images cannot be read: .*row 7 is no.*row 27 .*row 47 "):
            images.batch(torch.arange(10))
    one = EncodedImages(lambda rows: [(name, data * (name != "row 3")) for name, data in read(rows)], 150, EvalTransform(8))
    with pytest.raises(Failure, match=r"^row 3 is empty"):
        one.batch(torch.arange(10))

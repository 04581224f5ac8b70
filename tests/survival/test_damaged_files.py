"""Files with damaged bytes: each is read or refused in one line; none hangs, crashes the process or takes the memory."""

from pathlib import Path

import pytest

from ssl_vit.data.images import MAX_PIXELS
from tests.processes import FORK
from tests.survival.mutants import main

SECONDS = 20.0  # of one file, on a busy machine; alone the slowest takes two


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("images", 2000),
        ("tables", 20),
        pytest.param("images", 50_000, marks=pytest.mark.survival),
        pytest.param("tables", 1000, marks=[pytest.mark.survival, pytest.mark.timeout(900)]),
    ],
)
def test_damaged_bytes_are_read_or_refused(kind: str, count: int, tmp_path: Path) -> None:
    found = FORK.SimpleQueue()
    process = FORK.Process(target=main, args=(kind, 0, count, tmp_path, found))
    process.start()
    process.join()
    assert process.exitcode == 0
    read, refused, slowest, peak = found.get()
    assert read + refused == count
    assert min(read, refused) > count / 20  # the changes are neither harmless nor all fatal
    assert slowest < SECONDS
    # a header may claim MAX_PIXELS pixels of up to 4 bytes, and turning them into RGB holds a few copies
    assert peak < 5 * 4 * MAX_PIXELS

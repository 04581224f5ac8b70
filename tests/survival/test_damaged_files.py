"""Files with damaged bytes: each is read or refused in one line; none hangs, crashes the process or takes the memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from ssl_vit.data.images import MAX_PIXELS

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
def test_damaged_bytes_are_read_or_refused(kind: str, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "tests.survival.mutants", kind, "0", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    read, refused, slowest, peak = done.stdout.split()
    assert int(read) + int(refused) == count
    assert min(int(read), int(refused)) > count / 20  # the changes are neither harmless nor all fatal
    assert float(slowest) < SECONDS
    # a header may claim MAX_PIXELS pixels of up to 4 bytes, and turning them into RGB holds a few copies
    assert int(peak) < 5 * 4 * MAX_PIXELS / 2**20

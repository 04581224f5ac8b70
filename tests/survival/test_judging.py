"""`eval` and `compare` killed at any moment, and two of them at once: the same rows as of one undisturbed run, none twice, none in half."""

import os
import random
import time

import pytest

from ssl_vit.cli import run
from ssl_vit_eval.rows import RowStore
from tests.processes import Command

pytestmark = pytest.mark.survival
SEED = int(os.environ.get("SSL_VIT_SURVIVAL_SEED", "0"))
SOURCES = ["run/last.ckpt", "random:mae.yaml", "pixels"]
ASKED = ["--data", "./pictures", "--protocols", "knn", "logreg", "--readouts", "gap", "cls", "register", "--diagnostics"]


def values(folder: str) -> dict[str, tuple[float, str | None]]:
    """Of each number its value and the hash of its predictions; each is there once."""
    rows = RowStore(folder).measured()
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: (row.value, row.predictions_hash) for row in rows}


@pytest.fixture
def whole(three_classes: None) -> float:
    """`run/last.ckpt`, and `whole/`, where nothing was killed; the seconds that it took in a process of its own."""
    assert run(["pretrain", "mae.yaml", "--out", "run", "--trainer.accelerator", "cpu"]) == 0
    assert Command("eval", "--help").wait() == 0  # the server of processes has started
    begun = time.monotonic()
    assert Command("eval", *SOURCES, *ASKED, "--out", "whole").wait() == 0
    return time.monotonic() - begun


def test_killed_evaluations_end_in_the_rows_of_a_whole_one(whole: float) -> None:
    rng, killed = random.Random(SEED), 0
    for _ in range(20):
        command = Command("eval", *SOURCES, *ASKED, "--out", "cut")
        time.sleep(rng.uniform(0.1, whole))
        killed += command.running
        command.wait(0)  # kills it
    assert killed
    assert Command("eval", *SOURCES, *ASKED, "--out", "cut").wait() == 0
    assert values("cut") == values("whole")
    assert {path.name for path in RowStore("cut").folder.rglob("*.json")} == {
        path.name for path in RowStore("whole").folder.rglob("*.json")
    }
    assert not list(RowStore("cut").folder.rglob("*.partial"))


def test_two_evaluations_at_once_agree(whole: float) -> None:
    both = [Command("eval", *SOURCES, *ASKED, "--out", "shared") for _ in range(2)]
    assert [command.wait() for command in both] == [0, 0], both[0].said + both[1].said
    rows = RowStore("shared").rows()  # of what both measured, the later ones
    assert {row.id: (row.value, row.predictions_hash) for row in rows} == values("whole")
    assert run(["compare", "shared", "--out", "report"]) == 0


def test_a_killed_comparison_is_made_by_the_next_one(whole: float) -> None:
    assert Command("compare", "whole", "--out", "report").wait() == 0
    rng, report = random.Random(SEED), RowStore("report").folder
    pages = {path: path.read_bytes() for path in report.rglob("*") if path.is_file()}
    for _ in range(12):
        command = Command("compare", "whole", "--out", "report")
        time.sleep(rng.uniform(0.1, 3.0))
        command.wait(0)  # kills it
    assert Command("compare", "whole", "--out", "report").wait() == 0
    assert {path: path.read_bytes() for path in report.rglob("*") if path.is_file()} == pages

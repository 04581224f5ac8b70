"""The report in a real browser: it opens from disk, asks for nothing, sorts by mouse and keyboard, runs no other script, prints."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssl_vit_eval.compare.comparison import build
from ssl_vit_eval.report.write import chapters_of, write_report
from tests.browser import CHROMIUM, Browser
from tests.report.test_write import make_study

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

TABLE = "[...document.querySelectorAll('table.sortable')].find(t => t.caption && t.caption.textContent.startsWith('Trained with'))"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_study(folder)
    comparison = build([folder])
    return write_report(comparison, chapters_of(comparison, [folder]), folder / "out").resolve()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def column(browser: Browser, head: str) -> list[str]:
    """The cells of a column, from top to bottom."""
    place = f"[...{TABLE}.tHead.rows[0].cells].findIndex(c => c.textContent === '{head}')"
    cells = browser.run(f"(i => [...{TABLE}.tBodies[0].rows].map(r => r.cells[i].textContent))({place})")
    assert len(cells) > 2
    return list(cells)


def button(head: str) -> str:
    return f"[...{TABLE}.tHead.rows[0].cells].find(c => c.textContent === '{head}').querySelector('button')"


def order(browser: Browser, head: str) -> str | None:
    found: str | None = browser.run(f"{button(head)}.parentElement.getAttribute('aria-sort')")
    return found


def points(text: str) -> float:
    return float(text.replace("−", "-"))


def test_it_opens_from_disk_without_a_request_or_an_error(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    assert browser.errors == []
    assert browser.run("[...document.images].filter(i => i.src.startsWith('data:image/svg')).length") > 2
    assert browser.run("[...document.images].every(i => i.naturalWidth > 0)")
    anchors = browser.run("[...document.querySelectorAll('nav a')].map(a => a.hash)")
    assert len(anchors) > 4
    for anchor in anchors:
        assert browser.run(f"document.querySelectorAll('{anchor}').length") == 1
    browser.click("document.querySelector('nav a[href=\"#costs\"]')")
    assert browser.run("location.hash") == "#costs"


@pytest.mark.parametrize("width", [1300, 900])
def test_nothing_is_wider_than_the_window(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_a_click_sorts_numbers_as_numbers_and_a_second_turns_them_round(browser: Browser, page: Path) -> None:
    browser.open(page)
    before = column(browser, "points")
    numbers = [points(text) for text in before]
    assert numbers not in (sorted(numbers), sorted(numbers, reverse=True))
    assert sorted(before) != sorted(before, key=points)  # as text the order is another one
    names = dict(zip(before, zip(column(browser, "A"), column(browser, "B"), strict=True), strict=True))
    browser.click(button("points"))
    assert [points(text) for text in column(browser, "points")] == sorted(numbers)
    assert order(browser, "points") == "ascending"
    rows = zip(column(browser, "points"), zip(column(browser, "A"), column(browser, "B"), strict=True), strict=True)
    assert dict(rows) == names  # whole rows move
    browser.click(button("points"))
    assert [points(text) for text in column(browser, "points")] == sorted(numbers, reverse=True)
    assert order(browser, "points") == "descending"
    browser.click(button("A"))
    assert column(browser, "A") == sorted(column(browser, "A"))
    assert (order(browser, "A"), order(browser, "points")) == ("ascending", None)
    assert browser.errors == []


def test_what_is_infinite_or_missing_stays_last(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.click(button("corrected p"))
    assert column(browser, "corrected p")[-1] == "–"  # what was declared in advance is not corrected
    browser.click(button("corrected p"))
    assert column(browser, "corrected p")[-1] == "–"
    values = [float(text) for text in column(browser, "corrected p")[:-1]]
    assert values == sorted(values, reverse=True)
    browser.click(button("resolvable"))
    found = column(browser, "resolvable")
    assert found[0] != "∞" == found[-1]


def test_the_keyboard_sorts_too(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run(f"{button('B')}.focus()")
    browser.press("Tab", 9)
    assert browser.run(f"document.activeElement === {button('points')}")
    for key, code, text, direction in (("Enter", 13, "\r", "ascending"), (" ", 32, " ", "descending")):
        browser.press(key, code, text)
        assert order(browser, "points") == direction
    found = [points(text) for text in column(browser, "points")]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("policy", [True, False])
def test_the_policy_stops_a_script_and_a_picture_that_got_into_the_page(browser: Browser, page: Path, tmp_path: Path, policy: bool) -> None:
    bad = "<script>window.bad = 1</script><img src='http://127.0.0.1:9/x.png'>"
    text = page.read_text(encoding="utf-8").replace("<h1>", f"{bad}<h1>")
    copy = tmp_path / "copy.html"
    copy.write_text(text if policy else text.replace("Content-Security-Policy", "nothing"), encoding="utf-8")
    browser.open(copy)
    assert browser.run("window.bad === 1") is not policy
    assert any(url.startswith("http") for url in browser.requests) is not policy
    assert browser.run(f"{button('points')} !== null")  # its own script runs in both


@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="no pdftotext on this machine")
def test_it_prints(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page)
    (tmp_path / "report.pdf").write_bytes(browser.pdf())
    text = subprocess.run(["pdftotext", "-layout", "report.pdf", "-"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert 4 < text.count("\f") < 40
    for part in ("Which token should carry the image?", "What this study says", "Trained with × read with", "What was run"):
        assert part in text
    assert re.search(r"cls is better than gap by \d", text)
    assert "↕" not in text

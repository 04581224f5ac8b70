"""The report: the numbers of the comparison, everything escaped, nothing loaded from elsewhere, nothing of others overwritten."""

import base64
import csv
import gzip
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml

from ssl_vit.errors import UsageError
from ssl_vit_eval.compare.comparison import Comparison, build
from ssl_vit_eval.compare.verdict import Difference
from ssl_vit_eval.report.page import OURS, Chapter, Figures, markdown, page
from ssl_vit_eval.report.plotting import Plot
from ssl_vit_eval.report.run_tables import frame_of_rows, selections
from ssl_vit_eval.report.score_tables import GAIN, LOSS
from ssl_vit_eval.report.table import csv as csv_of
from ssl_vit_eval.report.terminal import compare, screen
from ssl_vit_eval.report.text import count, rule_text
from ssl_vit_eval.report.write import chapters_of, write_report
from ssl_vit_eval.rows import RowStore
from tests.planted import PRIMARY, notes, plant, plant_arm, plant_random, words

SEEDS = range(6)
ACCURACY = {"cls": 0.8, "gap": 0.74, "register": 0.79, "cls+gap": 0.76}


class Page(HTMLParser):
    """The text of the cells of the coloured grids, and of all others; all attributes; all text, and that of each section."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.grid: list[str] = []
        self.cells: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words, self.sections = "", {"": ""}
        self._section, self._table, self._in_cell = "", "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "section" and "id" in dict(attrs):
            self._section = dict(attrs)["id"] or ""
            self.sections[self._section] = ""
        if tag == "table":
            self._table = dict(attrs).get("class") or ""
        if tag == "td":
            (self.grid if self._table == "grid" else self.cells).append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell &= tag != "td"

    def handle_data(self, data: str) -> None:
        self.words += data
        self.sections[self._section] += data
        if self._in_cell:
            (self.grid if self._table == "grid" else self.cells)[-1] += data


def answers(accuracy: float, seed: int) -> torch.Tensor:
    return torch.rand(300, generator=torch.Generator().manual_seed(seed)) < accuracy


def write_run(folder: Path, method: str, readout: str, seed: int, picture: bytes | None = None, **more: int) -> None:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"method": method, "readout": readout, "seed": seed}))
    finished = {"steps": 30, "images": 1920, "seconds": 4.0, "devices": "1 x cpu", "recipe_hash": "recipe-hash", "git": None, **more}
    (folder / "run.json").write_text(json.dumps(finished))
    lines = [{"step": step, "loss": 1.0 / step, **({"teacher_information": 0.5} if method == "dino" else {})} for step in (10, 20, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if picture:
        (folder / "reconstructions.png").write_bytes(picture)


def make_study(folder: Path) -> None:
    """Six seeds of four arms, cls above gap as declared; controls, a model from elsewhere, norms, and a choice at the edge of its grid."""
    store = RowStore(folder / "eval")
    for readout, accuracy in ACCURACY.items():
        plant_arm(store, readout, SEEDS, lambda seed, accuracy=accuracy: answers(accuracy, seed))  # type: ignore[misc]
    for seed in SEEDS:
        plant_random(store, answers(0.6, 50 + seed), start=f"start{seed}", seed=seed)
    plant_arm(store, "cls", SEEDS, lambda seed: answers(0.77, 20 + seed), read_with="gap")
    edge = {
        "protocol": "logreg",
        "selected": {"C": 0.1, "n_iter": 12, "converged": False},
        "grid": {"C": [0.01, 0.1], "test_accuracy": [0.7, 0.6]},
    }
    right = answers(0.7, 11)
    plant(store, right, **edge, edge_of_grid=True, oracle=right.double().mean().item() + 0.012, init="start0")
    plant(store, answers(0.3, 12), method="pixels", read_with="pixels", source="pixels:32", checkpoint="p", trained_with=None, init=None)
    for spec, accuracy in {"cls": 0.9, "gap": 0.85, "gap/pre": 0.7}.items():
        other = {"method": "timm", "source": "timm:vit", "checkpoint": "timm", "trained_with": None, "init": None, "seed": None}
        plant(store, answers(accuracy, 13), **other, read_with=spec)
    write_run(folder / "cells" / "toy-cls-s0", "dino", "cls", 0, flops=6_114_045_132_800, parameters=467_808)
    write_run(folder / "cells" / "toy-gap-s0", "dino", "gap", 0)  # of a version that did not count
    (folder / "study.yaml").write_text(yaml.safe_dump({"margin": 1.0, "primary": PRIMARY}))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("study")
    make_study(folder)
    comparison = build([folder])
    write_report(comparison, chapters_of(comparison, [folder]), folder / "out")
    return folder / "out", comparison


def written(folder: Path) -> Page:
    comparison = build([folder])
    return Page(write_report(comparison, chapters_of(comparison, [folder]), folder / "out"))


def lines_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


def differences(comparison: Comparison, question: str) -> list[Difference]:
    return [of for family in comparison.families if family.question == question for of in family.differences]


def test_a_pipe_that_is_closed_early_does_not_cost_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> str:
        raise BrokenPipeError

    plant(RowStore(tmp_path), [1, 0, 1, 1])
    monkeypatch.setattr("ssl_vit_eval.report.terminal.screen", closed)
    with pytest.raises(BrokenPipeError):
        compare([tmp_path], tmp_path / "report")
    assert (tmp_path / "report" / "report.html").is_file()


def test_the_grids_show_the_numbers_of_the_terminal(study: tuple[Path, Comparison]) -> None:
    out, comparison = study
    page, text = Page(out / "report.html"), screen(comparison)
    (gained,) = [cell for cell in page.grid if re.search(r"[+−]\d+\.\d \(", cell)]  # only cls read with cls has a start that was read so
    assert f" {gained.split(',')[0]}* " in text
    (photos,) = [table for table in comparison.tables if table.setting.protocol == "knn"]
    for value in photos.cells.values():
        assert any(cell.startswith(f"{100 * value.value:.1f}") for cell in page.grid)
        assert f"{100 * value.other:.1f}" in page.cells  # type: ignore[operator]
    assert "–" in page.grid  # gap was read only with gap


def test_the_declared_comparison_leads_and_every_difference_is_in_its_table(study: tuple[Path, Comparison]) -> None:
    out, comparison = study
    page = Page(out / "report.html")
    (primary,) = [family for family in comparison.families if family.primary]
    assert primary.differences[0].outcome == "better"
    header = page.sections[""]
    said = f"Declared before training, dino (toy), builtin:photos, knn v1: {words(comparison, primary.differences[0])}."
    assert header.index(said) < header.index("What to conclude.") < header.index("How sure that is.") < header.index("What to do next.")
    assert rule_text(comparison.rule) in page.sections["findings"]
    for question in ("trained with", "read with", "self-consistency", "norm"):
        of, lines = differences(comparison, question), lines_of(out / "tables" / f"differences-{question.replace(' ', '-')}.csv")
        assert len(of) == len(lines) > 0
        by_points = {float(line["points"]): line for line in lines}
        for one in of:
            line = by_points[one.points]
            assert [float(line[name]) for name in ("low", "high", "p", "resolvable")] == [one.low, one.high, one.p, one.resolvable]
            assert float(line["discordant"]) == pytest.approx(100 * one.discordance)
            assert (line["verdict of A"], line["images"]) == (one.outcome, "300")
            assert line["seeds"] == ("6" if one.seeds else "")
            assert words(comparison, one) in page.words
    first, *others = lines_of(out / "tables" / "differences-trained-with.csv")
    assert (first["A"], first["B"], first["corrected p"]) == ("cls", "gap", "")  # declared in advance, so not corrected
    assert {line["corrected p"] for line in others} == {str(of.corrected) for of in differences(comparison, "trained with")[1:]}


def test_two_sentences_say_what_was_compared_and_what_came_out(study: tuple[Path, Comparison]) -> None:
    header = Page(study[0] / "report.html").sections[""]
    assert "24 vision transformers were pretrained without labels (dino: toy)" in header
    assert (
        "cls, gap, register and cls+gap, 6 seeds each. Then they were frozen, read with cls, gap, register, cls+gap and gap/pre" in header
    )
    outcomes = [of.outcome for of in differences(study[1], "trained with")]
    assert outcomes.count("undecided") == 5
    assert "Of 6 comparisons of two trainings, each read as it was trained, 1 found a better readout, 0 no difference" in header
    assert "5 of the undecided could not be decided with so few seeds" in header
    assert "Train 8 seeds of each arm, or 6 and declare one primary comparison before the training; see whether" in header
    assert "Better: cls over gap (dino (toy), builtin:photos, knn v1)." in header


def test_counts_are_written_in_full() -> None:
    said = [count(1, "seed"), count(0, "seed"), count(1_234_567, "image"), count(1.0, "point"), count(1.5, "point")]
    assert said == ["1 seed", "0 seeds", "1,234,567 images", "1 point", "1.5 points"]


def test_every_score_is_in_the_long_table(study: tuple[Path, Comparison]) -> None:
    lines = iter(lines_of(study[0] / "tables" / "scores.csv"))
    for table in study[1].tables:
        for (arm, spec), cell in table.cells.items():
            line = next(lines)
            assert (line["recipe"], line["trained with"], line["read with"]) == (arm.recipe, arm.trained_with or "", spec)
            assert (float(line["top-1, %"]), int(line["n"])) == (100 * cell.value, cell.seeds)
            assert line["deviation"] == ("" if cell.spread is None else str(100 * cell.spread))
            assert line["low"] == ("" if cell.ci is None else str(100 * cell.ci[0]))
            assert [line[name] for name in ("gain", "gain low", "gain high")] == (
                [str(value) for value in (cell.gain.points, cell.gain.low, cell.gain.high)] if cell.gain else [""] * 3
            )
    assert next(lines, None) is None


def test_post_hoc_and_trained_with_are_never_in_one_table(study: tuple[Path, Comparison]) -> None:
    out = study[0]
    tables = {file.stem: file.read_text() for file in (out / "tables").glob("*.csv")}
    b = [name for name in tables if name.startswith(("trained-with", "differences-trained", "differences-self", "verdicts-trained"))]
    a = [name for name in tables if name.startswith(("post-hoc", "norms"))]
    assert (len(b), len(a)) == (5, 2)
    assert not [name for name in b if "timm" in tables[name] or "gap/pre" in tables[name]]
    assert not [name for name in a if "dino" in tables[name] or "pixels" in tables[name]]
    sections = Page(out / "report.html").sections
    assert "timm" not in sections["trained"]
    assert "random init" in sections["trained"]
    assert "timm" in sections["post-hoc"]
    assert "random init" not in sections["post-hoc"]
    (line,) = lines_of(out / "tables" / "norms.csv")
    assert (line["readout"], line["pool, then norm (pooled)"]) == ("gap", "")
    at = {row.read_with: 100 * row.value for row in study[1].rows if row.method == "timm" and row.metric == "top1"}
    assert [float(line[name]) for name in ("norm, then pool (post)", "no norm (pre)")] == [at["gap"], at["gap/pre"]]


def test_warnings_come_before_the_numbers(study: tuple[Path, Comparison]) -> None:
    findings = Page(study[0] / "report.html").sections["findings"]
    assert notes(study[1])
    for note in notes(study[1]):
        assert note in findings
    assert "builtin:photos, logreg v1: 1 of 1 choices lie at the edge of the grid" in findings
    assert "builtin:photos, logreg v1: 1 of 1 probes did not converge: toy-cls-s0 read with cls" in findings
    assert "choosing on test would have added up to 1.2 points" in findings
    assert findings.index("Warnings") < findings.index("All verdicts")
    (line,) = [line for line in lines_of(study[0] / "tables" / "selection.csv") if line["protocol"] == "logreg"]
    assert (line["grid"], line["selected"], line["at the edge"]) == ("C 0.01 … 0.1 (2)", "C 0.1 (1×)", "1")
    assert float(line["largest bias"]) == pytest.approx(1.2)


def test_nothing_is_loaded_and_only_our_script_runs(study: tuple[Path, Comparison]) -> None:
    page, text = Page(study[0] / "report.html"), (study[0] / "report.html").read_text()
    assert not {tag for tag, *_ in page.attributes} & {"link", "iframe", "object"}
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data"):
            assert value.startswith(("#", "data:"))
        assert not name.startswith("on")
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)\)", text))
    assert "@import" not in text
    assert str(study[0].parent) not in text
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [value for _, name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_what_users_name_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert('&')</script>$x_1$"
    store = RowStore(tmp_path / "eval")
    named = {"dataset": bad, "data": bad, "transform": bad, "protocol": bad}
    for seed in range(2):
        for readout in ("cls", "gap"):
            own = {"source": f"{bad}-{readout}-s{seed}", "git": bad, "deviations": [bad], "selected": {bad: bad}}
            plant(store, answers(0.8, seed), **named, **own, trained_with=readout, read_with=readout, seed=seed)
    plant(store, answers(0.8, 0), **named, source=bad, method="timm", trained_with=None, checkpoint=bad)
    write_run(tmp_path / "cells" / "a<b>$", "dino", "cls", 0)
    page = written(tmp_path)
    assert len(re.findall("<script", (tmp_path / "out" / "report.html").read_text())) == 1
    assert bad in page.words
    assert ("img", "alt", "dino (a<b>$): loss") in page.attributes
    assert not re.search(r"(?<!\\)<script", (tmp_path / "out" / "report.md").read_text())
    for file in (tmp_path / "out" / "plots").glob("*.svg"):
        ElementTree.fromstring(file.read_text())


def test_markdown_says_the_same_and_its_pictures_are_there(study: tuple[Path, Comparison]) -> None:
    text = (study[0] / "report.md").read_text()
    pictures = re.findall(r"\]\(([^)]+\.png)\)", text)
    assert {study[0] / name for name in pictures} == set((study[0] / "plots").glob("*.png"))
    assert {file.stem for file in (study[0] / "plots").glob("*.svg")} == {file.stem for file in (study[0] / "plots").glob("*.png")}
    for of in differences(study[1], "trained with"):
        assert words(study[1], of) in re.sub(r"\\(.)", r"\1", text)
    assert text.startswith("<!-- written by ssl-vit compare -->\n\n# Which token")


def test_runs_and_costs(study: tuple[Path, Comparison]) -> None:
    page = Page(study[0] / "report.html")
    assert ("img", "alt", "dino (toy): teacher information") in page.attributes
    curves = [file.read_text() for file in (study[0] / "plots").glob("curve-*.svg")]
    assert [">trained with gap</text>" in curve for curve in curves] == [True, True]  # the legends
    lines = lines_of(study[0] / "tables" / "costs.csv")
    assert [(line["trained with"], line["images/s"]) for line in lines] == [("cls", "480"), ("gap", "480")]
    assert [line["FLOPs"] for line in lines] == ["6114045132800", ""]
    assert (lines[0]["parameters"], lines[0]["finished runs"], lines[0]["knn probe, s"]) == ("467808", "1", "1.5")
    assert {"6.11 T", "468 k", "480"} < set(page.cells)
    assert "weights-of-toy-c" in page.cells


def test_without_runs_or_differences_the_report_says_so(tmp_path: Path) -> None:
    plant(RowStore(tmp_path), answers(0.8, 0))
    words = written(tmp_path).words
    assert "there are no training curves" in words
    assert "No two of them can be compared as trainings" in words


def test_only_the_cautions_that_apply(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "a")
    plant(store, answers(0.8, 0), dataset="cifar10")
    words = written(store.folder).words
    assert "One pretraining seed says nothing" in words
    assert not [text for text in ("few photographs", "null control", "decoder") if text in words]
    plant(store, answers(0.8, 0), method="mae", read_with="register", source="mae-cls-s0")
    words = written(store.folder).words
    assert all(text in words for text in ("few photographs", "null control", "decoder"))


def test_what_was_not_measured_in_a_setting_is_named(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "eval")
    for spec in ("cls", "cls@block0", "cls@block1", "gap"):
        plant(store, answers(0.8, 0), read_with=spec)
    plant(store, answers(0.8, 0), source="mae-cls-s0", method="mae", dataset="other", data="other", init=None)
    page = written(tmp_path)
    assert "not measured here: mae (mae); 2 readouts of other blocks" in page.words
    assert "not measured here: gap, dino (toy)" in page.words
    assert "cls@block0" not in page.sections["trained"]
    assert "cls@block0" in (tmp_path / "out" / "tables" / "scores.csv").read_text()


def test_pictures_are_embedded_first_seed_only_and_as_far_as_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(RowStore(tmp_path / "eval"), answers(0.8, 0))
    for readout, seed, size in (("cls", 0, 100), ("cls", 1, 100), ("gap", 0, 101)):
        write_run(tmp_path / "cells" / f"toy-{readout}-s{seed}", "mae", readout, seed, bytes([seed]) * size)
    monkeypatch.setattr("ssl_vit_eval.report.page.STORED_BYTES", 200)
    page = written(tmp_path)
    sources = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src") and "svg" not in value]
    assert sources == ["data:image/png;base64," + base64.b64encode(bytes(100)).decode()]
    assert "toy, trained with gap, seed 0: plots/reconstructions-1-toy-gap.png is too large to be embedded here" in page.words
    assert (tmp_path / "out" / "plots" / "reconstructions-1-toy-gap.png").read_bytes() == bytes(101)


def test_drawings_share_a_budget_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    plots = [Plot(name, name.upper(), f"<svg>{name * 10}</svg>", b"", "one note") for name in "abc"]
    monkeypatch.setattr("ssl_vit_eval.report.page.DRAWING_BYTES", 45)
    text = page("T", [], [Chapter("s", "s", "S", [Figures(plots)])])
    assert [base64.b64decode(found).decode() for found in re.findall(r"data:image/svg\+xml;base64,([^\"]*)", text)] == [
        plot.svg for plot in plots[:2]
    ]
    assert "C: plots/c.svg is too large to be embedded here." in text
    assert text.count("one note") == 1
    other = Plot("d", "D", "<svg/>", b"", "another note")
    text = markdown("T", [], [Chapter("s", "s", "S", [Figures([plots[0], other])])])
    assert re.search(r"plots/a\.png\)\n\none note\n\n!\[D\]\(plots/d\.png\)\n\nanother note", text)


def test_what_the_last_report_had_is_replaced_or_removed(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "eval")
    plant(store, answers(0.8, 0))
    write_run(tmp_path / "cells" / "toy-cls-s0", "dino", "cls", 0)
    out = compare([tmp_path]).parent
    assert out == tmp_path
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert {"report.html", "report.md", OURS} < {file.name for file in before}
    curve = next(file for file in before if file.name.startswith("curve") and file.suffix == ".svg")
    (tmp_path / "plots" / "mine.png").write_text("mine")
    (tmp_path / "cells" / "toy-cls-s0" / "recipe.yaml").unlink()
    for name in ("report.html", "report.md"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("Which token", "Old"))
    compare([tmp_path])
    assert not curve.exists()
    assert (tmp_path / "plots" / "mine.png").read_text() == "mine"
    assert all("Which token" in (tmp_path / name).read_text() for name in ("report.html", "report.md"))
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("name", ["report.html", "report.md", "tables/scores.csv", "plots"])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, name: str) -> None:
    plant(RowStore(tmp_path / "eval"), answers(0.8, 0))
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UsageError, match="not written by ssl-vit compare and is left alone"):
        compare([tmp_path], tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"


def test_a_list_of_files_cannot_lead_outside(tmp_path: Path) -> None:
    plant(RowStore(tmp_path / "eval"), answers(0.8, 0))
    (tmp_path / "mine.csv").write_text("mine")
    outside = ["tables/../../mine.csv", str(tmp_path / "mine.csv"), "../mine.csv", 7]
    for number, content in enumerate((json.dumps(outside), "{", "7")):
        out = tmp_path / f"out{number}"
        out.mkdir()
        (out / OURS).write_text(content)
        compare([tmp_path / "eval"], out)
    assert (tmp_path / "mine.csv").read_text() == "mine"


@pytest.mark.parametrize("background", [GAIN, LOSS, (0xD6, 0xEA, 0xDB), (0xFB, 0xE0, 0xCD), (0xDD, 0xE7, 0xF3)])
def test_contrast_of_the_strongest_colours(background: tuple[int, int, int]) -> None:
    def luminance(colour: tuple[int, ...]) -> float:  # WCAG 2
        linear = [(c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = (0x1B, 0x1F, 0x24)
    assert (luminance(background) + 0.05) / (luminance(ink) + 0.05) > 7


def test_the_tables_of_the_committed_study_are_what_they_were(tmp_path: Path) -> None:
    study = Path(__file__).parents[2] / "eval" / "results" / "instrument"
    (tmp_path / "rows.jsonl").write_bytes(gzip.decompress((study / "rows.jsonl.gz").read_bytes()))
    rows = frame_of_rows(RowStore(tmp_path).rows())
    assert csv_of(selections(rows)) == (study / "tables" / "selection.csv").read_text()

"""Tables in their five forms: read back by readers of their own, every cell is what it was, whatever its name holds."""

import csv
import io
import math
import re
from html.parser import HTMLParser

import pytest

from ssl_vit_eval.report import table
from ssl_vit_eval.report.page import Chapter, Listing, Text, page
from ssl_vit_eval.report.page import text as as_text
from ssl_vit_eval.report.table import Sheet, Shown, frame_of, slug

NASTY = r"a|b & 50 % _x_ $y$ {z} <b>#1</b> ~^ \cmd [c] *d* `e` +1 ±2 –3 −4 ×5 ○ ≈ ∞ → α …"
VALUES = [
    [NASTY, 71.23456789012344, 2071, "plain"],
    ["[plain]", None, math.inf, NASTY],
    ["*three*", -0.1, 6114045132800.0, "no difference"],
    ["x", -1e-9, 1, None],
]
HEAD = ["name", NASTY, "count", "verdict"]
SHOWN = {NASTY: ["71.2 ± 0.4", "–", "−0.1", "0.0"], "count": ["2,071", "∞", "6.11 T", "1"]}
RECORDS = [dict(zip(HEAD, line, strict=True)) for line in VALUES]
for column, texts in SHOWN.items():
    for record, text in zip(RECORDS, texts, strict=True):
        record[column] = record[column] if record[column] is None else Shown(float(record[column]), text)  # type: ignore[arg-type]
SHEET = Sheet("scores", f"Title {NASTY}", frame_of(RECORDS), f"Note {NASTY}.", styles={"name": "code", "verdict": "badge"})
TEXTS = [HEAD, *([line[0], *shown, line[3] or "–"] for line, *shown in zip(VALUES, *SHOWN.values(), strict=True))]


def test_csv_holds_numbers_in_full_and_leaves_missing_ones_empty() -> None:
    head, *lines = csv.reader(io.StringIO(table.csv(SHEET)))
    assert head == HEAD
    assert [line[0] for line in lines] == [line[0] for line in TEXTS[1:]]
    assert [line[1] for line in lines] == ["71.23456789012344", "", "-0.1", "-1e-09"]
    assert [float(line[2]) for line in lines] == [2071.0, math.inf, 6114045132800.0, 1.0]
    assert "6114045132800" in table.csv(SHEET)


class Cells(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.lines: list[list[str]] = []
        self.attributes: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.lines[-1].append("")
            self.attributes.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        if self.lines and self.lines[-1] and data != "\n":
            self.lines[-1][-1] += data


def html(sheet: Sheet, folded: bool = False) -> str:
    """The table and its note, as they stand in a page."""
    whole = page("T", [Text("x")], [Chapter("a", "A", "A", [Listing(sheet, folded)])])
    return whole[whole.index('<div class="wide">') : whole.index("</section>")]


def test_html_is_escaped_and_sorts_by_the_number() -> None:
    shown, _, note = html(SHEET).partition("</table>")
    page = Cells(shown)
    assert page.lines == TEXTS
    assert "b" not in page.tags
    assert page.tags.count("code") == 4
    assert '<span class="badge no-difference">no difference</span>' in shown
    numbers = [attributes.get("data-sort") for attributes in page.attributes[4:]]
    values = [None if isinstance(value, str) else value for line in VALUES for value in line]
    assert [None if text is None else float(text.replace("Infinity", "inf")) for text in numbers] == values
    assert "Infinity" in numbers  # JavaScript's name
    assert [attributes.get("class") for attributes in page.attributes] == [
        *(None, "number", "number", None),
        *("long", "number", "number", None),
        *(None, "number", "number", "long"),
        *[None, "number", "number", None] * 2,
    ]
    assert "Note a|b &amp; 50 %" in note
    assert "<caption>" in shown
    assert "<caption>" not in html(SHEET, folded=True)


def test_markdown_has_as_many_cells_and_no_markup_from_names() -> None:
    title, shown, note = table.markdown(SHEET).split("\n\n")
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in shown.splitlines()]
    rule = lines.pop(1)
    assert rule == ["---", "---:", "---:", "---"]
    assert [[re.sub(r"\\(.)", r"\1", cell) for cell in line] for line in lines] == TEXTS
    for text in (title[2:-2], note, *(cell for line in lines for cell in line)):
        assert not re.search(r"(?<!\\)(?:\\\\)*[*_`<>\[\]$~|]", text)


def test_latex_has_as_many_cells_and_no_command_from_names() -> None:
    text = table.latex(SHEET)
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    rows = [line.removesuffix(r" \\") for line in body.splitlines() if line.endswith(r" \\")]
    assert r"\begin{tabular}{lrrl}" in text
    # a row that begins with [ or * would be an option of the line break before it
    assert not [row for row in rows if row.startswith(("[", "*"))]
    found = [[undone(cell) for cell in re.split(r"(?<!\\) & ", row)] for row in rows]
    assert found == TEXTS
    caption = text[text.index(r"\caption{") + 9 : text.index("\n\\begin{tabular}") - 1]
    assert undone(caption) == f"{SHEET.title}. {SHEET.note}"


def undone(text: str) -> str:
    """What LaTeX would print, a character or a command at a time; any other special character would be an error or a command."""
    commands = {
        **{"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textbar": "|", "textless": "<", "textgreater": ">"},
        **{"ldots": "…", "textperiodcentered": "·"},
    }
    symbols = {"pm": "±", "-": "−", "times": "×", "circ": "○", "approx": "≈", "infty": "∞", "rightarrow": "→", "alpha": "α"}
    tokens = re.compile(r"\\([&%$#_{}])|\\([a-z]+)\{\}|\$\\?([a-z]+|-)\$|\{([\[\]*])\}|(--)|([^\\&%$#_{}~^])")
    out, at = "", 0
    while at < len(text):
        match = tokens.match(text, at)
        assert match, f"{text[at:]!r} is not plain text"
        special, command, symbol, group, dash, plain = match.groups()
        out += special or commands.get(command or "", "") or symbols.get(symbol or "", "") or group or ("–" if dash else plain or "")
        at = match.end()
    return out


def test_text_is_aligned() -> None:
    sheet = Sheet("t", "T", frame_of([{"name": "a", "n": 5}, {"name": "long name", "n": 12}]), "N")
    lines = as_text([], [Chapter("a", "A", "A", [Listing(sheet)])]).splitlines()
    assert lines == ["A", "=", "", "T", "", "name        n", "a           5", "long name  12", "", "N"]


def test_a_column_for_files_is_in_csv_alone() -> None:
    sheet = Sheet("t", "T", frame_of([{"a": 1, "secret": 2, "b": "x"}]), only_in_files=("secret",))
    assert table.csv(sheet) == "a,secret,b\n1,2,x\n"
    for write in (html, table.markdown, table.latex):
        assert "secret" not in write(sheet)
        assert "2" not in write(sheet)
        assert "x" in write(sheet)


def test_files_of_each_table_and_none_twice() -> None:
    files = table.table_files([SHEET])
    assert files == {"tables/scores.csv": table.csv(SHEET), "tables/scores.tex": table.latex(SHEET)}
    with pytest.raises(ValueError, match="two tables are called scores"):
        table.table_files([SHEET, SHEET])


def test_a_table_without_lines_keeps_its_head() -> None:
    sheet = Sheet("t", "T", frame_of([], ["a", "b"]))
    assert table.csv(sheet) == "a,b\n"
    assert r"a & b \\" in table.latex(sheet)
    assert "| a | b |" in table.markdown(sheet)


@pytest.mark.parametrize(
    ("name", "file"), [("cls+gap/pre", "cls-gap-pre"), ("../../etc", "etc"), ("a  b_c", "a-b-c"), ("日本", "table"), ("x" * 99, "x" * 80)]
)
def test_slug(name: str, file: str) -> None:
    assert slug(name) == file

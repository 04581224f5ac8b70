"""Tables in their five forms: read back by readers of their own, every cell is what it was, whatever its name holds."""

import csv
import io
import math
import re
from html.parser import HTMLParser

import pytest

from ssl_vit_eval.report import table
from ssl_vit_eval.report.table import Sheet, Value, slug

NASTY = r"a|b & 50 % _x_ $y$ {z} <b>#1</b> ~^ \cmd [c] *d* `e` +1 ±2 –3 −4 ×5 ○ ≈ ∞ → α …"
SHEET = Sheet(
    "scores",
    f"Title {NASTY}",
    ["name", NASTY, "count"],
    [
        [Value(NASTY), Value("71.2 ± 0.4", 71.23456789012344), Value("2,071", 2071.0)],
        [Value("[plain]"), Value("–"), Value("∞", math.inf)],
        [Value("*three*", style="code"), Value("−0.1", -0.1), Value("6.11 T", 6114045132800.0)],
        [Value("x", style="no difference"), Value("0.0", -1e-9), Value("1", 1.0)],
    ],
    f"Note {NASTY}.",
)
TEXTS = [SHEET.head, *([value.text for value in line] for line in SHEET.lines)]


def test_csv_holds_numbers_in_full_and_leaves_missing_ones_empty() -> None:
    head, *lines = csv.reader(io.StringIO(table.csv(SHEET)))
    assert head == SHEET.head
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


def test_html_is_escaped_and_sorts_by_the_number() -> None:
    shown, _, note = table.html(SHEET).partition("</table>")
    page = Cells(shown)
    assert page.lines == TEXTS
    assert "b" not in page.tags
    assert page.tags.count("code") == 1
    assert '<span class="badge no-difference">x</span>' in shown
    numbers = [attributes.get("data-sort") for attributes in page.attributes[3:]]
    values = [value.number for line in SHEET.lines for value in line]
    assert [None if text is None else float(text.replace("Infinity", "inf")) for text in numbers] == values
    assert "Infinity" in numbers  # JavaScript's name
    assert [attributes.get("class") for attributes in page.attributes] == [
        *(None, "number", "number"),
        *("long", "number", "number"),
        *[None, "number", "number"] * 3,
    ]
    assert "Note a|b &amp; 50 %" in note
    assert "<caption>" in shown
    assert "<caption>" not in table.html(SHEET, caption=False)


def test_markdown_has_as_many_cells_and_no_markup_from_names() -> None:
    title, shown, note = table.markdown(SHEET).split("\n\n")
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in shown.splitlines()]
    rule = lines.pop(1)
    assert rule == ["---", "---:", "---:"]
    assert [[re.sub(r"\\(.)", r"\1", cell) for cell in line] for line in lines] == TEXTS
    for text in (title[2:-2], note, *(cell for line in lines for cell in line)):
        assert not re.search(r"(?<!\\)(?:\\\\)*[*_`<>\[\]$~|]", text)


def test_latex_has_as_many_cells_and_no_command_from_names() -> None:
    text = table.latex(SHEET)
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    rows = [line.removesuffix(r" \\") for line in body.splitlines() if line.endswith(r" \\")]
    assert r"\begin{tabular}{lrr}" in text
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
    lines = table.text(Sheet("t", "T", ["name", "n"], [[Value("a"), Value("5", 5.0)], [Value("long name"), Value("12", 12.0)]], "N"))
    assert lines.splitlines() == ["T", "", "name        n", "a           5", "long name  12", "N"]


def test_a_column_for_files_is_in_csv_alone() -> None:
    sheet = Sheet("t", "T", ["a", "secret", "b"], [[Value("1", 1.0), Value("2", 2.0), Value("x")]], only_in_files=("secret",))
    assert table.csv(sheet) == "a,secret,b\n1,2,x\n"
    for write in (table.text, table.html, table.markdown, table.latex):
        assert "secret" not in write(sheet)
        assert "2" not in write(sheet)
        assert "x" in write(sheet)


def test_files_of_each_table_and_none_twice() -> None:
    files = table.table_files([SHEET])
    assert files == {"tables/scores.csv": table.csv(SHEET), "tables/scores.tex": table.latex(SHEET)}
    with pytest.raises(ValueError, match="two tables are called scores"):
        table.table_files([SHEET, SHEET])
    with pytest.raises(ValueError, match="line 1 of t has 1 cells for 2 columns"):
        Sheet("t", "T", ["a", "b"], [[Value("x")]])


@pytest.mark.parametrize(
    ("name", "file"), [("cls+gap/pre", "cls-gap-pre"), ("../../etc", "etc"), ("a  b_c", "a-b-c"), ("日本", "table"), ("x" * 99, "x" * 80)]
)
def test_slug(name: str, file: str) -> None:
    assert slug(name) == file

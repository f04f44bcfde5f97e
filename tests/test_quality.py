"""The page on how good prices are: its structure, its figures, and that it is one file."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hetsched.cli import app
from hetsched.quality import Next, Point, Quality, bars, course, page, scatter, seconds_text
from hetsched.store import Residual

POINTS = tuple(
    Point(device, kinds, 1e-5 * i, 1.1e-5 * i, 0.1, 0.01)
    for i in range(1, 8)
    for device in ("cpu:0", "<gpu>")
    for kinds in ("Conv+Relu", "Gemm")
)
RESIDUALS = (
    Residual("a & b", 1.0, 1.1, 3, "2030-01-01 00:00:00.000"),
    Residual("a & b", 1.0, 0.9, 3, "2030-01-02 00:00:00.000"),
)
FOUND = Quality("store", POINTS, RESIDUALS, (Next("cpu:0", "Conv", 1e-3, "<why>"),), ("left",))
VOID = frozenset(["meta"])


class Reader(HTMLParser):
    """Elements in their nesting, which has to be right, and what they refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.mark.parametrize("found", [FOUND, Quality("empty", (), (), (), ())])
def test_the_page_is_whole_and_needs_nothing_else(found: Quality) -> None:
    text = page(found)
    reader = read(text)
    assert "script" not in reader.seen
    assert reader.links == []
    assert "url(" not in text
    assert "http" not in text
    assert "prefers-color-scheme:dark" in text
    assert reader.seen.count("svg") == (5 if found.points else 0)


def test_each_chart_says_what_it_is() -> None:
    text = page(FOUND)
    assert text.count('role="img"') == text.count("<svg ")
    assert read(scatter(POINTS)).seen.count("circle") == len(POINTS)
    assert read(course(RESIDUALS)).seen.count("circle") == 2
    assert read(bars([("one", 1.0, "1"), ("two", 2.0, "2")])).seen.count("rect") == 2


def test_residuals_are_told_by_kind_and_device() -> None:
    points = [
        Point("cpu:0", kinds, 1e-3, 1e-3 * off, 0.1, 0.01)
        for kinds, off in (("Conv+Relu", 1.5), ("Conv", 0.9), ("Conv", 1.02), ("Pad", 0.95))
    ]
    points.append(Point("<gpu>", "Pad", 4e-3, 8e-3, 0.1, 0.01))
    text = page(Quality("store", tuple(points), (), (), ()))
    rows = text.partition("Residuals by kind")[2].partition("</table>")[0].split("<tr>")[2:]
    cells = [row.replace("</td>", "").replace("</tr>", "").split("<td>")[1:] for row in rows]
    assert [[cell.partition("<")[0] for cell in row] for row in cells] == [
        ["Pad", "&lt;gpu&gt;", "1", "50 %", "100 %", "+100 %", "0 %"],
        ["Conv", "cpu:0", "3", "37.5 %", "20.7 %", "+2 %", "66.7 %"],
        ["Pad", "cpu:0", "1", "12.5 %", "5 %", "-5 %", "100 %"],
    ]


def test_names_are_text() -> None:
    text = page(FOUND)
    assert "<gpu>" not in text
    assert "<why>" not in text
    assert "&lt;gpu&gt;" in text
    assert "a &amp; b" in text


def test_figures() -> None:
    assert "10 %" in page(FOUND)
    assert seconds_text(1e-4) == "100 us"


def test_an_empty_store_has_a_report_too(tmp_path: Path) -> None:
    file, store = tmp_path / "report.html", tmp_path / "store.sqlite"
    arguments = ["profile", "--report", str(file), "--store", str(store)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    read(file.read_text())
    result = CliRunner().invoke(app, [*arguments, "model.onnx"])
    assert result.exit_code == 2

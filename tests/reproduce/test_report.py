"""The report: its page, tables and JSON."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

from nrm_reproduce.report import PAGE, RESULT, Report, Row, Table, brief, cells


def test_a_report_without_figures(tmp_path):
    row = Row("some", ("<a>", "b"), "a & b", None, None, None, None, 0)
    report = Report("some", "Some <title>", [row], facts={"x": 1, "share": 0.25})
    report.write(tmp_path)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "Some &lt;title&gt;" in page
    assert "a &amp; b" in page
    assert "&lt;a&gt;, b" in page
    assert cells(row) == ("<a>, b", "a & b", "-", "-", "-", "0")
    assert json.loads((tmp_path / RESULT).read_text())["rows"][0]["pearson"] is None


def test_tables_of_a_report(tmp_path):
    lines = [("a<b", 0.25, None), ("a<b", 1e9, 3), ("c", -1234.5, "x & y")]
    table = Table("T > 1", ("task", "mean", "more"), lines, note="so & so")
    report = Report("some", "Some", (), tables=[table])
    report.write(tmp_path)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "Correlation" not in page
    for text in ("T &gt; 1", "<td>a&lt;b</td><td>0.250</td><td>-</td>", "so &amp; so"):
        assert text in page
    assert "<td></td><td>1.00e9</td><td>3</td>" in page  # the same task
    told = json.loads((tmp_path / RESULT).read_text())["tables"]
    assert told == [
        {"title": "T > 1", "heads": ["task", "mean", "more"], "lines": [[*x] for x in lines]}
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (-0.0, "0.00"),
        (100.0, "100"),
        (999.96, "1000"),
        (99_999.4, "99999"),
        (123_456.0, "1.23e5"),
        (-2e-7, "-2.00e-7"),
        (7, "7"),
        (None, "-"),
    ],
)
def test_numbers_of_any_size_are_brief(value, text):
    assert brief(value) == text


def test_files_stand_beside_the_page(tmp_path):
    Report("some", "Some", (), files={"a.csv": "é\n"}).write(tmp_path)
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == "é\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.csv", PAGE, RESULT]

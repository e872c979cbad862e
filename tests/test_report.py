"""Tables and figures of a comparison."""

import sys

import pytest

from lad_fast.report import Measurement, comparison_figure, comparison_table, format_table

TEACHER = Measurement("teacher", 0.987, 1_234_567, 61.25, 4321.0)
STUDENT = Measurement("student, LAD", 0.9, 600_000, 9.5, 8000.0)


def test_table_is_aligned():
    assert format_table(["name", "n"], [["a", "1"], ["longer", "10"]]).splitlines() == [
        "name     n",
        "----------",
        "a        1",
        "longer  10",
    ]


def test_table_names_a_row_that_does_not_fit():
    with pytest.raises(ValueError, match=r"rows: each takes 2 cells, one has 1: \['a'\]"):
        format_table(["name", "n"], [["a"]])


def test_comparison_table():
    header, _, teacher, student = comparison_table([TEACHER, STUDENT]).splitlines()
    assert header.split() == ["model", "accuracy", "parameters", "training", "sentences/s"]
    assert teacher.split() == ["teacher", "98.7%", "1,234,567", "61.2", "s", "4,321"]
    assert student.split() == ["student,", "LAD", "90.0%", "600,000", "9.5", "s", "8,000"]


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_figure_is_written(suffix, start, tmp_path):
    path = comparison_figure([TEACHER, STUDENT], tmp_path / f"figure.{suffix}")
    assert path.read_bytes().startswith(start)


def test_figure_names_its_models(tmp_path):
    svg = comparison_figure([TEACHER, STUDENT], tmp_path / "figure.svg", metric="F1").read_text()
    for text in ("teacher", "student, LAD", "F1 (%)", "parameters (millions)", "training (seconds)"):
        assert text in svg


def test_figure_takes_at_least_one_measurement(tmp_path):
    with pytest.raises(ValueError, match="measurements: takes at least one"):
        comparison_figure([], tmp_path / "figure.png")


def test_figure_without_matplotlib_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"lad_fast\[report\]"):
        comparison_figure([TEACHER], tmp_path / "figure.png")

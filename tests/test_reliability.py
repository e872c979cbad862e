"""docs/reliability.md names tests that are there, with the numbers of cases that are counted."""

import json
import subprocess
import sys

import bench_record
import pytest
import reliability

PAGE = reliability.PAGE.read_text(encoding="utf-8")


def test_the_table_is_what_is_counted():
    """In a process of its own, since pytest collects there."""
    code = "import reliability; print(reliability.table())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=bench_record.ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert bench_record.between(PAGE, reliability.MARKERS) == done.stdout.strip()


def test_the_fuzz_table_is_the_result_file():
    assert reliability.fuzz_part() in PAGE


@pytest.mark.skipif(not reliability.FUZZ.exists(), reason="no long run has been recorded")
def test_the_counts_of_a_long_run_are_whole():
    machines = json.loads(reliability.FUZZ.read_text(encoding="utf-8"))["machines"]
    assert set(machines) == set(reliability.FUZZED)
    assert all(tried["seconds"] > 0 and 0 < tried["runs"] < tried["calls"] for tried in machines.values())
    assert all(tried["calls"] == sum(tried["calls by rule"].values()) for tried in machines.values())


def test_a_test_that_is_not_there_is_an_error():
    with pytest.raises(SystemExit, match=r"there is no test tests/test_soak.py::test_gone"):
        reliability.count(reliability.Promise("", ("tests/test_soak.py::test_gone",)), [])

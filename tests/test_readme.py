"""The figures in README and docs are those of the result files and counts, and README's example runs."""

import json
import re
import subprocess

import bench_record
import int8
import kernel_counts
import newcomer
import real_data

README = bench_record.README.read_text(encoding="utf-8")


def test_real_data_table_is_the_result_files():
    table = real_data.table(json.loads(real_data.RESULT.read_text())).strip()
    assert bench_record.between(README, real_data.MARKERS) == table


def test_the_newcomers_times_are_the_result_file():
    assert bench_record.between(README, newcomer.MARKERS) == newcomer.sentence(json.loads(newcomer.RESULT.read_text()))


def test_each_of_the_newcomers_commands_is_timed(tmp_path):
    """They stand in README; here each is run in name only."""
    lines = newcomer.commands()
    assert [line.split()[0] for line in lines] == ["make", *["lad-fast"] * 3]
    times = tmp_path / "its times"
    calls = "make() { touch .venv/bin/activate; }; lad-fast() { echo $1; }\n"
    (tmp_path / ".venv/bin").mkdir(parents=True)
    command = ["bash", "-c", calls + newcomer.script(lines, times)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["finetune", "distill", "evaluate"]
    moments = [float(line) for line in times.read_text().split()]
    assert len(moments) == len(newcomer.STEPS) + 1
    assert moments == sorted(moments)
    failing = subprocess.run(
        ["bash", "-c", newcomer.script(["false", "echo on"], times)], capture_output=True, text=True
    )
    assert failing.returncode != 0 and not failing.stdout


def test_the_table_of_8_bits_is_the_result_file():
    assert bench_record.between(README, int8.MARKERS) == int8.table(json.loads(int8.RESULT.read_text()))


def test_bench_tables_are_the_result_files():
    results = bench_record.load_results()
    page = bench_record.PAGE.read_text(encoding="utf-8")
    assert results
    assert bench_record.between(page, bench_record.MARKERS) == bench_record.page_part(results)
    assert bench_record.between(README, bench_record.MARKERS) == bench_record.readme_part(results)
    assert bench_record.between(README, bench_record.HEADLINE_MARKERS) == bench_record.headline(results)


def test_the_engine_table_is_the_result_files():
    text = bench_record.PERFORMANCE.read_text(encoding="utf-8")
    expected = bench_record.engine_part(bench_record.load_results())
    assert bench_record.between(text, bench_record.ENGINE_MARKERS) == expected.strip()


def test_the_tables_of_kernels_are_what_is_counted():
    text = (bench_record.ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    tables = {"traffic": kernel_counts.formulas_table(), "forms": kernel_counts.predictions_table()}
    for name, table in tables.items():
        assert bench_record.between(text, kernel_counts.markers(name)) == table


def test_the_example_runs():
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    names = {}
    # The default back end under the interpreter would be Triton's, at minutes for these sizes.
    code = code.replace("hidden_weight=1000.0)", 'hidden_weight=1000.0, backend="torch")')
    code = code.replace("9, 11))", '9, 11), backend="torch")')
    exec(code, names)
    assert all(p.grad.any() for p in names["gates"].parameters())
    assert len(names["aggregates"]) == 6

"""The bench command, and the files that the suite's report becomes."""

import io
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import bench_record
import measuring
import pytest
import test_step
import torch
from contestants import CACHED, CONTESTANTS, GRAPHS, PUBLISHED, Runner, check_contestant, check_outcome, ours
from measuring import OtherJobs, kept_bytes
from objectives import OPERATIONS, Contestant, Shape, check, contestants, problem, right
from roofline import gate_flops
from workloads import BATCH_SIZE, Size, batches, made_up, sample

from lad_fast import cli

ROW = {
    "table": "objective", "case": "forward+backward, T 480", "contestant": "torch", "device": "cpu",
    "passes": "forward+backward", "median_s": 0.123456789, "ratio": 2.0, "kept_bytes": 10**7, "roof_share": 0.5,
    "peak_bytes": None, "other_jobs": 0.5, "roofs": {"bytes_per_second": 1e10, "float32": 1e12},
}  # fmt: skip
REPORT = {
    "benchmarks": [{"extra_info": ROW}, {"extra_info": {}}],
    "commit_info": {"id": "0123456789abcdef", "dirty": True},
    "datetime": "2026-01-02T03:04:05",
    "machine_info": {"lad_fast": bench_record.facts()},
}


def test_bench_outside_a_checkout_is_refused_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages/lad_fast/cli.py"))
    assert cli.main(["bench"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkout" in line and "benchmarks" in line


def test_bench_hands_its_flags_on(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(cli.subprocess, "run", lambda command, check: called.append(command) or _Done())
    assert cli.main(["bench", "--full", "--output-dir", str(tmp_path)]) == 3
    assert called[0][1].endswith("benchmarks/bench_record.py")
    assert called[0][2:] == ["run", "--full", "--output-dir", str(tmp_path)]


class _Done:
    returncode = 3


def test_a_result_file_says_where_it_is_from_and_rounds():
    result = bench_record.compact(REPORT)
    assert result["machine"] == bench_record.machine()
    assert result["commit"] == "0123456789ab with changes" and result["date"] == "2026-01-02"
    (row,) = result["rows"]  # what was not timed is left out, and so is what was not measured
    assert row["median_s"] == 0.1235
    assert "peak_bytes" not in row and "roofs" not in row


def test_a_result_file_has_the_roofs_at_their_best():
    faster = ROW | {"roofs": {"bytes_per_second": 0.9e10, "float32": 1.2e12}}
    result = bench_record.compact(REPORT | {"benchmarks": [{"extra_info": ROW}, {"extra_info": faster}]})
    assert result["roofs"] == {"bytes_per_second": 1e10, "float32": 1.2e12}


STOPPED = """
def stop():
    raise KeyboardInterrupt

def test_whole(measure):
    measure(dict, table="step", case="case", contestant="whole", rounds=2, profiled=False)

def test_stopped(measure):
    measure(stop, table="step", case="case", contestant="stopped", rounds=2, profiled=False)
"""


def test_an_interrupted_suite_reports_the_rows_before(tmp_path):
    (tmp_path / "test_stopped.py").write_text(STOPPED)
    report = tmp_path / "report.json"
    command = [sys.executable, "-P", "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", tmp_path]
    folder = Path(bench_record.__file__).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(folder)  # an xdist worker's child would leave the report to others
    done = subprocess.run([*command, f"--benchmark-json={report}"], env=environment, cwd=tmp_path, capture_output=True)
    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout.decode()
    content = json.loads(report.read_text())
    (row,) = bench_record.compact(content)["rows"]
    assert row["contestant"] == "whole" and row["median_s"] > 0
    # pytest-benchmark reports what was timed, and not how long it took to tell it.
    assert content["benchmarks"][0]["stats"]["median"] == pytest.approx(row["median_s"], rel=1e-3)


def test_contestants_take_turns_so_that_a_machine_that_slows_down_is_fair(monkeypatch):
    """Each call makes the machine a tenth slower; one that is twice as slow is found so, to a call's tenth."""
    now, slowness, order = [0.0], [1.0], []

    def step(name, cost):
        order.append(name)
        now[0] += cost * slowness[0]
        slowness[0] *= 1.1

    class Meter:
        roofs = measuring.Roofs(1.0, {})

        def take_turn(self):
            order.append("roofs")

    monkeypatch.setattr(measuring, "clock", lambda: now[0])
    monkeypatch.setattr(measuring, "RoofMeter", Meter)
    timings = measuring.in_turn({"fast": lambda: step("fast", 1), "slow": lambda: step("slow", 2)}, rounds=5)
    assert order == ["fast", "slow", "roofs"] * 5
    assert all(timing.roofs is Meter.roofs for timing in timings.values())
    fast, slow = (statistics.median(timings[name].seconds) for name in ("fast", "slow"))
    assert slow / fast == pytest.approx(2 * 1.1)


def test_the_published_loop_takes_its_turn_once_for_all_cases(monkeypatch):
    """What it does is the same in each; the others run each case's batches, five rounds of each in turn."""
    mine = "ours, float32"
    padded, sst2 = (test_step.case_of(params, full=False) for params in ({}, {"task": "sst2"}))
    entries = tuple((case, name) for case in (padded, sst2) for name in (PUBLISHED, mine))
    ran = []

    def runner(name, size, examples, padding, mask_padding):
        return Runner(lambda given: ran.append((name, padding, given)), step=None, padding=padding)

    monkeypatch.setattr(test_step, "ON_GPU", False)
    monkeypatch.setattr(test_step, "load", lambda task: made_up(400))
    monkeypatch.setattr(test_step, "make", runner)
    monkeypatch.setattr(test_step, "check_contestant", lambda *args, **kwargs: None)
    timed = test_step.race(None, entries)
    assert list(timed) == list(entries)
    assert timed[padded, PUBLISHED].timing is timed[sst2, PUBLISHED].timing
    assert [len(timed[entry].examples.tokens) // BATCH_SIZE for entry in entries] == [1, 1, 1, sst2.num_batches]
    warm, rounds = ran[:2], ran[2:]
    assert [(name, padding) for name, padding, _ in warm] == [(mine, "max_length"), (mine, "longest")]
    turn = [(PUBLISHED, "max_length", 1), (mine, "max_length", 1), (mine, "longest", sst2.num_batches)]
    assert [(name, padding, len(given.tokens) // BATCH_SIZE) for name, padding, given in rounds] == 5 * turn


def test_the_page_has_a_section_a_file_and_readme_says_where_no_gpu_was_measured(tmp_path):
    content = bench_record.compact(REPORT)
    (tmp_path / "here.json").write_text(json.dumps(content))
    (tmp_path / "real_data.json").write_text('{"rows": []}')  # another kind of result
    part = bench_record.page_part(bench_record.load_results(tmp_path))
    assert f"## {content['machine']}" in part
    assert "| forward+backward, T 480 | torch | ~124 ms | disturbed | 10 MB | - | 50% |" in part
    assert "while 1 of 1 rows were timed" in part
    assert "No figure has been measured on a GPU" in bench_record.readme_part(bench_record.load_results(tmp_path))
    (tmp_path / "gpu.json").write_text(json.dumps(content | {"device": "cuda"}))
    assert "No figure" not in bench_record.readme_part(bench_record.load_results(tmp_path))


def test_readme_sums_a_machine_up_in_a_line_a_precision():
    step = {"table": "step", "case": "B 32 x S 128 padded", "contestant": "ours, float32", "ratio": 2.345}
    epoch = {"table": "epoch", "case": "sst2, 6 to", "contestant": "ours, float32, cached teacher", "ratio": 19.0}
    size = {"table": "objective", "case": "", "passes": "forward+backward", "tokens": 4096, "hidden_size": 768}
    both = size | {"layers": 12, "dtype": "float32", "kept_bytes": 2e6, "roof_share": 0.5}
    rows = [
        step, epoch, epoch | {"case": "mrpc", "contestant": "ours, float32", "ratio": 3.0, "other_jobs": 0.5},
        both | {"contestant": "torch", "median_s": 9.0, "tokens": 480}, both | {"contestant": "torch", "median_s": 2.0},
        both | {"contestant": "reference", "median_s": 3.0}, both | {"contestant": "triton", "median_s": 1.0},
    ]  # fmt: skip
    roofs = {"bytes_per_second": 1.0, "float32": 1.0, "bfloat16": 1.0}
    result = {"machine": "a", "device": "cpu", "roofs": roofs, "rows": rows}
    lines = bench_record.readme_part([result]).splitlines()[2:]
    assert lines[0] == "| a | float32 | 2.35x | - | 19.00x | disturbed | 1.50x | - | 50% | 2 of 2 MB |"
    assert not lines[1] and "GPU" in lines[2]  # nothing was timed in bfloat16
    (line,) = bench_record.readme_part([result | {"device": "cuda"}]).splitlines()[2:]
    assert " | 3.00x | " in line  # there the kernels are ours


@pytest.mark.parametrize("emulated", (False, True))
def test_types_that_the_processor_does_not_multiply_are_not_timed(monkeypatch, emulated):
    monkeypatch.setattr(measuring, "emulates", lambda dtype: emulated)
    assert measuring.why_not_timed("float32") is None
    assert (measuring.why_not_timed("bfloat16") is not None) == emulated


def test_roofs_are_the_best_of_the_turns(monkeypatch):
    """A machine that is twice as fast in the second of three turns, when a reading of the clock takes half a second."""
    seconds = iter([1.0] * 6 + [0.5] * 6 + [1.0] * 6)
    now = [0.0]

    def clock():
        now[0] += next(seconds)
        return now[0]

    monkeypatch.setattr(measuring, "emulates", lambda dtype: True)
    monkeypatch.setattr(measuring, "clock", clock)
    monkeypatch.setattr(measuring, "onednn_linear", lambda operand: lambda a, b, *_: a @ b)
    meter = measuring.RoofMeter()
    for _ in range(3):
        meter.take_turn()
    assert meter.roofs == measuring.Roofs(2 * 2**28 / 0.5, {"float32": 2 * 1536**3 / 0.5})


def test_roofs_are_measured_without_onednn(monkeypatch):
    monkeypatch.setattr(measuring, "onednn_linear", lambda operand: None)
    monkeypatch.setattr(measuring, "emulates", lambda dtype: True)
    (rate,) = measuring.measure_roofs().flop_per_second.values()  # float32's
    assert rate > 0


def test_replace_between_markers(tmp_path):
    path = tmp_path / "file.md"
    path.write_text("a\n<!-- x -->\nold\n<!-- y -->\nb\n")
    bench_record.replace_between(path, ("<!-- x -->", "<!-- y -->"), "new")
    assert path.read_text() == "a\n<!-- x -->\nnew\n<!-- y -->\nb\n"


def test_kept_bytes_leaves_out_inputs_and_counts_a_storage_once():
    x = torch.randn(8, 8, requires_grad=True)

    def forward():
        y = x.exp()  # keeps its result
        return y * y[:4].sum() + y.square()  # keeps it again, and a scalar

    assert kept_bytes(forward, [x]) == 8 * 8 * 4 + 4
    assert kept_bytes(lambda: x * x, [x]) == 0


def test_peak_bytes_on_a_cpu():
    def three_then_two():
        x = torch.ones(1000)
        y = x + 1
        z = y + 1
        del x, y
        w = z + 1
        return w.sum()

    peak = measuring.peak_bytes(three_then_two)
    assert 3 * 4000 <= peak < 3 * 4000 + 500  # allocations are rounded up a little


def test_a_processor_whose_name_hides_its_generation_is_told_by_numbers():
    told = bench_record.processor
    hidden = "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping: 1\n"
    assert told(hidden) == "AMD EPYC (family 25, model 17)"
    assert told(hidden.replace("AMD EPYC", "AMD EPYC 9654 96-Core")) == "AMD EPYC 9654 96-Core"
    assert told("CPU implementer : 0x41\n") == platform.machine()


def test_the_headline_is_sst2s_epoch_on_each_machine():
    row = {"table": "epoch", "case": "sst2, 6 to 3 layers", "contestant": "published", "baseline": "published"}
    rows = [
        row | {"ratio": 1.0},
        row | {"contestant": "ours", "ratio": 12.345},
        row | {"contestant": "cached", "ratio": 20.0, "other_jobs": 0.2},
        row | {"contestant": "ours", "ratio": 3.0, "case": "mrpc"},
        row | {"contestant": "ours", "ratio": 4.0, "table": "step"},
    ]
    machines = {"a": rows, "b": [], "c": [row | {"contestant": "graphs", "ratio": 99.6}]}
    results = [{"machine": name, "device": "cpu", "rows": found} for name, found in machines.items()]
    told = bench_record.headline(results).splitlines()
    assert told[0].endswith(" | ours | cached | graphs |")
    assert told[2:4] == ["| a | 12x | disturbed | - |", "| c | - | - | 100x |"]
    assert "on a GPU yet" in told[-1]
    assert "GPU" not in bench_record.headline([results[0] | {"device": "cuda"}])
    assert bench_record.headline([results[1]]) == told[-1]


def test_a_disturbed_row_has_no_ratio():
    calm = bench_record.compact(REPORT)["rows"][0] | {"other_jobs": 0.01, "baseline_other_jobs": 0.02}
    result = {"rows": [calm, calm | {"other_jobs": 0.2}, calm | {"baseline_other_jobs": 0.2}]}
    rows = bench_record._table(result, "objective", bench_record.OBJECTIVE).splitlines()[2:]
    assert [row.split(" | ")[2:4] for row in rows] == [
        ["124 ms", "2.00x"], ["~124 ms", "disturbed"], ["124 ms", "disturbed"]
    ]  # fmt: skip


TINY = Size(4, 2, 32, 4, 64)
GATED = [
    (padding, name)
    for name in CONTESTANTS
    for padding in ("longest", "max_length")
    # The cache holds no padding, which counts at "max_length".
    if not name.endswith(GRAPHS) and (padding == "longest" or not name.endswith(CACHED))
]


@pytest.mark.parametrize(("padding", "name"), GATED)
def test_every_contestant_passes_the_gate(padding, name):
    check_contestant(name, TINY, padding, mask_padding=padding == "longest")


@pytest.mark.parametrize("fault", ("loss", "gradient", "cache"))
def test_the_gate_stops_a_wrong_contestant(fault):
    def wrong(few):
        runner = ours(TINY, "bfloat16", "longest", True, CACHED, few)
        if fault == "loss":
            runner.step.objective.hidden_weight *= 1.05
        elif fault == "gradient":
            runner.step.student.bert.encoder.layer[0].output.dense.weight.register_hook(lambda grad: -grad)
        else:
            cache = runner.step.teacher_cache
            read = cache.read
            cache.read = lambda *args: (lambda logits, states: (logits, [s.roll(1, 0) for s in states]))(*read(*args))
        return runner

    with pytest.raises(AssertionError, match="gradient of" if fault == "gradient" else None):
        check_outcome(wrong, TINY, "longest", True, "bfloat16")


def test_own_work_is_not_counted_as_other_jobs(monkeypatch):
    """The kernel's counters grew by 7 s while 5 s passed and this process used 3 of them: others took 4."""
    ticks, now, own = [], [100.0], [3.0]

    def counters(*_, **__):
        user = 1000 * os.sysconf("SC_CLK_TCK") + ticks[-1] * os.sysconf("SC_CLK_TCK")
        return io.StringIO(f"cpu {user} 0 0 99999 5 0 0 0 0 0\n")

    monkeypatch.setattr("builtins.open", counters)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measuring.os, "times", lambda: (own[0], 0.0, 0.0, 0.0, 0.0))
    ticks.append(0)
    others = OtherJobs()
    ticks.append(7)
    now[0], own[0] = 105.0, 6.0
    assert others.share() == pytest.approx(4 / (5 * os.cpu_count()))


@pytest.mark.parametrize("task", ("sst2", "mrpc"))
def test_made_up_examples_have_the_recorded_lengths(task):
    workload = made_up(200, task)
    counts = json.loads(bench_record.ROOT.joinpath("benchmarks/length_counts.json").read_text())[task]
    assert set(map(str, workload.tokens.lengths)) <= set(counts)
    assert (workload.examples.text_pairs is None) == (task == "sst2")
    assert workload.tokenizer.unk_token_id not in workload.tokens.input_ids


def test_a_sample_is_batches_of_the_epoch_with_texts_and_tokens_of_the_same_examples():
    workload = made_up(400)
    found, steps = sample(workload, 3)
    assert steps == 13
    assert len(found.tokens) == len(found.examples) == 3 * BATCH_SIZE
    assert (found.tokens.ids == found.examples.ids).all()
    texts = [text for batch, _, _ in found.text_batches() for text in batch]
    encoded = found.tokenizer(texts)["input_ids"]
    for batch, start in zip(batches(found), range(0, len(texts), BATCH_SIZE), strict=True):
        for row, mask, tokens in zip(batch["input_ids"], batch["attention_mask"], encoded[start:], strict=False):
            assert row[mask.bool()].tolist() == tokens


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_contestants_compute_the_same_and_keep_what_is_counted(operation, dtype):
    shape = Shape(tokens=64, hidden_size=32, layers=4, seq_len=16)
    expected = right(operation, shape, dtype)
    for name in contestants(operation, dtype):
        if name != "compiled":  # a minute of compiling
            check(Contestant(name, operation, problem(shape, dtype)), expected.gradients)
    flops = expected.work["forward+backward"][0]
    assert flops == (gate_flops(64, 32, 4) if operation in ("aggregate", "objective") else 0)


def test_the_published_chain_runs_once():
    shape = Shape(tokens=64, hidden_size=32, layers=4, seq_len=16)
    inputs, found = problem(shape, "float32"), {}
    for name in ("reference", "published"):
        found[name] = kept_bytes(Contestant(name, "aggregate", inputs).forward, inputs.known)
    assert found["published"] < 1.5 * found["reference"]

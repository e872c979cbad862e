"""Options, the ``measure`` fixture and the table at the end of ``pytest benchmarks/``."""

import os
from collections.abc import Callable, Iterable

import pytest
import torch

# Both are read when their libraries are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads are the step's

import bench_record
from measuring import DEVICE, Timing, in_turn, kernel_launches, peak_bytes, pin_threads

from lad_fast.cpu import keep_freed_memory
from lad_fast.report import format_table

ROWS = pytest.StashKey[list[dict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="larger sizes too, as the device's memory allows")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True  # the table below has what its own has, side by side with the baseline
    pin_threads()
    keep_freed_memory()  # as training does, and for every contestant
    torch.set_float32_matmul_precision("highest")  # float32 is float32, not TF32, for every contestant


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info["lad_fast"] = bench_record.facts()


class Replay:
    """pytest-benchmark's clock: what it reports was timed before, in turn with others, and moves this clock on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def function(self, seconds: Iterable[float]) -> Callable[[], None]:
        """What takes so many seconds, call by call."""
        left = iter(seconds)

        def call() -> None:
            self.now += next(left)

        return call


replay = Replay()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "measure" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=replay))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take ``full_size`` get the sizes of their module's ``SIZES``, or ``FULL_SIZES`` with --full."""
    if "full_size" in metafunc.fixturenames:
        name = "FULL_SIZES" if metafunc.config.getoption("full") else "SIZES"
        metafunc.parametrize("full_size", getattr(metafunc.module, name), ids=str)


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.getoption("full")


@pytest.fixture
def rivals(request) -> tuple[str, ...]:
    """Names of the contestants that this session times in the test's case, in order: of tests that differ from it in
    ``name`` alone.
    """
    node = request.node
    case = {**node.callspec.params, "name": None}
    others = (item for item in request.session.items if getattr(item, "originalname", None) == node.originalname)
    found = (item.callspec.params for item in others if item.path == node.path)
    return tuple(params["name"] for params in found if {**params, "name": None} == case)


@pytest.fixture
def measure(benchmark, pytestconfig):
    """A function that times a step and records a row: in the JSON's extra_info, and in the table at the end."""

    def run(
        step, *, table: str, case: str, contestant: str, timing: Timing | None = None, dtype: str = "float32",
        baseline: str = "reference", flops: float | None = None, moved: int | None = None, rounds: int | None = None,
        parts: int = 1, profiled: bool = True, **more,
    ) -> dict:  # fmt: skip
        """Time ``step()``.

        Args:
            step: what to time; None with a timing of what is not profiled.
            table, case, contestant: what the row is about; ratios are taken within a table's case.
            timing: what :func:`~measuring.in_turn` found, of a step that it timed with others; None times it here.
            dtype: picks the roof.
            baseline: the contestant whose median, taken before in this session, the ratio divides.
            flops, moved: work that every contestant must do: matrix products, and bytes read and written once.
            rounds: without a timing, timed rounds of one call, for a step that is warm; None warms it up and chooses
                calls and rounds.
            parts: equal parts of a round, such as training steps, of which the row has the time of one.
            profiled: run it twice more, for its peak memory and, on a GPU, its kernels.
            **more: further entries of the row.
        """
        timing = timing or in_turn({contestant: step}, rounds)[contestant]
        benchmark.group = f"{table}: {case}"
        benchmark.pedantic(replay.function(timing.seconds), rounds=len(timing.seconds))
        row = {"table": table, "case": case, "contestant": contestant, "dtype": dtype, "device": DEVICE.type, **more}
        if benchmark.stats is not None:  # None with --benchmark-disable
            row["median_s"] = median = benchmark.stats["median"] / parts
            row["rounds"] = len(timing.seconds)
            row["other_jobs"] = timing.other_jobs
            case_rows = [r for r in pytestconfig.stash[ROWS] if (r["table"], r["case"]) == (table, case)]
            base = row if contestant == baseline else next((r for r in case_rows if r["contestant"] == baseline), None)
            row["baseline"] = baseline
            if base is not None:
                row |= {"ratio": base["median_s"] / median, "baseline_other_jobs": base["other_jobs"]}
            if flops is not None and moved is not None:
                row |= {"flops": flops, "moved_bytes": moved}
                row |= {"tflop_per_s": flops / median / 1e12, "gb_per_s": moved / median / 1e9}
                row["roof_share"] = timing.roofs.floor_seconds(dtype, flops, moved) / median
        row |= {"peak_bytes": peak_bytes(step), "launches": kernel_launches(step)} if profiled else {}
        benchmark.extra_info.update(row)
        roofs = timing.roofs
        benchmark.extra_info["roofs"] = {"bytes_per_second": roofs.bytes_per_second, **roofs.flop_per_second}
        if "median_s" in row:
            pytestconfig.stash[ROWS].append(benchmark.extra_info)  # the caller may add to it
        return benchmark.extra_info

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    columns = {
        "median": lambda r: f"{1e3 * r['median_s']:.3g} ms",
        "ratio": lambda r: "disturbed" if bench_record.is_disturbed(r) else f"{r['ratio']:.2f}x",
        "kept": lambda r: f"{r['kept_bytes'] / 1e6:.1f} MB",
        "peak": lambda r: f"{r['peak_bytes'] / 1e6:.1f} MB",
        "GB/s": lambda r: f"{r['gb_per_s']:.3g}",
        "TFLOP/s": lambda r: f"{r['tflop_per_s']:.3g}",
        "of roof": lambda r: f"{r['roof_share']:.0%}",
        "of model FLOPs": lambda r: f"{r['model_flops_utilisation']:.0%}",
        "epoch": lambda r: f"{r['epoch_seconds_scaled_from_sample_total']:.4g} s",
        "time slope": lambda r: f"{r['time_slope']:.2f}",
        "memory slope": lambda r: f"{r['kept_slope']:.2f}",
        "other jobs": lambda r: f"{r['other_jobs']:.0%}",
        "kernels": lambda r: str(int(r["launches"])),
    }

    def cell(row: dict, write) -> str:
        try:
            return write(row)
        except (KeyError, TypeError):  # not measured for this row, or not on this device
            return "-"

    for table in dict.fromkeys(row["table"] for row in rows):
        terminalreporter.section(f"{table} ({where})")
        cells = [
            [f"{r['case']}: {r['contestant']}", *(cell(r, write) for write in columns.values())]
            for r in rows
            if r["table"] == table
        ]
        used = [i for i in range(len(columns) + 1) if any(line[i] != "-" for line in cells)]
        titles = ["case", *columns]
        terminalreporter.write_line(
            format_table([titles[i] for i in used], [[line[i] for i in used] for line in cells])
        )

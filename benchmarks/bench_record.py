"""Run the suite and keep what it measured: a result file, a figure and the tables of README and docs.

``lad-fast bench`` calls it.

    python benchmarks/bench_record.py run [--full] [--output-dir DIR]
    python benchmarks/bench_record.py convert --report REPORT.json [--output-dir DIR]   # of pytest --benchmark-json
    python benchmarks/bench_record.py readme   # the tables of README and docs again, from the result files
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGE = ROOT / "docs/benchmarks.md"
RESULTS = ROOT / "benchmarks/results"
MARKERS = ("<!-- bench: begin -->", "<!-- bench: end -->")
HEADLINE_MARKERS = ("<!-- headline: begin -->", "<!-- headline: end -->")
PERFORMANCE = ROOT / "docs/performance.md"
ENGINE_MARKERS = ("<!-- engine: begin -->", "<!-- engine: end -->")
PACKAGES = ("torch", "triton", "transformers", "tokenizers")


def machine() -> str:
    """What runs: the GPU where there is one, processor and cores."""
    import torch

    name = f"{processor(Path('/proc/cpuinfo').read_text())}, {len(os.sched_getaffinity(0))} cores"
    return f"{torch.cuda.get_device_name()}, {name}" if torch.cuda.is_available() else name


def processor(cpuinfo: str) -> str:
    """Its name; where a virtual machine keeps the model from that, its numbers, for generations differ twofold."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    found = {name.strip(): value.strip() for name, _, value in lines}
    name = found.get("model name", platform.machine())
    if re.search(r"\d", name) or "cpu family" not in found:
        return name
    return f"{name} (family {found['cpu family']}, model {found['model']})"


def between(text: str, markers: tuple[str, str]) -> str:
    """What stands between two markers."""
    begin, end = (text.index(marker) for marker in markers)
    return text[begin + len(markers[0]) : end].strip()


def replace_between(path: Path, markers: tuple[str, str], content: str) -> None:
    """Put ``content`` between the markers of a file."""
    text = path.read_text(encoding="utf-8")
    begin, end = text.index(markers[0]) + len(markers[0]), text.index(markers[1])
    path.write_text(f"{text[:begin]}\n{content}\n{text[end:]}", encoding="utf-8")


def facts() -> dict:
    """Where and with what the suite runs; it goes into pytest-benchmark's report."""
    import torch

    from lad_fast.doctor import installed_version

    return {
        "machine": machine(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in PACKAGES},
    }


def compact(report: dict) -> dict:
    """pytest-benchmark's JSON as a result file: where and with what it ran, the roofs at their best, and a row a
    benchmark, whose shares are of what was reached beside it.
    """
    found = [benchmark["extra_info"] for benchmark in report["benchmarks"] if "median_s" in benchmark["extra_info"]]
    commit = report["commit_info"]
    commit = commit["id"][:12] + (" with changes" if commit["dirty"] else "")
    return {
        **report["machine_info"]["lad_fast"],
        "commit": os.environ.get("LAD_FAST_COMMIT", commit),  # gpu.sh knows it where git does not
        "date": report["datetime"][:10],
        "roofs": _rounded({name: max(row["roofs"][name] for row in found) for name in found[0]["roofs"]}),
        "rows": [_rounded({name: value for name, value in row.items() if name != "roofs"}) for row in found],
    }


def _rounded(value):
    """Floats to four digits, also inside dicts and lists."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items() if entry is not None}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def load_results(folder: Path = RESULTS) -> list[dict]:
    """The suite's result files in a folder."""
    files = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    return [content | {"file": path} for path, content in files if "roofs" in content]


def page_part(results: list[dict]) -> str:
    """The part of docs/benchmarks.md between the markers: a section a result file."""
    return "\n\n".join(section(result) for result in results)


def readme_part(results: list[dict]) -> str:
    """README's part between the markers: the library on each machine in each precision, a line each."""
    found = [(result, dtype) for result in results for dtype in result["roofs"] if dtype != "bytes_per_second"]
    cells = [[one["machine"], dtype, *(write(one, dtype) for write in SUMMARY.values())] for one, dtype in found]
    lines = [line for line in cells if set(line[2:]) != {"-"}]  # a precision in which nothing was timed
    parts = [markdown(["machine", "precision", *SUMMARY], lines)] if lines else []
    if not any(result["device"] == "cuda" for result in results):
        parts.append("No figure has been measured on a GPU: there is no result file of one.")
    return "\n\n".join(parts)


def headline(results: list[dict]) -> str:
    """README's first figures: an epoch of SST-2 against the published loop, a line a machine."""
    speeds = {
        result["machine"]: {
            row["contestant"]: "disturbed" if is_disturbed(row) else f"{row['ratio']:.0f}x"
            for row in result["rows"]
            if row["table"] == "epoch" and row["case"].startswith("sst2") and row["contestant"] != row["baseline"]
        }
        for result in results
    }
    speeds = {machine: found for machine, found in speeds.items() if found}
    parts = []
    if speeds:
        names = list(dict.fromkeys(name for found in speeds.values() for name in found))
        lines = [[machine, *(found.get(name, "-") for name in names)] for machine, found in speeds.items()]
        parts += [
            markdown(["speed of an SST-2 epoch against the published training loop", *names], lines),
            "Scaled from a few batches. The published loop pads to 128; plain is a careful PyTorch loop; a cached "
            "teacher counts from the second epoch on ([all figures, and who is who](docs/benchmarks.md)).",
        ]
    if not any(result["device"] == "cuda" for result in results):
        parts.append("Nothing has been measured on a GPU yet.")
    return "\n\n".join(parts)


def section(result: dict) -> str:
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers"))
    roofs = dict(result["roofs"])
    copy = f"{roofs.pop('bytes_per_second') / 1e9:.3g} GB/s"
    products = " and ".join(f"{rate / 1e12:.3g} TFLOP/s ({name})" for name, rate in roofs.items())
    slopes = [
        f"{row['contestant']} {row['time_slope']:.2f} in time and {row['kept_slope']:.2f} in memory by {row['axis']}"
        for row in result["rows"]
        if row["table"] == "scaling"
    ]
    starts = [f"{row['case']}: {_seconds(row['median_s'])}" for row in result["rows"] if row["table"] == "start"]
    parts = [
        f"## {result['machine']}",
        f"{versions}, {result['threads']} threads, commit {result['commit']}, {result['date']}. Roofs measured in the "
        f"run: copies {copy}, products {products}. {_disturbance(result)}",
        _table(result, "step", STEP),
        _table(result, "epoch", EPOCH),
        _table(result, "objective", OBJECTIVE, lambda row: row["passes"] == "forward+backward"),
        _phases(result),
        f"Exponents of growth (the objective's forward and backward; an epoch with a cached teacher): "
        f"{'; '.join(slopes)}." if slopes else "",
        f"Wall time of fresh processes, imports included: {'; '.join(starts)}." if starts else "",
    ]
    figure = result["file"].with_suffix(".png")
    if figure.is_file():
        parts.append(f"![Time and memory](../{figure.relative_to(ROOT)})")
    return "\n\n".join(part for part in parts if part)


MOST_OTHERS = 0.1  # share of the processors that others may take while a row is timed


def is_disturbed(row: dict) -> bool:
    """Whether others took much of the processors while a row, or the one it is compared with, was timed."""
    return max(row.get("other_jobs") or 0, row.get("baseline_other_jobs") or 0) >= MOST_OTHERS


def _disturbance(result: dict) -> str:
    shares = [row["other_jobs"] for row in result["rows"] if "other_jobs" in row]
    if not shares:
        return ""
    disturbed = sum(share >= MOST_OTHERS for share in shares)
    return (
        f"Other jobs took a tenth of the processors or more while {disturbed} of {len(shares)} rows were timed"
        + ("; their times have a ~, and no ratio is given." if disturbed else ".")
    )


def _time(row: dict) -> str:
    return ("~" if (row.get("other_jobs") or 0) >= MOST_OTHERS else "") + _seconds(row["median_s"])


def _ratio(row: dict) -> str:
    return "disturbed" if is_disturbed(row) else f"{row['ratio']:.2f}x"


STEP = {
    "training step": lambda row: row["case"],
    "contestant": lambda row: row["contestant"],
    "time": _time,
    "against published": _ratio,
    "model FLOPs utilisation": lambda row: f"{row['model_flops_utilisation']:.0%}",
}
EPOCH = {
    "epoch, scaled from": lambda row: f"{row['case']}, {row['sampled_batches']} of {row['epoch_steps']} batches",
    "contestant": lambda row: row["contestant"],
    "time": lambda row: _seconds(row["epoch_seconds_scaled_from_sample_total"]),
    "against published": _ratio,
}
OBJECTIVE = {
    "objective": lambda row: row["case"],
    "contestant": lambda row: row["contestant"],
    "time": _time,
    "against reference": _ratio,
    "kept for backward": lambda row: f"{row['kept_bytes'] / 1e6:.0f} MB",
    "peak": lambda row: f"{row['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in row else "-",
    "of roof": lambda row: f"{row['roof_share']:.0%}",
}


def _step(table: str, case: str, option: str = "") -> Callable[[dict, str], str]:
    """A column of :data:`SUMMARY`: the library's step against the published one."""

    def write(result: dict, dtype: str) -> str:
        rows = (row for row in result["rows"] if row["table"] == table and row["case"].startswith(case))
        return next((_ratio(row) for row in rows if row["contestant"] == f"ours, {dtype}{option}"), "-")

    return write


def _objective(rival: str, write: Callable[[dict, dict], str]) -> Callable[[dict, str], str]:
    """A column of :data:`SUMMARY`: the objective beside a rival, both ways, at BERT-base's published size."""
    size = {"table": "objective", "passes": "forward+backward", "tokens": 4096, "hidden_size": 768, "layers": 12}

    def column(result: dict, dtype: str) -> str:
        wanted = (size | {"dtype": dtype}).items()
        rows = {row["contestant"]: row for row in result["rows"] if wanted <= row.items()}
        ours = "triton" if result["device"] == "cuda" else "torch"
        if not {ours, rival} <= rows.keys():
            return "-"
        both = rows[ours], rows[rival]
        return "disturbed" if any(map(is_disturbed, both)) else write(*both)

    return column


def _ratio_of_times(row: dict, other: dict) -> str:
    return f"{other['median_s'] / row['median_s']:.2f}x"


def _both_kept(row: dict, other: dict) -> str:
    return f"{row['kept_bytes'] / 1e6:.0f} of {other['kept_bytes'] / 1e6:.0f} MB"


SUMMARY = {
    "padded step": _step("step", "B 32 x S 128"),
    "SST-2 epoch": _step("epoch", "sst2"),
    "SST-2, teacher cached": _step("epoch", "sst2", ", cached teacher"),
    "MRPC epoch": _step("epoch", "mrpc"),
    "objective, against reference": _objective("reference", _ratio_of_times),
    "against the compiled one": _objective("compiled", _ratio_of_times),
    "of roof": _objective("reference", lambda row, _: f"{row['roof_share']:.0%}"),
    "kept for backward": _objective("reference", _both_kept),
}
ENGINE = {
    "option": lambda row: row["contestant"],
    "precision": lambda row: row["dtype"],
    "a step": _time,
    "against the first row": _ratio,
}


def engine_part(results: list[dict]) -> str:
    """The part of docs/performance.md between the markers: what each option of the training step gave."""
    found = [(result, row) for result in results for row in result["rows"] if row["table"] == "engine"]
    parts = []
    for case in dict.fromkeys((result["machine"], row["case"]) for result, row in found):
        result = next(result for result, row in found if (result["machine"], row["case"]) == case)
        parts.append(f"{result['machine']}, torch {result['versions']['torch']}; {case[1]}:")
        parts.append(_table(result, "engine", ENGINE))
    return "\n\n".join(parts)


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _table(result: dict, name: str, columns: dict[str, Callable], wanted: Callable = lambda row: True) -> str:
    rows = [row for row in result["rows"] if row["table"] == name and wanted(row)]
    if not rows:
        return ""
    return markdown(list(columns), [[write(row) for write in columns.values()] for row in rows])


def _phases(result: dict) -> str:
    rows = [row for row in result["rows"] if "phase_shares" in row]
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row["phase_shares"]))
    cells = [
        [f"{row['case'].split(',')[0]}: {row['contestant']}", *(f"{row['phase_shares'].get(n, 0):.0%}" for n in names)]
        for row in rows
    ]
    return markdown(["share of a step's time", *names], cells)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def draw(result: dict, path: Path) -> None:
    """Step times as bars; the objective's time and kept memory against tokens; growth with layers and examples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 4), layout="constrained")
    bars, time, memory, growth = figure.subplots(1, 4)
    steps = [row for row in result["rows"] if row["table"] == "step"]
    bars.barh([row["contestant"] for row in steps], [1e3 * row["median_s"] for row in steps])
    bars.invert_yaxis()
    bars.set_xlabel("milliseconds")
    bars.set_title(steps[0]["case"] if steps else "", fontsize="small")
    for row in (row for row in result["rows"] if row["table"] == "scaling"):
        sizes = [point[row["axis"]] for point in row["points"]]
        seconds, kept = ([point[name] for point in row["points"]] for name in ("seconds", "kept_bytes"))
        if row["axis"] == "tokens":
            time.loglog(sizes, [1e3 * value for value in seconds], "o-", label=row["contestant"])
            memory.loglog(sizes, [value / 1e6 for value in kept], "o-", label=row["contestant"])
        else:
            label = f"{row['contestant']}, {row['axis']}"
            relative = [value / seconds[0] for value in seconds]
            growth.plot([size / sizes[0] for size in sizes], relative, "o-", label=label)
    growth.plot([1, 4], [1, 4], "k:", label="proportional")
    panels = (
        (time, "tokens", "objective, milliseconds"),
        (memory, "tokens", "objective, kept for backward, MB"),
        (growth, "size, of the smallest", "time, of the smallest"),
    )
    for panel, label, title in panels:
        panel.set_xlabel(label)
        panel.set_title(title)
        panel.grid(alpha=0.3, which="both")
        if panel.lines:
            panel.legend(fontsize="small")
    figure.suptitle(result["machine"])
    figure.savefig(path, dpi=120, metadata={"Software": None})


def run(full: bool, output_dir: Path) -> int:
    """The suite in a process of its own, then its files; returns pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        # -P keeps the repository's root off the path, where kernels/ would hide Hugging Face's.
        command = [sys.executable, "-P", "-m", "pytest", str(ROOT / "benchmarks"), "-q", f"--benchmark-json={report}"]
        code = subprocess.run([*command, *(["--full"] if full else [])], cwd=ROOT, check=False).returncode
        converted = convert(report, output_dir)
    return code or converted


def convert(report: Path, output_dir: Path) -> int:
    """Result file and figure, and the tables where the files are among those kept; 1 if nothing was measured."""
    if not report.is_file() or not (text := report.read_text(encoding="utf-8")):
        print(f"{report} holds no benchmarks", file=sys.stderr)
        return 1
    result = compact(json.loads(text))
    output_dir.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", result["machine"].lower()).strip("-")
    path = output_dir / f"{name}.json"
    write_result(result, path)
    draw(result, path.with_suffix(".png"))
    print(f"wrote {path} and its figure")
    if output_dir.resolve() == RESULTS.resolve():
        write_tables()
    return 0


def write_result(result: dict, path: Path) -> None:
    """JSON with a row a line, so that a change of one row is a change of one line."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    head = json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def write_tables() -> None:
    results = load_results()
    replace_between(README, HEADLINE_MARKERS, headline(results))
    replace_between(README, MARKERS, readme_part(results))
    replace_between(PAGE, MARKERS, page_part(results))
    replace_between(PERFORMANCE, ENGINE_MARKERS, engine_part(results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "convert", "readme"))
    parser.add_argument("--full", action="store_true", help="larger sizes too")
    parser.add_argument("--report", type=Path, help="pytest-benchmark's JSON, for convert")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.what == "run":
        return run(options.full, options.output_dir)
    if options.what == "convert":
        return convert(options.report, options.output_dir)
    write_tables()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What training runs came to, to be looked at: :func:`report` of their folders, and the demo's table and figure."""

import html
import io
import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template
from typing import Literal, NamedTuple

__all__ = ["Measurement", "comparison_figure", "comparison_table", "format_table", "report"]


@dataclass(frozen=True)
class Measurement:
    """One model of a comparison.

    Attributes:
        name: What the model is called in tables and figures.
        score: Its score on held-out data, 0 to 1.
        num_parameters: How many parameters it has.
        train_seconds: Seconds its training took, evaluation included.
        examples_per_second: How many examples it classifies per second.
    """

    name: str
    score: float
    num_parameters: int
    train_seconds: float
    examples_per_second: float


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out text cells in columns: the first aligned left, the others right.

    Args:
        header: Column titles.
        rows: Rows of as many cells as there are titles.

    Returns:
        Lines of plain text joined by newlines: titles, a rule, the rows.

    Raises:
        ValueError: If a row has another number of cells than header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows: each takes {len(header)} cells, one has {len(row)}: {list(row)}")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(header), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)])


def comparison_table(measurements: Sequence[Measurement], metric: str = "accuracy") -> str:
    """Returns the measurements as a plain text table, in the order given."""
    return format_table(
        ["model", metric, "parameters", "training", "sentences/s"],
        [
            [
                m.name,
                f"{m.score:.1%}",
                f"{m.num_parameters:,}",
                f"{m.train_seconds:.1f} s",
                f"{m.examples_per_second:,.0f}",
            ]
            for m in measurements
        ],
    )


def comparison_figure(measurements: Sequence[Measurement], path: Path, metric: str = "accuracy") -> Path:
    """Draws score against size, training time and speed, one panel each, one point per model.

    Args:
        measurements: The models compared, at least one.
        path: The picture to write; its suffix picks the format (.png, .svg, .pdf).
        metric: The name of the score.

    Returns:
        path.

    Raises:
        ValueError: If measurements is empty.
        ImportError: If matplotlib is not installed.
    """
    if not measurements:
        raise ValueError("measurements: takes at least one, got none")
    figure = _new_figure(11, 4)
    panels = figure.subplots(1, 3, sharey=True)
    quantities = (
        ("parameters (millions)", [m.num_parameters / 1e6 for m in measurements]),
        ("training (seconds)", [m.train_seconds for m in measurements]),
        ("inference (sentences per second)", [m.examples_per_second for m in measurements]),
    )
    for panel, (label, values) in zip(panels, quantities, strict=True):
        for measurement, value in zip(measurements, values, strict=True):
            panel.plot(value, 100 * measurement.score, "o", markersize=9, label=measurement.name)
        panel.set_xlabel(label)
        panel.set_xlim(left=0, right=1.15 * max(values))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"{metric} (%)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(measurements))
    figure.savefig(path, dpi=150)
    return path


def _new_figure(width: float, height: float):
    """An empty matplotlib figure of so many inches.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a figure needs matplotlib: pip install 'lad_fast[report]'") from error
    return Figure(figsize=(width, height), layout="constrained")


# --- what a run has left in its folder --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """What a run's folder holds so far; checked, so that what draws it may rely on names, types and shapes.

    Attributes:
        name: What the run is called in the report.
        config: Its settings by name.
        losses, evaluations: The two kinds of lines in log.jsonl.
        results: Of results.json; None as long as the run goes on.
        labels: Class names by class id, where best/ tells them.
        broken_at: The step whose numbers that were not finite ended it; None where none did.
    """

    name: str
    config: dict
    losses: list[dict]
    evaluations: list[dict]
    results: dict | None
    labels: list[str]
    broken_at: int | None

    @property
    def shown(self) -> dict | None:
        """The evaluation of best/; while the run goes on, the latest one; None before the first."""
        best = [line for line in self.evaluations if self.results and line["step"] == self.results["best_step"]]
        return (best or self.evaluations or [None])[-1]

    def column(self, name: str) -> tuple[list[int], list]:
        """Steps and values of one name in the loss lines that have it."""
        lines = [line for line in self.losses if name in line]
        return [line["step"] for line in lines], [line[name] for line in lines]


# Numbers in a log line by name: how many lists deep they lie.
_DEPTHS = {
    "step": 0, "epoch": 0, "loss": 0, "hidden_loss": 0, "logits_loss": 0, "hidden_losses": 1, "lr": 0, "gate_lr": 0,
    "tokens_per_second": 0, "peak_memory_mb": 0, "contributions": 2,
}  # fmt: skip
_RESULTS = ("best_step", "num_parameters", "seconds", "steps", "tokens")


def _read_run(folder: Path, name: str) -> _Run:
    log = folder / "log.jsonl"
    if not log.is_file():
        raise ValueError(f"runs holds {folder}, without log.jsonl; it takes folders that finetune or distill wrote")
    *lines, rest = log.read_bytes().split(b"\n")
    records, shapes = [], {}
    for number, line in enumerate(lines, 1):
        try:
            records.append(_checked(json.loads(line), shapes))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{log}, line {number}, is not what a run writes: {error}") from error
    if rest:  # without its end: being written, or cut off by a kill
        with suppress(ValueError, RecursionError):
            records.append(_checked(json.loads(rest), shapes))
    results = _read_json(folder / "results.json")
    for key in _RESULTS if results is not None else ():
        if not _is_number(results.get(key)):
            raise ValueError(f"{folder / 'results.json'}: {key} is {results.get(key)!r:.60}; it takes a number")
    model = _read_json(folder / "best" / "config.json") or {}
    names = model.get("id2label")
    names = names if isinstance(names, dict) and all(key.isdecimal() for key in names) else {}
    dumps = [int(path.name[16:]) for path in folder.glob("not-finite-step-*") if path.name[16:].isdecimal()]
    latest = max((record["step"] for record in records), default=0)
    return _Run(
        name,
        _read_json(folder / "config.json") or {},
        [record for record in records if "loss" in record],
        [record for record in records if "metrics" in record],
        results,
        [str(names[key]) for key in sorted(names, key=int)],
        # A run that was taken up before that step, and got over it, has logged later ones.
        max(dumps) if results is None and dumps and max(dumps) >= latest else None,
    )


def _read_json(path: Path) -> dict | None:
    """The object in a JSON file; None where there is no file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; it takes an object")
    return content


def _checked(record, shapes: dict[str, tuple[int, ...]]) -> dict:
    """A log line, if its numbers are numbers, and of the shapes that the lines before it had."""
    if not isinstance(record, dict) or not {"step", "epoch"} <= record.keys():
        raise ValueError("it takes an object with step and epoch")
    found = {name: (record[name], depth) for name, depth in _DEPTHS.items() if name in record}
    if "metrics" in record:
        if not _is_metrics(record["metrics"]):
            raise ValueError("metrics takes numbers by split and name")
        gates = record.get("gates", [])
        if not isinstance(gates, list) or not all(isinstance(gate, dict) for gate in gates):
            raise ValueError("gates takes a list of objects")
        if gates:
            found["gates"] = [gate.get("openness") for gate in gates], 1
        confusion = record.get("confusion", {})
        if not isinstance(confusion, dict):
            raise ValueError("confusion takes a matrix by split")
        found |= {f"confusion of {split}": (matrix, 2) for split, matrix in confusion.items()}
    for name, (value, depth) in found.items():
        shape = _shape(value, depth)
        if shape is None:
            raise ValueError(f"{name} is {value!r:.60}; it takes {('a number', 'numbers', 'rows of numbers')[depth]}")
        if shapes.setdefault(name, shape) != shape:
            raise ValueError(f"{name} is of shape {shape}; in lines before it is {shapes[name]}")
        if name.startswith("confusion") and shape[0] != shape[1]:
            raise ValueError(f"{name} has {shape[0]} rows and {shape[1]} columns; it takes a square")
    return record


def _is_number(value) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _is_metrics(value) -> bool:
    splits = list(value.values()) if isinstance(value, dict) else [None]
    return all(isinstance(split, dict) and all(map(_is_number, split.values())) for split in splits)


def _shape(value, depth: int) -> tuple[int, ...] | None:
    """Of nested lists of numbers; None of anything else."""
    if not depth:
        return () if _is_number(value) else None
    inner = {_shape(entry, depth - 1) for entry in value} if isinstance(value, list) else {None}
    return None if None in inner or len(inner) != 1 else (len(value), *inner.pop())


# --- panels -----------------------------------------------------------------------------------------------------------


class _Panel(NamedTuple):
    """One drawing of a report."""

    title: str
    draw: Callable
    """Fills a matplotlib figure or part of one."""
    note: str = ""
    is_wide: bool = False
    """Takes a row by itself."""


# Loss lines: what a comparison draws of them, and how.
_COLUMNS = {
    "loss": ("Loss", "log"),
    "hidden_loss": ("Hidden loss", "log"),
    "logits_loss": ("Logits loss", "log"),
    "lr": ("Learning rate", "free"),
    "tokens_per_second": ("Throughput, tokens a second", "from 0"),
    "peak_memory_mb": ("Peak memory so far, MB", "from 0"),
}
_COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d", "#475569")
_INK, _FAINT = "#334155", "#e2e8f0"


def _printable(text: str) -> str:
    """Without control characters and halves of surrogate pairs, which neither HTML nor SVG can hold."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _label(text: str, most: int = 40) -> str:
    """A text from a file as matplotlib takes it: short, no formula, no first underscore, which would hide it."""
    text = _printable(text)
    if len(text) > most:  # names that are long are often alike at their beginning
        text = f"{text[: most // 2]}\N{HORIZONTAL ELLIPSIS}{text[most // 2 + 1 - most :]}"
    return (f" {text}" if text.startswith("_") else text).replace("$", r"\$")


class _Curve(NamedTuple):
    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str


def _marker(curve: _Curve) -> str:
    """Of few points; one alone would not be seen without."""
    return "o" if len(curve.x) <= 40 else ""


def _curves(
    figure, curves: Sequence[_Curve], x_label: str = "step", scale: Literal["free", "log", "from 0"] = "free"
) -> None:
    """All in the same axes; "log" where values are far apart."""
    axes = figure.subplots()
    for curve in curves:
        axes.plot(curve.x, curve.y, label=_label(curve.label), color=curve.color, marker=_marker(curve))
    values = [value for curve in curves for value in curve.y if math.isfinite(value)]
    if scale == "log" and values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 6))
    if scale == "from 0":
        axes.set_ylim(bottom=0, top=1.08 * max(values, default=0) or None)
    axes.set_xlabel(x_label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if any(curve.label for curve in curves):
        # Outside: over the curves it would hide some, and the best place is slow to find for long ones.
        is_narrow = max(len(curve.label) for curve in curves) <= 16
        figure.legend(loc="outside right upper" if is_narrow else "outside upper left")


def _curves_apart(figure, curves: Sequence[_Curve]) -> None:
    """Each in axes of its own, one above the other: for values too far apart for one scale."""
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axes, curve in zip(panels, curves, strict=True):
        axes.plot(curve.x, curve.y, color=curve.color, marker=_marker(curve), clip_on=False)
        axes.ticklabel_format(axis="y", scilimits=(-3, 3))
        axes.set_ylim(bottom=0)
        axes.set_ylabel(curve.label)
    panels[-1].set_xlabel("step")


def _matrices(figure, matrices: Sequence[tuple[str, Sequence, Sequence]], labels: tuple, ticks: tuple) -> None:
    """Matrices side by side: of each its title, its rows of shares, which give the colours, and its texts."""
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (title, shares, texts) in zip(panels, matrices, strict=True):
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for i, row in enumerate(texts if max(len(shares), len(shares[0])) <= 12 else ()):
            for j, text in enumerate(row):
                axes.text(j, i, text, ha="center", va="center", color="white" if shares[i][j] > 0.55 else _INK)
        axes.set_title(_label(title))
        longest = max(map(len, ticks[0]))
        for axis, label, names, most in zip(
            (axes.xaxis, axes.yaxis), labels, ticks, (24 if longest <= 2 else 12, 12), strict=True
        ):
            axis.set_label_text(label)
            every = math.ceil(len(names) / most)  # more would lie over each other
            axis.set_ticks(range(0, len(names), every), [_label(name, most=20) for name in names[::every]])
        if longest > 3 and longest * len(ticks[0]) > 24:
            axes.tick_params(axis="x", labelrotation=45)
            for text in axes.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")
        axes.grid(False)
        axes.tick_params(length=0)


def _panels_of(run: _Run) -> list[_Panel]:
    """All that one run's log holds; parts that its method has not are left out."""

    def curves(**names: str) -> list[_Curve]:
        return [_Curve(label, *run.column(name), _COLORS[i]) for i, (name, label) in enumerate(names.items())]

    def panel(title: str, drawn: Iterable[_Curve], note: str = "", draw=_curves, **options) -> list[_Panel]:
        drawn = [curve for curve in drawn if curve.x]
        return [_Panel(title, partial(draw, curves=drawn, **options), note)] if drawn else []

    steps, rows = run.column("hidden_losses")
    layers = _layers([f"layer {i + 1}" for i in range(len(rows[0]) if rows else 0)], steps, rows)
    scores = enumerate(_metric_names([run]))
    panels = [
        *panel("Loss", curves(loss="total", hidden_loss="hidden", logits_loss="logits"), scale="log"),
        *panel("Hidden loss by student layer", layers, scale="log"),
        *panel("Metrics", [_Curve(" ".join(of), *_scores(run, *of), _color(i)) for i, of in scores], x_label="epoch"),
        *panel("Learning rate", curves(lr="model", gate_lr="gates"), draw=_curves_apart),
    ]
    for name in ("tokens_per_second", "peak_memory_mb"):
        title, scale = _COLUMNS[name]
        panels += panel(title, curves(**{name: ""}), scale=scale)
    if looked := [line for line in run.evaluations if line.get("gates")]:
        names = [f"gates[{i}]" for i in range(len(looked[0]["gates"]))]
        values = [[gate["openness"] for gate in line["gates"]] for line in looked]
        states = [(name, gate.get("state")) for name, gate in zip(names, looked[-1]["gates"], strict=True)]
        told = ", ".join(f"{name} is {state}" for name, state in states if state)
        note = "Mean of each gate's values: at 1 it takes its own layer alone, at 0 only what came before it. "
        note += f"At the end {told or 'none is saturated or collapsed'}."
        drawn = _layers(names, [line["epoch"] for line in looked], values)
        panels += panel("Gate openness", drawn, note, x_label="epoch", scale="from 0")
    if run.shown and run.shown.get("confusion"):
        panels.append(_confusion(run))
    if shared := [line for line in run.evaluations if "contributions" in line]:
        panels.append(_contributions([shared[i] for i in sorted({0, (len(shared) - 1) // 2, len(shared) - 1})]))
    return panels


def _color(i: int) -> str:
    return _COLORS[i % len(_COLORS)]


def _layers(names: Sequence[str], x: Sequence[float], rows: Sequence[Sequence[float]]) -> list[_Curve]:
    """A curve for each column; from light to dark, since layers have an order."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shades = (to_hex(colormaps["viridis_r"](0.15 + 0.85 * i / max(1, len(names) - 1))) for i in range(len(names)))
    return [_Curve(name, x, y, shade) for name, y, shade in zip(names, zip(*rows, strict=True), shades, strict=True)]


def _metric_names(runs: Sequence[_Run]) -> list[tuple[str, str]]:
    """(split, metric) of all evaluations, each once."""
    lines = (line for run in runs for line in run.evaluations)
    return list(dict.fromkeys((split, name) for line in lines for split, of in line["metrics"].items() for name in of))


def _scores(run: _Run, split: str, name: str) -> tuple[list[int], list[float]]:
    lines = [line for line in run.evaluations if name in line["metrics"].get(split, {})]
    return [line["epoch"] for line in lines], [line["metrics"][split][name] for line in lines]


def _contributions(lines: Sequence[dict]) -> _Panel:
    matrices = []
    for line in lines:
        shares = line["contributions"]
        texts = [[f"{100 * share:.0f}" if share else "" for share in row] for row in shares]  # 0: not in its chain
        matrices.append((f"epoch {line['epoch']}", shares, texts))
    ticks = [[str(i + 1) for i in range(size)] for size in (len(shares[0]), len(shares))]
    draw = partial(_matrices, matrices=matrices, labels=("teacher layer", "student layer"), ticks=ticks)
    note = "Percent of what a student layer learns from that come from each teacher layer; a row adds up to 100."
    return _Panel("What the student's layers learn from", draw, note, is_wide=True)


def _confusion(run: _Run) -> _Panel:
    matrices, names, told = [], run.labels, ""
    for split, counts in run.shown["confusion"].items():
        shares = [[count / max(1, sum(row)) for count in row] for row in counts]
        matrices.append((split, shares, [[f"{count:,}" for count in row] for row in counts]))
        numbers = [*map(str, range(len(counts)))]
        if len(names) == len(counts) > 8 and names != numbers:  # no room for names beside the matrix
            told = f" Classes from 0 on: {', '.join(names)}."
        names = names if len(names) == len(counts) <= 8 else numbers
    draw = partial(_matrices, matrices=matrices, labels=("prediction", "label"), ticks=(names, names))
    note = f"Examples at step {run.shown['step']}; colours are shares of a label's examples.{told}"
    return _Panel("Confusion", draw, note, is_wide=len(matrices) > 1)


def _panels_comparing(runs: Sequence[_Run]) -> list[_Panel]:
    """What several runs' logs have in common, drawn over each other."""
    series = [
        (f"{name}, {split}".capitalize(), partial(_scores, split=split, name=name), {"x_label": "epoch"})
        for split, name in _metric_names(runs)
    ]
    series += [(title, partial(_Run.column, name=name), {"scale": scale}) for name, (title, scale) in _COLUMNS.items()]
    panels = []
    for title, values, options in series:
        curves = [_Curve(run.name, *values(run), _color(i)) for i, run in enumerate(runs)]
        if curves := [curve for curve in curves if curve.x]:
            panels.append(_Panel(title, partial(_curves, curves=curves, **options)))
    return panels


@contextmanager
def _style():
    """The look of all panels; texts in SVG stay texts, and the same run gives the same file."""
    from matplotlib import rc_context

    settings = {
        "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "axes.labelcolor": _INK, "text.color": _INK,
        "axes.edgecolor": "#94a3b8", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": _FAINT, "xtick.color": "#64748b", "ytick.color": "#64748b", "lines.linewidth": 1.6,
        "lines.markersize": 4, "legend.fontsize": 8, "legend.frameon": False, "svg.fonttype": "none",
    }  # fmt: skip
    with rc_context(settings), warnings.catch_warnings():
        # The page has such texts in the reader's fonts; the PNG has boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def _svg(panel: _Panel) -> str:
    from matplotlib import rc_context

    figure, file = _new_figure(11 if panel.is_wide else 5.4, 2.9), io.StringIO()
    panel.draw(figure)
    with rc_context({"svg.hashsalt": _printable(panel.title)}):  # ids of one page's drawings must differ
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{_html(panel.title)}"', 1)


def _rows(panels: Sequence[_Panel]) -> list[list[_Panel]]:
    """Two panels a row; a wide one, or one that has no other beside it, takes it all."""
    rows: list[list[_Panel]] = []
    for panel in panels:
        if rows and len(rows[-1]) == 1 and not panel.is_wide and not rows[-1][0].is_wide:
            rows[-1].append(panel)
        else:
            rows.append([panel])
    return [row if len(row) == 2 else [row[0]._replace(is_wide=True)] for row in rows]


def _write_png(title: str, rows: Sequence[Sequence[_Panel]], path: Path) -> None:
    figure = _new_figure(11, 0.6 + 3.2 * max(1, len(rows)))
    figure.suptitle(_label(title), fontsize=13, fontweight="bold")
    for row, part in zip(rows, figure.subfigures(max(1, len(rows)), 1, squeeze=False)[:, 0], strict=False):
        for panel, place in zip(row, part.subfigures(1, len(row), squeeze=False)[0], strict=True):
            place.suptitle(_label(panel.title), fontsize=10, fontweight="bold")
            panel.draw(place)
    figure.savefig(path, dpi=110)


# --- the page ---------------------------------------------------------------------------------------------------------

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1180px; padding: 24px; background: #f8fafc; color: #0f172a;
  font: 14px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 24px; }
h2 { margin: 0 0 4px; font-size: 14px; }
p { margin: 4px 0 16px; color: #475569; }
section, figure { box-sizing: border-box; margin: 0; padding: 14px 16px; overflow: hidden; background: #fff;
  border: 1px solid #e2e8f0; border-radius: 8px; }
section { margin-bottom: 16px; overflow-x: auto; }
figcaption { color: #64748b; font-size: 12px; }
figure svg { display: block; width: 100%; height: auto; }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; margin-bottom: 16px; }
.wide { grid-column: 1 / -1; }
.tiles { display: flex; flex-wrap: wrap; gap: 16px; margin: 0 0 16px; }
.tiles div { flex: 1 0 110px; padding: 10px 16px; background: #fff; border: 1px solid #e2e8f0; border-radius: 8px; }
dt { color: #64748b; font-size: 12px; }
dd { margin: 0; font-size: 20px; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid #e2e8f0; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
th { color: #64748b; font-weight: 500; }
.settings { columns: 3; column-gap: 32px; }
.settings div { display: flex; justify-content: space-between; gap: 12px; break-inside: avoid; padding: 2px 0;
  border-bottom: 1px solid #f1f5f9; }
.settings dd { font-size: 13px; font-weight: 400; text-align: right; overflow-wrap: anywhere; }
@media (max-width: 760px) { .figures { grid-template-columns: 1fr; } .settings { columns: 1; } }
</style>
</head>
<body>
<h1>$title</h1>
<p>$subtitle</p>
$head
<div class="figures">
$figures
</div>
$foot
</body>
</html>
""")


def _html(value) -> str:
    return html.escape(_printable(str(value)))


def _figure(panel: _Panel) -> str:
    head = f'<figure class="{"wide" if panel.is_wide else "half"}"><h2>{_html(panel.title)}</h2>'
    return f"{head}\n{_svg(panel)}<figcaption>{_html(panel.note)}</figcaption></figure>"


def _table(header: Sequence, rows: Iterable[Sequence]) -> str:
    lines = [f"<tr>{''.join(f'<th>{_html(cell)}</th>' for cell in header)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{_html(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>\n{chr(10).join(lines)}\n</table>"


def _pairs(kind: str, pairs: Iterable[tuple]) -> str:
    entries = (f"<div><dt>{_html(name)}</dt><dd>{_html(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="{kind}">\n{chr(10).join(entries)}\n</dl>'


def _facts(run: _Run) -> dict[str, str]:
    """The few numbers that stand for a run."""
    facts = {}
    for split, of in run.shown["metrics"].items() if run.shown else ():
        facts |= {f"{split} {name}": f"{value:.4f}" for name, value in of.items()}
    if (results := run.results) is None:
        facts["steps so far"] = f"{max([line['step'] for line in run.losses + run.evaluations], default=0):,}"
    else:
        facts |= {
            "best at step": f"{results['best_step']:,} of {results['steps']:,}",
            "parameters": f"{results['num_parameters'] / 1e6:.1f} M",
            "training": f"{results['seconds']:,.0f} s",
            "tokens/s": f"{results['tokens'] / max(results['seconds'], 1e-9):,.0f}",
        }
    if peak := run.column("peak_memory_mb")[1]:
        facts["peak memory"] = f"{max(peak):,.0f} MB"
    return facts


def _origin(run: _Run) -> str:
    """What kind of a run it is, in a sentence."""
    kind = f"distilled from {run.config.get('teacher')} by method {run.config.get('method')}"
    if "teacher" not in run.config:
        kind = f"fine-tuned from {run.config.get('model')}"
    state = "finished"
    if run.broken_at is not None:
        state = f"ended at step {run.broken_at} by numbers that are not finite; metrics are the latest"
    elif run.results is None:
        state = "not finished: no results.json yet, metrics are the latest"
    return f"Task {run.config.get('task')}, {kind}; {state}."


def _page_of(run: _Run) -> dict[str, str]:
    versions = run.config.get("versions")
    settings = {name: value for name, value in run.config.items() if name not in ("versions", "run")}
    settings |= versions if isinstance(versions, dict) else {}
    return {
        "subtitle": _html(_origin(run)),
        "head": _pairs("tiles", _facts(run).items()),
        "foot": f"<section><h2>Settings and versions</h2>\n{_pairs('settings', settings.items())}</section>",
    }


def _page_comparing(runs: Sequence[_Run]) -> dict[str, str]:
    facts = [_facts(run) for run in runs]
    columns = list(dict.fromkeys(name for of in facts for name in of))
    rows = ([run.name, *(of.get(name, "") for name in columns)] for run, of in zip(runs, facts, strict=True))
    names = dict.fromkeys(name for run in runs for name in run.config if name not in ("output_dir", "versions", "run"))
    # A setting that only the other kind of run has is no difference to look at.
    kept = [name for name in names if len({str(run.config[name]) for run in runs if name in run.config}) > 1]
    differing = [[name, *(run.config.get(name, "") for run in runs)] for name in kept]
    head = f"<section>{_table(['run', *columns], rows)}</section>"
    if differing:
        table = _table(["", *(run.name for run in runs)], differing)
        head += f"<section><h2>Settings that differ</h2>{table}</section>"
    return {"subtitle": f"{len(runs)} runs beside each other.", "head": head, "foot": ""}


def report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes one self-contained HTML page about one run, or about several beside each other, and its figures as PNG.

    Args:
        runs: Output folders of finetune or distill, finished or not.
        output: The page to write, ending in .html; None takes report.html in the run's folder or, of several runs,
            comparison.html in the first one's. The PNG lies beside it.

    Returns:
        The page's path.

    Raises:
        ValueError: If runs is empty, a folder is no run's, or a file in it is damaged; the message names it, and the
            line. A log whose last line is cut off is no error.
        ImportError: If matplotlib is not installed.
    """
    folders = [Path(run) for run in runs]
    if not folders:
        raise ValueError("runs is empty; it takes at least one run's folder")
    if output is None:
        output = folders[0] / ("report.html" if len(folders) == 1 else "comparison.html")
    output = Path(output)
    if output.suffix != ".html":
        raise ValueError(f"output is {output}; it takes a path that ends in .html")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    found = [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    output.parent.mkdir(parents=True, exist_ok=True)
    _new_figure(1, 1)  # before anything else is imported from matplotlib: says how to get it
    with _style():
        if len(found) == 1:
            title, panels, page = names[0], _panels_of(found[0]), _page_of(found[0])
        else:
            title, panels, page = ", ".join(names), _panels_comparing(found), _page_comparing(found)
        rows = _rows(panels)
        figures = "\n".join(_figure(panel) for row in rows for panel in row)
        text = _PAGE.substitute(page, title=_html(title), figures=figures)
        _write_png(title, rows, output.with_suffix(".png"))
    output.write_text(text, encoding="utf-8")
    return output

"""A table and a figure of what a comparison of methods measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a figure needs matplotlib: pip install 'lad_fast[report]'") from error

    figure = Figure(figsize=(11, 4), layout="constrained")
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

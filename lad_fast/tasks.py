"""Which task a run is about: one of GLUE's, or one of CSV files of one's own."""

import csv
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lad_fast.glue import TASKS, DataError, Examples, Task, brief, get_task, label_parser, read_text

__all__ = ["CSV", "CsvTask", "DataConfig", "find_task"]

CSV = "csv"
# What float32 holds: every score of one's own is in range, and no prediction is clipped.
_ANY_SCORE = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))


@dataclass(kw_only=True)
class DataConfig:
    """What names a task and its data, in training and afterwards."""

    task: str
    """GLUE task: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli. Or csv: train.csv, validation.csv and test.csv
    in --data-dir, in UTF-8, with a header; predictions need test.csv alone."""
    text_column: str = "text"
    """Of csv: the column of texts."""
    text_pair_column: str | None = None
    """Of csv: the column of second texts, where an example has two."""
    label_column: str = "label"
    """Of csv: the column of labels. The classes are the distinct ones of train.csv, in order; after training, those
    that the model names, in the spelling of train.csv where that has the same."""
    data_dir: Path | None = None
    """Folder with CSV files, or GLUE as Parquet files or official TSV files; None takes GLUE from the Hugging Face
    hub."""
    cache_dir: Path | None = None
    """Folder that keeps tokenised data between runs; None keeps nothing."""
    max_length: int = 128
    """Tokens an example keeps, special ones included."""


@dataclass(frozen=True)
class CsvTask(Task):
    """A task of CSV files: train.csv, validation.csv and, to predict, test.csv.

    Attributes:
        label_column: the column of labels, by name for classes; test.csv needs none.
    """

    label_column: str = "label"

    def load(self, split: str, data_dir: str | Path | None) -> Examples:
        path, is_test = _find_file(split, data_dir), split in self.test_splits
        names = self.text_columns if is_test else (*self.text_columns, self.label_column)
        lines, columns = _read_columns(path, names)
        texts, labels = columns[: len(self.text_columns)], None
        if not is_test:
            parse = label_parser(self)
            labels = np.array([parse(text) for text in columns[-1]], dtype=object)
            for line, text, label in zip(lines, columns[-1], labels, strict=True):
                if label is None:
                    raise DataError(f"{path}, line {line}: label {brief(text)}; it takes {brief(self.written_labels)}")
        return Examples(self, split, texts[0], texts[1] if len(texts) == 2 else None, labels)


def find_task(config: DataConfig, labels: Sequence[str] | None = None) -> Task:
    """The task that a configuration names.

    Args:
        config: see :class:`DataConfig`.
        labels: of a task of CSV files, the classes in order, none for regression; None takes them from train.csv.

    Raises:
        ValueError: no such task, or settings that it does not take.
        DataError: train.csv is missing or damaged; the message names the line.
    """
    if config.task != CSV:
        for name in ("text_column", "text_pair_column", "label_column"):
            if (value := getattr(config, name)) != getattr(DataConfig, name):
                raise ValueError(f"{name} is {value!r}; the tasks of GLUE take none, only --task {CSV} does")
        if labels is not None:
            raise ValueError(f"regression is {not labels}; GLUE's tasks know, only --task {CSV} takes it")
        if config.task not in TASKS:
            raise ValueError(f"task is {config.task!r}; it takes one of {', '.join(TASKS)}, or {CSV} for CSV files")
        return get_task(config.task)
    texts = tuple(name for name in (config.text_column, config.text_pair_column) if name is not None)
    if len({*texts, config.label_column}) <= len(texts):
        raise ValueError(f"columns of texts and labels are {(*texts, config.label_column)}; they take different names")
    if labels is None:
        labels = _find_classes(_find_file("train", config.data_dir), config.label_column)
    metrics = "accuracy", "f1" if len(labels) == 2 else "macro_f1"
    return CsvTask(
        CSV, texts, tuple(labels),
        metrics=metrics if labels else ("pearson", "spearman"), best_metric=metrics[0] if labels else "pearson",
        submission_files={"test": "predictions.csv"}, label_range=None if labels else _ANY_SCORE,
        tsv_label_names=True, score_format="{:.6g}", label_column=config.label_column,
    )  # fmt: skip


def _find_file(split: str, data_dir: str | Path | None) -> Path:
    if data_dir is None:
        raise DataError(f"data_dir is None; task {CSV} takes a folder with {split}.csv")
    if not (root := Path(data_dir)).is_dir():
        raise DataError(f"data_dir is {root}, not a folder; it takes one with {split}.csv")
    if not os.path.lexists(path := root / f"{split}.csv"):
        raise DataError(f"data_dir {root} has no {split}.csv")
    return path


def _find_classes(path: Path, column: str) -> list[str]:
    """The distinct labels: by number where all are integers, else as texts."""
    lines, (labels,) = _read_columns(path, (column,))
    for line, label in zip(lines, labels, strict=True):
        if label != label.strip():  # it would be another class than the label without
            raise DataError(f"{path}, line {line}: label {brief(label)}; it takes one without spaces around it")
    classes = set(labels)
    if len(classes) == 1:
        raise DataError(f"{path}: column {column!r} holds {brief(labels[0])} alone; it takes at least two classes")
    are_integers = all(re.fullmatch("-?[0-9]{1,18}", label) for label in classes)
    return sorted(classes, key=lambda label: (int(label) if are_integers else 0, label))


def _read_columns(path: Path, names: Sequence[str]) -> tuple[list[int], list[list[str]]]:
    """Of each row the line it starts at, and of each named column the cells.

    Raises:
        DataError: not UTF-8, no CSV, no rows, a column missing or twice, a row with more cells or fewer than the
            header, an empty cell; it names the line.
    """
    text = read_text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # texts may be of any length
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines, rows, line = [], [], 1
    try:
        for row in reader:
            lines.append(line)
            rows.append(row)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: no CSV row ({error}); quotes in quotes are doubled") from error
    if len(rows) < 2:
        raise DataError(f"{path} has no examples; it takes a header and at least one row")
    header = rows[0]
    for name in names:
        if (count := header.count(name)) != 1:
            found = f"no column {name!r}" if not count else f"{count} columns {name!r}"
            raise DataError(f"{path}, line 1: {found} in the header; it has {brief(header)}")
    where = [header.index(name) for name in names]
    for line, row in zip(lines[1:], rows[1:], strict=True):
        if len(row) != len(header):
            raise DataError(f"{path}, line {line}: {len(row)} columns; it takes {len(header)}")
        for name, place in zip(names, where, strict=True):
            if not row[place]:
                raise DataError(f"{path}, line {line}: column {name!r} is empty; it takes text")
    return lines[1:], [[row[place] for row in rows[1:]] for place in where]

"""The nine GLUE tasks: examples from the hub, Parquet or official TSV files, metrics and submission files."""

import csv
import functools
import importlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType

import numpy as np

__all__ = [
    "TASKS",
    "DataError",
    "Examples",
    "Task",
    "compute_metrics",
    "get_task",
    "load_split",
    "predictions_from_logits",
    "write_submission",
]

METRICS = ("accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman")


class DataError(ValueError):
    """Data is missing or damaged; the message names the file and, where there is one, the 1-based line or row."""


def brief(value) -> str:
    """A value for a message: a damaged file may hold a label of a million characters, or as many columns."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@dataclass(frozen=True)
class Task:
    """A text classification task, or a regression task (no labels, but a range of scores).

    Attributes:
        name: lower-case name, also the hub's configuration and the Parquet folder.
        text_columns: the hub's one or two text columns.
        labels: class names by class id; empty for regression.
        metrics: what :func:`compute_metrics` returns, some of "accuracy", "f1" (of class 1), "macro_f1" (the
            mean over the classes that are there or predicted), "matthews", "pearson" and "spearman".
        best_metric: the one of ``metrics`` that selects the best checkpoint.
        eval_splits: labelled splits to evaluate on.
        test_splits: splits without labels to predict.
        submission_files: official file name of each test split.
        label_range: lowest and highest score of a regression task.
        tsv_folder: folder name of the official download; "" where there is none.
        tsv_text_columns, tsv_label_column: column names in the official TSV files.
        tsv_label_names: whether official files write class names rather than class ids.
        score_format: how submission files write a score.
    """

    name: str
    text_columns: tuple[str, ...]
    labels: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    best_metric: str = "accuracy"
    eval_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)
    submission_files: Mapping[str, str] = field(default_factory=dict, hash=False)
    label_range: tuple[float, float] | None = None
    tsv_folder: str = ""
    tsv_text_columns: tuple[str, ...] = ()
    tsv_label_column: str = "label"
    tsv_label_names: bool = False
    score_format: str = "{:.3f}"

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name == "..":
            raise ValueError(f"name is {self.name!r}; it becomes part of files' names and takes no path")
        if len(self.text_columns) not in (1, 2):
            raise ValueError(f"text_columns is {self.text_columns!r}; a task has one or two")
        if not self.metrics or not set(self.metrics) <= set(METRICS) or self.best_metric not in self.metrics:
            raise ValueError(
                f"metrics is {self.metrics!r}, best_metric {self.best_metric!r}; they take some of"
                f" {', '.join(METRICS)}, and one of metrics"
            )
        if (self.label_range is None) != bool(self.labels):
            raise ValueError(
                f"labels is {self.labels!r}, label_range {self.label_range!r}; a task has one of the two"
            )
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels is {brief(self.labels)}; it takes each name once")

    def __reduce__(self):
        """For spawned processes: no pickle takes the view through which ``submission_files`` is read-only."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _remade, (type(self), values | {"submission_files": dict(self.submission_files)})

    @property
    def is_regression(self) -> bool:
        return self.label_range is not None

    @property
    def num_labels(self) -> int:
        """Classes C, and so the width of the logits; 1 for regression."""
        return 1 if self.is_regression else len(self.labels)

    @property
    def label_texts(self) -> tuple[str, ...]:
        """What official files write for each class id."""
        return self.labels if self.tsv_label_names else tuple(str(i) for i in range(len(self.labels)))

    @property
    def written_labels(self) -> str:
        """What files take for a label, for a message."""
        return ", ".join(self.label_texts) or "scores from {:g} to {:g}".format(*self.label_range)

    def load(self, split: str, data_dir: str | Path | None) -> "Examples":
        """For :func:`load_split`: the examples of one of the task's splits."""
        return _load_glue(self, split, data_dir)


def _glue(name: str, folder: str, text_columns: Sequence[str], **changes) -> Task:
    changes.setdefault("tsv_text_columns", tuple(text_columns))
    changes.setdefault("submission_files", {"test": f"{folder}.tsv"})
    changes["submission_files"] = MappingProxyType(changes["submission_files"])
    return Task(name=name, text_columns=tuple(text_columns), tsv_folder=folder, **changes)


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

def _remade(kind: type, values: dict) -> Task:
    return kind(**values | {"submission_files": MappingProxyType(values["submission_files"])})


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            _glue(
                "cola", "CoLA", ["sentence"], labels=("unacceptable", "acceptable"),
                metrics=("matthews",), best_metric="matthews",
            ),
            _glue("sst2", "SST-2", ["sentence"], labels=("negative", "positive")),
            _glue(
                "mrpc", "MRPC", _PAIR, labels=("not_equivalent", "equivalent"), metrics=("accuracy", "f1"),
                tsv_text_columns=("#1 String", "#2 String"), tsv_label_column="Quality",
            ),
            _glue(
                "stsb", "STS-B", _PAIR, labels=(), label_range=(0.0, 5.0), metrics=("pearson", "spearman"),
                best_metric="pearson", tsv_label_column="score",
            ),
            _glue(
                "qqp", "QQP", ["question1", "question2"], labels=("not_duplicate", "duplicate"),
                metrics=("accuracy", "f1"), tsv_label_column="is_duplicate",
            ),
            _glue(
                "mnli", "MNLI", ["premise", "hypothesis"], labels=("entailment", "neutral", "contradiction"),
                eval_splits=("validation_matched", "validation_mismatched"),
                test_splits=("test_matched", "test_mismatched"),
                submission_files={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
                tsv_text_columns=_PAIR, tsv_label_column="gold_label", tsv_label_names=True,
            ),
            _glue("qnli", "QNLI", ["question", "sentence"], labels=_ENTAILMENT, tsv_label_names=True),
            _glue("rte", "RTE", _PAIR, labels=_ENTAILMENT, tsv_label_names=True),
            _glue("wnli", "WNLI", _PAIR, labels=_ENTAILMENT[::-1]),
        )
    }
)  # fmt: skip
"""The nine tasks of GLUE by name; label ids are the hub's."""


def get_task(name: str | Task) -> Task:
    """The task of that name; a :class:`Task` is given back as it is.

    Raises:
        ValueError: no such task; the message lists them.
    """
    if isinstance(name, Task):
        return name
    if name not in TASKS:
        raise ValueError(f"task is {name!r}; it takes one of {', '.join(TASKS)}")
    return TASKS[name]


@dataclass(eq=False)
class Examples:
    """N examples of one split, in file order.

    Attributes:
        task: the task, or the name of one of :data:`TASKS` (becomes the task).
        split: name of the split, such as "train".
        texts: N first (or only) texts.
        text_pairs: N second texts; None for a task with one text column.
        labels: (N,) int64 class ids or float32 scores; None where there are none (test splits).
        ids: (N,) int64 numbers of the examples, which submission files carry; None becomes 0 … N-1.

    Raises:
        DataError: no examples, lengths that differ, a text that is none or that UTF-8 cannot hold, a label outside
            the task's classes or range, or a number that is negative or comes twice; "texts[2]" counts from 0.
    """

    task: Task
    split: str
    texts: list[str]
    text_pairs: list[str] | None = None
    labels: np.ndarray | None = None
    ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.task = get_task(self.task)
        where = f"split {self.split!r} of {self.task.name}"
        self.texts = _checked_texts(f"{where}: texts", self.texts)
        if not self.texts:
            raise DataError(f"{where} has no examples")
        if (self.text_pairs is not None) != (len(self.task.text_columns) == 2):
            given = "is None" if self.text_pairs is None else "is given"
            raise DataError(f"{where}: text_pairs {given}; the task's texts are {self.task.text_columns}")
        if self.text_pairs is not None:
            self.text_pairs = _checked_texts(f"{where}: text_pairs", self.text_pairs)
            _check_length(f"{where}: text_pairs", self.text_pairs, len(self.texts), "texts")
        if self.labels is not None:
            self.labels = checked_labels(self.task, f"{where}: labels", self.labels, len(self.texts), "texts")
        ids = np.arange(len(self.texts)) if self.ids is None else self.ids
        self.ids = checked_ids(f"{where}: ids", ids, len(self.texts), "texts")

    def __len__(self) -> int:
        return len(self.texts)


def _checked_texts(where: str, texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise DataError(f"{where} is a {type(texts).__name__}; it takes a sequence of N texts")
    texts = [text if type(text) is str or not isinstance(text, str) else str(text) for text in texts]
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not _is_utf8(text):
            raise DataError(f"{where}[{i}] is {brief(text)}; it takes text that UTF-8 can hold")
    return texts


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON may hold; tokenizers cannot take it
        return False
    return True


def _check_length(where: str, values: Sequence, length: int, other: str) -> None:
    if len(values) != length:
        raise DataError(f"{where} has {len(values)} entries; {other} has {length}")


def _vector(where: str, values, length: int, other: str) -> np.ndarray:
    """Values as an (N,) array, of objects where NumPy would change them: [0, True], [0, "1"], [0, 2**63]."""
    if not isinstance(values, np.ndarray):
        try:
            kinds, array = set(map(type, values)), np.asarray(values)
            is_kept = len(kinds) == 1 and (kinds != {int} or array.dtype.kind in "iu")
            values = array if is_kept else np.asarray(values, dtype=object)
        except (TypeError, ValueError):  # no sequence, or a ragged one
            values = np.array(values, dtype=object)
    if values.ndim != 1:
        raise DataError(f"{where} has shape {values.shape}; it takes (N,)")
    _check_length(where, values, length, other)
    return values


def checked_labels(task: Task, where: str, labels, length: int, other: str) -> np.ndarray:
    """Labels as (N,) int64 class ids or float32 scores.

    Raises:
        DataError: another shape, or a label outside the task's classes or range; it begins with ``where``.
    """
    labels = _vector(where, labels, length, other)
    if (bad := _first_bad_label(task, labels)) is not None:
        raise DataError(f"{where}[{bad}] is {brief(labels.tolist()[bad])}; {_label_domain(task)}")
    return labels.astype(np.float32 if task.is_regression else np.int64)


def checked_ids(where: str, ids, length: int, other: str) -> np.ndarray:
    """Numbers of examples as (N,) int64.

    Raises:
        DataError: another shape, a number that is no integer from 0 to 2**63 - 1 or comes twice; it begins with
            ``where``.
    """
    ids = _vector(where, ids, length, other)
    if (bad := _first_bad_id(ids)) is not None:
        raise DataError(f"{where}[{bad}] is {brief(ids.tolist()[bad])}; it takes {_ID_DOMAIN}")
    if (again := _first_repeated(ids)) is not None:
        raise DataError(f"{where}[{again[0]}] is {ids[again[0]]} again; it takes each number once")
    return ids.astype(np.int64)


_ID_DOMAIN = "an integer from 0 to 2**63 - 1"


def _first_false(good: np.ndarray) -> int | None:
    return None if good.all() else int(np.argmin(good))


def _is_number(value, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _first_bad_id(ids: np.ndarray) -> int | None:
    if ids.dtype.kind in "iu":
        return _first_false((ids >= 0) & (ids <= np.iinfo(np.int64).max))
    return _first_false(np.array([_is_number(n, (int, np.integer)) and 0 <= n < 2**63 for n in ids.tolist()]))


def _first_repeated(ids: np.ndarray) -> tuple[int, int] | None:
    """The first place whose number was there before, and where."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    again = _first_false(first[inverse] == np.arange(len(ids)))
    return None if again is None else (again, int(first[inverse[again]]))


def _first_bad_label(task: Task, labels: np.ndarray) -> int | None:
    low, high = task.label_range or (0, task.num_labels - 1)
    if labels.dtype.kind not in "iuf":
        kinds = (int, float, np.integer, np.floating)
        in_range = [_is_number(label, kinds) and low <= label <= high for label in labels.tolist()]
        whole = [ok and (task.is_regression or label == int(label)) for ok, label in zip(in_range, labels, strict=True)]
        return _first_false(np.array(whole))
    good = (labels >= low) & (labels <= high)  # NaN fails both
    if not task.is_regression:
        good &= labels == np.floor(labels)
    return _first_false(good)


def _label_domain(task: Task) -> str:
    if task.is_regression:
        return "{} takes scores from {:g} to {:g}".format(task.name, *task.label_range)
    return f"{task.name} takes class ids 0 to {task.num_labels - 1} ({', '.join(task.labels)})"


def load_split(task: str | Task, split: str, data_dir: str | Path | None = None) -> Examples:
    """Read one split of a task.

    Args:
        task: name of one of :data:`TASKS`.
        split: the hub's name: "train", or one of the task's ``eval_splits`` or ``test_splits``.
        data_dir: a folder which holds, in order of preference, ``<task>/<split>.parquet`` or the hub's
            ``<task>/<split>-00000-of-00001.parquet``, or the official download's ``<FOLDER>/train.tsv``,
            ``dev.tsv``, ``test.tsv`` (``dev_matched.tsv`` … for MNLI); it may also be that inner folder
            itself. None takes ``nyu-mll/glue`` from the Hugging Face hub. Of a :class:`lad_fast.tasks.CsvTask`
            the folder with ``<split>.csv``.

    Returns:
        The examples in file order; ``labels`` is None for a test split. ``ids`` are the hub's ``idx``; from
        TSV the index column of a test file, else the row number. The official QQP files hold some torn rows:
        these are left out, as in the hub's copy, with a warning that numbers their lines.

    Raises:
        ValueError: unknown task or split.
        DataError: the hub cannot be reached, a folder or file is missing, or a file is empty or damaged (not UTF-8,
            a column too many or twice, a cell without a value, a label outside the task's, an example's number
            twice …); the message names the file and, where there is one, the 1-based line (TSV) or row (Parquet),
            and what it takes.
    """
    task = get_task(task)
    known = ("train", *task.eval_splits, *task.test_splits)
    if split not in known:
        raise ValueError(f"split is {split!r}; {task.name} has {', '.join(known)}")
    return task.load(split, data_dir)


def _load_glue(task: Task, split: str, data_dir: str | Path | None) -> Examples:
    if data_dir is None:
        return _load_from_hub(task, split)
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(f"data_dir is {root}, not a folder; it takes one with Parquet or official TSV files")
    tsv_name = re.sub("^validation", "dev", split) + ".tsv"
    for folder in dict.fromkeys((root / task.name, root / (task.tsv_folder or task.name), root)):
        # lexists: what stands in a file's place is told, and another file never read in its stead.
        if os.path.lexists(path := folder / f"{split}.parquet"):
            return _load_parquet(task, split, [path])
        if shards := _find_shards(folder, split):
            return _load_parquet(task, split, shards)
        if task.tsv_text_columns and os.path.lexists(path := folder / tsv_name):
            return _load_tsv(task, split, path)
    looked_for = [f"{task.name}/{split}.parquet", f"{task.name}/{split}-00000-of-00001.parquet"]
    if task.tsv_text_columns:
        looked_for.append(f"{task.tsv_folder}/{tsv_name}")
    raise DataError(
        f"data_dir {root} has no split {split!r} of {task.name}; looked for {', '.join(looked_for)},"
        " also without the folder"
    )


def _load_from_hub(task: Task, split: str) -> Examples:
    source = f"nyu-mll/glue, {task.name}, {split}"
    remedy = "give --data-dir (data_dir) a folder with the Parquet or official TSV files"
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source}: the datasets library is not installed; pip install 'lad_fast[glue]', or {remedy}"
        ) from error
    try:
        table = datasets.load_dataset("nyu-mll/glue", task.name, split=split).with_format("arrow")[:]
    except Exception as error:  # offline, proxy, hub and cache trouble come as many unrelated types
        raise DataError(f"{source} cannot be loaded ({_first_line(error)}); when offline, {remedy}") from error
    return _from_tables(task, split, [(source, table)])


def _find_shards(folder: Path, split: str) -> list[Path]:
    """The files ``<split>-<number>-of-<total>.parquet`` by number; older hubs append a digest."""
    found = {}
    for path in sorted(folder.glob(f"{split}-*-of-*.parquet")):
        if match := re.fullmatch(rf"{split}-(\d+)-of-(\d+)(-\w+)?\.parquet", path.name):
            found[path] = (int(match[1]), match[2])
    if not found:
        return []
    numbers, totals = zip(*found.values(), strict=True)
    if len(set(totals)) > 1:
        raise DataError(f"{folder} has files {split}-* of {totals[0]} and of {max(totals)}; it takes one set")
    total, files = int(totals[0]), f"{split}-*-of-{totals[0]}.parquet"
    if len(found) != total:
        raise DataError(f"{folder} has {len(found)} of {total} files {files}")
    if missing := set(range(total)) - set(numbers):
        raise DataError(f"{folder} lacks file {min(missing)} of {files}")
    return sorted(found, key=lambda path: found[path][0])


def _check_is_file(path: Path) -> None:
    """Raises a DataError for a folder, and for a pipe or a device, whose end would never come."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; it takes a file")
    if not path.is_file():
        raise DataError(f"{path} is no regular file; it takes a file")


def _load_parquet(task: Task, split: str, paths: list[Path]) -> Examples:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{paths[0]}: reading Parquet needs pyarrow; pip install 'lad_fast[glue]'") from error
    tables = []
    for path in paths:
        _check_is_file(path)
        try:
            # ParquetFile rather than read_table, which would take a parent folder "a=b" for a column.
            with ParquetFile(path, page_checksum_verification=True) as file:
                tables.append((path, file.read()))
        except Exception as error:  # a damaged file raises anything from OSError to UnicodeDecodeError
            raise DataError(f"{path} cannot be read as Parquet: {_first_line(error)}") from error
    return _from_tables(task, split, tables)


def _from_tables(task: Task, split: str, tables: list) -> Examples:
    """Examples from (name, Arrow table) pairs in the hub's columns."""
    is_test = split in task.test_splits
    texts: list[list[str]] = [[] for _ in task.text_columns]
    labels, ids = [], []
    for source, table in tables:
        takes = dict.fromkeys(task.text_columns, "it takes text")
        takes |= {} if is_test else {"label": _label_domain(task)}
        takes |= {"idx": f"it takes {_ID_DOMAIN}"} if "idx" in table.column_names else {}
        for name in takes:
            if (count := table.column_names.count(name)) == 0:
                raise DataError(f"{source} lacks column {name!r}; it has {brief(table.column_names)}")
            if count > 1:
                raise DataError(f"{source} has {count} columns {name!r}; it takes one")
        if not table.num_rows:
            raise DataError(f"{source} has no rows; it takes at least one")
        for name, what in takes.items():
            if table[name].null_count:
                row = table[name].is_null().to_pylist().index(True)
                raise DataError(f"{source}, row {row + 1}: column {name!r} is empty; {what}")
        for name, column in zip(task.text_columns, texts, strict=True):
            column.extend(_text_column(source, name, table[name]))
        if not is_test:
            values = table["label"].to_numpy()
            if values.dtype.kind not in ("iuf" if task.is_regression else "iu"):
                kind = str(table["label"].type)[:100]
                raise DataError(f"{source}, row 1: column 'label' is {kind}; {_label_domain(task)}")
            if (bad := _first_bad_label(task, values)) is not None:
                raise DataError(f"{source}, row {bad + 1}: label {values[bad]}; {_label_domain(task)}")
            labels.append(values)
        if "idx" in takes:
            values = table["idx"].to_numpy()
            if values.dtype.kind not in "iu":
                raise DataError(f"{source}, row 1: column 'idx' is {table['idx'].type}; {takes['idx']}")
            if (bad := _first_bad_id(values)) is not None:
                raise DataError(f"{source}, row {bad + 1}: idx {values[bad]}; {takes['idx']}")
            ids.append(values.astype(np.int64))
        else:
            ids.append(np.arange(table.num_rows) + sum(map(len, ids)))
    all_ids = np.concatenate(ids)
    if (again := _first_repeated(all_ids)) is not None:
        (source, row), (source_before, row_before) = (_place(tables, number) for number in again)
        before = f"row {row_before}" if source_before == source else f"{source_before}, row {row_before}"
        raise DataError(
            f"{source}, row {row}: idx {all_ids[again[0]]} again; it takes each number once, and {before} has it"
        )
    return Examples(
        task=task,
        split=split,
        texts=texts[0],
        text_pairs=texts[1] if len(texts) == 2 else None,
        labels=None if is_test else np.concatenate(labels),
        ids=all_ids,
    )


def _text_column(source, name: str, column) -> list[str]:
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        for row, cell in enumerate(column, start=1):
            try:
                cell.as_py()
            except UnicodeDecodeError as error:
                reason = f"is not UTF-8 ({error.reason}); it takes text"
                raise DataError(f"{source}, row {row}: column {name!r} {reason}") from error
    if not isinstance(values[0], str):
        raise DataError(f"{source}, row 1: column {name!r} holds {str(column.type)[:100]}; it takes text")
    return values


def _place(tables: list, number: int) -> tuple[object, int]:
    """The source and 1-based row of an example by its 0-based number among all tables'."""
    for source, table in tables:
        if number < table.num_rows:
            return source, number + 1
        number -= table.num_rows
    raise IndexError(number)


def read_text(path: Path) -> str:
    """What a text file holds, its line ends as they are.

    Raises:
        DataError: no file, or not UTF-8; it names the line.
    """
    _check_is_file(path)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason}); it takes text in UTF-8") from error
    if "\0" in text:  # UTF-16 without a mark, or a hole that a crash left: no text file holds one
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line}: a NUL character; it takes text in UTF-8")
    return text


def _read_lines(path: Path) -> list[str]:
    text = read_text(path)
    if not text.strip("\r\n"):
        return []
    # Only \n and \r\n end a row: the texts hold characters which str.splitlines and the csv module break at.
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _load_tsv(task: Task, split: str, path: Path) -> Examples:
    is_test = split in task.test_splits
    lines = _read_lines(path)
    if task.name == "cola" and not is_test:
        header, first = ["source", "label", "original", "sentence"], 0
    else:
        header, first = (lines[0].split("\t") if lines else []), 1
    if len(lines) <= first:
        raise DataError(f"{path} has no examples; it takes {'a header and ' if first else ''}at least one row")
    where = {name: i for i, name in enumerate(header)}
    index = [name for name in ("index", "id") if name in where][:1] if is_test else []
    for name in (*task.tsv_text_columns, *([] if is_test else [task.tsv_label_column]), *index):
        if name not in where:
            raise DataError(f"{path}, line 1: no column {name!r} in the header; it has {brief(header)}")
        if (count := header.count(name)) > 1:
            raise DataError(f"{path}, line 1: {count} columns {name!r} in the header; it takes one")
    parse = label_parser(task)
    takes = task.written_labels
    texts: list[list[str]] = [[] for _ in task.tsv_text_columns]
    labels, ids, numbers, torn = [], [], [], []
    for number, line in enumerate(lines[first:], start=first + 1):
        row = line.split("\t")
        if len(row) != len(header):
            if task.name == "qqp":
                torn.append(number)
                continue
            raise DataError(f"{path}, line {number}: {len(row)} columns; it takes {len(header)}")
        for name, column in zip(task.tsv_text_columns, texts, strict=True):
            column.append(row[where[name]])
        if not is_test:
            text = row[where[task.tsv_label_column]]
            if (label := parse(text)) is None:
                raise DataError(f"{path}, line {number}: label {brief(text)}; {task.name} takes {takes}")
            labels.append(label)
        if not index:
            ids.append(number - first - 1)
        elif re.fullmatch("[0-9]{1,19}", text := row[where[index[0]]]) and int(text) < 2**63:
            ids.append(int(text))
        else:
            raise DataError(f"{path}, line {number}: index {brief(text)}; it takes {_ID_DOMAIN}")
        numbers.append(number)
    if not ids:
        raise DataError(f"{path}, line {first + 1}: no row has the header's {len(header)} columns")
    if (again := _first_repeated(np.array(ids))) is not None:
        line, before = (numbers[i] for i in again)
        raise DataError(
            f"{path}, line {line}: index {ids[again[0]]} again; it takes each number once, and line {before} has it"
        )
    if torn:
        some = ", ".join(map(str, torn[:30])) + (" …" if len(torn) > 30 else "")
        message = f"{path}: left out {len(torn)} rows that do not have {len(header)} columns: lines {some}"
        warnings.warn(message, stacklevel=3)
    return Examples(
        task=task,
        split=split,
        texts=texts[0],
        text_pairs=texts[1] if len(texts) == 2 else None,
        labels=None if is_test else np.array(labels),
        ids=np.array(ids, dtype=np.int64),
    )


def label_parser(task: Task) -> Callable[[str], float | int | None]:
    """What turns an official file's label into a class id or a score, and anything else into None."""
    if not task.is_regression:
        return {text: i for i, text in enumerate(task.label_texts)}.get
    low, high = task.label_range

    def parse(text: str) -> float | None:
        # Not all that float takes: spaces, underscores, other alphabets' digits.
        if not re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?", text):
            return None
        return score if low <= (score := float(text)) <= high else None

    return parse


def predictions_from_logits(task: str | Task, logits: np.ndarray) -> np.ndarray:
    """Predictions from a model's outputs.

    Args:
        task: the task or its name.
        logits: (N, C) floats; (N, 1) or (N,) for regression.

    Returns:
        (N,) int64 class ids (the first of equal logits), or float32 scores clipped to the task's range.

    Raises:
        ValueError: another shape, or logits that are not finite (a model that diverged has no predictions).
    """
    task, logits = get_task(task), np.asarray(logits)
    if task.is_regression and logits.ndim == 1:
        logits = logits[:, None]
    if logits.ndim != 2 or logits.shape[1] != task.num_labels:
        raise ValueError(f"logits has shape {logits.shape}; {task.name} takes (N, {task.num_labels})")
    if not (finite := np.isfinite(logits)).all():
        raise ValueError(
            f"logits has {(~finite).sum()} of {logits.size} values not finite: the model diverged"
        )
    if task.is_regression:
        return np.clip(logits[:, 0], *task.label_range).astype(np.float32)
    return logits.argmax(axis=1)


def compute_metrics(task: str | Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's official metrics, as fractions (not percent).

    Args:
        task: the task or its name.
        predictions: (N,) class ids or scores.
        labels: (N,) class ids or scores.

    Returns:
        ``task.metrics`` by name. Where a metric is undefined it is 0.0, as scikit-learn's Matthews
        correlation is: correlations with constant predictions or labels (or of one example), and F1 of a
        class 1 that is neither there nor predicted.

    Raises:
        ValueError: shapes that differ or no examples; a prediction or label outside the task's classes or not
            finite.
        ImportError: scikit-learn or scipy is not installed.
    """
    task = get_task(task)
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if labels.ndim != 1 or predictions.shape != labels.shape or not len(labels):
        raise ValueError(f"predictions has shape {predictions.shape}, labels {labels.shape}; they take (N,)")
    for name, values in (("predictions", predictions), ("labels", labels)):
        _check_values(task, name, values)
    return {name: _METRIC_FUNCTIONS[name](labels, predictions) for name in task.metrics}


def check_metrics(task: Task) -> None:
    """Raises an ImportError where what the task's metrics need is not installed, before anything is computed."""
    needed = {"f1": "sklearn", "macro_f1": "sklearn", "matthews": "sklearn", "pearson": "scipy", "spearman": "scipy"}
    for name in dict.fromkeys(needed[metric] for metric in task.metrics if metric in needed):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"the scores {', '.join(task.metrics)} take {name}: pip install 'lad_fast[glue]' ({error})"
            ) from error


def confusion_matrix(task: Task, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Examples by label and prediction, both (N,) class ids: (C, C) int64, a row a label and a column a prediction."""
    size = task.num_labels
    return np.bincount(labels.astype(np.int64) * size + predictions, minlength=size**2).reshape(size, size)


def _check_values(task: Task, name: str, values: np.ndarray) -> None:
    if task.is_regression:
        bad = int(np.argmin(np.isfinite(values)))
        if not np.isfinite(values[bad]):
            raise ValueError(f"{name}[{bad}] is {values[bad]}; it takes finite scores")
    elif (bad := _first_bad_label(task, values)) is not None:
        raise ValueError(f"{name}[{bad}] is {values[bad]}; {_label_domain(task)}")


def _f1(labels: np.ndarray, predictions: np.ndarray, average: str = "binary") -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average=average, zero_division=0.0))


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlation(labels: np.ndarray, predictions: np.ndarray) -> float:
        from scipy import stats

        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            correlate = getattr(stats, name)
            return float(correlate(labels.astype(np.float64), predictions.astype(np.float64)).statistic)

    return correlation


_METRIC_FUNCTIONS = {
    "accuracy": lambda labels, predictions: float((labels == predictions).mean()),
    "f1": _f1,
    "macro_f1": functools.partial(_f1, average="macro"),
    "matthews": _matthews,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}


def write_submission(
    task: str | Task, split: str, ids: np.ndarray, predictions: np.ndarray, folder: str | Path
) -> Path:
    """Write one file in the form which https://gluebenchmark.com takes, or of a task of CSV files as CSV.

    The file has the header ``index`` and ``prediction`` and one row an example, by ascending index: class names
    for MNLI, QNLI, RTE and CSV files, scores clipped to the range (three decimals) for STS-B, class ids for the rest.

    Args:
        task: the task or its name.
        split: one of the task's ``test_splits``.
        ids: (N,) integers, the examples' numbers, each once, in any order.
        predictions: (N,) class ids or scores in the order of ``ids``.
        folder: where the file goes; made if absent.

    Returns:
        The file's path: ``folder`` / ``task.submission_files[split]``.

    Raises:
        ValueError: a split without a submission file, shapes that differ, an id twice, or a prediction
            outside the classes or not finite.
    """
    task = get_task(task)
    if split not in task.submission_files:
        known = ", ".join(task.submission_files) or "no split"
        raise ValueError(f"split is {split!r}; {task.name} has submission files for {known}")
    ids, predictions = np.asarray(ids), np.asarray(predictions)
    if ids.ndim != 1 or ids.shape != predictions.shape or not len(ids):
        raise ValueError(f"ids has shape {ids.shape}, predictions {predictions.shape}; they take (N,)")
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        raise ValueError(f"ids holds {unique[counts > 1][0]} more than once; it takes every example once")
    _check_values(task, "predictions", predictions)
    if task.is_regression:
        written = [task.score_format.format(score) for score in np.clip(predictions, *task.label_range)]
    else:
        written = [task.label_texts[int(label)] for label in predictions]
    path = Path(folder) / task.submission_files[split]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t", lineterminator="\n")
        writer.writerow(("index", "prediction"))
        writer.writerows((ids[i], written[i]) for i in np.argsort(ids))
    return path

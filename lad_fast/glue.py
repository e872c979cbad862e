"""The nine GLUE tasks: examples from the hub, Parquet or official TSV files, metrics and submission files."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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

METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")


class DataError(ValueError):
    """Data is missing or damaged; the message names the file and, where there is one, the line or row."""


@dataclass(frozen=True)
class Task:
    """A text classification task, or a regression task (no labels, but a range of scores).

    Attributes:
        name: lower-case name, also the hub's configuration and the Parquet folder.
        text_columns: the hub's one or two text columns.
        labels: class names by class id; empty for regression.
        metrics: what :func:`compute_metrics` returns, some of "accuracy", "f1" (of class 1), "matthews",
            "pearson" and "spearman".
        best_metric: the one of ``metrics`` that selects the best checkpoint.
        eval_splits: labelled splits to evaluate on.
        test_splits: splits without labels to predict.
        submission_files: official file name of each test split.
        label_range: lowest and highest score of a regression task.
        tsv_folder: folder name of the official download; "" where there is none.
        tsv_text_columns, tsv_label_column: column names in the official TSV files.
        tsv_label_names: whether official files write class names rather than class ids.
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

    def __post_init__(self) -> None:
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


def _glue(name: str, folder: str, text_columns: Sequence[str], **changes) -> Task:
    changes.setdefault("tsv_text_columns", tuple(text_columns))
    changes.setdefault("submission_files", {"test": f"{folder}.tsv"})
    changes["submission_files"] = MappingProxyType(changes["submission_files"])
    return Task(name=name, text_columns=tuple(text_columns), tsv_folder=folder, **changes)


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

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
        DataError: no examples, lengths that differ, or a label outside the task's classes or range.
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
        if not self.texts:
            raise DataError(f"{where} has no examples")
        if (self.text_pairs is not None) != (len(self.task.text_columns) == 2):
            given = "is None" if self.text_pairs is None else "is given"
            raise DataError(f"{where}: text_pairs {given}; the task's texts are {self.task.text_columns}")
        self.ids = np.arange(len(self.texts)) if self.ids is None else np.asarray(self.ids, dtype=np.int64)
        for name in ("text_pairs", "labels", "ids"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.texts):
                raise DataError(f"{where}: {name} has {len(value)} entries; texts has {len(self.texts)}")
        if self.labels is not None:
            self.labels = np.asarray(self.labels)
            if (bad := _first_bad_label(self.task, self.labels)) is not None:
                raise DataError(f"{where}: labels[{bad}] is {self.labels[bad]}; {_label_domain(self.task)}")
            self.labels = self.labels.astype(np.float32 if self.task.is_regression else np.int64)

    def __len__(self) -> int:
        return len(self.texts)


def _first_bad_label(task: Task, labels: np.ndarray) -> int | None:
    low, high = task.label_range or (0, task.num_labels - 1)
    good = (labels >= low) & (labels <= high)  # NaN fails both
    if not task.is_regression:
        good &= labels == np.floor(labels)
    return None if good.all() else int(np.argmin(good))


def _label_domain(task: Task) -> str:
    if task.is_regression:
        return "{} takes scores from {:g} to {:g}".format(task.name, *task.label_range)
    return f"{task.name} takes class ids 0 to {task.num_labels - 1} ({', '.join(task.labels)})"


def load_split(task: str | Task, split: str, data_dir: str | Path | None = None) -> Examples:
    """Read one split of a GLUE task.

    Args:
        task: name of one of :data:`TASKS`.
        split: the hub's name: "train", or one of the task's ``eval_splits`` or ``test_splits``.
        data_dir: a folder which holds, in order of preference, ``<task>/<split>.parquet`` or the hub's
            ``<task>/<split>-00000-of-00001.parquet``, or the official download's ``<FOLDER>/train.tsv``,
            ``dev.tsv``, ``test.tsv`` (``dev_matched.tsv`` … for MNLI); it may also be that inner folder
            itself. None takes ``nyu-mll/glue`` from the Hugging Face hub.

    Returns:
        The examples in file order; ``labels`` is None for a test split. ``ids`` are the hub's ``idx``; from
        TSV the index column of a test file, else the row number. The official QQP files hold some torn rows:
        these are left out, as in the hub's copy, with a warning that numbers their lines.

    Raises:
        ValueError: unknown task or split.
        DataError: the hub cannot be reached, a folder or file is missing, or a file is empty or damaged; the
            message names the file and, where there is one, the 1-based line (TSV) or row (Parquet).
    """
    task = get_task(task)
    known = ("train", *task.eval_splits, *task.test_splits)
    if split not in known:
        raise ValueError(f"split is {split!r}; {task.name} has {', '.join(known)}")
    if data_dir is None:
        return _load_from_hub(task, split)
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(f"data_dir is {root}, not a folder; it takes one with Parquet or official TSV files")
    tsv_name = re.sub("^validation", "dev", split) + ".tsv"
    for folder in dict.fromkeys((root / task.name, root / (task.tsv_folder or task.name), root)):
        if (path := folder / f"{split}.parquet").is_file():
            return _load_parquet(task, split, [path])
        if shards := sorted(folder.glob(f"{split}-*-of-*.parquet")):
            return _load_parquet(task, split, shards)
        if task.tsv_text_columns and (path := folder / tsv_name).is_file():
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{source} cannot be loaded ({reason}); when offline, {remedy}") from error
    return _from_tables(task, split, [(source, table)])


def _load_parquet(task: Task, split: str, paths: list[Path]) -> Examples:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{paths[0]}: reading Parquet needs pyarrow; pip install 'lad_fast[glue]'") from error
    shards = re.search(r"-of-(\d+)\.parquet$", paths[0].name)
    if shards and len(paths) != int(shards[1]):
        raise DataError(f"{paths[0].parent} has {len(paths)} of {int(shards[1])} files {split}-*{shards[0]}")
    tables = []
    for path in paths:
        try:
            # ParquetFile rather than read_table, which would take a parent folder "a=b" for a column.
            with ParquetFile(path) as file:
                tables.append((path, file.read()))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    return _from_tables(task, split, tables)


def _from_tables(task: Task, split: str, tables: list) -> Examples:
    """Examples from (name, Arrow table) pairs in the hub's columns."""
    is_test = split in task.test_splits
    texts: list[list[str]] = [[] for _ in task.text_columns]
    labels, ids = [], []
    for source, table in tables:
        required = task.text_columns if is_test else (*task.text_columns, "label")
        if missing := [name for name in required if name not in table.column_names]:
            raise DataError(f"{source} lacks column {missing[0]!r}; it has {table.column_names}")
        if not table.num_rows:
            raise DataError(f"{source} has no rows")
        for name in (*required, *({"idx"} & set(table.column_names))):
            if table[name].null_count:
                row = table[name].is_null().to_pylist().index(True)
                raise DataError(f"{source}, row {row + 1}: column {name!r} is empty")
        for name, column in zip(task.text_columns, texts, strict=True):
            values = table[name].to_pylist()
            if not isinstance(values[0], str):
                raise DataError(f"{source}: column {name!r} holds {table[name].type}; it takes text")
            column.extend(values)
        if not is_test:
            values = table["label"].to_numpy()
            if values.dtype.kind not in ("iuf" if task.is_regression else "iu"):
                raise DataError(f"{source}: column 'label' is {table['label'].type}; {_label_domain(task)}")
            if (bad := _first_bad_label(task, values)) is not None:
                raise DataError(f"{source}, row {bad + 1}: label {values[bad]}; {_label_domain(task)}")
            labels.append(values)
        has_ids = "idx" in table.column_names
        ids.append(table["idx"].to_numpy() if has_ids else np.arange(table.num_rows) + sum(map(len, ids)))
    return Examples(
        task=task,
        split=split,
        texts=texts[0],
        text_pairs=texts[1] if len(texts) == 2 else None,
        labels=None if is_test else np.concatenate(labels),
        ids=np.concatenate(ids),
    )


def _read_lines(path: Path) -> list[str]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error
    # Only \n and \r\n end a row: the texts hold characters which str.splitlines and the csv module break at.
    return [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")] if text.strip("\r\n") else []


def _load_tsv(task: Task, split: str, path: Path) -> Examples:
    is_test = split in task.test_splits
    lines = _read_lines(path)
    if task.name == "cola" and not is_test:
        header, first = ["source", "label", "original", "sentence"], 0
    else:
        header, first = (lines[0].split("\t") if lines else []), 1
    if len(lines) <= first:
        raise DataError(f"{path} has no examples")
    where = {name: i for i, name in enumerate(header)}
    index_column = next((where[name] for name in ("index", "id") if name in where), None) if is_test else None
    required = task.tsv_text_columns if is_test else (*task.tsv_text_columns, task.tsv_label_column)
    if missing := [name for name in required if name not in where]:
        raise DataError(f"{path}, line 1: no column {missing[0]!r} in the header; it has {header}")
    parse = _label_parser(task)
    takes = ", ".join(task.label_texts) or "scores from {:g} to {:g}".format(*task.label_range)
    texts: list[list[str]] = [[] for _ in task.tsv_text_columns]
    labels, ids, torn = [], [], []
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
                raise DataError(f"{path}, line {number}: label {text!r}; {task.name} takes {takes}")
            labels.append(label)
        if index_column is None:
            ids.append(number - first - 1)
        else:
            try:
                ids.append(int(row[index_column]))
            except ValueError:
                text = row[index_column]
                raise DataError(f"{path}, line {number}: index {text!r}; it takes an integer") from None
    if not ids:
        raise DataError(f"{path}, line {first + 1}: no row has the header's {len(header)} columns")
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


def _label_parser(task: Task) -> Callable[[str], float | int | None]:
    """What turns an official file's label into a class id or a score, and anything else into None."""
    if not task.is_regression:
        return {text: i for i, text in enumerate(task.label_texts)}.get
    low, high = task.label_range

    def parse(text: str) -> float | None:
        try:
            score = float(text)
        except ValueError:
            return None
        return score if low <= score <= high else None

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


def _check_values(task: Task, name: str, values: np.ndarray) -> None:
    if task.is_regression:
        bad = int(np.argmin(np.isfinite(values)))
        if not np.isfinite(values[bad]):
            raise ValueError(f"{name}[{bad}] is {values[bad]}; it takes finite scores")
    elif (bad := _first_bad_label(task, values)) is not None:
        raise ValueError(f"{name}[{bad}] is {values[bad]}; {_label_domain(task)}")


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


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
    "matthews": _matthews,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}


def write_submission(
    task: str | Task, split: str, ids: np.ndarray, predictions: np.ndarray, folder: str | Path
) -> Path:
    """Write one file in the form which https://gluebenchmark.com takes.

    The file has the header ``index<TAB>prediction`` and one row an example, by ascending index: class names
    for MNLI, QNLI and RTE, scores with three decimals clipped to the range for STS-B, class ids for the rest.

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
        written = [f"{score:.3f}" for score in np.clip(predictions, *task.label_range)]
    else:
        written = [task.label_texts[int(label)] for label in predictions]
    path = Path(folder) / task.submission_files[split]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ["index\tprediction", *(f"{ids[i]}\t{written[i]}" for i in np.argsort(ids))]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")
    return path

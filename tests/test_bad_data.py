"""Broken data: every file either gives what was written in it or is refused by name and place; none hangs."""

import faulthandler
import gzip
import io
import os
import re
import signal
import warnings
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, PreTrainedTokenizerFast

from lad_fast.data import Batches, TokenizedSplit, tokenize
from lad_fast.glue import DataError, Examples, get_task, load_split
from lad_fast.models import save_checkpoint

SECONDS = 20  # no case takes one of its own: the rest is for a machine with other work
LONG = "x" * 10**6
SAME = None  # the outcome of a case that loads as it was written


class TooSlowError(BaseException):
    """No Exception, which a loader could take for a damaged file."""


@pytest.fixture(autouse=True)
def time_limit():
    def stop(*_):
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(SECONDS + 10, exit=True)  # for what waits in C, where no signal is served
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def content(examples: Examples):
    labels = None if examples.labels is None else examples.labels.tolist()
    return examples.texts, examples.text_pairs, labels, examples.ids.tolist()


def check(task, split, folder: Path, path: Path, outcome, written) -> None:
    """Loads what was written, or a refusal that names the file, matches ``outcome`` and is one short line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if outcome is SAME:
            assert content(load_split(task, split, folder)) == written
            return
        with pytest.raises(DataError) as error:
            load_split(task, split, folder)
    message = str(error.value)
    assert message.startswith(str(path)), message
    assert re.search(outcome, message), message
    assert len(message) < len(str(path)) + 400 and "\n" not in message, message[:2000]


# --- the official TSV files -------------------------------------------------------------------------------------------

TSV_FILES = {
    ("cola", "train"): "CoLA/train.tsv",
    ("sst2", "train"): "SST-2/train.tsv",
    ("stsb", "train"): "STS-B/train.tsv",
    ("mnli", "train"): "MNLI/train.tsv",
    ("rte", "train"): "RTE/train.tsv",
    ("wnli", "validation"): "WNLI/dev.tsv",
    ("sst2", "test"): "SST-2/test.tsv",
    ("rte", "test"): "RTE/test.tsv",
}
LABELS = {
    "cola": {"0": 0, "1": 1},
    "sst2": {"0": 0, "1": 1},
    "wnli": {"0": 0, "1": 1},
    "stsb": {"0.000": 0.0, "5": 5.0, "2.5": 2.5},
    "mnli": {"entailment": 0, "neutral": 1, "contradiction": 2},
    "rte": {"entailment": 0, "not_entailment": 1},
}


@dataclass
class Sheet:
    """A small official file, to be damaged: four rows, the last column a text in test files and CoLA's."""

    task: str
    split: str
    header: list[str] = field(init=False)
    rows: list[list[str]] = field(init=False)
    end: str = "\n"
    encoding: str = "utf-8"
    mark: bytes = b""
    last_end: bool = True

    def __post_init__(self) -> None:
        self.texts = ["sentence"] if self.task in ("cola", "sst2") else ["sentence1", "sentence2"]
        label = {"stsb": ["score"], "mnli": ["gold_label"]}.get(self.task, ["label"])
        texts = [[f"row {n} of {name}, Grüße" for name in self.texts] for n in range(4)]
        labels = (list(LABELS[self.task]) * 4)[:4]
        if self.task == "cola":
            self.header = ["source", "label", "original", "sentence"]
            self.rows = [["gj04", label, "*", *text] for text, label in zip(texts, labels, strict=True)]
        elif self.split == "test":
            self.header, self.rows = ["index", *self.texts], [[str(n + 7), *text] for n, text in enumerate(texts)]
        else:
            self.header = ["index", *self.texts, *label]
            self.rows = [[str(n), *text, label] for n, (text, label) in enumerate(zip(texts, labels, strict=True))]
        self.label = None if self.split == "test" else "label" if self.task == "cola" else label[0]

    @property
    def first(self) -> int:
        """Line of the first row."""
        return 1 if self.task == "cola" else 2

    def set(self, row: int, column: str, value: str) -> None:
        self.rows[row][self.header.index(column)] = value

    def data(self) -> bytes:
        lines = ["\t".join(row) for row in ([] if self.task == "cola" else [self.header]) + self.rows]
        text = self.end.join(lines) + (self.end if self.last_end else "")
        return self.mark + text.encode(self.encoding)

    def written(self):
        columns = [[row[self.header.index(name)] for row in self.rows] for name in self.texts]
        labels, ids = None, list(range(len(self.rows)))
        if self.split == "test":
            ids = [int(row[self.header.index("index")]) for row in self.rows]
        else:
            labels = [LABELS[self.task][row[self.header.index(self.label)]] for row in self.rows]
        return columns[0], columns[1] if len(columns) == 2 else None, labels, ids


def texts(*values):
    def damage(sheet):
        for row, value in enumerate(values):
            sheet.set(row, sheet.texts[0], value)

    return damage


def setting(**values):
    def damage(sheet):
        for name, value in values.items():
            setattr(sheet, name, value)

    return damage


def no_text(sheet):
    for row in range(4):
        for name in sheet.texts:
            sheet.set(row, name, "")


def one_row(sheet):
    del sheet.rows[1:]


def wider(sheet):
    sheet.header += [f"more{n}" for n in range(3000)]
    for row in sheet.rows:
        row += ["extra"] * 3000


def reordered(sheet):
    sheet.header.reverse()
    for row in sheet.rows:
        row.reverse()


LOADS = {
    "as it is": lambda sheet: None,
    "CRLF": setting(end="\r\n"),
    "byte-order mark": setting(mark=b"\xef\xbb\xbf"),
    "byte-order mark, CRLF": setting(mark=b"\xef\xbb\xbf", end="\r\n"),
    "no last newline": setting(last_end=False),
    "no last newline, CRLF": setting(last_end=False, end="\r\n"),
    "quotes": texts('"open', "'", '""', 'a "quoted" word"'),
    "empty text": texts("a", "", "b", "c"),
    "empty last text": texts("a", "b", "c", ""),
    "no text at all": no_text,
    "spaces": texts(" a", "b ", "   ", "\u00a0\u3000"),
    "controls": texts("a\x01b", "\x0b\x0c\x1c\x1d\x1e\x1f", "\x7f\x85\u2028\u2029", "\x1b[31m"),
    "carriage return within": texts("a\rb", "\ra", "c", "d"),
    "byte-order mark within": texts("a", "\ufeffb", "c\ufeff", "\ufeff"),
    "astral and bidirectional": texts("\U0001f600\U0010ffff", "\u202eabc\u202c", "e\u0301\u0301\u0301", "\ufffd\uffff"),
    "escapes": texts("\\t\\n", "\\", "%00", "\\x00"),
    "a million characters": texts(LONG, "b", "c" * 10**6, "d"),
    "one row": one_row,
    "one row, no last newline": lambda sheet: (one_row(sheet), setting(last_end=False)(sheet)),
}
LOADS_BY_HEADER = {"very wide": wider, "columns in another order": reordered}


def bytes_of(change):
    return lambda sheet: change(sheet.data())


def latin_1(sheet):
    data = sheet.data().split(b"\n")
    line = sheet.first + 2
    data[line - 1] = data[line - 1].replace("ü".encode(), "ü".encode("latin-1"))
    return b"\n".join(data)


def line(row, value):
    def damage(sheet):
        lines = sheet.data().split(b"\n")
        lines[sheet.first + row - 1] = value(lines[sheet.first + row - 1])
        return b"\n".join(lines)

    return damage


def third(text):  # the row which most damages hit
    return lambda sheet: rf"line {sheet.first + 2}: {text}"


REFUSED = {
    "empty file": (lambda sheet: b"", "no examples; it takes "),
    "byte-order mark alone": (lambda sheet: b"\xef\xbb\xbf", "no examples; it takes "),
    "newlines alone": (lambda sheet: b"\n\r\n\n", "no examples; it takes "),
    "latin-1": (latin_1, third("not UTF-8")),
    "UTF-16": (bytes_of(lambda data: data.decode().encode("utf-16")), "line 1: .*UTF-8"),
    "UTF-16, big-endian": (bytes_of(lambda data: b"\xfe\xff" + data.decode().encode("utf-16-be")), "line 1: .*UTF-8"),
    "UTF-16 without mark": (
        bytes_of(lambda data: re.sub("[üß]", "u", data.decode()).encode("utf-16-le")),
        "line 1: .*NUL.*UTF-8",
    ),
    "UTF-32": (bytes_of(lambda data: data.decode().encode("utf-32")), "line 1: .*UTF-8"),
    "surrogate": (line(2, lambda old: old.replace("ü".encode(), b"\xed\xa0\x80")), third("not UTF-8")),
    "overlong": (line(2, lambda old: old.replace("ü".encode(), b"\xc0\xaf")), third("not UTF-8")),
    "cut within a character": (
        bytes_of(lambda data: data[: data.rindex("ü".encode()) + 1]),
        lambda sheet: f"line {sheet.first + 3}: not UTF-8",
    ),
    "NUL": (line(2, lambda old: old.replace(b"row", b"r\0w")), third("a NUL character")),
    "hole of NULs at the end": (
        bytes_of(lambda data: data + bytes(4096)),
        lambda sheet: f"line {sheet.first + 4}: a NUL character",
    ),
    "short row": (line(2, lambda old: old[: old.rindex(b"\t")]), third(r"\d columns; it takes \d")),
    "long row": (line(2, lambda old: old + b"\tmore"), third(r"\d columns; it takes \d")),
    "very wide row": (line(2, lambda old: old + b"\t" * 10**6), third(r"10000\d\d columns; it takes \d")),
    "row cut short": (
        bytes_of(lambda data: data[: data.rindex(b"\t")]),
        lambda sheet: rf"line {sheet.first + 3}: \d columns; it takes \d",
    ),
    "newline in quotes": (
        line(2, lambda old: old.replace(b"row", b'"ro\nw"')),
        # a text in the last column breaks after a whole row: the rest is torn
        lambda sheet: rf"line ({sheet.first + 2}|{sheet.first + 3}): \d columns; it takes \d",
    ),
    "blank line": (line(2, lambda old: b"\n" + old), third(r"1 columns; it takes \d")),
    "blank lines at the end": (
        bytes_of(lambda data: data + b"\n\n"),
        lambda sheet: rf"line {sheet.first + 4}: 1 columns; it takes \d",
    ),
    "blank lines at the end, CRLF": (
        bytes_of(lambda data: data.replace(b"\n", b"\r\n") + b"\r\n"),
        lambda sheet: rf"line {sheet.first + 4}: 1 columns; it takes \d",
    ),
    "spaces for tabs": (bytes_of(lambda data: data.replace(b"\t", b"  ")), r"line 1: "),
    "commas for tabs": (bytes_of(lambda data: data.replace(b"\t", b",")), r"line 1: "),
    "carriage returns alone": (bytes_of(lambda data: data.replace(b"\n", b"\r")), "line 1: |no examples"),
    "gzip": (lambda sheet: gzip.compress(sheet.data()), "line 1: not UTF-8"),
    "JSON": (lambda sheet: b'{"sentence": "a", "label": 1}\n', "line 1: |no examples"),
}


def drop(column):
    def damage(sheet):
        at = sheet.header.index(sheet.label if column == "label" else sheet.texts[-1])
        for row in [sheet.header, *sheet.rows]:
            del row[at]
        return sheet.data()

    return damage


def twice(column):
    def damage(sheet):
        at = sheet.header.index(sheet.label if column == "label" else sheet.texts[-1])
        sheet.header.append(sheet.header[at])
        for row in sheet.rows:
            row.append("1")
        return sheet.data()

    return damage


REFUSED_HEADERS = {
    "header alone": (lambda sheet: sheet.data().split(b"\n")[0] + b"\n", "no examples; it takes "),
    "no header": (lambda sheet: sheet.data().split(b"\n", 1)[1], "line 1: no column 'sentence1?'"),
    "no text column": (drop("text"), "line 1: no column 'sentence2?' in the header"),
    "text column twice": (twice("text"), "line 1: 2 columns 'sentence2?' in the header; it takes one"),
    "capital letters": (
        bytes_of(lambda data: data.replace(b"sentence", b"SENTENCE", 1)),
        "line 1: no column 'sentence1?' in the header",
    ),
    "very wide header": (
        lambda sheet: b"\t".join(b"column%d" % n for n in range(10**5)) + b"\n",
        "line 1: no column|no examples",
    ),
    "two byte-order marks": (
        lambda sheet: b"\xef\xbb\xbf" * 2 + sheet.data().replace(b"index\t", b"").replace(b"\n0\t", b"\n"),
        "line [12]: ",
    ),
}


def label(value):
    def damage(sheet):
        sheet.set(2, sheet.label, value)
        return sheet.data()

    return damage


BAD_LABELS = {
    "": None, "maybe": None, "-": None, "-1": None, "7": None, "1.0": {"stsb"}, " 1": None, "1 ": None,
    "nan": None, "NaN": None, "inf": None, "-inf": None, "Infinity": None, "1e999": None, "5.0001": None,
    "-0.0001": None, "None": None, "True": None, "\uff11": None, "0_1": None, "0x1": None, "1,5": None, "\u0663": None,
    "ENTAILMENT": None, "entailment ": None, LONG: None, "1" * 10**6: None,
}  # fmt: skip
OTHER_KIND = {"mnli": "0", "rte": "1"}  # ids where there are names, and elsewhere names
BAD_INDICES = [
    "", "x", "1.5", "nan", "1_0", "\uff11", " 3", "9" * 30, "9" * 5000, "-1", "0x1", LONG, "9223372036854775808"
]  # fmt: skip


def index_twice(sheet):
    sheet.rows[2][0] = sheet.rows[0][0]
    return sheet.data()


def tsv_cases():
    for (task, split), name in TSV_FILES.items():
        has_header, has_label = task != "cola", split != "test"

        def case(kind, damage, outcome, task=task, split=split, name=name):
            return pytest.param(task, split, name, damage, outcome, id=f"{name[:-4]}: {kind[:40]}")

        for kind, damage in (LOADS | (LOADS_BY_HEADER if has_header else {})).items():
            yield case(kind, damage, SAME)
        for kind, (damage, outcome) in (REFUSED | (REFUSED_HEADERS if has_header else {})).items():
            yield case(kind, damage, outcome)
        if has_label:
            for value, legal in BAD_LABELS.items():
                if task not in (legal or ()):
                    yield case(f"label {value!r}", label(value), third("label '.*; .* takes "))
            other = OTHER_KIND.get(task, "entailment")
            yield case("label of the other kind", label(other), third("label '.*; .* takes "))
            if has_header:
                yield case("no label column", drop("label"), "line 1: no column '.*' in the header")
                yield case("label column twice", twice("label"), "line 1: 2 columns '.*' in the header; it takes one")
        else:
            for value in BAD_INDICES:

                def index(sheet, value=value):
                    sheet.rows[2][0] = value
                    return sheet.data()

                yield case(f"index {value!r}", index, third("index '.*; it takes "))
            yield case("index twice", index_twice, third("index 7 again; it takes .* line 2"))


TSV_CASES = list(tsv_cases())


@pytest.mark.parametrize(("task", "split", "name", "damage", "outcome"), TSV_CASES)
def test_tsv(tmp_path, task, split, name, damage, outcome):
    sheet, path = Sheet(task, split), tmp_path / name
    path.parent.mkdir()
    data = damage(sheet)
    path.write_bytes(data if isinstance(data, bytes) else sheet.data())
    outcome = outcome(sheet) if callable(outcome) else outcome
    check(task, split, tmp_path, path, outcome, sheet.written() if outcome is SAME else None)


QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_that_the_task_leaves_out_are_counted(tmp_path, end):
    """QQP's official files hold torn rows; those alone are left out, and each is told."""
    rows = [f"{n}\t1\t2\tq{n}\tp{n}\t{n % 2}" for n in range(40)]
    torn = {3: "torn", 7: "", 8: '8\t1\t2\t"torn', 20: "20\t1\t2\ta\tb\t1\tmore"}
    for row, text in torn.items():
        rows[row] = text
    path = tmp_path / "QQP" / "train.tsv"
    path.parent.mkdir()
    path.write_bytes(end.join([QQP, *rows, ""]).encode())
    with pytest.warns(UserWarning, match=r"left out 4 rows .* 6 columns: lines 5, 9, 10, 22$") as caught:
        examples = load_split("qqp", "train", tmp_path)
    assert str(path) in str(caught[0].message) and len(caught) == 1
    kept = [n for n in range(40) if n not in torn]
    assert content(examples) == ([f"q{n}" for n in kept], [f"p{n}" for n in kept], [n % 2 for n in kept], kept)


def test_blank_lines_of_a_one_column_file_are_empty_texts(tmp_path):
    from lad_fast.glue import Task

    task = Task("own", ("text",), tsv_folder="own", tsv_text_columns=("text",))
    (tmp_path / "test.tsv").write_bytes(b"text\na\n\n\n")
    assert load_split(task, "test", tmp_path).texts == ["a", "", ""]


# --- Parquet ----------------------------------------------------------------------------------------------------------

PARQUET_TEXTS = {"sst2": ["sentence"], "rte": ["sentence1", "sentence2"], "stsb": ["sentence1", "sentence2"]}


def columns(task, rows=4):
    labels = [0.0, 5.0, 2.5, 3.75] if task == "stsb" else [0, 1, 1, 0]
    return {
        **{name: pa.array([f"row {n} of {name}, Grüße" for n in range(rows)]) for name in PARQUET_TEXTS[task]},
        "label": pa.array(labels[:rows]),
        "idx": pa.array(range(10, 10 + rows), pa.int32()),
    }


def written_in(task, table):
    values = {name: table[name].to_pylist() for name in table.column_names}
    first, *second = (values[name] for name in PARQUET_TEXTS[task])
    ids = values.get("idx", list(range(len(first))))
    return first, second[0] if second else None, values["label"], ids


def texts_are(*values, kind=None):
    return lambda task: columns(task) | {PARQUET_TEXTS[task][0]: pa.array(values, kind)}


def retyped(name, kind):
    def damage(task):
        table = columns(task)
        key = PARQUET_TEXTS[task][0] if name == "text" else name
        return table | {key: table[key].cast(kind)}

    return damage


def column_is(name, *values, kind=None):
    def damage(task):
        key = PARQUET_TEXTS[task][-1] if name == "text" else name
        return columns(task) | {key: pa.array(values, kind)}

    return damage


def without(name):
    return lambda task: {key: value for key, value in columns(task).items() if key != name}


def invalid_text(task):
    raw = pa.array([b"a", b"b", b"Gr\xfc\xdfe", b"d"])
    return columns(task) | {PARQUET_TEXTS[task][-1]: pa.Array.from_buffers(pa.string(), 4, raw.buffers())}


PARQUET_LOADS = {
    "as it is": columns,
    "large strings": retyped("text", pa.large_string()),
    "string views": retyped("text", pa.string_view()),
    "categories": lambda task: columns(task) | {
        PARQUET_TEXTS[task][0]: columns(task)[PARQUET_TEXTS[task][0]].dictionary_encode()
    },
    "no idx": without("idx"),
    "idx in another order": column_is("idx", 3, 0, 2**40, 1),
    "one row": lambda task: columns(task, 1),
    "more columns": lambda task: columns(task) | {f"more{n}": pa.nulls(4) for n in range(500)},
    "columns in another order": lambda task: dict(reversed(columns(task).items())),
    "empty texts": texts_are("", "", "", ""),
    "controls and NUL": texts_are("a\0b", "\t", "\n\r\n", "\x0b\x1c\u2028"),
    "byte-order marks": texts_are("\ufeffa", "\ufeff", "b\ufeff", "\ufffe"),
    "quotes": texts_are('"', "'", '""', '"a\tb"'),
    "a million characters": texts_are(LONG, "a", LONG, ""),
}  # fmt: skip
CLASS_LOADS = {f"labels as {kind}": retyped("label", kind) for kind in (pa.int8(), pa.uint8(), pa.int32(), pa.uint64())}
SCORE_LOADS = {f"scores as {kind}": retyped("label", kind) for kind in (pa.float32(), pa.float16())}
SCORE_LOADS["whole scores"] = column_is("label", 0, 5, 2, 3)
PARQUET_REFUSED = {
    "no text": (lambda task: without(PARQUET_TEXTS[task][-1])(task), "lacks column 'sentence2?'"),
    "no label": (without("label"), "lacks column 'label'"),
    "other columns, many": (lambda task: {f"c{n}": pa.array([1]) for n in range(5000)}, "lacks column 'sentence1?'"),
    "no rows": (lambda task: columns(task, 0), "no rows; it takes at least one"),
    "no columns": (lambda task: {}, "lacks column 'sentence1?'"),
    "null text": (column_is("text", "a", "b", None, "d"), "row 3: column 'sentence2?' is empty; it takes text"),
    "null label": (column_is("label", 0, 1, None, 1), "row 3: column 'label' is empty; .* takes "),
    "null idx": (column_is("idx", 0, 1, None, 1), "row 3: column 'idx' is empty; it takes "),
    "all null": (column_is("text", None, None, None, None), "row 1: column 'sentence2?' is empty"),
    "integer texts": (column_is("text", 1, 2, 3, 4), "row 1: column 'sentence2?' holds int64; it takes text"),
    "binary texts": (column_is("text", *[b"a"] * 4), "row 1: column 'sentence2?' holds binary; it takes text"),
    "lists of texts": (column_is("text", ["a"], [], ["c"], ["d"]), "column 'sentence2?' holds list.*; it takes text"),
    "structs": (column_is("text", *[{"a": "b"}] * 4), "column 'sentence2?' holds struct.*; it takes text"),
    "latin-1 in a text": (invalid_text, "row 3: column 'sentence2?' is not UTF-8"),
    "label too high": (column_is("label", 0, 1, 9, 1), "row 3: label 9; .* takes "),
    "label too low": (column_is("label", 0, 1, -1, 1), "row 3: label -1; .* takes "),
    "huge label": (column_is("label", 0, 1, 2**64 - 1, 1, kind=pa.uint64()), "row 3: label 18446744073709551615; "),
    "label as text": (
        column_is("label", *["entailment"] * 4), "row 1: column 'label' is string; .* takes (class ids|scores)"
    ),
    "labels as logical values": (column_is("label", True, False, True, False), "column 'label' is bool; .* takes "),
    "labels as decimals": (
        column_is("label", *[Decimal("1.0")] * 4), "column 'label' is decimal.*; .* takes "
    ),
    "labels as lists": (column_is("label", [0], [1], [1], [0]), "column 'label' is list.*; .* takes "),
    "NaN": (column_is("label", 0.0, 1.0, float("nan"), 1.0), "row 3: label nan|'label' is double; .* class ids"),
    "infinity": (column_is("label", 0.0, 1.0, float("inf"), 1.0), "row 3: label inf|'label' is double; .* class ids"),
    "idx twice": (column_is("idx", 4, 7, 4, 8), "row 3: idx 4 again; it takes each number once, and row 1 has it"),
    "idx as fractions": (column_is("idx", 0.0, 0.5, 1.0, 1.5), "column 'idx' is double; it takes an integer"),
    "idx as text": (column_is("idx", "0", "1", "2", "3"), "column 'idx' is string; it takes an integer"),
    "huge idx": (column_is("idx", 0, 1, 2**63, 3, kind=pa.uint64()), "row 3: idx 9223372036854775808; it takes "),
    "negative idx": (column_is("idx", 0, 1, -2, 3), "row 3: idx -2; it takes "),
}  # fmt: skip


def parquet_cases():
    for task in PARQUET_TEXTS:
        more = SCORE_LOADS if task == "stsb" else CLASS_LOADS
        for kind, damage in (PARQUET_LOADS | more).items():
            yield pytest.param(task, damage, SAME, id=f"{task}: {kind}")
        for kind, (damage, outcome) in PARQUET_REFUSED.items():
            yield pytest.param(task, damage, outcome, id=f"{task}: {kind}")


PARQUET_CASES = list(parquet_cases())


@pytest.mark.parametrize(("task", "damage", "outcome"), PARQUET_CASES)
def test_parquet(tmp_path, task, damage, outcome):
    path, table = tmp_path / task / "train.parquet", pa.table(damage(task))
    path.parent.mkdir()
    parquet.write_table(table, path)
    check(task, "train", tmp_path, path, outcome, None if outcome else written_in(task, table))


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
def test_parquet_in_any_compression_and_row_groups(tmp_path, compression):
    path, table = tmp_path / "train.parquet", pa.table(columns("rte"))
    parquet.write_table(table, path, compression=compression, row_group_size=1, data_page_version="2.0")
    check("rte", "train", tmp_path, path, SAME, written_in("rte", table))


def test_parquet_with_a_column_twice(tmp_path):
    path, given = tmp_path / "train.parquet", columns("sst2")
    names = [*given, "sentence"]
    parquet.write_table(pa.Table.from_arrays([*given.values(), given["sentence"]], names=names), path)
    check("sst2", "train", tmp_path, path, "2 columns 'sentence'; it takes one", None)


KINDS = [
    pa.nulls(4), pa.array([1, 0, 1, 0], pa.int8()), pa.array([1.0, 0, 1, 0]), pa.array([True] * 4),
    pa.array([1, 0, 1, 0]).dictionary_encode(), pa.array(["1", "0", "2", "3"]).dictionary_encode(),
    pa.array([b"1"] * 4), pa.array([b"1"] * 4, pa.binary(1)), pa.array([b"1"] * 4, pa.large_binary()),
    pa.array([Decimal(1)] * 4), pa.array([0, 1, 2, 3], pa.date32()), pa.array([0, 1, 2, 3], pa.timestamp("us", "UTC")),
    pa.array([0, 1, 2, 3], pa.time64("us")), pa.array([0, 1, 2, 3], pa.duration("ms")),
    pa.array([[1]] * 4), pa.array([[1]] * 4, pa.list_(pa.int8(), 1)), pa.array([{"a": 1}] * 4),
    pa.array([[("a", 1)]] * 4, pa.map_(pa.string(), pa.int8())), pa.array([[]] * 4, pa.list_(pa.string())),
]  # fmt: skip


@pytest.mark.parametrize("name", ["text", "label", "idx"])
@pytest.mark.parametrize("task", ["sst2", "stsb"])
@pytest.mark.parametrize("values", KINDS, ids=lambda values: str(values.type)[:20])
def test_columns_of_any_type(tmp_path, task, name, values):
    """Numbers where numbers are due, texts where texts: all else is refused with the column's name."""
    key, path = PARQUET_TEXTS[task][0] if name == "text" else name, tmp_path / "train.parquet"
    table = pa.table(columns(task) | {key: values})
    parquet.write_table(table, path)
    try:
        examples = load_split(task, "train", tmp_path)
    except DataError as error:
        assert str(error).startswith(str(path)) and re.search(rf"'{key}'|row [1-4]: {key} ", str(error)), error
        assert len(str(error)) < len(str(path)) + 300
    else:
        assert content(examples) == written_in(task, table)


@pytest.mark.parametrize("label", [None, pa.nulls(4), pa.array([-1] * 4), pa.array(["x"] * 4)], ids=str)
def test_labels_of_a_test_split_are_not_read(tmp_path, label):
    given = columns("rte") | ({} if label is None else {"label": label})
    if label is None:
        del given["label"]
    parquet.write_table(pa.table(given), tmp_path / "test.parquet")
    examples = load_split("rte", "test", tmp_path)
    assert examples.labels is None and examples.texts == given["sentence1"].to_pylist()


def parquet_bytes(**options) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns("rte")), buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("part", range(16))
def test_truncated_parquet(tmp_path, part):
    path, data = tmp_path / "train.parquet", parquet_bytes()
    path.write_bytes(data[: len(data) * part // 16])
    check("rte", "train", tmp_path, path, "cannot be read as Parquet: ", None)


@pytest.mark.parametrize("data", [b"PAR1" * 3, b"\0" * 1000, b"index\tsentence1\n", b"PAR1" + b"\xff" * 100 + b"PAR1"])
def test_other_bytes_for_parquet(tmp_path, data):
    (tmp_path / "train.parquet").write_bytes(data)
    check("rte", "train", tmp_path, tmp_path / "train.parquet", "cannot be read as Parquet: ", None)


def test_a_flipped_bit_in_a_page_with_a_checksum(tmp_path):
    path = tmp_path / "train.parquet"
    data = bytearray(parquet_bytes(compression="none", write_page_checksum=True, use_dictionary=False))
    data[data.index(b"row 2 of sentence2")] ^= 1
    path.write_bytes(data)
    check("rte", "train", tmp_path, path, "cannot be read as Parquet: .*CRC", None)


def test_a_schema_that_asks_for_a_pickle_runs_nothing(tmp_path):
    """Old Arrow unpickled extension types of a file's schema."""
    marker, path = tmp_path / "ran", tmp_path / "train.parquet"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    fields = [
        pa.field(name, value.type, metadata={
            "ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload
        })
        for name, value in columns("rte").items()
    ]  # fmt: skip
    table = pa.Table.from_arrays(list(columns("rte").values()), schema=pa.schema(fields))
    parquet.write_table(table, path)
    check("rte", "train", tmp_path, path, SAME, written_in("rte", table))
    assert not marker.exists()


def shards(folder, *names, size=2):
    for number, name in enumerate(names):
        given = columns("sst2", size) | {"idx": pa.array(range(number * size, number * size + size))}
        parquet.write_table(pa.table(given), folder / f"{name}.parquet")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00002"], "has 1 of 2 files train-"),
        (["train-00001-of-00001"], "lacks file 0 of train-"),
        (["train-00000-of-00002", "train-00000-of-00003"], "has files .* of 00002 and of 00003; it takes one set"),
        (["train-00000-of-00002", "train-00000-of-00002-again"], "lacks file 1 of train-"),
        (["train-00001-of-00003", "train-00002-of-00003", "train-00003-of-00003"], "lacks file 0 of train-"),
    ],
)
def test_wrong_shards(tmp_path, names, message):
    shards(tmp_path, *names)
    with pytest.raises(DataError, match=message) as error:
        load_split("sst2", "train", tmp_path)
    assert str(tmp_path) in str(error.value)


def test_shards_go_by_their_numbers(tmp_path):
    shards(tmp_path, *(f"train-{n}-of-11" for n in range(11)), size=1)
    (tmp_path / "train-extra-0-of-1.parquet").write_bytes(b"of another split")
    assert load_split("sst2", "train", tmp_path).ids.tolist() == list(range(11))


def test_an_idx_in_two_shards(tmp_path):
    shards(tmp_path, "train-00000-of-00002", "train-00001-of-00002")
    path = tmp_path / "train-00001-of-00002.parquet"
    parquet.write_table(pa.table(columns("sst2") | {"idx": pa.array([5, 6, 1, 8])}), path)
    check("sst2", "train", tmp_path, path, "row 3: idx 1 again; it takes each number once", None)


# --- what is no file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rte/train.parquet", "rte/train-00000-of-00001.parquet", "RTE/train.tsv"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link", "link to itself", "device"])
def test_no_file_in_a_files_place(tmp_path, name, kind):
    path = tmp_path / name
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "dangling link": "nowhere"}.get(kind, path))
    other = tmp_path / "RTE" / "train.tsv"  # must not be taken silently instead
    if other != path:
        other.parent.mkdir()
        other.write_bytes(Sheet("rte", "train").data())
    check("rte", "train", tmp_path, path, "is (a folder|no regular file); it takes a file", None)


# --- examples passed in memory ----------------------------------------------------------------------------------------

A, B = ["a", "b", "c"], ["d", "e", "f"]
BAD_EXAMPLES = {
    "one string for texts": (("sst2", "abc"), r"texts is a str; it takes a sequence of N texts"),
    "bytes for texts": (("sst2", b"abc"), r"texts is a bytes"),
    "None for texts": (("sst2", None), r"texts is a NoneType"),
    "None among texts": (("sst2", ["a", "b", None]), r"texts\[2\] is None; it takes text"),
    "numbers among texts": (("sst2", ["a", "b", 3]), r"texts\[2\] is 3; it takes text"),
    "NaN among texts": (("sst2", ["a", "b", float("nan")]), r"texts\[2\] is nan; it takes text"),
    "bytes among texts": (("sst2", ["a", "b", b"c"]), r"texts\[2\] is b'c'; it takes text"),
    "lists among texts": (("sst2", ["a", "b", [LONG]]), r"texts\[2\] is .*; it takes text"),
    "half a surrogate": (("sst2", ["a", "b", "\ud800"]), r"texts\[2\] is '\\ud800'; it takes text .*UTF-8"),
    "no texts": (("sst2", []), "has no examples"),
    "one string for pairs": (("rte", A, "abc"), r"text_pairs is a str"),
    "None among pairs": (("rte", A, ["d", None, "f"]), r"text_pairs\[1\] is None; it takes text"),
    "surrogate among pairs": (("rte", A, ["d", "e\udfff", "f"]), r"text_pairs\[1\] is 'e\\udfff'"),
    "fewer pairs": (("rte", A, B[:2]), "text_pairs has 2 entries; texts has 3"),
    "labels too high": (("sst2", A, None, [0, 1, 2]), r"labels\[2\] is 2; sst2 takes class ids"),
    "labels as text": (("rte", A, B, ["entailment"] * 3), r"labels\[0\] is .*entailment.*; rte takes class ids"),
    "None among labels": (("sst2", A, None, [0, None, 1]), r"labels\[1\] is None; sst2 takes class ids"),
    "text among labels": (("sst2", A, None, [0, "1", 1]), r"labels\[\d\] is .*; sst2 takes class ids"),
    "logical labels": (("sst2", A, None, [True, False, True]), r"labels\[0\] is True; sst2 takes class ids"),
    "complex labels": (("sst2", A, None, [0, 1j, 1]), r"labels\[\d\] is .*; sst2 takes class ids"),
    "huge labels": (("sst2", A, None, [0, 10**30, 1]), r"labels\[\d\] is .*; sst2 takes class ids"),
    "a column of labels": (("sst2", A, None, [[0], [1], [1]]), r"labels has shape \(3, 1\); it takes \(N,\)"),
    "one-hot labels": (("sst2", A, None, np.eye(3)), r"labels has shape \(3, 3\)"),
    "ragged labels": (("sst2", A, None, [[0], [1, 1], 0]), r"labels"),
    "a number for labels": (("sst2", A, None, 1), r"labels has shape \(\); it takes \(N,\)"),
    "NaN class": (("sst2", A, None, [0, float("nan"), 1]), r"labels\[1\] is nan"),
    "fraction for a class": (("sst2", A, None, [0, 0.5, 1]), r"labels\[1\] is 0.5"),
    "NaN score": (("stsb", A, B, [0, float("nan"), 1]), r"labels\[1\] is nan; stsb takes scores from 0 to 5"),
    "infinite score": (("stsb", A, B, [0, float("inf"), 1]), r"labels\[1\] is inf"),
    "score too high": (("stsb", A, B, [0, 5.1, 1]), r"labels\[1\] is 5.1"),
    "score too low": (("stsb", A, B, [0, -1e-9, 1]), r"labels\[1\] is -1e-09"),
    "text for a score": (("stsb", A, B, ["0", "1", "x"]), r"labels\[0\] is .*; stsb takes scores"),
    "ids twice": (("sst2", A, None, None, [4, 7, 4]), r"ids\[2\] is 4 again; it takes each number once"),
    "ids as fractions": (("sst2", A, None, None, [0, 0.5, 1]), r"ids\[\d\] is .*; it takes an integer"),
    "NaN id": (("sst2", A, None, None, [0, float("nan"), 1]), r"ids\[\d\] is .*; it takes an integer"),
    "ids as text": (("sst2", A, None, None, ["0", "1", "2"]), r"ids\[0\] is .*; it takes an integer"),
    "None among ids": (("sst2", A, None, None, [0, None, 2]), r"ids\[\d\] is .*; it takes an integer"),
    "huge ids": (("sst2", A, None, None, [0, 1, 2**63]), r"ids\[2\] is 9223372036854775808; it takes an integer"),
    "negative ids": (("sst2", A, None, None, [0, -1, 2]), r"ids\[1\] is -1; it takes an integer from 0"),
    "a column of ids": (("sst2", A, None, None, [[0], [1], [2]]), r"ids has shape \(3, 1\)"),
    "fewer ids": (("sst2", A, None, None, [0, 1]), "ids has 2 entries; texts has 3"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_EXAMPLES.values(), ids=BAD_EXAMPLES)
def test_bad_examples_in_memory(arguments, message):
    task, *rest = arguments
    with pytest.raises(DataError, match=message) as error:
        Examples(task, "train", *rest)
    assert f"split 'train' of {task}" in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("kind", [list, tuple, np.array, pa.array, iter], ids=lambda kind: kind.__name__)
def test_good_examples_of_many_kinds(kind):
    if kind is pa.array:
        import pandas

        kind = pandas.Series
    examples = Examples("sst2", "train", kind(A), labels=np.array([1.0, 0, 1]), ids=(5, 3, 4))
    assert content(examples) == (A, None, [1, 0, 1], [5, 3, 4])
    assert examples.labels.dtype == examples.ids.dtype == np.int64


def tokenizer(special=True, model=None):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate([*names, "a", "b"])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512)


@pytest.mark.parametrize(
    "text", [LONG, "a " * 500_000, "." * 10**5, "\u0301" * 10**6, "\0" * 10**6, " " * 10**6, "中" * 10**5]
)
def test_a_million_characters_are_cut_in_time(text):
    split = tokenize(Examples("rte", "train", [text, "a"], ["b", text], [0, 1]), tokenizer(), 16)
    assert len(split) == 2 and split.lengths.min() >= 3 and split.lengths.max() <= 16
    assert sum(len(batch["ids"]) for batch in Batches(split, 1, 0, shuffle=False)) == 2


@pytest.mark.parametrize("max_length", [4, 5, 6])
def test_texts_that_truncation_empties_keep_their_example(max_length):
    examples = Examples("rte", "train", ["", "a a a", "a"], ["b b b", "", "b"], [0, 1, 0])
    split = tokenize(examples, tokenizer(), max_length)
    assert len(split) == 3 and split.lengths.min() >= 3 and split.lengths.max() <= max_length


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u3000"])
def test_examples_without_a_token_are_named(text):
    with pytest.raises(DataError, match=r"split 'train' of sst2: example 1 .*has no tokens"):
        tokenize(Examples("sst2", "train", ["a", text], labels=[0, 1]), tokenizer(special=False), 8)


GOOD_SPLIT = {
    "input_ids": np.array([2, 4, 3, 2, 3], np.int32),
    "token_type_ids": None,
    "offsets": np.array([0, 3, 5]),
    "labels": np.array([0, 1]),
    "ids": np.array([0, 1]),
}
BAD_SPLITS = {
    "no example": ({"offsets": np.array([0])}, "offsets"),
    "no offsets": ({"offsets": np.array([], np.int64)}, "offsets"),
    "offsets fall": ({"offsets": np.array([0, 6, 5])}, r"offsets\[2\] is 5"),
    "example without tokens": ({"offsets": np.array([0, 5, 5])}, r"offsets\[2\] is 5"),
    "offsets start late": ({"offsets": np.array([1, 3, 5])}, "offsets"),
    "offsets end early": ({"offsets": np.array([0, 3, 4])}, "offsets"),
    "offsets end late": ({"offsets": np.array([0, 3, 9])}, "offsets"),
    "fractions": ({"offsets": np.array([0, 2.5, 5])}, "offsets"),
    "negative token": ({"input_ids": np.array([2, -4, 3, 2, 3])}, r"input_ids\[1\] is -4"),
    "fractional token": ({"input_ids": np.array([2, 4.5, 3, 2, 3])}, "input_ids"),
    "token matrix": ({"input_ids": np.ones((5, 1), int)}, "input_ids"),
    "fewer token types": ({"token_type_ids": np.zeros(4, int)}, "token_type_ids"),
    "label too high": ({"labels": np.array([0, 2])}, r"labels\[1\] is 2; sst2 takes class ids"),
    "NaN label": ({"labels": np.array([0, np.nan])}, r"labels\[1\] is nan"),
    "fewer labels": ({"labels": np.array([0])}, "labels has 1 entries; .* 2"),
    "fewer ids": ({"ids": np.array([0])}, "ids has 1 entries; .* 2"),
    "ids twice": ({"ids": np.array([3, 3])}, r"ids\[1\] is 3 again"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_SPLITS.values(), ids=BAD_SPLITS)
def test_bad_tokenised_splits(changes, message):
    TokenizedSplit(get_task("sst2"), "train", **GOOD_SPLIT)
    with pytest.raises(DataError, match=message) as error:
        TokenizedSplit(get_task("sst2"), "train", **GOOD_SPLIT | changes)
    assert "split 'train' of sst2" in str(error.value)


@pytest.mark.parametrize("changes", [value[0] for value in BAD_SPLITS.values() if "labels" not in value[0]])
def test_bad_arrays_in_the_cache_are_made_again(tmp_path, caplog, changes):
    examples = Examples("sst2", "train", ["a", ""], labels=[0, 1])
    good = tokenize(examples, tokenizer(), 8, tmp_path)
    if "ids" in changes:
        return  # not the cache's
    (path,) = tmp_path.iterdir()
    arrays = {name: value for name, value in (GOOD_SPLIT | changes).items() if value is not None}
    np.savez(path, **{name: arrays[name] for name in ("input_ids", "token_type_ids", "offsets") if name in arrays})
    again = tokenize(examples, tokenizer(), 8, tmp_path)
    assert "is damaged" in caplog.text
    assert again.input_ids.tolist() == good.input_ids.tolist() and again.offsets.tolist() == good.offsets.tolist()


def test_the_command_line_names_file_and_line(tmp_path, capsys):
    from lad_fast.cli import main

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])}
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 2}
    bert = BertForSequenceClassification(BertConfig(vocab_size=7, max_position_embeddings=128, **sizes))
    save_checkpoint(tmp_path / "model", bert, BertTokenizer(vocab=words))
    sheet = Sheet("rte", "train")
    sheet.set(2, "label", "maybe")
    (tmp_path / "train.tsv").write_bytes(sheet.data())
    flags = ["--model", str(tmp_path / "model"), "--data-dir", str(tmp_path), "--output-dir", str(tmp_path / "run")]
    assert main(["finetune", "--task", "rte", *flags]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{tmp_path}/train.tsv, line 4: label 'maybe'; rte takes entailment" in told


# --- by hypothesis ----------------------------------------------------------------------------------------------------

MANY = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(st.characters(exclude_characters="\t\n\r\0", exclude_categories=["Cs"]), max_size=30)
CLASS = st.sampled_from(["entailment", "not_entailment"])


@MANY
@given(
    rows=st.lists(st.tuples(TEXT, TEXT, CLASS), min_size=1, max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
    last=st.booleans(),
)
def test_any_text_comes_back_from_a_tsv(tmp_path, rows, end, mark, last):
    sheet = Sheet("rte", "train", end, mark=b"\xef\xbb\xbf" if mark else b"", last_end=last)
    sheet.rows = [[str(n), *row] for n, row in enumerate(rows)]
    (tmp_path / "train.tsv").write_bytes(sheet.data())
    check("rte", "train", tmp_path, tmp_path / "train.tsv", SAME, sheet.written())


def loads_all_or_names(path: Path, task, split, lines: int) -> None:
    """Whatever a file holds, it gives an example a line, or a refusal with its name."""
    try:
        examples = load_split(task, split, path.parent)
    except DataError as error:
        assert str(error).startswith(str(path)) and re.search(r"line [1-9]\d*: |no examples", str(error)), error
        assert len(str(error)) < len(str(path)) + 400
    else:
        assert len(examples) == lines


def num_lines(data: bytes) -> int:
    return data.count(b"\n") + (not data.endswith(b"\n"))


@MANY
@given(data=st.binary(max_size=200) | st.text("\t\n\r01ab\"'\ufeff", max_size=60).map(str.encode))
def test_any_bytes_for_a_tsv(tmp_path, data):
    for task, split, header in (("cola", "train", b""), ("sst2", "train", b"sentence\tlabel\n"), ("sst2", "test", b"")):
        (tmp_path / f"{split}.tsv").write_bytes(header + data)
        loads_all_or_names(tmp_path / f"{split}.tsv", task, split, num_lines(header + data) - (task != "cola"))


@MANY
@given(data=st.data())
def test_a_tsv_with_damaged_bytes(tmp_path, data):
    task, split = data.draw(st.sampled_from([case for case in TSV_FILES if case != ("wnli", "validation")]))
    content = bytearray(Sheet(task, split).data())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"\t", b"\n", b"\r\n", b"\0", b'"', b"\xff", b"1"])
        )
    (tmp_path / f"{split}.tsv").write_bytes(content)
    loads_all_or_names(tmp_path / f"{split}.tsv", task, split, num_lines(bytes(content)) - (task != "cola"))


NUMBERS = st.integers(-3, 3) | st.integers() | st.floats()
SCALARS = NUMBERS | st.none() | st.booleans() | st.text(max_size=5) | st.binary(max_size=5)


@MANY
@given(labels=st.lists(SCALARS, min_size=3, max_size=3), task=st.sampled_from(["sst2", "stsb"]))
def test_any_labels_in_memory(labels, task):
    pairs = B if task == "stsb" else None
    try:
        examples = Examples(task, "train", A, pairs, labels)
    except DataError as error:
        assert f"split 'train' of {task}: labels" in str(error)
    else:
        high = 5 if task == "stsb" else 1
        assert all(type(label) in (int, float) and 0 <= label <= high for label in labels)
        assert examples.labels.tolist() == [np.float32(label) if task == "stsb" else label for label in labels]


@MANY
@given(ids=st.lists(SCALARS, min_size=3, max_size=3))
def test_any_ids_in_memory(ids):
    try:
        examples = Examples("sst2", "train", A, ids=ids)
    except DataError as error:
        assert "split 'train' of sst2: ids" in str(error)
    else:
        assert all(type(number) is int for number in ids) and examples.ids.tolist() == ids


@MANY
@given(
    cells=st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=6),
    data=st.data(),
)
def test_any_cells_of_a_parquet(tmp_path, cells, data):
    size, path = len(cells), tmp_path / "train.parquet"
    labels = data.draw(st.lists(st.none() | st.integers(-1, 2), min_size=size, max_size=size))
    idx = data.draw(st.lists(st.none() | st.integers(-1, 9), min_size=size, max_size=size))
    table = pa.table({"sentence": cells, "label": pa.array(labels, pa.int64()), "idx": pa.array(idx, pa.int64())})
    parquet.write_table(table, path)
    good = None not in cells and set(labels) <= {0, 1} and None not in idx and min(idx) >= 0 and len(set(idx)) == size
    check("sst2", "train", tmp_path, path, SAME if good else r"row [1-6]: ", (cells, None, labels, idx))


@MANY
@given(data=st.data())
def test_a_parquet_with_damaged_bytes(tmp_path, data):
    content, path = bytearray(parquet_bytes()), tmp_path / "train.parquet"
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        examples = load_split("rte", "train", tmp_path)
    except DataError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert len(examples) == len(examples.labels) and set(map(type, examples.texts)) == {str}


def test_at_least_a_hundred_broken_inputs():
    broken = [case for case in TSV_CASES if case.values[-1]] + [case for case in PARQUET_CASES if case.values[-1]]
    assert len(broken) + len(BAD_EXAMPLES) + len(BAD_SPLITS) >= 100

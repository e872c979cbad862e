"""Tasks of CSV files: what is read, what is refused and where, and the whole way through the command line."""

import csv
import json
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lad_fast import cli
from lad_fast.cli import main
from lad_fast.data import tokenize
from lad_fast.demo import build_tokenizer
from lad_fast.glue import DataError, compute_metrics, load_split
from lad_fast.models import load_classifier, save_checkpoint
from lad_fast.tasks import CsvTask, DataConfig, find_task

ROWS = [("a dull film", "bad"), ('a "lovely", vivid\nplay', "good, really"), ("a noisy song", "bad")] * 4
PREDICTED = re.compile("bad|good, really")


def write(folder, split, rows, header=("review", "stars"), **dialect):
    folder.mkdir(exist_ok=True)
    with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, **dialect).writerows([header, *rows])


def config(folder, **changes):
    return DataConfig(**{"task": "csv", "text_column": "review", "label_column": "stars", "data_dir": folder} | changes)


def load(folder, split, labels=None, **changes):
    settings = config(folder, **changes)
    return load_split(find_task(settings, labels), split, settings.data_dir)


@pytest.fixture
def data(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path, split, ROWS)
    write(tmp_path, "test", [(text,) for text, _ in ROWS], header=["review"])
    return tmp_path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A headless model of random weights."""
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = build_tokenizer([text for text, _ in ROWS])
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes))
    save_checkpoint(folder, model.bert, tokenizer)
    return folder


# --- reading ----------------------------------------------------------------------------------------------------------


def test_rows_come_as_they_were_written(data):
    examples = load(data, "train")
    assert examples.task.labels == ("bad", "good, really")
    assert examples.task.metrics == ("accuracy", "f1")
    assert list(zip(examples.texts, (examples.task.labels[i] for i in examples.labels), strict=True)) == ROWS
    assert examples.labels.dtype == np.int64 and examples.ids.tolist() == list(range(len(ROWS)))
    test = load(data, "test")
    assert test.labels is None and test.texts == examples.texts
    assert pickle.loads(pickle.dumps(examples.task)) == examples.task


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data,
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\r\n", b"\n"),
        lambda data: data.replace(b"\r\n", b"\r"),
        lambda data: data.removesuffix(b"\r\n"),
    ],
    ids=["CRLF", "byte-order mark", "LF", "CR", "no last newline"],
)
def test_line_ends_and_marks(tmp_path, change):
    texts = ["plain", "a,b", 'say "so"', "two\nlines", "\u2028\x0b\x85 Grüße", " spaces ", "x" * 200_000]
    write(tmp_path, "train", [(text, i % 2) for i, text in enumerate(texts)])
    path = tmp_path / "train.csv"
    path.write_bytes(change(path.read_bytes()))
    found = load(tmp_path, "train").texts
    assert [text.replace("\r", "\n") for text in found] == texts


def test_columns_by_any_name_in_any_order(tmp_path):
    header = ["", "y", "second text", "first"]
    write(tmp_path, "train", [(0, 10, "b", "a"), (1, 9, "d", "c"), (2, 10, "f", "e")], header)
    examples = load(tmp_path, "train", text_column="first", text_pair_column="second text", label_column="y")
    assert (examples.texts, examples.text_pairs) == (["a", "c", "e"], ["b", "d", "f"])
    assert (examples.task.labels, examples.labels.tolist()) == (("9", "10"), [1, 0, 1])  # by number, not as texts


def test_more_classes_are_scored_by_accuracy_and_macro_f1(tmp_path):
    write(tmp_path, "train", [("a", "x"), ("b", "y"), ("c", "10"), ("d", "9")])
    task = find_task(config(tmp_path))
    assert (task.labels, task.metrics, task.best_metric) == (
        ("10", "9", "x", "y"), ("accuracy", "macro_f1"), "accuracy"
    )  # fmt: skip
    # F1 of class 0 is 1, of class 1 2/3, of class 2 0; class 3 is neither there nor predicted.
    found = compute_metrics(task, np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]))
    assert found == pytest.approx({"accuracy": 3 / 4, "macro_f1": (1 + 2 / 3 + 0) / 3})


def test_regression_takes_any_score(tmp_path):
    write(tmp_path, "train", [("a", "-1e6"), ("b", "2.5"), ("c", "7")])
    examples = load(tmp_path, "train", labels=())
    assert examples.task.metrics == ("pearson", "spearman") and examples.task.num_labels == 1
    assert examples.labels.dtype == np.float32 and examples.labels.tolist() == [-1e6, 2.5, 7]


# --- what is refused --------------------------------------------------------------------------------------------------

GOOD = "review,stars\na,1\nb,2\n"
BROKEN = {
    "empty file": ("", "train.csv has no examples"),
    "mark alone": ("\ufeff", "train.csv has no examples"),
    "header alone": ("review,stars\n", "train.csv has no examples"),
    "latin-1": (GOOD.encode() + b"gr\xfc\xdfe,1\n", "train.csv, line 4: not UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), "train.csv, line 1: not UTF-8"),
    "UTF-16 without a mark": (GOOD.encode("utf-16-le"), "train.csv, line 1: a NUL character"),
    "NUL": (GOOD + "c\0d,1\n", "train.csv, line 4: a NUL character"),
    "short row": (GOOD + '"two\nlines",1\nc\n', "train.csv, line 6: 1 columns; it takes 2"),
    "long row": (GOOD + "c,d,1\n", "train.csv, line 4: 3 columns; it takes 2"),
    "blank line": (GOOD + "\nc,1\n", "train.csv, line 4: 0 columns; it takes 2"),
    "no text column": ("text,stars\na,1\nb,2\n", r"no column 'review' in the header; it has \['text', 'stars'\]"),
    "no label column": ("review,star\na,1\n", r"line 1: no column 'stars' in the header; it has \['review', 'star'\]"),
    "spaces in the header": ("review, stars\na,1\n", r"no column 'stars' .* it has \['review', ' stars'\]"),
    "semicolons": (GOOD.replace(",", ";"), r"no column 'stars' in the header; it has \['review;stars'\]"),
    "label column twice": ("review,stars,stars\na,1,2\n", "line 1: 2 columns 'stars' in the header"),
    "text column twice": ("review,review,stars\na,b,1\nc,d,2\n", "line 1: 2 columns 'review' in the header"),
    "empty text": (GOOD + ",1\n", "train.csv, line 4: column 'review' is empty"),
    "empty label": (GOOD + "c,\n", "train.csv, line 4: column 'stars' is empty"),
    "spaces around a label": (GOOD + "c, 1\n", "train.csv, line 4: label ' 1'; it takes one without spaces"),
    "one class": ("review,stars\na,1\nb,1\n", "train.csv: column 'stars' holds '1' alone"),
    "open quote": (GOOD + 'c,"1\nd,2\n', "train.csv, line 4: no CSV row .*quotes in quotes are doubled"),
    "quote not doubled": (GOOD + '"say "so"",1\n', "train.csv, line 4: no CSV row"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused_by_file_and_line(tmp_path, kind):
    content, message = BROKEN[kind]
    (tmp_path / "train.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, "train")
    assert str(tmp_path / "train.csv") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("score", ["nan", "inf", "1e39", "five", "0x1", " 1", "1_0", "1,5"])
def test_scores_are_finite_numbers(tmp_path, score):
    write(tmp_path, "train", [("a", 1), ("b", score)])
    with pytest.raises(DataError, match=f"train.csv, line 3: label {score!r}; it takes .*scores from"):
        load(tmp_path, "train", labels=())


def test_a_class_that_train_lacks_is_refused(data):
    write(data, "validation", [*ROWS[:2], ("a film", "so-so")])
    with pytest.raises(DataError, match=r"validation.csv, line 5: label 'so-so'; it takes 'bad, good, really'"):
        load(data, "validation")


@pytest.mark.parametrize(
    ("changes", "labels", "message"),
    [
        ({"data_dir": None}, None, "data_dir is None; task csv takes a folder with train.csv"),
        ({"text_column": "stars"}, None, r"columns of texts and labels are \('stars', 'stars'\)"),
        ({"text_pair_column": "review"}, None, "they take different names"),
        ({"task": "rte"}, None, "text_column is 'review'; the tasks of GLUE take none"),
        ({"task": "rte", "text_column": "text", "label_column": "label"}, (), "regression is True"),
        ({"task": "imdb", "text_column": "text", "label_column": "label"}, None, "task is 'imdb'; .*wnli, or csv"),
    ],
)
def test_settings_that_do_not_fit_are_named(data, changes, labels, message):
    with pytest.raises(ValueError, match=message):
        find_task(config(data, **changes), labels)


def test_missing_folder_and_files_are_named(data):
    with pytest.raises(DataError, match=r"data_dir is .*/none, not a folder"):
        load(data / "none", "train")
    (data / "test.csv").unlink()
    with pytest.raises(DataError, match=f"data_dir {data} has no test.csv"):
        load(data, "test")
    (data / "test.csv").mkdir()
    with pytest.raises(DataError, match=r"test.csv is a folder; it takes a file"):
        load(data, "test")


# --- through the command line -----------------------------------------------------------------------------------------

COLUMNS = ["--text-column", "review", "--label-column", "stars"]


def run(command, data, *flags):
    where = ["--data-dir", str(data), "--max-length", "16", "--device", "cpu"]
    return main([command, "--task", "csv", *COLUMNS, *where, *map(str, flags)])


def train(command, data, output_dir, *flags):
    settings = ["--output-dir", output_dir, "--epochs", 1, "--precision", "float32", "--no-progress"]
    return run(command, data, *settings, *flags)


def test_from_csv_to_student_to_predictions(data, pretrained, tmp_path, capsys):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    assert train("finetune", data, teacher, "--model", pretrained) == 0
    assert train("distill", data, student, "--teacher", teacher / "best", "--student-layers", 1) == 0
    metrics = json.loads((student / "results.json").read_text())["best_metrics"]
    assert set(metrics["validation"]) == {"accuracy", "f1"}
    saved = json.loads((student / "best/config.json").read_text())
    assert saved["id2label"] == {"0": "bad", "1": "good, really"}

    (data / "train.csv").unlink()  # a trained model knows its classes
    capsys.readouterr()
    assert run("evaluate", data, "--model", student / "best") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"] == metrics
    (data / "validation.csv").unlink()
    assert run("predict", data, "--model", student / "best", "--output-dir", tmp_path / "out") == 0
    with (tmp_path / "out/predictions.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["index", "prediction"]
    assert [index for index, _ in rows] == [str(i) for i in range(len(ROWS))]
    assert all(PREDICTED.fullmatch(name) for _, name in rows)


@pytest.mark.parametrize("names", [("LABEL_0", "LABEL_1"), ("Bad", "GOOD_REALLY"), ("bad", "good, really")])
def test_a_classifier_from_elsewhere_is_scored_as_it_may_teach(data, pretrained, tmp_path, capsys, names):
    """By the spelling of train.csv, where the classes are the same."""
    model, tokenizer = load_classifier(pretrained, find_task(config(data)))
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    save_checkpoint(tmp_path / "theirs", model, tokenizer)
    assert train("distill", data, tmp_path / "student", "--teacher", tmp_path / "theirs", "--student-layers", 1) == 0
    assert run("evaluate", data, "--model", tmp_path / "theirs") == 0, capsys.readouterr().err
    assert run("predict", data, "--model", tmp_path / "theirs", "--output-dir", tmp_path / "out") == 0
    with (tmp_path / "out/predictions.csv").open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    assert {name for _, name in rows} <= {"bad", "good, really"}


def test_scores_are_of_texts_as_long_as_in_training(data, pretrained, tmp_path, capsys, caplog, monkeypatch):
    assert train("finetune", data, tmp_path / "run", "--model", pretrained) == 0  # --max-length 16
    student = "--teacher", tmp_path / "run/best", "--student-layers", 1
    for tokens in (16, 12):
        assert train("distill", data, tmp_path / f"{tokens}", *student, "--max-length", tokens) == 0
    assert caplog.messages.count("the teacher was trained on 16 tokens an example; max_length is 12") == 1
    assert "max_length is 16" not in caplog.text
    lengths = []
    monkeypatch.setattr(cli, "tokenize", lambda *rest: lengths.append(rest[2]) or tokenize(*rest))
    best = tmp_path / "run/best"
    flags = ["--task", "csv", *COLUMNS, "--data-dir", str(data), "--device", "cpu", "--model"]
    assert main(["evaluate", *flags, str(best)]) == 0
    assert main(["evaluate", *flags, str(best), "--max-length", "12"]) == 0
    (best / "training.json").unlink()
    assert main(["evaluate", *flags, str(best)]) == 0
    assert lengths == [16, 12, 32]  # the last: what the model takes
    capsys.readouterr()
    for content, told in (
        ("{", "is damaged"),
        ('{"max_length": "x"}', "max_length is x"),
        ('{"max_length": 33}', "33"),
        ('{"num_texts": [2]}', "num_texts is [2]"),
        ("[1]", "is damaged"),
    ):
        (best / "training.json").write_text(content)
        assert main(["evaluate", *flags, str(best)]) == 2
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1, err


def test_pairs_are_not_scored_by_their_first_texts(tmp_path, pretrained, capsys):
    """Nor single texts as pairs: without a word it would be another input than the model learned from."""
    data, pair = tmp_path / "data", ["--text-pair-column", "plot"]
    for split in ("train", "validation", "test"):
        write(data, split, [(text, "a " + text, label) for text, label in ROWS], header=["review", "plot", "stars"])
    assert train("finetune", data, tmp_path / "pairs", "--model", pretrained, *pair) == 0
    assert train("finetune", data, tmp_path / "single", "--model", pretrained) == 0
    for model, right, wrong, told in (
        ("pairs", pair, [], "text_pair_column is None; model {} was trained on pairs of texts"),
        ("single", [], pair, "text_pair_column is set; model {} was trained on single texts"),
    ):
        best, out = tmp_path / model / "best", tmp_path / f"{model}-predictions"
        assert run("evaluate", data, "--model", best, *right) == 0
        assert run("predict", data, "--model", best, "--output-dir", out, *right) == 0
        shutil.rmtree(out)
        capsys.readouterr()
        assert run("evaluate", data, "--model", best, *wrong) == 2
        assert run("predict", data, "--model", best, "--output-dir", out, *wrong) == 2
        err = capsys.readouterr().err
        assert err.count(told.format(best)) == err.count("\n") == 2, err
        assert not out.exists()
        student = "--teacher", best, "--student-layers", 1
        assert train("distill", data, tmp_path / f"{model}-student", *student, *wrong) == 2
        err = capsys.readouterr().err
        assert told.format(best).replace("; model", "; teacher") in err and err.count("\n") == 1, err
        assert not (tmp_path / f"{model}-student").exists()
        (best / "training.json").unlink()  # as of a model from elsewhere
        assert run("evaluate", data, "--model", best, *wrong) == 0


def test_scores_that_cannot_be_computed_are_told_before_anything_else(data, pretrained, tmp_path, capsys, monkeypatch):
    assert train("finetune", data, tmp_path / "run", "--model", pretrained) == 0
    monkeypatch.setitem(sys.modules, "sklearn", None)
    capsys.readouterr()
    assert run("evaluate", data, "--model", tmp_path / "run/best") == 2
    assert train("finetune", data, tmp_path / "another", "--model", pretrained) == 2
    told = "the scores accuracy, f1 take sklearn: pip install 'lad_fast[glue]'"
    assert [told in line for line in capsys.readouterr().err.splitlines()] == [True, True]
    assert not (tmp_path / "another").exists()


def test_regression_to_predictions(tmp_path, pretrained, capsys):
    data = tmp_path / "data"
    rows = [(text, i / 8) for i, (text, _) in enumerate(ROWS)]
    for split in ("train", "validation", "test"):
        write(data, split, rows)
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    assert train("finetune", data, teacher, "--model", pretrained, "--regression") == 0
    flags = ["--teacher", teacher / "best", "--student-layers", 1, "--regression"]
    assert train("distill", data, student, *flags) == 0
    metrics = json.loads((student / "results.json").read_text())["best_metrics"]
    assert set(metrics["validation"]) == {"pearson", "spearman"}
    capsys.readouterr()
    assert run("evaluate", data, "--model", student / "best") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["validation"] == pytest.approx(
        metrics["validation"], abs=1e-6
    )
    assert run("predict", data, "--model", student / "best", "--output-dir", tmp_path / "out") == 0
    _, *lines = (tmp_path / "out/predictions.csv").read_text().splitlines()
    assert len({float(line.split(",")[1]) for line in lines}) == 3  # one a text


def test_a_changed_file_is_another_run(data, pretrained, tmp_path, capsys):
    assert train("finetune", data, tmp_path / "run", "--model", pretrained) == 0
    assert train("finetune", data, tmp_path / "run", "--model", pretrained) == 0  # finished, and the same
    write(data, "train", ROWS[:-1])
    assert train("finetune", data, tmp_path / "run", "--model", pretrained) == 2
    assert "the training data differ" in capsys.readouterr().err
    write(data, "train", ROWS)
    write(data, "validation", ROWS[:-1])
    assert train("finetune", data, tmp_path / "run", "--model", pretrained) == 2
    assert "the evaluation data differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("teachers", "own"),
    [
        (("good, really", "bad"), ("bad", "good, really")),
        (("2", "1"), ("1", "2")),
        (("0", "1"), ("1", "2")),
        (("нет", "да"), ("да", "нет")),
        (("c", "c++"), ("c", "c#")),
    ],
)
def test_a_teacher_with_other_classes_is_refused(tmp_path, pretrained, teachers, own):
    model, tokenizer = load_classifier(pretrained, CsvTask("csv", ("review",), labels=teachers))
    save_checkpoint(tmp_path / "teacher", model, tokenizer)
    with pytest.raises(ValueError, match="in this order"):
        load_classifier(tmp_path / "teacher", CsvTask("csv", ("review",), labels=own), fine_tuned=True)
    assert load_classifier(tmp_path / "teacher", CsvTask("csv", ("review",), labels=teachers), fine_tuned=True)

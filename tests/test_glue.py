"""GLUE tasks: what the files hold, what damaged files say, metrics and submission files."""

import math
import re
import warnings

import numpy as np
import pytest

from lad_fast import glue
from lad_fast.glue import DataError, Examples, Task, compute_metrics, get_task, load_split, write_submission

# Rows of each split, as ../shared/glue/README.md records them.
PARQUET_ROWS = {
    ("cola", "train"): 8551,
    ("cola", "validation"): 1043,
    ("sst2", "train"): 67349,
    ("sst2", "validation"): 872,
    ("mrpc", "train"): 3668,
    ("mrpc", "validation"): 408,
    ("rte", "train"): 2490,
    ("rte", "validation"): 277,
    ("stsb", "train"): 5749,
    ("stsb", "validation"): 1500,
    ("wnli", "train"): 635,
    ("wnli", "validation"): 71,
    ("qnli", "validation"): 5463,
}


@pytest.fixture
def write(tmp_path):
    """Writes lines to a file under tmp_path and gives tmp_path back."""

    def write(name: str, *lines: str, end: str = "\n"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("".join(line + end for line in lines).encode())
        return tmp_path

    return write


def write_parquet(path, **columns):
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def test_tasks_are_consistent():
    assert list(glue.TASKS) == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
    for name, task in glue.TASKS.items():
        assert task.name == name and get_task(name) is task and get_task(task) is task
        assert len(task.tsv_text_columns) == len(task.text_columns)
        assert set(task.submission_files) == set(task.test_splits)
        assert task.num_labels == (1 if name == "stsb" else 3 if name == "mnli" else 2)
        hash(task)


@pytest.mark.parametrize(("task", "split"), PARQUET_ROWS)
def test_parquet_rows(shared, task, split):
    examples = load_split(task, split, shared / "glue")
    assert len(examples) == PARQUET_ROWS[task, split] == len(examples.labels) == len(examples.ids)
    assert examples.labels.dtype == (np.float32 if task == "stsb" else np.int64)
    assert examples.ids.dtype == np.int64 and len(set(examples.ids.tolist())) == len(examples)
    assert (examples.text_pairs is None) == (len(examples.task.text_columns) == 1)
    assert not any("\t" in text or "\n" in text for text in examples.texts)


CLASS_COUNTS = {
    "cola": [2528, 6023],
    "sst2": [29780, 37569],
    "mrpc": [1194, 2474],
    "rte": [1249, 1241],
    "wnli": [323, 312],
}


@pytest.mark.parametrize("task", CLASS_COUNTS)
def test_class_counts(shared, task):
    assert np.bincount(load_split(task, "train", shared / "glue").labels).tolist() == CLASS_COUNTS[task]


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "rte"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_tsv_equals_parquet(shared, task, split):
    parquet = load_split(task, split, shared / "glue")
    tsv = load_split(task, split, shared / "glue_tsv")
    rows = np.arange(len(parquet))
    if (task, split) == ("sst2", "train"):
        rows = rows[:5000]  # the TSV file was cut
    elif (task, split) == ("mrpc", "train"):
        rows = np.delete(rows, 91)  # the TSV file at hand lacks this row
    assert tsv.texts == [parquet.texts[row] for row in rows]
    assert tsv.text_pairs == (parquet.text_pairs and [parquet.text_pairs[row] for row in rows])
    np.testing.assert_array_equal(tsv.labels, parquet.labels[rows])
    if task != "mrpc":  # the hub numbers MRPC's examples in an order of its own
        np.testing.assert_array_equal(tsv.ids, parquet.ids[rows])


def test_real_test_split(shared):
    examples = load_split("rte", "test", shared / "glue_tsv")
    assert examples.labels is None
    np.testing.assert_array_equal(examples.ids, np.arange(3000))
    assert examples.text_pairs[0] == "Shukla is related to Mangla."


def test_task_folder_itself(shared):
    assert len(load_split("rte", "validation", shared / "glue" / "rte")) == 277
    assert len(load_split("rte", "validation", shared / "glue_tsv" / "RTE")) == 277


PARSES = "sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
NLI = f"index promptID pairID genre {PARSES} sentence1 sentence2"
NLI_DEV = NLI + " label1 label2 label3 label4 label5 gold_label"
STS = "index genre filename year old_index source1 source2 sentence1 sentence2"
# task, official file, header, rows, expected texts (a letter each), second texts, labels, ids
OFFICIAL = [
    ("cola", "CoLA/train.tsv", None, ["gj04 0 * a", "gj04 1  c"], "ac", None, [0, 1], [0, 1]),
    ("cola", "CoLA/test.tsv", "index sentence", ["0 a", "1 c"], "ac", None, None, [0, 1]),
    ("sst2", "SST-2/dev.tsv", "sentence label", ["a 1", "c 0"], "ac", None, [1, 0], [0, 1]),
    ("sst2", "SST-2/test.tsv", "index sentence", ["7 a", "9 c"], "ac", None, None, [7, 9]),
    ("mrpc", "MRPC/train.tsv", "\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String",
     ["1|12|13|a|b", "0|14|15|c|d"], "ac", "bd", [1, 0], [0, 1]),
    ("mrpc", "MRPC/test.tsv", "\ufeffindex|#1 ID|#2 ID|#1 String|#2 String",
     ["0|12|13|a|b", "1|14|15|c|d"], "ac", "bd", None, [0, 1]),
    ("stsb", "STS-B/train.tsv", STS + " score",
     ["0 g f 2012 1 none none a b 5.000", "1 g f 2012 2 none none c d 3.8"], "ac", "bd", [5, 3.8], [0, 1]),
    ("stsb", "STS-B/test.tsv", STS, ["3 g f 20 1 n n a b", "4 g f 20 2 n n c d"], "ac", "bd", None, [3, 4]),
    ("qqp", "QQP/dev.tsv", "id qid1 qid2 question1 question2 is_duplicate",
     ["133273 1 2 a b 1", "402555 3 4 c d 0"], "ac", "bd", [1, 0], [0, 1]),
    ("qqp", "QQP/test.tsv", "id question1 question2", ["0 a b", "1 c d"], "ac", "bd", None, [0, 1]),
    ("mnli", "MNLI/train.tsv", NLI + " label1 gold_label",
     ["0 31193 31193n fiction ( ( x y a b neutral neutral",
      "1 1 1c fiction ( ( x y c d neutral contradiction",
      "2 1 1c fiction ( ( x y e f neutral entailment"], "ace", "bdf", [1, 2, 0], [0, 1, 2]),
    ("mnli", "MNLI/dev_matched.tsv", NLI_DEV,
     ["0 1 1n fiction ( ( x y a b entailment e e e e neutral"], "a", "b", [1], [0]),
    ("mnli", "MNLI/dev_mismatched.tsv", NLI_DEV,
     ["0 1 1n letters ( ( x y a b neutral n n n n contradiction"], "a", "b", [2], [0]),
    ("mnli", "MNLI/test_matched.tsv", NLI, ["0 1 1n f ( ( x y a b"], "a", "b", None, [0]),
    ("mnli", "MNLI/test_mismatched.tsv", NLI, ["5 1 1n f ( ( x y a b"], "a", "b", None, [5]),
    ("qnli", "QNLI/train.tsv", "index question sentence label",
     ["0 a b entailment", "1 c d not_entailment"], "ac", "bd", [0, 1], [0, 1]),
    ("qnli", "QNLI/test.tsv", "index question sentence", ["0 a b"], "a", "b", None, [0]),
    ("rte", "RTE/train.tsv", "index sentence1 sentence2 label",
     ["0 a b not_entailment", "1 c d entailment"], "ac", "bd", [1, 0], [0, 1]),
    ("rte", "RTE/test.tsv", "index sentence1 sentence2", ["0 a b"], "a", "b", None, [0]),
    ("wnli", "WNLI/dev.tsv", "index sentence1 sentence2 label",
     ["0 a b 0", "1 c d 1"], "ac", "bd", [0, 1], [0, 1]),
    ("wnli", "WNLI/test.tsv", "index sentence1 sentence2", ["0 a b"], "a", "b", None, [0]),
]  # fmt: skip


def split_of(name: str) -> str:
    """The split in an official file, such as validation_matched in MNLI/dev_matched.tsv."""
    return name.partition("/")[2].removesuffix(".tsv").replace("dev", "validation")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("case", OFFICIAL, ids=[case[1] for case in OFFICIAL])
def test_official_columns(write, case, end):
    task, name, header, rows, texts, pairs, labels, ids = case
    lines = rows if header is None else [header, *rows]
    separator = "|" if task == "mrpc" else " "
    folder = write(name, *(line.replace(separator, "\t") for line in lines), end=end)
    examples = load_split(task, split_of(name), folder)
    assert (examples.texts, examples.text_pairs) == (list(texts), pairs and list(pairs))
    assert examples.ids.tolist() == ids
    if labels is None:
        assert examples.labels is None
    else:
        np.testing.assert_array_equal(examples.labels, np.array(labels, dtype=examples.labels.dtype))


def test_tsv_texts_are_taken_as_they_are(write):
    odd = [
        'say "so',
        "'",
        "a\x85b",
        "c\u2028d",
        "e\x0bf\x0cg\x1ch",
        " spaces  ",
        "mid\rdle",
        "\N{SNOWMAN}",
        "",
    ]
    folder = write("SST-2/train.tsv", "sentence\tlabel", *(f"{text}\t1" for text in odd))
    assert load_split("sst2", "train", folder).texts == odd


def test_last_line_may_lack_its_end(tmp_path, write):
    folder = write("SST-2/train.tsv", "sentence\tlabel", "a\t1", "b\t0")
    path = tmp_path / "SST-2/train.tsv"
    path.write_bytes(path.read_bytes()[:-1])
    assert load_split("sst2", "train", folder).labels.tolist() == [1, 0]


def test_qqp_leaves_out_torn_rows_with_a_warning(write):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    folder = write("QQP/train.tsv", header, "0\t1\t2\ta\tb\t1", '"\tWhat?\t0', "1\t3\t4\tc\td\t0")
    with pytest.warns(UserWarning, match=r"train.tsv: left out 1 rows .*: lines 3$"):
        examples = load_split("qqp", "train", folder)
    assert (examples.texts, examples.labels.tolist(), examples.ids.tolist()) == (["a", "c"], [1, 0], [0, 2])
    with pytest.raises(DataError, match="line 2: no row has the header's 6 columns"):
        load_split("qqp", "train", write("QQP/train.tsv", header, "torn"))


RTE, STSB = "index\tsentence1\tsentence2\tlabel", "sentence1\tsentence2\tscore"
GOOD = "0\ta\tb\tentailment"


@pytest.mark.parametrize(
    ("task", "name", "lines", "message"),
    [
        ("rte", "RTE/train.tsv", [RTE, GOOD, "1\ta\tb"], "RTE/train.tsv, line 3: 3 columns; it takes 4"),
        ("rte", "RTE/train.tsv", [RTE, GOOD + "\tx"], "line 2: 5 columns; it takes 4"),
        ("rte", "RTE/train.tsv", [RTE, "", GOOD], "line 2: 1 columns; it takes 4"),
        (
            "rte",
            "RTE/train.tsv",
            [RTE, GOOD, "1\ta\tb\tmaybe"],
            "line 3: label 'maybe'; rte takes entailment, not_",
        ),
        (
            "rte",
            "RTE/train.tsv",
            [RTE, "1\ta\tb\t0"],
            "line 2: label '0'; rte takes entailment, not_entailment",
        ),
        ("rte", "RTE/train.tsv", [RTE], "RTE/train.tsv has no examples"),
        ("rte", "RTE/train.tsv", [], "RTE/train.tsv has no examples"),
        ("rte", "RTE/train.tsv", ["", ""], "RTE/train.tsv has no examples"),
        ("rte", "RTE/train.tsv", ["index\tsentence1\tlabel", "0\ta\tb"], "line 1: no column 'sentence2'"),
        (
            "rte",
            "RTE/test.tsv",
            ["index\tsentence1\tsentence2", "x\ta\tb"],
            "line 2: index 'x'; it takes an int",
        ),
        (
            "mnli",
            "MNLI/train.tsv",
            ["sentence1\tsentence2\tgold_label", "a\tb\t-"],
            "line 2: label '-'; mnli",
        ),
        ("cola", "CoLA/train.tsv", ["x\t1\t\tgood", "x\t2\t\tbad"], "line 2: label '2'; cola takes 0, 1"),
        ("cola", "CoLA/train.tsv", ["x\t1\tgood"], "line 1: 3 columns; it takes 4"),
        ("cola", "CoLA/train.tsv", [], "CoLA/train.tsv has no examples"),
        (
            "stsb",
            "STS-B/train.tsv",
            [STSB, "a\tb\t5.1"],
            "line 2: label '5.1'; stsb takes scores from 0 to 5",
        ),
        ("stsb", "STS-B/train.tsv", [STSB, "a\tb\tnan"], "line 2: label 'nan'"),
        ("stsb", "STS-B/train.tsv", [STSB, "a\tb\tx"], "line 2: label 'x'"),
    ],
)
def test_damaged_tsv(write, task, name, lines, message):
    with pytest.raises(DataError, match=re.escape(message)):
        load_split(task, split_of(name), write(name, *lines))


def test_tsv_must_be_utf8(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\ngood\t1\nbad \xff\t0\n")
    with pytest.raises(DataError, match=r"train.tsv, line 3: not UTF-8"):
        load_split("sst2", "train", tmp_path)


def test_missing_folders_and_files(tmp_path):
    with pytest.raises(DataError, match=r"data_dir is .*/none, not a folder"):
        load_split("rte", "train", tmp_path / "none")
    message = (
        f"data_dir {tmp_path} has no split 'validation' of rte; looked for rte/validation.parquet,"
        " rte/validation-00000-of-00001.parquet, RTE/dev.tsv,"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        load_split("rte", "validation", tmp_path)


@pytest.mark.parametrize("data_dir", [None, "."])
def test_unknown_task_and_split(data_dir):
    with pytest.raises(ValueError, match=r"task is 'rtee'; it takes one of cola, sst2, .*wnli"):
        load_split("rtee", "train", data_dir)
    with pytest.raises(
        ValueError, match=r"split is 'validation'; mnli has train, validation_matched, .*test_mismatched"
    ):
        load_split("mnli", "validation", data_dir)


def test_hub_offline_says_what_to_do(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match="--data-dir"):
        load_split("rte", "train")


def test_hub_split(monkeypatch):
    import datasets

    def load_dataset(path, name, split):
        assert (path, name) == ("nyu-mll/glue", "rte")
        columns = {
            "sentence1": ["a", "c"],
            "sentence2": ["b", "d"],
            "label": [-1, -1] if split == "test" else [1, 0],
        }
        return datasets.Dataset.from_dict({**columns, "idx": [4, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = load_split("rte", "train")
    assert (examples.texts, examples.text_pairs) == (["a", "c"], ["b", "d"])
    assert (examples.labels.tolist(), examples.ids.tolist()) == ([1, 0], [4, 2])
    assert load_split("rte", "test").labels is None


def test_parquet_shards_of_the_hub(tmp_path):
    folder = tmp_path / "a=b" / "sst2"  # not to be taken for a partition column
    write_parquet(folder / "train-00000-of-00002.parquet", sentence=["a", "b"], label=[0, 1])
    with pytest.raises(DataError, match="has 1 of 2 files train-"):
        load_split("sst2", "train", folder.parent)
    write_parquet(folder / "train-00001-of-00002.parquet", sentence=["c"], label=[1])
    examples = load_split("sst2", "train", folder.parent)
    assert (examples.texts, examples.labels.tolist(), examples.ids.tolist()) == (
        ["a", "b", "c"],
        [0, 1, 1],
        [0, 1, 2],
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"sentence": ["a", "b"], "label": [0, 2]},
            r"train.parquet, row 2: label 2; sst2 takes class ids 0 to 1",
        ),
        ({"sentence": ["a", "b"], "label": [-1, 0]}, r"row 1: label -1"),
        ({"sentence": ["a", "b"], "label": [0.5, 0.0]}, "column 'label' is double"),
        ({"sentence": ["a", None], "label": [0, 1]}, "row 2: column 'sentence' is empty"),
        ({"sentence": ["a", "b"], "label": [0, None]}, "row 2: column 'label' is empty"),
        ({"sentence": [1, 2], "label": [0, 1]}, "column 'sentence' holds int64; it takes text"),
        ({"sentence": ["a"]}, "train.parquet lacks column 'label'; it has"),
        ({"text": ["a"], "label": [0]}, "lacks column 'sentence'"),
        ({"sentence": [], "label": []}, "train.parquet has no rows"),
    ],
)
def test_damaged_parquet(tmp_path, columns, message):
    write_parquet(tmp_path / "sst2/train.parquet", **columns)
    with pytest.raises(DataError, match=message):
        load_split("sst2", "train", tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1 but no more"])
def test_not_parquet(tmp_path, content):
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"train.parquet cannot be read as Parquet"):
        load_split("sst2", "train", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rte", "train", []), "split 'train' of rte has no examples"),
        (("rte", "train", ["a"]), "text_pairs is None"),
        (("sst2", "train", ["a"], ["b"]), "text_pairs is given"),
        (("rte", "train", ["a"], ["b", "c"]), "text_pairs has 2 entries; texts has 1"),
        (("sst2", "train", ["a"], None, [0, 1]), "labels has 2 entries; texts has 1"),
        (("sst2", "train", ["a"], None, [0], [1, 2]), "ids has 2 entries; texts has 1"),
        (("sst2", "train", ["a", "b"], None, [0, 2]), r"labels\[1\] is 2; sst2 takes class ids 0 to 1 \("),
        (("sst2", "train", ["a"], None, [0.5]), r"labels\[0\] is 0.5"),
        (("stsb", "train", ["a"], ["b"], [math.nan]), r"labels\[0\] is nan; stsb takes scores from 0 to 5"),
    ],
)  # fmt: skip
def test_bad_examples(arguments, message):
    with pytest.raises(DataError, match=message):
        Examples(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_columns": ()}, "text_columns"),
        ({"metrics": ("recall",)}, "metrics is .*'recall'.*accuracy, f1, macro_f1, matthews"),
        ({"best_metric": "f1"}, "best_metric 'f1'"),
        ({"labels": ()}, "one of the two"),
        ({"label_range": (0, 1)}, "one of the two"),
        ({"name": "../own"}, "name is '../own'; it becomes part of files' names"),
        ({"name": ".."}, "takes no path"),
    ],
)
def test_bad_task(arguments, message):
    with pytest.raises(ValueError, match=message):
        Task(**{"name": "own", "text_columns": ("text",), **arguments})


@pytest.mark.parametrize("name", glue.TASKS)
def test_metrics_against_scikit_learn_and_scipy(name):
    from scipy import stats
    from sklearn import metrics

    task, rng = get_task(name), np.random.default_rng(3)
    if task.is_regression:
        labels = rng.uniform(0, 5, 200).astype(np.float32)
        predictions = np.clip(labels + rng.normal(0, 2, 200), 0, 5).astype(np.float32)
        want = {
            "pearson": stats.pearsonr(labels.astype(float), predictions.astype(float))[0],
            "spearman": stats.spearmanr(labels, predictions)[0],
        }
    else:
        labels = rng.integers(task.num_labels, size=200)
        predictions = np.where(rng.random(200) < 0.6, labels, rng.integers(task.num_labels, size=200))
        want = {
            "accuracy": metrics.accuracy_score(labels, predictions),
            "matthews": metrics.matthews_corrcoef(labels, predictions),
        }
        if task.num_labels == 2:
            want["f1"] = metrics.f1_score(labels, predictions)
    got = compute_metrics(name, predictions, labels)
    assert tuple(got) == task.metrics
    assert got == pytest.approx({key: want[key] for key in task.metrics}, rel=1e-12)


def test_metrics_by_hand():
    labels, predictions = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0])  # tp 2, fn 1, fp 1, tn 1
    assert compute_metrics("mrpc", predictions, labels) == pytest.approx({"accuracy": 3 / 5, "f1": 4 / 6})
    assert compute_metrics("cola", predictions, labels) == pytest.approx({"matthews": (2 * 1 - 1 * 1) / 6})
    scores, predicted = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 2.0, 1.0, 5.0])
    # deviations (-1.5, -.5, .5, 1.5) and (-2, 0, -1, 3): products sum to 7, squares to 5 and 14
    assert compute_metrics("stsb", predicted, scores) == pytest.approx(
        {"pearson": 7 / 70**0.5, "spearman": 0.8}
    )


def test_undefined_metrics_are_zero_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constant, scores = np.full(4, 2.5, np.float32), np.arange(4, dtype=np.float32)
        zero = {"pearson": 0.0, "spearman": 0.0}
        assert compute_metrics("stsb", constant, scores) == zero
        assert compute_metrics("stsb", scores, constant) == zero
        assert compute_metrics("stsb", scores[:1], scores[:1]) == zero
        assert compute_metrics("cola", np.ones(3, int), np.array([0, 1, 1])) == {"matthews": 0.0}
        assert compute_metrics("mrpc", np.zeros(3, int), np.zeros(3, int)) == {"accuracy": 1.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "message"),
    [
        ("rte", [0, 1], [0], r"predictions has shape \(2,\), labels \(1,\)"),
        ("rte", [], [], "they take"),
        ("rte", [[0]], [[0]], "they take"),
        ("rte", [0, 2], [0, 1], r"predictions\[1\] is 2; rte takes class ids 0 to 1"),
        ("rte", [0, 1], [0, -1], r"labels\[1\] is -1"),
        ("stsb", [1.0, math.inf], [1.0, 2.0], r"predictions\[1\] is inf; it takes finite scores"),
    ],
)
def test_bad_metric_input(task, predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(task, np.array(predictions), np.array(labels))


def test_predictions_from_logits():
    ids = glue.predictions_from_logits("mnli", np.array([[0.0, 2, 1], [3, 1, 2], [1, 1, 0]], np.float16))
    assert ids.tolist() == [1, 0, 0] and ids.dtype == np.int64
    for shape in ((3, 1), (3,)):
        scores = glue.predictions_from_logits("stsb", np.array([-0.5, 2.25, 6.0]).reshape(shape))
        assert scores.tolist() == [0.0, 2.25, 5.0] and scores.dtype == np.float32


@pytest.mark.parametrize(
    ("task", "logits", "message"),
    [
        ("mnli", np.zeros((4, 2)), r"logits has shape \(4, 2\); mnli takes \(N, 3\)"),
        ("rte", np.zeros(4), r"rte takes \(N, 2\)"),
        ("stsb", np.zeros((4, 2)), r"stsb takes \(N, 1\)"),
        ("rte", np.array([[0, math.nan]]), "logits has 1 of 2 values not finite"),
    ],
)
def test_bad_logits(task, logits, message):
    with pytest.raises(ValueError, match=message):
        glue.predictions_from_logits(task, logits)


@pytest.mark.parametrize(
    ("task", "split", "name", "predictions", "written"),
    [
        ("cola", "test", "CoLA.tsv", [0, 1], ["0", "1"]),
        ("sst2", "test", "SST-2.tsv", [1, 0], ["1", "0"]),
        ("mrpc", "test", "MRPC.tsv", [1, 0], ["1", "0"]),
        ("stsb", "test", "STS-B.tsv", [2.34567, 5.2], ["2.346", "5.000"]),
        ("stsb", "test", "STS-B.tsv", [-1e-9, -3], ["0.000", "0.000"]),
        ("qqp", "test", "QQP.tsv", [1, 0], ["1", "0"]),
        ("mnli", "test_matched", "MNLI-m.tsv", [0, 1], ["entailment", "neutral"]),
        ("mnli", "test_mismatched", "MNLI-mm.tsv", [2, 0], ["contradiction", "entailment"]),
        ("qnli", "test", "QNLI.tsv", [0, 1], ["entailment", "not_entailment"]),
        ("rte", "test", "RTE.tsv", [1, 0], ["not_entailment", "entailment"]),
        ("wnli", "test", "WNLI.tsv", [1, 0], ["1", "0"]),
    ],
)
def test_submission_files(tmp_path, task, split, name, predictions, written):
    path = write_submission(task, split, np.array([0, 1]), np.array(predictions), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / name
    assert path.read_bytes().decode() == f"index\tprediction\n0\t{written[0]}\n1\t{written[1]}\n"


def test_submission_is_ordered_by_index(tmp_path):
    path = write_submission("sst2", "test", np.array([10, 2, 0]), np.array([1, 0, 1]), tmp_path)
    assert path.read_text() == "index\tprediction\n0\t1\n2\t0\n10\t1\n"


@pytest.mark.parametrize(
    ("task", "split", "ids", "predictions", "message"),
    [
        ("rte", "validation", [0], [0], "split is 'validation'; rte has submission files for test$"),
        (Task("own", ("text",)), "test", [0], [0], "own has submission files for no split"),
        ("rte", "test", [0, 1], [0], r"ids has shape \(2,\), predictions \(1,\)"),
        ("rte", "test", [], [], "they take"),
        ("rte", "test", [0, 3, 3], [0, 1, 0], "ids holds 3 more than once"),
        ("rte", "test", [0, 1], [0, 2], r"predictions\[1\] is 2"),
        ("stsb", "test", [0, 1], [0, math.nan], r"predictions\[1\] is nan"),
    ],
)
def test_bad_submission(tmp_path, task, split, ids, predictions, message):
    with pytest.raises(ValueError, match=message):
        write_submission(task, split, np.array(ids), np.array(predictions), tmp_path)
    assert not list(tmp_path.iterdir())

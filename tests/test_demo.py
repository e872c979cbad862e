"""The embedded task cannot be read off words, and the demo runs from end to end."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lad_fast.cli import main
from lad_fast.demo import TASK, DemoConfig, build_teacher, build_tokenizer, demo, make_splits
from lad_fast.models import load_classifier


@pytest.fixture(autouse=True)
def fast_backend(monkeypatch):
    """Takes the default back end of a machine without a GPU, rather than Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def splits():
    return make_splits(seed=42)


def test_splits_share_no_sentence(splits):
    train, dev = splits["train"].texts, splits["validation"].texts
    assert len(set(train)) == len(train) == 9600
    assert len(set(dev)) == len(dev) == 1000
    assert not set(train) & set(dev)


def test_splits_depend_on_the_seed_alone(splits):
    again, other = make_splits(seed=42), make_splits(seed=43)
    for name, split in splits.items():
        assert again[name].texts == split.texts
        assert np.array_equal(again[name].labels, split.labels)
        assert other[name].texts != split.texts


def test_labels_are_balanced(splits):
    for split in splits.values():
        assert abs(split.labels.mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    ("sentence", "label"),
    [
        # every way that a judgement is told to count or not, read off the grammar by hand
        ("the songs are never dull although the book is really clumsy", 1),
        ("the songs are really dull although the book is never clumsy", 0),
        ("although the songs are really lovely the book is hardly clever", 0),
        ("the songs are really lovely but the book is scarcely clever", 0),
        ("the film by the poets that are clearly shallow and that is always clever", 1),
        ("the film by the poets that is clearly shallow and that are always clever", 0),
        ("the actor always mocked the judge and the judge really admired the actor", 1),
        ("the actor was always mocked by the judge and the judge was really admired by the actor", 0),
    ],
)
def test_labels_follow_the_stated_rules(sentence, label):
    assert grade(sentence) == label


def grade(sentence: str) -> int:
    """The label of a contradictory sentence, by the rules in the module's docstring and nothing of its code."""
    words = sentence.split()
    good = {"brilliant", "lovely", "clever", "graceful", "vivid", "honest", "praised", "admired", "thanked"}
    bad = {"dreadful", "clumsy", "boring", "shallow", "noisy", "dull", "mocked", "insulted", "blamed"}

    def kind(part: str) -> int:
        (valued,) = (word for word in part.split() if word in good | bad)
        return int((valued in good) != bool({"never", "hardly", "scarcely"} & set(part.split())))

    if "that" in words:
        _, one, other = sentence.split(" that ")
        return kind(one if one.startswith("is ") else other)
    if "although" in words:
        before = sentence.split("although")[0]
        if before:
            return kind(before)
        (second,) = [i for i, word in enumerate(words) if word == "the" and i > 1]
        return kind(" ".join(words[second:]))
    if "but" in words:
        return kind(sentence.split(" but ")[1])
    artists = {"singer", "actor", "poet", "dancer"}
    (about_artist,) = (part for part in sentence.split(" and ") if _done_to(part) in artists)
    return kind(about_artist)


def _done_to(part: str) -> str:
    words = part.split()
    return words[1] if "was" in words else words[-1]


def test_every_development_label_follows_the_stated_rules(splits):
    dev = splits["validation"]
    assert [grade(text) for text in dev.texts] == dev.labels.tolist()


@pytest.mark.parametrize(("ngrams", "most"), [(1, 0.55), (2, 0.65)])
def test_no_bag_of_words_solves_the_task(ngrams, most, splits):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, dev = splits["train"], splits["validation"]
    bag = CountVectorizer(ngram_range=(1, ngrams))
    words = bag.fit_transform(train.texts)
    scores = [
        LogisticRegression(C=c, max_iter=200).fit(words, train.labels).score(bag.transform(dev.texts), dev.labels)
        for c in (0.1, 1.0)
    ]
    assert max(scores) < most


def test_tokenizer_knows_every_word(splits):
    tokenizer = build_tokenizer(splits["train"].texts)
    assert tokenizer.tokenize("The films are never dull") == ["the", "films", "are", "never", "dull"]
    for text in splits["validation"].texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= tokenizer.model_max_length


SMALL_DEMO = """
import functools, hashlib, sys
from pathlib import Path
from lad_fast import demo as module

module.make_splits = functools.partial(module.make_splits, num_train=384, num_dev=64)
folder = Path(sys.argv[1])
module.demo(module.DemoConfig(folder, teacher_steps=4, student_steps=3, num_threads=2, progress=False))
for path in sorted(folder.glob("*/best/*")):
    print("digest", path.relative_to(folder), hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_every_process_makes_the_same_files(tmp_path):
    def digests(name: str, hash_seed: str) -> list[str]:
        command = [sys.executable, "-P", "-c", SMALL_DEMO, str(tmp_path / name)]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return [line for line in run.stdout.splitlines() if line.startswith("digest")]

    first = digests("first", "1")
    for file in ("model.safetensors", "tokenizer.json"):
        assert sum(file in line for line in first) == 4  # the teacher and three students
    assert digests("second", "2") == first


def test_teacher_has_six_layers_of_128(splits):
    teacher = build_teacher(build_tokenizer(splits["train"].texts), seed=1)
    assert (teacher.config.num_hidden_layers, teacher.config.hidden_size) == (6, 128)
    assert teacher.config.id2label == {0: "unkind", 1: "kind"}


def test_demo_from_end_to_end(tmp_path, capsys):
    config = DemoConfig(output_dir=tmp_path, teacher_steps=3, student_steps=2, progress=False)
    measurements = demo(config)
    assert [m.name for m in measurements] == ["teacher", "student, labels only", "student, logits", "student, LAD"]
    teacher, *students = measurements
    assert len({m.num_parameters for m in students}) == 1
    assert students[0].num_parameters < teacher.num_parameters
    assert all(0.3 < m.score < 0.7 and m.train_seconds > 0 and m.examples_per_second > 0 for m in measurements)

    out = capsys.readouterr().out
    for m in measurements:
        assert any(line.startswith(m.name) and f"{m.score:.1%}" in line for line in out.splitlines())

    results = json.loads((tmp_path / "results.json").read_text())
    assert [model["score"] for model in results["models"]] == [m.score for m in measurements]
    assert results["config"]["student_steps"] == 2
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert all(f"student-{method}" in page for method in ("none", "logits", "lad"))
    assert (tmp_path / "student-lad/last/gates.safetensors").is_file()
    model, _ = load_classifier(tmp_path / "student-lad/best", TASK, fine_tuned=True)
    assert model.config.num_hidden_layers == 3


def test_command_line_reaches_the_demo(tmp_path, monkeypatch):
    received = []
    monkeypatch.setattr("lad_fast.cli.demo", received.append)
    assert main(["demo", "--student-steps", "7", "--no-progress", "--output-dir", str(tmp_path)]) == 0
    assert received == [DemoConfig(output_dir=tmp_path, student_steps=7, progress=False)]

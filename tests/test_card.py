"""What a run leaves for others: folders that Transformers loads by itself, and a card beside each model."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from small import bert, split
from transformers import AutoModelForSequenceClassification, BertTokenizer, pipeline

from lad_fast.card import model_card
from lad_fast.glue import Task, get_task
from lad_fast.models import load_classifier, save_checkpoint
from lad_fast.training import VERSIONS, DistillConfig, FinetuneConfig, distill, finetune

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrs"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a student's run; its teacher lies in a folder named teacher."""
    root = tmp_path_factory.mktemp("somewhere")
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    save_checkpoint(root / "teacher/best", bert(2), tokenizer)
    teacher, tokenizer = load_classifier(root / "teacher/best", get_task("rte"), fine_tuned=True)
    config = DistillConfig(
        task="rte", teacher=str(root / "teacher/best"), output_dir=root / "my_student", student_layers=1, epochs=2,
        max_length=16, device="cpu", progress=False, precision="float32",
    )  # fmt: skip
    data = {"train": split(8), "evaluation": {"validation": split(8, seed=1)}}
    distill(config, teacher=teacher, tokenizer=tokenizer, **data)
    return root / "my_student"


def test_a_run_in_the_folder_at_hand_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_model").mkdir()
    monkeypatch.chdir(tmp_path / "my_model")
    config = FinetuneConfig(
        task="rte", model="", output_dir=Path(), epochs=1, max_length=16, device="cpu", progress=False
    )  # fmt: skip
    finetune(config, train=split(8), evaluation={"validation": split(8, seed=1)}, model=bert(1))
    card = ModelCard.load("best/README.md")
    assert card.data.model_name == "my_model" and "# my\\_model" in card.text


@pytest.mark.parametrize("which", ["best", "last"])
def test_the_card_is_what_the_hub_reads(run, which):
    card = ModelCard.load(run / which / "README.md")
    state = json.loads((run / which / "training.json").read_text())
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert data.datasets == ["nyu-mll/glue"] and data.metrics == ["accuracy"]
    assert {"lad_fast", "knowledge-distillation"} <= set(data.tags)
    assert data.model_name == "my_student" and data.base_model is None
    (result,) = data.eval_results
    assert (result.dataset_config, result.dataset_split) == ("rte", "validation")
    assert (result.metric_type, result.metric_name) == ("accuracy", "accuracy")
    assert result.metric_value == state["metrics"]["validation"]["accuracy"]
    for line in (
        f"After step {state['step']}, epoch {state['epoch']}.",
        "Distilled from teacher by lad_fast.",
        "| hidden\\_weight | 1000.0 |",
        "| student\\_layers | 1 |",
        *(f"| {name.replace('_', chr(92) + '_')} | {version} |" for name, version in VERSIONS.items()),
    ):
        assert line in card.text, line
    assert str(run.parent) not in card.content


@pytest.mark.parametrize("which", ["best", "last"])
def test_transformers_alone_loads_the_folder(run, which):
    assert {path.suffix for path in (run / which).iterdir()} <= {".json", ".md", ".safetensors", ".txt"}
    plain = AutoModelForSequenceClassification.from_pretrained(run / which)
    ours, _ = load_classifier(run / which, get_task("rte"), fine_tuned=True)
    ids = torch.tensor([[2, 5, 6, 3]])
    torch.testing.assert_close(plain(ids).logits, ours(ids).logits, rtol=0, atol=0)
    classify = pipeline("text-classification", model=str(run / which), device="cpu")
    found = classify({"text": "a b", "text_pair": "c"}, top_k=None)
    assert {answer["label"] for answer in found} == {"entailment", "not_entailment"}
    assert sum(answer["score"] for answer in found) == pytest.approx(1)


HOSTILE = "a|b\n# <script>`x`</script> [l](u) ---"
STATE = {"step": 3, "epoch": 1, "metrics": {}}


def card_of(task, state=STATE, **changes):
    arguments = {"name": "m", "settings": {"method": "lad"}, "sources": {"model": "org/name"}, "versions": {}}
    return ModelCard(model_card(task=task, state=state, **arguments | changes))


def test_texts_stay_texts():
    task = Task("csv", ("text",), labels=(HOSTILE, "other"))
    settings = {"method": HOSTILE}
    card = card_of(task, name=HOSTILE, settings=settings, state=STATE | {"metrics": {HOSTILE: {"accuracy": 0.5}}})
    assert card.data.model_name == HOSTILE and card.data.eval_results[0].dataset_split == HOSTILE
    escaped = r"a\|b \# \<script\>\`x\`\</script\> \[l\](u) ---"
    assert card.text.count(escaped) == 4  # title, class, split, setting
    assert not re.search(r"(?<!\\)[<`]script", card.text)


@pytest.mark.parametrize(
    ("source", "told", "base"),
    [
        ("google-bert/bert-base-uncased", "google-bert/bert-base-uncased", ["google-bert/bert-base-uncased"]),
        ("bert", "bert", None),
        ("/home/me/secret/teacher", "teacher", None),
        ("~/secret/teacher/best", "teacher", None),
        ("made by the demo", "made by the demo", None),
    ],
)
def test_folders_of_ones_own_are_told_by_name(source, told, base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "secret/teacher/best").mkdir(parents=True)
    card = card_of(get_task("rte"), sources={"teacher": source})
    assert f"Distilled from {told} by" in card.text
    assert card.data.base_model == base and "secret" not in card.content


def test_a_teacher_without_a_name_is_not_the_folder_one_is_in():
    card = card_of(get_task("rte"), sources={"teacher": ""})
    assert "Distilled by lad_fast." in card.text and Path.cwd().name not in card.content
    assert card.data.base_model is None and "knowledge-distillation" in card.data.tags


def test_what_is_not_known_is_left_out():
    task = Task("csv", ("text",), labels=tuple(f"class {i}" for i in range(60)))
    card = card_of(task)
    assert card.data.datasets is None and card.data.eval_results is None and "It was not evaluated." in card.text
    assert "class 49, …" in card.text and "class 50" not in card.text
    scores = {"validation": {"pearson": float(np.float64(0.5)), "spearman": 0.25}}
    alone = {"sources": {"teacher": "t"}, "settings": {"method": "none"}}
    regression = card_of(get_task("stsb"), state=STATE | {"metrics": scores}, **alone)
    assert [result.metric_type for result in regression.data.eval_results] == ["pearsonr", "spearmanr"]
    assert "predicts the score of task stsb. Trained on labels alone as a student of t" in regression.text


@pytest.mark.parametrize(
    ("task", "example"), [("sst2", '"a text"'), ("rte", '{"text": "a text", "text_pair": "and its second"}')]
)
def test_the_card_calls_the_model_as_it_takes_texts(task, example):
    assert f"classify({example})" in card_of(get_task(task)).text


def test_a_fine_tuned_model_is_no_distilled_one():
    card = card_of(get_task("rte"))
    assert card.data.tags == ["lad_fast"] and card.data.base_model == ["org/name"]
    assert "Fine-tuned from org/name by lad_fast." in card.text


def test_splits_without_scores_are_no_evaluation():
    card = card_of(get_task("rte"), state=STATE | {"metrics": {"validation": {}}})
    assert card.data.model_name is None and card.data.eval_results is None and "It was not evaluated." in card.text

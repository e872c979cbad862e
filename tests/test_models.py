"""Loading, building and saving models, on tiny ones made here."""

import json

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lad_fast import GateStack
from lad_fast.glue import get_task
from lad_fast.models import build_student, check_max_length, load_classifier, model_inputs, run_model, save_checkpoint

RTE, MNLI, STSB = get_task("rte"), get_task("mnli"), get_task("stsb")
SIZES = {"vocab_size": 24, "max_position_embeddings": 20}
BERT_SIZES = SIZES | {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def bert(num_layers=4, **config):
    return BertForSequenceClassification(BertConfig(**BERT_SIZES, num_hidden_layers=num_layers, **config)).eval()


FAMILIES = {
    "bert": bert,
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**BERT_SIZES, num_hidden_layers=4)),
    "electra": lambda: ElectraForSequenceClassification(
        ElectraConfig(**BERT_SIZES, num_hidden_layers=4, embedding_size=8)
    ),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(**SIZES, dim=16, n_heads=2, hidden_dim=32, n_layers=4)
    ),
}
# Where each family's state dict keeps layer i.
LAYERS = {
    "bert": "bert.encoder.layer.",
    "roberta": "roberta.encoder.layer.",
    "electra": "electra.encoder.layer.",
    "distilbert": "distilbert.transformer.layer.",
}


@pytest.fixture
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def batch(num_real=(8, 5)):
    ids = torch.randint(5, 24, (len(num_real), max(num_real)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(num_real)) < torch.tensor(num_real)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer_map", [None, (3, 0)])
def test_student_takes_the_teachers_tensors(family, layer_map):
    teacher, prefix = FAMILIES[family](), LAYERS[family]
    student = build_student(teacher, 2, layer_map=layer_map)
    assert type(student) is type(teacher)
    assert student.config.num_hidden_layers == 2
    assert teacher.config.num_hidden_layers == 4
    source = teacher.state_dict()
    for name, value in student.state_dict().items():
        if name.startswith(prefix):
            layer, rest = name.removeprefix(prefix).split(".", 1)
            name = f"{prefix}{(layer_map or (1, 3))[int(layer)]}.{rest}"
        assert torch.equal(value, source[name]), name
        assert value.data_ptr() != source[name].data_ptr(), name
    assert student(**batch()).logits.shape == (2, 2)


def test_a_student_of_a_compiled_teacher():
    teacher = bert()
    student = build_student(torch.compile(teacher, backend="eager"), 2)
    assert type(student) is type(teacher)
    for name, value in build_student(teacher, 2).state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name


def test_student_of_all_layers_is_the_teacher():
    teacher = bert()
    student = build_student(teacher, 4).eval()
    torch.testing.assert_close(student(**batch()).logits, teacher(**batch()).logits, rtol=0, atol=0)


def test_uneven_default_map_counts_from_the_bottom():
    teacher = bert(num_layers=7)
    student = build_student(teacher, 3)
    for mine, source in enumerate((1, 3, 5)):  # skip = 7 // 3
        weight = teacher.bert.encoder.layer[source].output.dense.weight
        assert torch.equal(student.bert.encoder.layer[mine].output.dense.weight, weight)


@pytest.mark.parametrize("headless", [False, True])
def test_published_start(headless):
    teacher, pretrained = bert(), bert()
    torch.nn.init.normal_(pretrained.bert.pooler.dense.bias)  # zeros would tell nothing
    student = build_student(teacher, 2, "published", pretrained=pretrained.bert if headless else pretrained)
    for mine, source in enumerate((1, 3)):
        expected = pretrained.bert.encoder.layer[source].state_dict()
        for name, value in student.bert.encoder.layer[mine].state_dict().items():
            assert torch.equal(value, expected[name]), name
    for name, value in student.bert.pooler.state_dict().items():
        assert torch.equal(value, pretrained.bert.pooler.state_dict()[name]), name
    embeddings = student.bert.embeddings.word_embeddings.weight
    for model in (teacher, pretrained):
        assert not torch.equal(embeddings, model.bert.embeddings.word_embeddings.weight)
        assert not torch.equal(student.classifier.weight, model.classifier.weight)
    assert embeddings[1:].std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_start_shares_no_weights(family):
    teacher = FAMILIES[family]()
    source = teacher.state_dict()
    for name, value in build_student(teacher, 4, "random").state_dict().items():
        if value.std() > 0 and value.dim() > 1:
            assert not torch.equal(value, source[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": 5}, "num_layers is 5; the teacher's 4 layers take 1 to 4"),
        ({"num_layers": True}, "num_layers is True"),
        ({"num_layers": 2, "init": "best"}, "init is 'best'"),
        ({"num_layers": 2, "layer_map": (1, 4)}, "layer_map is"),
        ({"num_layers": 2, "layer_map": (1,)}, "layer_map is"),
        ({"num_layers": 2, "init": "published"}, "pretrained is None"),
        ({"num_layers": 2, "init": "published", "pretrained": bert(3)}, "pretrained has 3 layers"),
    ],
)
def test_wrong_students_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_student(bert(), **arguments)


def test_layers_of_several_kinds_stay_what_they_are():
    config = ModernBertConfig(
        **BERT_SIZES, num_hidden_layers=4, global_attn_every_n_layers=3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    student = build_student(ModernBertForSequenceClassification(config), 3, layer_map=(0, 3, 1))
    assert student.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    config = AutoConfig.for_model("longformer", **BERT_SIZES, num_hidden_layers=4, attention_window=4, pad_token_id=0)
    student = build_student(AutoModelForSequenceClassification.from_config(config), 2)
    assert student.config.attention_window == [4, 4]
    assert run_model(student, batch())[0].shape == (2, 2)


def test_a_teacher_with_weights_across_its_layers_is_named():
    config = AutoConfig.for_model("esm", **BERT_SIZES, num_hidden_layers=4, pad_token_id=0)
    with pytest.raises(ValueError, match=r"teacher outside its layers does not fit the student's: size mismatch"):
        build_student(AutoModelForSequenceClassification.from_config(config), 2)  # a head over all layers' attention


def test_pretrained_of_another_width_is_named():
    sizes = BERT_SIZES | {"intermediate_size": 40, "num_hidden_layers": 4}
    with pytest.raises(ValueError, match=r"pretrained's layer 1 does not fit the student's: size mismatch"):
        build_student(bert(), 2, "published", pretrained=BertModel(BertConfig(**sizes)))


def test_shared_layers_cannot_be_told_apart():
    config = AlbertConfig(**BERT_SIZES, num_hidden_layers=4, embedding_size=8)
    with pytest.raises(ValueError, match="AlbertForSequenceClassification has no list of 4 encoder layers"):
        build_student(AlbertForSequenceClassification(config), 2)


def test_layers_in_several_lists_cannot_be_told_apart():
    config = AutoConfig.for_model("xlm", vocab_size=24, emb_dim=16, n_layers=4, n_heads=2, n_langs=1)
    with pytest.raises(ValueError, match="XLMForSequenceClassification has several lists of 4 encoder layers"):
        build_student(AutoModelForSequenceClassification.from_config(config), 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_model_inputs_hide_padding(family, attention):
    model = FAMILIES[family]().eval()
    model.set_attn_implementation(attention)
    padded = batch()
    inputs, mask = model_inputs(model, padded)
    assert torch.equal(mask, padded["attention_mask"])
    expected = model(**padded).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    alone = {name: value[1:, :5] for name, value in padded.items()}
    inputs, mask = model_inputs(model, alone)
    assert mask is None
    assert "attention_mask" not in inputs
    torch.testing.assert_close(model(**inputs).logits, expected[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["layoutlm", "mobilebert", "mpnet"])
def test_model_inputs_of_models_that_take_no_mask_of_scores(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **BERT_SIZES | {"num_hidden_layers": 2}, initializer_range=0.2)
    model, padded = AutoModelForSequenceClassification.from_config(config).eval(), batch()
    assert torch.equal(run_model(model, model_inputs(model, padded)[0])[0], model(**padded).logits)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_model_that_cuts_windows_and_pools_by_the_mask_gets_it_as_it_is(pooling):
    config = ModernBertConfig(
        **BERT_SIZES, num_hidden_layers=2, local_attention=4, global_attn_every_n_layers=2, classifier_pooling=pooling,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, attention_dropout=0.0,
        num_labels=2,
    )  # fmt: skip
    model = ModernBertForSequenceClassification(config).eval()
    assert model.config._attn_implementation == "sdpa"
    padded = batch((16, 5))
    inputs, _ = model_inputs(model, padded)
    torch.testing.assert_close(model(**inputs).logits, model(**padded).logits, rtol=0, atol=0)
    alone, _ = model_inputs(model, {name: value[:1] for name, value in padded.items()})
    torch.testing.assert_close(model(**alone).logits, model(**inputs).logits[:1], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"teacher's layer 1 does not fit the student's: "):
        build_student(model, 1)  # its first layer lacks the norm that the others have


@pytest.mark.parametrize(("family", "most"), [("bert", 20), ("roberta", 18), ("distilbert", 20)])
def test_as_many_tokens_as_positions(family, most):
    """RoBERTa's first two positions are none."""
    model = FAMILIES[family]().eval()
    check_max_length(model, most)
    ids = torch.full((1, most), 5)
    assert model(input_ids=ids).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"max_length is {most + 1}; this model takes at most {most} tokens"):
        check_max_length(model, most + 1)


def test_checkpoint_comes_back_and_is_replaced_whole(tmp_path, tokenizer):
    model, gates = bert(), GateStack(4, 16, 8)
    folder = tmp_path / "runs" / "best"
    save_checkpoint(folder, bert(), tokenizer, gates)
    (folder / "stale.txt").write_text("from before")
    (tmp_path / "runs" / ".best.partial").mkdir()  # as an interrupted run leaves it
    save_checkpoint(folder, model, tokenizer, gates, {"step": 7})
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["best"]
    assert not (folder / "stale.txt").exists()
    assert json.loads((folder / "training.json").read_text()) == {"step": 7}
    again, again_tokenizer = load_classifier(folder, RTE, fine_tuned=True)
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)
    assert again_tokenizer("a b").input_ids == tokenizer("a b").input_ids
    assert torch.equal(GateStack.from_pretrained(folder).weight, gates.weight)


def test_failed_save_leaves_the_old_checkpoint(tmp_path, tokenizer):
    model = bert()
    save_checkpoint(tmp_path / "best", model, tokenizer)
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "best", bert(), tokenizer, state={"not json": object()})
    again, _ = load_classifier(tmp_path / "best", RTE, fine_tuned=True)
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("task", [RTE, MNLI, STSB])
def test_new_head_for_a_task(tmp_path, tokenizer, task):
    pretrained = bert()
    save_checkpoint(tmp_path / "model", pretrained.bert, tokenizer)
    model, _ = load_classifier(tmp_path / "model", task, hidden_dropout_prob=0.25)
    assert model(**batch()).logits.shape == (2, task.num_labels)
    assert tuple(model.config.id2label.values()) == (task.labels or ("score",))
    assert model.config.problem_type == ("regression" if task is STSB else "single_label_classification")
    assert model.config.hidden_dropout_prob == 0.25
    assert torch.equal(model.bert.pooler.dense.weight, pretrained.bert.pooler.dense.weight)


def test_head_of_another_task_is_drawn_anew(tmp_path, tokenizer):
    save_checkpoint(tmp_path / "model", bert(num_labels=3), tokenizer)
    assert load_classifier(tmp_path / "model", RTE)[0].config.num_labels == 2


def test_half_precision_checkpoints_load_as_float32(tmp_path, tokenizer):
    save_checkpoint(tmp_path / "model", bert().bfloat16(), tokenizer)
    model, _ = load_classifier(tmp_path / "model", RTE)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_outputs_have_names_whatever_the_configuration(tmp_path, tokenizer):
    model = bert(return_dict=False)
    assert run_model(model, batch())[0].shape == (2, 2)
    save_checkpoint(tmp_path / "model", model, tokenizer)
    model, _ = load_classifier(tmp_path / "model", RTE)
    assert model(**batch()).logits.shape == (2, 2)


def named(labels):
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (bert(num_labels=3), "num_labels = 3; task rte takes 2"),
        (bert(**named(["not_entailment", "entailment"])), "in this order"),
        (bert(**named(["negative", "positive"])), "has the labels"),
        (bert().bert, "is no finished classifier: it lacks classifier.bias, classifier.weight"),
    ],
    ids=["classes", "order", "other task", "headless"],
)
def test_teachers_of_another_task_are_named(tmp_path, tokenizer, model, message):
    save_checkpoint(tmp_path / "model", model, tokenizer)
    with pytest.raises(ValueError, match=message) as error:
        load_classifier(tmp_path / "model", RTE, fine_tuned=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [["LABEL_0", "LABEL_1"], ["Entailment", "Not Entailment"], ["0", "1"]])
def test_teachers_labels_may_be_plain_or_spelled_otherwise(tmp_path, tokenizer, labels):
    save_checkpoint(tmp_path / "model", bert(**named(labels)), tokenizer)
    model, _ = load_classifier(tmp_path / "model", RTE, fine_tuned=True)
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}


def test_unloadable_models_are_named_in_one_line(tmp_path, tokenizer):
    def message(name, **options):
        with pytest.raises(ValueError) as error:
            load_classifier(name, RTE, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is not a folder" in message(tmp_path / "missing")
    assert "is not a folder" in message(str(tmp_path / "missing"))
    assert "without config.json" in message(tmp_path)
    assert "is no folder here and could not be loaded" in message("nobody/nothing")
    save_checkpoint(tmp_path / "run/best", bert(), tokenizer)
    (tmp_path / "run/config.json").write_text("{}")  # the run's settings
    assert f"is a run's folder; its best model is {tmp_path / 'run/best'}" in message(tmp_path / "run")
    good = tmp_path / "good"
    save_checkpoint(good, bert(), tokenizer)
    assert "no configuration entry 'dropuot'" in message(good, dropuot=0.1)
    (good / "model.safetensors").write_bytes(b"damaged")
    assert f"model {good} could not be loaded" in message(good)
    save_checkpoint(good, bert(), tokenizer)
    config = json.loads((good / "config.json").read_text())
    (good / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    assert "lacks 16 of its encoder's weights, such as bert.encoder.layer.4." in message(good)
    small = bert()
    small.resize_token_embeddings(6)
    save_checkpoint(good, small, tokenizer)
    assert "tokenizer of 13 tokens; its embeddings hold 6" in message(good)

"""LAD's baselines: their losses against plain PyTorch, the registry, and whole runs of each."""

import json
import operator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification

from lad_fast import AttentionObjective, GateStack, LADObjective, LayerMapObjective
from lad_fast.cli import main, parse
from lad_fast.data import TokenizedSplit
from lad_fast.glue import get_task
from lad_fast.strategies import STRATEGIES
from lad_fast.training import DistillConfig, distill

LENGTHS = (5, 2, 3)
SIZES = (6, 8, 3)  # L, D, K
OPTIONS = {"temperature": 5.0, "soft_weight": 0.3, "hard_weight": 0.6, "hidden_weight": 50.0}
OBJECTIVES = {
    "skip": lambda **o: LayerMapObjective(*SIZES, "skip", **o),
    "last": lambda **o: LayerMapObjective(*SIZES, "last", **o),
    "skip, normalised": lambda **o: LayerMapObjective(*SIZES, "skip", normalize_states=True, **o),
    "attention": lambda **o: AttentionObjective(*SIZES, **o),
}
LAYOUTS = ("unmasked", "masked", "padded left", "packed")


def inputs(layout="unmasked", dtype=torch.float64, student_size=8):
    """Arguments of an objective for three examples, and a list of (student's, teacher's) states an example."""
    torch.manual_seed(0)
    student = [torch.randn(3, 5, student_size, dtype=dtype) for _ in range(SIZES[2])]
    # So small that attention's weights are mixtures and not choices.
    teacher = [0.5 * torch.randn(3, 5, 8, dtype=dtype) for _ in range(SIZES[0])]
    logits = torch.randn(3, 2, dtype=dtype).requires_grad_(), torch.randn(3, 2, dtype=dtype), torch.tensor([0, 1, 1])
    mask, bounds, keep = None, None, torch.ones(3, 5, dtype=torch.bool)
    if layout != "unmasked":
        keep = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
        keep = keep.flip(1) if layout == "padded left" else keep
        for states in (*student, *teacher):
            states[~keep] = 1e4  # what a loss that took it would show
    if layout == "packed":
        student, teacher = ([h[keep] for h in side] for side in (student, teacher))
        bounds = torch.tensor([0, 5, 7, 10])
    elif layout != "unmasked":
        mask = keep.long()
    student = [h.requires_grad_() for h in student]
    examples = [
        [[h[bounds[i] : bounds[i + 1]] if layout == "packed" else h[i][keep[i]] for h in side] for i in range(3)]
        for side in (student, teacher)
    ]
    arguments = (student, teacher, *logits)
    return arguments, {"attention_mask": mask, "cu_seqlens": bounds}, list(zip(*examples, strict=True))


def plain_losses(name, arguments, examples):
    """The objective example by example: loss, and its K hidden terms."""
    squares = [[], [], []]
    for student, teacher in examples:
        for k in range(3):
            h, states = student[k], torch.stack(teacher)  # (S, D), (L, S, D)
            target = states[3 + k if name == "last" else 2 * k + 1]
            if name == "attention":
                target = torch.tensordot(torch.softmax(states[:, 0] @ h[0], 0), states, 1)
            if name == "skip, normalised":
                h, target = h / h.norm(dim=1, keepdim=True), target / target.norm(dim=1, keepdim=True)
            squares[k].append((h - target) ** 2)
    hidden = torch.stack([OPTIONS["hidden_weight"] / 3 * torch.cat(layer).mean() for layer in squares])
    logits, target, labels = arguments[2:]
    soft = 25 * F.kl_div((logits / 5).log_softmax(1), (target / 5).softmax(1), reduction="batchmean")
    return hidden.sum() + 0.3 * soft + 0.6 * F.cross_entropy(logits, labels), hidden


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("backend", ("torch", "reference"))
def test_losses_and_gradients_are_the_plain_ones(name, layout, backend):
    arguments, where, examples = inputs(layout)
    out = OBJECTIVES[name](**OPTIONS, backend=backend)(*arguments, **where)
    loss, hidden = plain_losses(name, arguments, examples)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.hidden_losses, hidden)
    torch.testing.assert_close(out.hidden_loss + out.logits_loss, out.loss)
    leaves = (*arguments[0], arguments[2])
    for ours, right in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(loss, leaves), strict=True):
        assert right.any()
        torch.testing.assert_close(ours, right)


def test_attention_mixes_and_its_weights_carry_gradients():
    """Else the plain reference would agree with a layer map, or with detached weights, just as well."""
    arguments, where, examples = inputs()
    student, teacher = examples[0]
    weights = torch.softmax(torch.stack([h[0] for h in teacher]) @ student[0][0], 0)
    assert weights.max() < 0.9
    out = OBJECTIVES["attention"](**OPTIONS)(*arguments, **where)
    (whole,) = torch.autograd.grad(out.hidden_loss, arguments[0][:1])
    targets = torch.tensordot(weights.detach(), torch.stack(teacher), 1)
    squares = OPTIONS["hidden_weight"] / 3 * ((student[0] - targets) ** 2).sum() / (3 * 5 * 8)
    (detached,) = torch.autograd.grad(squares, arguments[0][:1])
    assert not torch.allclose(whole[0, 0], detached[0, 0])
    torch.testing.assert_close(whole[0, 1:], detached[0, 1:])  # the weights are the first token's


@pytest.mark.parametrize("name", OBJECTIVES)
def test_triton_and_half_precision_follow(name):
    arguments, where, _ = inputs("masked", torch.float32)
    objective = OBJECTIVES[name](**OPTIONS)
    right = objective(*arguments, **where, backend="reference").loss
    torch.testing.assert_close(objective(*arguments, **where, backend="triton").loss, right)
    with torch.autocast("cpu", torch.bfloat16):  # takes no product of an objective in half precision
        torch.testing.assert_close(objective(*arguments, **where, backend="torch").loss, right)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtypes", ((torch.float32, torch.bfloat16), (torch.float64, torch.float32)))
def test_the_teachers_dtype_may_differ(name, dtypes):
    (student, teacher, *rest), where, _ = inputs("masked", dtypes[0])
    teacher = [h.to(dtypes[1]) for h in teacher]
    objective = OBJECTIVES[name](**OPTIONS, backend="torch")
    right = objective(student, [h.to(dtypes[0]) for h in teacher], *rest, **where).loss
    torch.testing.assert_close(objective(student, teacher, *rest, **where).loss, right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_that_is_not_finite_reaches_no_gradient(name):
    """Nor where an example is of padding alone."""
    arguments, where, _ = inputs("masked", torch.float32)
    where["attention_mask"][1] = 0
    for states in (*arguments[0], *arguments[1]):
        states.data[where["attention_mask"] == 0] = torch.nan
    out = OBJECTIVES[name](**OPTIONS, backend="torch")(*arguments, **where)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.loss, arguments[0]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_another_hidden_size_is_projected_and_trained(name):
    arguments, where, _ = inputs("masked", torch.float32, student_size=5)
    objective = OBJECTIVES[name](**OPTIONS, student_hidden_size=5, backend="torch")
    projected = [project(h) for project, h in zip(objective.projections, arguments[0], strict=True)]
    out = objective(*arguments, **where)
    plain = OBJECTIVES[name](**OPTIONS, backend="torch")(projected, *arguments[1:], **where)
    torch.testing.assert_close(out.loss, plain.loss)
    out.loss.backward()
    assert len(list(objective.parameters())) == 6
    assert all(parameter.grad.any() for parameter in objective.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    objective = OBJECTIVES[name](**OPTIONS, backend="torch")
    for layout in ("masked", "packed"):
        arguments, where, _ = inputs(layout, torch.float32)
        compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments, **where).loss, objective(*arguments, **where).loss)


MAPS = (("skip", 12, 5, (1, 3, 5, 7, 9)), ("last", 12, 5, (7, 8, 9, 10, 11)), ("last", 4, 4, (0, 1, 2, 3)))


@pytest.mark.parametrize(("layer_map", "num_layers", "students", "layers"), MAPS)
def test_layer_maps(layer_map, num_layers, students, layers):
    assert LayerMapObjective(num_layers, 4, students, layer_map).layers == layers
    if layer_map == "skip":
        assert LADObjective(GateStack(num_layers, 4, 4), students).layers == layers


def call(objective, drop=0, **where):
    (student, teacher, *rest), _, _ = inputs("unmasked", torch.float32)
    return objective(student, teacher[drop:], *rest, **where)


WRONG = {
    "layer map": (lambda: LayerMapObjective(6, 8, 3, "first"), ValueError, "layer_map is 'first'; it takes one of"),
    "flag": (lambda: LayerMapObjective(6, 8, 3, normalize_states=1), TypeError, "normalize_states is 1"),
    "layers": (lambda: AttentionObjective(2, 8, 3), ValueError, "num_student_layers is 3; it takes 1 to 2"),
    "size": (lambda: AttentionObjective(6, 0, 3), ValueError, "hidden_size is 0; it takes an integer of at least 1"),
    "teacher's layers": (lambda: call(AttentionObjective(*SIZES), 1), ValueError, "teacher_hidden_states holds 5"),
    "teacher's size": (lambda: call(AttentionObjective(6, 9, 3)), ValueError, "they take hidden_size = 9"),
    "both layouts": (
        lambda: call(AttentionObjective(*SIZES), attention_mask=torch.ones(3, 5), cu_seqlens=[0, 15]),
        ValueError, r"teacher_hidden_states\[0\] has shape \(3, 5, 8\); it takes \(tokens, D\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_by_name(case):
    action, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        action()


def test_the_command_line_takes_the_registry(capsys):
    common = ["distill", "--task", "rte", "--teacher", "t", "--output-dir", "o"]
    for name in STRATEGIES:
        assert parse([*common, "--method", name]).method == name
    assert main(["distill", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"--method {{{','.join(STRATEGIES)}}}" in text
    for name, strategy in STRATEGIES.items():
        assert f"{name}: {strategy.summary}" in text


def bert(num_layers=4, seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=24, hidden_size=16, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16,
        num_hidden_layers=num_layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def split(num_examples, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(4, 13, num_examples)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = random.integers(4, 24, offsets[-1]).astype(np.int32)
    labels = random.integers(0, 2, num_examples)
    return TokenizedSplit(get_task("rte"), "train", ids, None, offsets, labels, np.arange(num_examples))


def settings(folder, **options):
    defaults = {
        "task": "rte", "teacher": "", "output_dir": folder, "student_layers": 2, "batch_size": 8, "epochs": 2,
        "max_length": 16, "log_every": 1, "learning_rate": 3e-3, "hidden_weight": 10.0, "progress": False,
        "device": "cpu", "precision": "float32", "backend": "torch",
    }  # fmt: skip
    return DistillConfig(**defaults | options)


def run(folder, **options):
    """Ten steps: the result, and the log's lines with losses."""
    data = {"train": split(36), "evaluation": {"validation": split(24, seed=1)}}
    result = distill(settings(folder, **options), **data, teacher=bert(), student=bert(num_layers=2, seed=1))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return result, [line for line in log if "loss" in line]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_of_each(tmp_path, name):
    result, losses = run(tmp_path, method=name)
    assert result.steps == len(losses) == 10
    assert ("hidden_loss" in losses[0]) == STRATEGIES[name].uses_hidden_states
    assert all(("gates" in line) == (name == "lad") for line in result.history)
    assert (result.output_dir / "best" / "gates.safetensors").exists() == (name == "lad")
    if STRATEGIES[name].uses_hidden_states:
        assert len(losses[0]["hidden_losses"]) == 2
        assert losses[-1]["hidden_loss"] < losses[0]["hidden_loss"]


@pytest.mark.parametrize("name", ["skip", "attention"])
def test_engine_options_change_no_result(tmp_path, name):
    """float32 sums over another width of the batch, through 10 steps of AdamW,."""
    plain, right = run(tmp_path / "plain", method=name, teacher_cache="off", padding="longest")
    engines = ({"teacher_cache": "cpu", "padding": "longest"}, {"teacher_cache": "cpu", "padding": "packed"})
    for i, options in enumerate(engines):
        result, losses = run(tmp_path / str(i), method=name, **options)
        ours, expected = ([line["loss"] for line in log] for log in (losses, right))
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=2e-5, atol=0)
        a, b = result.model.classifier.weight, plain.model.classifier.weight
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_normalised_states_make_another_loss(tmp_path):
    _, plain = run(tmp_path / "plain", method="last", epochs=1)
    _, normalised = run(tmp_path / "normalised", method="last", epochs=1, normalize_states=True)
    assert normalised[0]["logits_loss"] == plain[0]["logits_loss"]
    assert normalised[0]["hidden_loss"] < 0.5 * plain[0]["hidden_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "first"}, "method is 'first'; it takes one of lad, skip, last, attention, logits, none"),
        ({"method": "attention", "hidden_weight": -1.0}, "hidden_weight is -1.0; it takes a number of at least 0"),
        ({"method": "logits", "soft_weight": -3.0}, "soft_weight is -3.0; it takes a number of at least 0"),
        ({"method": "logits", "hard_weight": float("nan")}, "hard_weight is nan; it takes a number of at least 0"),
        ({"method": "none", "temperature": float("nan")}, "temperature is nan; it takes a number above 0"),
        ({"temperature": float("inf")}, "temperature is inf; it takes a number above 0"),
        ({"soft_weight": "half"}, "soft_weight is 'half'; it takes a number"),
        ({"method": "logits", "temperature": "hot"}, "temperature is 'hot'; it takes a number"),
        ({"device": "meta"}, "device is 'meta'; it takes auto, cpu, cuda or cuda:N"),
        ({"normalize_states": True}, "normalize_states is True; it goes with method skip or last, not lad"),
        ({"method": "skip", "normalize_states": "yes"}, "normalize_states is 'yes'; it takes True or False"),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        distill(settings(tmp_path, **options), train=split(8), evaluation={}, teacher=bert())


def test_strategies_name_what_they_use():
    assert [name for name, strategy in STRATEGIES.items() if not strategy.uses_teacher] == ["none"]
    config = DistillConfig(task="rte", teacher="", output_dir="")
    student, teacher = bert(num_layers=2).config, bert().config
    for name, strategy in STRATEGIES.items():
        if strategy.uses_teacher:
            objective = strategy.make(replace(config, method=name), teacher, student)
            assert hasattr(objective, "projections") == strategy.uses_hidden_states
            assert (getattr(objective, "gates", None) is not None) == (name == "lad")


MADE = {
    "lad": {"layers": (1, 3), "gates.norm": "token", "gates.reverse": True, "gates.seq_len": 7},
    "skip": {"layers": (1, 3), "normalize_states": True},
    "last": {"layers": (2, 3), "normalize_states": True},
    "attention": {},
}


@pytest.mark.parametrize("name", MADE)
def test_settings_reach_the_objective(name):
    config = DistillConfig(
        task="rte", teacher="", output_dir="", method=name, hidden_weight=7.0, normalize_states=True, norm="token",
        reverse=True, max_length=7,
    )  # fmt: skip
    objective = STRATEGIES[name].make(config, bert().config, bert(num_layers=2).config, temperature=3.0)
    assert (objective.hidden_weight, objective.temperature, objective.num_student_layers) == (7.0, 3.0, 2)
    for place, value in MADE[name].items():
        assert operator.attrgetter(place)(objective) == value, place


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_packed_example_without_tokens_counts_none(name):
    """At the end, where its first row would be behind the last."""
    arguments, where, _ = inputs("packed")
    objective = OBJECTIVES[name](**OPTIONS, backend="torch")
    right = objective(*arguments, **where)
    student, teacher, student_logits, teacher_logits, labels = arguments
    more = [torch.cat([values, values[:1]]) for values in (student_logits, teacher_logits, labels)]
    found = objective(student, teacher, *more, cu_seqlens=torch.tensor([0, 5, 7, 10, 10]))
    torch.testing.assert_close(found.hidden_losses, right.hidden_losses)

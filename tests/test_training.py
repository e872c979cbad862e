"""The training step against a plain loop, and whole runs on data made here."""

import copy
import json
import math
import sys
import types
from functools import partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    get_linear_schedule_with_warmup,
)

from lad_fast import GateStack, LADObjective, fused_distill_loss, reference
from lad_fast.data import Batches, TokenizedSplit
from lad_fast.glue import TASKS, get_task
from lad_fast.kernels import launch
from lad_fast.models import build_student, load_classifier, model_inputs, run_model, save_checkpoint
from lad_fast.optimizers import has_apex, make_adamw
from lad_fast.step import DistillStep, clip_each_gate_, frozen_twin
from lad_fast.teacher_cache import PADDED_ALIKE
from lad_fast.training import (
    RECIPES,
    DistillConfig,
    FinetuneConfig,
    distill,
    evaluate,
    fastest_precision,
    finetune,
    recipe,
)

RTE, MNLI, STSB = get_task("rte"), get_task("mnli"), get_task("stsb")
WORDS = 24  # ids 4 to 13 speak for class 0, 14 to 23 for class 1


def bert(task=RTE, num_layers=4, hidden_size=16, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=hidden_size, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_hidden_layers=num_layers, num_labels=task.num_labels,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, initializer_range=0.2,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def split(num_examples, task=RTE, seed=0, shortest=4, longest=12, name="train"):
    """Examples whose words mostly come from their class's half of the vocabulary."""
    random = np.random.default_rng(seed)
    lengths = random.integers(shortest, longest + 1, num_examples)
    classes = random.integers(0, 2, num_examples)
    ids = [
        np.concatenate([[2], 4 + 10 * (half ^ (random.random(n - 2) < 0.1)) + random.integers(0, 10, n - 2), [3]])
        for n, half in zip(lengths, classes, strict=True)
    ]
    labels = classes.astype(np.float32) * 5 if task.is_regression else classes
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenizedSplit(
        task, name, np.concatenate(ids).astype(np.int32), None, offsets, labels, np.arange(num_examples)
    )


def batches(num_examples, batch_size, **options):
    return list(Batches(split(num_examples, **options), batch_size, 0, shuffle=False))


def make_step(task=RTE, student_hidden_size=16, seed=0, mask_padding=True, reverse=False, backend="torch", **options):
    teacher = bert(task, seed=seed)
    student = bert(task, 2, student_hidden_size, seed=seed + 1)
    torch.manual_seed(seed)
    objective = LADObjective(
        GateStack(4, 16, 16, reverse=reverse), 2, hidden_weight=100.0, regression=task.is_regression,
        student_hidden_size=student_hidden_size, backend=backend,
    )  # fmt: skip
    settings = {
        "learning_rate": 1e-2,
        "gate_learning_rate": 3e-2,
        "total_steps": 6,
        "warmup_steps": 2,
        "weight_decay": 0.1,
    }
    return DistillStep(student, teacher, objective, mask_padding=mask_padding, **settings | options)


def plain_loop(step, data, hidden_weight=100.0):
    """The published way: a backward for each loss, an optimizer a side, a clip for each gate."""
    student, teacher = step.student, step.teacher
    gates = [
        [torch.nn.Parameter(p[i].detach().clone()) for p in (step.gates.weight, step.gates.bias,
                                                            step.gates.norm_weight, step.gates.norm_bias)]
        for i in range(3)
    ]  # fmt: skip
    decayed = [p for n, p in student.named_parameters() if not ("bias" in n or "LayerNorm.weight" in n)]
    plain = [p for n, p in student.named_parameters() if "bias" in n or "LayerNorm.weight" in n]
    optimizers = [
        torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0}], lr=1e-2),
        torch.optim.AdamW(
            [
                {"params": [gate[0] for gate in gates], "weight_decay": 0.1},
                {"params": [p for gate in gates for p in gate[1:]], "weight_decay": 0},
            ],
            lr=3e-2,
        ),
    ]
    schedules = [get_linear_schedule_with_warmup(optimizer, 2, 6) for optimizer in optimizers]
    history = []
    for batch in data:
        labels = batch["labels"]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        out = student(**inputs, output_hidden_states=True)
        with torch.no_grad():
            target = teacher(**inputs, output_hidden_states=True)
        aggregates = reference.aggregate(
            target.hidden_states[1:], tuple(torch.stack(tensors) for tensors in zip(*gates, strict=True)),
            (1, 3), batch["attention_mask"],
        )  # fmt: skip
        real = batch["attention_mask"].bool()
        hidden = [
            hidden_weight / 2 * F.mse_loss(mine[real], aggregate[real])
            for mine, aggregate in zip(out.hidden_states[1:], aggregates, strict=True)
        ]
        if labels.is_floating_point():
            logits = 0.5 * F.mse_loss(out.logits[:, 0], labels) + 0.5 * F.mse_loss(out.logits, target.logits)
        else:
            soft = F.kl_div(
                F.log_softmax(out.logits / 10, -1), F.softmax(target.logits / 10, -1), reduction="batchmean"
            )
            logits = 0.5 * F.cross_entropy(out.logits, labels) + 0.5 * 100 * soft
        for loss in (*hidden, logits):
            loss.backward(retain_graph=True)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for gate in gates:
            torch.nn.utils.clip_grad_norm_(gate, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        history.append([logits.item(), *(loss.item() for loss in hidden)])
    return history, gates


@pytest.mark.parametrize("student", ("sdpa", "eager"))
@pytest.mark.parametrize("teacher", ("sdpa", "eager"))
def test_padding_is_hidden_from_each_models_attention(teacher, student):
    step, (batch,) = make_step(), batches(8, 8)
    step.teacher.set_attn_implementation(teacher)
    step.student.set_attn_implementation(student)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert not inputs["attention_mask"].all()
    with torch.no_grad():
        outputs = [model(**inputs, output_hidden_states=True) for model in (step.student, step.teacher)]
        right = step.objective(*outputs, labels=batch["labels"], attention_mask=batch["attention_mask"]).loss
    torch.testing.assert_close(step.losses(batch)["loss"].detach(), right, rtol=1e-5, atol=0)  # sums in another order


@pytest.mark.parametrize("task", [RTE, STSB], ids=["classes", "regression"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_steps_are_those_of_a_plain_loop(task, backend):
    data = batches(24, 4, task=task)
    ours, theirs = make_step(task, backend=backend), make_step(task)
    losses = [ours(batch) for batch in data]
    history, gates = plain_loop(theirs, data)

    actual = torch.stack([torch.stack([loss["logits_loss"], *loss["hidden_losses"]]) for loss in losses])
    torch.testing.assert_close(actual, torch.tensor(history), rtol=1e-4, atol=0)
    for name in ("loss", "hidden_loss", "logits_loss", "hidden_losses"):
        assert all(not loss[name].requires_grad for loss in losses), name
    start = make_step(task)
    initial = start.student.state_dict()
    for name, value in ours.student.state_dict().items():
        # A key bias has no gradient but rounding, which AdamW scales up.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(value, theirs.student.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)
            # Token types other than 0 and the padding do not occur: nothing moves those rows but decay.
            assert "position_ids" in name or not torch.equal(value, initial[name]), f"{name} was not trained"
    for i, gate in enumerate(gates):
        for name, value in zip(("weight", "bias", "norm_weight", "norm_bias"), gate, strict=True):
            mine = getattr(ours.gates, name)[i]
            torch.testing.assert_close(mine, value, rtol=1e-3, atol=1e-4, msg=f"{name}[{i}]")
            assert not torch.equal(mine, getattr(start.gates, name)[i]), f"{name}[{i}] was not trained"


def test_published_semantics_count_padding():
    data = batches(8, 8)[0]
    assert not data["attention_mask"].all()
    masked, counted = (make_step(mask_padding=mask).losses(data) for mask in (True, False))
    assert masked["logits_loss"] == counted["logits_loss"]
    assert not torch.isclose(masked["hidden_loss"], counted["hidden_loss"], rtol=1e-3)


@pytest.mark.parametrize("sizes", [(4, 4), (6, 2)])
def test_accumulated_parts_are_the_whole_batch(sizes):
    (whole,) = batches(8, 8, shortest=12)  # no padding, so a mean over tokens is one over examples
    parts = [{n: v[i : i + size] for n, v in whole.items()} for i, size in ((0, sizes[0]), (sizes[0], sizes[1]))]
    at_once, in_parts = make_step(), make_step()
    for _ in range(3):
        losses, accumulated = at_once(whole), in_parts(*parts)
        for name, value in losses.items():
            torch.testing.assert_close(accumulated[name], value, rtol=1e-5, atol=0)
    for (name, a), b in zip(at_once.student.named_parameters(), in_parts.student.parameters(), strict=True):
        if not name.endswith("key.bias"):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(at_once.gates.weight, in_parts.gates.weight, rtol=1e-3, atol=1e-4)


def engine_losses(tmp_path, layers=(4, 2), **options):
    """The losses of a whole run of two epochs, and its student and gates; ``layers`` of teacher and student."""
    config = settings(tmp_path, log_every=1, hidden_weight=10.0, **options)
    torch.manual_seed(0)
    models = {"teacher": bert(num_layers=layers[0]), "student": bert(num_layers=layers[1], seed=1)}
    result = distill(config, train=split(36), evaluation={}, **models)
    losses = [line["loss"] for line in lines(config.output_dir) if "loss" in line]
    return torch.tensor(losses), result, json.loads((config.output_dir / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_train_in_float32(tmp_path, dtype):
    """As ``from_pretrained`` gives them; in bfloat16 most of AdamW's steps would round to nothing."""
    student, model = bert(num_layers=2, seed=1).to(dtype), bert(seed=3).to(dtype)
    with pytest.raises(ValueError, match="weights train in float32"):
        DistillStep(student, learning_rate=1e-3, total_steps=1, warmup_steps=0)
    distill(settings(tmp_path / "a", epochs=1), train=split(36), evaluation={}, teacher=bert(), student=student)
    finetune(settings(tmp_path / "b", FinetuneConfig, epochs=1), train=split(36), evaluation={}, model=model)
    for trained in (student, model):
        assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}


def test_gradients_from_before_a_run_are_not_of_it(tmp_path):
    losses = []
    for before in (False, True):
        student = bert(num_layers=2, seed=1)
        if before:
            sum(parameter.sum() for parameter in student.parameters()).backward()
        config = settings(tmp_path / str(before), epochs=1, log_every=1)
        distill(config, train=split(36), evaluation={}, teacher=bert(), student=student)
        losses.append([line["loss"] for line in lines(config.output_dir) if "loss" in line])
    assert losses[0] == losses[1]


ENGINES = {
    "cached": {"teacher_cache": "cpu"},
    "cached on disk": {"teacher_cache": "disk"},
    "packed": {"padding": "packed"},
    "packed and cached": {"padding": "packed", "teacher_cache": "cpu"},
    "accumulating and cached": {"gradient_accumulation_steps": 2, "teacher_cache": "cpu"},
    "padding counted, cached": {"padding": "max_length", "mask_padding": False, "teacher_cache": "cpu"},
    "token norm, packed": {"norm": "token", "padding": "packed"},
    "logits only, packed and cached": {"method": "logits", "padding": "packed", "teacher_cache": "cpu"},
    "labels only, packed": {"method": "none", "padding": "packed"},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_option_changes_no_result(tmp_path, engine):
    """Every loss of a run with the option, and its last weights, are the plain run's."""
    options = {"padding": "longest", "teacher_cache": "off"} | ENGINES[engine]
    plain = {name: value for name, value in options.items() if name not in ("teacher_cache", "padding")}
    plain["padding"] = "max_length" if options["padding"] == "max_length" else "longest"
    ours, result, _ = engine_losses(tmp_path / "ours", **options)
    right, expected, _ = engine_losses(tmp_path / "plain", teacher_cache="off", **plain)
    # float32 sums over another width of the batch, through up to 10 AdamW steps
    torch.testing.assert_close(ours, right, rtol=2e-5, atol=0)
    for (name, value), other in zip(result.model.named_parameters(), expected.model.parameters(), strict=True):
        if not name.endswith("key.bias"):
            torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4, msg=name)
    assert len(set(ours.tolist())) == len(ours) > 4


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "method"), [("inductor", "none"), ("eager", "lad")])
def test_compiled_encoders_change_no_result(tmp_path, monkeypatch, backend, method):
    """By Inductor a student alone: it takes its time by the layer, and runs a compiler."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    options = {"teacher_cache": "off", "epochs": 1, "layers": (2, 1), "method": method}
    ours, _, _ = engine_losses(tmp_path / "ours", compile=True, **options)
    right, _, _ = engine_losses(tmp_path / "plain", **options)
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=0)


@pytest.mark.cuda
def test_graphs_change_no_result(tmp_path):
    options = {"device": "cuda", "backend": None, "batch_size": 4, "epochs": 4, "padding": "longest"}
    ours, _, _ = engine_losses(tmp_path / "ours", cuda_graphs=True, **options)
    right, _, _ = engine_losses(tmp_path / "plain", **options)
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=0)


def test_cached_epochs_run_no_teacher(tmp_path, monkeypatch):
    teacher, calls = bert(), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    distill(settings(tmp_path, epochs=3), train=split(36), evaluation={}, teacher=teacher)
    assert len(calls) == 5  # one epoch's batches


def test_a_cache_makes_itself_only_where_batches_come_back(tmp_path):
    for name, epochs, place in (("one", 1, "off"), ("two", 2, "cpu")):
        assert engine_losses(tmp_path / name, epochs=epochs)[2]["teacher_cache"] == place
    varying = engine_losses(tmp_path / "varying", mask_padding=False, padding="longest")
    assert varying[2]["teacher_cache"] == "off"


@pytest.mark.parametrize("kind", [*sorted(PADDED_ALIKE), "convbert"])
def test_an_examples_states_whatever_the_batchs_width(tmp_path, caplog, kind):
    """The same for kinds whose outputs are cached by themselves; of others a run warns that was told to."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    if kind == "distilbert":
        sizes = {"dim": 16, "n_heads": 2, "hidden_dim": 32, "n_layers": 2}
    config = AutoConfig.for_model(
        kind, vocab_size=24, max_position_embeddings=40, initializer_range=0.2, pad_token_id=0, embedding_size=16,
        intra_bottleneck_size=16, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **sizes,
    )  # fmt: skip
    teacher = AutoModelForSequenceClassification.from_config(config).eval()
    narrow = torch.randint(3, 24, (2, 6))
    wide = torch.cat([narrow, torch.zeros(2, 7, dtype=torch.long)], dim=1)
    (a, x), (b, y) = (
        run_model(teacher, model_inputs(teacher, {"input_ids": ids, "attention_mask": (ids != 0).long()})[0], True)
        for ids in (narrow, wide)
    )
    pairs = zip((a[:, None], *x), (b[:, None], *y), strict=True)
    is_alike = all(torch.allclose(s, t[:, :6], rtol=1e-4, atol=1e-5) for s, t in pairs)
    assert is_alike == (kind in PADDED_ALIKE)
    if kind == "convbert":
        for place, found in (("auto", "off"), ("cpu", "cpu")):
            config = settings(tmp_path / place, teacher_cache=place)
            distill(config, train=split(36), evaluation={}, teacher=teacher, student=bert(num_layers=2))
            assert json.loads((config.output_dir / "config.json").read_text())["teacher_cache"] == found
        assert caplog.text.count("convbert") == 1


def test_half_precision_caches_follow_the_uncached_run(tmp_path):
    cached, _, _ = engine_losses(tmp_path / "cached", precision="bfloat16", teacher_cache="cpu")
    plain, _, _ = engine_losses(tmp_path / "plain", precision="bfloat16", teacher_cache="off")
    # A target's rounding to bfloat16 is 2^-9 of it; the loss is its squared distance to the student.
    torch.testing.assert_close(cached, plain, rtol=2e-2, atol=0)
    assert not torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "packed", "mask_padding": False}, "padding is 'packed'; without mask_padding padding counts"),
        ({"teacher_cache": "gpu"}, "teacher_cache is 'gpu'; training on the CPU takes 'cpu', 'disk' or 'off'"),
        ({"teacher_cache": "cpu", "mask_padding": False, "padding": "longest"}, "teacher_cache is 'cpu'; where"),
        ({"cuda_graphs": True}, "cuda_graphs takes a GPU and padded batches"),
        ({"optimizer": "apex"}, "optimizer is 'apex'; NVIDIA's apex, with FusedAdam, is not installed"),
        ({"teacher_cache": "tape"}, "teacher_cache is 'tape'; it takes one of auto, gpu, cpu, disk, off"),
        ({"padding": "none"}, "padding is 'none'; it takes one of auto, longest, packed, max_length"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; it takes one of auto, torch, apex"),
        ({"precision": "int8"}, "precision is 'int8'; it takes one of auto, float32, tf32, bfloat16, float16"),
    ],
)  # fmt: skip
def test_engine_options_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        engine_losses(tmp_path, **options)


def test_auto_is_written_as_what_it_came_to(tmp_path):
    config = engine_losses(tmp_path, precision="auto", padding="auto")[2]
    assert config["precision"] == fastest_precision(torch.device("cpu")) in ("float32", "bfloat16")
    assert config["padding"] == "longest"


def test_a_precision_that_the_processor_does_not_multiply_in_is_warned_of(tmp_path, caplog, monkeypatch):
    warned = "this processor has no bfloat16 products: precision 'float32' is several times faster"
    for emulated in (False, True):
        monkeypatch.setattr("lad_fast.training.emulates", lambda dtype, emulated=emulated: emulated)
        engine_losses(tmp_path / str(emulated), precision="bfloat16")
        assert (warned in caplog.text) == emulated


def test_gates_are_clipped_one_by_one():
    gates = GateStack(5, 6, 3)
    for parameter in gates.parameters():
        parameter.grad = torch.randn_like(parameter) * torch.tensor([0.01, 1, 100, 0]).view(
            -1, *[1] * (parameter.dim() - 1)
        )
    single = [[torch.nn.Parameter(p[i].detach().clone()) for p in gates.parameters()] for i in range(4)]
    for i, tensors in enumerate(single):
        for tensor, parameter in zip(tensors, gates.parameters(), strict=True):
            tensor.grad = parameter.grad[i].clone()
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
    clip_each_gate_(gates, 1.0)
    for i, tensors in enumerate(single):
        for tensor, parameter in zip(tensors, gates.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad[i], tensor.grad)


def test_gates_nothing_learns_from_are_only_decayed():
    step = make_step(reverse=True)  # targets are layers 4 and 2, so the chain's last gate (layer 1) has no part
    before = {name: value.clone() for name, value in step.gates.state_dict().items()}
    data = batches(12, 4)
    for batch in data:
        step(batch)
    # Rates of steps 0 to 2 are 0, 1/2 and 1 of the peak.
    torch.testing.assert_close(step.gates.weight[2], before["weight"][2] * (1 - 0.015 * 0.1) * (1 - 0.03 * 0.1))
    assert torch.equal(step.gates.bias[2], before["bias"][2])
    assert torch.equal(step.gates.norm_weight[2], before["norm_weight"][2])
    assert not torch.equal(step.gates.bias[1], before["bias"][1])


def test_teacher_and_its_mode_stay_as_they_are():
    step = make_step()
    before = copy.deepcopy(step.teacher.state_dict())
    step(batches(4, 4)[0])
    assert step.student.training
    assert not step.teacher.training
    assert all(parameter.grad is None for parameter in step.teacher.parameters())
    for name, value in step.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("before", ["float32", "float16"])
def test_a_step_takes_up_the_state_of_one_in_another_precision(before, precision):
    data = batches(8, 8)
    old, new = make_step(precision=before), make_step(seed=5, precision=precision)
    old(*data)
    new.load_state_dict(old.state_dict())
    assert all(torch.equal(v, new.student.state_dict()[n]) for n, v in old.student.state_dict().items())
    kept = old.scaler.get_scale() if before == precision == "float16" else 2.0**16
    assert new.scaler.get_scale() == (kept if precision == "float16" else 1.0)
    new(*data)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_step_over_no_batch_is_refused(precision):
    with pytest.raises(ValueError, match="batches is empty"):
        make_step(precision=precision)()


def test_projections_are_trained_with_the_student():
    step = make_step(student_hidden_size=8)
    before = [projection.weight.clone() for projection in step.objective.projections]
    for batch in batches(8, 4):
        step(batch)
    for projection, start in zip(step.objective.projections, before, strict=True):
        assert not torch.equal(projection.weight, start)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_teacher_kept_in_half_gives_what_autocast_gives(precision):
    step, data = make_step(precision=precision), batches(8, 8)[0]
    original = make_step().teacher
    inputs = step.prepare(data).inputs
    with step.autocast(), torch.no_grad():
        (logits, states), right = step._run_teacher(inputs), original(**inputs, output_hidden_states=True)
    assert torch.equal(logits, right.logits.float())
    assert all(torch.equal(a, b) for a, b in zip(states, right.hidden_states[1:], strict=True))
    kept = {parameter.dtype for parameter in step.teacher.parameters()}
    assert kept == {torch.float32, getattr(torch, precision)}
    assert step.teacher.bert.embeddings.word_embeddings.weight.dtype == torch.float32


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_teacher_on_a_cpu_keeps_its_weights_as_onednn_wants_them(precision, onednn):
    """Weights and names stay as they were; the products are oneDNN's on the layout made once, as exact as PyTorch's."""
    if launch.onednn_linear(torch.empty(0, dtype=getattr(torch, precision))) is None:
        pytest.skip(f"no {precision} products of oneDNN here")
    step, data = make_step(precision=precision), batches(8, 8)[0]
    original = make_step().teacher
    layers = [module for module in step.teacher.modules() if isinstance(module, torch.nn.Linear)]
    assert all(layer.laid_out.is_mkldnn for layer in layers) and len(layers) == 4 * 6 + 2
    assert list(step.teacher.state_dict()) == list(original.state_dict())
    with step.autocast(), torch.no_grad():
        logits, states = step._run_teacher(step.prepare(data).inputs)
    inputs = step.prepare(data).inputs
    with torch.no_grad():
        right = original.double()(**inputs, output_hidden_states=True)
    tolerance = {"float32": 1e-5, "bfloat16": 5e-2}[precision]
    for ours, theirs in zip((logits, *states), (right.logits, *right.hidden_states[1:]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    # A weight that is changed in place now shows in neither: the layout was made when the step was.
    for layer in layers:
        layer.weight.data.zero_()
    with step.autocast(), torch.no_grad():
        assert torch.equal(step._run_teacher(inputs)[0], logits)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_teacher_in_the_other_half_precision(precision):
    """On a CPU its norms would refuse what autocast makes; its hidden states are those of its weights in float32."""
    other = {"bfloat16": torch.float16, "float16": torch.bfloat16}[precision]
    twin, inputs = frozen_twin(bert().to(other), getattr(torch, precision)), batches(8, 8)[0]
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float32, getattr(torch, precision)}
    with torch.no_grad(), torch.autocast("cpu", getattr(torch, precision)):
        logits = twin(**inputs).logits
    expected = bert().to(other).double()(**inputs).logits
    torch.testing.assert_close(logits.double(), expected, rtol=5e-2, atol=5e-2)  # of weights rounded twice


def test_a_compiled_teacher_kept_in_half_is_compiled():
    teacher = bert()
    assert frozen_twin(teacher, torch.bfloat16).base_model._compiled_call_impl is None
    teacher.base_model.compile()
    assert frozen_twin(teacher, torch.bfloat16).base_model._compiled_call_impl is not None


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_follows_float32(precision):
    data = batches(24, 8)
    exact, rough = make_step(), make_step(precision=precision)
    if precision == "float16":  # a scale that overflows nowhere, so that no step is skipped
        rough.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for batch in data:
        expected, actual = exact(batch)["loss"], rough(batch)["loss"]
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0)
        assert actual != expected
    # AdamW takes no notice of a gradient's scale, but its first moment tells whether clipping saw the true one.
    for mine, theirs in zip(rough.student_parameters, exact.student_parameters, strict=True):
        if mine is rough.student.classifier.weight:
            moments = [step.optimizer.state[p]["exp_avg"] for step, p in ((rough, mine), (exact, theirs))]
            torch.testing.assert_close(*moments, rtol=0.2, atol=moments[1].abs().max().item() * 0.1)
    assert {parameter.dtype for parameter in rough.student.parameters()} == {torch.float32}


def test_a_step_whose_float16_gradients_overflow_is_skipped():
    step = make_step(precision="float16", warmup_steps=1, total_steps=4)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = make_step()
    for batch in batches(12, 4):
        step(batch)
    for name, value in step.student.state_dict().items():
        assert torch.equal(value, before.student.state_dict()[name]), name
    assert torch.equal(step.gates.weight, before.gates.weight)
    assert step.scaler.get_scale() == 2.0**97


class Mute(BertForSequenceClassification):
    """A teacher that keeps its hidden states to itself."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.hidden_states = None
        return output


class Sparse(BertForSequenceClassification):
    """A teacher that gives every other hidden state."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.hidden_states = output.hidden_states[::2]
        return output


@pytest.mark.parametrize(("kind", "found"), [(Mute, "no hidden states"), (Sparse, "3 hidden states")])
def test_teachers_without_hidden_states_are_named(kind, found, tmp_path):
    config = DistillConfig(
        task="rte",
        teacher="",
        output_dir=tmp_path,
        max_length=16,
        progress=False,
        device="cpu",
        backend="torch",
    )
    student = build_student(bert(), 2)
    with pytest.raises(ValueError, match=f"{kind.__name__} of 4 layers gives {found}; LAD takes 5"):
        distill(config, train=split(8), evaluation={}, teacher=kind(bert().config), student=student)


def test_a_batch_of_ones_own():
    """Without a mask every token is real, as in Transformers; without labels there is nothing to train on."""
    data = batches(4, 4, shortest=8, longest=8)[0]
    steps = [make_step(), make_step()]
    right = steps[0](data)
    found = steps[1]({name: data[name] for name in ("input_ids", "labels")})
    assert all(torch.equal(found[name], right[name]) for name in right)
    with pytest.raises(ValueError, match="batch has no labels, only input_ids; training takes labelled ones"):
        steps[1]({"input_ids": data["input_ids"]})


def test_a_teacher_without_an_objective_is_an_error():
    with pytest.raises(ValueError, match="teacher and objective"):
        DistillStep(bert(), bert(), learning_rate=1e-3, total_steps=1, warmup_steps=1)


@pytest.mark.parametrize("share", ("modules", "memory"))
def test_a_teacher_of_the_students_parameters_is_an_error(share):
    student, teacher = bert(num_layers=2), bert()
    if share == "modules":
        student.bert.encoder.layer[1] = teacher.bert.encoder.layer[3]
    else:  # parameters of its own in the memory of the teacher's
        student.bert.encoder.layer[1].load_state_dict(teacher.bert.encoder.layer[3].state_dict(), assign=True)
    options = {"learning_rate": 1e-3, "total_steps": 1, "warmup_steps": 1}
    with pytest.raises(ValueError, match=r"student's bert.encoder.layer.1.*query.weight is the teacher's .*layer.3"):
        DistillStep(student, teacher, LADObjective(GateStack(4, 16, 16), 2), **options)


class Scaled(LADObjective):
    """With a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(GateStack(4, 16, 16), 2, backend="torch")
        self.scale = torch.nn.Parameter(torch.ones(2))

    def forward(self, student_hidden_states, *rest, **options):
        scaled = [h * scale for h, scale in zip(student_hidden_states, self.scale, strict=True)]
        return super().forward(scaled, *rest, **options)


class Tempered(torch.nn.Module):
    """On logits alone."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = torch.nn.Parameter(torch.zeros(1))

    def forward(self, student_logits, teacher_logits, labels):
        return F.mse_loss(student_logits * self.log_temperature.exp(), teacher_logits)


@pytest.mark.parametrize("kind", (Scaled, Tempered))
def test_parameters_of_an_objective_of_ones_own_are_trained_and_kept(kind):
    def make():
        return DistillStep(
            bert(num_layers=2), bert(), kind(), learning_rate=1e-2, total_steps=4, warmup_steps=1, max_grad_norm=1e9
        )

    def own(step):
        return [p for n, p in step.objective.named_parameters() if "gates" not in n]

    step, start, grads = make(), own(make()), []
    for batch in batches(16, 8):
        step(batch)
        grads += [p.grad for p in own(step)]
    assert not any(torch.equal(a, b) for a, b in zip(own(step), start, strict=True))
    assert grads == [None, None]  # zeroed behind each step, as all others
    other = make()
    other.load_state_dict(step.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(own(other), own(step), strict=True))


def test_norms_do_not_decay_by_whatever_name():
    """ModernBERT calls none of its norms LayerNorm."""
    config = ModernBertConfig(
        vocab_size=24, hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    student = ModernBertForSequenceClassification(config)
    step = DistillStep(student, learning_rate=1e-3, total_steps=1, warmup_steps=1, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed, kept = ([names[id(p)] for p in group["params"]] for group in step.optimizer.param_groups)
    assert sorted(decayed + kept) == sorted(names.values())
    assert all("norm" in name or "bias" in name for name in kept) and any("mlp_norm" in name for name in kept)
    assert not any("norm" in name or "bias" in name for name in decayed) and len(decayed) > 8


def test_tf32_ends_with_its_run(tmp_path, monkeypatch):
    """It is the process's setting: a float32 run after one of tf32 would otherwise be in tf32 too."""
    during = []
    real = DistillStep.__call__
    monkeypatch.setattr(
        DistillStep, "__call__",
        lambda *args: (during.append(torch.get_float32_matmul_precision()), real(*args))[1],
    )  # fmt: skip
    engine_losses(tmp_path, precision="tf32")
    assert set(during) == {"high"} and torch.get_float32_matmul_precision() == "highest"


def settings(tmp_path, kind=DistillConfig, **options):
    defaults = {
        "task": "rte", "output_dir": tmp_path / "run", "batch_size": 8, "epochs": 2, "max_length": 16,
        "log_every": 3, "learning_rate": 3e-3, "progress": False, "device": "cpu", "precision": "float32",
    }  # fmt: skip
    # Left to itself the objective would run in Triton's slow interpreter, which the golden replays exercise.
    model = {"teacher": "", "student_layers": 2, "backend": "torch"}
    if kind is FinetuneConfig:
        model = {"model": ""}
    return kind(**defaults | model | options)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_finetune_learns_and_records(tmp_path):
    config = settings(tmp_path, FinetuneConfig, epochs=3)
    evaluation = {"validation": split(64, seed=1)}
    result = finetune(config, train=split(96), evaluation=evaluation, model=bert(seed=3))
    assert result.best_metrics["validation"]["accuracy"] > 0.8
    assert result.steps == 36
    assert result.tokens == 3 * len(split(96).input_ids)
    assert result.seconds > 0
    assert result.num_parameters == sum(p.numel() for p in result.model.parameters())

    losses = [line for line in lines(config.output_dir) if "loss" in line]
    assert [line["step"] for line in losses] == list(range(3, 37, 3))
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert losses[-1]["lr"] == 0
    assert losses[0]["lr"] == pytest.approx(3e-3 * 3 / 4)
    assert all(line["tokens_per_second"] > 0 for line in losses)
    assert all(100 < line["peak_memory_mb"] < 1e5 for line in losses), "of a process that has PyTorch loaded"
    evaluations = [line for line in lines(config.output_dir) if "metrics" in line]
    assert [line["epoch"] for line in evaluations] == [1, 2, 3]
    for line in evaluations:
        confusion = np.array(line["confusion"]["validation"])
        assert confusion.sum(axis=1).tolist() == np.bincount(evaluation["validation"].labels).tolist()
        assert np.trace(confusion) == pytest.approx(64 * line["metrics"]["validation"]["accuracy"])
    assert evaluations == result.history
    saved = json.loads((config.output_dir / "results.json").read_text())
    assert saved["best_metrics"] == result.best_metrics
    assert "model" not in saved
    written = json.loads((config.output_dir / "config.json").read_text())
    assert (written["learning_rate"], written["optimizer"]) == (3e-3, "torch")
    state = json.loads((config.output_dir / "best" / "training.json").read_text())
    assert state["step"] == result.best_step
    assert state["metrics"] == result.best_metrics


@pytest.mark.parametrize("method", ["lad", "logits", "none"])
def test_distill_by_each_method(tmp_path, method):
    config = settings(tmp_path, method=method, hidden_weight=1.0)
    teacher = bert()
    before = copy.deepcopy(teacher.state_dict())
    evaluation = {"validation": split(24, seed=1)}
    result = distill(config, train=split(36), evaluation=evaluation, teacher=teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert result.steps == 10
    first = lines(config.output_dir)[0]
    assert math.isfinite(first["loss"])
    assert ("hidden_loss" in first) == ("gate_lr" in first) == (method == "lad")
    if method == "lad":
        assert first["loss"] == pytest.approx(first["hidden_loss"] + first["logits_loss"], rel=1e-5)
        assert sum(first["hidden_losses"]) == pytest.approx(first["hidden_loss"], rel=1e-5)
    assert (config.output_dir / "last" / "gates.safetensors").exists() == (method == "lad")


def test_methods_differ_in_their_first_loss(tmp_path):
    teacher, train = bert(), split(8)
    first = {}
    for method in ("lad", "logits", "none"):
        config = settings(tmp_path / method, method=method, max_steps=1, log_every=1)
        distill(config, train=train, evaluation={}, teacher=teacher)
        first[method] = lines(config.output_dir)[0]
    (batch,) = Batches(train, 8, 0, shuffle=False)
    student = build_student(teacher, 2)
    logits, target = student(**{n: batch[n] for n in ("input_ids", "attention_mask")}).logits, teacher.eval()(
        **{n: batch[n] for n in ("input_ids", "attention_mask")}
    ).logits  # fmt: skip
    hard = F.cross_entropy(logits, batch["labels"]).item()
    both = fused_distill_loss(logits, target.detach(), batch["labels"], backend="reference").item()
    assert first["none"]["loss"] == pytest.approx(hard, rel=1e-4)
    assert first["logits"]["loss"] == pytest.approx(both, rel=1e-4)
    assert first["lad"]["logits_loss"] == pytest.approx(both, rel=1e-4)
    assert first["lad"]["hidden_loss"] > 0


def test_checkpoints_hold_the_trained_weights(tmp_path):
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])})
    config = settings(tmp_path)
    held_out = split(24, seed=1)
    result = distill(config, train=split(36), evaluation={"validation": held_out}, teacher=bert(), tokenizer=tokenizer)
    data = Batches(held_out, 8, 0, shuffle=False)
    last, _ = load_classifier(config.output_dir / "last", RTE, fine_tuned=True)
    expected = evaluate(result.model, data, RTE)
    actual = evaluate(last, data, RTE)
    assert np.array_equal(actual.logits, expected.logits)
    assert actual.metrics == result.last_metrics["validation"]
    best, _ = load_classifier(config.output_dir / "best", RTE, fine_tuned=True)
    assert evaluate(best, data, RTE).metrics == result.best_metrics["validation"]
    gates = GateStack.from_pretrained(config.output_dir / "last")
    assert (gates.num_layers, gates.hidden_size, gates.seq_len) == (4, 16, 16)
    assert gates.norm_bias.abs().max() > 0


def test_best_is_by_the_mean_over_evaluation_splits(tmp_path, monkeypatch):
    scores = iter([(0.25, 0.5), (0.75, 0.25), (0.5, 0.5)])  # the third no better than the second
    current = []

    def scripted(task, predictions, labels):
        if not current:
            current.extend(next(scores))
        return {"accuracy": current.pop(0)}

    monkeypatch.setattr("lad_fast.training.compute_metrics", scripted)
    config = settings(tmp_path, FinetuneConfig, task="mnli", epochs=3)
    evaluation = {name: split(8, MNLI, name=name) for name in MNLI.eval_splits}
    result = finetune(config, train=split(8, MNLI), evaluation=evaluation, model=bert(MNLI))
    assert result.best_step == 2
    assert result.best_metrics == {
        "validation_matched": {"accuracy": 0.75}, "validation_mismatched": {"accuracy": 0.25},
    }  # fmt: skip
    assert result.last_metrics["validation_mismatched"] == {"accuracy": 0.5}


def test_without_evaluation_best_is_the_last(tmp_path):
    config = settings(tmp_path, FinetuneConfig)
    result = finetune(config, train=split(16), evaluation={}, model=bert())
    assert result.best_step == result.steps == 4
    assert result.best_metrics == {}


@pytest.mark.parametrize(("max_steps", "steps", "epochs"), [(2, 2, 1), (3, 3, 1), (4, 4, 2), (99, 6, 2)])
def test_max_steps_and_a_short_last_group(tmp_path, max_steps, steps, epochs):
    # 36 examples make 5 batches, these 3 steps an epoch: 2 + 2 + 1.
    config = settings(tmp_path, FinetuneConfig, gradient_accumulation_steps=2, max_steps=max_steps, log_every=1)
    result = finetune(config, train=split(36), evaluation={}, model=bert())
    assert result.steps == steps
    assert len(result.history) == epochs
    losses = [line for line in lines(config.output_dir) if "loss" in line]
    assert losses[-1]["lr"] == 0
    if steps >= 3:
        assert result.tokens >= len(split(36).input_ids)


def test_warm_up_takes_at_least_one_step(tmp_path):
    config = settings(tmp_path, FinetuneConfig, warmup_ratio=0.0, log_every=1)
    finetune(config, train=split(16), evaluation={}, model=bert())
    rates = [line["lr"] for line in lines(config.output_dir) if "lr" in line]
    assert rates == pytest.approx([3e-3, 2e-3, 1e-3, 0])


def test_log_means_are_over_their_own_steps(tmp_path):
    every, third = (
        settings(tmp_path, FinetuneConfig, output_dir=tmp_path / str(n), log_every=n, epochs=1) for n in (1, 3)
    )
    for config in (every, third):
        finetune(config, train=split(48), evaluation={}, model=bert())
    single = [line["loss"] for line in lines(every.output_dir) if "loss" in line]
    means = [line["loss"] for line in lines(third.output_dir) if "loss" in line]
    assert means == pytest.approx([np.mean(single[:3]), np.mean(single[3:])], rel=1e-5)


def test_the_seed_decides(tmp_path):
    def run(seed, name):
        torch.manual_seed(0)
        np.random.seed(0)
        torch.rand(seed)  # the caller's generators must not matter
        config = settings(tmp_path, seed=seed, output_dir=tmp_path / name)
        model = distill(config, train=split(36), evaluation={}, teacher=bert(dropout=0.1)).model
        return [parameter.detach() for parameter in model.parameters()]

    first, again, other = run(7, "a"), run(7, "b"), run(8, "c")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_evaluate_sorts_by_id_and_restores_the_mode():
    model, held_out = bert(dropout=0.5), split(20, seed=1)
    held_out.ids = held_out.ids[::-1].copy()
    for training in (True, False):
        model.train(training)
        result = evaluate(model, Batches(held_out, 8, 0, shuffle=False), RTE)
        assert model.training == training
        assert result.ids.tolist() == list(range(20))
        assert np.array_equal(result.predictions, result.logits.argmax(1))
        assert result.metrics["accuracy"] == pytest.approx((result.predictions == held_out.labels[::-1]).mean())
    one_by_one = evaluate(model, Batches(held_out, 1, 0, shuffle=False), RTE)
    np.testing.assert_allclose(one_by_one.logits, result.logits, rtol=1e-4, atol=1e-5)
    held_out.labels = None
    assert evaluate(model, Batches(held_out, 8, 0, shuffle=False), RTE).metrics == {}


def test_regression_end_to_end(tmp_path):
    config = settings(tmp_path, task="stsb", hidden_weight=1.0)
    result = distill(
        config, train=split(36, STSB), evaluation={"validation": split(20, STSB, seed=1)}, teacher=bert(STSB)
    )
    assert set(result.best_metrics["validation"]) == set(STSB.metrics)
    assert not any("confusion" in line for line in lines(tmp_path / "run"))
    predictions = evaluate(result.model, Batches(split(20, STSB, seed=1), 8, 0, shuffle=False), STSB).predictions
    assert predictions.min() >= 0
    assert predictions.max() <= 5


def test_progress_shows_on_stderr_alone(tmp_path, capsys):
    config = settings(tmp_path, FinetuneConfig, progress=True)
    finetune(config, train=split(16), evaluation={"validation": split(8)}, model=bert())
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "rte epoch 2 step 4: validation accuracy" in shown.err
    quiet = settings(tmp_path, FinetuneConfig, resume="never")
    finetune(quiet, train=split(16), evaluation={}, model=bert())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"log_every": 0}, "log_every is 0"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"num_threads": 10**11}, "num_threads is 100000000000; it takes 1 to 1024"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"gate_learning_rate": float("nan")}, "gate_learning_rate is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"precision": "float8"}, "precision is 'float8'"),
        ({"method": "magic"}, "method is 'magic'"),
        ({"padding": "none"}, "padding is 'none'"),
        ({"device": "toaster"}, "device is 'toaster'"),
        ({"task": "imdb"}, "task is 'imdb'"),
        ({"max_length": 17}, "max_length is 17; this model takes at most 16"),
        ({"student_layers": 5}, "student_layers is 5; this teacher takes 1 to 4"),
        ({"student_init": "best"}, "init is 'best'"),
        ({"student_init": "published"}, "pretrained is None"),
        ({"task": "mnli"}, "teacher has num_labels = 2; task mnli takes 3"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        distill(settings(tmp_path, **options), train=split(8), evaluation={}, teacher=bert())


def test_wrong_data_is_named(tmp_path):
    unlabelled = split(8)
    unlabelled.labels = None
    with pytest.raises(ValueError, match="split train has no labels"):
        distill(settings(tmp_path), train=unlabelled, evaluation={}, teacher=bert())
    with pytest.raises(ValueError, match="split test has no labels"):
        distill(settings(tmp_path), train=split(8), evaluation={"test": unlabelled}, teacher=bert())
    with pytest.raises(ValueError, match="tokenizer is None"):
        distill(settings(tmp_path), teacher=bert())
    with pytest.raises(ValueError, match="student has num_labels = 3"):
        distill(settings(tmp_path), train=split(8), evaluation={}, teacher=bert(), student=bert(MNLI))


def test_real_data_from_folders_by_the_published_way(tmp_path, shared):
    """Models and GLUE files named by path, as the command line does."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "of", "in", "to", "and", "is", "##s"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    for name in ("teacher", "pretrained"):
        save_checkpoint(tmp_path / name, bert(), tokenizer)
    config = settings(
        tmp_path, teacher=str(tmp_path / "teacher"), pretrained=str(tmp_path / "pretrained"), max_steps=2,
        student_init="published", mask_padding=False, padding="max_length", data_dir=shared / "glue",
    )  # fmt: skip
    result = distill(config)
    assert set(result.best_metrics) == {"validation"}
    assert result.model.config.num_hidden_layers == 2


@pytest.mark.parametrize("task", RECIPES)
def test_recipes_fit_the_configurations(tmp_path, task):
    student = DistillConfig(task=task, teacher="t", output_dir=tmp_path, **recipe(task))
    teacher = FinetuneConfig(task=task, output_dir=tmp_path, **recipe(task, "finetune"))
    assert not student.mask_padding
    assert (student.padding, teacher.padding) == ("max_length", "max_length")
    row = RECIPES[task]
    assert round(teacher.max_steps * teacher.warmup_ratio) == row.teacher_warmup_steps
    per_epoch = math.ceil(row.num_examples / 32)
    assert teacher.max_steps <= teacher.epochs * per_epoch < teacher.max_steps + per_epoch
    assert 0 <= student.epochs * per_epoch - student.max_steps <= student.epochs


def test_recipe_of_rte_in_full():
    assert recipe("rte") == {
        "batch_size": 32, "max_length": 128, "padding": "max_length", "weight_decay": 0.01,
        "max_grad_norm": 1.0, "seed": 42, "precision": "float32",
        "learning_rate": 7e-4, "gate_learning_rate": 3e-5, "epochs": 10, "warmup_ratio": 0.1,
        "temperature": 10, "soft_weight": 0.5, "hard_weight": 0.5, "hidden_weight": 1000, "max_steps": 778,
        "student_layers": 6, "student_init": "published", "pretrained": "google-bert/bert-base-uncased",
        "mask_padding": False, "norm": "sequence", "reverse": False,
    }  # fmt: skip


def test_recipes_exist_for_six_tasks():
    for task in set(TASKS) - set(RECIPES):
        with pytest.raises(ValueError, match="the paper has recipes for rte, mrpc, sst2, qnli, qqp, mnli"):
            recipe(task)
    with pytest.raises(ValueError, match="command is 'train'"):
        recipe("rte", "train")


def test_gates_have_a_rate_of_their_own_in_the_log(tmp_path):
    config = settings(tmp_path, gate_learning_rate=5e-4, log_every=1, epochs=1)
    distill(config, train=split(36), evaluation={}, teacher=bert())
    rates = [(line["lr"], line["gate_lr"]) for line in lines(config.output_dir) if "loss" in line]
    assert rates == [pytest.approx((3e-3 * share, 5e-4 * share)) for share in (1, 0.75, 0.5, 0.25, 0)]


PUBLISHED = {
    "rte": (7e-4, 3e-5, 10, 0.1, 10, 0.5, 0.5, 1000, 7e-5, 385, 115),
    "mrpc": (7e-4, 5e-6, 20, 0.1, 10, 0.5, 0.5, 500, 7e-5, 345, 1),
    "sst2": (1e-4, 1e-6, 20, 0.3, 20, 0.5, 0.5, 1000, 2e-5, 6315, 1894),
    "qnli": (1e-4, 1e-6, 4, 0.1, 10, 0.5, 0.5, 1000, 3e-5, 9822, 3274),
    "qqp": (5e-4, 5e-7, 5, 0.1, 10, 0.7, 0.3, 1000, 2e-5, 34110, 10233),
    "mnli": (1e-4, 5e-7, 4, 0.1, 10, 0.5, 0.5, 500, 3e-5, 36816, 10000),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_recipes_are_the_published_ones(task):
    student, teacher = recipe(task), recipe(task, "finetune")
    names = "learning_rate", "gate_learning_rate", "epochs", "warmup_ratio", "temperature", "soft_weight"
    found = [student[name] for name in (*names, "hard_weight", "hidden_weight")]
    found += [teacher["learning_rate"], teacher["max_steps"], round(teacher["max_steps"] * teacher["warmup_ratio"])]
    assert tuple(found) == PUBLISHED[task]


def test_a_cache_counts_batches_not_steps(tmp_path):
    """Two epochs of five batches are four steps of up to four."""
    assert engine_losses(tmp_path, gradient_accumulation_steps=4, epochs=2)[2]["teacher_cache"] == "cpu"


def test_auto_does_not_pack_where_padding_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("lad_fast.training.packs_fast", lambda *_: True)
    for name, mask_padding, padding in (("masked", True, "packed"), ("counted", False, "longest")):
        options = {"padding": "auto", "mask_padding": mask_padding, "epochs": 1}
        assert engine_losses(tmp_path / name, **options)[2]["padding"] == padding


def test_apex_is_nvidias_with_decoupled_decay(monkeypatch):
    module = types.ModuleType("apex.optimizers")
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    assert not has_apex()  # a package of the same name
    module.FusedAdam = lambda groups, **options: options
    groups = [{"params": [SimpleNamespace(is_cuda=True)]}]
    assert make_adamw(groups, 1e-3, "apex") == {"lr": 1e-3, "adam_w_mode": True}
    with pytest.raises(ValueError, match="its FusedAdam takes parameters on a GPU"):
        make_adamw([*groups, {"params": [torch.ones(1)]}], 1e-3, "apex")


def test_settings_reach_the_step(tmp_path, monkeypatch):
    made, make = {}, DistillStep.__init__

    def noted(step, *models, **options):
        made.update(options)
        make(step, *models, **options)

    monkeypatch.setattr(DistillStep, "__init__", noted)
    own = {
        "learning_rate": 2e-3, "gate_learning_rate": 4e-4, "weight_decay": 0.3, "max_grad_norm": 0.25,
        "mask_padding": False, "precision": "bfloat16",
    }  # fmt: skip
    distill(settings(tmp_path, max_steps=4, warmup_ratio=0.5, **own), train=split(36), evaluation={}, teacher=bert())
    assert {name: made[name] for name in own} == own
    assert (made["total_steps"], made["warmup_steps"]) == (4, 2)


def test_gradients_are_clipped_to_the_bound_that_is_set():
    step = make_step(max_grad_norm=0.25)
    step(*batches(8, 8))
    assert step.grad_norms["student"] > 1
    first = [step.optimizer.state[p]["exp_avg"].norm() for p in step.student_parameters]
    torch.testing.assert_close(torch.stack(first).norm() / 0.1, torch.tensor(0.25), rtol=1e-4, atol=0)
    rows = [step.optimizer.state[p]["exp_avg"].flatten(1).norm(dim=1) for p in step.gates.parameters()]
    right = step.grad_norms["gates"].clamp(max=0.25)
    torch.testing.assert_close(torch.stack(rows).norm(dim=0) / 0.1, right, rtol=1e-4, atol=0)

"""Gates that no longer do anything are noticed, and no others."""

import json
import logging
import signal

import pytest
import torch
from small import bert, split

from lad_fast import GateStack, LADObjective, training
from lad_fast.checkpoint import Interrupted
from lad_fast.data import Batches
from lad_fast.step import DistillStep
from lad_fast.training import DistillConfig, distill


def states(num_layers=4, hidden_size=32, batch=3, seq_len=8, common=0.0):
    """Hidden states of unit variance, of which a share is the same for all tokens, as in BERT's upper layers."""
    numbers = torch.Generator().manual_seed(0)
    shared = torch.randn(hidden_size, generator=numbers) * common**0.5
    return [
        shared + (1 - common) ** 0.5 * torch.randn(batch, seq_len, hidden_size, generator=numbers)
        for _ in range(num_layers)
    ]


def gates(num_layers=4, hidden_size=32, **options):
    torch.manual_seed(1)
    return GateStack(num_layers, hidden_size, 8, **options)


@pytest.mark.parametrize("common", [0.0, 0.9, 0.98])
@pytest.mark.parametrize(("num_layers", "hidden_size"), [(2, 16), (12, 64), (24, 256)])
@pytest.mark.parametrize("options", [{}, {"norm": "token"}, {"reverse": True}], ids=str)
def test_fresh_gates_are_healthy(common, num_layers, hidden_size, options):
    fresh = gates(num_layers, hidden_size, **options)
    for found in fresh.condition(states(num_layers, hidden_size, common=common)):
        assert found["state"] is None, found
        assert 0.4 < found["openness"] < 0.6
        assert found["closed"] + found["open"] < 0.01


@pytest.mark.parametrize(("bias", "openness", "closed", "open_"), [(50.0, 1.0, 0.0, 1.0), (-50.0, 0.0, 1.0, 0.0)])
def test_a_huge_bias_saturates(bias, openness, closed, open_):
    stack = gates()
    with torch.no_grad():
        stack.bias[1] = bias
    first, second, third = stack.condition(states())
    assert second == {
        "openness": pytest.approx(openness, abs=1e-6), "closed": closed, "open": open_,
        "variation": pytest.approx(0, abs=1e-6), "state": "saturated",
    }  # fmt: skip
    assert first["state"] is third["state"] is None


def test_both_ends_count_together_and_from_95_percent_on():
    stack = gates(hidden_size=100)
    with torch.no_grad():
        stack.bias[0], stack.bias[0, :50] = -50.0, 50.0
    found = stack.condition(states(hidden_size=100))[0]
    assert (found["closed"], found["open"], found["state"]) == (0.5, 0.5, "saturated")
    with torch.no_grad():
        stack.bias[0, :6] = 0.0
        stack.weight[0, :6] /= 2  # none of theirs near an end
    found = stack.condition(states(hidden_size=100))[0]
    assert found["closed"] + found["open"] == pytest.approx(0.94)
    assert found["state"] is None


def test_weights_of_zero_collapse():
    """Whatever the biases: values that differ by feature alone ignore the input."""
    stack = gates()
    with torch.no_grad():
        stack.weight[2] = 0.0
        stack.bias[2] = torch.linspace(-1, 1, 32)
    *others, found = stack.condition(states())
    assert found["state"] == "collapsed"
    assert found["variation"] < 1e-6
    assert [other["state"] for other in others] == [None, None]


@pytest.mark.parametrize("norm", ["sequence", "token"])
def test_padding_is_not_looked_at_and_packed_is_the_same(norm):
    stack, lengths = gates(norm=norm), [8, 3, 5]
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    clean = states()
    dirty = [h.masked_fill(mask[..., None] == 0, 1e4) for h in clean]
    packed = [h[mask != 0] for h in clean]
    expected = stack.condition(packed, cu_seqlens=torch.tensor([0, 8, 11, 16], dtype=torch.int32))
    for found, other in zip(stack.condition(dirty, mask), expected, strict=True):
        assert found.pop("state") == other.pop("state") is None
        assert found == pytest.approx(other, abs=1e-5)


def train(output_dir, spoil, hook=None, **options):
    """Three epochs under gates that ``spoil`` gets first, and too small a rate for them to recover."""
    make = training._make_objective

    def spoilt(*args):
        objective = make(*args)
        with torch.no_grad():
            spoil(objective.gates)
        return objective

    student = bert(2, seed=1)
    if hook is not None:
        student.base_model.register_forward_pre_hook(hook)
    config = DistillConfig(
        task="rte", teacher="", output_dir=output_dir, batch_size=4, epochs=3, max_length=16, progress=False,
        device="cpu", backend="torch", student_layers=2, **{"precision": "float32"} | options,
    )  # fmt: skip
    evaluation = {"validation": split(8, seed=1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_make_objective", spoilt)
        return distill(config, train=split(12), evaluation=evaluation, teacher=bert(), student=student)


def spoil(stack):
    stack.bias[0] = -50.0
    stack.weight[2] = 0.0
    stack.bias[1] = 50.0


WARNINGS = [
    "step 3: gates[0] is saturated: 100% of its values are below 0.01 and 0% above 0.99: its layer is left out",
    "step 3: gates[1] is saturated: 0% of its values are below 0.01 and 100% above 0.99: what came before its layer is "
    "forgotten",
    "step 3: gates[2] has collapsed: its values vary by ",
]


@pytest.mark.parametrize("options", [{}, {"padding": "packed"}, {"teacher_cache": "off", "precision": "bfloat16"}])
def test_a_run_warns_once_and_logs_each_time(tmp_path, caplog, options):
    with caplog.at_level(logging.WARNING):
        train(tmp_path, spoil, **options)
    found = [message for message in caplog.messages if "gates[" in message]
    assert [message[: len(start)] for message, start in zip(found, WARNINGS, strict=True)] == WARNINGS
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = [line["gates"] for line in lines if "metrics" in line]
    assert [[gate["state"] for gate in gates] for gates in logged] == 3 * [["saturated", "saturated", "collapsed"]]
    assert json.loads((tmp_path / "results.json").read_text())["history"][0]["gates"] == logged[0]
    # With the first gate shut and the second open, the student's first layer learns from teacher layer 1, its second
    # from layers 3 and 4 as the third gate blends them.
    shares = [line["contributions"] for line in lines if "metrics" in line]
    assert [len(rows) for rows in shares] == 3 * [2]
    for (first, second), gates in zip(shares, logged, strict=True):
        assert first == pytest.approx([1, 0, 0, 0], abs=1e-5)
        assert second == pytest.approx([0, 0, 1 - gates[2]["openness"], gates[2]["openness"]], abs=1e-5)


def test_a_run_that_goes_on_does_not_warn_again(tmp_path, caplog):
    calls = iter(range(10**9))  # three steps and two evaluation batches an epoch
    with pytest.raises(Interrupted):
        train(tmp_path, spoil, lambda *_: signal.raise_signal(signal.SIGTERM) if next(calls) == 6 else None)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        train(tmp_path, spoil)
    assert not [message for message in caplog.messages if "gates[" in message]


def test_a_healthy_run_does_not_warn(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(tmp_path, lambda stack: None)
    assert not caplog.messages


@pytest.mark.parametrize("mask_padding", [True, False])
def test_gates_are_looked_at_as_they_are_trained(mask_padding):
    """With the padding where it counts."""
    torch.manual_seed(0)
    objective = LADObjective(GateStack(4, 16, 16), 2, backend="torch")
    options = {"learning_rate": 1e-3, "total_steps": 1, "warmup_steps": 1}
    step = DistillStep(bert(2, seed=1), bert(), objective, mask_padding=mask_padding, **options)
    batch = Batches(split(8), 8, 0, shuffle=False).first()
    with torch.no_grad():
        states = step.teacher(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states[1:]
    where = {"attention_mask": batch["attention_mask"] if mask_padding else None}
    found, shares = step.look_at_gates(batch), step.gates.contributions(states, **where)[[1, 3]]
    torch.testing.assert_close(torch.tensor(found["contributions"]), shares, rtol=1e-5, atol=1e-6)
    for gate, right in zip(found["gates"], step.gates.condition(states, **where), strict=True):
        assert gate["openness"] == pytest.approx(right["openness"], rel=1e-5)

"""Every file in examples/ runs as a reader runs it, and does what it says."""

import copy
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import other_models
import published_loop
import pytest
import tiny
import torch
from baselines import PublishedStep, published_gates

from lad_fast import GateStack, LADObjective

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    """As on a reader's machine: the interpreter would take minutes."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def gate_starts(monkeypatch) -> list[dict]:
    """The first parameters of every stack that is made."""
    starts, reset = [], GateStack.reset_parameters

    def recorded(gates):
        reset(gates)
        starts.append(copy.deepcopy(gates.state_dict()))

    monkeypatch.setattr(GateStack, "reset_parameters", recorded)
    return starts


def run(path: Path) -> dict:
    """The names that a script leaves."""
    return runpy.run_path(str(path), run_name="__main__")


def check_trained(losses, student, gates, start, folder) -> None:
    """Half the loss is gone, every gate learned, clipped on its own, and the student loads as a plain model."""
    assert losses[-1] < losses[0] / 2
    for name, parameter in gates.named_parameters():
        assert parameter.grad.flatten(1).any(dim=1).all(), name
        assert (parameter != start[name]).flatten(1).any(dim=1).all(), name
    norms = torch.cat([parameter.grad.flatten(1) for parameter in gates.parameters()], dim=1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-4, atol=0)  # all were above the limit of 1
    check_loads(student, folder)


def check_loads(student, folder) -> None:
    student.eval().save_pretrained(folder)
    loaded = type(student).from_pretrained(folder)
    inputs = other_models.inputs_of(student, next(tiny.batches(1, student.config.pad_token_id)))
    assert torch.equal(loaded(**inputs).logits, student(**inputs).logits)


def test_plain_loop(gate_starts, tmp_path):
    names = run(EXAMPLES / "plain_loop.py")
    check_trained(names["losses"], names["student"], names["gates"], *gate_starts, tmp_path)


def test_plain_loop_is_eight_lines_added_to_one_that_runs_without_lad_fast(monkeypatch, tmp_path):
    lines = (EXAMPLES / "plain_loop.py").read_text().splitlines()
    kept = [line for line in lines if not line.endswith("# LAD")]
    assert len(lines) - len(kept) == 8
    (tmp_path / "plain.py").write_text("\n".join(kept))
    monkeypatch.setitem(sys.modules, "lad_fast", None)
    losses = run(tmp_path / "plain.py")["losses"]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


def test_an_example_runs_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "plain_loop.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("the loss fell from")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reverse", [False, True])
def test_published_loop_does_what_the_published_section_did(reverse):
    torch.manual_seed(0)
    student, teacher = tiny.bert(3), tiny.bert(6)
    objective = LADObjective(GateStack(6, 32, tiny.SEQ_LEN, reverse=reverse), 3)
    theirs = PublishedStep(
        copy.deepcopy(student), copy.deepcopy(teacher), objective, learning_rate=3e-3, gate_learning_rate=3e-3,
        total_steps=12, warmup_steps=2, weight_decay=0.1, max_grad_norm=80.0,
    )  # fmt: skip
    expected = []
    for batch in tiny.batches(3):
        labels = batch.pop("labels")
        expected.append(theirs.update(batch, batch, labels))
    gates, losses = published_loop.train(
        teacher, student, published_gates(objective.gates), tiny.batches(3), total_step=12, warmup_step=2, lr=3e-3,
        gate_lr=3e-3, reverse_gate=reverse, weight_decay=0.1, max_norm=80.0,
    )  # fmt: skip
    for ours, published in zip(losses, expected, strict=True):
        np.testing.assert_allclose(ours[0], published.logits_loss, rtol=1e-4)
        np.testing.assert_allclose(ours[1], published.hidden_losses, rtol=1e-4)
    # Reversed, nothing learns from the chain's last gate: published AdamW passes it over, ours decays its weight.
    learned = slice(4 if reverse else 5)
    trained = GateStack.from_highway_gates(theirs.gates, reverse).state_dict()
    for name, value in gates.state_dict().items():
        torch.testing.assert_close(value[learned], trained[name][learned], rtol=1e-4, atol=1e-5)


def test_published_loop_runs(tmp_path):
    names = run(EXAMPLES / "published_loop.py")
    totals = [logits + sum(hidden) for logits, hidden in names["losses"]]
    assert totals[-1] < totals[0] / 2
    moved = names["gates"].weight - torch.stack([gate.linear.weight for gate in names["gate_networks"][1:]])
    assert moved.flatten(1).any(dim=1).all()
    check_loads(names["student_model"], tmp_path)


def without_lightning(monkeypatch) -> dict:
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    return run(EXAMPLES / "lightning_style.py")


def test_lightning_style_without_lightning(gate_starts, monkeypatch, tmp_path):
    module = without_lightning(monkeypatch)["module"]
    assert isinstance(module, torch.nn.Module)
    check_trained(module.losses, module.student, module.objective.gates, *gate_starts, tmp_path)


def test_lightning_trains_what_the_loop_trains(monkeypatch, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    monkeypatch.chdir(tmp_path)
    module = run(EXAMPLES / "lightning_style.py")["module"]
    assert isinstance(module, lightning.LightningModule)
    assert not list(tmp_path.iterdir())
    looped = without_lightning(monkeypatch)["module"]
    torch.testing.assert_close(module.losses, looped.losses)
    torch.testing.assert_close(module.state_dict(), looped.state_dict())
    check_loads(module.student, tmp_path)


@pytest.mark.parametrize("pair", other_models.PAIRS, ids=lambda pair: pair.__name__)
def test_other_models(pair, gate_starts, tmp_path):
    def check_padding(model, args, inputs):
        """RoBERTa counts positions by what it takes for padding."""
        assert torch.equal(inputs["input_ids"] == model.config.pad_token_id, inputs["attention_mask"] == 0)

    torch.manual_seed(0)
    student, teacher = pair()
    for model in (student, teacher):
        model.register_forward_pre_hook(check_padding, with_kwargs=True)
    before = copy.deepcopy(student.state_dict())
    objective, losses = other_models.distil(student, teacher)
    check_trained(losses, student, objective.gates, *gate_starts, tmp_path)
    assert not [name for name, value in student.named_parameters() if torch.equal(value, before[name])]
    assert (objective.projections is not None) == (pair is other_models.narrow_student)
    if objective.projections is not None:
        assert all(parameter.grad.any() for parameter in objective.projections.parameters())

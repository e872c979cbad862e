"""The published step that benchmarks compare with computes what the recorded runs of the published code did."""

import numpy as np
import pytest
import torch
from baselines import PlainStep, PublishedStep
from golden import FILES, GATE_NAMES, Golden, relative_rms


@pytest.fixture(params=FILES)
def golden(request, shared):
    return Golden(shared / "golden" / f"{request.param}.npz")


def settings(golden):
    meta = golden.meta
    return {
        "learning_rate": meta["lr"], "gate_learning_rate": meta["gate_lr"], "total_steps": meta["steps"],
        "warmup_steps": meta["warmup_steps"], "weight_decay": meta["weight_decay"],
        "max_grad_norm": meta["max_grad_norm"],
    }  # fmt: skip


def test_published_step_gives_the_recorded_losses_and_weights(golden):
    start = golden.step("reference")
    step = PublishedStep(start.student, start.teacher, start.objective, **settings(golden))
    losses = []
    for n in range(golden.meta["steps"]):
        batch = golden.batch(n)
        labels = batch.pop("labels")
        losses.append(step.update(batch, batch, labels))

    np.testing.assert_allclose([loss.logits_loss for loss in losses], golden.arrays["logits_loss"], rtol=1e-4)
    np.testing.assert_allclose([loss.hidden_losses for loss in losses], golden.arrays["hidden_loss"], rtol=1e-4)
    final = dict(step.student.named_parameters())
    for name, value in golden.tensors("student_final").items():
        assert relative_rms(final[name].detach(), value) < 1e-3, name
    for name, values in golden.gates("gate_final").items():
        theirs = next(theirs for theirs, ours in GATE_NAMES.items() if ours == name)
        for gate, value in zip(step.gates[1:], values, strict=True):
            assert relative_rms(gate.get_parameter(theirs).detach(), value) < 1e-3, name


def test_plain_step_follows_the_recorded_losses(golden):
    """Its one clip over all gates together is not the published one, so the weights drift a little apart."""
    start = golden.step("reference")
    step = PlainStep(start.student, start.teacher, start.objective, **settings(golden), mask_padding=False)
    losses = [step(golden.batch(n)) for n in range(golden.meta["steps"])]
    recorded = golden.arrays["logits_loss"] + golden.arrays["hidden_loss"].sum(axis=1)
    np.testing.assert_allclose(torch.stack(losses).numpy(), recorded, rtol=1e-2)

"""Trajectories of the published code, replayed through the product's own training step.

The tolerances are for whole trajectories (../shared/golden/README.md); tests of single operations hold tighter ones.
"""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import FILES, Golden, relative_rms

from lad_fast.kernels import launch
from lad_fast.kernels.launch import GemmLaunch, TileLaunch


@pytest.fixture(params=FILES)
def golden(request, shared):
    return Golden(shared / "golden" / f"{request.param}.npz")


# Twenty steps by the interpreter, which takes as long for a small tile as for a large one, in the form that NVIDIA's
# GPUs take by heuristic; the first step's gradients are computed by its usual small tiles and a launch a step.
WHOLE_TILES = replace(
    launch.INTERPRETED, forward="persistent", backward="persistent", gemm=GemmLaunch(64, 32, 32, 1, 1, 1),
    gate=TileLaunch(64, 32, 1), multiprocessors=1,
)  # fmt: skip
BACKENDS = ("reference", "torch", pytest.param("triton", marks=(pytest.mark.slow, pytest.mark.kernels)))
INTERPRETED_STEPS = 8  # of the second and third file: what the interpreter would take a minute each for, others replay


def make_step(golden, backend):
    """On a GPU where kernels run on one, else on the CPU."""
    on_gpu = backend == "triton" and not launch.interpreted()
    return golden.step(backend, "cuda" if on_gpu else "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_the_first_step(golden, backend):
    step = make_step(golden, backend)
    step.losses(golden.batch(0))["loss"].backward()

    expected = golden.tensors("student_grad_step0")
    actual = {name: p.grad for name, p in step.student.named_parameters()}
    assert set(expected) == set(actual)
    # Softmax takes no notice of a constant added to its scores: a key bias' gradient is 0, and rounding.
    meaningful = {name: grad for name, grad in expected.items() if not name.endswith("key.bias")}
    errors = {name: relative_rms(actual[name], grad) for name, grad in meaningful.items()}
    largest = max(grad.abs().max() for grad in expected.values())
    for name in set(expected) - set(meaningful):
        assert actual[name].abs().max() < 1e-5 * largest, name

    for name, grads in golden.gates("gate_grad_step0").items():
        for i, grad in enumerate(grads):
            ours = getattr(step.gates, name).grad[i]
            if grad is None:  # no student layer learns from what this gate gives
                assert not ours.any(), f"{name}[{i}]"
            else:
                errors[f"gates.{name}[{i}]"] = relative_rms(ours, grad)
    worst = max(errors, key=errors.get)
    print(f"{backend}: gradients {errors[worst]:.1e} in {worst}")
    assert errors[worst] < 1e-4, worst


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_of_every_step_and_final_weights(golden, backend):
    step, num_steps = make_step(golden, backend), golden.meta["steps"]
    if backend == "triton" and launch.interpreted() and golden.name != FILES[0]:
        num_steps = INTERPRETED_STEPS
    with launch.forced(WHOLE_TILES) if launch.interpreted() else nullcontext():
        losses = [step(golden.batch(n)) for n in range(num_steps)]

    logits = torch.stack([loss["logits_loss"] for loss in losses]).cpu()
    hidden = torch.stack([loss["hidden_losses"] for loss in losses]).cpu()
    logits_error = np.abs(logits.numpy() / golden.arrays["logits_loss"][:num_steps] - 1).max()
    hidden_error = np.abs(hidden.numpy() / golden.arrays["hidden_loss"][:num_steps] - 1).max()
    assert logits_error < 1e-4
    assert hidden_error < 1e-4
    if num_steps < golden.meta["steps"]:
        return

    final = dict(step.student.named_parameters())
    errors = {
        name: relative_rms(final[name].detach(), value) for name, value in golden.tensors("student_final").items()
    }
    for name, values in golden.gates("gate_final").items():
        stacked = getattr(step.gates, name).detach()
        errors |= {f"gates.{name}[{i}]": relative_rms(stacked[i], value) for i, value in enumerate(values)}
    top = sorted(errors, key=errors.get)[-4:]
    print(
        f"{backend}: logits {logits_error:.1e}, hidden {hidden_error:.1e},",
        *(f"{n} {errors[n]:.1e}" for n in top),
    )
    assert errors[top[-1]] < 1e-3, top[-1]

"""Trajectories of the published code, replayed through the product's own training step.

The tolerances are the contract's (DESIGN section 5; golden/README.md); tests of single operations hold
tighter ones.
"""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lad_fast import GateStack, LADObjective
from lad_fast.step import DistillStep

FILES = ("rte_l12_k6", "mnli_l12_k4_reverse", "stsb_l12_k6")
GATE_NAMES = {
    "linear.weight": "weight",
    "linear.bias": "bias",
    "layernorm.weight": "norm_weight",
    "layernorm.bias": "norm_bias",
}


class Golden:
    """One recorded file as models, batches and expected numbers."""

    def __init__(self, path):
        with np.load(path) as file:
            self.arrays = {name: file[name] for name in file.files}
        self.meta = json.loads(self.arrays["meta_json"].tobytes())

    def tensors(self, prefix):
        """Entries below ``prefix`` under Hugging Face names."""
        return {
            name.removeprefix(f"{prefix}/").replace("encoder.", "bert.", 1).replace("linear_layer.", "classifier."): (
                torch.from_numpy(value)
            )
            for name, value in self.arrays.items()
            if name.startswith(f"{prefix}/")
        }

    def model(self, prefix, num_layers):
        meta = self.meta
        config = BertConfig(
            vocab_size=meta["vocab"], hidden_size=meta["d"], num_attention_heads=meta["heads"],
            intermediate_size=meta["ff"], max_position_embeddings=meta["s"], num_hidden_layers=num_layers,
            layer_norm_eps=meta["layer_norm_eps_bert"], hidden_dropout_prob=meta["dropout"],
            attention_probs_dropout_prob=meta["dropout"], num_labels=meta["classes"],
        )  # fmt: skip
        model = BertForSequenceClassification(config)
        model.load_state_dict(self.tensors(prefix))
        return model

    def gates(self, prefix):
        """Arrays of all gates but the first, which the published code never uses; None where unrecorded."""
        return {
            ours: [self.arrays.get(f"{prefix}/{i}/{theirs}") for i in range(1, self.meta["L"])]
            for theirs, ours in GATE_NAMES.items()
        }

    def step(self, backend):
        meta = self.meta
        gates = GateStack(meta["L"], meta["d"], meta["s"], "sequence", meta["reverse"])
        initial = self.gates("gate_init").items()
        gates.load_state_dict({name: torch.from_numpy(np.stack(arrays)) for name, arrays in initial})
        objective = LADObjective(
            gates, meta["K"], meta["temp"], meta["soft"], meta["hard"], meta["mu"],
            regression=meta["classes"] == 1, backend=backend,
        )  # fmt: skip
        return DistillStep(
            self.model("student_init", meta["K"]), self.model("teacher", meta["L"]), objective,
            learning_rate=meta["lr"], gate_learning_rate=meta["gate_lr"], total_steps=meta["steps"],
            warmup_steps=meta["warmup_steps"], weight_decay=meta["weight_decay"],
            max_grad_norm=meta["max_grad_norm"], mask_padding=False,
        )  # fmt: skip

    def batch(self, n):
        rows = slice(n * self.meta["b"], (n + 1) * self.meta["b"])
        batch = {name: torch.from_numpy(self.arrays[name][rows]).long() for name in
                 ("input_ids", "token_type_ids", "attention_mask")}  # fmt: skip
        return batch | {"labels": torch.from_numpy(self.arrays["labels"][rows])}


def relative_rms(actual, expected):
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.fixture(params=FILES)
def golden(request, shared):
    return Golden(shared / "golden" / f"{request.param}.npz")


BACKENDS = ("reference", "torch", pytest.param("triton", marks=pytest.mark.slow))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_the_first_step(golden, backend):
    step = golden.step(backend)
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
    step = golden.step(backend)
    losses = [step(golden.batch(n)) for n in range(golden.meta["steps"])]

    logits = torch.stack([loss["logits_loss"] for loss in losses])
    hidden = torch.stack([loss["hidden_losses"] for loss in losses])
    logits_error = np.abs(logits.numpy() / golden.arrays["logits_loss"] - 1).max()
    hidden_error = np.abs(hidden.numpy() / golden.arrays["hidden_loss"] - 1).max()

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
    assert logits_error < 1e-4
    assert hidden_error < 1e-4
    assert errors[top[-1]] < 1e-3, top[-1]

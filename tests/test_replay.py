"""Steps whose numbers are not finite: what a run keeps of them, and what running them again tells."""

import json
import math
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from small import bert, split

from lad_fast import training
from lad_fast.checkpoint import read_checkpoint
from lad_fast.cli import main
from lad_fast.replay import _part, replay
from lad_fast.step import DistillStep
from lad_fast.training import DistillConfig, FinetuneConfig, distill, finetune


def train(output_dir, kind=DistillConfig, action=None, step=5, **options):
    """Two epochs of 10 batches under dropout; ``action`` gets the student in its forward pass of that step."""
    common = {
        "task": "rte", "output_dir": output_dir, "batch_size": 4, "epochs": 2, "max_length": 16, "log_every": 3,
        "learning_rate": 3e-3, "progress": False, "device": "cpu", "precision": "float32",
    }  # fmt: skip
    student, calls = bert(2 if kind is DistillConfig else 4, seed=1), iter(range(1, 10**9))
    if action is not None:
        student.base_model.register_forward_pre_hook(lambda *_: action(student) if next(calls) == step else None)
    if kind is FinetuneConfig:
        return finetune(kind(**common | {"model": ""} | options), train=split(40), evaluation={}, model=student)
    own = {"teacher": "", "student_layers": 2, "backend": "torch"}
    return distill(kind(**common | own | options), train=split(40), evaluation={}, teacher=bert(), student=student)


def overflow(student):
    """The products of one linear layer leave float32's range."""
    with torch.no_grad():
        student.base_model.encoder.layer[1].intermediate.dense.weight.fill_(3e38)


def broken(output_dir, **options):
    """A run that ends by numbers that are not finite: its message, its dump, and losses and norms by step."""
    values, add = {}, training._Log.add

    def kept(log, losses, norms, *others):
        values[log.steps + 1] = training.numbers(losses, norms)
        add(log, losses, norms, *others)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError) as error:
        patch.setattr(training._Log, "add", kept)
        train(output_dir, **options)
    (dump,) = output_dir.glob("not-finite-step-*")
    return str(error.value), dump, values


ENGINES = {
    "cached": {},
    "not cached": {"teacher_cache": "off"},
    "accumulating": {"gradient_accumulation_steps": 2},
    "at once": {"detect_anomaly": True},
    "packed": {"padding": "packed"},
    "padding counted, reversed": {"padding": "max_length", "mask_padding": False, "reverse": True},
    "bfloat16": {"precision": "bfloat16"},
    "layer map": {"method": "last", "normalize_states": True},
    "attention, packed": {"method": "attention", "padding": "packed"},
    "logits": {"method": "logits"},
    "labels": {"method": "none"},
    "fine-tuning": {"kind": FinetuneConfig},
    "second epoch": {"step": 14},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_step_comes_again(tmp_path, engine):
    """Every loss and norm, to the bit: its dropout, its weights and its batch are those of the run."""
    message, dump, values = broken(tmp_path, action=overflow, **ENGINES[engine])
    expected = re.search(r"not finite: (.*); ids", message)[1].split(", ")
    assert f"lad-fast replay {dump} runs it again" in message
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        numbers = training.numbers
        patch.setattr(training, "numbers", lambda *args: (seen.append(numbers(*args)), seen[-1])[1])
        found = replay(dump, "cpu")
    assert found.found == found.expected == expected
    assert found.weights == "before the step"
    assert found.first.name in ("batch 0: student's hidden_states[1]", "batch 1: student's hidden_states[1]", "loss")
    assert found.module.endswith("encoder.layer.1.intermediate.dense")
    assert "weights of student" in [part.name for part in found.parts if not part.num_bad]
    for name, value in values[found.step].items():
        torch.testing.assert_close(seen[0][name], value, rtol=0, atol=0, equal_nan=True)


def test_weights_are_those_before_the_step(tmp_path):
    """Detected one step later; the checkpoint of the step before is what there was, but for what the hook spoilt."""
    _, dump, _ = broken(tmp_path, action=overflow, step=5, save_steps=2)
    state, before = read_checkpoint(dump).state, read_checkpoint(tmp_path / "checkpoints/step-4").state["step"]
    spoilt = "bert.encoder.layer.1.intermediate.dense.weight"
    for part in ("student", "objective"):
        for name, value in before[part].items():
            assert torch.equal(state["state"][part][name], value) or name == spoilt, name
    for moments, others in zip(*(s["optimizer"]["state"].values() for s in (state["state"], before)), strict=True):
        for name, value in others.items():
            assert torch.equal(moments[name], value), name


def test_a_run_that_diverges_is_replayed_by_a_process_of_its_own(tmp_path):
    message, dump, _ = broken(tmp_path, learning_rate=1e25, warmup_ratio=0.0)
    assert set(os.listdir(dump)) == {"tensors.safetensors", "state.json", "log.jsonl", "manifest.json"}
    command = re.search(r"lad-fast (replay \S+) runs it again", message)[1].split()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lad_fast", *command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    parts = re.search(r"not finite: (.*); ids", message)[1]
    assert f"not finite: {parts} (as in the run)" in done.stdout.splitlines()
    assert re.search(r"^the first: batch 0: student's hidden_states\[0\], in ", done.stdout, re.M)
    ids = re.search(r"ids of its examples: (.*);", message)[1]
    assert f"with the weights before the step; ids of its examples: {ids}" in done.stdout


def test_a_loss_scaler_that_only_skips(tmp_path):
    """Weights are those of the step, which none after it has changed, and so is the loss scale."""

    def spoil(student):
        student.classifier.weight.register_hook(lambda gradient: gradient * math.inf)

    message, dump, _ = broken(tmp_path, precision="float16", action=spoil, step=1, epochs=5)
    assert message.startswith("step 41: not finite: gradient of student; ")
    state = read_checkpoint(dump).state
    assert state["weights"] == "before the step"
    assert state["state"]["scaler"]["scale"] == 2.0 ** (16 - 40)
    found = replay(dump, "cpu")
    assert found.found == []  # here nobody spoils the gradient
    assert found.notes == ["gradients are times the loss scale, 5.96046e-08"]


def test_what_could_not_be_kept_is_told(tmp_path, monkeypatch, capsys):
    """Where the loss alone is not finite, steps go on until somebody looks."""
    make = training._make_objective

    def rising(*args):
        objective, calls = make(*args), iter(range(1, 10**9))
        return lambda *tensors: objective(*tensors) + (math.inf if next(calls) == 5 else 0.0)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_make_objective", rising)
        message, dump, _ = broken(tmp_path, method="logits")
    assert message.startswith("step 5: not finite: loss; ")
    assert main(["replay", str(dump), "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "step 5, with the weights after step 6; " in out
    assert "not finite: nothing (in the run: loss)" in out


def test_a_dump_that_cannot_be_written_hides_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lower(student):
        overflow(student)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))

    try:
        with pytest.raises(FloatingPointError, match=r"step 5: not finite: loss, .*; no dump .*too large") as error:
            train(tmp_path, action=lower)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*not-finite*"))


def test_what_is_no_dump_is_refused(tmp_path, capsys):
    _, dump, _ = broken(tmp_path / "run", action=overflow, save_steps=2)
    for path in (tmp_path, tmp_path / "not-finite-step-5", next((tmp_path / "run/checkpoints").iterdir())):
        assert main(["replay", str(path)]) == 2
        assert f"dump is {path}; it takes a folder not-finite-step-N" in capsys.readouterr().err
    content = bytearray((dump / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (dump / "tensors.safetensors").write_bytes(content)
    assert main(["replay", str(dump)]) == 2
    assert "tensors.safetensors has changed since it was written" in capsys.readouterr().err


def test_a_model_that_is_not_transformers_is_refused(tmp_path):
    _, dump, _ = broken(tmp_path, action=overflow)
    state = json.loads((dump / "state.json").read_text())
    state["student"]["class"] = "Mine"
    (dump / "state.json").write_text(json.dumps(state))
    manifest = json.loads((dump / "manifest.json").read_text())
    from lad_fast.checkpoint import _digest

    manifest["files"]["state.json"] = _digest(dump / "state.json")
    (dump / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="the student is a Mine; replay takes a model of Transformers"):
        replay(dump)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_are_held_from_the_first_broken_step_on(precision):
    model = bert(2)
    step = DistillStep(model, learning_rate=1e-3, total_steps=10, warmup_steps=1, precision=precision)
    numbers = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(4, 24, (3, 8), generator=numbers), "attention_mask": torch.ones(3, 8),
        "labels": torch.tensor([0, 1, 1]),
    }  # fmt: skip
    step(batch)
    step(batch)
    assert step.is_held == 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [{k: v.clone() for k, v in state.items()} for state in step.optimizer.state.values()]
    handle = model.classifier.bias.register_hook(lambda gradient: gradient * math.nan)
    step(batch)
    handle.remove()
    step(batch)
    assert step.is_held == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for state, others in zip(step.optimizer.state.values(), moments, strict=True):
        for name, value in others.items():
            assert torch.equal(state[name], value), name
    step.load_state_dict(step.state_dict())
    step(batch)
    assert step.is_held == 0
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])


def test_a_part_tells_its_largest_magnitude():
    part = _part("p", torch.tensor([1.0, -3.0, math.nan]), torch.tensor([[2.0, -math.inf]]))
    assert part == ("p", 3.0, 2, 5)


def test_other_versions_are_told(tmp_path, monkeypatch):
    _, dump, _ = broken(tmp_path, action=overflow)
    monkeypatch.setitem(training.VERSIONS, "torch", "9.9")
    assert replay(dump, "cpu").notes == [f"torch was {torch.__version__} and is 9.9"]


@pytest.mark.parametrize("reverse", [False, True])
def test_aggregates_come_along_the_chain(tmp_path, reverse):
    _, dump, _ = broken(tmp_path, action=overflow, reverse=reverse)
    found = [part.name for part in replay(dump, "cpu").parts if "aggregates" in part.name]
    assert found == [f"batch 0: aggregates[{i}]" for i in ([3, 2, 1, 0] if reverse else [0, 1, 2, 3])]

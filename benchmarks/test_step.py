"""Whole training steps: the published loop, a careful plain one, and the library's.

All start from the same weights and see the same examples. ``padded`` gives each the same work, 32 examples padded to
128 tokens with padding counted as published; the epochs take each contestant's own padding: the published loop pads to
128, the others to the longest of 32 examples of like length (the library's packs them on a GPU). Before one is timed,
its losses and gradients have to be right; the times of an epoch are a step's, the mean over the sampled batches.
"""

import contextlib
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from contestants import CACHED, CONTESTANTS, GRAPHS, ON_GPU, PUBLISHED, Runner, check_contestant, make
from measuring import clock
from roofline import step_flops
from workloads import (
    BATCH_SIZE,
    MAX_LENGTH,
    SIZES,
    TASKS,
    Size,
    Workload,
    batches,
    load,
    sample,
)

SAMPLED_BATCHES = {"sst2": 20, "mrpc": 20} if ON_GPU else {"sst2": 5, "mrpc": 2}


def phase_shares(runner: Runner, workload: Workload) -> dict[str, float]:
    """Share of the time of each phase over the workload's batches, each phase waited for; clipping is optimizer."""
    step, seconds = runner.step, Counter()

    def timed(phase: str, function):
        def call(*args, **kwargs):
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[phase] += clock() - start

        return call

    phases = (
        (step.teacher.base_model, "forward", "teacher"),
        (step.student.base_model, "forward", "student forward"),
        (step.objective, "forward", "objective"),
        (torch.Tensor, "backward", "backward"),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, phase in phases:
            stack.enter_context(patch.object(owner, name, timed(phase, getattr(owner, name))))
        start = clock()
        iterator = iter(batches(workload, runner.padding))
        while (batch := timed("data", lambda: next(iterator, None))()) is not None:
            step(batch)
        total = clock() - start
    seconds["optimizer and rest"] = total - sum(seconds.values())
    return {phase: value / total for phase, value in seconds.items()}


@pytest.fixture(params=("minilm", "base"))
def size(request, full: bool) -> Size:
    if not full and (request.param == "base") != ON_GPU:
        pytest.skip("with --full")
    return SIZES[request.param]


def describe(size: Size) -> str:
    return f"{size.teacher_layers} to {size.student_layers} layers, D {size.hidden_size}"


def takes_part(name: str) -> None:
    if name.endswith(GRAPHS) and not ON_GPU:
        pytest.skip("CUDA graphs take a GPU")


def warm_up_passes(name: str) -> int:
    if name == PUBLISHED:  # of five rounds the median is not the first
        return 0
    return 4 if name.endswith(GRAPHS) else 1  # a graph is captured when its shape comes the third time


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if not name.endswith(CACHED)])
def test_padded(measure, roofs, size, name):
    takes_part(name)
    check_contestant(name, size, "max_length", mask_padding=False)
    examples, _ = sample(load("sst2"), 1)
    runner = make(name, size, examples, "max_length", mask_padding=False)
    for _ in range(warm_up_passes(name)):
        runner.run(examples)
    precision = name.split(", ")[1]
    row = measure(
        lambda: runner.run(examples), table="step", contestant=name, dtype=precision, baseline=PUBLISHED,
        case=f"B {BATCH_SIZE} x S {MAX_LENGTH} padded, {describe(size)}", rounds=20 if ON_GPU else 5,
        profiled=ON_GPU,
    )  # fmt: skip
    add_utilisation(row, roofs, step_flops(size, [MAX_LENGTH] * BATCH_SIZE), row.get("median_s"))
    if name.startswith("ours") and not name.endswith(GRAPHS):
        row["phase_shares"] = phase_shares(runner, examples)


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("task", TASKS)
def test_epoch(measure, roofs, full, size, task, name):
    takes_part(name)
    if task != TASKS[0] and name in ("plain, float32", "ours, float32") and not (full or ON_GPU):
        pytest.skip("with --full")  # the first task and the padded step show float32
    check_contestant(name, size, "longest", mask_padding=True)
    whole = load(task)
    examples, epoch_steps = sample(whole, 40 if full else SAMPLED_BATCHES[task])
    if name == PUBLISHED:  # pads to 128 whatever the batch, so that one batch tells its time
        examples = examples.rows(examples.tokens.ids[-BATCH_SIZE:])
    num_batches = len(examples.tokens) // BATCH_SIZE
    runner = make(name, size, examples, "longest", mask_padding=True)
    is_cached = name.endswith(CACHED)
    for _ in range(warm_up_passes(name)):
        runner.run(examples if is_cached or ON_GPU else examples.rows(examples.tokens.ids[-BATCH_SIZE:]))
    precision = name.split(", ")[1]
    row = measure(
        lambda: runner.run(examples), table="epoch", contestant=name, dtype=precision, baseline=PUBLISHED,
        case=f"{task}, {describe(size)}", rounds=5, parts=num_batches,
        profiled=False,
        texts="real" if whole.is_real else "made up", sampled_batches=num_batches, epoch_steps=epoch_steps,
    )  # fmt: skip
    if "median_s" in row:
        row["epoch_seconds_scaled_from_sample_total"] = row["median_s"] * epoch_steps
    flops = step_flops(size, examples.tokens.lengths, not is_cached)
    add_utilisation(row, roofs, flops / num_batches, row.get("median_s"))
    if name.startswith("ours") and not name.endswith(GRAPHS):
        row["phase_shares"] = phase_shares(runner, examples)


def add_utilisation(row: dict, roofs, flops: float, seconds: float | None) -> None:
    """What the step needs, over what the machine multiplies in the step's precision: real tokens, no recomputation."""
    if seconds is not None:
        row["model_flops"] = flops
        row["model_flops_utilisation"] = flops / seconds / roofs.flop_per_second[row["dtype"]]


FIRST_STEP = """
import sys; sys.path.insert(0, {folder!r})
import torch
from measuring import DEVICE, pin_threads
pin_threads()
import contestants, workloads
contestants.ours(workloads.SIZES["minilm"], "float32", "longest", True).run(workloads.made_up(workloads.BATCH_SIZE))
if DEVICE.type == "cuda": torch.cuda.synchronize()
print("stepped", flush=True)
"""


def test_first_step(measure):
    """A fresh process from its start to the end of its first step, imports and reading of weights included."""

    def start() -> None:
        code = FIRST_STEP.format(folder=str(Path(__file__).parent))
        with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "stepped\n"

    measure(
        start, table="start", case="process to end of first step", contestant="ours, float32",
        rounds=5, profiled=False,
    )  # fmt: skip

"""Whole training steps: the published loop, a careful plain one, and the library's.

All start from the same weights and see the same examples. ``padded`` gives each the same work, 32 examples padded to
128 tokens with padding counted as published; the epochs take each contestant's own padding: the published loop pads to
128, the others to the longest of 32 examples of like length (the library's packs them on a GPU). A case's contestants
have to give the right losses and gradients; then they are timed in turn. The times of an epoch are a step's, the mean
over the sampled batches.
"""

import contextlib
import functools
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from contestants import CACHED, CONTESTANTS, FASTEST, GRAPHS, ON_GPU, PUBLISHED, Runner, check_contestant, make
from measuring import Timing, clock, in_turn, why_not_timed
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


def why_not(task: str, name: str, full: bool) -> str | None:
    """Why a contestant takes no part."""
    if name.endswith(GRAPHS) and not ON_GPU:
        return "CUDA graphs take a GPU"
    if reason := why_not_timed(name.split(", ")[1]):
        return reason
    # The first task and the padded step show both precisions.
    is_shown = task == TASKS[0] or name == PUBLISHED or name.split(", ")[1] == FASTEST
    return None if is_shown or full or ON_GPU else "with --full"


def warm_up_passes(name: str) -> int:
    if name == PUBLISHED:  # of five rounds the median is not the first
        return 0
    return 4 if name.endswith(GRAPHS) else 1  # a graph is captured when its shape comes the third time


class Entry(NamedTuple):
    """A contestant that was timed."""

    runner: Runner
    examples: Workload
    timing: Timing


@functools.lru_cache(maxsize=1)
def race(size: Size, task: str, padding: str, num_batches: int, names: tuple[str, ...]) -> dict[str, Entry]:
    """A case's contestants, checked and then timed in turn, on a sample of a task's batches."""
    sampled, _ = sample(load(task), num_batches)
    last = sampled.rows(sampled.tokens.ids[-BATCH_SIZE:])
    runners, examples = {}, {}
    for name in names:
        check_contestant(name, size, padding, mask_padding=padding == "longest")
        # The published loop pads to 128 whatever the batch, so that one batch tells its time.
        examples[name] = last if name == PUBLISHED else sampled
        runners[name] = make(name, size, examples[name], padding, mask_padding=padding == "longest")
        for _ in range(warm_up_passes(name)):
            runners[name].run(sampled if name.endswith(CACHED) or ON_GPU else last)
    timings = in_turn(
        {name: partial(runners[name].run, examples[name]) for name in names},
        rounds=20 if ON_GPU and padding == "max_length" else 5,
    )
    return {name: Entry(runners[name], examples[name], timings[name]) for name in names}


def run(
    measure, roofs, rivals: tuple[str, ...], full: bool, size: Size, task: str, padding: str, num_batches: int,
    name: str, **about,
) -> dict:  # fmt: skip
    """Time a contestant and record its row; ``about`` are arguments of ``measure``."""
    if reason := why_not(task, name, full):
        pytest.skip(reason)
    names = tuple(other for other in rivals if why_not(task, other, full) is None)
    entry = race(size, task, padding, num_batches, names)[name]
    steps = len(entry.examples.tokens) // BATCH_SIZE
    row = measure(
        partial(entry.runner.run, entry.examples), timing=entry.timing, contestant=name, dtype=name.split(", ")[1],
        baseline=PUBLISHED, parts=steps, sampled_batches=steps, **about,
    )  # fmt: skip
    lengths = [MAX_LENGTH] * BATCH_SIZE if padding == "max_length" else entry.examples.tokens.lengths
    flops = step_flops(size, lengths, not name.endswith(CACHED))
    add_utilisation(row, roofs, flops / steps, row.get("median_s"))
    if name.startswith("ours") and not name.endswith(GRAPHS):
        row["phase_shares"] = phase_shares(entry.runner, entry.examples)
    return row


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if not name.endswith(CACHED)])
def test_padded(measure, roofs, rivals, full, size, name):
    case = f"B {BATCH_SIZE} x S {MAX_LENGTH} padded, {describe(size)}"
    run(measure, roofs, rivals, full, size, TASKS[0], "max_length", 1, name, table="step", case=case, profiled=ON_GPU)


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("task", TASKS)
def test_epoch(measure, roofs, rivals, full, size, task, name):
    whole, num_batches = load(task), 40 if full else SAMPLED_BATCHES[task]
    epoch_steps = sample(whole, num_batches)[1]
    row = run(
        measure, roofs, rivals, full, size, task, "longest", num_batches, name, table="epoch",
        case=f"{task}, {describe(size)}", profiled=False, texts="real" if whole.is_real else "made up",
        epoch_steps=epoch_steps,
    )  # fmt: skip
    if "median_s" in row:
        row["epoch_seconds_scaled_from_sample_total"] = row["median_s"] * epoch_steps


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

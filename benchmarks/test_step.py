"""Whole training steps: the published loop, a careful plain one, and the library's.

All start from the same weights and see the same examples. ``padded`` gives each the same work, 32 examples padded to
128 tokens with padding counted as published; the epochs take each contestant's own padding: the published loop pads to
128, the others to the longest of 32 examples of like length (the library's packs them on a GPU). A case's contestants
have to give the right losses and gradients; then they are timed in turn, and on a CPU those of all cases at once, where
the published loop, which does the same in each, then takes its turn once. The times of an epoch are a step's, the mean
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
from measuring import Roofs, Timing, clock, in_turn, why_not_timed
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


class Case(NamedTuple):
    """What the contestants are compared on."""

    task: str
    padding: str
    """Of all but the published loop, which pads to 128."""
    num_batches: int


def case_of(params: dict, full: bool) -> Case:
    """Of a test's parameters."""
    if "task" not in params:
        return Case(TASKS[0], "max_length", 1)
    return Case(params["task"], "longest", 40 if full else SAMPLED_BATCHES[params["task"]])


class Entry(NamedTuple):
    """A contestant that was timed."""

    runner: Runner
    examples: Workload
    timing: Timing


@pytest.fixture
def entries(request, full: bool) -> tuple[tuple[Case, str], ...]:
    """Cases and names of the contestants that this session times in turn with the test's."""
    node = request.node
    items = [item for item in request.session.items if item.path == node.path and hasattr(item, "callspec")]
    found = [(case_of(params, full), params["name"]) for params in (item.callspec.params for item in items)
             if params["size"] == node.callspec.params["size"]]  # fmt: skip
    # A GPU is as fast from one minute to the next, and larger models of all cases may not fit at once.
    alone = case_of(node.callspec.params, full) if ON_GPU or full else None
    return tuple((case, name) for case, name in found if alone in (None, case) and not why_not(case.task, name, full))


@functools.lru_cache(maxsize=1)
def race(size: Size, entries: tuple[tuple[Case, str], ...]) -> dict[tuple[Case, str], Entry]:
    """Contestants, checked and then timed in turn, each on a sample of its case's batches."""
    runners, examples, same = {}, {}, {}
    for entry in entries:
        case, name = entry
        sampled, _ = sample(load(case.task), case.num_batches)
        last = sampled.rows(sampled.tokens.ids[-BATCH_SIZE:])
        # The published loop pads to 128 whatever the batch, so that one batch tells its time, and that of every case.
        examples[entry] = last if name == PUBLISHED else sampled
        same[entry] = next((other for other in runners if name == PUBLISHED == other[1]), entry)
        if same[entry] != entry:
            continue
        ignores_padding = case.padding == "longest"
        check_contestant(name, size, case.padding, mask_padding=ignores_padding)
        runners[entry] = make(name, size, examples[entry], case.padding, mask_padding=ignores_padding)
        for _ in range(warm_up_passes(name)):
            runners[entry].run(sampled if name.endswith(CACHED) or ON_GPU else last)
    timings = in_turn(
        {entry: partial(runner.run, examples[entry]) for entry, runner in runners.items()},
        rounds=20 if ON_GPU and entries[0][0].padding == "max_length" else 5,
    )
    return {entry: Entry(runners[other], examples[entry], timings[other]) for entry, other in same.items()}


def run(measure, entries, full: bool, size: Size, case: Case, name: str, about: dict) -> dict:
    """Time a contestant and record its row; ``about`` are arguments of ``measure``."""
    if reason := why_not(case.task, name, full):
        pytest.skip(reason)
    entry = race(size, entries)[case, name]
    steps = len(entry.examples.tokens) // BATCH_SIZE
    row = measure(
        partial(entry.runner.run, entry.examples), timing=entry.timing, contestant=name, dtype=name.split(", ")[1],
        baseline=PUBLISHED, parts=steps, sampled_batches=steps, **about,
    )  # fmt: skip
    lengths = [MAX_LENGTH] * BATCH_SIZE if case.padding == "max_length" else entry.examples.tokens.lengths
    flops = step_flops(size, lengths, not name.endswith(CACHED))
    add_utilisation(row, entry.timing.roofs, flops / steps, row.get("median_s"))
    if name.startswith("ours") and not name.endswith(GRAPHS):
        row["phase_shares"] = phase_shares(entry.runner, entry.examples)
    return row


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if not name.endswith(CACHED)])
def test_padded(measure, entries, full, size, name):
    about = {"table": "step", "case": f"B {BATCH_SIZE} x S {MAX_LENGTH} padded, {describe(size)}", "profiled": ON_GPU}
    run(measure, entries, full, size, case_of({}, full), name, about)


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("task", TASKS)
def test_epoch(measure, entries, full, size, task, name):
    whole, case = load(task), case_of({"task": task}, full)
    epoch_steps = sample(whole, case.num_batches)[1]
    about = {"table": "epoch", "case": f"{task}, {describe(size)}", "profiled": False, "epoch_steps": epoch_steps}
    about["texts"] = "real" if whole.is_real else "made up"
    row = run(measure, entries, full, size, case, name, about)
    if "median_s" in row:
        row["epoch_seconds_scaled_from_sample_total"] = row["median_s"] * epoch_steps


def add_utilisation(row: dict, roofs: Roofs, flops: float, seconds: float | None) -> None:
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

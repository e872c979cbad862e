"""What each engine option gives by itself, on SST-2's real lengths: the library's step with it and without.

That an option changes no result is ``tests/test_training.py``'s to show.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import pytest
from contestants import CACHED, FASTEST, GRAPHS, ON_GPU, Runner, check_outcome, ours
from measuring import Timing, in_turn, why_not_timed
from workloads import SIZES, Workload, load, sample

BASE = {"precision": FASTEST, "padding": "longest", "multiple": None, "option": None}
PYTORCHS = "PyTorch's own dropout, attention and linear layers on a CPU"
COMPILED = "encoders compiled"
OTHER = "float32" if FASTEST != "float32" else "bfloat16"
OPTIONS = {
    "as training runs it, no cache": {},
    **({} if ON_GPU else {PYTORCHS: {}}),
    OTHER: {"precision": OTHER},
    "widths rounded up to 8": {"multiple": 8},
    "packed": {"padding": "packed"},
    COMPILED: {},
    CACHED: {"option": CACHED},
    GRAPHS: {"option": GRAPHS},
}
BASELINE = next(iter(OPTIONS))
NUM_STEPS = 5 if ON_GPU else 2
SIZE = SIZES["base" if ON_GPU else "minilm"]


def why_not(name: str, full: bool) -> str | None:
    """Why an option takes no part."""
    if name == GRAPHS and not ON_GPU:
        return "CUDA graphs take a GPU"
    if reason := why_not_timed((BASE | OPTIONS[name])["precision"]):
        return reason
    if name == COMPILED and not full:
        return "with --full: two minutes of compiling"
    return 'with --full: the table "epoch" has it' if name == OTHER and not (full or ON_GPU) else None


def warm_steps(name: str, examples: Workload) -> Callable[[], object]:
    """Warm steps with an option, which has passed the gate."""
    chosen = BASE | OPTIONS[name]
    precision, padding, option, multiple = (chosen[key] for key in ("precision", "padding", "option", "multiple"))

    def make(workload: Workload) -> Runner:
        runner = ours(SIZE, precision, padding, True, option, workload, multiple)
        if name == COMPILED:
            for model in (runner.step.student, runner.step.teacher):
                model.base_model.compile(dynamic=True)
        return runner

    def as_chosen() -> AbstractContextManager:
        own = name == PYTORCHS
        return patch("lad_fast.models.faster_forward", lambda model: nullcontext()) if own else nullcontext()

    with as_chosen():
        check_outcome(make, SIZE, "longest", True, precision)
    runner = make(examples)

    def steps() -> None:
        with as_chosen():
            runner.run(examples)

    for _ in range(4 if name == GRAPHS else 1):  # a graph is captured when its shape comes the third time
        steps()
    return steps


@functools.cache
def race(names: tuple[str, ...]) -> dict[str, Timing]:
    """All options, timed in turn."""
    examples, _ = sample(load("sst2"), NUM_STEPS)
    return in_turn({name: warm_steps(name, examples) for name in names}, rounds=5)


@pytest.mark.parametrize("name", OPTIONS)
def test_option(measure, rivals, full, name):
    if reason := why_not(name, full):
        pytest.skip(reason)
    timing = race(tuple(other for other in rivals if why_not(other, full) is None))[name]
    measure(
        None, timing=timing, table="engine", contestant=name, dtype=(BASE | OPTIONS[name])["precision"],
        baseline=BASELINE, parts=NUM_STEPS, profiled=False,
        case=f"sst2, {SIZE.teacher_layers} to {SIZE.student_layers} layers, D {SIZE.hidden_size}",
    )  # fmt: skip

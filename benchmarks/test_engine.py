"""What each engine option gives by itself, on SST-2's real lengths: the library's step with it and without.

That an option changes no result is ``tests/test_training.py``'s to show.
"""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
from contestants import CACHED, GRAPHS, ON_GPU, Runner, check_outcome, ours
from workloads import SIZES, Workload, load, sample

BASE = {"precision": "bfloat16", "padding": "longest", "multiple": None, "option": None}
PYTORCHS = "PyTorch's own dropout, attention and linear layers on a CPU"
COMPILED = "encoders compiled"
FLOAT32 = "float32"
OPTIONS = {
    "as training runs it, no cache": {},
    **({} if ON_GPU else {PYTORCHS: {}}),
    FLOAT32: {"precision": "float32"},
    "widths rounded up to 8": {"multiple": 8},
    "packed": {"padding": "packed"},
    COMPILED: {},
    CACHED: {"option": CACHED},
    GRAPHS: {"option": GRAPHS},
}
BASELINE = next(iter(OPTIONS))


NUM_STEPS = 5


@pytest.fixture(scope="module")
def examples():
    return sample(load("sst2"), NUM_STEPS)[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_option(measure, full, examples, name):
    if name == GRAPHS and not ON_GPU:
        pytest.skip("CUDA graphs take a GPU")
    if name == COMPILED and not full:
        pytest.skip("with --full: two minutes of compiling")
    if name == FLOAT32 and not (full or ON_GPU):
        pytest.skip("with --full: the table \"epoch\" has it")
    chosen = BASE | OPTIONS[name]
    size = SIZES["base" if ON_GPU else "minilm"]

    def make(workload: Workload) -> Runner:
        precision, padding, option, multiple = (chosen[key] for key in ("precision", "padding", "option", "multiple"))
        runner = ours(size, precision, padding, True, option, workload, multiple)
        if name == COMPILED:
            for model in (runner.step.student, runner.step.teacher):
                model.base_model.compile(dynamic=True)
        return runner

    with patch("lad_fast.models.faster_forward", lambda model: nullcontext()) if name == PYTORCHS else nullcontext():
        check_outcome(make, size, "longest", True, chosen["precision"])
        runner = make(examples)
        for _ in range(4 if name == GRAPHS else 1):  # a graph is captured when its shape comes the third time
            runner.run(examples)
        measure(
            lambda: runner.run(examples), table="engine", contestant=name, dtype=chosen["precision"],
            baseline=BASELINE, rounds=5, parts=NUM_STEPS, profiled=False,
            case=f"sst2, {size.teacher_layers} to {size.student_layers} layers, D {size.hidden_size}",
        )  # fmt: skip

"""What each engine option gives by itself, on SST-2's real lengths: the library's step with it and without.

That an option changes no result is ``tests/test_training.py``'s to show.
"""

import pytest
from contestants import CACHED, GRAPHS, ON_GPU, ours
from workloads import SIZES, batches, load, sample

BASE = {"precision": "bfloat16", "padding": "longest", "multiple": None, "option": None}
OPTIONS = {
    "as training runs it, no cache": {},
    "float32": {"precision": "float32"},
    "widths rounded up to 8": {"multiple": 8},
    "packed": {"padding": "packed"},
    CACHED: {"option": CACHED},
    GRAPHS: {"option": GRAPHS},
}
BASELINE = next(iter(OPTIONS))


@pytest.fixture(scope="module")
def examples():
    return sample(load("sst2"), 20)[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_option(measure, examples, name):
    if name == GRAPHS and not ON_GPU:
        pytest.skip("CUDA graphs take a GPU")
    chosen = BASE | OPTIONS[name]
    size, padding = SIZES["base" if ON_GPU else "minilm"], chosen["padding"]
    runner = ours(size, chosen["precision"], padding, True, chosen["option"], examples)

    def run() -> None:
        for batch in batches(examples, padding, chosen["multiple"]):
            runner.step(batch)

    for _ in range(4 if name == GRAPHS else 1):  # a graph is captured when its shape comes the third time
        run()
    measure(
        run, table="engine", case=f"20 steps, sst2, {size.teacher_layers} to {size.student_layers} layers, D "
        f"{size.hidden_size}", contestant=name, dtype=chosen["precision"], baseline=BASELINE, rounds=5, profiled=False,
        steps=20,
    )  # fmt: skip

"""How time and memory grow, as slopes of lines through logarithms: the objective's with tokens and teacher layers, an
epoch's with the examples.
"""

import math
import statistics

import pytest
from contestants import CACHED, ours
from measuring import DEVICE, available_bytes, kept_bytes, median_seconds
from objectives import Contestant, Problem, Shape
from workloads import SIZES, load, our_backend, sample

HIDDEN_SIZE = 384
TOKENS, FULL_TOKENS = (256, 1024, 4096, 16384), (256, 512, 1024, 2048, 4096, 8192, 16384)
EPOCH_BATCHES = (8, 16, 32)
AXES = ("tokens", "layers")


def shapes(axis: str, full: bool) -> list[Shape]:
    if axis == "tokens":
        return [Shape(tokens, HIDDEN_SIZE, 12, seq_len=32) for tokens in (FULL_TOKENS if full else TOKENS)]
    return [Shape(1024, HIDDEN_SIZE, layers) for layers in (6, 12, 24)]


def slope(x: list[float], y: list[float]) -> float | None:
    """Of log y over log x; 1 is proportional. None where something is 0."""
    if min(y) <= 0:
        return None
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


@pytest.mark.parametrize("name", ("reference", our_backend(DEVICE)))
@pytest.mark.parametrize("axis", AXES)
def test_scaling(measure, full, axis, name):
    points = []
    for shape in shapes(axis, full):
        if 6 * shape.layers * shape.state_bytes > available_bytes():
            continue
        contestant = Contestant(name, "objective", Problem(shape, "float32"))
        points.append(
            {
                axis: getattr(shape, axis),
                "seconds": median_seconds(contestant.step),
                "kept_bytes": kept_bytes(contestant.forward, contestant.problem.known),
            }
        )
    x, seconds, kept = ([point[key] for point in points] for key in (axis, "seconds", "kept_bytes"))
    measure(
        contestant.step, table="scaling", contestant=name, axis=axis, points=points, kept_bytes=kept[-1],
        case=f"{axis} {x[0]} to {x[-1]}, the last timed, D {HIDDEN_SIZE}, float32",
        time_slope=slope(x, seconds), kept_slope=slope(x, kept),
    )  # fmt: skip


def test_scaling_of_an_epoch(measure):
    """Epochs of 1, 2 and 4 times as many examples; the memory is what a cache of the teacher takes."""
    whole, size, points = load("sst2"), SIZES["minilm"], []
    for num_batches in EPOCH_BATCHES:
        examples = sample(whole, num_batches)[0]
        runner = ours(size, "bfloat16", "longest", True, CACHED, examples)
        runner.run(examples)  # the cache is full from here on
        points.append(
            {
                "examples": len(examples.tokens),
                "seconds": median_seconds(lambda runner=runner, examples=examples: runner.run(examples)),
                "kept_bytes": runner.step.teacher_cache.nbytes,
            }
        )
    x, seconds, kept = ([point[key] for point in points] for key in ("examples", "seconds", "kept_bytes"))
    measure(
        lambda: runner.run(examples), table="scaling", contestant="an epoch", axis="examples", points=points,
        kept_bytes=kept[-1], case=f"examples {x[0]} to {x[-1]}, the last timed, {CACHED}, sst2", dtype="bfloat16",
        time_slope=slope(x, seconds), kept_slope=slope(x, kept), profiled=False,
    )  # fmt: skip

"""How time and memory grow, as slopes of lines through logarithms: the objective's with tokens and teacher layers, an
epoch's with the examples.
"""

import math
import statistics
from functools import partial

import pytest
from contestants import CACHED, FASTEST, check_contestant, ours
from measuring import DEVICE, available_bytes, kept_bytes, median_seconds
from objectives import Contestant, Problem, Shape, check
from torch import Tensor
from workloads import SIZES, load, our_backend, sample

HIDDEN_SIZE = 384
TOKENS, FULL_TOKENS = (256, 1024, 4096, 16384), (256, 512, 1024, 2048, 4096, 8192, 16384)
EPOCH_BATCHES = (2, 4, 8)
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
    if name == "reference" and not full:
        pytest.skip("with --full")
    points, fitting = [], [s for s in shapes(axis, full) if 6 * s.layers * s.state_bytes <= available_bytes()]
    for shape in fitting:
        contestant = Contestant(name, "objective", Problem(shape, "float32"))
        if name != "reference":
            check(contestant, expected_gradients(shape))
        kept = kept_bytes(contestant.forward, contestant.problem.known)
        # The largest is timed below.
        seconds = median_seconds(contestant.step) if shape != fitting[-1] else None
        points.append({axis: getattr(shape, axis), "seconds": seconds, "kept_bytes": kept})
    row = measure(
        contestant.step, table="scaling", contestant=name, axis=axis, points=points, kept_bytes=kept, profiled=False,
        rounds=5, case=f"{axis} {points[0][axis]} to {points[-1][axis]}, the last timed, D {HIDDEN_SIZE}, float32",
    )  # fmt: skip
    fit(row)


def expected_gradients(shape: Shape) -> list[Tensor]:
    reference = Contestant("reference", "objective", Problem(shape, "float32"))
    reference.step()
    return reference.gradients()


def fit(row: dict) -> None:
    """Put the last point's time and the slopes into a row."""
    if "median_s" not in row:  # with --benchmark-disable
        return
    points = row["points"]
    points[-1]["seconds"] = row["median_s"]
    x, seconds, kept = ([point[key] for point in points] for key in (row["axis"], "seconds", "kept_bytes"))
    row |= {"time_slope": slope(x, seconds), "kept_slope": slope(x, kept)}


def test_scaling_of_an_epoch(measure):
    """Epochs of 1, 2 and 4 times as many examples; the memory is what a cache of the teacher takes."""
    whole, size, points = load("sst2"), SIZES["minilm"], []
    check_contestant(f"ours, {FASTEST}, {CACHED}", size, "longest", True)
    for num_batches in EPOCH_BATCHES:
        examples = sample(whole, num_batches)[0]
        runner = ours(size, FASTEST, "longest", True, CACHED, examples)
        runner.run(examples)  # the cache is full from here on
        run = partial(runner.run, examples)
        points.append(
            {
                "examples": len(examples.tokens),
                "seconds": median_seconds(run) if num_batches != EPOCH_BATCHES[-1] else None,
                "kept_bytes": runner.step.teacher_cache.nbytes,
            }
        )
    row = measure(
        run, table="scaling", contestant="an epoch", axis="examples", points=points, dtype=FASTEST,
        kept_bytes=points[-1]["kept_bytes"], profiled=False, rounds=5, case=f"examples {points[0]['examples']} to "
        f"{points[-1]['examples']}, the last timed, {CACHED}, sst2",
    )  # fmt: skip
    fit(row)

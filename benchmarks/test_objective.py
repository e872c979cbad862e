"""The objective and its parts, back end beside back end.

A case's contestants have to give the reference's gradients; then they are timed in turn. The objective's sizes are
BERT-base's (D 768, L 12, K 6): 480 tokens, a packed SST-2 batch; 4096, the published batch of 32 examples padded to
128. In bfloat16, states are float32 under autocast, as a model hands them over; on a GPU the teacher's are bfloat16, as
a cache does.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from measuring import DTYPES, Timing, available_bytes, copies_past_l2, in_turn, kept_bytes, rotating, why_not_timed
from objectives import OPERATIONS, Contestant, Problem, Shape, check, contestants, problem, right

SIZES = (Shape(480, 768, 12, seq_len=32), Shape(4096, 768, 12))
FULL_SIZES = tuple(
    Shape(tokens, hidden_size, layers, seq_len=32 if tokens == 480 else 128)
    for hidden_size in (384, 768, 1024)
    for layers in (12, 24)
    for tokens in (480, 4096, 16384)
)
PART_SIZE = Shape(4096, 384, 12)


NAMES = ("reference", "triton", "torch", "published", "compiled", "liger")
PASSES = ("forward", "forward+backward")


def by_default(operation: str, passes: str, shape: Shape, name: str) -> bool:
    """Whether a case belongs to the run without --full, which is to take about five minutes on two cores."""
    if passes == "forward":  # where gradients are made in forward, it is most of both
        return False
    # The slowest is timed once, at the small size, and what takes longest to get ready once, at the large one.
    return {"published": shape.tokens < 4096, "compiled": shape.tokens >= 4096}.get(name, True)


class Entry(NamedTuple):
    """A contestant that was timed."""

    runners: list[Contestant]
    step: Callable[[], object]
    timing: Timing
    kept_bytes: int


@functools.lru_cache(maxsize=1)
def race(operation: str, passes: str, dtype: str, shape: Shape, names: tuple[str, ...]) -> dict[str, Entry]:
    """A case's contestants, checked and then timed in turn."""
    inputs = [problem(shape, dtype)]
    inputs += [Problem(shape, dtype) for _ in range(copies_past_l2(shape.layers * shape.state_bytes) - 1)]
    expected = right(operation, shape, dtype).gradients
    torch.compiler.reset()  # past some recompilations, dynamo would run it eagerly and say nothing
    runners, steps, kept = {}, {}, {}
    for name in names:
        runners[name] = [Contestant(name, operation, each) for each in inputs]
        if name != "reference":
            check(runners[name][0], expected)
        steps[name] = rotating([r.forward if passes == "forward" else r.step for r in runners[name]])
        kept[name] = kept_bytes(runners[name][0].forward, inputs[0].known)
    timings = in_turn(steps)
    return {name: Entry(runners[name], steps[name], timings[name], kept[name]) for name in names}


def run(
    measure, rivals: tuple[str, ...], full: bool, operation: str, passes: str, dtype: str, shape: Shape, name: str
) -> None:
    if reason := why_not_timed(dtype):
        pytest.skip(reason)
    known = contestants(operation, dtype)
    if name not in known:
        pytest.skip(f"{name} takes no part in {operation} in {dtype} here")
    if not full and not by_default(operation, passes, shape, name):
        pytest.skip("with --full")
    copies = copies_past_l2(shape.layers * shape.state_bytes)
    if (copies + 1) * 6 * shape.layers * shape.state_bytes > available_bytes():
        pytest.skip(f"{shape} may not fit into {available_bytes() / 2**30:.0f} GiB")
    names = (other for other in rivals if other in known and (full or by_default(operation, passes, shape, other)))
    entry = race(operation, passes, dtype, shape, tuple(names))[name]
    flops, moved = right(operation, shape, dtype).work[passes]
    for runner in entry.runners:  # those of the step before would make room in its peak
        runner.drop_gradients()
    measure(
        entry.step, timing=entry.timing, table=operation, case=f"{passes}, {shape}, {dtype}", contestant=name,
        dtype=dtype, flops=flops, moved=moved, kept_bytes=entry.kept_bytes, passes=passes, tokens=shape.tokens,
        hidden_size=shape.hidden_size, layers=shape.layers,
    )  # fmt: skip


# The uppermost varies fastest: a case's contestants come one after another, and so do cases of one problem.
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_objective(measure, rivals, full, full_size, passes, dtype, name):
    run(measure, rivals, full, "objective", passes, dtype, full_size, name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "compiled"])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "objective"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_part(measure, rivals, full, operation, passes, dtype, name):
    run(measure, rivals, full, operation, passes, dtype, PART_SIZE, name)

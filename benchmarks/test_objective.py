"""The objective and its parts, back end beside back end.

Before a case is timed, the contestant has to give the reference's gradients; then its rounds and the reference's take
turns. The objective's sizes are BERT-base's (D 768, L 12, K 6): 480 tokens, a packed SST-2 batch; 4096, the published
batch of 32 examples padded to 128. In bfloat16, states are float32 under autocast, as a model hands them over; on a GPU
the teacher's are bfloat16, as a cache does.
"""

import pytest
import torch
from measuring import DTYPES, available_bytes, copies_past_l2, kept_bytes, rotating
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


def run(measure, full: bool, operation: str, passes: str, dtype: str, shape: Shape, name: str) -> None:
    if name not in contestants(operation, dtype):
        pytest.skip(f"{name} takes no part in {operation} in {dtype} here")
    if not full and not by_default(operation, passes, shape, name):
        pytest.skip("with --full")
    if name == "compiled":
        torch.compiler.reset()  # past some recompilations, dynamo would run it eagerly and say nothing
    copies = copies_past_l2(shape.layers * shape.state_bytes)
    if (copies + 1) * 6 * shape.layers * shape.state_bytes > available_bytes():
        pytest.skip(f"{shape} may not fit into {available_bytes() / 2**30:.0f} GiB")
    reference = right(operation, shape, dtype)
    inputs = [problem(shape, dtype), *(Problem(shape, dtype) for _ in range(copies - 1))]
    runners = [Contestant(name, operation, each) for each in inputs]
    first = runners[0]
    if name != "reference":
        check(first, reference.gradients)
    flops, moved = reference.work[passes]
    baselines = [Contestant("reference", operation, each) for each in inputs] if name != "reference" else []

    def in_turn(contestants: list[Contestant]):
        return rotating([c.forward if passes == "forward" else c.step for c in contestants])

    measure(
        in_turn(runners), beside=in_turn(baselines) if baselines else None, table=operation,
        case=f"{passes}, {shape}, {dtype}", contestant=name, dtype=dtype, flops=flops, moved=moved,
        kept_bytes=kept_bytes(first.forward, first.problem.known), passes=passes, tokens=shape.tokens,
        hidden_size=shape.hidden_size, layers=shape.layers,
    )  # fmt: skip


# The uppermost varies fastest: who shares a problem comes one after another.
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_objective(measure, full, full_size, passes, dtype, name):
    run(measure, full, "objective", passes, dtype, full_size, name)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "compiled"])
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "objective"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_part(measure, full, operation, passes, dtype, name):
    run(measure, full, operation, passes, dtype, PART_SIZE, name)

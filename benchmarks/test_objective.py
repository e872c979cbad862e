"""The objective and its parts, back end beside back end.

Before a case is timed, the contestant has to give the reference's gradients. The objective's sizes are BERT-base's
(D 768, L 12, K 6): 480 tokens, a packed SST-2 batch; 4096, the published batch of 32 examples padded to 128. In
bfloat16, states are bfloat16 on a GPU; on a CPU they stay float32 under autocast, as a model hands them over there.
"""

import pytest
from measuring import DTYPES, available_bytes, copies_past_l2, kept_bytes, rotating
from objectives import OPERATIONS, Contestant, Problem, Shape, check, contestants, work

SIZES = (Shape(480, 768, 12, seq_len=32), Shape(4096, 768, 12))
FULL_SIZES = tuple(
    Shape(tokens, hidden_size, layers, seq_len=32 if tokens == 480 else 128)
    for hidden_size in (384, 768, 1024)
    for layers in (12, 24)
    for tokens in (480, 4096, 16384)
)
PART_SIZE = Shape(4096, 384, 12)


def run(measure, operation: str, passes: str, dtype: str, shape: Shape, name: str) -> None:
    if name not in contestants(operation, dtype):
        pytest.skip(f"{name} takes no part in {operation} in {dtype} here")
    copies = copies_past_l2(shape.layers * shape.state_bytes)
    if (copies + 1) * 6 * shape.layers * shape.state_bytes > available_bytes():
        pytest.skip(f"{shape} may not fit into {available_bytes() / 2**30:.0f} GiB")
    runners = [Contestant(name, operation, Problem(shape, dtype)) for _ in range(copies)]
    first = runners[0]
    check(first, operation)
    flops, moved = work(operation, shape, dtype)[passes]
    measure(
        rotating([r.forward if passes == "forward" else r.step for r in runners]),
        table=operation, case=f"{passes}, {shape}, {dtype}", contestant=name, dtype=dtype, flops=flops, moved=moved,
        kept_bytes=kept_bytes(first.forward, first.problem.known), passes=passes, tokens=shape.tokens,
        hidden_size=shape.hidden_size, layers=shape.layers,
    )  # fmt: skip


NAMES = ("reference", "triton", "torch", "published", "compiled", "liger")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("passes", ("forward", "forward+backward"))
def test_objective(measure, full_size, passes, dtype, name):
    run(measure, "objective", passes, dtype, full_size, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("passes", ("forward", "forward+backward"))
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "objective"])
def test_part(measure, full, operation, passes, dtype, name):
    if not full and (passes == "forward" or name == "compiled"):
        pytest.skip("with --full")
    run(measure, operation, passes, dtype, PART_SIZE, name)

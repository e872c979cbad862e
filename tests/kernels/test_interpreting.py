"""The interpreter's concurrent programs, and the traffic that it counts against numbers counted by hand."""

import threading
from contextlib import ExitStack

import pytest
import torch
from cases import Case, operands
from interpreting import DeadlockError, concurrent_programs, counted_traffic

from lad_fast.kernels import launch, ops

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="Triton's kernels do not run in the interpreter")
ORDERS = ("forward", "backward", 0, 1, 2)


@triton.jit
def _wait(counter_ptr, target, WAIT: tl.constexpr):
    if WAIT == "add":
        while tl.atomic_add(counter_ptr, 0, sem="acquire") < target:
            pass
    if WAIT == "cas":
        while tl.atomic_cas(counter_ptr, target, target, sem="acquire") != target:
            pass
    if WAIT == "volatile":
        while tl.load(counter_ptr, volatile=True) < target:
            pass


@triton.jit
def _neighbour_kernel(values_ptr, out_ptr, counter_ptr, target, WAIT: tl.constexpr, EARLY: tl.constexpr):
    """Each program passes its value on to the one before it; EARLY: it arrives before it has written."""
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    i = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    if EARLY:
        tl.atomic_add(counter_ptr, 1)
    tl.store(values_ptr + i, i * i)
    if not EARLY:
        tl.atomic_add(counter_ptr, 1)
    _wait(counter_ptr, target, WAIT)
    # The index once more: other programs have run since.
    i = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(out_ptr + i, tl.load(values_ptr + (i + 1) % programs))


def neighbours(grid=(6,), missing=0, wait="add", early=False) -> bool:
    """Whether every program got its neighbour's value."""
    programs = torch.Size(grid).numel()
    values, out = torch.full((2, programs), -1, dtype=torch.int32)
    counter = torch.zeros(1, dtype=torch.int32)
    _neighbour_kernel[grid](values, out, counter, target=programs + missing, WAIT=wait, EARLY=early)
    return torch.equal(out, (torch.arange(programs, dtype=torch.int32) ** 2).roll(-1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", ((1,), (64,), (3, 5), (2, 3, 4)))
def test_programs_wait_for_one_another(grid, order):
    with concurrent_programs(order):
        assert neighbours(grid)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wait", ("add", "cas", "volatile"))
def test_every_way_to_wait(wait, order):
    with concurrent_programs(order):
        assert neighbours(wait=wait)


def test_a_race_shows_under_some_seed():
    """Where all programs keep pace, none reads before all have written, although nothing makes it wait for that."""
    right = {}
    for order in ("forward", *range(5)):
        with concurrent_programs(order):
            right[order] = neighbours(early=True)
    assert right.pop("forward")
    assert not all(right.values())


@pytest.mark.parametrize("order", ("forward", 0))
def test_deadlock(order):
    threads = threading.active_count()
    with concurrent_programs(order):
        with pytest.raises(DeadlockError, match="deadlock in _neighbour_kernel: 6 of 6 programs"):
            neighbours(missing=1)
        assert neighbours()
    assert threading.active_count() == threads


def test_order_is_checked():
    with pytest.raises(ValueError, match="sideways"), concurrent_programs("sideways"):
        pass


@triton.jit
def _failing_kernel(counter_ptr):
    tl.atomic_add(counter_ptr, 1)
    tl.static_assert(tl.program_id(0) != 2, "program 2 fails")
    _wait(counter_ptr, 10, "add")


def test_an_error_stops_all_programs():
    threads = threading.active_count()
    with (
        concurrent_programs(),
        pytest.raises(triton.runtime.errors.InterpreterError, match="program 2 fails"),
    ):
        _failing_kernel[(4,)](torch.zeros(1, dtype=torch.int32))
    assert threading.active_count() == threads


@triton.jit
def _copy_kernel(sources, out_ptr, counter_ptr, size, REPEAT: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of two sources, each loaded REPEAT times."""
    o_block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_block = o_block < size
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(len(sources)):
        for _ in range(REPEAT):
            b_sum += tl.load(sources[j] + o_block, mask=m_block, other=0.0).to(tl.float32)
    tl.store(out_ptr + o_block, b_sum, mask=m_block)
    tl.atomic_add(counter_ptr, 1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_traffic_of_a_masked_copy(dtype):
    """21 elements in blocks of 8, of two sources, each three times."""
    sources, out = (torch.ones(21, dtype=dtype), torch.ones(30, dtype=dtype)), torch.empty(21)
    counter = torch.zeros(1, dtype=torch.int32)
    with counted_traffic() as traffic:
        for _ in range(2):
            _copy_kernel[(3,)](sources, out, size=21, REPEAT=3, BLOCK=8, counter_ptr=counter)
    assert set(traffic) == {"_copy_kernel"}
    counts, size = traffic["_copy_kernel"], dtype.itemsize
    assert counts.launches == 2
    assert counts.loaded == {"sources": 2 * 2 * 3 * 21 * size, "counter_ptr": 2 * 3 * 4}
    assert counts.distinct_loaded == {"sources": 2 * 2 * 21 * size, "counter_ptr": 2 * 4}
    assert counts.stored == {"out_ptr": 2 * 21 * 4, "counter_ptr": 2 * 3 * 4}
    assert counts.distinct_stored == {"out_ptr": 2 * 21 * 4, "counter_ptr": 2 * 4}
    assert torch.equal(out, torch.full((21,), 6.0))


@triton.jit
def _walk_kernel(part_ptr, rows_ptr, address, steps, D: tl.constexpr):
    """Walks from one row of a stack to the next ones."""
    o_cols = tl.arange(0, D)
    b_sum = tl.load(tl.cast(address, tl.pointer_type(tl.float32)) + o_cols)
    for i in range(steps):
        b_sum += tl.load(part_ptr + i * D + o_cols)
    tl.store(rows_ptr + o_cols, b_sum)


def test_traffic_of_views_and_of_what_is_no_argument():
    """The smallest view that holds an address owns it; what lies in none, the storage's first argument."""
    stack, hidden = torch.zeros(4, 8), torch.zeros(8)
    with counted_traffic() as traffic:
        _walk_kernel[(1,)](stack[0], stack[1:3], hidden.data_ptr(), 4, D=8)
    counts = traffic["_walk_kernel"]
    assert counts.loaded == {"?": 32, "part_ptr": 64, "rows_ptr": 64}  # rows 0 and 3; 1 and 2
    assert counts.stored == {"rows_ptr": 32}


@pytest.mark.parametrize("traffic_first", (False, True))
def test_both_at_once(traffic_first):
    managers = [concurrent_programs("backward"), counted_traffic()]
    with ExitStack() as stack:
        entered = [stack.enter_context(manager) for manager in (managers[::-1] if traffic_first else managers)]
        assert neighbours()
    counts = next(value for value in entered if value is not None)["_neighbour_kernel"]
    assert counts.stored["values_ptr"] == counts.loaded["values_ptr"] == 6 * 4
    assert counts.loaded["counter_ptr"] > counts.distinct_loaded["counter_ptr"] == 4


@pytest.mark.parametrize("mode", ("plain", "packed"))
def test_the_chain_gives_the_same_bits(mode):
    """And reads every state of the teacher, nothing but its arguments."""
    case = Case(batch=3, length=20, hidden_size=40, mode=mode, seq_len=24)
    hidden, _, gates, where = operands(case, case.build(torch.bfloat16))
    arguments = hidden, *gates, *where, 1e-5, torch.float32, "gates", "triton"
    _, aggregates, gates, mean, rstd = ops.aggregate_forward(*arguments)
    with concurrent_programs(0), counted_traffic() as traffic:
        _, ours, our_gates, *statistics = ops.aggregate_forward(*arguments)
    for left, right in zip((ours, *our_gates, *statistics), (aggregates, *gates, mean, rstd), strict=True):
        assert torch.equal(left, right)
    assert traffic
    assert sum(counts.loaded.total() for counts in traffic.values()) > sum(h.nbytes for h in hidden)
    assert not any(counts.loaded["?"] or counts.stored["?"] for counts in traffic.values())

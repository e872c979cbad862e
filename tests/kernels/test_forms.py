"""The forms in which the chain can be launched: each against the float64 reference, and all against one another.

Forms whose programs wait for one another run here with all programs of a launch at once, in several orders.
"""

from dataclasses import replace

import pytest
import torch
from cases import TOLERANCE, Case, check, operands, relative_error, run, run_loss
from interpreting import concurrent_programs, counted_traffic

import lad_fast
from lad_fast.functional import LogitsLoss, chain_loss
from lad_fast.kernels import launch, ops

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels
FORMS = {
    "triton": ("triton", "triton"),
    "cublas": ("cublas", "triton"),
    "persistent": ("persistent", "persistent"),
}
MODES = ("plain", "masked", "packed")


def choice(forward: str, backward: str, **changes) -> launch.ChainLaunch:
    """The interpreter's small tiles, which a GPU runs as well."""
    return replace(launch.INTERPRETED, forward=forward, backward=backward, **changes)


@pytest.fixture
def form(request):
    """Launch the chain in one of :data:`FORMS`."""
    with launch.forced(choice(*FORMS[request.param])):
        yield request.param


def same(ours: dict, others: dict) -> bool:
    return all(value is None or torch.equal(value, others[name]) for name, value in ours.items())


every_form = pytest.mark.parametrize("form", FORMS, indirect=True)


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [*((torch.float32, mode) for mode in MODES), (torch.bfloat16, "masked"), (torch.float16, "packed")],
)
@pytest.mark.parametrize("norm", ("sequence", "token"))
@every_form
def test_equals_the_reference(form, norm, dtype, mode, poisoned_allocations):
    """Several row tiles and column tiles; examples that lie across row tiles; a student at the chain's start."""
    case = Case(batch=3, length=19, hidden_size=40, layers=3, wanted=(0, 2), norm=norm, mode=mode, seq_len=24)
    inputs = case.build(dtype)
    expected = run_loss(case, inputs, torch.float64, "reference")
    with concurrent_programs():
        check(run_loss(case, inputs, dtype, "triton"), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("mode", MODES)
@every_form
def test_aggregates_alone_and_their_gradients(form, mode, poisoned_allocations):
    case = Case(batch=2, length=21, hidden_size=36, layers=3, wanted=(1, 2), mode=mode, seq_len=24)
    inputs = case.build(torch.float32)
    expected = run(case, inputs, torch.float64, "reference")
    with concurrent_programs():
        check(run(case, inputs, torch.float32, "triton"), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ("sequence", "token"))
def test_forms_agree_to_the_last_bit_in_float32(norm, mode):
    """They run the same tiles in the same order. cuBLAS sums in an order of its own."""
    case = Case(batch=3, length=20, hidden_size=40, layers=3, wanted=(1, 2), norm=norm, mode=mode, seq_len=24)
    inputs = case.build(torch.float32)
    results = []
    for forms in (FORMS["triton"], FORMS["persistent"], ("triton", "persistent")):
        with launch.forced(choice(*forms)), concurrent_programs():
            results.append(run_loss(case, inputs, torch.float32, "triton"))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("form", ("persistent", "cublas"), indirect=True)
def test_no_order_of_programs_changes_a_bit(form):
    case = Case(batch=2, length=40, hidden_size=40, layers=3, wanted=(0, 2), mode="masked", seq_len=40)
    inputs = case.build(torch.float32)
    with concurrent_programs():
        expected = run_loss(case, inputs, torch.float32, "triton")
    for order in ("backward", 1, 2, 3):
        with concurrent_programs(order=order):
            assert same(run_loss(case, inputs, torch.float32, "triton"), expected), order


@pytest.mark.parametrize(("norm", "length"), (("token", 50), ("sequence", 32), ("sequence", 16)))
@pytest.mark.parametrize("form", ("persistent", "cublas"), indirect=True)
def test_programs_take_several_row_tiles(form, norm, length):
    """Fewer programs at once than tiles: each takes one row tile after another through all gates."""
    case = Case(batch=5, length=length, hidden_size=40, layers=3, wanted=(1, 2), norm=norm, seq_len=length)
    inputs = case.build(torch.float32)
    expected = run_loss(case, inputs, torch.float64, "reference")
    with launch.forced(choice(*FORMS[form], multiprocessors=5)), concurrent_programs():
        check(run_loss(case, inputs, torch.float32, "triton"), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("mode", ("plain", "packed"))
@pytest.mark.parametrize("form", ("persistent", "cublas"), indirect=True)
def test_no_program_waits_for_one_that_cannot_run(form, mode, monkeypatch):
    """Examples across row tiles, and not all tiles at once: the form without waiting takes over."""
    launches = []
    monkeypatch.setattr(launch, "cooperative", lambda tile: launches.append(tile) or {})
    case = Case(batch=5, length=20, hidden_size=40, layers=3, wanted=(1, 2), mode=mode, seq_len=24)
    inputs = case.build(torch.float32)
    expected = run_loss(case, inputs, torch.float64, "reference")
    with launch.forced(choice(form, "triton", multiprocessors=5)):
        check(run_loss(case, inputs, torch.float32, "triton"), expected, TOLERANCE[torch.float32])
    assert launches
    assert not any(launches)


@every_form
def test_counters_are_left_zero(form, monkeypatch):
    """So that the next launch can count from there."""
    kept = {}

    def counters(device, size):
        return kept.setdefault(size, torch.zeros(size, dtype=torch.int32))

    monkeypatch.setattr(launch, "counters", counters)
    case = Case(batch=2, length=40, hidden_size=40, layers=2, wanted=(0, 1), seq_len=40)
    inputs = case.build(torch.float32)
    with concurrent_programs():
        first, second = (run_loss(case, inputs, torch.float32, "triton") for _ in range(2))
    assert same(first, second)
    assert kept
    assert not any(counter.any() for counter in kept.values())


@pytest.mark.parametrize(
    ("form", "backend"), (("triton", "triton"), ("persistent", "triton"), ("triton", "torch")), indirect=["form"]
)
def test_memory_low_gives_the_same_bits(form, backend):
    """The gates come from the same product once more."""
    case = Case(batch=3, length=20, hidden_size=40, layers=3, wanted=(1, 2), mode="masked", seq_len=24)
    inputs = case.build(torch.float32)

    def function(memory):
        return lambda *rest, **options: chain_loss(*rest, memory=memory, **options)

    with concurrent_programs():
        fast, low = (run_loss(case, inputs, torch.float32, backend, function(memory)) for memory in ("fast", "low"))
    assert same(fast, low)


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_memory_low_keeps_no_gates(backend):
    case = Case(layers=6, wanted=(5,))
    inputs = case.build(torch.float32)
    kept = {}
    for memory in ("fast", "low"):
        gates = [g.clone().requires_grad_() for g in inputs["gates"]]
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            lad_fast.fused_aggregate(inputs["hidden"], gates, case.wanted, memory=memory, backend=backend)
        kept[memory] = sum(sizes.values())
    assert kept["fast"] - kept["low"] == 5 * inputs["hidden"][0].nbytes


# What of loss, hidden loss, logits loss and the K hidden losses is differentiated.
UPSTREAM = ((1.0, 0.0, 0.0, ()), (0.0, 1.0, 0.0, ()), (0.0, 0.0, 1.0, ()), (2.0, 3.0, 5.0, (7.0, 11.0)))


def all_losses(inputs, dtype, backend, regression, upstream, trained) -> list[torch.Tensor]:
    """All losses and the gradients of logits, student, gates and teacher's states: those that are trained."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    logits = torch.randn(2, 11, 1 if regression else 5, generator=generator).bfloat16().to(dtype)
    labels = torch.rand(11, generator=generator).to(wide) if regression else torch.arange(11) % 5
    tensors = {
        "logits": [logits[0]], "student": inputs["student"], "gates": inputs["gates"], "hidden": inputs["hidden"]
    }  # fmt: skip
    leaves = {
        name: [t.detach().to(wide if name == "gates" else dtype).requires_grad_(name in trained) for t in found]
        for name, found in tensors.items()
    }
    loss = LogitsLoss(leaves["logits"][0], logits[1], labels, 2.0, 0.3, 0.6, regression)
    *sums, each = chain_loss(
        leaves["student"], leaves["hidden"], leaves["gates"], (0, 2), inputs["attention_mask"], None, 50.0,
        logits=loss, backend=backend,
    )  # fmt: skip
    # Autograd hands on what takes part, and no zeros for the rest.
    weights = (*upstream[:3], torch.tensor(upstream[3] or 0.0))
    parts = [(t * w).sum() for t, w in zip((*sums, each), weights, strict=True) if torch.as_tensor(w).any()]
    parts = [part for part in parts if part.requires_grad]
    taken = [t for name in trained for t in leaves[name]]
    gradients = torch.autograd.grad(sum(parts), taken, allow_unused=True) if parts else [None] * len(taken)
    return [*(t.detach() for t in (*sums, each)), *gradients]


EVERYTHING = ("logits", "student", "gates", "hidden")
TOGETHER = (
    *((EVERYTHING, upstream, False) for upstream in UPSTREAM),
    (EVERYTHING, UPSTREAM[3], True),
    (("logits", "student"), UPSTREAM[0], False),
    (("logits", "student"), UPSTREAM[3], True),
    (("logits",), UPSTREAM[0], False),
    (("logits",), UPSTREAM[1], False),
    (("student", "gates"), UPSTREAM[0], False),
)


@pytest.mark.parametrize(("trained", "upstream", "regression"), TOGETHER)
@pytest.mark.parametrize("form", (*FORMS, "torch"))
def test_all_losses_at_once(form, trained, upstream, regression, monkeypatch, poisoned_allocations):
    """One launch sums examples' losses and hidden losses, several steps of each; backward scales the logits' slope."""
    monkeypatch.setattr(launch, "CLASSES_PER_STEP", 2)
    case = Case(batch=3, length=7, layers=3, wanted=(0, 2), mode="masked")
    inputs = case.build(torch.bfloat16)
    expected = all_losses(inputs, torch.float64, "reference", regression, upstream, trained)
    with launch.forced(choice(*FORMS.get(form, FORMS["triton"]))), concurrent_programs():
        backend = "torch" if form == "torch" else "triton"
        found = all_losses(inputs, torch.bfloat16, backend, regression, upstream, trained)
    for ours, right in zip(found, expected, strict=True):
        if right is None or not right.any():
            assert ours is None or not ours.any()
        else:
            assert relative_error(ours, right) < TOLERANCE[torch.bfloat16]
    losses = found[:4]
    assert all(loss.dtype == torch.float32 for loss in losses)
    torch.testing.assert_close(losses[0], losses[1] + losses[2])
    torch.testing.assert_close(losses[1], losses[3].sum())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_frozen_gates_keep_differences_alone(backend, mode, dtype):
    """A student's gradient needs no chain in backward."""
    case = Case(batch=3, length=7, wanted=(0, 2), mode=mode)
    inputs = case.build(dtype)
    gradients = []
    for name, kind in ((backend, dtype), ("reference", torch.float64)):
        student = [h.to(kind).requires_grad_() for h in inputs["student"]]
        gates = [g.to(torch.float64 if kind == torch.float64 else torch.float32) for g in inputs["gates"]]
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            losses = chain_loss(
                student, [h.to(kind) for h in inputs["hidden"]], gates, case.wanted, inputs["attention_mask"],
                inputs["cu_seqlens"], 50.0, backend=name,
            )  # fmt: skip
        # Two weights, since a second student layer must not get the first one's.
        gradients.append(torch.autograd.grad((losses * torch.tensor([1.0, 3.0])).sum(), student, retain_graph=True))
        if name == backend:
            assert sum(sizes) == sum(h.nbytes for h in student) + 4
            again = torch.autograd.grad((losses * torch.tensor([1.0, 3.0])).sum(), student)
            assert all(torch.equal(a, b) for a, b in zip(gradients[0], again, strict=True))
    for ours, right in zip(*gradients, strict=True):
        assert (ours.double() - right).norm() < TOLERANCE[dtype] * right.norm()


# Of 38 rows in examples of at most 24: the bounds, the rows that they hold rightly, and the rows that they do not.
UNREAD_BOUNDS = {
    "too long": ([0, 10, 38], slice(0, 10), slice(10, 38)),
    "end behind the last row": ([0, 10, 40], slice(0, 10), slice(10, 38)),
    "end far behind the last row": ([0, 10, 1 << 30], slice(0, 10), slice(10, 38)),
    "end before the last row": ([0, 10, 30], slice(0, 10), slice(30, 38)),
    "begin behind the first row": ([4, 10, 34, 38], slice(10, 34), slice(0, 4)),
    "begin before the first row": ([-5, 10, 34, 38], slice(10, 34), slice(0, 10)),
    "of another batch": ([100, 110, 134, 138], slice(0, 0), slice(0, 38)),
}


@pytest.mark.parametrize("bounds", UNREAD_BOUNDS)
@pytest.mark.parametrize("form", ("torch", *FORMS))
def test_wrong_bounds_that_nobody_read(form, bounds, monkeypatch):
    """Bounds on a GPU are not read on the host: where they are wrong, states are NaN, nothing outside is touched and
    no program waits for ever."""
    monkeypatch.setattr(launch, "torch_block_rows", lambda state: None)
    case = Case(batch=2, length=19, hidden_size=40, layers=3, wanted=(1, 2), mode="packed", seq_len=24)
    hidden, _, gates, _ = operands(case, case.build(torch.float32))

    def states(bounds: list[int], backend: str) -> torch.Tensor:
        where = None, torch.tensor(bounds, dtype=torch.int32), 0
        _, aggregates, *saved = ops.aggregate_forward(hidden, *gates, *where, 1e-5, torch.float32, "gates", backend)
        grads = [None, torch.ones_like(aggregates[-1])]
        read = None if backend == "torch" else aggregates
        ops.aggregate_backward(grads, hidden, *gates, read, *saved, *where, 1e-5, True, True, backend)
        return aggregates[-1]

    wrong, kept, lost = UNREAD_BOUNDS[bounds]
    right = states([0, 10, 34, 38], "torch")
    if form == "torch":
        found = states(wrong, "torch")
    else:
        with launch.forced(choice(*FORMS[form])), concurrent_programs(), counted_traffic() as traffic:
            found = states(wrong, "triton")
        assert traffic
        assert not any(counts["?"] for kernel in traffic.values() for counts in (kernel.loaded, kernel.stored))
    torch.testing.assert_close(found[kept], right[kept], rtol=0, atol=1e-5)  # of values around 1, float32's rounding
    assert found[lost].isnan().all()

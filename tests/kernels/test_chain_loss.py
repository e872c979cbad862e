"""The chain and the hidden loss in one operator, both back ends against the float64 reference."""

import pytest
import torch
from cases import TOLERANCE, Case, check, operands, relative_error, run_loss

import lad_fast
from lad_fast.functional import chain_loss
from lad_fast.kernels import eager, launch, ops

pytestmark = pytest.mark.kernels
BACKENDS = ("torch", "triton")
MODES = ("plain", "masked", "packed")


@pytest.fixture
def small_blocks(monkeypatch):
    """A few rows a block, and a few blocks a product, so that the "torch" back end takes several of a test's sizes."""
    monkeypatch.setattr(launch, "CPU_BLOCK_ELEMENTS", 7 * 24)
    monkeypatch.setattr(launch, "PRODUCT_ROWS", 16)


def compare(case: Case, dtype: torch.dtype, backend: str, seed: int = 0, tolerance: float | None = None) -> None:
    inputs = case.build(dtype, seed)
    expected = run_loss(case, inputs, torch.float64, "reference")
    check(run_loss(case, inputs, dtype, backend), expected, tolerance or TOLERANCE[dtype])


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ("sequence", "token"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mode(backend, dtype, norm, mode, reverse, poisoned_allocations, small_blocks):
    compare(Case(norm=norm, mode=mode, reverse=reverse), dtype, backend)


# One token; one row an example; odd sizes; BERT's D; one student layer and one a teacher layer, the chain's untouched
# start among them; that start alone; an early end of the chain; layers out of order.
SIZES = (
    Case(batch=1, length=1),
    Case(batch=5, length=1, hidden_size=100),
    Case(batch=2, length=37, hidden_size=100, layers=3, wanted=(2,)),
    Case(batch=1, length=9, hidden_size=768, layers=2, wanted=(1,), seq_len=16),
    Case(layers=12, wanted=(11,)),
    Case(layers=12, wanted=tuple(range(12))),
    Case(layers=3, wanted=(0,)),
    Case(layers=12, wanted=(0, 5)),
    Case(layers=12, wanted=(3, 1)),
)


@pytest.mark.parametrize("case", SIZES, ids=repr)
@pytest.mark.parametrize("norm", ("sequence", "token"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend, norm, case, poisoned_allocations):
    compare(Case(**{**vars(case), "norm": norm}), torch.float32, backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ("sequence", "token"))
def test_gradcheck(norm, mode, small_blocks):
    case = Case(batch=2, length=3, hidden_size=3, layers=3, wanted=(0, 2), norm=norm, mode=mode, seq_len=4)
    inputs = case.build(torch.float64)
    tensors = [t.double().requires_grad_() for t in (*inputs["student"], *inputs["hidden"], *inputs["gates"])]
    where = inputs["attention_mask"], inputs["cu_seqlens"]

    def function(*tensors):
        return chain_loss(tensors[:2], tensors[2:5], tensors[5:], case.wanted, *where, backend="torch")

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("norm", ("sequence", "token"))
@pytest.mark.parametrize("mode", MODES)
def test_backward_runs_the_chain_to_the_same_bits(mode, norm, dtype, small_blocks):
    """The "torch" back end keeps the gates alone, and its backward makes the aggregates again."""
    case = Case(batch=4, length=6, mode=mode, norm=norm)
    hidden, _, (weight, bias, *affine), where = operands(case, case.build(torch.float32))
    weight, top, seen, met = weight.to(dtype), case.layers - 1, {}, []

    def note(position, block, state):
        seen[position, block.rows.start] = state.clone()

    def compare(position, block, state, carry):
        met.append((position, block.rows.start))
        assert torch.equal(state, seen[met[-1]])
        return torch.ones_like(state) if carry is None else carry

    gates = eager._forward(hidden, weight, bias, *affine, *where, 1e-5, "gates", note)
    eager._backward(hidden, weight, bias, *affine, gates, *where, 1e-5, top, True, True, compare)
    assert len(seen) > 2 * case.layers  # several blocks
    assert sorted(met) == sorted(seen)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_backward_is_bitwise_deterministic(backend, mode, small_blocks):
    case = Case(batch=3, length=17, hidden_size=40, layers=3, wanted=(0, 2), mode=mode, seq_len=24)
    inputs = case.build(torch.float32)
    first, second = (run_loss(case, inputs, torch.float32, backend) for _ in range(2))
    for name, value in first.items():
        assert value is None or torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_two_operators_one_after_another(backend, dtype):
    """Also where the student's dtype is not the teacher's."""
    case = Case()
    inputs = case.build(dtype)
    student = [h.float() for h in inputs["student"]]
    aggregates = lad_fast.fused_aggregate(inputs["hidden"], inputs["gates"], case.wanted, backend=backend)
    two = lad_fast.fused_hidden_loss(student, aggregates, weight=50.0, reduction="none", backend=backend)
    one = chain_loss(student, inputs["hidden"], inputs["gates"], case.wanted, weight=50.0, backend=backend)
    assert one.dtype == torch.float32
    assert relative_error(one, two) < (1e-6 if dtype == torch.float32 else 1e-3)  # "torch" rounds no aggregate here


@pytest.fixture
def backward_calls(monkeypatch):
    """Every forward on a CPU makes the gradients; the calls of the operator that makes them in backward."""
    if torch.get_default_device().type != "cpu":
        pytest.skip("gradients are made in forward on a CPU alone")
    calls, plain = [], ops.chain_loss_backward
    monkeypatch.setattr(launch, "GRADIENTS_IN_FORWARD_ROWS", 0)
    monkeypatch.setattr(ops, "chain_loss_backward", lambda *arguments: (calls.append(1), plain(*arguments))[1])
    return calls


@pytest.mark.parametrize("upstream", ((1.0, 1.0), (0.3, 0.3), (1.0, 2.0)))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ("sequence", "token"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_gradients_made_in_forward(dtype, norm, mode, upstream, poisoned_allocations, small_blocks, backward_calls):
    """Scaled in backward where one number flows back, made anew where several do, and in float16."""
    case, upstream = Case(norm=norm, mode=mode), torch.tensor(upstream)
    inputs = case.build(dtype)
    expected = run_loss(case, inputs, torch.float64, "reference", upstream=upstream)
    check(run_loss(case, inputs, dtype, "torch", upstream=upstream), expected, TOLERANCE[dtype])
    assert bool(backward_calls) == (upstream[0] != upstream[1] or dtype == torch.float16)


def test_gradients_made_in_forward_are_those_of_backward(monkeypatch, small_blocks, backward_calls):
    """And the losses; also of an early end, from autocast's products, and where only some of the inputs train."""
    case = Case(layers=12, wanted=(0, 7, 4))
    inputs = case.build(torch.float32)

    def results() -> list[torch.Tensor]:
        found = list(run_loss(case, inputs, torch.float32, "torch", upstream=torch.ones(3)).values())
        with torch.autocast("cpu", torch.bfloat16):
            found += run_loss(case, inputs, torch.float32, "torch", upstream=torch.ones(3)).values()
        weight, *gates = inputs["gates"]
        weight = weight.clone().requires_grad_()
        losses = chain_loss(inputs["student"], inputs["hidden"], [weight, *gates], case.wanted, backend="torch")
        losses.sum().backward()
        return [tensor for tensor in (*found, losses.detach(), weight.grad) if tensor is not None]

    forward = results()
    assert not backward_calls
    monkeypatch.setattr(launch, "GRADIENTS_IN_FORWARD_ROWS", 10**6)
    backward = results()
    assert len(backward_calls) == 3
    for ours, right in zip(forward, backward, strict=True):
        assert torch.equal(ours, right)


def test_gradients_made_in_forward_outlive_a_second_backward(backward_calls):
    """What PyTorch then adds to the leaves' gradients must not be what is kept for another call."""
    case = Case()
    inputs = case.build(torch.float32)
    student = [h.requires_grad_() for h in inputs["student"]]
    gates = [g.requires_grad_() for g in inputs["gates"]]
    loss = chain_loss([h * 1 for h in student], inputs["hidden"], gates, case.wanted, backend="torch").sum()
    leaves = [*student, *gates]
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    for _ in range(3):
        loss.backward(retain_graph=True)
    for leaf, grad in zip(leaves, first, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * grad)
    assert not backward_calls


def test_gradients_are_made_in_forward_where_rows_are_many():
    many, few = (
        [torch.empty(rows, 2, device="cpu")] for rows in (launch.GRADIENTS_IN_FORWARD_ROWS + by for by in (0, -1))
    )
    assert ops._makes_gradients(many, many, "torch")
    assert not ops._makes_gradients(few, few, "torch")
    assert not ops._makes_gradients(many, many, "triton")
    assert not ops._makes_gradients([many[0].clone().requires_grad_()], many, "torch")


@pytest.mark.parametrize("upstream", (None, torch.ones(2)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend, upstream, monkeypatch):
    """NaN in padding rows reaches neither losses nor gradients, whether they are made in backward or in forward; an
    example may be all padding."""
    monkeypatch.setattr(launch, "GRADIENTS_IN_FORWARD_ROWS", 0)
    case = Case(mode="masked", batch=3, length=6)
    inputs = case.build(torch.float32)
    inputs["attention_mask"] = torch.tensor([[1] * 6, [0, 1, 1, 0, 0, 0], [0] * 6])
    clean = run_loss(case, inputs, torch.float32, backend, upstream=upstream)
    padding = inputs["attention_mask"] == 0
    for tensor in (*inputs["hidden"], *inputs["student"]):
        tensor[padding] = float("nan")
    dirty = run_loss(case, inputs, torch.float32, backend, upstream=upstream)
    for name, value in clean.items():
        if value is None:
            continue
        assert torch.equal(value, dirty[name]), name
        if "layer" in name:
            assert not dirty[name][padding].any(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_aliases_and_second_backward(backend):
    """Non-contiguous, expanded and repeated inputs, one state as two student layers; nothing of the caller's changes,
    and a second call of backward gives the same gradients."""
    case = Case(batch=2, length=4, hidden_size=6)
    inputs = case.build(torch.float32)
    strided = torch.randn(2, 6, 4).transpose(1, 2)
    hidden = [strided, torch.randn(1, 4, 6).expand(2, 4, 6), strided, inputs["hidden"][3]]
    gates = [g.clone().requires_grad_() for g in inputs["gates"]]
    gates[0] = inputs["gates"][0].mT.clone().requires_grad_().mT  # weights that are not contiguous
    student = strided.clone().requires_grad_()
    leaves = (student, *gates)
    before = [t.detach().clone() for t in (*hidden, *leaves)]
    gradients = []
    for name in (backend, "reference"):
        loss = chain_loss([student, student], hidden, gates, case.wanted, weight=50.0, backend=name).sum()
        gradients.append(torch.autograd.grad(loss, leaves, retain_graph=True))
        again = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(gradients[-1], again, strict=True))
    for ours, right in zip(*gradients, strict=True):
        assert relative_error(ours, right) < TOLERANCE[torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(before, (*hidden, *leaves), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_asked(backend):
    case = Case(wanted=(0, 3))
    inputs = case.build(torch.float32)
    full = run_loss(case, inputs, torch.float32, backend)
    names = {"student": "grad of student layer 1", "hidden": "grad of layer 2", "gates": "grad of bias"}
    for wanted, name in names.items():
        tensors = {key: [t.clone() for t in inputs[key]] for key in names}
        leaf = tensors[wanted][{"hidden": 2}.get(wanted, 1)].requires_grad_()
        losses = chain_loss(*tensors.values(), case.wanted, weight=50.0, backend=backend)
        (losses * torch.arange(1.0, 3)).sum().backward()
        assert relative_error(leaf.grad, full[name]) < 1e-6
    with torch.no_grad():
        assert not chain_loss(*tensors.values(), case.wanted, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_multiplies_in_the_low_precision(backend):
    """The products run in bfloat16 ("torch" also keeps the gate values so); all else and the losses in float32."""
    case = Case(batch=4, length=8, hidden_size=64)
    inputs = case.build(torch.float32)
    expected = run_loss(case, inputs, torch.float64, "reference")
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual = run_loss(case, inputs, torch.float32, backend)
    assert actual["losses"].dtype == actual["grad of weight"].dtype == torch.float32
    check(actual, expected, TOLERANCE[torch.bfloat16])
    assert relative_error(actual["losses"], expected["losses"]) > 1e-6  # it did multiply in bfloat16


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, mode):
    case = Case(batch=2, length=4, hidden_size=8, layers=3, wanted=(0, 2), mode=mode)
    hidden, student, gates, where = operands(case, case.build(torch.float32))
    arguments = (hidden, student, [0, 2], *gates, *where, 1e-5, torch.float32, 3.0, "gates", backend)
    torch.library.opcheck(ops.chain_loss_forward, arguments)
    losses, factor, _, kept_gates, _, _, *kept = ops.chain_loss_forward(*arguments)
    logits = (torch.randn(3, 2), torch.tensor(2.0), torch.bfloat16)
    for *needs, slope in ((True, True, True, logits), (True, False, False, (None, None, None))):
        torch.library.opcheck(
            ops.chain_loss_backward,
            (losses, factor, hidden, student, [0, 2], *gates, kept_gates, *kept, *where, 1e-5, *needs, *slope, backend),
        )


@pytest.mark.parametrize(
    ("backend", "keep"), [*((name, keep) for name in BACKENDS for keep in ("gates", "states")), ("torch", "gradients")]
)
def test_opcheck_where_weights_are_cast(backend, keep):
    case = Case(batch=2, length=4, hidden_size=8, layers=3, wanted=(0, 2))
    hidden, student, gates, where = operands(case, case.build(torch.bfloat16))
    options = (*where, 1e-5, torch.bfloat16)
    torch.library.opcheck(
        ops.chain_loss_forward, (hidden, student, [0, 2], *gates, *options, 3.0, keep, backend)
    )  # fmt: skip
    if keep != "gradients":
        torch.library.opcheck(ops.aggregate_forward, (hidden, *gates, *options, keep, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    """No graph break, no new graph for another length of the batch, the same numbers as eager."""
    torch._dynamo.reset()
    compiled = torch.compile(chain_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for case, seed in ((Case(batch=2, length=6), 0), (Case(batch=3, length=7), 1)):
        inputs = case.build(torch.float32, seed)
        plain = run_loss(case, inputs, torch.float32, backend)
        for name, value in run_loss(case, inputs, torch.float32, backend, compiled).items():
            assert torch.equal(value, plain[name]), name

"""The gate chain of both back ends against the float64 reference, forward and backward."""

import pytest
import torch
from cases import TOLERANCE, Case, check, operands, relative_error, run, run_loss
from torch.utils.checkpoint import checkpoint

import lad_fast
from lad_fast.kernels import launch, ops

pytestmark = pytest.mark.kernels
BACKENDS = ("torch", "triton")
MODES = ("plain", "masked", "packed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compare(case: Case, dtype: torch.dtype, backend: str, seed: int = 0) -> None:
    inputs = case.build(dtype, seed)
    check(run(case, inputs, dtype, backend), run(case, inputs, torch.float64, "reference"), TOLERANCE[dtype])


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ("sequence", "token"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mode(backend, dtype, norm, mode, reverse, poisoned_allocations):
    compare(Case(norm=norm, mode=mode, reverse=reverse), dtype, backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ("sequence", "token"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_as_on_a_gpu(dtype, norm, mode, monkeypatch, poisoned_allocations):
    """All rows as one block, and packed bounds that the host does not read."""
    monkeypatch.setattr(launch, "torch_block_rows", lambda state: None)
    compare(Case(norm=norm, mode=mode), dtype, "torch")


# Each size has its reason: one token, one row an example, D below one tile, D no multiple of a tile, BERT's D,
# many gates, an early end of the chain, only the first layer and another one, a long example (several row tiles).
SIZES = (
    Case(batch=1, length=1),
    Case(batch=5, length=1, hidden_size=100),
    Case(batch=2, length=16, hidden_size=1, layers=2, wanted=(1,), seq_len=16),
    Case(batch=2, length=37, hidden_size=100, layers=3, wanted=(2,)),
    Case(batch=1, length=9, hidden_size=768, layers=2, wanted=(1,), seq_len=16),
    Case(layers=24, wanted=tuple(range(24))),
    Case(layers=12, wanted=(3, 1)),
    Case(layers=12, wanted=(0, 5)),
)


@pytest.mark.parametrize("case", SIZES, ids=repr)
@pytest.mark.parametrize("norm", ("sequence", "token"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend, norm, case, poisoned_allocations):
    compare(Case(**{**vars(case), "norm": norm}), torch.float32, backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ("sequence", "token"))
def test_gradcheck(norm, mode):
    case = Case(batch=2, length=3, hidden_size=3, layers=3, wanted=(1, 2), norm=norm, mode=mode, seq_len=4)
    inputs = case.build(torch.float64)
    tensors = [t.double().requires_grad_() for t in (*inputs["hidden"], *inputs["gates"])]

    def function(*tensors):
        where = inputs["attention_mask"], inputs["cu_seqlens"]
        return lad_fast.fused_aggregate(tensors[:3], tensors[3:], case.wanted, *where, backend="torch")

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ("plain", "packed"))
def test_backward_is_bitwise_deterministic(backend, mode):
    case = Case(batch=3, length=17, hidden_size=40, layers=3, wanted=(1, 2), mode=mode, seq_len=24)
    inputs = case.build(torch.float32)
    first, second = (run(case, inputs, torch.float32, backend) for _ in range(2))
    for name, value in first.items():
        assert value is None or torch.equal(value, second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_aliases_and_callers_buffers(backend):
    """Non-contiguous, expanded and repeated inputs; nothing that the caller owns changes."""
    case = Case(batch=2, length=4, hidden_size=6, layers=4, wanted=(1, 3))
    inputs = case.build(torch.float32)
    strided = torch.randn(2, 6, 4).transpose(1, 2)
    expanded = torch.randn(1, 4, 6).expand(2, 4, 6)
    inputs["hidden"] = [strided, expanded, strided, inputs["hidden"][3]]
    inputs["grads"] = [inputs["grads"][0], torch.randn(2, 1, 6).expand(2, 4, 6)]
    before = [t.clone() for t in (*inputs["hidden"], *inputs["grads"], *inputs["gates"])]
    expected = run(case, inputs, torch.float64, "reference")
    actual = run(case, inputs, torch.float32, backend)
    check(actual, expected, TOLERANCE[torch.float32])
    for old, new in zip(before, (*inputs["hidden"], *inputs["grads"], *inputs["gates"]), strict=True):
        assert torch.equal(old, new)

    shared = torch.randn(2, 4, 6, requires_grad=True)  # one tensor as every layer: gradients add up
    grads = []
    for name in (backend, "reference"):
        (out,) = lad_fast.fused_aggregate([shared] * 4, inputs["gates"], (3,), backend=name)
        grads.append(torch.autograd.grad(out.square().sum(), shared)[0])
    assert relative_error(*grads) < TOLERANCE[torch.float32]


LAYOUTS = {
    "every second gate of a stack": lambda parameter: torch.stack((parameter, parameter + 1), dim=1).flatten(0, 1)[::2],
    "one gate for all": lambda parameter: parameter[:1].expand(parameter.shape),
    "transposed": lambda parameter: parameter.mT.contiguous().mT,
    "wider rows": lambda parameter: torch.cat((parameter, parameter), dim=-1)[..., : parameter.shape[-1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", range(5), ids=("weight", "bias", "norm_weight", "norm_bias", "all"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_in_any_layout(backend, which, layout):
    case = Case(layers=4)
    inputs = case.build(torch.float32)
    gates = [LAYOUTS[layout](gate) if which in (i, 4) else gate for i, gate in enumerate(inputs["gates"])]
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        tensors = [tensor.to(dtype).requires_grad_() for tensor in (*inputs["hidden"], *gates)]
        outputs = lad_fast.fused_aggregate(tensors[:4], tensors[4:], case.wanted, backend=name)
        grads = torch.autograd.grad(outputs, tensors, [grad.to(dtype) for grad in inputs["grads"]])
        results.append(dict(enumerate((*outputs, *grads))))
    check(*results, TOLERANCE[torch.float32])


# Masks whose rows lie as one, so that reshape(-1) hands on a view: with a stride, or with one element for all.
MASKS = {
    "every second element": lambda mask: torch.stack((mask, 1 - mask.int()), dim=-1).to(mask.dtype)[..., 0],
    "one example": lambda mask: MASKS["every second element"](mask[:1]),
    "transposed": lambda mask: mask.T.contiguous().T,
    "one element for all": lambda mask: torch.ones_like(mask[:1, :1]).expand(mask.shape),
}


@pytest.mark.parametrize("inference", (False, True))
@pytest.mark.parametrize("dtype", (torch.int64, torch.bool))
@pytest.mark.parametrize("layout", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_in_any_layout(backend, layout, dtype, inference):
    """Also made under inference mode, whose tensors autograd does not keep."""
    case = Case(mode="masked", batch=1 if layout == "one example" else 3)
    inputs = case.build(torch.float32)
    with torch.inference_mode(inference):
        inputs["attention_mask"] = MASKS[layout](inputs["attention_mask"].to(dtype, copy=True))
    assert inputs["attention_mask"].is_inference() == inference
    for function in (run, run_loss):
        expected = function(case, inputs, torch.float64, "reference")
        check(function(case, inputs, torch.float32, backend), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("inference", (False, True))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_in_any_layout(backend, dtype, inference):
    case = Case(mode="packed")
    inputs = case.build(torch.float32)
    with torch.inference_mode(inference):
        bounds = inputs["cu_seqlens"].to(dtype)
        inputs["cu_seqlens"] = torch.stack((bounds, bounds + 1), dim=-1)[:, 0]
    assert not inputs["cu_seqlens"].is_contiguous()
    for function in (run, run_loss):
        expected = function(case, inputs, torch.float64, "reference")
        check(function(case, inputs, torch.float32, backend), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_forms_of_input_agree(backend):
    case = Case()
    inputs = case.build(torch.float32)
    stack = lad_fast.GateStack(4, 24, 8)
    stack.load_state_dict(dict(zip(("weight", "bias", "norm_weight", "norm_bias"), inputs["gates"], strict=True)))
    rows = torch.stack(inputs["hidden"])
    one = lad_fast.fused_aggregate(inputs["hidden"], stack, (1, 3), backend=backend)
    two = stack(rows, (1, 3), backend=backend)
    bounds = [0, 5, 10, 15]
    packed = stack(rows.flatten(1, 2), (1, 3), cu_seqlens=bounds, backend=backend)
    mask = torch.ones(3, 5, dtype=torch.bool)
    masked = stack(rows, (1, 3), attention_mask=mask, backend=backend)
    for a, b, c, d in zip(one, two, packed, masked, strict=True):
        assert torch.equal(a, b)
        assert relative_error(c.view(3, 5, 24), a) < TOLERANCE[torch.float32]
        assert relative_error(d, a) < TOLERANCE[torch.float32]
    assert lad_fast.fused_aggregate(inputs["hidden"], stack, (0,), backend=backend)[0] is inputs["hidden"][0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend):
    """NaN in padding rows reaches neither outputs nor gradients, and an example of padding only comes back zero."""
    case = Case(mode="masked", batch=3, length=6)
    inputs = case.build(torch.float32)
    inputs["attention_mask"] = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [0] * 6])
    clean = run(case, inputs, torch.float32, backend)
    padding = inputs["attention_mask"] == 0
    for tensor in (*inputs["hidden"], *inputs["grads"]):
        tensor[padding] = float("nan")
    dirty = run(case, inputs, torch.float32, backend)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
        if name.startswith(("aggregate", "grad of layer")):
            assert not dirty[name][padding].any(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outliers_and_constant_rows(backend, dtype):
    """BERT's outlier features (60 times the rest) and rows without variance give finite, right numbers."""
    case = Case(batch=2, length=4, hidden_size=48, norm="token")
    inputs = case.build(dtype)
    for h in inputs["hidden"]:
        h[..., 7] = 60.0
        h[0, 0] = 1.0
    check(run(case, inputs, dtype, backend), run(case, inputs, torch.float64, "reference"), 2 * TOLERANCE[dtype])
    with torch.no_grad():
        constant = [torch.full((1, 2, 8), 3.0, dtype=dtype)] * 2
        gates = [torch.zeros(1, 8, 8), torch.zeros(1, 8), torch.ones(1, 8), torch.zeros(1, 8)]
        (out,) = lad_fast.fused_aggregate(constant, gates, (1,), backend=backend)
    assert not out.any()  # variance 0: the norm leaves nothing but its bias


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_asked(backend):
    case = Case()
    inputs = case.build(torch.float32)
    full = run(case, inputs, torch.float32, backend)
    gates = [g.clone().requires_grad_(i == 1) for i, g in enumerate(inputs["gates"])]
    outputs = lad_fast.fused_aggregate(inputs["hidden"], gates, case.wanted, backend=backend)
    torch.autograd.backward(outputs, inputs["grads"])
    assert relative_error(gates[1].grad, full["grad of bias"]) < 1e-6
    assert gates[0].grad is None
    with torch.no_grad():
        outputs = lad_fast.fused_aggregate(inputs["hidden"], gates, case.wanted, backend=backend)
    assert not any(out.requires_grad for out in outputs)
    # A gradient for one of two outputs, and a second call with the graph kept: the same numbers again.
    a, _ = lad_fast.fused_aggregate(inputs["hidden"], gates, case.wanted, backend=backend)
    once = torch.autograd.grad(a, gates[1], inputs["grads"][0], retain_graph=True)[0]
    again = torch.autograd.grad(a, gates[1], inputs["grads"][0])[0]
    assert once.any()
    assert torch.equal(once, again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_multiplies_in_the_low_precision(backend):
    """The products run in bfloat16, everything else and the result in float32."""
    case = Case(batch=4, length=8, hidden_size=64)
    inputs = case.build(torch.float32)
    expected = run(case, inputs, torch.float64, "reference")
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual = run(case, inputs, torch.float32, backend)
    assert actual["aggregate 3"].dtype == torch.float32
    check(actual, expected, TOLERANCE[torch.bfloat16])
    assert relative_error(actual["aggregate 3"], expected["aggregate 3"]) > 1e-5  # it did multiply in bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_gives_the_same_gradients(backend):
    case = Case()
    inputs = case.build(torch.float32)

    def recomputed(hidden, gates, *rest, **options):
        return checkpoint(lad_fast.fused_aggregate, hidden, gates, *rest, use_reentrant=False, **options)

    plain = run(case, inputs, torch.float32, backend)
    for name, value in run(case, inputs, torch.float32, backend, recomputed).items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, mode):
    case = Case(batch=2, length=4, hidden_size=8, layers=3, wanted=(1, 2), mode=mode)
    hidden, _, gates, where = operands(case, case.build(torch.float32))
    arguments = hidden, *gates, *where, 1e-5, torch.float32, "gates", backend
    torch.library.opcheck(ops.aggregate_forward, arguments)
    _, aggregates, *kept = ops.aggregate_forward(*arguments)
    grads = [None, torch.randn_like(aggregates[-1])]
    read = aggregates if backend == "triton" else None
    torch.library.opcheck(
        ops.aggregate_backward,
        (grads, hidden, *gates, read, *kept, *where, 1e-5, True, True, backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    """No graph break, no new graph for another length of the batch, the same numbers as eager."""
    case = Case(batch=2, length=6)
    inputs = case.build(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lad_fast.fused_aggregate, fullgraph=True, backend="aot_eager", dynamic=True)
    plain = run(case, inputs, torch.float32, backend)
    for name, value in run(case, inputs, torch.float32, backend, compiled).items():
        assert torch.equal(value, plain[name]), name
    other = Case(batch=3, length=7)
    more = other.build(torch.float32, seed=1)
    plain = run(other, more, torch.float32, backend)
    for name, value in run(other, more, torch.float32, backend, compiled).items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.cuda
def test_compiles_to_cuda_graphs():
    """Warmed up, recorded, replayed: the counters that programs wait by are no part of a graph's memory."""
    case = Case(batch=2, length=6)
    inputs = case.build(torch.float32)
    compiled = torch.compile(lad_fast.fused_aggregate, mode="reduce-overhead")
    plain = run(case, inputs, torch.float32, "triton")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        for name, value in run(case, inputs, torch.float32, "triton", compiled).items():
            assert torch.equal(value, plain[name]), name

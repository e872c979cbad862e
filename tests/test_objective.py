"""LADObjective, GateStack and the reference: the objective as users build it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lad_fast
from lad_fast import GateStack, LADObjective, reference

BACKENDS = ("reference", "torch", "triton")


def batch(layers=6, students=3, size=16, student_size=None, classes=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    student = [draw(2, 5, student_size or size).requires_grad_() for _ in range(students)]
    teacher = [draw(2, 5, size) for _ in range(layers)]
    labels = torch.tensor([1, 0]) if classes > 1 else torch.tensor([0.5, 4.0])
    return student, teacher, draw(2, classes).requires_grad_(), draw(2, classes), labels


@pytest.mark.parametrize("regression", (False, True))
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_objective_is_the_papers(backend, reverse, regression):
    torch.manual_seed(0)
    gates = GateStack(6, 16, 8, reverse=reverse)
    settings = {"temperature": 5.0, "soft_weight": 0.3, "hard_weight": 0.6, "hidden_weight": 100.0}
    objective = LADObjective(gates, 3, **settings, regression=regression, backend=backend)
    assert objective.layers == (1, 3, 5)
    student, teacher, student_logits, teacher_logits, labels = batch(classes=1 if regression else 2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    out = objective(student, teacher, student_logits, teacher_logits, labels, mask)
    expected = reference.lad_loss(
        student,
        teacher,
        student_logits,
        teacher_logits,
        labels,
        gates,
        (1, 3, 5),
        mask,
        regression=regression,
        **settings,
    )
    leaves = (*student, student_logits, *gates.parameters())
    ours = torch.autograd.grad(out.loss, leaves)
    right = torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(out.loss, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(out.loss, out.hidden_loss + out.logits_loss)
    torch.testing.assert_close(out.hidden_losses.sum(), out.hidden_loss.detach())
    for a, b in zip(ours, right, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6 * b.abs().max().item())


MAPS = ((12, 6, (1, 3, 5, 7, 9, 11)), (12, 5, (1, 3, 5, 7, 9)), (12, 12, tuple(range(12))), (24, 4, (5, 11, 17, 23)))


@pytest.mark.parametrize("layers, students, expected", MAPS)
def test_student_layers_map_to_every_skipth_aggregate(layers, students, expected):
    assert LADObjective(GateStack(layers, 4, 4), students).layers == expected


def test_other_hidden_size_is_projected_and_trained():
    objective = LADObjective(GateStack(6, 16, 8), 3, student_hidden_size=10, backend="torch")
    student, *rest = batch(student_size=10)
    out = objective(student, *rest)
    projected = [p(h) for p, h in zip(objective.projections, student, strict=True)]
    plain = LADObjective(objective.gates, 3, backend="reference")(projected, *rest)
    torch.testing.assert_close(out.loss, plain.loss)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in objective.parameters())


def test_model_outputs_in_place_of_tensors():
    objective = LADObjective(GateStack(6, 16, 8), 3, backend="torch")
    student, teacher, student_logits, teacher_logits, labels = batch()
    embedding = torch.full((2, 5, 16), float("nan"))
    out = objective(
        SimpleNamespace(hidden_states=(embedding, *student), logits=student_logits),
        SimpleNamespace(hidden_states=(embedding, *teacher), logits=teacher_logits),
        labels=labels,
    )
    plain = objective(student, teacher, student_logits, teacher_logits, labels)
    assert torch.equal(out.loss, plain.loss)


def test_logits_beside_model_outputs_are_the_ones_taken():
    """An ensemble's, or calibrated ones."""
    objective = LADObjective(GateStack(6, 16, 8), 3, backend="torch")
    student, teacher, student_logits, teacher_logits, labels = batch()
    outputs = [
        SimpleNamespace(hidden_states=(states[0], *states), logits=torch.zeros(2, 2)) for states in (student, teacher)
    ]
    out = objective(*outputs, student_logits, teacher_logits, labels)
    assert torch.equal(out.loss, objective(student, teacher, student_logits, teacher_logits, labels).loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_may_be_int32(backend):
    objective = LADObjective(GateStack(6, 16, 8), 3, backend=backend)
    *inputs, labels = batch()
    assert torch.equal(objective(*inputs, labels.int()).loss, objective(*inputs, labels).loss)


@pytest.mark.parametrize("name", ("temperature", "soft_weight", "hard_weight", "hidden_weight"))
def test_settings_are_numbers(name):
    """A tensor of one is read; one that is to learn is refused, since it would get no gradient."""
    torch._dynamo.reset()
    gates = GateStack(6, 16, 8)
    objective = LADObjective(gates, 3, backend="torch", **{name: torch.full((1, 1), 2.0)})
    assert torch.equal(objective(*batch()).loss, LADObjective(gates, 3, backend="torch", **{name: 2.0})(*batch()).loss)
    assert objective(*batch()).loss.shape == ()
    torch.compile(objective, fullgraph=True, backend="eager")(*batch())
    with pytest.raises(ValueError, match=f"{name} requires grad, but the loss gives it none"):
        LADObjective(gates, 3, **{name: nn.Parameter(torch.tensor(2.0))})


def test_sharded_gates_are_refused_by_name(tmp_path):
    """By FSDP before the objective, whose own forward would gather them."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        objective = LADObjective(GateStack(6, 16, 8), 3, backend="torch")
        right = objective(*batch()).loss
        torch.distributed.fsdp.fully_shard(objective, mesh=mesh)
        torch.testing.assert_close(objective(*batch()).loss, right)
        objective = LADObjective(GateStack(6, 16, 8), 3, backend="torch")
        torch.distributed.fsdp.fully_shard(objective.gates, mesh=mesh)
        torch.distributed.fsdp.fully_shard(objective, mesh=mesh)
        with pytest.raises(TypeError, match="gates' weight is a DTensor; shard the objective as a whole"):
            objective(*batch())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_objective_compiles_as_one_graph(backend):
    torch._dynamo.reset()
    objective = LADObjective(GateStack(6, 16, 8), 3, backend=backend)
    inputs = batch()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs).loss, objective(*inputs).loss)


@pytest.mark.parametrize("students", (1, 2))
@pytest.mark.parametrize("reverse", (False, True))
def test_a_compiled_objective_that_trains_nothing(reverse, students):
    """Any number of layers: Dynamo tells a Function's arguments from its context by their number."""
    torch._dynamo.reset()
    for layers in range(2, 6):
        objective = LADObjective(GateStack(layers, 16, 8, reverse=reverse), students, backend="torch")
        objective.requires_grad_(False)
        student, teacher, *logits = batch(layers, students)
        student, logits[0] = [h.detach() for h in student], logits[0].detach()
        compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
        mask = torch.ones(2, 5)
        for where in ((), (mask,)):
            inputs = (student, teacher, *logits, *where)
            torch.testing.assert_close(compiled(*inputs).loss, objective(*inputs).loss)
        aggregate = torch.compile(lad_fast.fused_aggregate, fullgraph=True, backend="aot_eager")
        ours, right = (f(teacher, objective.gates, backend="torch") for f in (aggregate, lad_fast.fused_aggregate))
        torch.testing.assert_close(ours, right)


def kept_bytes(inputs, function) -> int:
    """Bytes held for backward, counted by saved-tensor hooks; ``inputs`` (and parameters) would be there anyway."""
    ours = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            storages[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert function().requires_grad
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("precision", ("float32", "bfloat16", "autocast"))
@pytest.mark.parametrize("seq_len", (16, 24))
def test_objective_keeps_a_third_of_eagers_memory(precision, seq_len):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    objective = LADObjective(GateStack(12, 32, seq_len), 6)
    student = [torch.randn(8, 16, 32, dtype=dtype, requires_grad=True) for _ in range(6)]
    teacher = [torch.randn(8, 16, 32, dtype=dtype) for _ in range(12)]
    logits = torch.randn(8, 2), torch.randn(8, 2), torch.randint(2, (8,))

    def kept(backend):
        inputs = (*student, *teacher, *logits, *objective.parameters())
        return kept_bytes(inputs, lambda: objective(student, teacher, *logits, backend=backend).loss)

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        ours, eager = kept("torch"), kept("reference")
    state = 8 * 16 * 32 * student[0].element_size()
    assert eager >= 40 * state
    assert ours <= eager / 3
    cast_weights = 0 if precision == "float32" else 11 * 32 * 32 * 2
    assert ours < 11.1 * state + cast_weights  # the gates of a chain of twelve layers, and a few numbers


@pytest.mark.parametrize("layers", ((5,), (1, 3, 5)))
def test_an_aggregate_that_is_kept_keeps_no_other(layers):
    gates = GateStack(6, 16, 8)
    _, teacher, *_ = batch()
    right = lad_fast.fused_aggregate(teacher, gates, layers, backend="torch")
    with torch.no_grad():
        found = lad_fast.fused_aggregate(teacher, gates, layers, backend="torch")
    for a, b in zip(found, right, strict=True):
        assert torch.equal(a, b)
        assert a.untyped_storage().nbytes() == a.numel() * a.element_size()


def test_aggregation_keeps_the_gates():
    torch.manual_seed(0)
    gates = GateStack(12, 32, 16)
    hidden = [torch.randn(4, 16, 32) for _ in range(12)]

    def kept(backend):
        inputs = (*hidden, *gates.parameters())
        return kept_bytes(inputs, lambda: lad_fast.fused_aggregate(hidden, gates, backend=backend)[-1])

    assert kept("torch") < 0.3 * kept("reference")
    assert kept("triton") < 0.55 * kept("reference")  # and the aggregates


class HighwayGate(nn.Module):
    """A gate module of the published form."""

    def __init__(self, size, seq_len):
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.layernorm = nn.LayerNorm([seq_len, size])


@pytest.mark.parametrize("reverse", (False, True))
def test_published_gates_are_taken_over(tmp_path, reverse):
    torch.manual_seed(0)
    published = [HighwayGate(8, 6) for _ in range(4)]
    with torch.no_grad():
        for gate in published:
            gate.layernorm.weight.normal_()
    hidden = [torch.randn(2, 6, 8) for _ in range(4)]
    previous, outputs = None, []
    for gate, layer in zip(published, hidden[::-1] if reverse else hidden, strict=True):
        if previous is None:
            previous = layer
        else:
            g = torch.sigmoid(gate.linear(previous))
            previous = gate.layernorm(layer * g + previous * (1 - g))
        outputs.append(previous)
    outputs = outputs[::-1] if reverse else outputs
    stack = GateStack.from_highway_gates(published, reverse=reverse)
    for a, b in zip(stack(hidden, backend="torch"), outputs, strict=True):
        torch.testing.assert_close(a, b)

    for i, gate in enumerate(published):
        torch.save(gate.state_dict(), tmp_path / f"gate-{i}-70.pt")
        torch.save({}, tmp_path / f"gate-{i}-7.pt")
    loaded = GateStack.from_official_checkpoint(tmp_path, 70, reverse=reverse)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), stack.parameters(), strict=True))
    stack.save_pretrained(tmp_path / "saved")
    again = GateStack.from_pretrained(tmp_path / "saved")
    assert again.config == stack.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), stack.parameters(), strict=True))
    (tmp_path / "gate-1-70.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"gate-1-70\.pt"):
        GateStack.from_official_checkpoint(tmp_path, 70)


def test_reading_gates_draws_no_random_number(tmp_path):
    """A resumed Trainer goes on with the order of examples that it had drawn."""
    GateStack(3, 8, 5).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    GateStack.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_second_derivatives_are_refused(backend):
    """PyTorch's own refusal does not see them: what flows into a loss needs no gradient."""
    student, teacher, *logits = batch()
    objective = LADObjective(GateStack(6, 16, 5), 3, backend=backend)
    losses = (
        (objective(student, teacher, *logits).loss, student[0]),
        (lad_fast.fused_hidden_loss(student, teacher[:3], backend=backend), student[0]),
        (lad_fast.fused_distill_loss(*logits, backend=backend), logits[0]),
        (objective.gates(teacher, backend=backend)[-1].sum(), objective.gates.weight),
    )
    for loss, leaf in losses:
        with pytest.raises(RuntimeError, match="create_graph is True"):
            torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("length", (5, 512))
def test_kept_gradients_are_the_objectives_own(length):
    """Two examples: at 1024 rows forward makes the gradients, which a caller of ``retain_graph`` may come back for."""
    torch.manual_seed(0)
    student = [torch.randn(2, length, 16, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(2, length, 16) for _ in range(4)]
    objective = LADObjective(GateStack(4, 16, length), 2, backend="torch")
    loss = objective(student, teacher, *batch()[2:]).loss
    leaves = [*student, *objective.gates.parameters()]
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad.data.zero_()
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, grad in zip(leaves, first, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad, rtol=1e-6, atol=0)


def test_initial_gates_are_the_published_ones():
    torch.manual_seed(0)
    gates = GateStack(3, 64, 5)
    bound = (6 / 128) ** 0.5
    assert 0.9 * bound < gates.weight.abs().max() <= bound
    assert 0.9 / 8 < gates.bias.abs().max() <= 1 / 8
    assert torch.equal(gates.norm_weight, torch.ones(2, 5, 64))
    assert not gates.norm_bias.any()


@pytest.mark.parametrize("reverse", (False, True))
def test_contributions_are_shares(reverse):
    torch.manual_seed(0)
    gates = GateStack(5, 8, 6, reverse=reverse)
    hidden = [torch.randn(2, 6, 8) for _ in range(5)]
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    shares = gates.contributions(hidden, mask)
    assert torch.equal(gates.contributions(hidden, -7 * mask), shares)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(5))
    assert (shares >= 0).all()
    outside = shares.tril(-1) if reverse else shares.triu(1)
    assert not outside.any()
    first = 4 if reverse else 0
    assert shares[first, first] == 1
    # By hand for the first gate: its mean over real tokens is what the second chain element contributes.
    second = 3 if reverse else 1
    g = torch.sigmoid(hidden[first] @ gates.weight[0].T + gates.bias[0])
    torch.testing.assert_close(shares[second, second], g[mask.bool()].mean())


@pytest.mark.parametrize("options", ({}, {"norm": "token"}, {"reverse": True}), ids=str)
def test_contributions_of_packed_states_are_those_of_padded_ones(options):
    torch.manual_seed(0)
    gates, mask = GateStack(4, 8, 6, **options), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    padded = [torch.randn(2, 6, 8) for _ in range(4)]
    packed = [h[mask.bool()] for h in padded]
    found = gates.contributions(packed, cu_seqlens=torch.tensor([0, 6, 9], dtype=torch.int32))
    torch.testing.assert_close(found, gates.contributions(padded, mask))
    assert (found - gates.contributions(padded)).abs().max() > 1e-3, "padding would have counted"


def test_a_calls_backend_goes_before_the_objectives(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lad_fast.objective.chain_loss", lambda *_, backend, **__: (seen.append(backend), [torch.zeros(1)] * 4)[1]
    )
    objective = LADObjective(GateStack(6, 16, 8), 3, backend="torch")
    for backend in ("reference", None):
        objective(*batch(), backend=backend)
    assert seen == ["reference", "torch"]


@pytest.mark.parametrize("backend", ("reference", "torch", "triton"))
def test_losses_by_layer_carry_no_gradient(backend):
    assert not LADObjective(GateStack(6, 16, 8), 3, backend=backend)(*batch()).hidden_losses.requires_grad


def test_low_memory_keeps_no_gates():
    torch.manual_seed(0)
    gates, inputs = GateStack(6, 16, 8), batch()

    def kept(memory):
        objective = LADObjective(gates, 3, memory=memory, backend="torch")
        own = (*inputs[0], *inputs[1], *inputs[2:], *objective.parameters())
        return kept_bytes(own, lambda: objective(*inputs).loss)

    assert kept("fast") == kept("auto")
    assert kept("low") <= kept("fast") - 5 * inputs[1][0].nbytes

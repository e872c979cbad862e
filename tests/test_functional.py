"""Wrong calls of the Python API: each is refused with a message that names the argument."""

import subprocess
import sys

import pytest
import torch

import lad_fast
from lad_fast import GateStack, LADObjective
from lad_fast.functional import chain_loss

STACK = GateStack(3, 4, 6)
STATES = [torch.randn(2, 5, 4) for _ in range(3)]
LOGITS, LABELS = torch.randn(2, 3), torch.tensor([0, 2])
OUTPUTS = ([torch.randn(2, 5, 4)], STATES, LOGITS, LOGITS, LABELS)


def aggregate(hidden=STATES, gates=STACK, *rest, **options):
    return lambda: lad_fast.fused_aggregate(hidden, gates, *rest, **options)


def packed(mask, bounds):
    return aggregate([h[0] for h in STATES], STACK, None, mask, bounds)


def hidden(student=STATES, targets=STATES, *rest, **options):
    return lambda: lad_fast.fused_hidden_loss(student, targets, *rest, **options)


def distill(student=LOGITS, teacher=LOGITS, labels=LABELS, *rest, **options):
    return lambda: lad_fast.fused_distill_loss(student, teacher, labels, *rest, **options)


def projected(student):
    objective = LADObjective(STACK, 1, student_hidden_size=3, backend="torch")
    return lambda: objective(student, *OUTPUTS[1:])


def tensors(**changes):
    names = ("weight", "bias", "norm_weight", "norm_bias")
    return [changes.get(name, getattr(STACK, name).detach()) for name in names]


WRONG = {
    "hidden states none": (aggregate(None), TypeError, "hidden_states"),
    "hidden states a string": (aggregate("abc"), TypeError, "hidden_states"),
    "hidden states empty": (aggregate([]), ValueError, "hidden_states is empty"),
    "hidden state no tensor": (aggregate([*STATES[:2], 3]), TypeError, r"hidden_states\[2\]"),
    "hidden state integer": (aggregate([h.long() for h in STATES]), TypeError, r"hidden_states\[0\] has dtype"),
    "hidden state of two axes": (aggregate([h[0] for h in STATES]), ValueError, "cu_seqlens"),
    "hidden states of two shapes": (aggregate([*STATES[:2], torch.randn(2, 4, 4)]), ValueError, r"\[2\].*\(2, 4, 4\)"),
    "hidden states of two dtypes": (aggregate([*STATES[:2], STATES[2].half()]), ValueError, "float16"),
    "no tokens": (aggregate([h[:, :0] for h in STATES]), ValueError, "empty"),
    "empty batch": (aggregate([h[:0] for h in STATES]), ValueError, "empty"),
    "states of another device": (aggregate([*STATES[:2], STATES[2].to("meta")]), ValueError, "meta"),
    "too many layers": (aggregate([*STATES, STATES[0]]), ValueError, "weight has shape"),
    "other hidden size": (aggregate([h[..., :3] for h in STATES]), ValueError, "D = 3"),
    "gates none": (aggregate(STATES, None), TypeError, "gates"),
    "three gate tensors": (aggregate(STATES, tensors()[:3]), ValueError, "gates holds 3"),
    "states with the embeddings'": (aggregate([*STATES, STATES[0]]), ValueError, "leave the embedding output out"),
    "a state too few": (aggregate(STATES[:2]), ValueError, r"2 hidden_states take \(1, D, D\)$"),
    "gate no tensor": (aggregate(STATES, tensors(bias=1.0)), TypeError, "bias"),
    "gates in half": (aggregate(STATES, tensors(weight=STACK.weight.half())), TypeError, "weight has dtype"),
    "bias of another shape": (aggregate(STATES, tensors(bias=torch.ones(2, 5))), ValueError, "bias has shape"),
    "affine of another size": (aggregate(STATES, tensors(norm_weight=torch.ones(2, 6, 5))), ValueError, "norm_weight"),
    "affines that differ": (aggregate(STATES, tensors(norm_bias=torch.ones(2, 4))), ValueError, "norm_bias"),
    "gates elsewhere": (aggregate(STATES, GateStack(3, 4, 6).to("meta")), ValueError, "meta"),
    "longer than the norm": (aggregate([torch.randn(2, 7, 4)] * 3), ValueError, "seq_len = 6"),
    "no layers": (aggregate(STATES, STACK, ()), ValueError, "layers is empty"),
    "layers a number": (aggregate(STATES, STACK, 2), TypeError, "layers is a int"),
    "layer too large": (aggregate(STATES, STACK, (3,)), ValueError, "layers holds 3"),
    "layer negative": (aggregate(STATES, STACK, (-1,)), ValueError, "layers holds -1"),
    "layer a float": (aggregate(STATES, STACK, (1.0,)), TypeError, "layers holds 1.0"),
    "mask of another shape": (aggregate(STATES, STACK, None, torch.ones(2, 4)), ValueError, "attention_mask"),
    "mask a list": (aggregate(STATES, STACK, None, [[1] * 5] * 2), TypeError, "attention_mask"),
    "mask and bounds": (packed(torch.ones(5), [0, 5]), ValueError, "exclude"),
    "bounds too short": (packed(None, [0, 4]), ValueError, "tokens = 5"),
    "bounds from 1": (packed(None, [1, 5]), ValueError, "from 1"),
    "bounds that fall": (packed(None, [0, 4, 2, 5]), ValueError, "decreases"),
    "bounds floating": (packed(None, torch.tensor([0.0, 5.0])), TypeError, "cu_seqlens"),
    "bounds of two axes": (packed(None, torch.tensor([[0, 5]])), ValueError, "cu_seqlens"),
    "packed example too long": (
        aggregate([torch.randn(9, 4)] * 3, STACK, None, None, [0, 2, 9]), ValueError, "7 tokens",
    ),
    "unknown back end": (aggregate(STATES, STACK, backend="cuda"), ValueError, "backend is 'cuda'"),
    "float64 on triton": (
        aggregate([h.double() for h in STATES], GateStack(3, 4, 6).double(), backend="triton"), TypeError, "float64",
    ),
    "loss of unequal numbers": (hidden(STATES[:2]), ValueError, "aggregates holds 3"),
    "loss of unequal shapes": (hidden(STATES, [h[:, :4] for h in STATES]), ValueError, "aggregates have shape"),
    "loss of nothing": (hidden([], []), ValueError, "student_hidden_states is empty"),
    "loss with a wrong mask": (hidden(STATES, STATES, torch.ones(5, 2)), ValueError, "attention_mask"),
    "loss with a wrong reduction": (hidden(reduction="mean"), ValueError, "reduction is 'mean'"),
    "loss on a wrong back end": (hidden(backend="x"), ValueError, "backend is 'x'"),
    "logits a list": (distill([[1.0, 2.0]]), TypeError, "student_logits is a list"),
    "logits integer": (distill(LOGITS.long()), TypeError, "student_logits has dtype"),
    "logits empty": (distill(LOGITS[:0], LOGITS[:0], LABELS[:0]), ValueError, "student_logits is empty"),
    "logits of one axis": (distill(LOGITS[0], LOGITS[0]), ValueError, "student_logits has shape"),
    "logits of two shapes": (distill(LOGITS, LOGITS[:, :2]), ValueError, "teacher_logits has shape"),
    "trainable teacher": (distill(LOGITS, LOGITS.clone().requires_grad_()), ValueError, "detach"),
    "temperature zero": (distill(LOGITS, LOGITS, LABELS, 0.0), ValueError, "temperature is 0.0"),
    "labels a list": (distill(LOGITS, LOGITS, [0, 1]), TypeError, "labels is a list"),
    "labels floating": (distill(LOGITS, LOGITS, LABELS.float()), TypeError, "labels has dtype"),
    "labels too many": (distill(LOGITS, LOGITS, torch.tensor([0, 1, 2])), ValueError, r"labels has shape \(3,\)"),
    "label too large": (distill(LOGITS, LOGITS, torch.tensor([0, 3])), ValueError, "labels holds 3"),
    "label negative": (distill(LOGITS, LOGITS, torch.tensor([0, -1])), ValueError, "labels holds -1"),
    "regression with class ids": (
        distill(LOGITS[:, :1], LOGITS[:, :1], LABELS, regression=True), TypeError, "floating",
    ),
    "regression with two outputs": (distill(LOGITS, LOGITS, LABELS.float(), regression=True), ValueError, "one number"),
    "one layer": (lambda: GateStack(1, 4), ValueError, "num_layers is 1"),
    "no hidden size": (lambda: GateStack(2, 0), ValueError, "hidden_size is 0"),
    "sequence length a float": (lambda: GateStack(2, 4, 1.5), ValueError, "seq_len is 1.5"),
    "unknown norm": (lambda: GateStack(2, 4, norm="batch"), ValueError, "norm is 'batch'"),
    "objective without gates": (lambda: LADObjective(None, 2), TypeError, "gates is a NoneType"),
    "more student layers": (lambda: LADObjective(STACK, 4), ValueError, "num_student_layers is 4"),
    "negative weight": (lambda: LADObjective(STACK, 1, hidden_weight=-1), ValueError, "hidden_weight is -1"),
    "objective's temperature": (lambda: LADObjective(STACK, 1, temperature=-1), ValueError, "temperature is -1"),
    "objective's back end": (lambda: LADObjective(STACK, 1, backend="c"), ValueError, "backend is 'c'"),
    "embedding output left in": (lambda: LADObjective(STACK, 2)(*OUTPUTS), ValueError, "student_hidden_states holds 1"),
    "eps a string": (aggregate(eps="x"), TypeError, "eps is 'x'"),
    "eps negative": (aggregate(eps=-1.0), ValueError, "eps is -1.0"),
    "loss with no weight": (hidden(weight=None), TypeError, "weight is None"),
    "temperature a string": (distill(temperature="x"), TypeError, "temperature is 'x'"),
    "no soft weight": (distill(soft_weight=None), TypeError, "soft_weight is None"),
    "hard weight a string": (distill(hard_weight="0.5"), TypeError, "hard_weight is '0.5'"),
    "a weight to be learned": (hidden(weight=torch.ones((), requires_grad=True)), ValueError, "weight requires grad"),
    "a temperature to be learned": (
        distill(temperature=torch.ones(1, requires_grad=True)), ValueError, "temperature requires grad"
    ),
    "weights of two numbers": (distill(hard_weight=torch.ones(2)), TypeError, "hard_weight is a Tensor"),
    "objective's temperature a string": (lambda: LADObjective(STACK, 1, temperature="x"), TypeError, "temperature is"),
    "objective without a weight": (lambda: LADObjective(STACK, 1, soft_weight=None), TypeError, "soft_weight is None"),
    "student layers true": (lambda: LADObjective(STACK, True), ValueError, "num_student_layers is True"),
    "student size a float": (
        lambda: LADObjective(STACK, 1, student_hidden_size=2.5), ValueError, "student_hidden_size is 2.5",
    ),
    "no student states": (lambda: LADObjective(STACK, 1)(None, *OUTPUTS[1:]), TypeError, "student_hidden_states is a"),
    "student states of another size": (projected([torch.randn(2, 5, 4)]), ValueError, r"_states\[0\].*= 3"),
    "student states of another dtype": (projected([torch.randn(2, 5, 3).double()]), TypeError, "float64.*float32"),
    "no student state": (projected([None]), TypeError, r"student_hidden_states\[0\] is a NoneType"),
    "contributions of nothing": (lambda: STACK.contributions(None), TypeError, "hidden_states is a NoneType"),
    "contributions of too few layers": (lambda: STACK.contributions(STATES[:2]), ValueError, "weight has shape"),
    "contributions of another size": (lambda: STACK.contributions([h[..., :3] for h in STATES]), ValueError, "D = 3"),
    "contributions of long ones": (lambda: STACK.contributions([torch.randn(2, 7, 4)] * 3), ValueError, "seq_len = 6"),
    "contributions with a wrong mask": (
        lambda: STACK.contributions(STATES, torch.ones(3, 3)), ValueError, "attention_mask has shape",
    ),
    "contributions of padding alone": (
        lambda: STACK.contributions(STATES, torch.zeros(2, 5)), ValueError, "attention_mask has no real token",
    ),
    "condition of nothing": (lambda: STACK.condition(None), TypeError, "hidden_states is a NoneType"),
    "condition of padding alone": (
        lambda: STACK.condition(STATES, torch.zeros(2, 5)), ValueError, "attention_mask has no real token",
    ),
    "hidden states sparse": (aggregate([h.to_sparse() for h in STATES]), TypeError, r"hidden_states\[0\].*sparse"),
    "mask sparse": (aggregate(STATES, STACK, None, torch.ones(2, 5).to_sparse()), TypeError, "attention_mask.*sparse"),
    "logits sparse": (distill(LOGITS.to_sparse()), TypeError, "student_logits.*sparse"),
    "labels sparse": (distill(LOGITS, LOGITS, LABELS.to_sparse()), TypeError, "labels.*sparse"),
    "gates sparse": (aggregate(STATES, tensors(bias=STACK.bias.detach().to_sparse())), TypeError, "bias.*sparse"),
    "bounds sparse": (packed(None, torch.tensor([0, 5]).to_sparse()), TypeError, "cu_seqlens.*sparse"),
    "reverse a string": (aggregate(reverse="x"), TypeError, "reverse is 'x'"),
    "regression none": (distill(regression=None), TypeError, "regression is None"),
    "objective's regression": (lambda: LADObjective(STACK, 1, regression=()), TypeError, r"regression is \(\)"),
    "stack's reverse": (lambda: GateStack(3, 4, reverse=torch.ones(2)), ValueError, "reverse is tensor"),
    "bounds without numbers": (
        aggregate(
            [h[0].to("meta") for h in STATES], GateStack(3, 4, 6).to("meta"), None, None, [0, 5], backend="reference"
        ),
        ValueError, "cu_seqlens is on the meta device",
    ),
    "student states a number": (
        lambda: LADObjective(STACK, 1)(torch.tensor(1.0), *OUTPUTS[1:]), ValueError, "student_hidden_states has shape",
    ),
    "bounds elsewhere": (packed(None, torch.tensor([0, 5], device="meta")), ValueError, "cu_seqlens is on meta"),
    "bounds in bytes": (packed(None, b"\x00\x05"), TypeError, "cu_seqlens takes"),
    "no labels": (lambda: LADObjective(STACK, 1)(*OUTPUTS[:4]), ValueError, "labels is None"),
    "no logits": (lambda: LADObjective(STACK, 1)(*OUTPUTS[:2]), ValueError, "student_logits is None"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_name_the_argument(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_plain_gate_tensors_run_forward():
    """A list has a method named reverse, which is no answer to whether the chain runs in reverse."""
    ours = lad_fast.fused_aggregate(STATES, tensors(), (2,), backend="torch")
    assert torch.equal(ours[0], STACK(STATES, (2,), backend="torch")[0])
    assert not torch.equal(ours[0], STATES[2])


def test_default_back_end_follows_the_device_and_the_interpreter():
    code = (
        "import torch, lad_fast; from lad_fast.functional import _check_backend as b; x = torch.ones(1);"
        "print(b(None, x), b(None, x.double()))"
    )
    for value, expected in (("0", "torch torch"), ("1", "triton torch")):
        environment = {"TRITON_INTERPRET": value, "PATH": "/usr/bin"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_shapes_on_the_meta_device(backend):
    """Where models are laid out before there is memory for them."""
    gates = GateStack(3, 4, 6).to("meta")
    objective = LADObjective(gates, 2, student_hidden_size=3, backend=backend).to("meta")
    student = [torch.randn(2, 5, 3, device="meta", requires_grad=True) for _ in range(2)]
    teacher, logits, labels = [h.to("meta") for h in STATES], LOGITS.to("meta"), LABELS.to("meta")
    out = objective(student, teacher, logits, logits, labels)
    out.loss.backward()
    assert out.loss.is_meta and student[0].grad.shape == (2, 5, 3)
    assert [a.shape for a in lad_fast.fused_aggregate(teacher, gates, backend=backend)] == [(2, 5, 4)] * 3


def test_transforms_of_torch_func_take_the_reference():
    def loss(logits, labels=LABELS, backend="reference"):
        return lad_fast.fused_distill_loss(logits, LOGITS, labels, backend=backend)

    student = LOGITS + 1 - LOGITS.flip(0)
    leaf = student.clone().requires_grad_()
    (right,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(student), right)
    both = torch.func.vmap(loss)(torch.stack([student, LOGITS]), torch.stack([LABELS, LABELS.flip(0)]))
    torch.testing.assert_close(both, torch.stack([loss(student), loss(LOGITS, LABELS.flip(0))]))
    for transform, argument in ((torch.func.grad, student), (torch.func.vmap, student[None])):
        with pytest.raises(ValueError, match=r"backend 'torch' cannot run.*backend='reference'"):
            transform(lambda logits: loss(logits, backend="torch"))(argument)


def test_inference_tensors_that_autograd_would_keep_are_named():
    with torch.inference_mode():
        teacher = [h.clone() for h in STATES]
    student = [h.clone().requires_grad_() for h in STATES[:2]]
    objective = LADObjective(GateStack(3, 4, 6), 2, backend="torch")
    arguments = student, teacher, LOGITS, LOGITS, LABELS
    for call in (
        lambda: objective(*arguments),
        aggregate(teacher, backend="torch"),
        aggregate(teacher, backend="reference"),
        hidden(student, teacher[:2], backend="torch"),
    ):
        with pytest.raises(ValueError, match=r"(hidden_states|aggregates)\[0\] is an inference tensor.*no_grad"):
            call()
    objective.requires_grad_(False)(*arguments).loss.backward()  # keeps differences alone
    assert student[1].grad.any()
    with torch.no_grad():
        aggregate(teacher, backend="torch")()


def test_gates_without_numbers_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="gates are on the meta device"):
        GateStack(3, 4, 6).to("meta").save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_reference_refuses_other_dtypes_under_autocast(dtype):
    """PyTorch's own stack and norm refuse them there, by errors that name nothing."""
    states, gates = [h.to(dtype) for h in STATES], GateStack(3, 4, 6)
    gates = gates.double() if dtype == torch.float64 else gates
    calls = (
        lambda **backend: lad_fast.fused_aggregate(states, gates, **backend),
        lambda **backend: lad_fast.fused_hidden_loss(states[:2], states[1:], **backend),
        lambda **backend: lad_fast.fused_distill_loss(LOGITS.to(dtype), LOGITS.to(dtype), LABELS, **backend),
    )
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(TypeError, match=r"backend 'reference' takes float32 or torch.bfloat16 under"):
                call(backend="reference")
            call(backend="torch")


def test_student_states_are_cast_to_the_projections_by_autocast():
    objective = LADObjective(STACK, 1, student_hidden_size=3, backend="torch")
    with torch.autocast("cpu", torch.bfloat16):
        objective([torch.randn(2, 5, 3).half()], *OUTPUTS[1:])
        with pytest.raises(TypeError, match=r"float64.*float32"):
            objective([torch.randn(2, 5, 3).double()], *OUTPUTS[1:])


def test_weights_may_be_symbolic_numbers_of_a_compiled_caller():
    gates = [h.detach() for h in STACK.parameters()]

    def losses(weight):
        student = [h.flip(0) for h in STATES[:2]]
        return torch.stack([
            lad_fast.fused_hidden_loss(student, STATES[:2], None, weight, backend="torch"),
            lad_fast.fused_distill_loss(LOGITS, LOGITS.flip(0), LABELS, weight, weight, weight, backend="torch"),
            chain_loss(student, STATES, gates, (1, 2), None, None, weight, backend="torch").sum(),
            lad_fast.fused_aggregate(STATES, gates, (2,), eps=weight, backend="torch")[0].sum(),
        ])  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, dynamic=True, backend="aot_eager")
    for weight in (0.5, 2.5):
        torch.testing.assert_close(compiled(weight), losses(weight))


def test_states_that_the_kernels_cannot_count_are_refused():
    huge = torch.zeros(1, 1, 1).expand(2**14, 2**9, 2**8)  # of no memory
    gates = lad_fast.GateStack(2, 2**8, 2**9)
    with pytest.raises(ValueError, match=r"hidden_states\[0\] has 2147483648 elements; backend 'triton' takes fewer"):
        lad_fast.fused_aggregate([huge] * 2, gates, backend="triton")

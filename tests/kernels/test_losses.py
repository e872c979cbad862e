"""Hidden loss and logit loss of both back ends against the float64 reference."""

import pytest
import torch
from cases import relative_error

import lad_fast
from lad_fast import reference
from lad_fast.kernels import ops

pytestmark = pytest.mark.kernels
BACKENDS = ("torch", "triton")
# Sums in float32; half types: one rounding of each gradient (bfloat16 truncated by the interpreter).
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def hidden_case(dtype, masked, shape=(3, 7, 40), num_layers=2):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    student = [torch.randn(shape, generator=generator).to(dtype) for _ in range(num_layers)]
    targets = [torch.randn(shape, generator=generator).to(dtype) for _ in range(num_layers)]
    mask = None
    if masked:
        mask = torch.ones(shape[:-1], dtype=torch.long)
        mask[0, 1:] = 0
    return student, targets, mask


def hidden_gradients(function, student, targets, mask, dtype, scale=1.0, **options):
    student = [t.to(dtype).requires_grad_() for t in student]
    targets = [t.to(dtype).requires_grad_() for t in targets]
    losses = function(student, targets, mask, 500.0, reduction="none", **options)
    (losses * torch.arange(1.0, len(losses) + 1) * scale).sum().backward()
    return losses.detach(), [t.grad for t in (*student, *targets)]


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_loss(backend, dtype, masked, poisoned_allocations):
    case = hidden_case(dtype, masked)
    expected, right = hidden_gradients(reference.hidden_loss, *case, torch.float64, scale=3.0)
    losses, ours = hidden_gradients(lad_fast.fused_hidden_loss, *case, dtype, scale=3.0, backend=backend)
    assert losses.dtype == torch.float32
    assert relative_error(losses, expected) < 2e-6
    for actual, gradient in zip(ours, right, strict=True):
        assert gradient.any()
        assert relative_error(actual, gradient) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", ((1, 1, 1), (1, 1, 24), (5, 3, 100), (2, 2, 768), (2, 70, 17)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_loss_sizes(backend, shape, poisoned_allocations):
    case = hidden_case(torch.float32, False, shape, num_layers=3)
    expected, right = hidden_gradients(reference.hidden_loss, *case, torch.float64)
    losses, ours = hidden_gradients(lad_fast.fused_hidden_loss, *case, torch.float32, backend=backend)
    assert relative_error(losses, expected) < 2e-6
    for actual, gradient in zip(ours, right, strict=True):
        assert relative_error(actual, gradient) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_loss_of_two_dtypes_and_of_padding(backend):
    student, targets, _ = hidden_case(torch.float32, False)
    targets = [t.bfloat16() for t in targets]
    expected = reference.hidden_loss([t.double() for t in student], [t.double() for t in targets])
    actual = lad_fast.fused_hidden_loss(student, targets, backend=backend)
    assert actual.dim() == 0
    assert relative_error(actual, expected) < 2e-6
    padding = torch.zeros(3, 7)
    assert lad_fast.fused_hidden_loss(student, targets, padding, backend=backend) == 0
    student[0][0] = float("nan")
    mask = torch.ones(3, 7)
    mask[0] = 0
    leaf = student[0].requires_grad_()
    loss = lad_fast.fused_hidden_loss(student, targets, mask, backend=backend)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(leaf.grad).all()
    assert not leaf.grad[0].any()


def logits_case(classes, dtype, batch=5, scale=3.0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    student, teacher = (scale * torch.randn(batch, classes, generator=generator).to(dtype) for _ in range(2))
    return student, teacher, torch.randint(0, classes, (batch,), generator=generator)


@pytest.mark.parametrize("classes", (1, 2, 3, 257, 1000))  # one class, GLUE's, one and several steps over classes
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_distill_loss(backend, dtype, classes, poisoned_allocations):
    student, teacher, labels = logits_case(classes, dtype)
    settings = {"temperature": 4.0, "soft_weight": 0.7, "hard_weight": 0.2}
    exact = student.double().requires_grad_()
    expected = reference.distill_loss(exact, teacher.double(), labels, **settings)
    (2.5 * expected).backward()
    leaf = student.clone().requires_grad_()
    loss = lad_fast.fused_distill_loss(leaf, teacher, labels, **settings, backend=backend)
    (2.5 * loss).backward()
    assert loss.dtype == torch.float32
    if classes == 1:
        assert abs(loss) < 1e-6
        assert not leaf.grad.any()
    else:
        assert relative_error(loss.detach(), expected.detach()) < 5e-6
        assert relative_error(leaf.grad, exact.grad) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("shape", ((6, 1), (6,), (1, 1), (300, 1)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_regression_loss(backend, shape, poisoned_allocations):
    student, teacher = torch.randn(shape), torch.randn(shape)
    labels = 5 * torch.rand(shape[0])
    exact, leaf = student.double().requires_grad_(), student.clone().requires_grad_()
    expected = reference.distill_loss(exact, teacher.double(), labels.double(), regression=True, soft_weight=0.3)
    expected.backward()
    loss = lad_fast.fused_distill_loss(leaf, teacher, labels, regression=True, soft_weight=0.3, backend=backend)
    loss.backward()
    assert relative_error(loss.detach(), expected.detach()) < 2e-6
    assert relative_error(leaf.grad, exact.grad) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend):
    """No overflow at the ends of float16's range, and equal logits cost nothing but the hard loss."""
    student = torch.tensor([[60000.0, -60000.0], [-60000.0, 60000.0]], dtype=torch.float16, requires_grad=True)
    loss = lad_fast.fused_distill_loss(student, student.detach(), torch.tensor([0, 1]), backend=backend)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unread_labels_outside_the_classes_give_nan(backend):
    """What happens on a GPU, where the functional API does not read the labels."""
    student, teacher, labels = logits_case(3, torch.float32)
    labels[2] = 3
    loss, *_ = ops.distill_loss_forward(student, teacher, labels, 10.0, 0.5, 0.5, False, None, backend)
    assert torch.isnan(loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    student, targets, mask = hidden_case(torch.float32, True)
    student, targets = ([t.flatten(0, 1) for t in states] for states in (student, targets))
    row_mask = mask.bool().flatten()
    torch.library.opcheck(ops.hidden_loss_forward, (student, targets, row_mask, 3.0, backend))
    losses, factor = ops.hidden_loss_forward(student, targets, row_mask, 3.0, backend)
    torch.library.opcheck(ops.hidden_loss_backward, (losses, student, targets, row_mask, factor, True, True, backend))
    logits = logits_case(3, torch.float32)
    torch.library.opcheck(ops.distill_loss_forward, (*logits, 10.0, 0.5, 0.5, False, losses, backend))
    floats = torch.randn(4, 1)
    arguments = (floats, floats + 1, torch.rand(4), 10.0, 0.5, 0.5, True, None, backend)
    torch.library.opcheck(ops.distill_loss_forward, arguments)


def test_gradcheck():
    student, targets, mask = hidden_case(torch.float64, True, (2, 3, 4))
    tensors = [t.requires_grad_() for t in (*student, *targets)]
    function = lambda *t: lad_fast.fused_hidden_loss(t[:2], t[2:], mask, backend="torch")  # noqa: E731
    assert torch.autograd.gradcheck(function, tensors)
    student, teacher, labels = logits_case(3, torch.float64)
    function = lambda z: lad_fast.fused_distill_loss(z, teacher, labels, backend="torch")  # noqa: E731
    assert torch.autograd.gradcheck(function, student.requires_grad_())
    function = lambda z: lad_fast.fused_distill_loss(  # noqa: E731
        z, teacher[:, :1], labels.double(), regression=True, backend="torch"
    )
    assert torch.autograd.gradcheck(function, student[:, :1].detach().clone().requires_grad_())

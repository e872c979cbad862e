"""The operators of LAD: schemas, fake versions, autograd. Triton is not imported until it runs.

Each operator is one opaque ``torch.library.custom_op`` (``triton_op`` fails opcheck and compile in Triton's
interpreter) under an ``autograd.Function`` with a hand-written backward. ``backend`` picks the implementation:
"triton" or "torch". Both get contiguous 2-D states (T, D) in chain order, already checked.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from lad_fast.kernels import eager, launch
from lad_fast.kernels.once import once_differentiable


def _hidden_loss(backend: str) -> ModuleType:
    if backend == "torch":
        return eager
    from lad_fast.kernels import hidden_loss

    return hidden_loss


def _logit_loss(backend: str) -> ModuleType:
    if backend == "torch":
        return eager
    from lad_fast.kernels import logit_loss

    return logit_loss


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and losses are float32; float64 stays, for gradcheck."""
    return torch.float64 if dtype == torch.float64 else torch.float32


KEEP = ("nothing", "differences", "gates", "states", "gradients")
"""What a forward keeps for its backward: ``student - aggregate``, all that a student alone needs; the gates' values;
none of those, and backward makes the gates again from the aggregates; or the gradients themselves, made in forward,
and backward runs the chain again only where their scale turns out not to be one number."""


def _new_gates(state: Tensor, weight: Tensor, matmul_dtype: torch.dtype, keep: str, backend: str) -> list[Tensor]:
    if keep != "gates":
        return []
    if backend == "torch":
        return [torch.empty_like(state, dtype=matmul_dtype) for _ in weight]
    return [state.new_empty((len(weight), *state.shape))]


def _new_states(state: Tensor, weight: Tensor, backend: str) -> Tensor:
    return state.new_empty((len(weight) + (backend != "torch"), *state.shape))


def _new_statistics(state, weight, norm_weight, cu_seqlens, seq_len, backend) -> tuple[Tensor, Tensor]:
    """Mean and rstd (n, groups). A group is what shares one mean: an example, or a token for the "token" norm."""
    if backend == "torch":
        groups = 0
    elif norm_weight.dim() == 2:
        groups = state.shape[0]
    else:
        groups = state.shape[0] // seq_len if cu_seqlens is None else cu_seqlens.shape[0] - 1
    mean = state.new_empty((len(weight), groups), dtype=statistics_dtype(state.dtype))
    return mean, torch.empty_like(mean)


def _new_product_weight(weight: Tensor, matmul_dtype: torch.dtype) -> Tensor:
    return weight.new_empty(weight.shape if weight.dtype != matmul_dtype else 0, dtype=matmul_dtype)


def _new_gradients(hidden, weight, norm_weight, need_hidden, need_parameters) -> list[Tensor]:
    shapes = (weight.shape, weight.shape[:2], norm_weight.shape, norm_weight.shape)
    grad_hidden = hidden[0].new_empty((len(hidden), *hidden[0].shape) if need_hidden else 0)
    return [grad_hidden, *(norm_weight.new_empty(shape if need_parameters else 0) for shape in shapes)]


@torch.library.custom_op("lad_fast::aggregate_forward", mutates_args=())
def aggregate_forward(
    hidden: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    row_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_len: int,
    eps: float,
    matmul_dtype: torch.dtype,
    keep: str,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    """Run n gates.

    Args:
        hidden: n + 1 states (T, D); "torch" takes zero padding in the first.
        weight: (n, D, D), bias: (n, D), norm_weight, norm_bias: (n, S, D) or (n, D), float32.
        row_mask: (T,) bool, False for padding; "triton" takes any dtype. cu_seqlens: (E + 1,) int32.
        seq_len: rows of an example; 0 where ``cu_seqlens`` says.
        matmul_dtype: of the matrix products.
        keep: "nothing", "gates" or "states" of :data:`KEEP`.

    Returns:
        The weights in ``matmul_dtype``, empty where they are so already; aggregates, gates, mean and rstd (n, groups).
        "triton" puts the chain's start before the n aggregates, and all gates in one tensor (n, T, D). "torch" has n
        gates (T, D) in the products' dtype and no statistics: (n, 0).
    """
    chain = (bias, norm_weight, norm_bias, row_mask, cu_seqlens, seq_len, eps)
    with torch.autocast(hidden[0].device.type, enabled=False):
        if backend == "torch":
            cast = weight.to(matmul_dtype)
            empty = _new_statistics(hidden[0], weight, norm_weight, cu_seqlens, seq_len, backend)
            return _other(cast, weight), *eager.aggregate_forward(hidden, cast, *chain, keep), *empty
        from lad_fast.kernels.chain import forward

        out = forward(hidden, [], [], weight, *chain, matmul_dtype, 0.0, keep)
        return _other(out.weight, weight), out.states, out.gates, out.mean, out.rstd


@aggregate_forward.register_fake
def _(hidden, weight, bias, norm_weight, norm_bias, row_mask, cu_seqlens, seq_len, eps, matmul_dtype, keep, backend):
    return (
        _new_product_weight(weight, matmul_dtype),
        _new_states(hidden[0], weight, backend),
        _new_gates(hidden[0], weight, matmul_dtype, keep, backend),
        *_new_statistics(hidden[0], weight, norm_weight, cu_seqlens, seq_len, backend),
    )


@torch.library.custom_op("lad_fast::aggregate_backward", mutates_args=())
def aggregate_backward(
    grads: list[Tensor | None],
    hidden: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    aggregates: Tensor | None,
    gates: list[Tensor],
    mean: Tensor,
    rstd: Tensor,
    row_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_len: int,
    eps: float,
    need_hidden: bool,
    need_parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`aggregate_forward`.

    Args:
        grads: n gradients (T, D) of the aggregates, None where there is none.
        aggregates: "torch" runs the chain again and takes None.

    Returns:
        Gradients of the hidden states (n + 1, T, D), weight, bias, norm_weight and norm_bias (float32); empty
        tensors where not needed.
    """
    grads = [None if grad is None else grad.contiguous() for grad in grads]
    where = row_mask, cu_seqlens, seq_len
    with torch.autocast(hidden[0].device.type, enabled=False):
        if backend == "torch":
            return eager.aggregate_backward(
                grads, hidden, weight, bias, norm_weight, norm_bias, gates, *where, eps, need_hidden, need_parameters
            )
        from lad_fast.kernels import chain

        _, *gradients = chain.backward(
            grads, None, None, hidden, [], [], weight, bias, norm_weight, norm_bias, aggregates, gates, mean, rstd,
            *where, False, need_hidden, need_parameters,
        )  # fmt: skip
        return tuple(gradients)


@aggregate_backward.register_fake
def _(
    grads, hidden, weight, bias, norm_weight, norm_bias, aggregates, gates, mean, rstd, row_mask, cu_seqlens, seq_len,
    eps, need_hidden, need_parameters, backend,
):  # fmt: skip
    return tuple(_new_gradients(hidden, weight, norm_weight, need_hidden, need_parameters))


def _laid_out(weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> tuple[Tensor, ...]:
    """The gates as kernels read them: dense, but that affines may be the first rows of longer ones. Both affines share
    their stride from gate to gate."""
    affine = norm_weight, norm_bias
    if norm_weight.stride() != norm_bias.stride() or not all(parameter[0].is_contiguous() for parameter in affine):
        affine = [parameter.contiguous() for parameter in affine]
    return weight.contiguous(), bias.contiguous(), *affine


def _other(cast: Tensor, weight: Tensor) -> Tensor:
    """What an operator returns of weights it cast: its inputs it must not."""
    return weight.new_empty(0) if cast is weight else cast


# forward() of a Function with any number of tensors takes all arguments by one star. Where nothing needs a gradient,
# Dynamo leaves ctx out if there are as many arguments as forward() has parameters, a starred one counting once.


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        wanted, row_mask, cu_seqlens, seq_len, eps, matmul_dtype, keep, backend, *tensors = arguments
        weight, bias, norm_weight, norm_bias, *hidden = tensors
        weight, bias, norm_weight, norm_bias = _laid_out(weight, bias, norm_weight, norm_bias)
        hidden = [h.contiguous() for h in hidden]
        cast, aggregates, gates, mean, rstd = aggregate_forward(
            hidden, weight, bias, norm_weight, norm_bias, row_mask, cu_seqlens, seq_len, eps, matmul_dtype, keep,
            backend,
        )  # fmt: skip
        weight = cast if cast.numel() else weight  # kept as the products take it: a cast costs more than its bytes
        ctx.wanted, ctx.seq_len, ctx.eps, ctx.backend = wanted, seq_len, eps, backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            row_mask, cu_seqlens, weight, bias, norm_weight, norm_bias, None if backend == "torch" else aggregates,
            mean, rstd, *hidden, *gates,
        )  # fmt: skip
        aggregates = aggregates.unbind(0)  # compiled by PyTorch 2.11, an index in its place loses the gradient
        return tuple(aggregates[i - len(weight)] for i in wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        saved = ctx.saved_tensors
        (row_mask, cu_seqlens, *parameters, aggregates, mean, rstd), states = saved[:9], saved[9:]
        needs_parameters, needs_hidden = ctx.needs_input_grad[8:12], ctx.needs_input_grad[12:]
        hidden, gates = states[: len(needs_hidden)], states[len(needs_hidden) :]
        nothing = (None,) * 8
        if all(grad is None for grad in grad_outputs):
            return *nothing, *(None,) * (4 + len(hidden))
        grads: list[Tensor | None] = [None] * len(parameters[0])
        for i, grad in zip(ctx.wanted, grad_outputs, strict=True):
            grads[i] = grad
        grad_hidden, *grad_parameters = aggregate_backward(
            grads, hidden, *parameters, aggregates, gates, mean, rstd,
            row_mask, cu_seqlens, ctx.seq_len, ctx.eps, any(needs_hidden), any(needs_parameters), ctx.backend,
        )  # fmt: skip
        return (
            *nothing,
            *(grad if needed else None for grad, needed in zip(grad_parameters, needs_parameters, strict=True)),
            *(grad_hidden[i] if needed else None for i, needed in enumerate(needs_hidden)),
        )


def _keep(chain, student, keep_gates: bool) -> str:
    """What of :data:`KEEP` the backward of a chain's inputs, and of student states, will need."""
    if torch.is_grad_enabled():
        if any(tensor.requires_grad for tensor in chain):
            return "gates" if keep_gates else "states"
        if any(tensor.requires_grad for tensor in student):
            return "differences"
    return "nothing"


def aggregate(
    hidden: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    wanted: list[int],
    *,
    row_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_len: int,
    eps: float,
    matmul_dtype: torch.dtype,
    keep_gates: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """Aggregates ``wanted`` (0 = behind the first gate) as (T, D) tensors; see :func:`aggregate_forward`."""
    inputs = (weight, bias, norm_weight, norm_bias, *hidden)
    keep = _keep(inputs, (), keep_gates)
    return _Aggregate.apply(tuple(wanted), row_mask, cu_seqlens, seq_len, eps, matmul_dtype, keep, backend, *inputs)


@torch.library.custom_op("lad_fast::chain_loss_forward", mutates_args=())
def chain_loss_forward(
    hidden: list[Tensor],
    student: list[Tensor],
    targets: list[int],
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    row_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_len: int,
    eps: float,
    matmul_dtype: torch.dtype,
    loss_weight: float,
    keep: str,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Run n gates and compare K student states with aggregates: :func:`aggregate_forward` and
    :func:`hidden_loss_forward` in one, so that no aggregate need outlive its use.

    Args:
        student: K states (T, D); may have another dtype than ``hidden``.
        targets: for each, its position along the chain, from 0 (the chain's start) to n; distinct, n among them.

    Returns:
        losses (K,), the factor ``2 * loss_weight / (real tokens * D)`` (scalar) that the gradient needs, differences
        (K states like ``student``) and gates where kept, and ("torch" alone) gradients of the losses' sum: of the
        student's states and of the four parameters; weights, aggregates, mean and rstd as :func:`aggregate_forward`
        returns them, weights empty where gradients are kept, aggregates for "torch" and where no backward reads them.
    """
    chain = (bias, norm_weight, norm_bias, row_mask, cu_seqlens, seq_len, eps)
    with torch.autocast(hidden[0].device.type, enabled=False):
        if backend == "torch":
            cast = weight.to(matmul_dtype)
            found = eager.chain_loss_forward(hidden, student, targets, cast, *chain, loss_weight, keep)
            cast = cast.new_empty(0) if keep == "gradients" else _other(cast, weight)
            empty = _new_statistics(hidden[0], weight, norm_weight, cu_seqlens, seq_len, backend)
            return *found, cast, hidden[0].new_empty(0), *empty
        from lad_fast.kernels.chain import forward

        out = forward(hidden, student, targets, weight, *chain, matmul_dtype, loss_weight, keep)
        states = out.states if keep in ("gates", "states") else out.states.new_empty(0)
        cast = _other(out.weight, weight)
        return out.losses, out.factor, out.differences, out.gates, [], cast, states, out.mean, out.rstd


@chain_loss_forward.register_fake
def _(
    hidden, student, targets, weight, bias, norm_weight, norm_bias, row_mask, cu_seqlens, seq_len, eps, matmul_dtype,
    loss_weight, keep, backend,
):  # fmt: skip
    state, read, made = hidden[0], backend != "torch" and keep in ("gates", "states"), keep == "gradients"
    losses = state.new_empty(len(student), dtype=statistics_dtype(student[0].dtype))
    return (
        losses,
        losses.new_empty(()),
        [torch.empty_like(h) for h in student] if keep == "differences" else [],
        _new_gates(state, weight, matmul_dtype, keep, backend),
        [torch.empty_like(tensor) for tensor in (*student, weight, bias, norm_weight, norm_bias)] if made else [],
        weight.new_empty(0, dtype=matmul_dtype) if made else _new_product_weight(weight, matmul_dtype),
        _new_states(state, weight, backend) if read else state.new_empty(0),
        *_new_statistics(state, weight, norm_weight, cu_seqlens, seq_len, backend),
    )


@torch.library.custom_op("lad_fast::chain_loss_backward", mutates_args=())
def chain_loss_backward(
    grad: Tensor,
    factor: Tensor,
    hidden: list[Tensor],
    student: list[Tensor],
    targets: list[int],
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gates: list[Tensor],
    aggregates: Tensor,
    mean: Tensor,
    rstd: Tensor,
    row_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_len: int,
    eps: float,
    need_student: bool,
    need_hidden: bool,
    need_parameters: bool,
    logits_slope: Tensor | None,
    grad_logits_loss: Tensor | None,
    logits_dtype: torch.dtype | None,
    backend: str,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`chain_loss_forward`: of the student's states, then as :func:`aggregate_backward`; and of the
    student's logits in their dtype, ``logits_slope * grad_logits_loss``, empty where None."""
    chain = (weight, bias, norm_weight, norm_bias)
    where, needs = (row_mask, cu_seqlens, seq_len), (need_student, need_hidden, need_parameters)
    grad_logits = factor.new_empty(0 if logits_slope is None else logits_slope.shape, dtype=logits_dtype)
    with torch.autocast(hidden[0].device.type, enabled=False):
        if backend == "torch":
            if logits_slope is not None:
                grad_logits.copy_(logits_slope * grad_logits_loss)
            found = eager.chain_loss_backward(
                grad, factor, hidden, student, targets, *chain, gates, *where, eps, *needs
            )
            return *found, grad_logits
        from lad_fast.kernels.chain import backward

        logits = None if logits_slope is None else (logits_slope, grad_logits_loss, grad_logits)
        found = backward(
            [], grad, factor, hidden, student, targets, *chain, aggregates, gates, mean, rstd, *where, *needs, logits,
        )  # fmt: skip
        return *found, grad_logits


@chain_loss_backward.register_fake
def _(
    grad, factor, hidden, student, targets, weight, bias, norm_weight, norm_bias, gates, aggregates, mean, rstd,
    row_mask, cu_seqlens, seq_len, eps, need_student, need_hidden, need_parameters, logits_slope, grad_logits_loss,
    logits_dtype, backend,
):  # fmt: skip
    return (
        [torch.empty_like(h) for h in student] if need_student else [],
        *_new_gradients(hidden, weight, norm_weight, need_hidden, need_parameters),
        factor.new_empty(0 if logits_slope is None else logits_slope.shape, dtype=logits_dtype),
    )


def _add(*grads: Tensor | None) -> Tensor | None:
    """The sum of the gradients that there are."""
    found = [grad for grad in grads if grad is not None]
    return sum(found[1:], start=found[0]) if found else None


def _scaled(gradients: Sequence[Tensor], grad: Tensor) -> Sequence[Tensor] | None:
    """Gradients of K losses' sum, times what flows back into each of them; None where that is not one number."""
    scale, *others = grad.reshape(-1).tolist()
    if any(other != scale for other in others):
        return None
    # Handed out as they are they become the parameters' ``.grad``, which a caller may change before another backward.
    if scale == 1 and not torch._C._autograd._get_current_graph_task_keep_graph():
        return gradients
    return [gradient * scale for gradient in gradients]


class _ChainLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        targets, row_mask, cu_seqlens, seq_len, eps, matmul_dtype, loss_weight, keep, backend, *rest = arguments
        teacher_logits, labels, logits_settings, weight, bias, norm_weight, norm_bias, student_logits, *states = rest
        weight, bias, norm_weight, norm_bias = _laid_out(weight, bias, norm_weight, norm_bias)
        states = [state.contiguous() for state in states]
        student, hidden = states[: len(targets)], states[len(targets) :]
        losses, factor, differences, gates, gradients, cast, *kept = chain_loss_forward(
            hidden, student, targets, weight, bias, norm_weight, norm_bias, row_mask, cu_seqlens,
            seq_len, eps, matmul_dtype, loss_weight, keep, backend,
        )  # fmt: skip
        weight = cast if cast.numel() else weight  # kept as the products take it: a cast costs more than its bytes
        slope, ctx.logits_dtype, outputs = None, None, (losses,)
        if student_logits is not None:
            logits_loss, slope, (hidden_loss, loss) = distill_loss_forward(
                *(tensor.contiguous() for tensor in (student_logits, teacher_logits, labels)), *logits_settings,
                losses, backend,
            )  # fmt: skip
            ctx.logits_dtype, outputs = student_logits.dtype, (loss, hidden_loss, logits_loss, losses)
        ctx.targets, ctx.seq_len, ctx.eps, ctx.backend, ctx.keep = targets, seq_len, eps, backend, keep
        ctx.matmul_dtype = matmul_dtype
        ctx.set_materialize_grads(False)
        if keep in ("gates", "states", "gradients"):
            ctx.save_for_backward(
                slope, factor, row_mask, cu_seqlens, weight, bias, norm_weight, norm_bias, *kept, *states, *gates,
                *gradients,
            )  # fmt: skip
        else:
            ctx.save_for_backward(slope, factor, *differences)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        needs_parameters, needs_logits = ctx.needs_input_grad[12:16], ctx.needs_input_grad[16]
        num_layers, needs_states = len(ctx.targets), ctx.needs_input_grad[17:]
        needs_student, needs_hidden = needs_states[:num_layers], needs_states[num_layers:]
        slope, factor, *saved = ctx.saved_tensors
        *grad_sums, grad = grads
        grad_logits_loss = None
        if grad_sums:
            grad_loss, grad_hidden_loss, grad_logits_loss = grad_sums
            grad_logits_loss = _add(grad_loss, grad_logits_loss) if needs_logits else None
            grad = _add(grad, _add(grad_loss, grad_hidden_loss))
        grad_logits = None
        if grad is None or ctx.keep in ("differences", "nothing"):
            if grad_logits_loss is not None:
                grad_logits = (slope * grad_logits_loss).to(ctx.logits_dtype)
            grad_student = [None] * num_layers
            if grad is not None and any(needs_student):
                # In the factor's dtype: float16 has no number as small as the factor can be.
                scales = (grad * factor).expand(num_layers)
                grad_student = [
                    (d.to(factor.dtype) * scale).to(d.dtype) if needed else None
                    for d, scale, needed in zip(saved, scales, needs_student, strict=True)
                ]
            return *(None,) * 16, grad_logits, *grad_student, *(None,) * len(needs_hidden)
        (row_mask, cu_seqlens, weight, *parameters, aggregates, mean, rstd), saved = saved[:9], saved[9:]
        states, kept = saved[: len(needs_states)], saved[len(needs_states) :]
        if grad_logits_loss is None:
            slope = None
        gates, gradients = (kept, None) if ctx.keep != "gradients" else ([], _scaled(kept, grad))
        if gradients is not None:
            grad_student, grad_parameters, grad_hidden = gradients[:num_layers], gradients[num_layers:], None
            grad_logits = None if slope is None else (slope * grad_logits_loss).to(ctx.logits_dtype)
        else:
            grad_student, grad_hidden, *grad_parameters, grad_logits = chain_loss_backward(
                grad.expand(num_layers), factor, states[num_layers:], states[:num_layers], ctx.targets,
                weight.to(ctx.matmul_dtype), *parameters, gates, aggregates, mean, rstd, row_mask, cu_seqlens,
                ctx.seq_len, ctx.eps, any(needs_student), any(needs_hidden), any(needs_parameters), slope,
                grad_logits_loss, ctx.logits_dtype, ctx.backend,
            )  # fmt: skip
        return (
            *(None,) * 12,
            *(grad if needed else None for grad, needed in zip(grad_parameters, needs_parameters, strict=True)),
            None if slope is None else grad_logits,
            *(grad_student[k] if needed else None for k, needed in enumerate(needs_student)),
            *(grad_hidden[i] if needed else None for i, needed in enumerate(needs_hidden)),
        )


def _makes_gradients(hidden: list[Tensor], student: list[Tensor], backend: str) -> bool:
    """Whether a forward makes the gradients as well, as Liger's losses do: the chain is run once, not twice.

    Not in few rows, where the parameters' gradients are most of what is kept; not in float16, which has no numbers as
    small as gradients are before a scaler's factor; not where a graph is traced, which cannot read that factor.
    """
    return (
        backend == "torch"
        and hidden[0].device.type == "cpu"
        and len(hidden[0]) >= launch.GRADIENTS_IN_FORWARD_ROWS
        and torch.float16 not in (hidden[0].dtype, student[0].dtype)
        and not any(state.requires_grad for state in hidden)
        and not torch.compiler.is_compiling()
    )


def chain_loss(
    hidden: list[Tensor],
    student: list[Tensor],
    targets: list[int],
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    row_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_len: int,
    eps: float,
    loss_weight: float,
    matmul_dtype: torch.dtype,
    keep_gates: bool,
    backend: str,
    logits: tuple | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """(K,) weighted mean squared errors between student states and aggregates; see :func:`chain_loss_forward`.

    With ``logits``, the arguments of :func:`distill_loss`, all losses of the objective at once: their sum, the hidden
    losses' sum, the logits' loss, and the hidden losses.
    """
    chain = (weight, bias, norm_weight, norm_bias)
    keep = _keep((*chain, *hidden), student, keep_gates)
    if keep in ("gates", "states") and _makes_gradients(hidden, student, backend):
        keep = "gradients"
    student_logits, teacher_logits, labels, *settings = logits or (None, None, None)
    losses = _ChainLoss.apply(
        targets, row_mask, cu_seqlens, seq_len, eps, matmul_dtype, loss_weight, keep, backend, teacher_logits, labels,
        tuple(settings), *chain, student_logits, *student, *hidden,
    )  # fmt: skip
    return losses if logits else losses[0]


@torch.library.custom_op("lad_fast::hidden_loss_forward", mutates_args=())
def hidden_loss_forward(
    student: list[Tensor], targets: list[Tensor], row_mask: Tensor | None, weight: float, backend: str
) -> tuple[Tensor, Tensor]:
    """``weight * mean((student_k - target_k)^2)`` as (K,), and the factor (scalar) that the gradient needs:
    ``2 * weight / (real tokens * D)``."""
    return _hidden_loss(backend).hidden_loss_forward(student, targets, row_mask, weight)


@hidden_loss_forward.register_fake
def _(student, targets, row_mask, weight, backend):
    losses = student[0].new_empty(len(student), dtype=statistics_dtype(student[0].dtype))
    return losses, losses.new_empty(())


@torch.library.custom_op("lad_fast::hidden_loss_backward", mutates_args=())
def hidden_loss_backward(
    grad: Tensor,
    student: list[Tensor],
    targets: list[Tensor],
    row_mask: Tensor | None,
    factor: Tensor,
    need_student: bool,
    need_targets: bool,
    backend: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """``grad_k * factor * (student_k - target_k)`` and its negative, as lists; empty where not needed."""
    return _hidden_loss(backend).hidden_loss_backward(
        grad.contiguous(), student, targets, row_mask, factor, need_student, need_targets
    )


@hidden_loss_backward.register_fake
def _(grad, student, targets, row_mask, factor, need_student, need_targets, backend):
    return (
        [torch.empty_like(h) for h in student] if need_student else [],
        [torch.empty_like(a) for a in targets] if need_targets else [],
    )


class _HiddenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        num_layers, row_mask, weight, backend, *states = arguments
        states = [state.contiguous() for state in states]
        student, targets = states[:num_layers], states[num_layers:]
        losses, factor = hidden_loss_forward(student, targets, row_mask, weight, backend)
        ctx.backend = backend
        ctx.save_for_backward(row_mask, factor, *states)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        row_mask, factor, *states = ctx.saved_tensors
        num_layers = len(states) // 2
        needs = ctx.needs_input_grad[4:]
        need_student, need_targets = any(needs[:num_layers]), any(needs[num_layers:])
        grad_student, grad_targets = hidden_loss_backward(
            grad, states[:num_layers], states[num_layers:], row_mask, factor, need_student, need_targets, ctx.backend
        )
        grads = [*(grad_student or [None] * num_layers), *(grad_targets or [None] * num_layers)]
        return None, None, None, None, *(g if needed else None for g, needed in zip(grads, needs, strict=True))


def hidden_loss(
    student: list[Tensor], targets: list[Tensor], *, row_mask: Tensor | None, weight: float, backend: str
) -> Tensor:
    """(K,) weighted mean squared errors of K pairs (T, D)."""
    return _HiddenLoss.apply(len(student), row_mask, weight, backend, *student, *targets)


@torch.library.custom_op("lad_fast::distill_loss_forward", mutates_args=())
def distill_loss_forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    regression: bool,
    hidden_losses: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss (scalar) and its slope by the student's logits (B, C), both float32; and with ``hidden_losses`` (K,) their
    sum and the sum of all losses."""
    return _logit_loss(backend).distill_loss_forward(
        student_logits, teacher_logits, labels, temperature, soft_weight, hard_weight, regression, hidden_losses
    )


@distill_loss_forward.register_fake
def _(
    student_logits, teacher_logits, labels, temperature, soft_weight, hard_weight, regression, hidden_losses, backend
):  # fmt: skip
    slope = torch.empty_like(student_logits, dtype=statistics_dtype(student_logits.dtype))
    loss = slope.new_empty(())
    if hidden_losses is None:
        return loss, slope, []
    dtype = torch.promote_types(hidden_losses.dtype, loss.dtype)
    return loss, slope, [hidden_losses.new_empty(()), loss.new_empty((), dtype=dtype)]


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student_logits, teacher_logits, labels, temperature, soft_weight, hard_weight, regression, backend
    ):
        loss, grad, _ = distill_loss_forward(
            student_logits.contiguous(), teacher_logits.contiguous(), labels.contiguous(), temperature, soft_weight,
            hard_weight, regression, None, backend,
        )  # fmt: skip
        ctx.dtype = student_logits.dtype
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        return (grad * grad_output).to(ctx.dtype), *(None,) * 7


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    regression: bool,
    backend: str,
) -> Tensor:
    """Scalar loss on the logits; see :func:`distill_loss_forward`."""
    return _DistillLoss.apply(
        student_logits, teacher_logits, labels, float(temperature), float(soft_weight), float(hard_weight), regression,
        backend,
    )  # fmt: skip

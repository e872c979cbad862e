"""The "torch" back end: the mathematics of the kernels in in-place PyTorch calls, on any device.

It keeps for backward what the kernels keep: the aggregates, the gate values and one mean and rstd a group. The
blend ``O = g * H + (1 - g) * A_prev`` is made again in backward from tensors that are read there anyway.
"""

from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class _Segments(NamedTuple):
    """Which example each row belongs to, for the "sequence" norm with a mask or packed."""

    example: Tensor  # (T,) int64
    position: Tensor  # (T,) int64, row of the affine
    real: Tensor | None  # (T, 1), 0 for padding
    count: Tensor  # (E, 1) elements of an example

    def sums(self, values: Tensor) -> Tensor:
        """(E, 1) sum of (T, D) values over each example's real rows."""
        rows = values.sum(dim=1, keepdim=True)
        if self.real is not None:
            rows = rows * self.real
        return rows.new_zeros(self.count.shape).index_add_(0, self.example, rows)

    def affine(self, parameter: Tensor) -> Tensor:
        """(T, D) rows of an (S, D) parameter."""
        return parameter[self.position]


def _segments(state, norm_weight, row_mask, cu_seqlens, seq_len, dtype) -> _Segments | None:
    if norm_weight.dim() == 2 or (row_mask is None and cu_seqlens is None):
        return None
    (num_tokens, hidden_size), device = state.shape, state.device
    rows = torch.arange(num_tokens, device=device)
    if cu_seqlens is None:
        example, position = rows // seq_len, rows % seq_len
        real = row_mask.to(dtype)[:, None]
        count = real.view(-1, seq_len).sum(dim=1, keepdim=True) * hidden_size
    else:
        example = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
        start = cu_seqlens[example]
        lengths = cu_seqlens.diff()
        position, real = rows - start, None
        # On a GPU the bounds are not read on the host: a too long example becomes NaN, not a wrong read.
        lengths = torch.where(lengths > norm_weight.shape[1], torch.nan, lengths.to(dtype))
        position = position.clamp(max=norm_weight.shape[1] - 1)
        count = lengths[:, None] * hidden_size
    return _Segments(example, position, real, count.clamp(min=1))


def aggregate_forward(
    hidden, weight, bias, norm_weight, norm_bias, row_mask, cu_seqlens, seq_len, eps, keep_gates
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    previous, num_gates = hidden[0], len(weight)
    dtype, work = previous.dtype, bias.dtype
    aggregates = previous.new_empty((num_gates, *previous.shape))
    gates = torch.empty_like(aggregates) if keep_gates else previous.new_empty(0)
    segments = _segments(previous, norm_weight, row_mask, cu_seqlens, seq_len, work)
    means, rstds = [], []
    padding = None if row_mask is None else ~row_mask[:, None]
    for i in range(num_gates):
        gate = _matmul(previous, weight[i].T, bias[i], out=gates[i] if keep_gates and dtype == work else None)
        gate.sigmoid_()
        if keep_gates and dtype != work:
            gates[i].copy_(gate)
        blend = torch.lerp(previous.to(work), hidden[i + 1].to(work), gate)
        if padding is not None:
            blend.masked_fill_(padding, 0)  # a padding row of the layer may hold anything, even NaN
        mean, rstd = _norm(blend, norm_weight[i], norm_bias[i], segments, padding, eps, out=aggregates[i])
        means.append(mean)
        rstds.append(rstd)
        previous = aggregates[i]
    return aggregates, gates, torch.stack(means), torch.stack(rstds)


def _matmul(a: Tensor, b: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b + bias`` in bias's dtype, the product in b's."""
    if a.dtype == b.dtype == bias.dtype:
        return torch.addmm(bias, a, b, out=out)
    product = (a.to(b.dtype) @ b).to(bias.dtype).add_(bias)
    return product if out is None else out.copy_(product)


def _norm(blend, norm_weight, norm_bias, segments, padding, eps, out) -> tuple[Tensor, Tensor]:
    """Layer norm of (T, D) into ``out``; mean and rstd (groups,)."""
    if segments is None:
        shape = norm_weight.shape if norm_weight.dim() == 1 else (norm_weight.numel(),)
        rows, mean, rstd = aten.native_layer_norm(
            blend.view(-1, *shape), shape, norm_weight.view(shape), norm_bias.view(shape), eps
        )
        out.copy_(rows.view(out.shape))
    else:
        mean = segments.sums(blend) / segments.count
        centered = blend.sub_(mean[segments.example])
        rstd = (segments.sums(centered.square()) / segments.count).add_(eps).rsqrt_()
        centered.mul_(rstd[segments.example]).mul_(segments.affine(norm_weight))
        out.copy_(centered.add_(segments.affine(norm_bias)))
    if padding is not None:
        out.masked_fill_(padding, 0)
    return mean.flatten(), rstd.flatten()


def aggregate_backward(
    grads, hidden, weight, norm_weight, norm_bias, aggregates, gates, mean, rstd, row_mask, cu_seqlens, seq_len,
    need_hidden, need_parameters,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    num_gates, work = len(weight), norm_weight.dtype
    padding = None if row_mask is None else ~row_mask[:, None]
    segments = _segments(hidden[0], norm_weight, row_mask, cu_seqlens, seq_len, work)
    # Zeros, not empty: a gate above the last gradient is never reached below.
    grad_hidden = hidden[0].new_zeros((num_gates + 1, *hidden[0].shape) if need_hidden else 0)
    shapes = (weight.shape, weight.shape[:2], norm_weight.shape, norm_bias.shape)
    grad_weight, grad_bias, grad_norm_weight, grad_norm_bias = (
        norm_weight.new_zeros(shape if need_parameters else 0) for shape in shapes
    )

    carry = None  # gradient of aggregate i, in the statistics' dtype
    for i in reversed(range(num_gates)):
        if grads[i] is not None:
            carry = grads[i].to(work) if carry is None else carry.add_(grads[i])
        if carry is None:
            continue
        previous, layer = (aggregates[i - 1] if i else hidden[0]), hidden[i + 1]
        if padding is not None:
            carry, layer = carry.masked_fill(padding, 0), layer.masked_fill(padding, 0)
        previous, layer, gate = previous.to(work), layer.to(work), gates[i].to(work)
        grad_blend, grad_norm_weight_i, grad_norm_bias_i = _norm_backward(
            carry, torch.lerp(previous, layer, gate), norm_weight[i], norm_bias[i], mean[i], rstd[i], segments,
            need_parameters,
        )  # fmt: skip
        if need_hidden:
            grad_hidden[i + 1].copy_(grad_blend * gate)
        grad_linear = aten.sigmoid_backward((layer - previous).mul_(grad_blend), gate)
        operand = grad_linear.to(weight.dtype)
        if need_parameters:
            grad_weight[i].copy_(operand.T @ previous.to(weight.dtype))
            grad_bias[i].copy_(grad_linear.sum(dim=0))
            grad_norm_weight[i].copy_(grad_norm_weight_i)
            grad_norm_bias[i].copy_(grad_norm_bias_i)
        if i or need_hidden:
            carry = grad_blend.addcmul_(grad_blend, gate, value=-1)
            if operand.dtype == work:
                carry.addmm_(operand, weight[i])
            else:
                carry.add_(operand @ weight[i])
    if need_hidden and carry is not None:
        grad_hidden[0].copy_(carry)
        if padding is not None:
            grad_hidden[0].masked_fill_(padding, 0)
    return grad_hidden, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias


def _norm_backward(grad, blend, norm_weight, norm_bias, mean, rstd, segments, need_parameters):
    """Gradients of ``blend``, ``norm_weight`` and ``norm_bias``; the last two None where not needed."""
    if segments is None:
        shape = norm_weight.shape if norm_weight.dim() == 1 else (norm_weight.numel(),)
        groups = (-1, *shape)
        statistics = (len(mean),) + (1,) * len(shape)
        grad_blend, grad_norm_weight, grad_norm_bias = aten.native_layer_norm_backward(
            grad.view(groups), blend.view(groups), shape, mean.view(statistics), rstd.view(statistics),
            norm_weight.view(shape), norm_bias.view(shape), [True, need_parameters, need_parameters],
        )  # fmt: skip
        if not need_parameters:
            return grad_blend.view(grad.shape), None, None
        return grad_blend.view(grad.shape), grad_norm_weight.view_as(norm_weight), grad_norm_bias.view_as(norm_bias)
    normalized = (blend - mean[segments.example, None]).mul_(rstd[segments.example, None])
    grad_norm_weight = grad_norm_bias = None
    if need_parameters:
        grad_norm_weight = torch.zeros_like(norm_weight).index_add_(0, segments.position, grad * normalized)
        grad_norm_bias = torch.zeros_like(norm_bias).index_add_(0, segments.position, grad)
    scaled = grad * segments.affine(norm_weight)
    mean_scaled = segments.sums(scaled) / segments.count
    mean_product = segments.sums(scaled * normalized) / segments.count
    grad_blend = scaled.sub_(mean_scaled[segments.example]).sub_(normalized.mul_(mean_product[segments.example]))
    grad_blend.mul_(rstd[segments.example, None])
    if segments.real is not None:
        grad_blend.mul_(segments.real)
    return grad_blend, grad_norm_weight, grad_norm_bias


def hidden_loss_forward(student, targets, row_mask, weight) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if student[0].dtype == torch.float64 else torch.float32
    num_tokens, hidden_size = student[0].shape
    count = torch.tensor(num_tokens, device=student[0].device) if row_mask is None else row_mask.sum().clamp(min=1)
    factor = 2 * weight / (count.to(dtype) * hidden_size)
    sums = []
    for h, a in zip(student, targets, strict=True):
        difference = h.to(dtype) - a.to(dtype)
        if row_mask is not None:
            difference.masked_fill_(~row_mask[:, None], 0)
        sums.append(difference.square_().sum())
    return torch.stack(sums) * (factor / 2), factor


def hidden_loss_backward(
    grad, student, targets, row_mask, factor, need_student, need_targets
) -> tuple[list[Tensor], list[Tensor]]:
    grads_student, grads_targets = [], []
    for k, (h, a) in enumerate(zip(student, targets, strict=True)):
        difference = (h.to(factor.dtype) - a.to(factor.dtype)).mul_(grad[k] * factor)
        if row_mask is not None:
            difference.masked_fill_(~row_mask[:, None], 0)
        if need_targets:
            grads_targets.append(torch.neg(difference).to(a.dtype))
        if need_student:
            grads_student.append(difference.to(h.dtype))
    return grads_student, grads_targets


def distill_loss_forward(
    student_logits, teacher_logits, labels, temperature, soft_weight, hard_weight, regression
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    batch_size = student.shape[0]
    if regression:
        hard = student - labels.to(dtype).view(student.shape)
        soft = student - teacher
        loss = hard_weight * hard.square().mean() + soft_weight * soft.square().mean()
        return loss, (hard.mul_(hard_weight) + soft.mul_(soft_weight)).mul_(2 / batch_size)
    log_probs = torch.log_softmax(student, dim=-1)
    soft_student = torch.log_softmax(student / temperature, dim=-1)
    soft_teacher = torch.log_softmax(teacher / temperature, dim=-1)
    teacher_probs = soft_teacher.exp()
    labels = labels[:, None].long()
    known = (labels >= 0) & (labels < student.shape[1])  # on a GPU nobody looked: make the loss NaN there
    labels = labels.clamp(0, student.shape[1] - 1)
    hard = -log_probs.gather(1, labels).where(known, torch.nan).sum()
    soft = (teacher_probs * (soft_teacher - soft_student)).sum()
    loss = (hard_weight * hard + soft_weight * temperature**2 * soft) / batch_size
    grad = log_probs.exp_().scatter_add_(1, labels, -torch.ones_like(labels, dtype=dtype)).mul_(hard_weight)
    grad.add_(soft_student.exp_().sub_(teacher_probs), alpha=soft_weight * temperature)
    return loss, grad.div_(batch_size)

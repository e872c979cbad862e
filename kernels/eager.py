"""The "torch" back end: the mathematics of the kernels in PyTorch calls, on any device.

A block of rows goes through all gates before the next does, so that on a CPU what lies between two matrix products
stays in the cache. The gate values alone are kept for backward: given those, the rest of the chain is element-wise,
and backward runs it again for each block, by the calls that forward made and so to the same bits; or, for losses, a
block's gradients are made as soon as it has been through the chain. In half types the products for the weights'
gradients take several blocks at once. There, with
P = A_prev, dO the gradient of the blend O, and q = dO * (1 - g):

    O - P = g * (H - P)        du = dO * (H - P) * g * (1 - g) = q * (O - P)        dP = q + du W

Between the products all is float32 (float64 for float64 states); gate values have the products' dtype.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lad_fast.kernels import launch as lc
from lad_fast.kernels.blocks import Block, RealRows, blocks


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``x @ weight.T + bias``, and its sigmoid if wanted, of tensors of one dtype."""
    if linear := lc.onednn_linear(x):
        return linear(x, weight, bias, activation, [], "")
    product = F.linear(x, weight, bias)
    return product.sigmoid_() if activation == "sigmoid" else product


def _products(state: Tensor, weight: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each gate's weight and bias for products with a state's rows."""
    weights = [lc.laid_out_for(len(state), gate_weight) for gate_weight in weight]
    return list(zip(weights, bias.to(weight.dtype), strict=True))


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two tensors of one dtype."""
    if a.dtype == torch.float32:  # half types: ``@`` goes to oneDNN too, and reads both as they lie
        return _linear(a, b.T)
    return a @ b


def _step(block: Block, previous: Tensor, layer: Tensor, gate: Tensor, norm_weight, norm_bias, eps: float):
    """What follows a gate's product: its values and the blend, as the chain takes them, aggregate, the norm's
    statistics."""
    dtype = previous.dtype
    gate = gate.to(dtype)
    blend = block.zero_padding_(torch.lerp(previous, layer[block.rows].to(dtype), gate))
    state, statistics = block.norm.forward(blend, norm_weight, norm_bias, eps)
    return gate, blend, block.zero_padding_(state), statistics


def _difference(student: Tensor, block: Block, state: Tensor, out: Tensor | None = None) -> Tensor:
    """A block's rows of a student's state less the aggregate's; zero at padding."""
    difference = torch.sub(student[block.rows].to(state.dtype), state, out=out)
    return block.zero_padding_(difference)


def _sum_of_squares(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dim=1).square_().sum()  # no tensor of the squares


def _affine(norm_weight: Tensor) -> Tensor:
    """(n, S, D); the "token" norm's (n, D) as (n, 1, D)."""
    return norm_weight if norm_weight.dim() == 3 else norm_weight[:, None]


class _Gathered:
    """Of each gate, a tensor's rows of all blocks of a group, in the products' dtype."""

    def __init__(self, group: list[Block], dtype: torch.dtype, num_gates: int) -> None:
        self.start, self.stop, self.dtype = group[0].rows.start, group[-1].rows.stop, dtype
        self.values: list[Tensor | None] = [None] * num_gates

    def add(self, i: int, block: Block, rows: Tensor) -> Tensor:
        """Takes a block's rows (R, D); returns them in the products' dtype."""
        if len(rows) == self.stop - self.start:
            self.values[i] = rows.to(self.dtype)
            return self.values[i]
        if self.values[i] is None:
            self.values[i] = rows.new_empty((self.stop - self.start, rows.shape[1]), dtype=self.dtype)
        own = self.values[i][block.rows.start - self.start : block.rows.stop - self.start]
        return own.copy_(rows)


def _groups(cut: Iterable[Block], most: int) -> Iterator[list[Block]]:
    """Neighbouring blocks of ``most`` rows together, or one that has more."""
    group: list[Block] = []
    for block in cut:
        if group and block.rows.stop - group[0].rows.start > most:
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def _forward(
    hidden, weight, bias, norm_weight, norm_bias, row_mask, cu_seqlens, seq_len, eps, keep,
    visit: Callable[[int, Block, Tensor], None],
) -> list[Tensor]:  # fmt: skip
    """Run n gates; returns their values, n tensors (T, D), or none where not kept. ``visit`` gets each position of
    the chain (0: its start), a block and the aggregate's rows there."""
    per_token = norm_weight.dim() == 2
    norm_weight, norm_bias = _affine(norm_weight), _affine(norm_bias)
    num_gates = len(weight)
    parameters = list(zip(_products(hidden[0], weight, bias), norm_weight, norm_bias, strict=True))  # views once
    # One tensor a gate: a single one is so large that the allocator would return it to the system after each step.
    gates = [weight.new_empty(hidden[0].shape) for _ in range(num_gates if keep == "gates" else 0)]
    for block in blocks(hidden[0], norm_weight[0], row_mask, cu_seqlens, seq_len, per_token):
        state = hidden[0][block.rows].to(norm_weight.dtype)
        visit(0, block, state)
        for i, (product, *affine) in enumerate(parameters):
            gate = _linear(state.to(weight.dtype), *product, "sigmoid")
            if gates and len(gate) == len(gates[i]):
                gates[i] = gate
            elif gates:
                gates[i][block.rows] = gate
            _, _, state, _ = _step(block, state, hidden[i + 1], gate, *affine, eps)
            visit(i + 1, block, state)
    return gates


def _backward(
    hidden, weight, bias, norm_weight, norm_bias, gates, row_mask, cu_seqlens, seq_len, eps, top: int, need_hidden,
    need_parameters, add_gradient: Callable[[int, Block, Tensor, Tensor | None], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the hidden states, weight, bias, norm_weight and norm_bias; empty where not needed.

    ``add_gradient`` gets each position from ``top`` down, a block, the aggregate's rows there and what flows back into
    them from above (None at the top, or where nothing is needed); it returns the sum with what flows in at that
    position, which may be the tensor it got.
    """
    num_gates, per_token = len(weight), norm_weight.dim() == 2
    # The first block writes and the others add. Gates above ``top`` are never reached, nor are an affine's last rows.
    grad_hidden = hidden[0].new_empty((num_gates + 1, *hidden[0].shape) if need_hidden else 0)
    grad_weight, grad_bias = (
        norm_weight.new_empty(shape if need_parameters else 0) for shape in (weight.shape, weight.shape[:2])
    )
    shape = norm_weight.shape if need_parameters else 0
    grad_norm_weight, grad_norm_bias = norm_weight.new_zeros(shape), norm_weight.new_zeros(shape)
    for grad in (grad_hidden[1:], grad_weight, grad_bias):
        grad[top:].zero_()
    products = _products(hidden[0], weight, bias) if not gates else None
    parameters = list(zip(weight, _affine(norm_weight), _affine(norm_bias), strict=True))  # views once
    affine_grads = [(None, None)] * num_gates
    if need_parameters:
        affine_grads = list(zip(_affine(grad_norm_weight), _affine(grad_norm_bias), strict=True))
    cut = blocks(hidden[0], parameters[0][1], row_mask, cu_seqlens, seq_len, per_token)
    for group in _groups(cut, lc.product_rows(weight)):
        gathered = _Gathered(group, weight.dtype, top), _Gathered(group, weight.dtype, top)
        for block in group:
            states, steps = [hidden[0][block.rows].to(norm_weight.dtype)], []
            for i in range(top):
                if gates:
                    gate = gates[i][block.rows]
                else:
                    operand = gathered[1].add(i, block, states[i]) if need_parameters else states[i].to(weight.dtype)
                    gate = _linear(operand, *products[i], "sigmoid")
                *step, state, statistics = _step(block, states[i], hidden[i + 1], gate, *parameters[i][1:], eps)
                states.append(state)
                steps.append((*step, statistics))

            carry = add_gradient(top, block, states.pop(), None)
            for i in reversed(range(top)):
                state, (gate, blend, statistics) = states.pop(), steps.pop()
                gate_weight, *affine = parameters[i]
                if need_hidden or need_parameters:
                    grad_blend = block.norm.backward(carry, blend, statistics, *affine, *affine_grads[i])
                    if need_hidden:
                        grad_hidden[i + 1, block.rows] = grad_blend * gate
                    past_gate = grad_blend.addcmul_(grad_blend, gate, value=-1)
                    grad_linear = blend.sub_(state).mul_(past_gate)
                    operand = gathered[0].add(i, block, grad_linear)
                    if need_parameters:
                        add = torch.Tensor.add_ if block.rows.start else torch.Tensor.copy_
                        add(grad_bias[i], grad_linear.sum(dim=0))
                        if gates:
                            gathered[1].add(i, block, state)
                    carry = None
                    if i or need_hidden:
                        carry = past_gate.add_(_matmul(operand, gate_weight))
                carry = add_gradient(i, block, state, carry)
            if need_hidden:
                grad_hidden[0, block.rows] = carry
        if need_parameters:
            add = torch.Tensor.add_ if group[0].rows.start else torch.Tensor.copy_
            for i, (grad, state) in enumerate(zip(*(each.values for each in gathered), strict=True)):
                add(grad_weight[i], lc.weight_gradient(grad, state))
    return grad_hidden, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias


def aggregate_forward(
    hidden, weight, bias, norm_weight, norm_bias, row_mask, cu_seqlens, seq_len, eps, keep
) -> tuple[Tensor, list[Tensor]]:
    """Aggregates (n, T, D) and gates; see :func:`lad_fast.kernels.ops.aggregate_forward`."""
    aggregates = hidden[0].new_empty((len(weight), *hidden[0].shape))

    def store(position: int, block: Block, state: Tensor) -> None:
        if position:
            aggregates[position - 1, block.rows] = state

    gates = _forward(hidden, weight, bias, norm_weight, norm_bias, row_mask, cu_seqlens, seq_len, eps, keep, store)
    return aggregates, gates


def aggregate_backward(
    grads, hidden, weight, bias, norm_weight, norm_bias, gates, row_mask, cu_seqlens, seq_len, eps, need_hidden,
    need_parameters,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`lad_fast.kernels.ops.aggregate_backward`."""

    def add_gradient(position: int, block: Block, state: Tensor, carry: Tensor | None) -> Tensor:
        grad = grads[position - 1] if position else None
        if grad is None:
            return carry
        grad = block.zero_padding_(grad[block.rows].to(state.dtype, copy=True))
        return grad if carry is None else carry.add_(grad)

    top = max(i + 1 for i, grad in enumerate(grads) if grad is not None)
    return _backward(
        hidden, weight, bias, norm_weight, norm_bias, gates, row_mask, cu_seqlens, seq_len, eps, top, need_hidden,
        need_parameters, add_gradient,
    )  # fmt: skip


def chain_loss_forward(
    hidden, student, targets, weight, bias, norm_weight, norm_bias, row_mask, cu_seqlens, seq_len, eps, loss_weight,
    keep,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """Losses (K,), the gradient's factor, differences, gates and gradients; see
    :func:`lad_fast.kernels.ops.chain_loss_forward`."""
    factor = _loss_factor(student[0], row_mask, loss_weight)
    sums = [[] for _ in student]
    if keep == "gradients":
        grad_student, _, *grad_parameters = _loss_gradients(
            factor.expand(len(student)), sums, hidden, student, targets, weight, bias, norm_weight, norm_bias, [],
            row_mask, cu_seqlens, seq_len, eps, True, False, True,
        )  # fmt: skip
        return _losses(sums, factor), factor, [], [], [*grad_student, *grad_parameters]
    differences = [torch.empty_like(h) for h in student] if keep == "differences" else []

    def compare(position: int, block: Block, state: Tensor) -> None:
        for k, target in enumerate(targets):
            if target == position:
                difference = _difference(student[k], block, state)
                sums[k].append(_sum_of_squares(difference))
                if differences:
                    differences[k][block.rows] = difference

    gates = _forward(hidden, weight, bias, norm_weight, norm_bias, row_mask, cu_seqlens, seq_len, eps, keep, compare)
    return _losses(sums, factor), factor, differences, gates, []


def chain_loss_backward(
    grad, factor, hidden, student, targets, weight, bias, norm_weight, norm_bias, gates, row_mask, cu_seqlens, seq_len,
    eps, need_student, need_hidden, need_parameters,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`lad_fast.kernels.ops.chain_loss_backward`."""
    return _loss_gradients(
        grad * factor, None, hidden, student, targets, weight, bias, norm_weight, norm_bias, gates,
        row_mask, cu_seqlens, seq_len, eps, need_student, need_hidden, need_parameters,
    )  # fmt: skip


def _loss_gradients(
    scale, sums: list[list[Tensor]] | None, hidden, student, targets, weight, bias, norm_weight, norm_bias, gates,
    row_mask, cu_seqlens, seq_len, eps, need_student, need_hidden, need_parameters,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the losses, each times ``scale`` (K,); ``sums`` gets each block's sums of squares, K lists."""
    grad_student = [torch.empty_like(h) for h in student] if need_student else []
    scale = scale.to(norm_weight.dtype)

    def add_gradient(position: int, block: Block, state: Tensor, carry: Tensor | None) -> Tensor | None:
        for k, target in enumerate(targets):
            if target == position:
                grad = grad_student[k][block.rows] if need_student else None
                in_place = need_student and grad.dtype == state.dtype
                slope = _difference(student[k], block, state, out=grad if in_place else None)
                if sums is not None:
                    sums[k].append(_sum_of_squares(slope))
                slope.mul_(scale[k])
                if need_student and not in_place:
                    grad.copy_(slope)
                carry = slope.neg() if carry is None else carry.sub_(slope)
        return carry

    grad_hidden, *grad_parameters = _backward(
        hidden, weight, bias, norm_weight, norm_bias, gates, row_mask, cu_seqlens, seq_len, eps, max(targets),
        need_hidden, need_parameters, add_gradient,
    )  # fmt: skip
    return grad_student, grad_hidden, *grad_parameters


def _losses(sums: list[list[Tensor]], factor: Tensor) -> Tensor:
    """(K,) from each block's sums of squares."""
    return torch.stack([torch.stack(parts).sum() for parts in sums]).to(factor.dtype) * (factor / 2)


def _loss_factor(student: Tensor, row_mask: Tensor | None, weight: float) -> Tensor:
    """``2 * weight / (real tokens * D)``, without a host sync."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    num_tokens, hidden_size = student.shape
    count = torch.full((), num_tokens, device=student.device) if row_mask is None else row_mask.sum().clamp(min=1)
    return 2 * weight / (count.to(dtype) * hidden_size)


def _real_rows(row_mask: Tensor | None, factor: Tensor) -> RealRows | None:
    return None if row_mask is None else RealRows(row_mask, factor.dtype)


def hidden_loss_forward(student, targets, row_mask, weight) -> tuple[Tensor, Tensor]:
    factor = _loss_factor(student[0], row_mask, weight)
    real, sums = _real_rows(row_mask, factor), []
    for h, a in zip(student, targets, strict=True):
        difference = h.to(factor.dtype) - a.to(factor.dtype)
        if real is not None:
            real.zero_others_(difference)
        sums.append(difference.square_().sum())
    return torch.stack(sums) * (factor / 2), factor


def hidden_loss_backward(
    grad, student, targets, row_mask, factor, need_student, need_targets
) -> tuple[list[Tensor], list[Tensor]]:
    real, grads_student, grads_targets = _real_rows(row_mask, factor), [], []
    for k, (h, a) in enumerate(zip(student, targets, strict=True)):
        difference = (h.to(factor.dtype) - a.to(factor.dtype)).mul_(grad[k] * factor)
        if real is not None:
            real.zero_others_(difference)
        if need_targets:
            grads_targets.append(torch.neg(difference).to(a.dtype))
        if need_student:
            grads_student.append(difference.to(h.dtype))
    return grads_student, grads_targets


def distill_loss_forward(
    student_logits, teacher_logits, labels, temperature, soft_weight, hard_weight, regression, hidden_losses
) -> tuple[Tensor, Tensor, list[Tensor]]:
    weights = temperature, soft_weight, hard_weight
    if regression:
        loss, slope = _regression_loss(student_logits, teacher_logits, labels, *weights[1:])
    else:
        loss, slope = _class_loss(student_logits, teacher_logits, labels, *weights)
    if hidden_losses is None:
        return loss, slope, []
    hidden_loss = hidden_losses.sum()
    return loss, slope, [hidden_loss, hidden_loss + loss]


def _regression_loss(student_logits, teacher_logits, labels, soft_weight, hard_weight) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    student = student_logits.to(dtype)
    hard = student - labels.to(dtype).view(student.shape)
    soft = student - teacher_logits.to(dtype)
    loss = hard_weight * hard.square().mean() + soft_weight * soft.square().mean()
    return loss, (hard.mul_(hard_weight) + soft.mul_(soft_weight)).mul_(2 / len(student))


def _class_loss(student_logits, teacher_logits, labels, temperature, soft_weight, hard_weight) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    batch_size = student.shape[0]
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

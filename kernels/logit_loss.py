"""Logit loss in Triton: soft loss, hard loss and their gradient of one example a program, and all sums, in one launch.

    loss_b = hard / B * (lse(z_s) - z_s[y])  +  soft * T^2 / B * sum_c p_t (log p_t - log p_s)
    dloss_b / dz_s = hard / B * (softmax(z_s) - onehot(y))  +  soft * T / B * (p_s - p_t)

with p = softmax(z / T). Two walks over the classes, CLASSES at a time: log-sum-exps, then loss and gradient. It
reads 2 x 2 and writes 1 times C numbers an example: latency only, at any number of classes that a task has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lad_fast.kernels import launch as lc
from lad_fast.kernels.tiles import arrive


@triton.jit
def _add_to_log_sum(maximum, total, b_logits, m_classes):
    """Online log-sum-exp: running maximum and sum of exponentials."""
    b_logits = tl.where(m_classes, b_logits, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(b_logits, axis=0))
    total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(b_logits - new_maximum), axis=0)
    return new_maximum, total


@triton.jit
def _write_sums(
    parts_ptr, hidden_losses_ptr, loss_ptr, hidden_loss_ptr, total_ptr, B, K, counter_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    """By the last program, once all examples' losses are there: their sum, always in one order, and the sum of all."""
    if arrive(counter_ptr) == tl.num_programs(0) - 1:
        tl.store(counter_ptr, 0)  # as it was found, for the next launch
        o_block = tl.arange(0, BLOCK)
        b_loss = tl.zeros((BLOCK,), tl.float32)
        for i_row in range(0, B, BLOCK):
            b_loss += tl.load(parts_ptr + i_row + o_block, mask=i_row + o_block < B, other=0.0)
        loss = tl.sum(b_loss)
        tl.store(loss_ptr, loss)
        if hidden_losses_ptr is not None:
            b_hidden = tl.zeros((BLOCK,), tl.float32)
            for k in range(0, K, BLOCK):
                b_hidden += tl.load(hidden_losses_ptr + k + o_block, mask=k + o_block < K, other=0.0)
            hidden_loss = tl.sum(b_hidden)
            tl.store(hidden_loss_ptr, hidden_loss)
            tl.store(total_ptr, hidden_loss + loss)


@triton.jit(do_not_specialize=("B", "K"))
def _logit_loss_kernel(
    student_ptr,  # (B, C)
    teacher_ptr,  # (B, C)
    labels_ptr,  # (B,) integers
    slope_ptr,  # (B, C) float32 out
    parts_ptr,  # (B,) float32 scratch: examples' losses
    hidden_losses_ptr,  # (K,) float32, or None
    loss_ptr,  # () float32 out: of the logits
    hidden_loss_ptr,  # () float32 out: the hidden losses' sum, where there are any
    total_ptr,  # () float32 out: of all
    counter_ptr,  # (1,) int32, zero before and after
    B,
    K,
    C,
    temperature,
    soft_scale,  # soft_weight / B
    hard_scale,  # hard_weight / B
    CLASSES: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + i_row)
    inverse = 1.0 / temperature
    hard_max, soft_max, teacher_max = -1e38, -1e38, -1e38  # finite: the first step subtracts them
    hard_sum, soft_sum, teacher_sum = 0.0, 0.0, 0.0
    for i_class in range(0, C, CLASSES):
        o_classes = i_class + tl.arange(0, CLASSES)
        m_classes = o_classes < C
        b_student = tl.load(student_ptr + i_row * C + o_classes, mask=m_classes, other=0.0).to(tl.float32)
        b_teacher = tl.load(teacher_ptr + i_row * C + o_classes, mask=m_classes, other=0.0).to(tl.float32)
        hard_max, hard_sum = _add_to_log_sum(hard_max, hard_sum, b_student, m_classes)
        soft_max, soft_sum = _add_to_log_sum(soft_max, soft_sum, b_student * inverse, m_classes)
        teacher_max, teacher_sum = _add_to_log_sum(teacher_max, teacher_sum, b_teacher * inverse, m_classes)
    hard_lse, soft_lse = hard_max + tl.log(hard_sum), soft_max + tl.log(soft_sum)
    teacher_lse = teacher_max + tl.log(teacher_sum)

    loss = 0.0
    for i_class in range(0, C, CLASSES):
        o_classes = i_class + tl.arange(0, CLASSES)
        m_classes = o_classes < C
        b_student = tl.load(student_ptr + i_row * C + o_classes, mask=m_classes, other=0.0).to(tl.float32)
        b_teacher = tl.load(teacher_ptr + i_row * C + o_classes, mask=m_classes, other=0.0).to(tl.float32)
        b_log_teacher = b_teacher * inverse - teacher_lse
        b_log_student = b_student * inverse - soft_lse
        b_teacher_prob = tl.exp(b_log_teacher)
        b_is_label = o_classes == label
        b_soft = b_teacher_prob * (b_log_teacher - b_log_student) * (soft_scale * temperature * temperature)
        b_hard = tl.where(b_is_label, (hard_lse - b_student) * hard_scale, 0.0)
        loss += tl.sum(tl.where(m_classes, b_soft + b_hard, 0.0), axis=0)
        b_grad = (tl.exp(b_student - hard_lse) - b_is_label.to(tl.float32)) * hard_scale
        b_grad += (tl.exp(b_log_student) - b_teacher_prob) * (soft_scale * temperature)
        tl.store(slope_ptr + i_row * C + o_classes, b_grad, mask=m_classes)
    # Nobody read the labels on the host: one outside the classes must not pass in silence.
    tl.store(parts_ptr + i_row, tl.where((label >= 0) & (label < C), loss, float("nan")))
    _write_sums(
        parts_ptr, hidden_losses_ptr, loss_ptr, hidden_loss_ptr, total_ptr, B, K, counter_ptr, CLASSES
    )  # fmt: skip


@triton.jit(do_not_specialize=("B", "K"))
def _regression_loss_kernel(
    student_ptr,  # (B,)
    teacher_ptr,  # (B,)
    labels_ptr,  # (B,) floating
    slope_ptr,  # (B,) float32 out
    parts_ptr,  # (B,) float32 scratch: examples' losses
    hidden_losses_ptr,  # (K,) float32, or None
    loss_ptr,  # () float32 out: of the logits
    hidden_loss_ptr,  # () float32 out: the hidden losses' sum, where there are any
    total_ptr,  # () float32 out: of all
    counter_ptr,  # (1,) int32, zero before and after
    B,
    K,
    soft_scale,  # soft_weight / B
    hard_scale,  # hard_weight / B
    ROWS: tl.constexpr,
):
    o_rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_rows = o_rows < B
    b_student = tl.load(student_ptr + o_rows, mask=m_rows, other=0.0).to(tl.float32)
    b_soft = b_student - tl.load(teacher_ptr + o_rows, mask=m_rows, other=0.0).to(tl.float32)
    b_hard = b_student - tl.load(labels_ptr + o_rows, mask=m_rows, other=0.0).to(tl.float32)
    tl.store(parts_ptr + o_rows, hard_scale * b_hard * b_hard + soft_scale * b_soft * b_soft, mask=m_rows)
    tl.store(slope_ptr + o_rows, 2.0 * (hard_scale * b_hard + soft_scale * b_soft), mask=m_rows)
    _write_sums(parts_ptr, hidden_losses_ptr, loss_ptr, hidden_loss_ptr, total_ptr, B, K, counter_ptr, ROWS)


def distill_loss_forward(
    student_logits, teacher_logits, labels, temperature, soft_weight, hard_weight, regression, hidden_losses
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One launch; see :func:`lad_fast.kernels.ops.distill_loss_forward`."""
    batch_size, device = student_logits.shape[0], student_logits.device
    slope = torch.empty_like(student_logits, dtype=torch.float32)
    loss, *sums = (slope.new_empty(()) for _ in range(1 if hidden_losses is None else 3))
    arguments = {
        "student_ptr": student_logits, "teacher_ptr": teacher_logits, "labels_ptr": labels, "slope_ptr": slope,
        "parts_ptr": slope.new_empty(batch_size), "hidden_losses_ptr": hidden_losses, "loss_ptr": loss,
        "hidden_loss_ptr": sums[0] if sums else None, "total_ptr": sums[1] if sums else None,
        "counter_ptr": lc.counters(device, 1), "B": batch_size, "K": len(hidden_losses) if sums else 0,
        "soft_scale": soft_weight / batch_size, "hard_scale": hard_weight / batch_size,
    }  # fmt: skip
    if regression:
        grid = (triton.cdiv(batch_size, lc.CLASSES_PER_STEP),)
        lc.launch(_regression_loss_kernel, grid, **arguments, ROWS=lc.CLASSES_PER_STEP)
    else:
        lc.launch(
            _logit_loss_kernel, (batch_size,), **arguments, C=student_logits.shape[1], temperature=temperature,
            CLASSES=lc.CLASSES_PER_STEP, num_warps=1,
        )  # fmt: skip
    return loss, slope, sums

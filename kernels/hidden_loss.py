"""Hidden loss in Triton: ``weight * mean((h - a)^2)`` of one student layer a launch, and both gradients.

Forward reads h and a once and writes one partial sum a program; backward reads them once more and writes
``grad * factor * (h - a)`` and its negative: 2 and 4 states of T x D through the cache, all bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lad_fast.kernels import launch as lc


@triton.jit
def _difference(student_ptr, target_ptr, o_rows, o_cols, m_rows, D):
    """(ROWS, COLUMNS) float32 h - a, zero where not ``m_rows``."""
    o_tile = o_rows[:, None] * D + o_cols[None, :]
    m_tile = m_rows[:, None] & (o_cols < D)[None, :]
    b_student = tl.load(student_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    return b_student - tl.load(target_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def _real_rows(mask_ptr, o_rows, T, MASKED: tl.constexpr):
    m_rows = o_rows < T
    if MASKED:
        m_rows = m_rows & (tl.load(mask_ptr + o_rows, mask=m_rows, other=0) != 0)
    return m_rows


@triton.jit
def _hidden_loss_fwd_kernel(
    student_ptr,  # (T, D)
    target_ptr,  # (T, D)
    mask_ptr,  # (T,) bool, where MASKED
    partial_ptr,  # (programs,) float32 out, sums of squares
    T,
    D,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    m_rows = _real_rows(mask_ptr, o_rows, T, MASKED)
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i_col in range(0, D, COLUMNS):
        b_difference = _difference(student_ptr, target_ptr, o_rows, i_col + tl.arange(0, COLUMNS), m_rows, D)
        b_sum += b_difference * b_difference
    tl.store(partial_ptr + tl.program_id(0), tl.sum(b_sum))


@triton.jit
def _hidden_loss_bwd_kernel(
    grad_ptr,  # () float32, dL / dloss_k
    factor_ptr,  # () float32, 2 * weight / (real tokens * D)
    student_ptr,  # (T, D)
    target_ptr,  # (T, D)
    mask_ptr,  # (T,) bool, where MASKED
    grad_student_ptr,  # (T, D) out, where NEED_STUDENT
    grad_target_ptr,  # (T, D) out, where NEED_TARGET
    T,
    D,
    MASKED: tl.constexpr,
    NEED_STUDENT: tl.constexpr,
    NEED_TARGET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    scale = tl.load(grad_ptr) * tl.load(factor_ptr)
    o_rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    m_rows = _real_rows(mask_ptr, o_rows, T, MASKED)
    for i_col in range(0, D, COLUMNS):
        o_cols = i_col + tl.arange(0, COLUMNS)
        b_grad = scale * _difference(student_ptr, target_ptr, o_rows, o_cols, m_rows, D)
        o_tile = o_rows[:, None] * D + o_cols[None, :]
        m_tile = (o_rows < T)[:, None] & (o_cols < D)[None, :]  # padding gets its zeros
        if NEED_STUDENT:
            tl.store(grad_student_ptr + o_tile, b_grad.to(grad_student_ptr.dtype.element_ty), mask=m_tile)
        if NEED_TARGET:
            tl.store(grad_target_ptr + o_tile, (-b_grad).to(grad_target_ptr.dtype.element_ty), mask=m_tile)


def _settings(row_mask: Tensor | None) -> dict:
    row = lc.HIDDEN_LOSS
    return {"MASKED": row_mask is not None, "ROWS": row.rows, "COLUMNS": row.columns, "num_warps": row.num_warps}


def hidden_loss_forward(student, targets, row_mask, weight) -> tuple[Tensor, Tensor]:
    """Launch K forwards; see :func:`lad_fast.kernels.ops.hidden_loss_forward`."""
    num_tokens, hidden_size = student[0].shape
    programs = triton.cdiv(num_tokens, lc.HIDDEN_LOSS.rows)
    partial = torch.empty(len(student), programs, dtype=torch.float32, device=student[0].device)
    for k, (h, a) in enumerate(zip(student, targets, strict=True)):
        lc.launch(
            _hidden_loss_fwd_kernel, (programs,),
            student_ptr=h, target_ptr=a, mask_ptr=row_mask, partial_ptr=partial[k], T=num_tokens, D=hidden_size,
            **_settings(row_mask),
        )  # fmt: skip
    if row_mask is None:
        factor = partial.new_full((), 2 * weight / (num_tokens * hidden_size))
    else:
        factor = 2 * weight / (row_mask.sum().clamp(min=1).float() * hidden_size)
    return partial.sum(dim=1) * (factor / 2), factor


def hidden_loss_backward(
    grad, student, targets, row_mask, factor, need_student, need_targets
) -> tuple[list[Tensor], list[Tensor]]:
    """Launch K backwards; see :func:`lad_fast.kernels.ops.hidden_loss_backward`."""
    num_tokens, hidden_size = student[0].shape
    grad_student = [torch.empty_like(h) for h in student] if need_student else []
    grad_targets = [torch.empty_like(a) for a in targets] if need_targets else []
    for k, (h, a) in enumerate(zip(student, targets, strict=True)):
        lc.launch(
            _hidden_loss_bwd_kernel, (triton.cdiv(num_tokens, lc.HIDDEN_LOSS.rows),),
            grad_ptr=grad[k], factor_ptr=factor, student_ptr=h, target_ptr=a, mask_ptr=row_mask,
            grad_student_ptr=grad_student[k] if need_student else None,
            grad_target_ptr=grad_targets[k] if need_targets else None, T=num_tokens, D=hidden_size,
            NEED_STUDENT=need_student, NEED_TARGET=need_targets, **_settings(row_mask),
        )  # fmt: skip
    return grad_student, grad_targets

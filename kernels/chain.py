"""The gate chain in Triton: one matrix product a gate, everything else around it in the same pass or one more.

    g = sigmoid(A_prev W^T + b)      O = g * H + (1 - g) * A_prev      A = (O - mean) * rstd * gamma + beta

Statistics are over D ("token" norm) or over an example's real rows times D ("sequence" norm, published). The
product's epilogue leaves count, mean and centred square sum of each of a tile's examples; merging those is a two-pass
variance without another pass over O, and without a difference of large sums. A row tile may hold several examples.

Backward, from dA = dL/dA, with n elements a group and sums over the group:

    xhat = (O - mean) * rstd         dxhat = dA * gamma          sum(dxhat * xhat) = sum(dA * (A - beta))
    dO = rstd * (dxhat - sum(dxhat) / n - xhat * sum(dxhat * xhat) / n)
    du = dO * (H - A_prev) * g * (1 - g)     dH = dO * g     dA_prev = dO * (1 - g) + du W
    dW = du^T A_prev     db = sum(du)     dgamma = sum(dA * xhat)     dbeta = sum(dA)

The hidden loss of a student's state h against an aggregate A is taken where A is at hand: forward adds up (h - A)^2,
backward writes h's gradient and adds A's to dA. There is one kernel a direction, launched for one step of a gate at
a time or, where its programs can wait for one another, once for the whole chain (:mod:`lad_fast.kernels.launch`
chooses). docs/kernels.md has what each form reads, writes and costs. A launch never depends on the values: no host
sync, safe under CUDA graphs.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lad_fast.kernels import launch as lc
from lad_fast.kernels.tiles import (
    arrive,
    clear,
    example_bounds,
    examples_between,
    gate_of,
    halves,
    inside,
    matmul,
    pick,
    piece_block,
    swizzle,
    wait,
)


@triton.jit
def _difference(student_ptr, b_state, o_tile, m_tile, m_real):
    """(BLOCK_M, BLOCK_N) float32 h - A, zero on padding and outside."""
    b_student = tl.load(student_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    return tl.where(m_real, b_student - b_state, 0.0)  # selected: padding may hold anything


@triton.jit
def _compare(
    students, differences, partial_ptr, i_part, parts, i, position, b_state, o_tile, m_tile, m_real,
    KEEP_DIFFERENCE: tl.constexpr,
):  # fmt: skip
    """A tile's part of the hidden loss at one position; ``i`` counts positions from the launch's first."""
    b_difference = _difference(pick(students, i), b_state, o_tile, m_tile, m_real)
    if KEEP_DIFFERENCE:
        p_difference = pick(differences, i) + o_tile
        tl.store(p_difference, b_difference.to(p_difference.dtype.element_ty), mask=m_tile)
    tl.store(partial_ptr + position * parts + i_part, tl.sum(b_difference * b_difference))


@triton.jit
def _write_losses(
    partial_ptr, losses_ptr, factor_ptr, mask_ptr, slots, loss_weight, T, D, parts, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles' parts to ``loss_weight * mean((h_k - A_k)^2)``, and the gradient's ``2 * loss_weight / elements``."""
    o_block = tl.arange(0, BLOCK)
    count = tl.cast(T, tl.float32)
    if MASKED:
        count = 0.0
        for i_row in range(0, T, BLOCK):
            b_mask = tl.load(mask_ptr + i_row + o_block, mask=i_row + o_block < T, other=0)
            count += tl.sum((b_mask != 0).to(tl.float32))
    factor = 2.0 * loss_weight / (tl.maximum(count, 1.0) * D)
    tl.store(factor_ptr, factor)
    for k in tl.static_range(len(slots)):
        total = 0.0
        for i_part in range(0, parts, BLOCK):
            m_block = i_part + o_block < parts
            total += tl.sum(tl.load(partial_ptr + slots[k] * parts + i_part + o_block, mask=m_block, other=0.0))
        tl.store(losses_ptr + k, total * (factor * 0.5))


@triton.jit
def _store_statistics(
    b_blend, m_real, pieces_ptr, cu_seqlens_ptr, i_m, i_strip, o_rows, o_cols, e_first, e_last, T, S, D, STRIPS,
    PIECES_SIZE, PER_TOKEN: tl.constexpr, PACKED: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Mean and centred square sum of each row ("token") or of each example's rows ("sequence") in a tile of O."""
    width = tl.maximum(tl.minimum(STRIP, D - i_strip * STRIP), 0).to(tl.float32)  # 0: a strip past the last column
    m_cols = (o_cols < D)[None, :]
    b_mean = tl.sum(tl.where(m_cols, b_blend, 0.0), axis=1) / tl.maximum(width, 1.0)
    b_centered = tl.where(m_cols, b_blend - b_mean[:, None], 0.0)
    b_m2 = tl.sum(b_centered * b_centered, axis=1)
    if PER_TOKEN:
        o_piece = o_rows * STRIPS + i_strip
        tl.store(pieces_ptr + o_piece, b_mean, mask=o_rows < T)
        tl.store(pieces_ptr + PIECES_SIZE + o_piece, b_m2, mask=o_rows < T)
    else:
        for i_example in range(e_first, e_last + 1):
            start, length = example_bounds(cu_seqlens_ptr, i_example, T, S, PACKED)
            m_in = m_real & (o_rows >= start) & (o_rows < start + length)
            rows = tl.sum(m_in.to(tl.float32))
            mean = tl.sum(tl.where(m_in, b_mean, 0.0)) / tl.maximum(rows, 1.0)
            b_shift = b_mean - mean
            p_piece = pieces_ptr + (i_m + i_example) * STRIPS + i_strip
            tl.store(p_piece, mean)
            tl.store(p_piece + PIECES_SIZE, tl.sum(tl.where(m_in, b_m2 + width * b_shift * b_shift, 0.0)))
            tl.store(p_piece + 2 * PIECES_SIZE, rows)


@triton.jit
def _merge_statistics(p_mean, m_piece, b_weight, PIECES_SIZE, axis: tl.constexpr):
    """Mean and variance of all that pieces of ``b_weight`` elements hold."""
    b_mean = tl.load(p_mean, mask=m_piece, other=0.0)
    b_m2 = tl.load(p_mean + PIECES_SIZE, mask=m_piece, other=0.0)
    count = tl.maximum(tl.sum(b_weight, axis=axis), 1.0)
    mean = tl.sum(b_weight * b_mean, axis=axis) / count
    b_shift = b_mean - (mean[:, None] if axis == 1 else mean)
    return mean, tl.sum(b_m2 + b_weight * b_shift * b_shift, axis=axis) / count


@triton.jit
def _row_statistics(
    pieces_ptr, cu_seqlens_ptr, mean_ptr, rstd_ptr, i_m, i_n, o_rows, e_first, e_last, T, S, D, STRIPS, PIECES_SIZE,
    eps, PER_TOKEN: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr, STRIP: tl.constexpr,
    PIECES: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Mean, rstd and position of each of a tile's rows, once the statistics of its examples are complete."""
    o_strips = tl.arange(0, BLOCK_S)
    b_width = tl.maximum(tl.minimum(STRIP, D - o_strips * STRIP), 0).to(tl.float32)[None, :]
    o_position = tl.zeros((BLOCK_M,), tl.int32)
    if PER_TOKEN:
        m_rows = o_rows < T
        o_piece = o_rows[:, None] * STRIPS + o_strips[None, :]
        m_piece = m_rows[:, None] & (o_strips < STRIPS)[None, :]
        b_all = tl.where(m_piece, b_width, 0.0)
        b_mean, b_variance = _merge_statistics(pieces_ptr + o_piece, m_piece, b_all, PIECES_SIZE, 1)
        b_rstd = tl.rsqrt(b_variance + eps)
        if i_n == 0:
            tl.store(mean_ptr + o_rows, b_mean, mask=m_rows)
            tl.store(rstd_ptr + o_rows, b_rstd, mask=m_rows)
    else:
        # Nobody reads packed bounds on the host: what no example holds must not pass in silence,
        b_mean, b_rstd = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("nan"), tl.float32)
        for i_example in range(e_first, e_last + 1):
            start, length = example_bounds(cu_seqlens_ptr, i_example, T, S, PACKED)
            first, rows = inside(start, length, T, PACKED)
            o_piece, m_piece = piece_block(first, rows, i_example, STRIPS, BLOCK_M, PIECES, BLOCK_S)
            b_rows = tl.load(pieces_ptr + 2 * PIECES_SIZE + o_piece, mask=m_piece, other=0.0)
            mean, variance = _merge_statistics(pieces_ptr + o_piece, m_piece, b_rows * b_width, PIECES_SIZE, None)
            rstd = tl.rsqrt(variance + eps)
            if PACKED:  # nor an example that is too long or begins or ends outside
                rstd = tl.where((length > S) | (length > rows), float("nan"), rstd)
            m_in = (o_rows >= start) & (o_rows < start + length)
            b_mean, b_rstd = tl.where(m_in, mean, b_mean), tl.where(m_in, rstd, b_rstd)
            o_position = tl.where(m_in, (o_rows - start).to(tl.int32), o_position)
            if (i_n == 0) & (first // BLOCK_M == i_m):
                tl.store(mean_ptr + i_example, mean)
                tl.store(rstd_ptr + i_example, rstd)
    return b_mean, b_rstd, o_position


@triton.jit
def _load_affine(ptr, o_position, o_cols, S, D, PER_TOKEN: tl.constexpr):
    """The norm's weight or bias for a tile's rows."""
    if PER_TOKEN:
        return tl.load(ptr + o_cols, mask=o_cols < D, other=0.0)[None, :]
    else:
        m_affine = (o_position < S)[:, None] & (o_cols < D)[None, :]
        return tl.load(ptr + o_position[:, None] * D + o_cols[None, :], mask=m_affine, other=0.0)


@triton.jit
def _blend(
    b_linear, i, first, previous_ptr, layer_ptr, bias_ptr, states_ptr, gate_ptr, pieces_ptr, cu_seqlens_ptr, students,
    differences, partial_ptr, compared, i_m, i_strip, row_tiles, o_rows, m_real, e_first, e_last, T, S, D, STRIPS,
    PIECES_SIZE, NORM: tl.constexpr, HAS_STUDENTS: tl.constexpr, KEEP_START: tl.constexpr,
    KEEP_GATES: tl.constexpr, KEEP_DIFFERENCE: tl.constexpr, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """The product's epilogue for a strip of columns: g, O and O's statistics."""
    o_cols = i_strip * STRIP + tl.arange(0, STRIP)
    o_tile = o_rows[:, None] * D + o_cols[None, :]
    m_tile = (o_rows < T)[:, None] & (o_cols < D)[None, :]
    b_gate = tl.sigmoid(b_linear + tl.load(bias_ptr + o_cols, mask=o_cols < D, other=0.0)[None, :])
    if KEEP_GATES:  # backward multiplies zeros with those of padding
        b_kept = tl.where(m_real[:, None], b_gate, 0.0)
        tl.store(gate_ptr + o_tile, b_kept.to(gate_ptr.dtype.element_ty), mask=m_tile)
    b_previous = tl.load(previous_ptr + o_tile, mask=m_tile, other=0.0)
    if KEEP_START:
        if i == 0:
            b_start = tl.where(m_real[:, None], b_previous, 0.0) if MASKED else b_previous
            tl.store(states_ptr + o_tile, b_start, mask=m_tile)
    b_previous = b_previous.to(tl.float32)
    if HAS_STUDENTS:
        if (i == first) & (compared % 2 == 1):
            _compare(
                students, differences, partial_ptr, i_m * STRIPS + i_strip, row_tiles * STRIPS, 0, i, b_previous,
                o_tile, m_tile, m_real[:, None], KEEP_DIFFERENCE,
            )  # fmt: skip
    b_layer = tl.load(layer_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_blend = b_previous + b_gate * (b_layer - b_previous)
    if not NORM:  # statistics are those of what the norm will read: where nothing varies, rstd magnifies any difference
        b_blend = b_blend.to(states_ptr.dtype.element_ty).to(tl.float32)
    _store_statistics(
        b_blend, m_real, pieces_ptr, cu_seqlens_ptr, i_m, i_strip, o_rows, o_cols, e_first, e_last,
        T, S, D, STRIPS, PIECES_SIZE, PER_TOKEN, PACKED, STRIP,
    )  # fmt: skip
    return b_blend


@triton.jit
def _load_strip(ptr, o_rows, i_strip, T, D, STRIP: tl.constexpr):
    """A tile of a (T, D) tensor in float32."""
    o_cols = i_strip * STRIP + tl.arange(0, STRIP)
    m_tile = (o_rows < T)[:, None] & (o_cols < D)[None, :]
    return tl.load(ptr + o_rows[:, None] * D + o_cols[None, :], mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def _store_strip(ptr, b_tile, o_rows, i_strip, T, D, STRIP: tl.constexpr):
    o_cols = i_strip * STRIP + tl.arange(0, STRIP)
    m_tile = (o_rows < T)[:, None] & (o_cols < D)[None, :]
    tl.store(ptr + o_rows[:, None] * D + o_cols[None, :], b_tile.to(ptr.dtype.element_ty), mask=m_tile)


@triton.jit
def _aggregate(
    b_blend, b_mean, b_rstd, o_position, i, first, norm_weight_ptr, norm_bias_ptr, state_ptr, students, differences,
    partial_ptr, compared, i_m, i_strip, row_tiles, o_rows, m_real, T, S, D, STRIPS, HAS_STUDENTS: tl.constexpr,
    KEEP_DIFFERENCE: tl.constexpr, PER_TOKEN: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """A from O, and its part of the hidden loss, for a strip of columns."""
    o_cols = i_strip * STRIP + tl.arange(0, STRIP)
    b_weight = _load_affine(norm_weight_ptr, o_position, o_cols, S, D, PER_TOKEN)
    b_bias = _load_affine(norm_bias_ptr, o_position, o_cols, S, D, PER_TOKEN)
    b_state = (b_blend - b_mean[:, None]) * b_rstd[:, None] * b_weight + b_bias
    b_stored = tl.where(m_real[:, None], b_state, 0.0).to(state_ptr.dtype.element_ty)
    o_tile = o_rows[:, None] * D + o_cols[None, :]
    m_tile = (o_rows < T)[:, None] & (o_cols < D)[None, :]
    tl.store(state_ptr + o_tile, b_stored, mask=m_tile)
    if HAS_STUDENTS:
        if (compared >> (i - first + 1)) % 2 == 1:
            _compare(
                students, differences, partial_ptr, i_m * STRIPS + i_strip, row_tiles * STRIPS, i - first + 1, i + 1,
                b_stored.to(tl.float32), o_tile, m_tile, m_real[:, None], KEEP_DIFFERENCE,
            )  # fmt: skip


@triton.jit
def _cast(master_ptr, weight_ptr, size, BLOCK: tl.constexpr):
    """A share of the weights in the product's dtype."""
    for i_block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        o_block = tl.cast(i_block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_weight = tl.load(master_ptr + o_block, mask=o_block < size, other=0.0)
        tl.store(weight_ptr + o_block, b_weight.to(weight_ptr.dtype.element_ty), mask=o_block < size)


@triton.jit(do_not_specialize=("first", "last", "compared", "finish", "T", "S", "E", "loss_weight"))
def _chain_fwd_kernel(
    start_ptr,  # (T, D) A before the launch's first gate; its padding may hold anything
    layers,  # (T, D) each: H of the launch's gates
    linear_ptr,  # (T, D) A_prev W^T, where PRODUCT is "given"
    master_ptr,  # (n, D, D) float32 W; None: they are in weight_ptr
    weight_ptr,  # (n, D, D) W in the product's dtype, out where there is master_ptr
    bias_ptr,  # (n, D) float32
    norm_weight_ptr,  # (n, S, D) or (n, D) float32
    norm_bias_ptr,
    norm_stride,  # elements from one gate's affine to the next one's
    states_ptr,  # (n + 1, T, D) out: A; its first, the chain's start with zero padding, where KEEP_START
    gates_ptr,  # (n, T, D) out: g, where KEEP_GATES
    mean_ptr,  # (n, E) or (n, T) float32 out
    rstd_ptr,
    pieces_ptr,  # (2, 3, PIECES_SIZE) float32 scratch: mean, square sum and rows of tiles' examples
    counters_ptr,  # (2 * row tiles + 2,) int32, zero before and after, where SYNC or students
    students,  # (T, D) each: h at the launch's first position and behind each of its gates; any where not compared
    differences,  # the same for h - A, out, where KEEP_DIFFERENCE
    partial_ptr,  # (n + 1, tiles) float32 scratch, where students
    losses_ptr,  # (K,) float32 out
    factor_ptr,  # () float32 out
    slots,  # K positions along the chain
    mask_ptr,  # (T,) nonzero where real, where MASKED
    cu_seqlens_ptr,  # (E + 1,) int32, where PACKED
    first,  # the launch's gates
    last,
    compared,  # bit i: whether position first + i has a student
    finish,  # whether losses are complete behind this launch
    loss_weight,
    T,
    S,  # rows of the affine; PER_TOKEN: T
    E,
    D,
    STRIPS,  # of columns: SPLITS for each column tile
    PIECES_SIZE,
    eps,
    PRODUCT: tl.constexpr,  # "matmul", "given", or "none": O is in states_ptr
    NORM: tl.constexpr,  # or O is left in states_ptr
    SYNC: tl.constexpr,  # programs wait for one another
    HAS_STUDENTS: tl.constexpr,
    KEEP_START: tl.constexpr,
    KEEP_GATES: tl.constexpr,
    KEEP_DIFFERENCE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,  # strips of columns into which a tile's epilogue is split: 1 or 2
):
    STRIP: tl.constexpr = BLOCK_N // SPLITS
    row_tiles, tiles = tl.cdiv(T, BLOCK_M), tl.cdiv(D, BLOCK_N)
    if SYNC:  # a program keeps its columns, and each of its row tiles through all gates
        i_first, i_n, step = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.num_programs(0) // tiles
        row_tiles_end = row_tiles
        if master_ptr is not None:
            _cast(master_ptr, weight_ptr, tl.cast(last, tl.int64) * D * D, 32 * BLOCK_M)
            arrive(counters_ptr + 2 * row_tiles + 1)
            wait(counters_ptr + 2 * row_tiles + 1, tl.num_programs(0))
    else:
        # One tile of one gate. Loops that end there are no loops to the compiler, which would else hoist what spills.
        i_first, i_n = swizzle(tl.program_id(0), T, D, BLOCK_M, BLOCK_N, GROUP_M)
        row_tiles_end, step, last = i_first + 1, 1, first + 1
    for i_tile in range(i_first, row_tiles_end, step):
        for i in range(first, last):
            i_m = i_tile
            if SYNC and PRODUCT == "matmul":
                # Its rows of A_prev are complete. The sum is i_tile, which the compiler cannot know: it would compute
                # what follows from it once for all gates, and spill that.
                i_m += tl.minimum(wait(counters_ptr + row_tiles + i_tile, tiles * (i - first)), 0)
            o_rows = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
            m_real = o_rows < T
            if MASKED:
                m_real = m_real & (tl.load(mask_ptr + o_rows, mask=m_real, other=0) != 0)
            e_first, e_last = 0, 0
            if not PER_TOKEN:
                last_row = tl.minimum(i_m * BLOCK_M + BLOCK_M, T) - 1
                e_first, e_last = examples_between(cu_seqlens_ptr, i_m * BLOCK_M, last_row, S, E, PACKED)
            previous_ptr = gate_of(states_ptr, i, T * D)
            if i == first:
                previous_ptr = start_ptr
            state_ptr = gate_of(states_ptr, i + 1, T * D)
            p_pieces = pieces_ptr + (i % 2) * 3 * PIECES_SIZE  # a slower program may still read the gate's before
            if PRODUCT == "none":
                b_blend = _load_strip(state_ptr, o_rows, i_n * SPLITS, T, D, STRIP)
                if SPLITS == 2:
                    b_right = _load_strip(state_ptr, o_rows, i_n * SPLITS + 1, T, D, STRIP)
            else:
                if PRODUCT == "matmul":
                    o_cols = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
                    b_linear = matmul(
                        previous_ptr, gate_of(weight_ptr, i, D * D), o_rows, o_cols, T, D, D,
                        True, EVEN_K, INPUT_PRECISION, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_K,
                    )  # fmt: skip
                    if SPLITS == 2:
                        b_linear, b_linear_right = halves(b_linear, BLOCK_M, BLOCK_N)
                else:
                    b_linear = _load_strip(linear_ptr, o_rows, i_n * SPLITS, T, D, STRIP)
                    if SPLITS == 2:
                        b_linear_right = _load_strip(linear_ptr, o_rows, i_n * SPLITS + 1, T, D, STRIP)
                layer_ptr = pick(layers, i - first)
                gate_ptr = gates_ptr
                if KEEP_GATES:
                    gate_ptr = gate_of(gates_ptr, i, T * D)
                b_blend = _blend(
                    b_linear, i, first, previous_ptr, layer_ptr, bias_ptr + i * D, states_ptr, gate_ptr, p_pieces,
                    cu_seqlens_ptr, students, differences, partial_ptr, compared, i_m, i_n * SPLITS, row_tiles, o_rows,
                    m_real, e_first, e_last, T, S, D, STRIPS, PIECES_SIZE, NORM, HAS_STUDENTS, KEEP_START, KEEP_GATES,
                    KEEP_DIFFERENCE, PER_TOKEN, MASKED, PACKED, STRIP,
                )  # fmt: skip
                if SPLITS == 2:
                    b_right = _blend(
                        b_linear_right, i, first, previous_ptr, layer_ptr, bias_ptr + i * D, states_ptr, gate_ptr,
                        p_pieces, cu_seqlens_ptr, students, differences, partial_ptr, compared, i_m, i_n * SPLITS + 1,
                        row_tiles, o_rows, m_real, e_first, e_last, T, S, D, STRIPS, PIECES_SIZE, NORM, HAS_STUDENTS,
                        KEEP_START, KEEP_GATES, KEEP_DIFFERENCE, PER_TOKEN, MASKED, PACKED, STRIP,
                    )  # fmt: skip
            if NORM:
                if SYNC:
                    arrive(counters_ptr + i_m)
                    m_first, m_last = i_m, i_m
                    if not PER_TOKEN:  # an example may reach into other row tiles
                        start, length = example_bounds(cu_seqlens_ptr, e_first, T, S, PACKED)
                        start, _ = inside(start, length, T, PACKED)
                        end, length = example_bounds(cu_seqlens_ptr, e_last, T, S, PACKED)
                        end, length = inside(end, length, T, PACKED)
                        m_first, m_last = start // BLOCK_M, (end + length - 1) // BLOCK_M
                    for i_other in range(m_first, m_last + 1):
                        wait(counters_ptr + i_other, tiles * (i - first + 1))
                i_group = tl.cast(i, tl.int64) * (T if PER_TOKEN else E)
                b_mean, b_rstd, o_position = _row_statistics(
                    p_pieces, cu_seqlens_ptr, mean_ptr + i_group, rstd_ptr + i_group, i_m, i_n, o_rows, e_first, e_last,
                    T, S, D, STRIPS, PIECES_SIZE, eps, PER_TOKEN, PACKED, BLOCK_M, STRIP, PIECES, BLOCK_S,
                )  # fmt: skip
                p_weight = gate_of(norm_weight_ptr, i, norm_stride)
                p_bias = gate_of(norm_bias_ptr, i, norm_stride)
                _aggregate(
                    b_blend, b_mean, b_rstd, o_position, i, first, p_weight, p_bias, state_ptr, students, differences,
                    partial_ptr, compared, i_m, i_n * SPLITS, row_tiles, o_rows, m_real, T, S, D, STRIPS, HAS_STUDENTS,
                    KEEP_DIFFERENCE, PER_TOKEN, STRIP,
                )  # fmt: skip
                if SPLITS == 2:
                    _aggregate(
                        b_right, b_mean, b_rstd, o_position, i, first, p_weight, p_bias, state_ptr, students,
                        differences, partial_ptr, compared, i_m, i_n * SPLITS + 1, row_tiles, o_rows, m_real, T, S, D,
                        STRIPS, HAS_STUDENTS, KEEP_DIFFERENCE, PER_TOKEN, STRIP,
                    )  # fmt: skip
                if SYNC:
                    arrive(counters_ptr + row_tiles + i_m)
            else:
                _store_strip(state_ptr, b_blend, o_rows, i_n * SPLITS, T, D, STRIP)
                if SPLITS == 2:
                    _store_strip(state_ptr, b_right, o_rows, i_n * SPLITS + 1, T, D, STRIP)
    if SYNC or HAS_STUDENTS:
        if SYNC or finish:
            counter = counters_ptr + 2 * row_tiles
            if arrive(counter) == tl.num_programs(0) - 1:
                clear(counters_ptr, 2 * row_tiles + 2)
                if HAS_STUDENTS:
                    if finish:
                        _write_losses(
                            partial_ptr, losses_ptr, factor_ptr, mask_ptr, slots, loss_weight, T, D,
                            row_tiles * STRIPS, MASKED, 256,
                        )  # fmt: skip


@triton.jit
def _gradient(
    b_grad, position, base, depth, grads, students, grad_students, slots, grad_loss_ptr, grad_loss_stride, factor_ptr,
    states_ptr, norm_weight_ptr, norm_bias_ptr, norm_stride, cu_seqlens_ptr, carry_ptr, grad_layers_ptr, scaled_ptr,
    given, compared, i_m, i_strip, o_rows, m_real, o_position, e_first, e_last, T, S, D, STRIPS, PIECES_SIZE,
    NEED_STUDENT: tl.constexpr, NEED_LAYERS: tl.constexpr, PER_TOKEN: tl.constexpr, PACKED: tl.constexpr,
    STRIP: tl.constexpr,
):  # fmt: skip
    """dA at one position from the product and all that flows in there, and the sums that the norm's backward needs:
    of dA * gamma and of dA * (A - beta), for a strip of columns."""
    o_cols = i_strip * STRIP + tl.arange(0, STRIP)
    o_tile = o_rows[:, None] * D + o_cols[None, :]
    m_tile = (o_rows < T)[:, None] & (o_cols < D)[None, :]
    b_grad += tl.load(carry_ptr + o_tile, mask=m_tile & (o_cols < depth)[None, :], other=0.0).to(tl.float32)
    if grads is not None:
        if (given >> (position - base)) % 2 == 1:
            b_grad += tl.load(pick(grads, position - base) + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_state = tl.load(gate_of(states_ptr, position, T * D) + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    if students is not None:
        if (compared >> (position - base)) % 2 == 1:
            scale = tl.load(factor_ptr)
            for k in tl.static_range(len(slots)):
                if slots[k] == position:
                    scale *= tl.load(grad_loss_ptr + k * grad_loss_stride)
            p_student = pick(students, position - base)
            b_difference = scale * _difference(p_student, b_state, o_tile, m_tile, m_real[:, None])
            b_grad -= b_difference
            if NEED_STUDENT:
                p_grad_student = pick(grad_students, position - base) + o_tile
                tl.store(p_grad_student, b_difference.to(p_grad_student.dtype.element_ty), mask=m_tile)
    b_grad = tl.where(m_real[:, None], b_grad, 0.0)
    if position > 0:
        tl.store(carry_ptr + o_tile, b_grad.to(carry_ptr.dtype.element_ty), mask=m_tile)
        p_weight = gate_of(norm_weight_ptr, position - 1, norm_stride)
        p_bias = gate_of(norm_bias_ptr, position - 1, norm_stride)
        b_scaled = tl.sum(b_grad * _load_affine(p_weight, o_position, o_cols, S, D, PER_TOKEN), axis=1)
        b_product = tl.sum(b_grad * (b_state - _load_affine(p_bias, o_position, o_cols, S, D, PER_TOKEN)), axis=1)
        if PER_TOKEN:
            p_piece = scaled_ptr + o_rows * STRIPS + i_strip
            tl.store(p_piece, b_scaled, mask=o_rows < T)
            tl.store(p_piece + PIECES_SIZE, b_product, mask=o_rows < T)
        else:
            for i_example in range(e_first, e_last + 1):
                start, length = example_bounds(cu_seqlens_ptr, i_example, T, S, PACKED)
                m_in = m_real & (o_rows >= start) & (o_rows < start + length)
                p_piece = scaled_ptr + (i_m + i_example) * STRIPS + i_strip
                tl.store(p_piece, tl.sum(tl.where(m_in, b_scaled, 0.0)))
                tl.store(p_piece + PIECES_SIZE, tl.sum(tl.where(m_in, b_product, 0.0)))
                tl.store(p_piece + 2 * PIECES_SIZE, tl.sum(m_in.to(tl.float32)))
    else:
        if NEED_LAYERS:
            tl.store(grad_layers_ptr + o_tile, b_grad.to(grad_layers_ptr.dtype.element_ty), mask=m_tile)


@triton.jit
def _gate_again(b_linear, bias_ptr, gate_ptr, o_rows, i_strip, T, D, STRIP: tl.constexpr):
    """g for a strip of columns, from forward's product made once more."""
    o_cols = i_strip * STRIP + tl.arange(0, STRIP)
    b_bias = tl.load(bias_ptr + o_cols, mask=o_cols < D, other=0.0)[None, :]
    _store_strip(gate_ptr, tl.sigmoid(b_linear + b_bias), o_rows, i_strip, T, D, STRIP)


@triton.jit
def _gate_backward(
    i_work, i, layer_ptr, gate_ptr, states_ptr, norm_weight_ptr, mean_ptr, rstd_ptr, carry_ptr, grad_linear_ptr,
    grad_layers_ptr, scaled_ptr, part_weight_ptr, part_norm_bias_ptr, part_bias_ptr, mask_ptr, cu_seqlens_ptr,
    T, S, E, D, STRIPS, PIECES_SIZE, ROWS_PER_EXAMPLE, EXAMPLES, GROUPS, PER_TOKEN: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, NEED_LAYERS: tl.constexpr, NEED_PARAMETERS: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, STRIP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All element-wise work of gate i's backward for ROWS positions x COLUMNS of a group of examples.

    Walking over the examples sums the (S, D) affine's gradients in registers, in a fixed order. For the "token" norm
    a sweep of rows takes an example's place.
    """
    parts, column_blocks = tl.cdiv(ROWS_PER_EXAMPLE, ROWS), tl.cdiv(D, COLUMNS)
    i_cols, i_part = i_work % column_blocks, i_work // column_blocks % parts
    i_group = i_work // (column_blocks * parts)
    o_local = i_part * ROWS + tl.arange(0, ROWS)
    o_cols = i_cols * COLUMNS + tl.arange(0, COLUMNS)
    m_cols = o_cols < D
    o_strips = tl.arange(0, BLOCK_S)
    b_width = tl.maximum(tl.minimum(STRIP, D - o_strips * STRIP), 0).to(tl.float32)[None, :]
    o_affine = o_local[:, None] * D + o_cols[None, :]
    m_affine = (o_local < ROWS_PER_EXAMPLE)[:, None] & m_cols[None, :]
    if PER_TOKEN:
        b_weight = tl.load(norm_weight_ptr + o_cols, mask=m_cols, other=0.0)[None, :]
    else:
        b_weight = tl.load(norm_weight_ptr + o_affine, mask=m_affine, other=0.0)
    b_grad_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    b_grad_norm_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    b_grad_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    previous_ptr = gate_of(states_ptr, i, T * D)
    examples = tl.cdiv(EXAMPLES, GROUPS)

    for i_example in range(i_group * examples, tl.minimum(i_group * examples + examples, EXAMPLES)):
        if PER_TOKEN:
            start, length = i_example * ROWS_PER_EXAMPLE, tl.minimum(ROWS_PER_EXAMPLE, T - i_example * ROWS_PER_EXAMPLE)
        else:
            start, length = example_bounds(cu_seqlens_ptr, i_example, T, S, PACKED)
            start, length = inside(start, length, T, PACKED)
        if i_part * ROWS < length:
            o_rows = start.to(tl.int64) + o_local
            m_rows = (o_local < length) & (o_local < ROWS_PER_EXAMPLE)
            m_tile = m_rows[:, None] & m_cols[None, :]
            o_tile = o_rows[:, None] * D + o_cols[None, :]
            if PER_TOKEN:
                mean = tl.load(mean_ptr + o_rows, mask=m_rows, other=0.0)[:, None]
                rstd = tl.load(rstd_ptr + o_rows, mask=m_rows, other=0.0)[:, None]
                p_piece = scaled_ptr + o_rows[:, None] * STRIPS + o_strips[None, :]
                m_piece = m_rows[:, None] & (o_strips < STRIPS)[None, :]
                scaled = tl.sum(tl.load(p_piece, mask=m_piece, other=0.0), axis=1)[:, None] / D
                product = tl.sum(tl.load(p_piece + PIECES_SIZE, mask=m_piece, other=0.0), axis=1)[:, None] / D
            else:
                mean, rstd = tl.load(mean_ptr + i_example), tl.load(rstd_ptr + i_example)
                o_piece, m_piece = piece_block(start, length, i_example, STRIPS, BLOCK_M, PIECES, BLOCK_S)
                p_piece = scaled_ptr + o_piece
                b_real = tl.load(p_piece + 2 * PIECES_SIZE, mask=m_piece, other=0.0)
                count = tl.maximum(tl.sum(b_real * b_width), 1.0)
                scaled = tl.sum(tl.load(p_piece, mask=m_piece, other=0.0)) / count
                product = tl.sum(tl.load(p_piece + PIECES_SIZE, mask=m_piece, other=0.0)) / count
            b_grad = tl.load(carry_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)
            b_previous = tl.load(previous_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)
            b_layer = tl.load(layer_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)
            b_gate = tl.load(gate_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)

            b_difference = b_layer - b_previous
            b_normalized = (b_previous + b_gate * b_difference - mean) * rstd
            b_grad_blend = rstd * (b_grad * b_weight - scaled - b_normalized * product)
            m_real = m_tile
            if MASKED:
                m_real = m_tile & (tl.load(mask_ptr + o_rows, mask=m_rows, other=0) != 0)[:, None]
            # Selected, not multiplied: outside, and on padding, the operands may be anything.
            b_grad_linear = tl.where(m_real, b_grad_blend * b_difference * b_gate * (1.0 - b_gate), 0.0)
            b_grad_blend = tl.where(m_real, b_grad_blend, 0.0)
            p_grad_linear = gate_of(grad_linear_ptr, i, T * D) + o_tile
            tl.store(p_grad_linear, b_grad_linear.to(grad_linear_ptr.dtype.element_ty), mask=m_tile)
            b_carry = b_grad_blend * (1.0 - b_gate)
            tl.store(carry_ptr + o_tile, b_carry.to(carry_ptr.dtype.element_ty), mask=m_tile)
            if NEED_LAYERS:
                p_grad_layer = gate_of(grad_layers_ptr, i + 1, T * D) + o_tile
                b_grad_layer = b_grad_blend * b_gate
                tl.store(p_grad_layer, b_grad_layer.to(grad_layers_ptr.dtype.element_ty), mask=m_tile)
            if NEED_PARAMETERS:
                b_grad_weight += tl.where(m_real, b_grad * b_normalized, 0.0)
                b_grad_norm_bias += b_grad
                b_grad_bias += b_grad_linear

    if NEED_PARAMETERS:
        i_row = (tl.cast(i, tl.int64) * GROUPS + i_group) * parts + i_part
        tl.store(part_bias_ptr + i_row * D + o_cols, tl.sum(b_grad_bias, axis=0), mask=m_cols)
        if PER_TOKEN:
            tl.store(part_weight_ptr + i_row * D + o_cols, tl.sum(b_grad_weight, axis=0), mask=m_cols)
            tl.store(part_norm_bias_ptr + i_row * D + o_cols, tl.sum(b_grad_norm_bias, axis=0), mask=m_cols)
        else:
            o_part = (tl.cast(i, tl.int64) * GROUPS + i_group) * S * D + o_affine
            tl.store(part_weight_ptr + o_part, b_grad_weight, mask=m_affine)
            tl.store(part_norm_bias_ptr + o_part, b_grad_norm_bias, mask=m_affine)


@triton.jit
def _sum_parts(part_ptr, out_ptr, i_program, programs, gates, rows, size, BLOCK: tl.constexpr):
    """(gates, rows, size) summed over the rows, always in their order."""
    blocks = tl.cdiv(size, BLOCK)
    for i_work in range(i_program, gates * blocks, programs):
        i, o_block = i_work // blocks, i_work % blocks * BLOCK + tl.arange(0, BLOCK)
        b_sum = tl.zeros((BLOCK,), tl.float32)
        for i_row in range(0, rows):
            o_row = (tl.cast(i, tl.int64) * rows + i_row) * size
            b_sum += tl.load(part_ptr + o_row + o_block, mask=o_block < size, other=0.0)
        tl.store(gate_of(out_ptr, i, size) + o_block, b_sum, mask=o_block < size)


@triton.jit
def _scale(slope_ptr, scale_ptr, out_ptr, size, i_program, programs, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr)
    for i_block in range(i_program, tl.cdiv(size, BLOCK), programs):
        o_block = i_block * BLOCK + tl.arange(0, BLOCK)
        b_slope = tl.load(slope_ptr + o_block, mask=o_block < size, other=0.0)
        tl.store(out_ptr + o_block, (b_slope * scale).to(out_ptr.dtype.element_ty), mask=o_block < size)


@triton.jit(do_not_specialize=(
    "grad_loss_stride", "logits_size", "first", "last", "base", "given", "compared", "top", "T", "S", "E",
    "ROWS_PER_EXAMPLE", "EXAMPLES", "GROUPS",
))  # fmt: skip
def _chain_bwd_kernel(
    grads,  # (T, D) each: dL/dA of positions base, base + 1, ...; any where not given; None: no position has one
    students,  # the same for h; None: no position is compared
    grad_students,  # the same, out, where NEED_STUDENT
    slots,  # K positions along the chain
    grad_loss_ptr,  # (K,) float32 dL / dloss_k
    grad_loss_stride,  # 0 where they are one
    factor_ptr,  # () float32, 2 * weight / (real tokens * D)
    logits_slope_ptr,  # (logits_size,) float32: of the logits' loss, or None
    grad_logits_loss_ptr,  # () float32 dL / dlogits' loss
    grad_logits_ptr,  # (logits_size,) out: the product of both
    logits_size,
    layers,  # (T, D) each: H of gates base, base + 1, ...
    states_ptr,  # (n + 1, T, D) A
    gates_ptr,  # (n, T, D) g; RECOMPUTE: (T, D) scratch
    weight_ptr,  # (n, D, D) W
    bias_ptr,  # (n, D) float32, where RECOMPUTE
    norm_weight_ptr,  # (n, S, D) or (n, D) float32
    norm_bias_ptr,
    norm_stride,  # elements from one gate's affine to the next one's
    mean_ptr,  # (n, E) or (n, T) float32
    rstd_ptr,
    mask_ptr,  # (T,) nonzero where real, where MASKED
    cu_seqlens_ptr,  # (E + 1,) int32, where PACKED
    carry_ptr,  # (T, D) scratch: dA, zero on padding; then dO * (1 - g), the part of dA_prev beside the product
    grad_linear_ptr,  # (n, T, D) out: du in the product's dtype
    grad_layers_ptr,  # (n + 1, T, D) out: dH, where NEED_LAYERS
    scaled_ptr,  # (3, PIECES_SIZE) float32 scratch: sums of dA * gamma, of dA * (A - beta), rows
    part_weight_ptr,  # (n, GROUPS, S, D), PER_TOKEN: (n, GROUPS * parts, D) float32 scratch, where NEED_PARAMETERS
    part_norm_bias_ptr,
    part_bias_ptr,  # (n, GROUPS * parts, D) float32 scratch
    grad_norm_weight_ptr,  # (n, S, D) or (n, D) float32 out, where NEED_PARAMETERS
    grad_norm_bias_ptr,
    grad_bias_ptr,  # (n, D) float32 out
    counters_ptr,  # (2,) int32, zero before and after, where SYNC
    first,  # the launch's stages: 2 j is dA of position top - j, 2 j + 1 the gate before it; 2 top also the sums
    last,
    base,
    given,  # bit i: whether position base + i has a gradient
    compared,  # bit i: whether position base + i has a student
    top,  # highest position that the loss depends on
    T,
    S,  # rows of the affine
    E,
    D,
    STRIPS,  # of columns: SPLITS for each column tile
    PIECES_SIZE,
    ROWS_PER_EXAMPLE,  # S; PER_TOKEN: rows a sweep
    EXAMPLES,  # E; PER_TOKEN: sweeps
    GROUPS,
    STAGES: tl.constexpr,  # "product", "gate", "sums", or "all" of them
    SYNC: tl.constexpr,  # programs wait for one another
    RECOMPUTE: tl.constexpr,  # gates were not kept
    NEED_START: tl.constexpr,  # whether position 0 has a gradient to take
    NEED_STUDENT: tl.constexpr,
    NEED_LAYERS: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,  # strips of columns into which a tile's epilogue is split: 1 or 2
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    STRIP: tl.constexpr = BLOCK_N // SPLITS
    programs = tl.num_programs(0)
    i_program, num_tiles = tl.program_id(0), tl.cdiv(T, BLOCK_M) * tl.cdiv(D, BLOCK_N)
    if not SYNC:  # see _chain_fwd_kernel
        last, num_tiles = first + 1, i_program + 1
    if STAGES != "product" and logits_slope_ptr is not None:  # a product has no registers to spare
        if first <= 1:
            _scale(
                logits_slope_ptr, grad_logits_loss_ptr, grad_logits_ptr, logits_size, i_program, programs, COLUMNS
            )  # fmt: skip
    for stage in range(first, last):
        position = top - (stage + 1) // 2
        if STAGES == "product" or (STAGES == "all" and stage % 2 == 0 and (NEED_START or stage < 2 * top)):
            for i_tile in range(i_program, num_tiles, programs):
                i_m, i_n = swizzle(i_tile, T, D, BLOCK_M, BLOCK_N, GROUP_M)
                o_rows = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
                o_cols = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
                m_real = o_rows < T
                if MASKED:
                    m_real = m_real & (tl.load(mask_ptr + o_rows, mask=m_real, other=0) != 0)
                depth = tl.where(position < top, D, 0)  # what a product sums over: nothing comes back from above
                if not NEED_LAYERS:  # the chain's start is here for a student's sake
                    depth = tl.where(position > 0, depth, 0)
                b_grad = matmul(
                    gate_of(grad_linear_ptr, position, T * D), gate_of(weight_ptr, position, D * D), o_rows, o_cols,
                    T, D, depth, False, EVEN_K, INPUT_PRECISION, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                if SPLITS == 2:
                    b_grad, b_right = halves(b_grad, BLOCK_M, BLOCK_N)
                e_first, e_last = 0, 0
                o_position = tl.zeros((BLOCK_M,), tl.int32)
                if not PER_TOKEN:
                    last_row = tl.minimum(i_m * BLOCK_M + BLOCK_M, T) - 1
                    e_first, e_last = examples_between(cu_seqlens_ptr, i_m * BLOCK_M, last_row, S, E, PACKED)
                    for i_example in range(e_first, e_last + 1):
                        start, length = example_bounds(cu_seqlens_ptr, i_example, T, S, PACKED)
                        m_in = (o_rows >= start) & (o_rows < start + length)
                        o_position = tl.where(m_in, (o_rows - start).to(tl.int32), o_position)
                _gradient(
                    b_grad, position, base, depth, grads, students, grad_students, slots, grad_loss_ptr,
                    grad_loss_stride, factor_ptr, states_ptr, norm_weight_ptr, norm_bias_ptr, norm_stride,
                    cu_seqlens_ptr, carry_ptr, grad_layers_ptr, scaled_ptr, given, compared, i_m, i_n * SPLITS, o_rows,
                    m_real, o_position, e_first, e_last, T, S, D, STRIPS, PIECES_SIZE, NEED_STUDENT, NEED_LAYERS,
                    PER_TOKEN, PACKED, STRIP,
                )  # fmt: skip
                if SPLITS == 2:
                    _gradient(
                        b_right, position, base, depth, grads, students, grad_students, slots, grad_loss_ptr,
                        grad_loss_stride, factor_ptr, states_ptr, norm_weight_ptr, norm_bias_ptr, norm_stride,
                        cu_seqlens_ptr, carry_ptr, grad_layers_ptr, scaled_ptr, given, compared, i_m,
                        i_n * SPLITS + 1, o_rows, m_real, o_position, e_first, e_last, T, S, D, STRIPS, PIECES_SIZE,
                        NEED_STUDENT, NEED_LAYERS, PER_TOKEN, PACKED, STRIP,
                    )  # fmt: skip
            if RECOMPUTE:
                if position > 0:
                    for i_tile in range(i_program, num_tiles, programs):
                        i_m, i_n = swizzle(i_tile, T, D, BLOCK_M, BLOCK_N, GROUP_M)
                        o_rows = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
                        b_linear = matmul(
                            gate_of(states_ptr, position - 1, T * D), gate_of(weight_ptr, position - 1, D * D),
                            o_rows, i_n * BLOCK_N + tl.arange(0, BLOCK_N), T, D, D, True, EVEN_K, INPUT_PRECISION,
                            INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_K,
                        )  # fmt: skip
                        p_bias = bias_ptr + (position - 1) * D
                        if SPLITS == 2:
                            b_linear, b_linear_right = halves(b_linear, BLOCK_M, BLOCK_N)
                            _gate_again(b_linear_right, p_bias, gates_ptr, o_rows, i_n * SPLITS + 1, T, D, STRIP)
                        _gate_again(b_linear, p_bias, gates_ptr, o_rows, i_n * SPLITS, T, D, STRIP)
        if STAGES == "gate" or (STAGES == "all" and stage % 2 == 1):
            work = tl.cdiv(ROWS_PER_EXAMPLE, ROWS) * tl.cdiv(D, COLUMNS) * GROUPS
            i_group = tl.cast(position, tl.int64) * (T if PER_TOKEN else E)
            for i_work in range(i_program, work, programs):
                _gate_backward(
                    i_work, position, pick(layers, position - base),
                    gates_ptr if RECOMPUTE else gate_of(gates_ptr, position, T * D),
                    states_ptr, gate_of(norm_weight_ptr, position, norm_stride), mean_ptr + i_group, rstd_ptr + i_group,
                    carry_ptr, grad_linear_ptr, grad_layers_ptr, scaled_ptr, part_weight_ptr, part_norm_bias_ptr,
                    part_bias_ptr, mask_ptr, cu_seqlens_ptr, T, S, E, D, STRIPS, PIECES_SIZE, ROWS_PER_EXAMPLE,
                    EXAMPLES, GROUPS, PER_TOKEN, MASKED, PACKED, NEED_LAYERS, NEED_PARAMETERS, PIECES, BLOCK_S,
                    BLOCK_M, STRIP, ROWS, COLUMNS,
                )  # fmt: skip
        if STAGES == "sums" or (STAGES == "all" and NEED_PARAMETERS and stage == 2 * top):
            parts = tl.cdiv(ROWS_PER_EXAMPLE, ROWS) * GROUPS
            _sum_parts(part_bias_ptr, grad_bias_ptr, i_program, programs, top, parts, D, COLUMNS)
            rows, size = parts, D
            if not PER_TOKEN:
                rows, size = GROUPS, S * D
            _sum_parts(part_weight_ptr, grad_norm_weight_ptr, i_program, programs, top, rows, size, COLUMNS)
            _sum_parts(part_norm_bias_ptr, grad_norm_bias_ptr, i_program, programs, top, rows, size, COLUMNS)
        if SYNC:
            if stage + 1 < last:
                arrive(counters_ptr)
                wait(counters_ptr, programs * (stage - first + 1))
    if SYNC:
        if arrive(counters_ptr + 1) == programs - 1:
            tl.store(counters_ptr, 0)
            tl.store(counters_ptr + 1, 0)


def _by_position(tensors: list[Tensor], positions: list[int], first: int, last: int) -> tuple[tuple[Tensor, ...], int]:
    """What the kernels take of tensors that belong to some positions: one for each from ``first`` to ``last``, any
    where there is none, and the bits that say where there is one."""
    found = dict(zip(positions, tensors, strict=True))
    bits = sum(1 << (p - first) for p in positions if first <= p <= last)
    return tuple(found.get(p, tensors[0]) for p in range(first, last + 1)), bits


class _Plan:
    """Sizes and settings that all launches of one call share."""

    def __init__(
        self, state: Tensor, matmul_dtype: torch.dtype, norm_weight: Tensor, row_mask, cu_seqlens, seq_len: int
    ) -> None:
        self.num_tokens, self.hidden_size = state.shape
        self.per_token = norm_weight.dim() == 2
        self.packed = cu_seqlens is not None and not self.per_token
        self.examples = 1
        if not self.per_token:
            self.examples = cu_seqlens.shape[0] - 1 if self.packed else self.num_tokens // seq_len
        self.seq_len = self.num_tokens if self.per_token else norm_weight.shape[1]
        self.groups = self.num_tokens if self.per_token else self.examples  # what shares one mean
        self.choice = lc.chain(state, matmul_dtype, self.per_token)
        self.other_tiles = lc.other_tiles(state, matmul_dtype)
        self.matmul_dtype = matmul_dtype
        self.where = {"mask_ptr": row_mask, "cu_seqlens_ptr": cu_seqlens if self.packed else None}
        self.mode = {"PER_TOKEN": self.per_token, "MASKED": row_mask is not None, "PACKED": self.packed}

    def waiting_programs(self, tile: lc.GemmLaunch) -> int:
        """Programs of a forward launch that wait for one another, 0 where they could wait for one that never runs.

        A program that has several row tiles takes one after another through all gates. So no example may lie in tiles
        that are taken at once and in one that comes later.
        """
        row_tiles, tiles = triton.cdiv(self.num_tokens, tile.block_m), triton.cdiv(self.hidden_size, tile.block_n)
        at_once = self.choice.programs(tile) // tiles
        if at_once >= row_tiles:
            return row_tiles * tiles
        if self.packed:
            return 0
        # Row tiles after which one begins where an example does.
        period = 1 if self.per_token else math.lcm(tile.block_m, self.seq_len) // tile.block_m
        return at_once // period * period * tiles

    def forward_launch(self) -> tuple[str, lc.GemmLaunch, int]:
        """Form, tile and waiting programs of the forward launch: as chosen, where its programs can wait.

        Else with a tile of which fewer are needed: two launches a gate, the last resort, cost more than an idle
        multiprocessor does.
        """
        form = self.choice.forward
        tiles = [self.choice.epilogue] if form == "cublas" else [self.choice.gemm, *self.other_tiles]
        for tile in tiles if form != "triton" else ():
            if waiting := self.waiting_programs(tile):
                return form, tile, waiting
        return "triton", self.choice.gemm, 0

    def tiling(self, tile: lc.GemmLaunch) -> dict:
        """Arguments that follow from a tile's size."""
        row_tiles = triton.cdiv(self.num_tokens, tile.block_m)
        strips = triton.cdiv(self.hidden_size, tile.block_n) * tile.splits
        pieces = self.num_tokens if self.per_token else row_tiles + self.examples
        return {
            "T": self.num_tokens, "S": self.seq_len, "E": self.examples, "D": self.hidden_size, "STRIPS": strips,
            "PIECES_SIZE": pieces * strips,
            "PIECES": triton.next_power_of_2(1 if self.per_token else triton.cdiv(self.seq_len - 1, tile.block_m) + 1),
            "BLOCK_S": triton.next_power_of_2(strips),
            "EVEN_K": self.hidden_size % tile.block_k == 0,
            "INPUT_PRECISION": lc.matmul_precision(self.matmul_dtype),
            "INTERPRETED": lc.interpreted(),
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
            "GROUP_M": tile.group_m, "SPLITS": tile.splits,
            "num_warps": tile.num_warps, "num_stages": tile.num_stages,
            **self.where, **self.mode,
        }  # fmt: skip


class Forward(NamedTuple):
    """What a chain's forward leaves; see :func:`lad_fast.kernels.ops.chain_loss_forward`."""

    weight: Tensor
    losses: Tensor | None
    factor: Tensor | None
    differences: list[Tensor]
    states: Tensor
    gates: list[Tensor]
    mean: Tensor
    rstd: Tensor


def forward(
    hidden, student, targets, weight, bias, norm_weight, norm_bias, row_mask, cu_seqlens, seq_len, eps, matmul_dtype,
    loss_weight, keep: str,
) -> Forward:  # fmt: skip
    """Launch n gates and, where there are students, the hidden loss."""
    plan = _Plan(hidden[0], matmul_dtype, norm_weight, row_mask, cu_seqlens, seq_len)
    num_gates, start = len(weight), hidden[0]
    form, tile, waiting = plan.forward_launch()
    master = None
    if form == "persistent" and weight.dtype != matmul_dtype:  # cast in the same launch
        master, weight = weight, torch.empty_like(weight, dtype=matmul_dtype)
    weight = weight.to(matmul_dtype)
    tiling = plan.tiling(tile)
    row_tiles, tiles = triton.cdiv(plan.num_tokens, tile.block_m), triton.cdiv(plan.hidden_size, tile.block_n)
    float32 = {"dtype": torch.float32, "device": start.device}
    states = start.new_empty((num_gates + 1, *start.shape))
    gates = [start.new_empty((num_gates, *start.shape))] if keep == "gates" else []
    mean, rstd = torch.empty(num_gates, plan.groups, **float32), torch.empty(num_gates, plan.groups, **float32)
    differences = [torch.empty_like(h) for h in student] if keep == "differences" else []
    losses = factor = partial = None
    if student:
        losses, factor = torch.empty(len(student), **float32), torch.empty((), **float32)
        partial = torch.empty(num_gates + 1, row_tiles * tiling["STRIPS"], **float32)
    shared = {
        "master_ptr": master, "weight_ptr": weight, "bias_ptr": bias, "norm_weight_ptr": norm_weight,
        "norm_bias_ptr": norm_bias, "norm_stride": norm_weight.stride(0), "states_ptr": states,
        "gates_ptr": gates[0] if gates else None,
        "mean_ptr": mean, "rstd_ptr": rstd, "pieces_ptr": torch.empty(2, 3, tiling["PIECES_SIZE"], **float32),
        "partial_ptr": partial, "losses_ptr": losses, "factor_ptr": factor, "loss_weight": loss_weight, "eps": eps,
        "KEEP_START": keep in ("gates", "states"), "KEEP_GATES": bool(gates), **tiling,
    }  # fmt: skip
    counters = lc.counters(start.device, 2 * row_tiles + 2)

    def run(first: int, last: int, product: str, norm: bool, sync=False, linear=None, **warps) -> None:
        # A launch without the norm ends before its gate's aggregate, and one without the product begins behind A_prev.
        covered = [p for p in targets if (p == 0 == first and product != "none") or (norm and first < p <= last)]
        pointers = {"students": None, "differences": None, "slots": None, "compared": 0}
        if covered:
            pointers["students"], _ = _by_position(student, targets, first, last)
            pointers["compared"] = sum(1 << (p - first) for p in covered)
            pointers["slots"] = tuple(targets)
            if differences:
                pointers["differences"], _ = _by_position(differences, targets, first, last)
        lc.launch(
            _chain_fwd_kernel, (waiting if sync else row_tiles * tiles,),
            start_ptr=states[first] if first else start, layers=tuple(hidden[first + 1 : last + 1]), linear_ptr=linear,
            counters_ptr=counters, **pointers, first=first, last=last, finish=int(norm and last == num_gates),
            PRODUCT=product, NORM=norm, SYNC=sync, HAS_STUDENTS=bool(covered), KEEP_DIFFERENCE=bool(differences),
            **shared | warps, **lc.cooperative(tile if sync else None),
        )  # fmt: skip

    if form == "persistent":
        run(0, num_gates, "matmul", norm=True, sync=True)
    for i in range(num_gates if form != "persistent" else 0):
        if form == "cublas":
            previous = states[i] if i else start
            linear = torch.mm(previous.to(weight.dtype), weight[i].T)
            run(i, i + 1, "given", norm=True, sync=True, linear=linear)
        else:
            run(i, i + 1, "matmul", norm=False)
            run(i, i + 1, "none", norm=True, num_warps=min(2 * tile.num_warps, 16))  # no accumulators, so more of them
    return Forward(weight, losses, factor, differences, states, gates, mean, rstd)


def backward(
    grads, grad_loss, factor, hidden, student, targets, weight, bias, norm_weight, norm_bias, states, gates, mean, rstd,
    row_mask, cu_seqlens, seq_len, need_student, need_hidden, need_parameters,
    logits: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward chain, from ``grads`` of positions 1 to n (None where there is none), or from the hidden
    losses' gradients; see :func:`lad_fast.kernels.ops.chain_loss_backward`. ``logits``: the logits' slope, its factor,
    and where to write their product."""
    plan = _Plan(hidden[0], weight.dtype, norm_weight, row_mask, cu_seqlens, seq_len)
    tile, choice = plan.choice.gemm, plan.choice
    tiling, num_gates, start = plan.tiling(tile), len(weight), hidden[0]
    given = [i + 1 for i, grad in enumerate(grads) if grad is not None]
    top = max(given + targets)  # gates above it get zeros
    float32 = {"dtype": torch.float32, "device": start.device}
    grad_student = [torch.empty_like(h) for h in student] if need_student else []
    grad_hidden = start.new_empty((num_gates + 1, *start.shape) if need_hidden else 0)
    grad_linear = start.new_empty((top, *start.shape), dtype=weight.dtype)

    # The (S, D) affine: one row a position. The (D,) affine: one row a program, summed at the end.
    rows = min(plan.num_tokens, choice.rows_per_sweep) if plan.per_token else plan.seq_len
    examples = triton.cdiv(plan.num_tokens, rows) if plan.per_token else plan.examples
    parts, programs = triton.cdiv(rows, choice.gate.rows), choice.programs(tile)
    work = parts * triton.cdiv(plan.hidden_size, choice.gate.columns)
    groups = max(1, min(examples, programs // work))
    sums = norm_parts = parameters = None
    if need_parameters:
        sums = torch.empty(top, groups * parts, plan.hidden_size, **float32)
        affine_rows = (groups * parts,) if plan.per_token else (groups, plan.seq_len)
        norm_parts = torch.empty(2, top, *affine_rows, plan.hidden_size, **float32)
        parameters = [torch.empty(shape, **float32) for shape in (weight.shape[:2], *[norm_weight.shape] * 2)]
    if top < num_gates:
        for grad in (grad_hidden[1:] if need_hidden else None, *(parameters or ())):
            if grad is not None:
                grad[top:].zero_()
    slope, grad_logits_loss, grad_logits = logits or (None, None, None)
    shared = {
        "logits_slope_ptr": slope, "grad_logits_loss_ptr": grad_logits_loss, "grad_logits_ptr": grad_logits,
        "logits_size": 0 if slope is None else slope.numel(), "grad_loss_ptr": grad_loss,
        "grad_loss_stride": grad_loss.stride(0) if targets else 0, "factor_ptr": factor, "states_ptr": states,
        "gates_ptr": gates[0] if gates else torch.empty_like(start), "weight_ptr": weight, "bias_ptr": bias,
        "norm_weight_ptr": norm_weight, "norm_bias_ptr": norm_bias, "norm_stride": norm_weight.stride(0),
        "mean_ptr": mean, "rstd_ptr": rstd, "carry_ptr": torch.empty_like(start), "grad_linear_ptr": grad_linear,
        "grad_layers_ptr": grad_hidden if need_hidden else None,
        "scaled_ptr": torch.empty(3, tiling["PIECES_SIZE"], **float32),
        "part_weight_ptr": norm_parts[0] if need_parameters else None,
        "part_norm_bias_ptr": norm_parts[1] if need_parameters else None, "part_bias_ptr": sums,
        "grad_norm_weight_ptr": parameters[1] if need_parameters else None,
        "grad_norm_bias_ptr": parameters[2] if need_parameters else None,
        "grad_bias_ptr": parameters[0] if need_parameters else None,
        "counters_ptr": lc.counters(start.device, 2), "top": top, **tiling, "ROWS_PER_EXAMPLE": rows,
        "EXAMPLES": examples, "GROUPS": groups, "RECOMPUTE": not gates, "NEED_STUDENT": need_student,
        "NEED_START": need_hidden or 0 in targets, "NEED_LAYERS": need_hidden, "NEED_PARAMETERS": need_parameters,
    }  # fmt: skip
    tiles = triton.cdiv(plan.num_tokens, tile.block_m) * triton.cdiv(plan.hidden_size, tile.block_n)

    def run(stages: str, programs: int, first: int, last: int, low: int, high: int, sync=False, **warps) -> None:
        """Launch stages first to last, which touch positions, or gates, low to high."""
        pointers = {"grads": None, "students": None, "grad_students": None, "slots": None, "given": 0, "compared": 0}
        layers = tuple(hidden[low + 1 : high + 2]) if stages in ("gate", "all") else None
        if stages in ("product", "all"):
            if any(low <= p <= high for p in given):
                pointers["grads"], pointers["given"] = _by_position([grads[p - 1] for p in given], given, low, high)
            if any(low <= p <= high for p in targets):
                pointers["students"], pointers["compared"] = _by_position(student, targets, low, high)
                pointers["slots"] = tuple(targets)
                if need_student:
                    pointers["grad_students"], _ = _by_position(grad_student, targets, low, high)
        lc.launch(
            _chain_bwd_kernel, (programs,), **pointers, layers=layers, first=first, last=last, base=low,
            STAGES=stages, SYNC=sync, ROWS=choice.gate.rows, COLUMNS=choice.gate.columns, **shared | warps,
            **lc.cooperative(tile if sync else None),
        )  # fmt: skip

    if choice.backward == "persistent":
        run("all", programs, 0, 2 * top + 1, 0, top, sync=True)
    else:
        for position in reversed(range(top + 1)):
            stage = 2 * (top - position)
            if position or shared["NEED_START"]:
                run("product", tiles, stage, stage + 1, position, position)
            if position:
                gate = position - 1
                run("gate", work * groups, stage + 1, stage + 2, gate, gate, num_warps=choice.gate.num_warps)
        if need_parameters:
            run("sums", programs, 2 * top, 2 * top + 1, 0, 0, num_warps=choice.gate.num_warps)
    if not need_parameters:
        return grad_student, grad_hidden, *(torch.empty(0, **float32) for _ in range(4))
    grad_weight = _weight_gradient(grad_linear, states[:top].to(weight.dtype))
    if top < num_gates:
        grad_weight = torch.cat((grad_weight, grad_weight.new_zeros(weight[top:].shape)))
    return grad_student, grad_hidden, grad_weight, *parameters


def _weight_gradient(grad_linear: Tensor, previous: Tensor) -> Tensor:
    """``du^T A_prev`` of all gates in one batched product, (n, D, D) float32."""
    if grad_linear.is_cuda and grad_linear.dtype != torch.float32:
        return torch.bmm(grad_linear.mT, previous, out_dtype=torch.float32)
    return torch.bmm(grad_linear.mT.float(), previous.float())

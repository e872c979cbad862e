"""The gate chain in Triton: one matrix product a gate, everything else in its epilogue or one pass beside it.

    g = sigmoid(A_prev W^T + b)      O = g * H + (1 - g) * A_prev      A = (O - mean) * rstd * gamma + beta

Statistics are over D ("token" norm) or over an example's real rows times D ("sequence" norm, published). The
product's epilogue leaves mean and centred square sum of each row's tile; merging those is a two-pass variance
without another pass over O, and without a difference of large sums. A row tile may hold several examples.

Backward, from dA = dL/dA, with n elements a group and sums over the group:

    xhat = (O - mean) * rstd         dxhat = dA * gamma          sum(dxhat * xhat) = sum(dA * (A - beta))
    dO = rstd * (dxhat - sum(dxhat) / n - xhat * sum(dxhat * xhat) / n)
    du = dO * (H - A_prev) * g * (1 - g)     dH = dO * g     dA_prev = dO * (1 - g) + du W
    dW = du^T A_prev     db = sum(du)     dgamma = sum(dA * xhat)     dbeta = sum(dA)

Bytes through the cache a gate, with T x D states of s bytes and D x D weights: forward reads 3 and writes 2 states
in the product (g, O), reads and writes one more in the norm; backward reads 4 and writes 2 (du, carry), then the
product reads 3 and writes 1. A launch never depends on the values: no host sync, safe under CUDA graphs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lad_fast.kernels import launch as lc


@triton.jit
def _swizzle(i_tile, T, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile coordinates in groups of GROUP_M row tiles, so that neighbours share weights in the cache."""
    tiles_m, tiles_n = tl.cdiv(T, BLOCK_M), tl.cdiv(D, BLOCK_N)
    i_group = i_tile // (GROUP_M * tiles_n)
    size = tl.minimum(tiles_m - i_group * GROUP_M, GROUP_M)
    i_inner = i_tile % (GROUP_M * tiles_n)
    return i_group * GROUP_M + i_inner % size, i_inner // size


@triton.jit
def _matmul(
    a_ptr,  # (T, D) operand, read along D
    b_ptr,  # (D, D) operand
    o_rows,  # (BLOCK_M,) int64 row numbers, inside T
    o_cols,  # (BLOCK_N,) column numbers of the result, inside D
    D,
    TRANSPOSED: tl.constexpr,  # whether the result is a b^T
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32 tile of a b or a b^T, operands in b's dtype."""
    o_k = tl.arange(0, BLOCK_K)
    p_a = a_ptr + o_rows[:, None] * D + o_k[None, :]
    if TRANSPOSED:
        p_b = b_ptr + o_cols[None, :] * D + o_k[:, None]
    else:
        p_b = b_ptr + o_k[:, None] * D + o_cols[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in range(0, D, BLOCK_K):
        if EVEN_K:
            b_a, b_b = tl.load(p_a), tl.load(p_b)
        else:
            m_k = o_k < D - i_k
            b_a = tl.load(p_a, mask=m_k[None, :], other=0.0)  # zeros add nothing to the sum
            b_b = tl.load(p_b, mask=m_k[:, None], other=0.0)
        b_a = b_a.to(b_b.dtype)
        if INTERPRETED:  # it keeps bfloat16 as uint16 and would multiply those
            b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=INPUT_PRECISION)
        p_a += BLOCK_K
        p_b += BLOCK_K if TRANSPOSED else BLOCK_K * D
    return b_sum


@triton.jit
def _gate_fwd_kernel(
    previous_ptr,  # (T, D) A_prev
    layer_ptr,  # (T, D) H
    weight_ptr,  # (D, D) W in the product's dtype
    bias_ptr,  # (D,) float32
    gate_ptr,  # (T, D) out g, where KEEP_GATES
    blend_ptr,  # (T, D) out O
    tile_mean_ptr,  # (T, TILES) float32 out, mean of a row's tile of O
    tile_m2_ptr,  # (T, TILES) float32 out, its centred square sum
    T,
    D,
    TILES,
    KEEP_GATES: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    i_m, i_n = _swizzle(tl.program_id(0), T, D, BLOCK_M, BLOCK_N, GROUP_M)
    o_rows = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_cols = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns past the end repeat the last one: no mask in the hot loop; they are not stored.
    b_sum = _matmul(
        previous_ptr, weight_ptr, tl.minimum(o_rows, T - 1), tl.minimum(o_cols, D - 1), D,
        True, EVEN_K, INPUT_PRECISION, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    m_cols = o_cols < D
    o_tile = o_rows[:, None] * D + o_cols[None, :]
    m_tile = (o_rows < T)[:, None] & m_cols[None, :]
    b_bias = tl.load(bias_ptr + o_cols, mask=m_cols, other=0.0)
    b_gate = tl.sigmoid(b_sum + b_bias[None, :])
    if KEEP_GATES:
        tl.store(gate_ptr + o_tile, b_gate.to(gate_ptr.dtype.element_ty), mask=m_tile)
    b_previous = tl.load(previous_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_layer = tl.load(layer_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_blend = b_previous + b_gate * (b_layer - b_previous)
    tl.store(blend_ptr + o_tile, b_blend.to(blend_ptr.dtype.element_ty), mask=m_tile)

    width = tl.minimum(BLOCK_N, D - i_n * BLOCK_N).to(tl.float32)
    b_mean = tl.sum(tl.where(m_cols[None, :], b_blend, 0.0), axis=1) / width
    b_centered = tl.where(m_cols[None, :], b_blend - b_mean[:, None], 0.0)
    o_stat = o_rows * TILES + i_n
    tl.store(tile_mean_ptr + o_stat, b_mean, mask=o_rows < T)
    tl.store(tile_m2_ptr + o_stat, tl.sum(b_centered * b_centered, axis=1), mask=o_rows < T)


@triton.jit
def _example_bounds(cu_seqlens_ptr, i_example, T, S, PACKED: tl.constexpr):
    """First row and number of rows of an example."""
    if PACKED:
        start = tl.load(cu_seqlens_ptr + i_example)
        return start.to(tl.int64), tl.load(cu_seqlens_ptr + i_example + 1) - start
    else:
        return tl.cast(i_example, tl.int64) * S, tl.minimum(S, T - i_example * S)


@triton.jit
def _norm_fwd_kernel(
    state_ptr,  # (T, D) in O, out A
    tile_mean_ptr,  # (T, TILES) float32
    tile_m2_ptr,  # (T, TILES) float32
    mask_ptr,  # (T,) bool, where MASKED
    cu_seqlens_ptr,  # (E + 1,) int32, where PACKED
    norm_weight_ptr,  # (S, D) or (D,) float32
    norm_bias_ptr,  # (S, D) or (D,) float32
    mean_ptr,  # (E,) or (T,) float32 out
    rstd_ptr,  # (E,) or (T,) float32 out
    T,
    S,  # rows of the affine; PER_TOKEN: T
    D,
    TILES,
    eps,
    PER_TOKEN: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_chunk, i_example = tl.program_id(0), tl.program_id(1)
    start, length = _example_bounds(cu_seqlens_ptr, i_example, T, S, PACKED)
    if i_chunk * ROWS >= length:
        return
    o_tiles = tl.arange(0, BLOCK_TILES)
    width = tl.maximum(tl.minimum(TILE_WIDTH, D - o_tiles * TILE_WIDTH), 0).to(tl.float32)[None, :]
    o_local = i_chunk * ROWS + tl.arange(0, ROWS)
    o_rows = start + o_local
    m_rows = o_local < length

    if PER_TOKEN:
        o_stat = o_rows[:, None] * TILES + o_tiles[None, :]
        m_stat = m_rows[:, None] & (o_tiles < TILES)[None, :]
        b_tile_mean = tl.load(tile_mean_ptr + o_stat, mask=m_stat, other=0.0)
        b_tile_m2 = tl.load(tile_m2_ptr + o_stat, mask=m_stat, other=0.0)
        mean = tl.sum(b_tile_mean * width, axis=1) / D
        b_shift = b_tile_mean - mean[:, None]
        variance = tl.sum(b_tile_m2 + width * b_shift * b_shift, axis=1) / D
        rstd = tl.rsqrt(variance + eps)
        tl.store(mean_ptr + o_rows, mean, mask=m_rows)
        tl.store(rstd_ptr + o_rows, rstd, mask=m_rows)
        mean, rstd = mean[:, None], rstd[:, None]
    else:
        total, rows = 0.0, 0.0
        for i_row in range(0, length, MERGE_ROWS):
            o_merge = i_row + tl.arange(0, MERGE_ROWS)
            m_real = o_merge < length
            if MASKED:
                m_real = m_real & (tl.load(mask_ptr + start + o_merge, mask=m_real, other=0) != 0)
            o_stat = (start + o_merge)[:, None] * TILES + o_tiles[None, :]
            m_stat = m_real[:, None] & (o_tiles < TILES)[None, :]
            total += tl.sum(tl.load(tile_mean_ptr + o_stat, mask=m_stat, other=0.0) * width)
            rows += tl.sum(m_real.to(tl.float32))
        count = tl.maximum(rows, 1.0) * D
        if PACKED:  # nobody read the bounds on the host: a too long example must not pass in silence
            count = tl.where(length > S, float("nan"), count)
        mean = total / count
        m2 = 0.0
        for i_row in range(0, length, MERGE_ROWS):
            o_merge = i_row + tl.arange(0, MERGE_ROWS)
            m_real = o_merge < length
            if MASKED:
                m_real = m_real & (tl.load(mask_ptr + start + o_merge, mask=m_real, other=0) != 0)
            o_stat = (start + o_merge)[:, None] * TILES + o_tiles[None, :]
            m_stat = m_real[:, None] & (o_tiles < TILES)[None, :]
            b_shift = tl.load(tile_mean_ptr + o_stat, mask=m_stat, other=mean) - mean
            m2 += tl.sum(tl.load(tile_m2_ptr + o_stat, mask=m_stat, other=0.0) + width * b_shift * b_shift)
        rstd = tl.rsqrt(m2 / count + eps)
        if i_chunk == 0:
            tl.store(mean_ptr + i_example, mean)
            tl.store(rstd_ptr + i_example, rstd)

    m_real = m_rows
    if MASKED:
        m_real = m_rows & (tl.load(mask_ptr + o_rows, mask=m_rows, other=0) != 0)
    m_affine = m_rows & (o_local < S)
    for i_col in range(0, D, COLUMNS):
        o_cols = i_col + tl.arange(0, COLUMNS)
        m_cols = (o_cols < D)[None, :]
        o_tile = o_rows[:, None] * D + o_cols[None, :]
        if PER_TOKEN:
            b_weight = tl.load(norm_weight_ptr + o_cols, mask=o_cols < D, other=0.0)[None, :]
            b_bias = tl.load(norm_bias_ptr + o_cols, mask=o_cols < D, other=0.0)[None, :]
        else:
            o_affine = o_local[:, None] * D + o_cols[None, :]
            b_weight = tl.load(norm_weight_ptr + o_affine, mask=m_affine[:, None] & m_cols, other=0.0)
            b_bias = tl.load(norm_bias_ptr + o_affine, mask=m_affine[:, None] & m_cols, other=0.0)
        b_blend = tl.load(state_ptr + o_tile, mask=m_rows[:, None] & m_cols, other=0.0).to(tl.float32)
        b_state = (b_blend - mean) * rstd * b_weight + b_bias
        b_state = tl.where(m_real[:, None], b_state, 0.0)
        tl.store(state_ptr + o_tile, b_state.to(state_ptr.dtype.element_ty), mask=m_rows[:, None] & m_cols)


@triton.jit
def _norm_bwd_row_sums(
    b_grad,  # (BLOCK_M, BLOCK_N) float32 dA, zero outside the tensor and on padding
    state_ptr,  # (T, D) A
    norm_weight_ptr,  # (S, D) or (D,)
    norm_bias_ptr,  # (S, D) or (D,)
    position_ptr,  # (T,) int32 row of the affine, where PACKED
    scaled_ptr,  # (T, TILES) float32 out, sums of dA * gamma
    product_ptr,  # (T, TILES) float32 out, sums of dA * (A - beta)
    o_rows,
    o_cols,
    i_n,
    T,
    S,
    D,
    TILES,
    PER_TOKEN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """A tile's part of the two sums that a layer norm's backward needs."""
    m_rows, m_cols = o_rows < T, o_cols < D
    m_tile = m_rows[:, None] & m_cols[None, :]
    if PER_TOKEN:
        b_weight = tl.load(norm_weight_ptr + o_cols, mask=m_cols, other=0.0)[None, :]
        b_bias = tl.load(norm_bias_ptr + o_cols, mask=m_cols, other=0.0)[None, :]
    else:
        if PACKED:
            position = tl.load(position_ptr + o_rows, mask=m_rows, other=0)
        else:
            position = (o_rows % S).to(tl.int32)
        o_affine = position[:, None] * D + o_cols[None, :]
        b_weight = tl.load(norm_weight_ptr + o_affine, mask=m_tile, other=0.0)
        b_bias = tl.load(norm_bias_ptr + o_affine, mask=m_tile, other=0.0)
    b_state = tl.load(state_ptr + o_rows[:, None] * D + o_cols[None, :], mask=m_tile, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + o_rows * TILES + i_n, tl.sum(b_grad * b_weight, axis=1), mask=m_rows)
    tl.store(product_ptr + o_rows * TILES + i_n, tl.sum(b_grad * (b_state - b_bias), axis=1), mask=m_rows)


@triton.jit
def _norm_bwd_sums_kernel(
    grad_ptr,  # (T, D) dA of the chain's last aggregate
    state_ptr,  # (T, D) A
    norm_weight_ptr,
    norm_bias_ptr,
    mask_ptr,  # (T,) bool, where MASKED
    position_ptr,  # (T,) int32, where PACKED
    carry_ptr,  # (T, D) out: dA, zero on padding
    scaled_ptr,  # (T, TILES) float32 out
    product_ptr,  # (T, TILES) float32 out
    T,
    S,
    D,
    TILES,
    PER_TOKEN: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where the backward chain starts; further down the product's epilogue does this."""
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_rows = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_cols = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_tile = o_rows[:, None] * D + o_cols[None, :]
    m_tile = (o_rows < T)[:, None] & (o_cols < D)[None, :]
    b_grad = tl.load(grad_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    if MASKED:
        m_real = tl.load(mask_ptr + o_rows, mask=o_rows < T, other=0) != 0
        b_grad = tl.where(m_real[:, None], b_grad, 0.0)
    tl.store(carry_ptr + o_tile, b_grad.to(carry_ptr.dtype.element_ty), mask=m_tile)
    _norm_bwd_row_sums(
        b_grad, state_ptr, norm_weight_ptr, norm_bias_ptr, position_ptr, scaled_ptr, product_ptr, o_rows, o_cols, i_n,
        T, S, D, TILES, PER_TOKEN, PACKED,
    )  # fmt: skip


@triton.jit
def _example_means_kernel(
    scaled_ptr,  # (T, TILES) float32
    product_ptr,  # (T, TILES) float32
    mask_ptr,  # (T,) bool, where MASKED
    cu_seqlens_ptr,  # (E + 1,) int32, where PACKED
    mean_scaled_ptr,  # (E,) float32 out
    mean_product_ptr,  # (E,) float32 out
    T,
    S,
    D,
    TILES,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
):
    """Row tiles' sums to means over an example's elements ("sequence" norm)."""
    i_example = tl.program_id(0)
    start, length = _example_bounds(cu_seqlens_ptr, i_example, T, S, PACKED)
    o_tiles = tl.arange(0, BLOCK_TILES)
    scaled, product, rows = 0.0, 0.0, 0.0
    for i_row in range(0, length, MERGE_ROWS):
        o_merge = i_row + tl.arange(0, MERGE_ROWS)
        m_real = o_merge < length
        o_stat = (start + o_merge)[:, None] * TILES + o_tiles[None, :]
        m_stat = m_real[:, None] & (o_tiles < TILES)[None, :]
        scaled += tl.sum(tl.load(scaled_ptr + o_stat, mask=m_stat, other=0.0))
        product += tl.sum(tl.load(product_ptr + o_stat, mask=m_stat, other=0.0))
        if MASKED:  # padding's sums are zero already, but it does not count
            m_real = m_real & (tl.load(mask_ptr + start + o_merge, mask=m_real, other=0) != 0)
        rows += tl.sum(m_real.to(tl.float32))
    count = tl.maximum(rows, 1.0) * D
    tl.store(mean_scaled_ptr + i_example, scaled / count)
    tl.store(mean_product_ptr + i_example, product / count)


@triton.jit
def _gate_bwd_kernel(
    carry_ptr,  # (T, D) in dA, zero on padding; out dO * (1 - g), the part of dA_prev beside the product
    previous_ptr,  # (T, D) A_prev
    layer_ptr,  # (T, D) H
    gate_ptr,  # (T, D) g
    norm_weight_ptr,  # (S, D) or (D,) float32
    mean_ptr,  # (E,) or (T,) float32
    rstd_ptr,  # (E,) or (T,) float32
    scaled_ptr,  # (E,) means of dA * gamma; PER_TOKEN: (T, TILES) sums
    product_ptr,  # (E,) means of dA * gamma * xhat; PER_TOKEN: (T, TILES) sums
    mask_ptr,  # (T,) bool, where MASKED
    cu_seqlens_ptr,  # (E + 1,) int32, where PACKED
    grad_linear_ptr,  # (T, D) out du in the product's dtype
    grad_layer_ptr,  # (T, D) out dH, where NEED_LAYER
    part_weight_ptr,  # (S, D), PER_TOKEN: (programs, D) float32 out, sums of dgamma, where NEED_PARAMETERS
    part_norm_bias_ptr,  # the same for dbeta
    part_bias_ptr,  # (programs, D) float32 out, sums of db
    T,
    S,  # rows an example; PER_TOKEN: rows a sweep
    E,  # examples or sweeps
    D,
    TILES,
    PER_TOKEN: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    NEED_LAYER: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """All element-wise work of a gate's backward. A program owns ROWS positions and walks over the examples, so that
    the (S, D) affine's gradients are summed in registers, in a fixed order."""
    i_part = tl.program_id(0)
    o_local = i_part * ROWS + tl.arange(0, ROWS)
    o_cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_cols = o_cols < D
    o_tiles = tl.arange(0, BLOCK_TILES)
    o_affine = o_local[:, None] * D + o_cols[None, :]
    m_affine = (o_local < S)[:, None] & m_cols[None, :]
    if PER_TOKEN:
        b_weight = tl.load(norm_weight_ptr + o_cols, mask=m_cols, other=0.0)[None, :]
    else:
        b_weight = tl.load(norm_weight_ptr + o_affine, mask=m_affine, other=0.0)
    b_grad_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    b_grad_norm_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    b_grad_bias = tl.zeros((ROWS, COLUMNS), tl.float32)

    for i_example in range(0, E):
        start, length = _example_bounds(cu_seqlens_ptr, i_example, T, S, PACKED)
        o_rows = start + o_local
        m_rows = (o_local < length) & (o_local < S)
        m_tile = m_rows[:, None] & m_cols[None, :]
        o_tile = o_rows[:, None] * D + o_cols[None, :]
        if PER_TOKEN:
            mean = tl.load(mean_ptr + o_rows, mask=m_rows, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + o_rows, mask=m_rows, other=0.0)[:, None]
            o_stat = o_rows[:, None] * TILES + o_tiles[None, :]
            m_stat = m_rows[:, None] & (o_tiles < TILES)[None, :]
            scaled = tl.sum(tl.load(scaled_ptr + o_stat, mask=m_stat, other=0.0), axis=1)[:, None] / D
            product = tl.sum(tl.load(product_ptr + o_stat, mask=m_stat, other=0.0), axis=1)[:, None] / D
        else:
            mean, rstd = tl.load(mean_ptr + i_example), tl.load(rstd_ptr + i_example)
            scaled, product = tl.load(scaled_ptr + i_example), tl.load(product_ptr + i_example)
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
        tl.store(grad_linear_ptr + o_tile, b_grad_linear.to(grad_linear_ptr.dtype.element_ty), mask=m_tile)
        tl.store(carry_ptr + o_tile, (b_grad_blend * (1.0 - b_gate)).to(carry_ptr.dtype.element_ty), mask=m_tile)
        if NEED_LAYER:
            tl.store(grad_layer_ptr + o_tile, (b_grad_blend * b_gate).to(grad_layer_ptr.dtype.element_ty), mask=m_tile)
        if NEED_PARAMETERS:
            b_grad_weight += tl.where(m_real, b_grad * b_normalized, 0.0)
            b_grad_norm_bias += b_grad
            b_grad_bias += b_grad_linear

    if NEED_PARAMETERS:
        o_part = i_part * D + o_cols
        tl.store(part_bias_ptr + o_part, tl.sum(b_grad_bias, axis=0), mask=m_cols)
        if PER_TOKEN:
            tl.store(part_weight_ptr + o_part, tl.sum(b_grad_weight, axis=0), mask=m_cols)
            tl.store(part_norm_bias_ptr + o_part, tl.sum(b_grad_norm_bias, axis=0), mask=m_cols)
        else:
            tl.store(part_weight_ptr + o_affine, b_grad_weight, mask=m_affine)
            tl.store(part_norm_bias_ptr + o_affine, b_grad_norm_bias, mask=m_affine)


@triton.jit
def _gate_bwd_matmul_kernel(
    grad_linear_ptr,  # (T, D) du in the product's dtype
    weight_ptr,  # (D, D) W
    carry_ptr,  # (T, D) in dO * (1 - g), out dA_prev
    grad_ptr,  # (T, D) dA_prev from the caller, where HAS_GRAD
    state_ptr,  # (T, D) A_prev, where HAS_NORM
    norm_weight_ptr,  # affine of the norm that made A_prev, where HAS_NORM
    norm_bias_ptr,
    mask_ptr,  # (T,) bool, where MASKED
    position_ptr,  # (T,) int32, where PACKED
    scaled_ptr,  # (T, TILES) float32 out, where HAS_NORM
    product_ptr,  # (T, TILES) float32 out, where HAS_NORM
    T,
    S,
    D,
    TILES,
    HAS_GRAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    i_m, i_n = _swizzle(tl.program_id(0), T, D, BLOCK_M, BLOCK_N, GROUP_M)
    o_rows = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_cols = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = _matmul(
        grad_linear_ptr, weight_ptr, tl.minimum(o_rows, T - 1), tl.minimum(o_cols, D - 1), D,
        False, EVEN_K, INPUT_PRECISION, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    o_tile = o_rows[:, None] * D + o_cols[None, :]
    m_tile = (o_rows < T)[:, None] & (o_cols < D)[None, :]
    b_sum += tl.load(carry_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    if HAS_GRAD:
        b_sum += tl.load(grad_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    m_real = m_tile
    if MASKED:
        m_real = m_tile & (tl.load(mask_ptr + o_rows, mask=o_rows < T, other=0) != 0)[:, None]
    b_sum = tl.where(m_real, b_sum, 0.0)
    tl.store(carry_ptr + o_tile, b_sum.to(carry_ptr.dtype.element_ty), mask=m_tile)
    if HAS_NORM:
        _norm_bwd_row_sums(
            b_sum, state_ptr, norm_weight_ptr, norm_bias_ptr, position_ptr, scaled_ptr, product_ptr, o_rows, o_cols,
            i_n, T, S, D, TILES, PER_TOKEN, PACKED,
        )  # fmt: skip


class _Plan:
    """Sizes and settings that all launches of one call share."""

    def __init__(self, state: Tensor, weight: Tensor, norm_weight: Tensor, row_mask, cu_seqlens, seq_len: int):
        self.num_tokens, self.hidden_size = state.shape
        self.per_token = norm_weight.dim() == 2
        self.packed = cu_seqlens is not None and not self.per_token
        self.row_mask, self.cu_seqlens = row_mask, cu_seqlens if self.packed else None
        self.seq_len = self.num_tokens if self.per_token else norm_weight.shape[1]
        if self.per_token:
            self.examples = 1
        else:
            self.examples = cu_seqlens.shape[0] - 1 if self.packed else self.num_tokens // seq_len
        self.gemm = lc.gemm(state.device, state.dtype, weight.dtype)
        self.tiles = triton.cdiv(self.hidden_size, self.gemm.block_n)
        self.sizes = {"T": self.num_tokens, "D": self.hidden_size, "TILES": self.tiles}
        self.mode = {"PER_TOKEN": self.per_token, "PACKED": self.packed}
        self.merge = {"BLOCK_TILES": triton.next_power_of_2(self.tiles)}
        self.gemm_grid = (triton.cdiv(self.num_tokens, self.gemm.block_m) * self.tiles,)
        self.gemm_settings = {
            "EVEN_K": self.hidden_size % self.gemm.block_k == 0,
            "INPUT_PRECISION": lc.matmul_precision(weight.dtype),
            "INTERPRETED": lc.interpreted(),
            "BLOCK_M": self.gemm.block_m,
            "BLOCK_N": self.gemm.block_n,
            "BLOCK_K": self.gemm.block_k,
            "GROUP_M": self.gemm.group_m,
            "num_warps": self.gemm.num_warps,
            "num_stages": self.gemm.num_stages,
        }


_MERGE_ROWS = 32


def aggregate_forward(
    hidden, weight, bias, norm_weight, norm_bias, row_mask, cu_seqlens, seq_len, eps, keep_gates
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Launch n gates; see :func:`lad_fast.kernels.ops.aggregate_forward`."""
    plan = _Plan(hidden[0], weight, norm_weight, row_mask, cu_seqlens, seq_len)
    num_gates, state = len(weight), hidden[0]
    aggregates = state.new_empty((num_gates, *state.shape))
    gates = [torch.empty_like(state) for _ in range(num_gates if keep_gates else 0)]
    groups = plan.num_tokens if plan.per_token else plan.examples
    mean = state.new_empty((num_gates, groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    tile_mean = state.new_empty((plan.num_tokens, plan.tiles), dtype=torch.float32)
    tile_m2 = torch.empty_like(tile_mean)
    longest = min(plan.num_tokens, plan.seq_len)
    previous = hidden[0]
    for i in range(num_gates):
        lc.launch(
            _gate_fwd_kernel, plan.gemm_grid,
            previous_ptr=previous, layer_ptr=hidden[i + 1], weight_ptr=weight[i], bias_ptr=bias[i],
            gate_ptr=gates[i] if keep_gates else None, blend_ptr=aggregates[i],
            tile_mean_ptr=tile_mean, tile_m2_ptr=tile_m2,
            **plan.sizes, KEEP_GATES=keep_gates, **plan.gemm_settings,
        )  # fmt: skip
        lc.launch(
            _norm_fwd_kernel, (triton.cdiv(longest, lc.NORM.rows), plan.examples),
            state_ptr=aggregates[i], tile_mean_ptr=tile_mean, tile_m2_ptr=tile_m2,
            mask_ptr=row_mask, cu_seqlens_ptr=plan.cu_seqlens,
            norm_weight_ptr=norm_weight[i], norm_bias_ptr=norm_bias[i], mean_ptr=mean[i], rstd_ptr=rstd[i],
            **plan.sizes, S=plan.seq_len, eps=eps,
            **plan.mode, MASKED=row_mask is not None, **plan.merge,
            TILE_WIDTH=plan.gemm.block_n, MERGE_ROWS=_MERGE_ROWS, ROWS=lc.NORM.rows, COLUMNS=lc.NORM.columns,
            num_warps=lc.NORM.num_warps,
        )  # fmt: skip
        previous = aggregates[i]
    return aggregates, gates, mean, rstd


def aggregate_backward(
    grads, hidden, weight, norm_weight, norm_bias, aggregates, gates, mean, rstd, row_mask, cu_seqlens, seq_len,
    need_hidden, need_parameters,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward chain; see :func:`lad_fast.kernels.ops.aggregate_backward`."""
    plan = _Plan(hidden[0], weight, norm_weight, row_mask, cu_seqlens, seq_len)
    num_gates, state = len(weight), hidden[0]
    top = max(i for i, grad in enumerate(grads) if grad is not None)  # gates above it get zeros
    float32 = {"dtype": torch.float32, "device": state.device}
    grad_hidden = state.new_empty((num_gates + 1, *state.shape) if need_hidden else 0)
    if need_hidden:
        grad_hidden[top + 2 :].zero_()

    # The (S, D) affine: one row a position. The (D,) affine: one row a program, summed at the end.
    rows = min(plan.num_tokens, lc.TOKENS_PER_SWEEP) if plan.per_token else plan.seq_len
    sweeps = triton.cdiv(plan.num_tokens, rows) if plan.per_token else plan.examples
    parts = triton.cdiv(rows, lc.GATE_BACKWARD.rows)
    affine_rows = parts if plan.per_token else plan.seq_len
    active = (top + 1) if need_parameters else 0
    part_weight = torch.empty(active, affine_rows, plan.hidden_size, **float32)
    part_norm_bias = torch.empty_like(part_weight)
    part_bias = torch.empty(active, parts, plan.hidden_size, **float32)

    scaled = torch.empty(plan.num_tokens, plan.tiles, **float32)
    product = torch.empty_like(scaled)
    mean_scaled, mean_product = scaled, product
    if not plan.per_token:
        mean_scaled = torch.empty(plan.examples, **float32)
        mean_product = torch.empty_like(mean_scaled)
    grad_linear = state.new_empty((top + 1, *state.shape), dtype=weight.dtype)
    carry = torch.empty_like(state)
    position = _positions(plan, state.device)
    masked = {"MASKED": row_mask is not None}

    lc.launch(
        _norm_bwd_sums_kernel, (triton.cdiv(plan.num_tokens, plan.gemm.block_m), plan.tiles),
        grad_ptr=grads[top], state_ptr=aggregates[top], norm_weight_ptr=norm_weight[top], norm_bias_ptr=norm_bias[top],
        mask_ptr=row_mask, position_ptr=position, carry_ptr=carry, scaled_ptr=scaled, product_ptr=product,
        **plan.sizes, S=plan.seq_len, **plan.mode, **masked,
        BLOCK_M=plan.gemm.block_m, BLOCK_N=plan.gemm.block_n, num_warps=plan.gemm.num_warps,
    )  # fmt: skip
    for i in reversed(range(top + 1)):
        if not plan.per_token:
            lc.launch(
                _example_means_kernel, (plan.examples,),
                scaled_ptr=scaled, product_ptr=product, mask_ptr=row_mask, cu_seqlens_ptr=plan.cu_seqlens,
                mean_scaled_ptr=mean_scaled, mean_product_ptr=mean_product,
                **plan.sizes, S=plan.seq_len, PACKED=plan.packed, **masked, **plan.merge, MERGE_ROWS=_MERGE_ROWS,
                num_warps=lc.NORM.num_warps,
            )  # fmt: skip
        lc.launch(
            _gate_bwd_kernel, (parts, triton.cdiv(plan.hidden_size, lc.GATE_BACKWARD.columns)),
            carry_ptr=carry, previous_ptr=aggregates[i - 1] if i else hidden[0], layer_ptr=hidden[i + 1],
            gate_ptr=gates[i], norm_weight_ptr=norm_weight[i], mean_ptr=mean[i], rstd_ptr=rstd[i],
            scaled_ptr=mean_scaled, product_ptr=mean_product, mask_ptr=row_mask, cu_seqlens_ptr=plan.cu_seqlens,
            grad_linear_ptr=grad_linear[i], grad_layer_ptr=grad_hidden[i + 1] if need_hidden else None,
            part_weight_ptr=part_weight[i] if need_parameters else None,
            part_norm_bias_ptr=part_norm_bias[i] if need_parameters else None,
            part_bias_ptr=part_bias[i] if need_parameters else None,
            **plan.sizes, S=rows, E=sweeps, **plan.mode, **masked, **plan.merge,
            NEED_LAYER=need_hidden, NEED_PARAMETERS=need_parameters,
            ROWS=lc.GATE_BACKWARD.rows, COLUMNS=lc.GATE_BACKWARD.columns, num_warps=lc.GATE_BACKWARD.num_warps,
        )  # fmt: skip
        if i == 0 and not need_hidden:
            break
        below = i - 1
        lc.launch(
            _gate_bwd_matmul_kernel, plan.gemm_grid,
            grad_linear_ptr=grad_linear[i], weight_ptr=weight[i], carry_ptr=carry,
            grad_ptr=grads[below] if i else None, state_ptr=aggregates[below] if i else None,
            norm_weight_ptr=norm_weight[below] if i else None, norm_bias_ptr=norm_bias[below] if i else None,
            mask_ptr=row_mask, position_ptr=position, scaled_ptr=scaled if i else None,
            product_ptr=product if i else None,
            **plan.sizes, S=plan.seq_len, HAS_GRAD=i > 0 and grads[below] is not None, HAS_NORM=i > 0,
            **plan.mode, **masked, **plan.gemm_settings,
        )  # fmt: skip
    if need_hidden:
        grad_hidden[0].copy_(carry)
    if not need_parameters:
        return grad_hidden, *(torch.empty(0, **float32) for _ in range(4))

    grad_weight = torch.zeros(weight.shape, **float32)
    grad_bias, grad_norm_weight = torch.zeros(weight.shape[:2], **float32), torch.zeros_like(norm_weight)
    grad_norm_bias = torch.zeros_like(norm_bias)
    previous = aggregates[:top].to(weight.dtype)
    grad_weight[0] = _weight_grad(grad_linear[:1], hidden[0].to(weight.dtype)[None])[0]
    if top:
        grad_weight[1 : top + 1] = _weight_grad(grad_linear[1:], previous)
    grad_bias[: top + 1] = part_bias.sum(dim=1)
    grad_norm_weight[: top + 1] = part_weight.sum(dim=1) if plan.per_token else part_weight
    grad_norm_bias[: top + 1] = part_norm_bias.sum(dim=1) if plan.per_token else part_norm_bias
    return grad_hidden, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias


def _positions(plan: _Plan, device: torch.device) -> Tensor | None:
    """(T,) int32 row of the affine for each packed token."""
    if not plan.packed:
        return None
    rows = torch.arange(plan.num_tokens, dtype=torch.int32, device=device)
    example = torch.searchsorted(plan.cu_seqlens[1:].contiguous(), rows, right=True)
    return (rows - plan.cu_seqlens[example]).clamp_(max=plan.seq_len - 1)


def _weight_grad(grad_linear: Tensor, previous: Tensor) -> Tensor:
    """(n, D, D) float32 ``du^T A_prev`` of n gates in one batched product."""
    if grad_linear.is_cuda and grad_linear.dtype != torch.float32:
        return torch.bmm(grad_linear.mT, previous, out_dtype=torch.float32)
    return torch.bmm(grad_linear.mT.float(), previous.float())

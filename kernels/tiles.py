"""What the chain's forward and backward kernels share: tiles, products, examples, and how programs wait for others."""

import triton
import triton.language as tl


@triton.jit
def swizzle(i_tile, T, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile coordinates in groups of GROUP_M row tiles, so that neighbours share weights in the cache."""
    tiles_m, tiles_n = tl.cdiv(T, BLOCK_M), tl.cdiv(D, BLOCK_N)
    i_group = i_tile // (GROUP_M * tiles_n)
    size = tl.minimum(tiles_m - i_group * GROUP_M, GROUP_M)
    i_inner = i_tile % (GROUP_M * tiles_n)
    return i_group * GROUP_M + i_inner % size, i_inner // size


@triton.jit
def matmul(
    a_ptr,  # (T, D) operand, read along D
    b_ptr,  # (D, D) operand
    o_rows,  # (BLOCK_M,) int64 row numbers
    o_cols,  # (BLOCK_N,) column numbers of the result
    T,
    D,
    K,  # D, or 0 for no product
    TRANSPOSED: tl.constexpr,  # whether the result is a b^T
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32 tile of a b or a b^T, operands in b's dtype."""
    # Rows past the end repeat the last one, columns the first ones: no mask in the hot loop, and nobody stores them. A
    # minimum would hide from the compiler that columns lie side by side.
    o_rows, o_cols = tl.minimum(o_rows, T - 1), o_cols % D
    o_k = tl.arange(0, BLOCK_K)
    p_a = a_ptr + o_rows[:, None] * D + o_k[None, :]
    if TRANSPOSED:
        p_b = b_ptr + o_cols[None, :] * D + o_k[:, None]
    else:
        p_b = b_ptr + o_k[:, None] * D + o_cols[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in range(0, K, BLOCK_K):
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
def halves(b_tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns. Handled one after the other, they need half the registers."""
    b_tile = tl.permute(tl.reshape(b_tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    return tl.split(b_tile)


@triton.jit
def pick(pointers, i):
    """One of a tuple's pointers, by a number known at run time only."""
    pointer = pointers[0]
    for j in tl.static_range(1, len(pointers)):
        if i == j:
            pointer = pointers[j]
    return pointer


@triton.jit
def gate_of(ptr, i, size):
    """Where entry ``i`` of a stack begins; int64, since a stack may pass 2^31 elements."""
    return ptr + tl.cast(i, tl.int64) * size


@triton.jit
def _example_of(cu_seqlens_ptr, row, E):
    """The packed example that holds a row: the last one that begins at or before it."""
    low, high = 0, E
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) <= row:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def examples_between(cu_seqlens_ptr, first_row, last_row, S, E, PACKED: tl.constexpr):
    """The first and the last example with rows between two."""
    if PACKED:
        return _example_of(cu_seqlens_ptr, first_row, E), _example_of(cu_seqlens_ptr, last_row, E)
    else:
        return first_row // S, last_row // S


@triton.jit
def example_bounds(cu_seqlens_ptr, i_example, T, S, PACKED: tl.constexpr):
    """First row and number of rows of an example."""
    if PACKED:
        start = tl.load(cu_seqlens_ptr + i_example)
        return start, tl.load(cu_seqlens_ptr + i_example + 1) - start
    else:
        return i_example * S, tl.minimum(S, T - i_example * S)


@triton.jit
def inside(start, length, T, PACKED: tl.constexpr):
    """First row and number of those rows of an example that there are: nobody has read packed bounds."""
    if PACKED:
        end = tl.minimum(start + length, T)
        start = tl.maximum(start, 0)
        length = end - start
    return start, length


@triton.jit
def piece_block(start, length, i_example, STRIPS, BLOCK_M: tl.constexpr, PIECES: tl.constexpr, BLOCK_S: tl.constexpr):
    """Offsets and mask of an example's pieces: its sums in each row tile and strip of columns that it lies in.

    Along the rows either the row tile or the example changes, so ``row tile + example`` numbers the pieces.
    """
    first, last = start // BLOCK_M, (start + length - 1) // BLOCK_M
    o_piece = first + tl.arange(0, PIECES)
    o_strips = tl.arange(0, BLOCK_S)
    m_piece = (o_piece <= last)[:, None] & (o_strips < STRIPS)[None, :]
    return (o_piece + i_example)[:, None] * STRIPS + o_strips[None, :], m_piece


@triton.jit
def arrive(counter_ptr):
    """Count this program, once all its threads have written; returns how many had come before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def wait(counter_ptr, target):
    """Until so many have arrived; returns how many have. What they wrote before is then visible here.

    Only in cooperative launches: all programs run at once.
    """
    arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while arrived < target:
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return arrived


@triton.jit
def clear(counters_ptr, size):
    """The last program leaves the counters as it found them: zero, for the next launch."""
    for i in range(0, size, 256):
        o_block = i + tl.arange(0, 256)
        tl.store(counters_ptr + o_block, 0, mask=o_block < size)

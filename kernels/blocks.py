"""How the "torch" back end cuts states (T, D) into blocks of rows, and the layer norm of a block.

A block holds whole examples ("sequence" norm) or any rows ("token" norm), so that blocks do not depend on each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lad_fast.kernels import launch as lc

aten = torch.ops.aten
ALL = slice(None)


class _Groups:
    """Layer norm over groups of whole rows: one call for all groups of a length, so one for each packed example."""

    def __init__(self, parts: list[tuple[slice, int]]):
        self.parts = parts  # rows of the block, and how many of them make a group

    def forward(self, blend: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> tuple[Tensor, list]:
        """Norm of (R, D) with an affine (S, D); statistics for backward."""
        states, statistics = [], []
        for rows, length in self.parts:
            weight, bias = _head(norm_weight, length), _head(norm_bias, length)
            groups = _rows(blend, rows).view(-1, *weight.shape)
            state, mean, rstd = aten.native_layer_norm(groups, weight.shape, weight, bias, eps)
            states.append(state.view(-1, blend.shape[1]))
            statistics.append((mean, rstd))
        return _joined(states), statistics

    def backward(self, grad, blend, statistics, norm_weight, norm_bias, grad_norm_weight, grad_norm_bias) -> Tensor:
        """Gradient of ``blend``; adds to those of the affine, None where they are not needed."""
        grads, needed = [], grad_norm_weight is not None
        for (rows, length), (mean, rstd) in zip(self.parts, statistics, strict=True):
            weight, bias = _head(norm_weight, length), _head(norm_bias, length)
            groups = (-1, *weight.shape)
            grad_blend, grad_weight, grad_bias = aten.native_layer_norm_backward(
                _rows(grad, rows).view(groups), _rows(blend, rows).view(groups), weight.shape, mean, rstd, weight, bias,
                [True, needed, needed],
            )  # fmt: skip
            grads.append(grad_blend.view(-1, blend.shape[1]))
            if needed:
                _head(grad_norm_weight, length).add_(grad_weight)
                _head(grad_norm_bias, length).add_(grad_bias)
        return _joined(grads)


# A view costs as much as a tenth of a small product: none is made where it would be the tensor itself.
def _head(affine: Tensor, length: int) -> Tensor:
    return affine if affine.shape[0] == length else affine[:length]


def _rows(values: Tensor, rows: slice) -> Tensor:
    return values if rows == ALL else values[rows]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


class RealRows:
    """Which of R rows are no padding, to make zero those that are: they may hold anything, even NaN.

    By the values' bits: ``masked_fill_`` takes 12 times as long on a CPU, where PyTorch has no vector code for it.
    """

    def __init__(self, row_mask: Tensor, dtype: torch.dtype) -> None:
        self.bits = -row_mask[:, None].to(_INTEGER[dtype])  # (R, 1), all bits or none

    def zero_others_(self, values: Tensor) -> Tensor:
        """``values`` (R, D) of the dtype, changed in place."""
        values.view(self.bits.dtype).bitwise_and_(self.bits)
        return values


@dataclass(frozen=True)
class _Padded:
    """Layer norm over the real rows of each example, of examples padded to one length."""

    real: RealRows
    count: Tensor  # (E, 1) elements of an example
    length: int

    def forward(self, blend: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> tuple[Tensor, tuple]:
        """As :meth:`_Groups.forward`; padding rows of ``blend`` are zero."""
        examples = blend.view(len(self.count), -1)
        mean = examples.sum(dim=1, keepdim=True).div_(self.count)
        normalized = self.real.zero_others_((examples - mean).view_as(blend)).view_as(examples)
        squares = torch.linalg.vector_norm(normalized, dim=1, keepdim=True).square_()
        rstd = squares.div_(self.count).add_(eps).rsqrt_()
        weight, bias = _head(norm_weight, self.length), _head(norm_bias, self.length)
        state = torch.addcmul(bias, normalized.mul_(rstd).view(-1, *weight.shape), weight)
        return state.view_as(blend), (mean, rstd)

    def backward(self, grad, blend, statistics, norm_weight, norm_bias, grad_norm_weight, grad_norm_bias) -> Tensor:
        """As :meth:`_Groups.backward`; padding rows of ``grad`` and ``blend`` are zero."""
        mean, rstd = statistics
        weight = _head(norm_weight, self.length)
        shape, flat = (-1, *weight.shape), (len(self.count), -1)
        normalized = (blend.view(flat) - mean).mul_(rstd)
        product = grad.view(flat) * normalized
        if grad_norm_weight is not None:
            _head(grad_norm_weight, self.length).add_(product.view(shape).sum(dim=0))
            _head(grad_norm_bias, self.length).add_(grad.view(shape).sum(dim=0))
        product.view(shape).mul_(weight)
        mean_product = product.sum(dim=1, keepdim=True).div_(self.count)
        scaled = (grad.view(shape) * weight).view(flat)
        mean_scaled = scaled.sum(dim=1, keepdim=True).div_(self.count)
        grad_blend = scaled.sub_(mean_scaled).sub_(normalized.mul_(mean_product)).mul_(rstd)
        return self.real.zero_others_(grad_blend.view_as(blend))


@dataclass(frozen=True)
class _Segments:
    """Layer norm over each example's rows, packed where the host does not read the bounds."""

    example: Tensor  # (R,) int64, the example of each row
    position: Tensor  # (R,) int64, the affine's row for each row
    count: Tensor  # (E, 1) elements of an example

    def forward(self, blend: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> tuple[Tensor, tuple]:
        """As :meth:`_Groups.forward`."""
        mean = self._means(blend)
        normalized = blend - mean
        rstd = self._means(normalized.square()).add_(eps).rsqrt_()
        normalized.mul_(rstd).mul_(norm_weight[self.position])
        return normalized.add_(norm_bias[self.position]), (mean, rstd)

    def backward(self, grad, blend, statistics, norm_weight, norm_bias, grad_norm_weight, grad_norm_bias) -> Tensor:
        """As :meth:`_Groups.backward`."""
        mean, rstd = statistics
        normalized = (blend - mean).mul_(rstd)
        if grad_norm_weight is not None:
            grad_norm_weight.index_add_(0, self.position, grad * normalized)
            grad_norm_bias.index_add_(0, self.position, grad)
        scaled = grad * norm_weight[self.position]
        mean_scaled, mean_product = self._means(scaled), self._means(scaled * normalized)
        return scaled.sub_(mean_scaled).sub_(normalized.mul_(mean_product)).mul_(rstd)

    def _means(self, values: Tensor) -> Tensor:
        """(R, 1) mean of each row's example."""
        rows = values.sum(dim=1, keepdim=True)
        return (rows.new_zeros(self.count.shape).index_add_(0, self.example, rows) / self.count)[self.example]


@dataclass(frozen=True)
class Block:
    """Rows that go through the chain together."""

    rows: slice
    real: RealRows | None
    norm: _Groups | _Padded | _Segments

    def zero_padding_(self, values: Tensor) -> Tensor:
        """``values`` (R, D) of the norm's dtype, changed in place."""
        return values if self.real is None else self.real.zero_others_(values)


def blocks(state: Tensor, norm_weight: Tensor, row_mask, cu_seqlens, seq_len: int, per_token: bool) -> Iterator[Block]:
    """Blocks of about ``launch.torch_block_rows`` rows that cover ``state``; see ``ops.aggregate_forward``.

    ``norm_weight`` is one gate's: (S, D), or (1, D) for the "token" norm.
    """
    num_tokens, hidden_size = state.shape
    most = lc.torch_block_rows(state)
    if cu_seqlens is not None and not per_token:
        if most is not None:
            yield from _packed_blocks(cu_seqlens.tolist(), most)
        else:  # a GPU would have to be waited for to read the bounds
            segments = _packed_segments(num_tokens, hidden_size, cu_seqlens, norm_weight)
            yield Block(slice(0, num_tokens), None, segments)
        return
    length = 1 if per_token else seq_len
    step = max(1, (most or num_tokens) // length) * length
    for start in range(0, num_tokens, step):
        rows = slice(start, min(start + step, num_tokens))
        real = None if row_mask is None else RealRows(row_mask[rows], norm_weight.dtype)
        if real is None or per_token:
            norm = _Groups([(ALL, length)])
        else:
            count = row_mask[rows].view(-1, length).sum(dim=1, keepdim=True) * hidden_size
            norm = _Padded(real, count.clamp(min=1).to(norm_weight.dtype), length)
        yield Block(rows, real, norm)


def _packed_blocks(bounds: list[int], most: int) -> Iterator[Block]:
    examples = [(start, end) for start, end in pairwise(bounds) if end > start]
    while examples:
        first, taken = examples[0][0], 1
        while taken < len(examples) and examples[taken][1] - first <= most:
            taken += 1
        parts = [(slice(start - first, end - first), end - start) for start, end in examples[:taken]]
        yield Block(slice(first, examples[taken - 1][1]), None, _Groups(parts))
        examples = examples[taken:]


def _packed_segments(num_tokens: int, hidden_size: int, cu_seqlens: Tensor, norm_weight: Tensor) -> _Segments:
    rows = torch.arange(num_tokens, device=cu_seqlens.device)
    lengths, seq_len = cu_seqlens.diff(), norm_weight.shape[0]
    example = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True).clamp(max=len(lengths) - 1)
    # Nobody looked at the bounds: an example that is too long or has other rows than they say becomes NaN, not a wrong
    # read.
    found = torch.zeros_like(lengths).index_add_(0, example, torch.ones_like(rows, dtype=lengths.dtype))
    is_wrong = (found != lengths) | (lengths > seq_len)
    count = torch.where(is_wrong, torch.nan, lengths.to(norm_weight.dtype))[:, None] * hidden_size
    position = (rows - cu_seqlens[example]).clamp(0, seq_len - 1)
    return _Segments(example, position, count.clamp(min=1))

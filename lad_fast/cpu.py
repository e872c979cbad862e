"""Dropout, attention, linear layers and embeddings of a training step on a CPU, faster than PyTorch's.

The mathematics is PyTorch's; only dropout's random numbers are others, from the same generator:

* dropout draws a byte an element, eight at a time, where PyTorch draws a float, and keeps its masks in bytes;
* attention under dropout, for which PyTorch has no fused form on a CPU, goes through a few examples at a time, so that
  their scores stay in the cache;
* attention over a few tokens without gradients, a teacher's, takes a product for all heads where PyTorch's fused form
  takes one a head;
* float32 products go to oneDNN where there is AVX-512, with which PyTorch's MKL, on AMD's processors, does nothing; on
  Intel's, weight gradients stay with MKL;
* a teacher's weights are laid out for oneDNN once, not by every product;
* gradients of large embeddings are made and clipped by the rows that a step touches.
"""

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from lad_fast.kernels import launch as lc
from lad_fast.kernels.once import once_differentiable

__all__ = [
    "FasterOnCPU", "RowGradients", "bfloat16_pays", "emulates", "faster_forward", "keep_freed_memory", "lay_out_",
    "set_num_threads",
]  # fmt: skip

DROPOUT_STEPS = 1 << 16  # a probability is rounded to a multiple of 1 / this
BYTES = 1 << 8
SCORES_AT_ONCE = 1 << 21  # bytes: fewer calls, and a few such tensors still fit into the cache
SHORT = 32  # tokens: in float32 plain products lead up to 40 and trail from 56 on
MOST_THREADS = 1024
LARGE_EMBEDDING = 1 << 20  # elements: positions and token types are smaller, and a batch touches most of theirs


class FasterOnCPU(TorchFunctionMode):
    """A context in which the calls of a model's forward that are slow on a CPU are replaced.

    Replaced are ``F.dropout``, ``F.scaled_dot_product_attention`` with dropout, and in float32 ``F.linear`` and
    attention over a few tokens without gradients; gradients are those of the originals, and calls in any other form go
    to PyTorch.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (replacement := _REPLACEMENTS.get(function)) is not None:
            result = replacement(*args, **kwargs)
            if result is not None:
                return result
        return function(*args, **kwargs)


def faster_forward(model: PreTrainedModel) -> AbstractContextManager:
    """:class:`FasterOnCPU` for a model on a CPU that runs as it is: neither compiled nor with checkpointed gradients.

    A checkpoint runs its part again in backward, where the context has ended and PyTorch draws another dropout.
    """
    return FasterOnCPU() if _runs_as_it_is(model) else nullcontext()


def _runs_as_it_is(model: PreTrainedModel) -> bool:
    return model.device.type == "cpu" and not any(
        getattr(module, "gradient_checkpointing", False) or module._compiled_call_impl is not None
        for module in model.modules()
    )


class RowGradients:
    """Gradients of a model's large embeddings, made and clipped by the rows that a step touches; dense for AdamW.

    A batch of short texts touches some 450 of the 30,522 rows of BERT's: PyTorch fills, norms and clips all of them.

    Args:
        model: as :func:`faster_forward` takes it; where that does nothing, so does this.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._embeddings = [
            module
            for module in model.modules()
            if type(module) is nn.Embedding and module.weight.numel() >= LARGE_EMBEDDING
            if not (module.sparse or module.scale_grad_by_freq)  # which PyTorch does not do by rows
        ]
        self._dense: dict[nn.Parameter, Tensor] = {}
        """Gradients that are zero but for the rows below."""
        self._rows: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A context for forward, after which backward gives sparse gradients."""
        is_sparse = _runs_as_it_is(self._model)
        try:
            for module in self._embeddings:
                module.sparse = is_sparse
            yield
        finally:
            for module in self._embeddings:
                module.sparse = False

    def clip_(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """What ``nn.utils.clip_grad_norm_`` does and returns, after which no gradient is sparse."""
        clipped = list(parameters)
        found = {}
        for i, parameter in enumerate(parameters):
            if parameter.grad is not None and parameter.grad.is_sparse:
                found[parameter] = parameter.grad.coalesce()
                clipped[i] = nn.Parameter(found[parameter].values(), requires_grad=False)
                clipped[i].grad = clipped[i].data
        norm = nn.utils.clip_grad_norm_(clipped, max_norm)
        for parameter, gradient in found.items():
            if (dense := self._dense.get(parameter)) is None:
                dense = self._dense[parameter] = torch.zeros_like(parameter)
            else:
                dense.index_fill_(0, self._rows[parameter], 0.0)
            self._rows[parameter] = gradient.indices()[0]
            parameter.grad = dense.index_copy_(0, self._rows[parameter], gradient.values())
        return norm


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    if not training or inplace or not 0 < p < 1 or not _is_plain(x):
        return None
    return _Dropout.apply(x, p)


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor | None:
    if not 0 <= dropout_p < 1 or is_causal or enable_gqa or not all(map(_is_plain, (query, key, value))):
        return None
    if query.dim() != 4 or not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return None
    if attn_mask is not None and (attn_mask.dim() != 4 or attn_mask.requires_grad):
        return None
    is_autocast = torch.is_autocast_enabled("cpu")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if not dropout_p:
        is_float32 = query.dtype == key.dtype == value.dtype == torch.float32 and not is_autocast
        has_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        if not is_float32 or has_gradients or key.shape[2] > SHORT:
            return None
        query, key, value, attn_mask = _operands(query, key, value, attn_mask, scale)
        return _scores(query, key, attn_mask).softmax(dim=-1) @ value
    if is_autocast:
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    return _Attention.apply(query, key, value, attn_mask, dropout_p, scale)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    # Half types already go to oneDNN.
    if not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return None
    if not all(map(_is_plain, (x, weight) if bias is None else (x, weight, bias))):
        return None
    if lc.onednn_linear(x) is None or not x.numel():
        return None
    return _Linear.apply(x, weight, bias)


_REPLACEMENTS = {F.dropout: _dropout, F.scaled_dot_product_attention: _attention, F.linear: _linear}


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor is what it looks like: no subclass, such as a quantized or distributed weight."""
    is_strided = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
    return is_strided and x.device.type == "cpu" and x.is_floating_point()


def _keep(shape: torch.Size, p: float) -> Tensor:
    """1 with probability 1 - p, else 0, from the default generator; uint8, as PyTorch's passes over bool are slow.

    A number of two bytes decides. The high one is an element's own. The low ones, which seldom decide, are each value
    once in a row of 256 elements, turned by a random number that the rows of a call share: half the bits to draw.
    """
    numel = math.prod(shape)
    rows = -(-numel // BYTES)
    bits = torch.empty(rows * BYTES // 8 + 1, dtype=torch.int64).random_(-(2**63), None)
    turn = int(bits[-1]) % BYTES
    high = bits[:-1].view(torch.int8).view(rows, BYTES)
    keep = torch.empty(rows, BYTES, dtype=torch.uint8)
    compare, least = _least_high_bytes(p)
    return compare(high, least[turn : turn + BYTES], out=keep).view(-1)[:numel].view(shape)


@lru_cache
def _least_high_bytes(p: float) -> tuple[Callable[..., Tensor], Tensor]:
    """How signed high bytes compare to what where an element is kept, by its low byte, in two turns of them."""
    low = torch.arange(2 * BYTES, device="cpu") % BYTES
    # Kept are numbers of at least p. To be "at least" their high bytes round up, to be "more" down: both fit in a byte.
    compare, up = (torch.ge, BYTES - 1) if p < 0.5 else (torch.gt, -1)
    least = (round(p * DROPOUT_STEPS) - low + up) // BYTES - BYTES // 2
    return compare, least.to(torch.int8)


def _drop(x: Tensor, keep: Tensor, p: float) -> Tensor:
    return (x * keep).mul_(1 / (1 - p))


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores of ``dtype``: finite, so that without any key the probabilities are no NaN."""
    least = torch.finfo(dtype).min / 2  # leaves room for the scores
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, least)
    return mask.clamp(min=least)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        keep = _keep(x.shape, p)
        ctx.p = p
        ctx.save_for_backward(keep)
        return _drop(x, keep, p)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _drop(grad, *ctx.saved_tensors, ctx.p), None


def _as_projected(x: Tensor, *size: int) -> Tensor:
    """An empty (B, H, S, d) that lies as (B, S, H, d), from where projections come and to where they go."""
    batch_size, heads, length, head_size = size
    return x.new_empty(batch_size, length, heads, head_size).transpose(1, 2)


def _operands(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float):
    """Attention's, made dense once, not by each product of a part; the query scaled."""
    query = torch.mul(query, scale, out=query.new_empty(query.shape))
    return query, key.contiguous(), value.contiguous(), None if mask is None else _added(mask, query.dtype)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(2, 3)
    return scores if mask is None else scores.add_(mask)


class _Attention(torch.autograd.Function):
    """``dropout(softmax(scale * Q K^T + mask)) V``; the probabilities are kept for backward."""

    @staticmethod
    def forward(ctx, query, key, value, mask, p, scale):
        batch_size, heads, length, _ = query.shape
        result = _as_projected(value, batch_size, heads, length, value.shape[-1])
        step = max(1, SCORES_AT_ONCE // (heads * length * key.shape[2] * query.element_size()))
        ctx.parts, kept = [slice(i, i + step) for i in range(0, batch_size, step)], []
        with torch.autocast("cpu", enabled=False):
            query, key, value, mask = _operands(query, key, value, mask, scale)
            for part in ctx.parts:
                masked = mask if mask is None or len(mask) == 1 else mask[part]
                probabilities = _scores(query[part], key[part], masked).softmax(dim=-1)
                keep = _keep(probabilities.shape, p)
                result[part] = (probabilities * keep) @ value[part]
                kept += probabilities, keep
        result.mul_(1 / (1 - p))  # fewer elements than the probabilities
        ctx.p, ctx.scale = p, scale
        ctx.save_for_backward(query, key, value, *kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, *kept = ctx.saved_tensors
        grads = tuple(_as_projected(x, *x.shape) for x in (query, key, value))
        grad_query, grad_key, grad_value = grads
        grad = torch.div(grad, 1 - ctx.p, out=grad.new_empty(grad.shape))
        for part, probabilities, keep in zip(ctx.parts, kept[::2], kept[1::2], strict=True):
            grad_value[part] = (probabilities * keep).transpose(2, 3) @ grad[part]
            grad_kept = (grad[part] @ value[part].transpose(2, 3)).mul_(keep)
            grad_scores = torch._softmax_backward_data(grad_kept, probabilities, -1, probabilities.dtype)
            grad_query[part] = grad_scores @ key[part]
            grad_key[part] = grad_scores.transpose(2, 3) @ query[part]
        grad_query.mul_(ctx.scale)
        return *grads, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        # A pooler's input is each example's first row: to operands with such strides oneDNN's reference code is left.
        x = x.reshape(-1, x.shape[-1]).contiguous()
        return (
            _product(grad, weight.T) if needs_x else None,
            lc.weight_gradient(rows, x) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    weight = lc.laid_out_for(x.numel() // x.shape[-1], weight)
    return lc.onednn_linear(x)(x, weight, bias, "none", [], "")


class _LaidOutLinear(nn.Linear):
    laid_out: Tensor

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if not dtype == self.weight.dtype == self.laid_out.dtype or torch.compiler.is_compiling() or not x.numel():
            return super().forward(x)
        return lc.onednn_linear(self.weight)(x.to(dtype), self.laid_out, self.bias, "none", [], "")


def lay_out_(linear: nn.Linear) -> None:
    """Have a layer that is no longer trained keep its weight also as oneDNN's products want it, where they run.

    Its forward has no gradient. In a product of 500 rows, making that layout anew takes an eighth of the time.
    """
    if type(linear) is nn.Linear and (laid_out := lc.laid_out_for(lc.PACKED_ROWS, linear.weight)) is not linear.weight:
        linear.laid_out = laid_out.detach()
        linear.__class__ = _LaidOutLinear


def bfloat16_pays() -> bool:
    """Whether a training step is faster in bfloat16 on this processor.

    Its instructions alone do not tell: Intel's with AVX512_BF16 but without AMX, as virtual machines may show them,
    take twice float32's time for a product. Nothing is timed here: beside other processes a timing came out the wrong
    way round, and runs would not repeat to the bit.
    """
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not lc.is_intels())


def emulates(dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies a type of 16 bits without the processor's help, several times slower than float32."""
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return not torch.backends.mkldnn.is_available() or not getattr(torch.ops.mkldnn, supported)()


def set_num_threads(num_threads: int | None) -> None:
    """``torch.set_num_threads``, which takes any number and crashes in the next product; None leaves PyTorch's choice.

    Raises:
        ValueError: no number of threads.
    """
    if num_threads is None:
        return
    if not 1 <= num_threads <= MOST_THREADS:
        raise ValueError(f"num_threads is {num_threads}; it takes 1 to {MOST_THREADS}")
    torch.set_num_threads(num_threads)


def keep_freed_memory() -> bool:
    """Have the C library keep large freed blocks for the next step, where it is glibc; whether it was.

    By default it returns them to the system, and each step pays for its pages again, a microsecond or more a page. The
    process then stays as large as its largest step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_max = -1, -4
    # No mapping of its own for any block, which would go back to the system; and the heap's end is never cut.
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))

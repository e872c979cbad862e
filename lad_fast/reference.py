"""Layer-wise Adaptive Distillation in plain PyTorch: the statement every kernel is compared with.

Lin, Chen & Kao, "LAD: Layer-Wise Adaptive Distillation for BERT Model Compression", Sensors 2023, 23(3), 1483.
Autograd differentiates it, any floating dtype works, nothing here imports the rest of the library.

Shapes: L teacher layers, K student layers, B batch, S sequence, T tokens, D hidden, C classes.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

__all__ = ["aggregate", "distill_loss", "hidden_loss", "lad_loss"]


def aggregate(hidden_states, gates, layers=None, attention_mask=None, cu_seqlens=None, *, reverse=None, eps=1e-5):
    """Aggregates A_1 ... A_L of the teacher's layers (paper section 3.2).

    Arguments and result are those of :func:`lad_fast.fused_aggregate`.
    """
    if isinstance(gates, Sequence):
        weight, bias, norm_weight, norm_bias = gates
    else:
        weight, bias, norm_weight, norm_bias = gates.weight, gates.bias, gates.norm_weight, gates.norm_bias
        reverse = gates.reverse if reverse is None else reverse
    chain = list(hidden_states)
    if reverse:
        chain.reverse()

    aggregates = [_zero_padding(chain[0], attention_mask)]  # A_1 = H_1
    for i, layer in enumerate(chain[1:]):
        previous, dtype = aggregates[-1], layer.dtype
        gate = torch.sigmoid(F.linear(previous, weight[i].to(dtype), bias[i].to(dtype)))
        blend = gate * layer + (1 - gate) * previous
        aggregates.append(
            _layer_norm(blend, norm_weight[i].to(dtype), norm_bias[i].to(dtype), attention_mask, cu_seqlens, eps)
        )

    if reverse:  # A_l stays with teacher layer l whichever way the chain ran
        aggregates.reverse()
    return tuple(aggregates[layer] for layer in (range(len(aggregates)) if layers is None else layers))


def _layer_norm(blend, weight, bias, attention_mask, cu_seqlens, eps):
    """LayerNorm over (D,), or over the whole (S, D) of an example where the affine is (S, D)."""
    if weight.dim() == 1:
        return _zero_padding(F.layer_norm(blend, weight.shape, weight, bias, eps), attention_mask)
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else list(cu_seqlens)
        examples = [blend[start:end] for start, end in pairwise(bounds)]
        return torch.cat([F.layer_norm(x, x.shape, weight[: len(x)], bias[: len(x)], eps) for x in examples])
    seq_len, hidden_size = blend.shape[1:]
    weight, bias = weight[:seq_len], bias[:seq_len]
    if attention_mask is None:
        return F.layer_norm(blend, (seq_len, hidden_size), weight, bias, eps)
    real = attention_mask.bool()[..., None]
    count = (real.sum(dim=(1, 2), keepdim=True) * hidden_size).clamp(min=1)
    mean = blend.masked_fill(~real, 0).sum(dim=(1, 2), keepdim=True) / count
    centered = (blend - mean).masked_fill(~real, 0)
    variance = centered.square().sum(dim=(1, 2), keepdim=True) / count
    return _zero_padding(centered * torch.rsqrt(variance + eps) * weight + bias, attention_mask)


def _zero_padding(hidden, attention_mask):
    return hidden if attention_mask is None else hidden.masked_fill(~attention_mask.bool()[..., None], 0)


def hidden_loss(student_hidden_states, aggregates, attention_mask=None, weight=1000.0, *, reduction="sum"):
    """``weight / K * sum_k mean((h_k - A_k)^2)`` (paper section 3.3); see :func:`lad_fast.fused_hidden_loss`."""
    losses = []
    for student, target in zip(student_hidden_states, aggregates, strict=True):
        square = (student - target).square()
        if attention_mask is None:
            mean = square.mean()
        else:
            real = attention_mask.bool()
            count = (real.sum() * square.shape[-1]).clamp(min=1)
            mean = square.masked_fill(~real[..., None], 0).sum() / count
        losses.append(weight / len(student_hidden_states) * mean)
    return torch.stack(losses) if reduction == "none" else torch.stack(losses).sum()


def distill_loss(
    student_logits, teacher_logits, labels, temperature=10.0, soft_weight=0.5, hard_weight=0.5, regression=False
):
    """Hard plus soft loss on the logits (paper section 3.3); see :func:`lad_fast.fused_distill_loss`."""
    if regression:
        hard = F.mse_loss(student_logits.flatten(), labels.to(student_logits.dtype).flatten())
        soft = F.mse_loss(student_logits.flatten(), teacher_logits.flatten())
        return hard_weight * hard + soft_weight * soft
    hard = F.cross_entropy(student_logits, labels.long())
    soft = F.kl_div(
        F.log_softmax(student_logits / temperature, dim=-1),
        F.log_softmax(teacher_logits / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return hard_weight * hard + soft_weight * temperature**2 * soft


def lad_loss(
    student_hidden_states, teacher_hidden_states, student_logits, teacher_logits, labels, gates, layers,
    attention_mask=None, cu_seqlens=None, *, temperature=10.0, soft_weight=0.5, hard_weight=0.5,
    hidden_weight=1000.0, regression=False,
):  # fmt: skip
    """The whole objective of the paper as one scalar: :func:`distill_loss` plus :func:`hidden_loss`."""
    aggregates = aggregate(teacher_hidden_states, gates, layers, attention_mask, cu_seqlens)
    return distill_loss(
        student_logits, teacher_logits, labels, temperature, soft_weight, hard_weight, regression
    ) + hidden_loss(student_hidden_states, aggregates, attention_mask, hidden_weight)

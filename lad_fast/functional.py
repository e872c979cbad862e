"""The functional API: checks every argument once, picks a back end, calls the registered operators.

``backend=None`` takes "triton" for GPU tensors and under ``TRITON_INTERPRET=1``, otherwise "torch" (hand-written
backward in in-place PyTorch calls, on any device). "reference" is :mod:`lad_fast.reference` under autograd.
"""

from collections.abc import Sequence
from itertools import pairwise
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from lad_fast import reference
from lad_fast.kernels import launch, ops

__all__ = ["fused_aggregate", "fused_distill_loss", "fused_hidden_loss"]

BACKENDS = ("triton", "torch", "reference")
MEMORY = ("auto", "low", "fast")
_HALF = (torch.bfloat16, torch.float16)


def fused_aggregate(
    hidden_states: Sequence[Tensor] | Tensor,
    gates,
    layers: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    reverse: bool | None = None,
    eps: float = 1e-5,
    memory: str = "auto",
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Iterative aggregation of the teacher's layers by gate blocks (paper section 3.2).

    ``A_1 = H_1``, ``g_l = sigmoid(A_{l-1} W_l^T + b_l)``, ``A_l = LayerNorm(g_l * H_l + (1 - g_l) * A_{l-1})``.
    Accumulation and statistics are float32. Under autocast the matrix products run in the autocast dtype.

    Args:
        hidden_states: the teacher's L layers without the embedding output: L tensors (B, S, D) or one
            (L, B, S, D); packed, with ``cu_seqlens``: L tensors (tokens, D) or one (L, tokens, D).
            float32, bfloat16 or float16 (float64 except with "triton"). May require grad.
        gates: a :class:`~lad_fast.GateStack`, or its four tensors ``(weight, bias, norm_weight, norm_bias)``
            of shapes (L-1, D, D), (L-1, D), and (L-1, S, D) or (L-1, D) twice; float32.
        layers: 0-based teacher layers to return, in that order; None for all. Gates beyond the last one needed
            are not run and get a zero gradient.
        attention_mask: (B, S), nonzero for real tokens: statistics take those only, other rows come back zero.
            None: padding counts, as published.
        cu_seqlens: (B + 1,) integers, the packed examples' bounds, from 0 to tokens. A tensor on a GPU is not
            read on the host; there examples that are longer than the norm's ``seq_len`` or lie outside of the
            tokens, and tokens outside of the examples, come back as NaN.
        reverse: run the chain from layer L down to 1; default: what ``gates`` says, False for plain tensors.
        eps: of the layer norm.
        memory: "fast" keeps the gates' values for backward, L-1 tensors like a hidden state; "low" multiplies once
            more instead, to the same gradients; "auto" is "low" where they would take a sixteenth of a GPU's memory.
            "reference" pays no heed to it.
        backend: None, "triton", "torch" or "reference".

    Returns:
        One tensor a requested layer, with shape, dtype and device of a hidden state. They may share memory with one
        another and, layer 0, with ``hidden_states``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device, layer index, bound or back end that does not fit.
    """
    check_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps is {eps!r}; it takes a number of at least 0")
    chain = _check_chain(hidden_states, gates, layers, attention_mask, cu_seqlens, reverse, memory, backend)
    _check_kept(chain.gates, hidden_states=chain.hidden_states)
    if chain.backend == "reference":
        where = (attention_mask, chain.cu_seqlens)
        return reference.aggregate(
            chain.hidden_states, chain.gates, chain.layers, *where, reverse=chain.reverse, eps=eps
        )
    states, positions = chain.states(), chain.positions()
    if max(positions) == 0:
        return (chain.first_aggregate(),) * len(positions)
    wanted = sorted({i - 1 for i in positions if i > 0})
    aggregates = ops.aggregate(*chain.tensors(states, max(positions)), wanted, **chain.options(eps))
    if not torch.is_grad_enabled() and len(wanted) < max(positions):
        aggregates = [a.clone() for a in aggregates]  # all lie in one tensor: kept, few would keep every one
    by_position = {i + 1: a.view(states[0].shape) for i, a in zip(wanted, aggregates, strict=True)}
    if 0 in positions:
        by_position[0] = chain.first_aggregate()
    return tuple(by_position[i] for i in positions)


def fused_hidden_loss(
    student_hidden_states: Sequence[Tensor],
    aggregates: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    weight: float = 1000.0,
    *,
    reduction: str = "sum",
    backend: str | None = None,
) -> Tensor:
    """Mean squared error between student layers and aggregates (paper section 3.3).

    ``weight / K * sum_k mean((h_k - A_k)^2)``; both sides get gradients.

    Args:
        student_hidden_states: K tensors (B, S, D), or packed (tokens, D); float32, bfloat16, float16 (float64
            except with "triton").
        aggregates: K tensors of the same shape; their dtype may differ from the student's.
        attention_mask: (B, S), nonzero for real tokens: the mean takes those only. None: padding counts.
        weight: mu.
        reduction: "sum" for the scalar, "none" for the K weighted terms.
        backend: None, "triton", "torch" or "reference".

    Returns:
        float32 scalar, or (K,) float32 with ``reduction="none"`` (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device, length, reduction or back end that does not fit.
    """
    check_number("weight", weight)
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it takes 'sum' or 'none'")
    student, targets = _check_pairs(student_hidden_states, aggregates, attention_mask)
    backend = _check_backend(backend, student[0], targets[0])
    if backend == "reference":
        return reference.hidden_loss(student, targets, attention_mask, weight, reduction=reduction)
    _check_kept((), student_hidden_states=student, aggregates=targets)
    rows = student[0].shape[-1]
    losses = ops.hidden_loss(
        [h.reshape(-1, rows) for h in student],
        [a.reshape(-1, rows) for a in targets],
        row_mask=None if attention_mask is None else (attention_mask != 0).reshape(-1),
        weight=weight / len(student),
        backend=backend,
    )
    return losses if reduction == "none" else losses.sum()


class LogitsLoss(NamedTuple):
    """The arguments of :func:`fused_distill_loss`."""

    student_logits: Tensor
    teacher_logits: Tensor
    labels: Tensor
    temperature: float
    soft_weight: float
    hard_weight: float
    regression: bool

    def check(self, backend: str | None) -> str:
        """The back end that takes them; raises where none does."""
        student_logits, teacher_logits, labels = self[:3]
        check_float("student_logits", student_logits)
        check_float("teacher_logits", teacher_logits)
        _check_tensor("labels", labels)
        if student_logits.numel() == 0:
            raise ValueError(f"student_logits is empty: shape {tuple(student_logits.shape)}")
        if student_logits.dim() != 2 and not (self.regression and student_logits.dim() == 1):
            raise ValueError(f"student_logits has shape {tuple(student_logits.shape)}; it takes (B, C)")
        if teacher_logits.shape != student_logits.shape:
            raise ValueError(
                f"teacher_logits has shape {tuple(teacher_logits.shape)}; student_logits has "
                f"{tuple(student_logits.shape)}"
            )
        if teacher_logits.requires_grad and torch.is_grad_enabled():
            raise ValueError("teacher_logits requires grad, but the loss gives it none; pass teacher_logits.detach()")
        for name, tensor in (("teacher_logits", teacher_logits), ("labels", labels)):
            _check_same_device(name, tensor, "student_logits", student_logits)
        check_flag("regression", self.regression)
        for name in ("temperature", "soft_weight", "hard_weight"):
            check_number(name, getattr(self, name))
        if not self.regression and not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature!r}; it takes a number above 0")
        _check_labels(labels, student_logits, self.regression)
        return _check_backend(backend, student_logits, teacher_logits)


def chain_loss(
    student_hidden_states: Sequence[Tensor],
    hidden_states: Sequence[Tensor] | Tensor,
    gates,
    layers: Sequence[int],
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    weight: float = 1000.0,
    *,
    logits: LogitsLoss | None = None,
    memory: str = "auto",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """(K,) terms of :func:`fused_hidden_loss` against :func:`fused_aggregate`, in one operator that keeps less.

    Arguments are those of the two; no layer stands twice in ``layers``. With ``logits`` also
    :func:`fused_distill_loss`, and all sums: loss, hidden loss, logits loss, and the K terms.
    """
    check_number("weight", weight)
    chain = _check_chain(hidden_states, gates, layers, attention_mask, cu_seqlens, None, memory, backend)
    positions = chain.positions()
    if isinstance(student_hidden_states, Sequence) and isinstance(next(iter(student_hidden_states), None), Tensor):
        _check_same_device("hidden_states", chain.hidden_states[0], "student_hidden_states", student_hidden_states[0])
    together = logits is None or logits.check(backend) == chain.backend
    if chain.backend == "reference" or max(positions) == 0 or not together:
        if logits is not None:
            where = (attention_mask, cu_seqlens, weight)
            losses = chain_loss(
                student_hidden_states, hidden_states, gates, layers, *where, memory=memory, backend=backend
            )
            hidden_loss, logits_loss = losses.sum(), fused_distill_loss(*logits, backend=backend)
            return hidden_loss + logits_loss, hidden_loss, logits_loss, losses
        aggregates = fused_aggregate(hidden_states, gates, layers, attention_mask, cu_seqlens, backend=backend)
        return fused_hidden_loss(
            student_hidden_states, aggregates, attention_mask, weight, reduction="none", backend=backend
        )
    states = chain.states()
    student, _ = _check_pairs(student_hidden_states, [states[0]] * len(positions), attention_mask)
    _check_backend(backend, student[0])
    if any(tensor.requires_grad for tensor in (*chain.gates, *chain.hidden_states)):  # else differences are kept
        _check_kept(chain.gates, hidden_states=chain.hidden_states, student_hidden_states=student)
    hidden, *parameters = chain.tensors(states, max(positions))
    return ops.chain_loss(
        hidden,
        [h.reshape(-1, h.shape[-1]) for h in student],
        positions,
        *parameters,
        loss_weight=weight / len(student),
        logits=logits,
        **chain.options(eps=1e-5),
    )


def fused_distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 10.0,
    soft_weight: float = 0.5,
    hard_weight: float = 0.5,
    regression: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Hard and soft loss on the logits, with the gradient in the same pass (paper section 3.3).

    ``hard * CE(z_s, y) + soft * T^2 * KL(softmax(z_t / T) || softmax(z_s / T))``, batch mean; for regression
    ``hard * MSE(z_s, y) + soft * MSE(z_s, z_t)``.

    Args:
        student_logits: (B, C); (B, 1) or (B,) for regression. float32, bfloat16, float16 (float64 except with
            "triton").
        teacher_logits: the same shape; a constant, so it must not require grad.
        labels: (B,) integer classes below C, or for regression (B,) or (B, 1) floats. Class ids on a GPU are not
            read on the host; one outside the classes makes the loss NaN there.
        temperature: T above 0.
        soft_weight, hard_weight: weights of the two terms.
        regression: squared errors instead of cross-entropies.
        backend: None, "triton", "torch" or "reference".

    Returns:
        float32 scalar (float64 for float64 logits).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device, label, temperature or back end that does not fit; a trainable teacher.
    """
    logits = LogitsLoss(
        student_logits, teacher_logits, labels, temperature, soft_weight, hard_weight, regression
    )  # fmt: skip
    backend = logits.check(backend)
    if backend == "reference":
        return reference.distill_loss(*logits)
    return ops.distill_loss(*logits, backend)


class _Chain(NamedTuple):
    """The arguments of :func:`fused_aggregate`, checked, and in the form that the operators take."""

    hidden_states: list[Tensor]
    gates: tuple[Tensor, Tensor, Tensor, Tensor]
    layers: list[int]
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    reverse: bool
    memory: str
    backend: str

    def positions(self) -> list[int]:
        """Where the wanted layers stand along the chain."""
        last = len(self.hidden_states) - 1
        return [last - layer if self.reverse else layer for layer in self.layers]

    def states(self) -> list[Tensor]:
        """The hidden states along the chain, as the operators take them."""
        states = self.hidden_states[::-1] if self.reverse else self.hidden_states
        return states if self.backend == "triton" else [self.first_aggregate(), *states[1:]]

    def first_aggregate(self) -> Tensor:
        """The chain's start with zero padding. Triton's kernels zero what they copy of it themselves."""
        start = self.hidden_states[-1 if self.reverse else 0]
        return start if self.attention_mask is None else start.masked_fill(self.attention_mask[..., None] == 0, 0)

    def tensors(self, states: list[Tensor], num_gates: int) -> list:
        """States (T, D) and the four parameters that so many gates read."""
        weight, bias, *affine = self.gates
        if self.cu_seqlens is None and affine[0].dim() == 3:
            affine = [_first(parameter, states[0].shape[1], dim=1) for parameter in affine]
        return [
            [h.reshape(-1, h.shape[-1]) for h in states[: num_gates + 1]],
            *(_first(parameter, num_gates) for parameter in (weight, bias, *affine)),
        ]

    def options(self, eps: float) -> dict:
        first, row_mask = self.hidden_states[0], self.attention_mask
        if row_mask is not None:
            row_mask = _readable((row_mask if self.backend == "triton" else row_mask != 0).reshape(-1))
        return {
            "row_mask": row_mask,
            "cu_seqlens": self.cu_seqlens,
            "seq_len": 0 if first.dim() == 2 else first.shape[1],
            "eps": eps,
            "matmul_dtype": _matmul_dtype(first),
            "keep_gates": launch.keep_gates(self.memory, first, len(self.hidden_states) - 1),
            "backend": self.backend,
        }


def _readable(where: Tensor) -> Tensor:
    """A mask (T,) or bounds (B + 1,), dense as kernels read them; a copy where autograd could not keep it."""
    if not torch.compiler.is_compiling() and where.is_inference():
        return where.clone()
    return where.contiguous()


def _first(parameter: Tensor, length: int, dim: int = 0) -> Tensor:
    """So much of a parameter; itself where that is all, since a slice's gradient is filled and copied once more."""
    return parameter if parameter.shape[dim] == length else parameter.narrow(dim, 0, length)


def _check_chain(hidden_states, gates, layers, attention_mask, cu_seqlens, reverse, memory, backend) -> _Chain:
    hidden_states = _check_hidden_states("hidden_states", hidden_states, packed=cu_seqlens is not None)
    first, num_layers = hidden_states[0], len(hidden_states)
    if reverse is None:  # a list of tensors has a method of that name
        reverse = not isinstance(gates, Sequence) and bool(getattr(gates, "reverse", False))
    check_flag("reverse", reverse)
    gates = _check_gates(gates, first, num_layers)
    layers = _check_layers(layers, num_layers)
    if memory not in MEMORY:
        raise ValueError(f"memory is {memory!r}; it takes one of {MEMORY}")
    norm_weight = gates[2]
    seq_len = norm_weight.shape[1] if norm_weight.dim() == 3 else None
    backend = _check_backend(backend, first)
    if backend == "triton" and first.numel() >= 2**31:
        raise ValueError(f"hidden_states[0] has {first.numel()} elements; backend 'triton' takes fewer than 2^31")
    cu_seqlens = _check_bounds(cu_seqlens, attention_mask, first, seq_len)
    if cu_seqlens is not None:
        if backend == "reference" and cu_seqlens.is_meta:
            raise ValueError("cu_seqlens is on the meta device; backend 'reference' reads it, 'torch' does not")
    elif seq_len is not None and first.shape[1] > seq_len:
        raise ValueError(
            f"hidden_states have S = {first.shape[1]} tokens; the gates' norm takes at most seq_len = {seq_len}"
        )
    if attention_mask is not None:
        _check_mask(attention_mask, first)
    return _Chain(hidden_states, gates, layers, attention_mask, cu_seqlens, reverse, memory, backend)


def check_layers(
    student_hidden_states, hidden_states, num_layers: int, hidden_size: int, attention_mask, cu_seqlens
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Both models' states of an objective without gates, L of the teacher's, and bounds beside them."""
    teacher = _check_hidden_states("teacher_hidden_states", hidden_states, packed=cu_seqlens is not None)
    if len(teacher) != num_layers:
        raise ValueError(
            f"teacher_hidden_states holds {len(teacher)} tensors; it takes num_layers = {num_layers} "
            "(leave the embedding output out)"
        )
    if teacher[0].shape[-1] != hidden_size:
        raise ValueError(
            f"teacher_hidden_states have shape {tuple(teacher[0].shape)}; they take hidden_size = {hidden_size}"
        )
    cu_seqlens = _check_bounds(cu_seqlens, attention_mask, teacher[0], None)
    student, _ = _check_pairs(student_hidden_states, teacher[:1] * len(student_hidden_states), attention_mask)
    return student, teacher, cu_seqlens


def check_looked_at(hidden_states, gates, attention_mask, cu_seqlens) -> None:
    """Arguments of :meth:`lad_fast.GateStack.contributions` and ``condition``, which take states and gates of any
    float dtype."""
    hidden_states = _check_hidden_states("hidden_states", hidden_states, packed=cu_seqlens is not None)
    states = [h.float() for h in hidden_states]
    parameters = [getattr(gates, name).float() for name in ("weight", "bias", "norm_weight", "norm_bias")]
    _check_chain(states, parameters, None, attention_mask, cu_seqlens, gates.reverse, "auto", "reference")
    if attention_mask is not None and not attention_mask.is_meta and not (attention_mask != 0).any():
        raise ValueError("attention_mask has no real token; the mean takes at least one")


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    return (hidden.dtype == torch.float32 and autocast_dtype(hidden)) or hidden.dtype


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast casts to on the tensor's device; None where it is off."""
    device = tensor.device.type
    # The meta device knows no autocast, and asking is an error.
    is_on = not tensor.is_meta and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else None


def _ndim(hidden_states) -> int | None:
    if isinstance(hidden_states, Tensor):
        return hidden_states.dim() - 1
    if isinstance(hidden_states, Sequence) and hidden_states and isinstance(hidden_states[0], Tensor):
        return hidden_states[0].dim()
    return None


def check_flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it takes True or False"[:200])


def _check_tensor(name: str, tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it takes a tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; it takes a dense tensor")
    if hasattr(tensor, "device_mesh"):  # a DTensor's; its class would have to be imported
        raise TypeError(f"{name} is a {type(tensor).__name__}; shard the objective as a whole, not its gates")


def check_float(name: str, tensor) -> None:
    _check_tensor(name, tensor)
    if tensor.dtype not in (torch.float32, torch.float64, *_HALF):
        raise TypeError(f"{name} has dtype {tensor.dtype}; it takes float32, bfloat16, float16 or float64")


def check_number(name: str, value) -> None:
    """A Python, NumPy or symbolic number, or a tensor of one."""
    if isinstance(value, int | float | Real):
        return
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TypeError(f"{name} is a Tensor of shape {tuple(value.shape)}; it takes a number")
    if not isinstance(value, Tensor | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} is {value!r}; it takes a number"[:200])
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but the loss gives it none; pass {name}.item()")


def _check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}; {other_name} is on {other.device}")


def _check_hidden_states(name: str, hidden_states, packed: bool) -> list[Tensor]:
    """One list of equal tensors (B, S, D), or (tokens, D) where packed."""
    if isinstance(hidden_states, Tensor):
        hidden_states = hidden_states.unbind(0) if hidden_states.dim() else [hidden_states]
    if not isinstance(hidden_states, Sequence) or isinstance(hidden_states, str):
        raise TypeError(f"{name} is a {type(hidden_states).__name__}; it takes a sequence of tensors or one tensor")
    if not hidden_states:
        raise ValueError(f"{name} is empty; it takes one tensor a layer")
    for i, h in enumerate(hidden_states):
        check_float(f"{name}[{i}]", h)
        if h.dim() != (2 if packed else 3):
            takes = "(tokens, D), since cu_seqlens is given" if packed else "(B, S, D), or (tokens, D) with cu_seqlens"
            raise ValueError(f"{name}[{i}] has shape {tuple(h.shape)}; it takes {takes}")
        if h.shape != hidden_states[0].shape or h.dtype != hidden_states[0].dtype:
            raise ValueError(
                f"{name}[{i}] is {h.dtype} of shape {tuple(h.shape)}; "
                f"{name}[0] is {hidden_states[0].dtype} of shape {tuple(hidden_states[0].shape)}"
            )
        _check_same_device(f"{name}[{i}]", h, f"{name}[0]", hidden_states[0])
    if hidden_states[0].numel() == 0:
        raise ValueError(f"{name}[0] is empty: shape {tuple(hidden_states[0].shape)}")
    return list(hidden_states)


def _check_kept(others: Sequence[Tensor], **kept: list[Tensor]) -> None:
    """Autograd keeps no inference tensors, so that none may be among what a backward needs."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    named = [(f"{name}[{i}]", tensor) for name, tensors in kept.items() for i, tensor in enumerate(tensors)]
    if any(tensor.requires_grad for tensor in (*others, *(tensor for _, tensor in named))):
        for name, tensor in named:
            if tensor.is_inference():
                raise ValueError(
                    f"{name} is an inference tensor, which autograd cannot keep; make it under torch.no_grad() instead "
                    "of torch.inference_mode(), or clone it"
                )


def _check_pairs(student_hidden_states, aggregates, attention_mask) -> tuple[list[Tensor], list[Tensor]]:
    """What the hidden loss compares: as many tensors of one shape on both sides."""
    packed = _ndim(student_hidden_states) == 2
    student = _check_hidden_states("student_hidden_states", student_hidden_states, packed=packed)
    targets = _check_hidden_states("aggregates", aggregates, packed=packed)
    if len(student) != len(targets):
        raise ValueError(f"aggregates holds {len(targets)} tensors; student_hidden_states holds {len(student)}")
    if student[0].shape != targets[0].shape:
        raise ValueError(
            f"aggregates have shape {tuple(targets[0].shape)}; student_hidden_states have {tuple(student[0].shape)}"
        )
    _check_same_device("aggregates", targets[0], "student_hidden_states", student[0])
    if attention_mask is not None:
        _check_mask(attention_mask, student[0])
    return student, targets


def _check_gates(gates, hidden: Tensor, num_layers: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    names = ("weight", "bias", "norm_weight", "norm_bias")
    if isinstance(gates, Sequence) and not isinstance(gates, str):
        if len(gates) != 4:
            raise ValueError(f"gates holds {len(gates)} tensors; it takes the four {names}")
        tensors = tuple(gates)
    elif all(hasattr(gates, name) for name in names):
        tensors = tuple(getattr(gates, name) for name in names)
    else:
        raise TypeError(f"gates is a {type(gates).__name__}; it takes a GateStack or the four tensors {names}")
    hidden_size = hidden.shape[-1]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    for name, tensor in zip(names, tensors, strict=True):
        _check_tensor(f"gates' {name}", tensor)
        if tensor.dtype != dtype:
            raise TypeError(
                f"gates' {name} has dtype {tensor.dtype}; with {hidden.dtype} hidden_states it takes {dtype}"
            )
        _check_same_device(f"gates' {name}", tensor, "hidden_states", hidden)
    weight, bias, norm_weight, norm_bias = tensors
    if weight.dim() != 3 or weight.shape[0] != num_layers - 1:
        raise ValueError(
            f"gates' weight has shape {tuple(weight.shape)}; {num_layers} hidden_states take ({num_layers - 1}, D, D)"
            + " (leave the embedding output out)" * (weight.dim() == 3 and len(weight) == num_layers - 2)
        )
    if weight.shape[1:] != (hidden_size, hidden_size):
        raise ValueError(f"gates' weight has shape {tuple(weight.shape)}; hidden_states have D = {hidden_size}")
    if bias.shape != (num_layers - 1, hidden_size):
        raise ValueError(f"gates' bias has shape {tuple(bias.shape)}; it takes {(num_layers - 1, hidden_size)}")
    ends = norm_weight.shape[:1] + norm_weight.shape[-1:]
    fits = norm_weight.dim() in (2, 3) and ends == (num_layers - 1, hidden_size)
    if not fits or norm_weight.numel() == 0:
        raise ValueError(
            f"gates' norm_weight has shape {tuple(norm_weight.shape)}; it takes ({num_layers - 1}, S, {hidden_size}) "
            f"or ({num_layers - 1}, {hidden_size})"
        )
    if norm_bias.shape != norm_weight.shape:
        raise ValueError(
            f"gates' norm_bias has shape {tuple(norm_bias.shape)}; norm_weight has {tuple(norm_weight.shape)}"
        )
    return tensors


def _check_layers(layers, num_layers: int) -> list[int]:
    if layers is None:
        return list(range(num_layers))
    if isinstance(layers, str) or not isinstance(layers, Sequence | range):
        raise TypeError(f"layers is a {type(layers).__name__}; it takes a sequence of 0-based layer indices or None")
    if not layers:
        raise ValueError("layers is empty; it takes at least one 0-based layer index, or None for all")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layers holds {layer!r}; it takes integers")
        if not 0 <= layer < num_layers:
            raise ValueError(f"layers holds {layer}; with {num_layers} hidden_states it takes 0 to {num_layers - 1}")
    return list(layers)


def _check_mask(attention_mask, hidden: Tensor) -> None:
    _check_tensor("attention_mask", attention_mask)
    if attention_mask.shape != hidden.shape[:-1]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; hidden states of shape {tuple(hidden.shape)} "
            f"take {tuple(hidden.shape[:-1])}"
        )
    _check_same_device("attention_mask", attention_mask, "the hidden states", hidden)


def _check_bounds(cu_seqlens, attention_mask, hidden: Tensor, seq_len: int | None) -> Tensor | None:
    """Bounds as an int32 tensor beside ``hidden``; checked where they can be read without a device sync."""
    if cu_seqlens is None:
        return None
    if attention_mask is not None:
        raise ValueError("attention_mask and cu_seqlens exclude each other: packed states hold no padding")
    if not isinstance(cu_seqlens, Tensor):
        is_sequence = isinstance(cu_seqlens, Sequence) and not isinstance(cu_seqlens, bytes)
        if not is_sequence or not all(type(bound) is int for bound in cu_seqlens):
            raise TypeError("cu_seqlens takes a tensor or a sequence of integers")
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    _check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; it takes int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it takes (B + 1,) with B at least 1")
    if cu_seqlens.is_meta:  # from a CPU or a GPU they are copied
        _check_same_device("cu_seqlens", cu_seqlens, "hidden_states", hidden)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != hidden.shape[0]:
            raise ValueError(
                f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}; it takes 0 to tokens = {hidden.shape[0]}"
            )
        longest = max(end - start for start, end in pairwise(bounds))
        if any(end < start for start, end in pairwise(bounds)):
            raise ValueError("cu_seqlens decreases; it takes ascending bounds")
        if seq_len is not None and longest > seq_len:
            raise ValueError(
                f"cu_seqlens has an example of {longest} tokens; the gates' norm takes at most seq_len = {seq_len}"
            )
    return _readable(cu_seqlens.to(device=hidden.device, dtype=torch.int32))


def _check_labels(labels: Tensor, student_logits: Tensor, regression: bool) -> None:
    batch_size = student_logits.shape[0]
    if regression:
        if not labels.is_floating_point():
            raise TypeError(f"labels has dtype {labels.dtype}; regression takes a floating dtype")
        if labels.numel() != batch_size or student_logits.numel() != batch_size:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and student_logits {tuple(student_logits.shape)}; "
                "regression takes one number an example"
            )
        return
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels has dtype {labels.dtype}; classification takes int64")
    if labels.shape != (batch_size,):
        raise ValueError(f"labels has shape {tuple(labels.shape)}; it takes ({batch_size},)")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and not _in_transform():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= student_logits.shape[1]:
            wrong = low if low < 0 else high
            raise ValueError(f"labels holds {wrong}; student_logits has classes 0 to {student_logits.shape[1] - 1}")


def _in_transform() -> bool:
    """Inside vmap, grad or another transform of torch.func, where a tensor's numbers may not be read."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _check_backend(backend: str | None, *tensors: Tensor) -> str:
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend is {backend!r}; it takes None or one of {BACKENDS}")
    float64 = any(tensor.dtype == torch.float64 for tensor in tensors)
    if backend != "reference" and _in_transform():
        raise ValueError(f"backend {backend or 'torch'!r} cannot run inside torch.func; use backend='reference'")
    if backend == "reference" and (cast := autocast_dtype(tensors[0])) is not None:
        for tensor in tensors:  # PyTorch's own stack and norm fail there
            if tensor.dtype not in (torch.float32, cast):
                raise TypeError(f"backend 'reference' takes float32 or {cast} under autocast, got {tensor.dtype}")
    if backend == "triton":
        if float64:
            raise TypeError("backend 'triton' takes float32, bfloat16 or float16, got float64; use backend='torch'")
        problem = launch.why_not_triton(tensors[0].device)
        if problem:
            raise ValueError(f"backend 'triton' cannot run here: {problem}; use backend='torch'")
    if backend is None:
        return "torch" if float64 or launch.why_not_triton(tensors[0].device) else "triton"
    return backend

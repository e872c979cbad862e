"""Training objectives as modules: LAD's, and what it shares with those of :mod:`lad_fast.strategies`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lad_fast.functional import (
    BACKENDS,
    MEMORY,
    LogitsLoss,
    autocast_dtype,
    chain_loss,
    check_flag,
    check_float,
    check_number,
)
from lad_fast.gates import GateStack

__all__ = ["HiddenObjective", "LADObjective", "LADOutput"]


class LADOutput(NamedTuple):
    """What an objective returns; float32 scalars that carry gradients, but for ``hidden_losses``."""

    loss: Tensor
    """hidden_loss + logits_loss."""
    hidden_loss: Tensor
    """Weighted mean squared errors against the aggregates (or other targets), summed over student layers."""
    logits_loss: Tensor
    """Hard plus soft loss on the logits."""
    hidden_losses: Tensor
    """(K,) float32, detached: each student layer's share of ``hidden_loss``."""


class HiddenObjective(nn.Module):
    """What objectives on hidden states and logits share: settings, checks, projections and the call.

    Args:
        gates: trained with the objective; None where it has none.
        num_layers: L of the teacher.
        hidden_size: D of the teacher.
        num_student_layers: K, from 1 to L.
        temperature, soft_weight, hard_weight, hidden_weight, regression, student_hidden_size, backend: see
            :class:`LADObjective`.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """

    def __init__(
        self,
        gates: GateStack | None,
        num_layers: int,
        hidden_size: int,
        num_student_layers: int,
        temperature: float = 10.0,
        soft_weight: float = 0.5,
        hard_weight: float = 0.5,
        hidden_weight: float = 1000.0,
        regression: bool = False,
        student_hidden_size: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"num_layers": num_layers, "hidden_size": hidden_size}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; it takes an integer of at least 1")
        if type(num_student_layers) is not int or not 1 <= num_student_layers <= num_layers:
            raise ValueError(f"num_student_layers is {num_student_layers!r}; it takes 1 to {num_layers}")
        check_number("temperature", temperature)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature!r}; it takes a number above 0")
        weights = {"soft_weight": soft_weight, "hard_weight": hard_weight, "hidden_weight": hidden_weight}
        for name, value in weights.items():
            check_number(name, value)
            if not value >= 0:
                raise ValueError(f"{name} is {value!r}; it takes a number of at least 0")
        if student_hidden_size is not None and not (type(student_hidden_size) is int and student_hidden_size >= 1):
            raise ValueError(f"student_hidden_size is {student_hidden_size!r}; it takes an integer of at least 1")
        if backend not in (None, *BACKENDS):
            raise ValueError(f"backend is {backend!r}; it takes None or one of {BACKENDS}")
        check_flag("regression", regression)
        self.gates = gates
        self.num_student_layers = num_student_layers
        self.regression, self.backend = regression, backend
        # No tensor among them, which would be a parameter or could not be traced.
        for name, value in (weights | {"temperature": temperature}).items():
            setattr(self, name, value.item() if isinstance(value, Tensor) else value)
        self.projections = None
        if student_hidden_size not in (None, hidden_size):
            self.projections = nn.ModuleList(
                nn.Linear(student_hidden_size, hidden_size) for _ in range(num_student_layers)
            )

    def extra_repr(self) -> str:
        names = ("temperature", "soft_weight", "hard_weight", "hidden_weight", "regression", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(
        self,
        student_hidden_states,
        teacher_hidden_states,
        student_logits: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
    ) -> LADOutput:
        """The three losses of one batch.

        Args:
            student_hidden_states: K tensors (B, S, D'), the embedding output left out (packed: (tokens, D')); or
                a Hugging Face model output with ``hidden_states`` and ``logits``.
            teacher_hidden_states: L tensors (B, S, D) likewise, or a Hugging Face model output.
            student_logits, teacher_logits: (B, C); where model outputs are passed, theirs are taken without.
            labels: (B,) classes, or numbers for regression.
            attention_mask: (B, S); None: padding counts, as published.
            cu_seqlens: (B + 1,) bounds of packed hidden states.
            backend: overrides the module's.

        Raises:
            TypeError, ValueError: as the functions of :mod:`lad_fast.functional`.
        """
        student_hidden_states, student_logits = _unpack("student", student_hidden_states, student_logits)
        teacher_hidden_states, teacher_logits = _unpack("teacher", teacher_hidden_states, teacher_logits)
        if labels is None:
            raise ValueError("labels is None; it takes a tensor (B,)")
        if not isinstance(student_hidden_states, Sequence | Tensor) or isinstance(student_hidden_states, str | bytes):
            raise TypeError(
                f"student_hidden_states is a {type(student_hidden_states).__name__}; it takes a sequence of tensors"
            )
        if isinstance(student_hidden_states, Tensor) and student_hidden_states.dim() == 0:
            raise ValueError("student_hidden_states has shape (); it takes one tensor a layer")
        if len(student_hidden_states) != self.num_student_layers:
            raise ValueError(
                f"student_hidden_states holds {len(student_hidden_states)} tensors; it takes "
                f"num_student_layers = {self.num_student_layers} (leave the embedding output out)"
            )
        _check_devices(student_hidden_states, teacher_hidden_states, self.gates, student_logits, teacher_logits, labels)
        if self.projections is not None:
            for i, h in enumerate(student_hidden_states):
                _check_projected(f"student_hidden_states[{i}]", h, self.projections[i].weight)
            student_hidden_states = [
                project(h) for project, h in zip(self.projections, student_hidden_states, strict=True)
            ]
        logits = LogitsLoss(
            student_logits, teacher_logits, labels, self.temperature, self.soft_weight, self.hard_weight,
            self.regression,
        )  # fmt: skip
        *losses, hidden_losses = self._losses(
            student_hidden_states, teacher_hidden_states, logits, attention_mask, cu_seqlens, backend or self.backend
        )
        return LADOutput(*losses, hidden_losses.detach())

    def _losses(self, student, teacher, logits: LogitsLoss, attention_mask, cu_seqlens, backend) -> Sequence[Tensor]:
        """Loss, hidden loss, logits loss and the (K,) terms of the hidden loss; ``student`` is projected."""
        raise NotImplementedError


def every_skipth_layer(num_layers: int, num_student_layers: int) -> tuple[int, ...]:
    """0-based teacher layer of each student layer: k * (L // K), counted from 1."""
    skip = num_layers // num_student_layers
    return tuple(range(skip - 1, num_layers, skip))[:num_student_layers]


class LADObjective(HiddenObjective):
    """``hard * CE + soft * T^2 * KL + mu / K * sum_k mean((h_k - A_{t_k})^2)`` (paper section 3.3).

    Student layer k learns from aggregate ``t_k = k * (L // K)``, counted from 1. The gates' tensors are read, and their
    ``forward`` is not called: hooks on them do not run, and FSDP is to shard the objective as a whole.

    Args:
        gates: the :class:`~lad_fast.GateStack` for the teacher's L layers; trained by the hidden loss.
        num_student_layers: K, from 1 to L.
        temperature: T of the soft loss, above 0.
        soft_weight, hard_weight, hidden_weight: weights of the soft, hard and hidden loss (mu).
        regression: squared errors on the logits instead of cross-entropies.
        student_hidden_size: hidden size of the student where it differs from the teacher's D: adds one linear
            projection a student layer to the teacher's size (``projections``).
        memory: "auto", "low" or "fast"; see :func:`lad_fast.fused_aggregate`.
        backend: None, "triton", "torch" or "reference"; see :func:`lad_fast.fused_aggregate`.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """

    def __init__(
        self,
        gates: GateStack,
        num_student_layers: int,
        temperature: float = 10.0,
        soft_weight: float = 0.5,
        hard_weight: float = 0.5,
        hidden_weight: float = 1000.0,
        regression: bool = False,
        student_hidden_size: int | None = None,
        memory: str = "auto",
        backend: str | None = None,
    ) -> None:
        if not isinstance(gates, GateStack):
            raise TypeError(f"gates is a {type(gates).__name__}; it takes a GateStack")
        super().__init__(
            gates, gates.num_layers, gates.hidden_size, num_student_layers, temperature, soft_weight, hard_weight,
            hidden_weight, regression, student_hidden_size, backend,
        )  # fmt: skip
        if memory not in MEMORY:
            raise ValueError(f"memory is {memory!r}; it takes one of {MEMORY}")
        self.memory = memory
        self.layers = every_skipth_layer(gates.num_layers, num_student_layers)

    def extra_repr(self) -> str:
        return f"layers={self.layers!r}, {super().extra_repr()}"

    def _losses(self, student, teacher, logits: LogitsLoss, attention_mask, cu_seqlens, backend) -> Sequence[Tensor]:
        return chain_loss(
            student, teacher, self.gates, self.layers, attention_mask, cu_seqlens, self.hidden_weight,
            logits=logits, memory=self.memory, backend=backend,
        )  # fmt: skip


def _check_devices(student, teacher, gates: GateStack | None, student_logits, teacher_logits, labels) -> None:
    """Raises a ValueError where not everything is where the student is, before anything runs."""
    others = {
        "teacher_hidden_states are": _any(teacher), "the gates are": getattr(gates, "weight", None),
        "student_logits are": student_logits, "teacher_logits are": teacher_logits, "labels are": labels,
    }  # fmt: skip
    student = _any(student)
    for name, tensor in others.items():
        if isinstance(student, Tensor) and isinstance(tensor, Tensor) and tensor.device != student.device:
            raise ValueError(
                f"{name} on {tensor.device}; student_hidden_states are on {student.device}; move one to the other"
            )


def _any(states):
    """One of the tensors; what is none, or holds none, is refused by name further down."""
    return states[0] if isinstance(states, Sequence) and len(states) else states


def _check_projected(name: str, hidden, weight: Tensor) -> None:
    check_float(name, hidden)
    if hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name} has shape {tuple(hidden.shape)}; the projections take D' = {weight.shape[1]}")
    if hidden.device != weight.device:
        raise ValueError(f"{name} is on {hidden.device}; the projections are on {weight.device}")
    # Autocast takes any pair but float64, which it leaves as it is.
    casts = autocast_dtype(hidden) is not None and torch.float64 not in (hidden.dtype, weight.dtype)
    if hidden.dtype != weight.dtype and not casts:
        raise TypeError(f"{name} has dtype {hidden.dtype}; the projections are {weight.dtype}")


def _unpack(name: str, hidden_states, logits):
    """Hidden states without the embedding output, and logits, also from a Hugging Face model output."""
    if hasattr(hidden_states, "logits"):
        if hidden_states.hidden_states is None:
            raise ValueError(
                f"{name}_hidden_states is a model output without hidden states; pass output_hidden_states=True"
            )
        return hidden_states.hidden_states[1:], hidden_states.logits if logits is None else logits
    if logits is None:
        raise ValueError(f"{name}_logits is None; it takes a tensor (B, C)")
    return hidden_states, logits

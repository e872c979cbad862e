"""What lad_fast is measured against: the published training step, restated, and a careful plain PyTorch one.

``PublishedStep`` keeps all that makes the published code slow and nothing else of it: float32, padding to a fixed
length, the tokenizer run for each side in every step, attention maps, a host sync per gate and per
loss, and K + 1 backward passes over one graph. ``tests/test_baselines.py`` holds it to the recorded runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from lad_fast import GateStack, LADObjective

__all__ = ["PlainStep", "PublishedGate", "PublishedLosses", "PublishedStep", "published_gates", "published_objective"]


class PublishedGate(nn.Module):
    """One gate of one teacher layer, normalised over the whole (S, D) of an example."""

    def __init__(self, hidden_size: int, seq_len: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        self.layernorm = nn.LayerNorm((seq_len, hidden_size))
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, previous: Tensor, layer: Tensor) -> Tensor:
        """(B, S, D) of the aggregate so far, zeros before the first layer, and of the teacher's layer."""
        if torch.all(torch.eq(previous, 0)):  # a wait for the device, at every gate
            return layer
        share = torch.sigmoid(self.linear(previous))
        return self.layernorm(layer * share + previous * (1 - share))


def published_gates(stack: GateStack) -> nn.ModuleList:
    """A gate a teacher layer with a :class:`~lad_fast.GateStack`'s parameters; the first is never used."""
    gates = nn.ModuleList(PublishedGate(stack.hidden_size, stack.seq_len) for _ in range(stack.num_layers))
    parameters = (stack.weight, stack.bias, stack.norm_weight, stack.norm_bias)
    with torch.no_grad():
        for gate, *values in zip(gates[1:], *parameters, strict=True):
            targets = (gate.linear.weight, gate.linear.bias, gate.layernorm.weight, gate.layernorm.bias)
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)
    return gates.to(stack.weight.device)


class PublishedLosses(NamedTuple):
    """Losses of one batch, on the host as the published loop reads them."""

    logits_loss: float
    hidden_losses: list[float]


def published_aggregate(teacher: Sequence[Tensor], gates: Sequence[nn.Module], reverse: bool = False) -> list[Tensor]:
    """All L aggregates (B, S, D) in the order of the teacher's layers."""
    chain = teacher[::-1] if reverse else teacher
    previous, aggregates = torch.zeros_like(chain[0]), []
    for layer, gate in zip(chain, gates, strict=True):
        previous = gate(previous, layer)
        aggregates.append(previous)
    return aggregates[::-1] if reverse else aggregates


def published_logits_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, soft: float, hard: float,
    regression: bool = False,
) -> Tensor:  # fmt: skip
    """Hard plus soft loss on (B, C)."""
    if regression:
        return hard * F.mse_loss(student_logits.squeeze(-1), labels) + soft * F.mse_loss(student_logits, teacher_logits)
    divergence = F.kl_div(
        F.log_softmax(student_logits / temperature, dim=1),
        F.softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
    )
    return hard * F.cross_entropy(student_logits, labels) + soft * divergence * temperature**2


def published_objective(
    student: Sequence[Tensor], teacher: Sequence[Tensor], student_logits: Tensor, teacher_logits: Tensor,
    labels: Tensor, gates: Sequence[nn.Module], layers: Sequence[int], *, temperature: float = 10.0,
    soft_weight: float = 0.5, hard_weight: float = 0.5, hidden_weight: float = 1000.0, regression: bool = False,
    reverse: bool = False, backward: bool = True,
) -> PublishedLosses:  # fmt: skip
    """The objective in its published form: each of the K + 1 losses is read and sent backward on its own.

    Args:
        student, teacher: K and L hidden states (B, S, D), the embeddings' left out.
        student_logits, teacher_logits: (B, C).
        labels: (B,).
        gates: L :class:`PublishedGate` in chain order.
        layers: 0-based teacher layer of each student layer.
        temperature, soft_weight, hard_weight, hidden_weight, regression, reverse: see :class:`lad_fast.LADObjective`.
        backward: False stops short of the backward passes.
    """

    def read(loss: Tensor) -> float:
        value = loss.item()
        if backward:
            loss.backward(retain_graph=True)
        return value

    logits_loss = read(
        published_logits_loss(
            student_logits, teacher_logits, labels, temperature, soft_weight, hard_weight, regression
        )
    )
    aggregates = published_aggregate(teacher, gates, reverse)
    hidden_losses = [
        read(hidden_weight * F.mse_loss(hidden, aggregates[layer]) / len(student))
        for hidden, layer in zip(student, layers, strict=True)
    ]
    return PublishedLosses(logits_loss, hidden_losses)


class PublishedStep:
    """One step of the published training loop.

    Args:
        student, teacher: ``BertForSequenceClassification``; switched to the attention that returns its maps.
        objective: gives gates, weights, layers and temperature, so that all contestants start alike.
        learning_rate, gate_learning_rate, total_steps, warmup_steps, weight_decay, max_grad_norm: as
            :class:`lad_fast.training.DistillStep`.
        tokenizer: run twice a step; None where only :meth:`update` is called.
        max_length: tokens to which every example is padded.
    """

    def __init__(
        self, student, teacher, objective: LADObjective, *, learning_rate: float, gate_learning_rate: float,
        total_steps: int, warmup_steps: int, weight_decay: float = 0.01, max_grad_norm: float = 1.0, tokenizer=None,
        max_length: int = 128,
    ) -> None:  # fmt: skip
        for model in (student, teacher):
            model.set_attn_implementation("eager")
        self.student, self.teacher = student.train(), teacher.eval()
        self.gates = published_gates(objective.gates)
        self.settings = {
            name: getattr(objective, name)
            for name in ("layers", "temperature", "soft_weight", "hard_weight", "hidden_weight", "regression")
        } | {"reverse": objective.gates.reverse}
        self.tokenizer, self.max_length, self.max_grad_norm = tokenizer, max_length, max_grad_norm
        self.optimizers = [
            torch.optim.AdamW(_decay_groups([student], weight_decay), lr=learning_rate),
            torch.optim.AdamW(_decay_groups(self.gates, weight_decay), lr=gate_learning_rate),
        ]
        self.schedulers = [get_linear_schedule_with_warmup(o, warmup_steps, total_steps) for o in self.optimizers]

    def __call__(self, texts: list[str], text_pairs: list[str] | None, labels: list) -> PublishedLosses:
        """Tokenise, for the teacher and again for the student, and update."""
        labels = torch.tensor(labels)
        return self.update(self._encode(texts, text_pairs), self._encode(texts, text_pairs), labels)

    def _encode(self, texts: list[str], text_pairs: list[str] | None) -> dict[str, Tensor]:
        encoding = self.tokenizer(
            texts, text_pairs, padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        return dict(encoding)

    def update(self, teacher_inputs: dict[str, Tensor], student_inputs: dict[str, Tensor], labels: Tensor):
        """Forward, K + 1 times backward, clip, and step both optimizers, on inputs (B, S) and labels (B,)."""
        device, outputs = self.student.device, {"output_hidden_states": True, "output_attentions": True}
        with torch.no_grad():
            teacher = self.teacher(**{name: t.to(device) for name, t in teacher_inputs.items()}, **outputs)
        student = self.student(**{name: t.to(device) for name, t in student_inputs.items()}, **outputs)
        losses = published_objective(
            student.hidden_states[1:], teacher.hidden_states[1:], student.logits, teacher.logits, labels.to(device),
            self.gates, **self.settings,
        )  # fmt: skip
        nn.utils.clip_grad_norm_(self.student.parameters(), self.max_grad_norm)
        for gate in self.gates:
            nn.utils.clip_grad_norm_(gate.parameters(), self.max_grad_norm)
        for stepped in (*self.optimizers, *self.schedulers):
            stepped.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return losses


def _decay_groups(modules: Sequence[nn.Module], weight_decay: float) -> list[dict]:
    """Two parameter groups a module: what decays, and biases and layer norms, which do not."""
    groups = []
    for module in modules:
        decayed, undecayed = [], []
        for name, parameter in module.named_parameters():
            kept = any(word in name for word in ("bias", "LayerNorm.weight", "layernorm.weight"))
            (undecayed if kept else decayed).append(parameter)
        groups += [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return groups


class PlainStep:
    """What a careful engineer writes in plain PyTorch: SDPA, autocast, one backward, one fused AdamW.

    Args:
        student, teacher: sequence classifiers, on transformers' default attention.
        objective: run on its "reference" back end, :mod:`lad_fast.reference` under autograd.
        learning_rate, gate_learning_rate, total_steps, warmup_steps, weight_decay, max_grad_norm: as
            :class:`lad_fast.training.DistillStep`.
        dtype: of autocast; float32 goes without.
        mask_padding: keep padding out of norms and hidden loss.
    """

    def __init__(
        self, student, teacher, objective: LADObjective, *, learning_rate: float, gate_learning_rate: float,
        total_steps: int, warmup_steps: int, weight_decay: float = 0.01, max_grad_norm: float = 1.0,
        dtype: torch.dtype = torch.float32, mask_padding: bool = True,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.objective = student.train(), teacher.eval(), objective
        self.dtype, self.mask_padding, self.max_grad_norm = dtype, mask_padding, max_grad_norm
        gate_groups = [group | {"lr": gate_learning_rate} for group in _decay_groups([objective.gates], weight_decay)]
        groups = [*_decay_groups([student], weight_decay), *gate_groups]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, warmup_steps, total_steps)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """One step over input_ids, attention_mask, token_type_ids (B, S) and labels (B,); the loss, detached."""
        device = self.student.device
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: batch[name].to(device, non_blocking=True) for name in names if name in batch}
        labels = batch["labels"].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            with torch.no_grad():
                teacher = self.teacher(**inputs, output_hidden_states=True)
            student = self.student(**inputs, output_hidden_states=True)
            loss = self.objective(
                student.hidden_states[1:], teacher.hidden_states[1:], student.logits.float(), teacher.logits.float(),
                labels, attention_mask=inputs["attention_mask"] if self.mask_padding else None, backend="reference",
            ).loss  # fmt: skip
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self.max_grad_norm)
        nn.utils.clip_grad_norm_(self.objective.gates.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.detach()

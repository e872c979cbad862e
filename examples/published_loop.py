"""The published training loop with only its section of gates and hidden losses replaced.

Follows ``train_LAD`` of https://github.com/IKMLab/LAD (fine_tune/util/train_LAD.py), restated, without its logging and
accumulation, for classification: a ``HighwayGate`` a teacher layer, an optimizer and a schedule for the student and for
the gates, losses read and sent backward on their own. What changed stands between the lines of dashes, and where gates
are trained and clipped: they are the stack's parameters now, without the first gate, which nothing used.
``gates.save_pretrained(folder)`` takes the place of the files gate-I-STEP.pt, which
``GateStack.from_official_checkpoint`` reads.
"""

from collections.abc import Iterable, Sequence

import torch
from tiny import SEQ_LEN, batches, bert, distill_loss
from torch import nn
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from lad_fast import GateStack, fused_aggregate, fused_hidden_loss
from lad_fast.step import clip_each_gate_


class HighwayGate(nn.Module):
    """The published gate's parameters; its ``forward`` is what GateStack replaces."""

    def __init__(self, dimension: int, seq_length: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dimension, dimension)
        self.layernorm = nn.LayerNorm([seq_length, dimension])
        nn.init.xavier_uniform_(self.linear.weight)


def train(
    teacher_model: PreTrainedModel,
    student_model: PreTrainedModel,
    gate_networks: Sequence[nn.Module],
    dataloader: Iterable[dict],
    *,
    total_step: int,
    warmup_step: int,
    lr: float,
    gate_lr: float,
    weight_decay: float = 0.01,
    max_norm: float = 1.0,
    softmax_temp: float = 10.0,
    soft_weight: float = 0.5,
    hard_weight: float = 0.5,
    mu: float = 1000.0,
    reverse_gate: bool = False,
) -> tuple[GateStack, list[tuple[float, list[float]]]]:
    """Train student and gates: one step a batch.

    Args:
        dataloader: batches padded to the gates' sequence length; the published loop's tokenizers stood in the loop.

    Returns:
        The gates, and the logits loss and the K hidden losses of each step.
    """
    teacher_model.eval()
    student_model.train()
    teacher_layers, student_layers = teacher_model.config.num_hidden_layers, student_model.config.num_hidden_layers
    skip = teacher_layers // student_layers
    teacher_indices = list(range(skip - 1, teacher_layers, skip))[:student_layers]

    gates = GateStack.from_highway_gates(gate_networks, reverse=reverse_gate).to(student_model.device)
    no_decay = [name for name, _ in student_model.named_parameters() if "bias" in name or "LayerNorm.weight" in name]
    decayed = [p for name, p in student_model.named_parameters() if name not in no_decay]
    undecayed = [student_model.get_parameter(name) for name in no_decay]
    optimizer = torch.optim.AdamW(_groups(decayed, undecayed, weight_decay), lr=lr)
    affine = [gates.bias, gates.norm_weight, gates.norm_bias]
    gates_optimizer = torch.optim.AdamW(_groups([gates.weight], affine, weight_decay), lr=gate_lr)
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup_step, total_step)
    gates_scheduler = get_linear_schedule_with_warmup(gates_optimizer, warmup_step, total_step)

    losses = []
    for batch in dataloader:
        batch = {name: value.to(student_model.device) for name, value in batch.items()}
        label = batch.pop("labels")
        with torch.no_grad():
            teacher = teacher_model(**batch, output_hidden_states=True)
        student = student_model(**batch, output_hidden_states=True)

        batch_logits_loss = distill_loss(student.logits, teacher.logits, label, softmax_temp, soft_weight, hard_weight)
        logits_loss = batch_logits_loss.item()
        batch_logits_loss.backward(retain_graph=True)

        # ---- was: one gate after another, each with a wait for the device, then a loss and a pass backward for every
        # student layer. Padding counts, as published: no mask. The stack itself turns the chain where it is reversed.
        aggregates = fused_aggregate(teacher.hidden_states[1:], gates, teacher_indices)
        batch_hidden_losses = fused_hidden_loss(student.hidden_states[1:], aggregates, weight=mu, reduction="none")
        hidden_losses = batch_hidden_losses.tolist()
        batch_hidden_losses.sum().backward()
        # ----
        losses.append((logits_loss, hidden_losses))

        nn.utils.clip_grad_norm_(student_model.parameters(), max_norm)
        clip_each_gate_(gates, max_norm)  # was: clip_grad_norm_ for each of gate_networks
        optimizer.step()
        gates_optimizer.step()
        scheduler.step()
        gates_scheduler.step()
        optimizer.zero_grad()
        gates_optimizer.zero_grad()
    return gates, losses


def _groups(decayed: list, undecayed: list, weight_decay: float) -> list[dict]:
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


if __name__ == "__main__":
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Yours: AutoModelForSequenceClassification.from_pretrained(...)
    teacher_model, student_model = bert(num_layers=6).to(device), bert(num_layers=3).to(device)
    gate_networks = [HighwayGate(teacher_model.config.hidden_size, SEQ_LEN) for _ in range(6)]
    gates, losses = train(
        teacher_model, student_model, gate_networks, batches(epochs=15), total_step=60, warmup_step=4, lr=3e-3,
        gate_lr=3e-4,
    )  # fmt: skip
    for step in range(0, len(losses), 10):
        logits_loss, hidden_losses = losses[step]
        print(f"step {step:2d}: logits loss {logits_loss:.3f}, hidden loss {sum(hidden_losses):.3f}")
    print(f"the loss of the last step is {losses[-1][0] + sum(losses[-1][1]):.3f}")

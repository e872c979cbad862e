"""A plain PyTorch loop that distils logits, and what makes it LAD: the lines that end with "# LAD".

Without those lines the rest runs as it stands. ``lad_fast.LADObjective``, in lightning_style.py, does the loss on
logits too, in one operator that keeps less memory.
"""

import torch
from tiny import SEQ_LEN, batches, bert, distill_loss
from torch import nn
from transformers import get_linear_schedule_with_warmup

from lad_fast import GateStack, fused_aggregate, fused_hidden_loss  # LAD
from lad_fast.step import clip_each_gate_  # LAD

EPOCHS = 15

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Yours: AutoModelForSequenceClassification.from_pretrained("path/of/a/fine-tuned/teacher"), and for the student
# lad_fast.models.build_student(teacher, 3), which starts from the teacher's embeddings and every second layer.
teacher, student = bert(num_layers=6).to(device), bert(num_layers=3).to(device).train()
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
gates = GateStack(num_layers=6, hidden_size=teacher.config.hidden_size, seq_len=SEQ_LEN).to(device)  # LAD
optimizer.add_param_group({"params": gates.parameters(), "lr": 3e-4})  # LAD
schedule = get_linear_schedule_with_warmup(optimizer, 4, 4 * EPOCHS)  # after all groups are in: it has a rate for each

losses = []
for step, batch in enumerate(batches(EPOCHS)):
    batch = {name: value.to(device) for name, value in batch.items()}
    labels = batch.pop("labels")
    batch["output_hidden_states"] = True  # LAD
    with torch.no_grad():
        taught = teacher(**batch)
    output = student(**batch)
    loss = distill_loss(output.logits, taught.logits, labels)
    targets = fused_aggregate(taught.hidden_states[1:], gates, (1, 3, 5), batch["attention_mask"])  # LAD
    loss = loss + fused_hidden_loss(output.hidden_states[1:], targets, batch["attention_mask"])  # LAD
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    clip_each_gate_(gates, 1.0)  # LAD
    optimizer.step()
    schedule.step()
    losses.append(loss.detach())
    if step % 10 == 0:
        print(f"step {step:2d}: loss {loss:.3f}")
print(f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps")

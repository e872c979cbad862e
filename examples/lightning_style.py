"""LAD as a LightningModule. Without Lightning (``pip install lightning``) a loop of ten lines takes Trainer's place."""

import torch
from tiny import SEQ_LEN, batches, bert
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from lad_fast import GateStack, LADObjective
from lad_fast.step import clip_each_gate_

try:
    from lightning.pytorch import LightningModule, Trainer
except ImportError:
    LightningModule, Trainer = nn.Module, None

EPOCHS = 15


class Distillation(LightningModule):
    """A student that learns from a frozen teacher by LAD.

    Trainer's checkpoints hold the teacher too. ``student.save_pretrained`` and ``objective.gates.save_pretrained``
    write what is to be kept.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, objective: LADObjective, total_steps: int,
        learning_rate: float = 3e-3, gate_learning_rate: float = 3e-4,
    ) -> None:  # fmt: skip
        super().__init__()
        self.student, self.teacher, self.objective = student, teacher.requires_grad_(False), objective
        self.total_steps, self.learning_rate, self.gate_learning_rate = total_steps, learning_rate, gate_learning_rate
        self.losses: list[Tensor] = []
        self.train()  # Trainer keeps the modes it finds, and from_pretrained gives eval mode

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        self.teacher.eval()
        return self

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            teacher = self.teacher(**inputs, output_hidden_states=True)
        student = self.student(**inputs, output_hidden_states=True)
        out = self.objective(student, teacher, labels=batch["labels"], attention_mask=batch["attention_mask"])
        self.losses.append(out.loss.detach())  # or self.log(...), which needs a Trainer
        return out.loss

    def configure_optimizers(self) -> dict:
        groups = [
            {"params": self.student.parameters()},  # and self.objective.projections, where hidden sizes differ
            {"params": self.objective.gates.parameters(), "lr": self.gate_learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        schedule = get_linear_schedule_with_warmup(optimizer, self.total_steps // 10, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Student and gates apart, each gate on its own; Trainer's gradient_clip_val would join them in one norm."""
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        clip_each_gate_(self.objective.gates, 1.0)


def fit(module: Distillation, dataloader: DataLoader) -> None:
    """What Trainer calls, in its order."""
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for _ in range(EPOCHS):
        for i, batch in enumerate(dataloader):
            loss = module.training_step(batch, i)
            optimizer.zero_grad()
            loss.backward()
            module.configure_gradient_clipping(optimizer)
            optimizer.step()
            schedule.step()


if __name__ == "__main__":
    torch.manual_seed(0)
    # Yours: AutoModelForSequenceClassification.from_pretrained(...)
    teacher, student = bert(num_layers=6), bert(num_layers=3)
    gates = GateStack(num_layers=6, hidden_size=teacher.config.hidden_size, seq_len=SEQ_LEN)
    dataloader = DataLoader(list(batches(1)), batch_size=None)  # these are batches already
    objective = LADObjective(gates, num_student_layers=3)
    module = Distillation(student, teacher, objective, total_steps=EPOCHS * len(dataloader))
    if Trainer is None:
        fit(module, dataloader)
    else:
        trainer = Trainer(
            max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, dataloader)
    for step in range(0, len(module.losses), 10):
        print(f"step {step:2d}: loss {module.losses[step]:.3f}")
    print(f"the loss of the last step is {module.losses[-1]:.3f}, {'without' if Trainer is None else 'by'} Lightning")

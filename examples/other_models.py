"""Students of another width than their teacher's, and other families than BERT.

Two things must fit: student and teacher read the same tokens, so they share a vocabulary and a tokenizer, and both
give a hidden state a layer and token, so that these have the same length.
"""

import torch
from tiny import SEQ_LEN, SIZES, batches, bert
from torch import Tensor
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lad_fast import GateStack, LADObjective
from lad_fast.models import build_student
from lad_fast.step import clip_each_gate_

EPOCHS = 15


def narrow_student() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A BERT of half the teacher's hidden size: the objective's projections bring its hidden states to the teacher's.

    Yours: google/bert_uncased_L-4_H-256_A-4 under google-bert/bert-base-uncased.
    """
    return bert(num_layers=3, hidden_size=16), bert(num_layers=6)


def distilbert_student() -> tuple[PreTrainedModel, PreTrainedModel]:
    """DistilBERT under BERT. Yours: distilbert/distilbert-base-uncased under google-bert/bert-base-uncased."""
    config = DistilBertConfig(
        vocab_size=SIZES["vocab_size"], dim=32, hidden_dim=64, n_layers=3, n_heads=2, max_position_embeddings=SEQ_LEN,
        initializer_range=SIZES["initializer_range"], dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    return DistilBertForSequenceClassification(config), bert(num_layers=6)


def roberta_pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """RoBERTa under RoBERTa. Yours: FacebookAI/roberta-base, fine-tuned.

    Examples are padded with token 1, not 0, and positions count the tokens that are not 1, whatever the attention mask
    says, from padding_idx + 1 = 2 on: S tokens take S + 2 position embeddings. There is one token type alone.
    """
    sizes = SIZES | {"max_position_embeddings": SEQ_LEN + 2, "type_vocab_size": 1}
    config = RobertaConfig(**sizes, hidden_size=32, num_hidden_layers=6)
    teacher = RobertaForSequenceClassification(config)
    return build_student(teacher, 3), teacher


def electra_pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """ELECTRA under ELECTRA; its embeddings may be narrower than its layers.

    Yours: google/electra-small-discriminator, fine-tuned.
    """
    config = ElectraConfig(**SIZES, embedding_size=16, hidden_size=32, num_hidden_layers=6)
    teacher = ElectraForSequenceClassification(config)
    return build_student(teacher, 3), teacher


def inputs_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model takes of a batch: DistilBERT has no token types, and RoBERTa only type 0."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if getattr(model.config, "type_vocab_size", 0) < 2:
        inputs.pop("token_type_ids", None)
    return inputs


def distil(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[LADObjective, list[float]]:
    """Train the student; the objective with its gates, and the loss of each step."""
    gates = GateStack(teacher.config.num_hidden_layers, teacher.config.hidden_size, SEQ_LEN)
    sizes = student.config.num_hidden_layers, student.config.hidden_size  # DistilBERT's knows these names too
    objective = LADObjective(gates, sizes[0], student_hidden_size=sizes[1])  # projections where hidden sizes differ
    projections = [] if objective.projections is None else [*objective.projections.parameters()]
    groups = [{"params": [*student.parameters(), *projections]}, {"params": gates.parameters(), "lr": 3e-4}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    student.train()
    teacher.eval()
    losses = []
    for batch in batches(EPOCHS, pad_token_id=teacher.config.pad_token_id):
        with torch.no_grad():
            taught = teacher(**inputs_of(teacher, batch), output_hidden_states=True)
        output = student(**inputs_of(student, batch), output_hidden_states=True)
        loss = objective(output, taught, labels=batch["labels"], attention_mask=batch["attention_mask"]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        clip_each_gate_(gates, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return objective, losses


PAIRS = (narrow_student, distilbert_student, roberta_pair, electra_pair)

if __name__ == "__main__":
    torch.manual_seed(0)
    for pair in PAIRS:
        _, losses = distil(*pair())
        steps = ", ".join(f"{losses[step]:.1f}" for step in range(0, len(losses), 15))
        print(f"{pair.__name__}: losses {steps}, and at the end {losses[-1]:.1f}")

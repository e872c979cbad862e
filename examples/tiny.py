"""What the examples share: random models and made-up data, so small that all runs offline in seconds."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

SEQ_LEN, VOCABULARY = 16, 64
SIZES = {
    "vocab_size": VOCABULARY, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": SEQ_LEN,
    "initializer_range": 0.2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def bert(num_layers: int, hidden_size: int = 32) -> BertForSequenceClassification:
    """A random classifier, in eval mode, as ``from_pretrained`` gives them."""
    return BertForSequenceClassification(
        BertConfig(num_hidden_layers=num_layers, hidden_size=hidden_size, **SIZES)
    ).eval()


def batches(epochs: int, pad_token_id: int = 0) -> Iterator[dict[str, Tensor]]:
    """The same four batches every epoch: what a tokenizer gives for 16 examples padded to SEQ_LEN, and labels."""
    numbers = torch.Generator().manual_seed(0)
    made = []
    for _ in range(4):
        tokens = torch.randint(5, VOCABULARY, (16, SEQ_LEN), generator=numbers)
        lengths = torch.randint(SEQ_LEN // 2, SEQ_LEN + 1, (16, 1), generator=numbers)
        position = torch.arange(SEQ_LEN)
        made.append({
            "input_ids": tokens.masked_fill(position >= lengths, pad_token_id),
            "attention_mask": (position < lengths).long(),
            "token_type_ids": ((position >= SEQ_LEN // 2) & (position < lengths)).long(),
            "labels": (tokens[:, 0] > VOCABULARY // 2).long(),
        })  # fmt: skip
    for _ in range(epochs):
        yield from map(dict, made)  # copies: loops take entries out


def distill_loss(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 10.0, soft: float = 0.5,
    hard: float = 0.5,
) -> Tensor:  # fmt: skip
    """The loss on logits that a distillation has before LAD."""
    log_student, teacher = F.log_softmax(logits / temperature, dim=1), F.softmax(teacher_logits / temperature, dim=1)
    divergence = F.kl_div(log_student, teacher, reduction="batchmean")
    return hard * F.cross_entropy(logits, labels) + soft * temperature**2 * divergence

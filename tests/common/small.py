"""A small BERT and tokenised data for it, which trains in a second."""

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from lad_fast.data import TokenizedSplit
from lad_fast.glue import get_task

RTE = get_task("rte")


def bert(num_layers=4, seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=24, hidden_size=16, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16,
            num_hidden_layers=num_layers, num_labels=2, initializer_range=0.2,
        )
    )  # fmt: skip


def split(num_examples, seed=0):
    numbers = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(numbers.integers(4, 13, num_examples))]).astype(np.int64)
    ids = numbers.integers(4, 24, offsets[-1]).astype(np.int32)
    return TokenizedSplit(
        RTE, "train", ids, None, offsets, numbers.integers(0, 2, num_examples), 100 + np.arange(num_examples)
    )

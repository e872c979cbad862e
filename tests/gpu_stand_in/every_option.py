"""Training runs with each option of the engine on run.sh's stand-in for a GPU, and what a step of each launches.

A step that reads from the device or waits for it fails; so do a capture with a launch outside of its stream, and
whatever PyTorch, Triton or Transformers refuse.
"""

import ctypes
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from lad_fast import functional, training
from lad_fast.data import TokenizedSplit
from lad_fast.glue import get_task
from lad_fast.step import DistillStep
from lad_fast.training import DistillConfig, FinetuneConfig, distill, finetune

OPTIONS = (
    *({"precision": precision} for precision in ("bfloat16", "float16", "tf32", "float32")),
    *({"padding": padding} for padding in ("packed", "longest", "max_length")),
    *({"teacher_cache": place} for place in ("gpu", "cpu", "disk", "off")),
    *({"method": method} for method in ("skip", "last", "attention", "logits", "none")),
    *({"cuda_graphs": True, "padding": padding} for padding in ("longest", "max_length")),
    {"gradient_accumulation_steps": 2},
    {"save_steps": 2},
    {"compile": True},
)
COUNTS = ("launches", "Triton's", "graphs", "reads", "waits", "outside of a capture")
counts = (ctypes.c_longlong * len(COUNTS)).in_dll(ctypes.CDLL("libcuda.so.1"), "counts")


def counted(function, found: list[dict[str, int]]):
    def call(*args, **kwargs):
        before = list(counts)
        result = function(*args, **kwargs)
        found.append({name: now - then for name, now, then in zip(COUNTS, counts, before, strict=True)})
        return result

    return call


def bert(num_layers: int) -> BertForSequenceClassification:
    """Heads of 32, which the flash kernel takes."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=60, hidden_size=64, num_attention_heads=2, intermediate_size=128, num_hidden_layers=num_layers,
            max_position_embeddings=32,
        )
    )  # fmt: skip


def split(name: str, num_examples: int) -> TokenizedSplit:
    numbers = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(numbers.integers(4, 13, num_examples))]).astype(np.int64)
    ids = numbers.integers(4, 60, offsets[-1]).astype(np.int32)
    labels = numbers.integers(0, 2, num_examples)
    return TokenizedSplit(get_task("rte"), name, ids, None, offsets, labels, np.arange(num_examples))


def train(folder: str, options: dict) -> list[dict[str, int]]:
    """What each step of three epochs called."""
    steps: list[dict[str, int]] = []
    settings = {
        "task": "rte", "output_dir": Path(folder), "batch_size": 4, "max_length": 16, "epochs": 3, "device": "cuda",
        "progress": False, "log_every": 1000,
    }  # fmt: skip
    data = {"train": split("train", 20), "evaluation": {"validation": split("validation", 6)}}
    with mock.patch.object(DistillStep, "__call__", counted(DistillStep.__call__, steps)):
        if options == {"finetune": True}:
            finetune(FinetuneConfig(model="", **settings), model=bert(4), **data)
        else:
            distill(DistillConfig(teacher="", student_layers=2, **settings | options), teacher=bert(4), **data)
    return steps


# What a run reads of its numbers is nothing to go by here.
training._Log.check = lambda log: log.unchecked.clear()
functional.check_looked_at = lambda *_: None
for options in ({"finetune": True}, *OPTIONS):
    with tempfile.TemporaryDirectory() as folder:
        *_, last = train(folder, options)
    assert not (last["reads"] or last["waits"] or last["outside of a capture"]), (options, last)
    told = ", ".join(f"{count} {name}" for name, count in last.items() if count)
    print(f"{torch.__version__}, {options}: the last step: {told}", flush=True)

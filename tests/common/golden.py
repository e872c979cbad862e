"""The recorded runs of the published code as models, batches and expected numbers."""

import json

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from lad_fast import GateStack, LADObjective
from lad_fast.step import DistillStep

FILES = ("rte_l12_k6", "mnli_l12_k4_reverse", "stsb_l12_k6")
GATE_NAMES = {
    "linear.weight": "weight",
    "linear.bias": "bias",
    "layernorm.weight": "norm_weight",
    "layernorm.bias": "norm_bias",
}


class Golden:
    """One recorded file as models, batches and expected numbers."""

    def __init__(self, path):
        with np.load(path) as file:
            self.arrays = {name: file[name] for name in file.files}
        self.name = path.stem
        self.meta = json.loads(self.arrays["meta_json"].tobytes())

    def tensors(self, prefix):
        """Entries below ``prefix`` under Hugging Face names."""
        return {
            name.removeprefix(f"{prefix}/").replace("encoder.", "bert.", 1).replace("linear_layer.", "classifier."): (
                torch.from_numpy(value)
            )
            for name, value in self.arrays.items()
            if name.startswith(f"{prefix}/")
        }

    def model(self, prefix, num_layers):
        meta = self.meta
        config = BertConfig(
            vocab_size=meta["vocab"], hidden_size=meta["d"], num_attention_heads=meta["heads"],
            intermediate_size=meta["ff"], max_position_embeddings=meta["s"], num_hidden_layers=num_layers,
            layer_norm_eps=meta["layer_norm_eps_bert"], hidden_dropout_prob=meta["dropout"],
            attention_probs_dropout_prob=meta["dropout"], num_labels=meta["classes"],
        )  # fmt: skip
        model = BertForSequenceClassification(config)
        model.load_state_dict(self.tensors(prefix))
        return model

    def gates(self, prefix):
        """Arrays of all gates but the first, which the published code never uses; None where unrecorded."""
        return {
            ours: [self.arrays.get(f"{prefix}/{i}/{theirs}") for i in range(1, self.meta["L"])]
            for theirs, ours in GATE_NAMES.items()
        }

    def step(self, backend, device="cpu"):
        meta = self.meta
        gates = GateStack(meta["L"], meta["d"], meta["s"], "sequence", meta["reverse"])
        initial = self.gates("gate_init").items()
        gates.load_state_dict({name: torch.from_numpy(np.stack(arrays)) for name, arrays in initial})
        objective = LADObjective(
            gates, meta["K"], meta["temp"], meta["soft"], meta["hard"], meta["mu"],
            regression=meta["classes"] == 1, backend=backend,
        )  # fmt: skip
        return DistillStep(
            self.model("student_init", meta["K"]).to(device), self.model("teacher", meta["L"]).to(device),
            objective.to(device),
            learning_rate=meta["lr"], gate_learning_rate=meta["gate_lr"], total_steps=meta["steps"],
            warmup_steps=meta["warmup_steps"], weight_decay=meta["weight_decay"],
            max_grad_norm=meta["max_grad_norm"], mask_padding=False,
        )  # fmt: skip

    def batch(self, n):
        rows = slice(n * self.meta["b"], (n + 1) * self.meta["b"])
        batch = {name: torch.from_numpy(self.arrays[name][rows]).long() for name in
                 ("input_ids", "token_type_ids", "attention_mask")}  # fmt: skip
        return batch | {"labels": torch.from_numpy(self.arrays["labels"][rows])}


def relative_rms(actual, expected):
    actual, expected = torch.as_tensor(actual).double().cpu(), torch.as_tensor(expected).double()
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()

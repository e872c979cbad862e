"""Models and gates in the files of the published code (github.com/IKMLab/LAD, ``fine_tune``).

A folder of an experiment holds ``config.json``, ``model-STEP.pt`` and, of a distilled student, ``gate_config.json`` and
``gate-I-STEP.pt``. Sizes are the tensors' own; the configuration is asked for what they do not tell.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from lad_fast.gates import GateStack, check_inside, check_tensor, load_tensors
from lad_fast.glue import TASKS, Task
from lad_fast.models import set_labels

__all__ = ["Published", "load_published"]

# Class names in the published order where it is not the hub's, which ours is.
_CLASSES = {task: ("not_entailment", "entailment") for task in ("rte", "qnli")}
_LAYER = re.compile(r"bert\.encoder\.layer\.(\d+)\.")


class Published(NamedTuple):
    """What :func:`load_published` returns."""

    model: BertForSequenceClassification
    """In eval mode, in float32; its classes are in the hub's order."""
    gates: GateStack | None
    """None of a folder without gates, such as a teacher's."""
    task: Task
    step: int
    """Of the files read."""
    settings: dict
    """config.json, and gate_config.json as its "gates"."""


def load_published(directory: str | Path, step: int | None = None, *, reverse: bool = False) -> Published:
    """Read a student or a teacher of the published code, and its gates where there are any.

    The published code numbers the classes of RTE and QNLI the other way round than the hub: the classifier's rows are
    put in the hub's order here.

    Args:
        directory: the folder of an experiment, such as ``LAD_6_layer_bert_rte``.
        step: of ``model-STEP.pt``; None takes the last.
        reverse: whether the gates were trained along the reversed chain, which no file says.

    Raises:
        FileNotFoundError: config.json, the model or a gate is missing.
        ValueError: a file that leads out of the directory, holds anything but tensors (nothing in it is run), or does
            not fit the others.
    """
    directory = Path(directory)
    settings = _read_json(directory, "config.json")
    task = TASKS.get(settings.get("task"))
    if task is None:
        found = str(settings.get("task"))[:100]
        raise ValueError(f"{directory / 'config.json'}: task is {found!r}; it takes one of {', '.join(TASKS)}")
    if step is None:
        step = _last_step(directory)
    model = _load_model(directory, f"model-{step}.pt", settings, task)
    gates = None
    if (directory / "gate_config.json").exists() or any(directory.glob("gate-*-*.pt")):
        settings["gates"] = _read_json(directory, "gate_config.json")
        gates = GateStack.from_official_checkpoint(directory, step, reverse)
        sizes = {"dimension": gates.hidden_size, "max_seq_length": gates.seq_len}
        _check_claims(directory / "gate_config.json", settings["gates"], sizes)
    return Published(model.eval(), gates, task, step, settings)


def _read_json(directory: Path, name: str) -> dict:
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(f"directory {directory} has no {name}")
    check_inside(directory, path)
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {str(error).splitlines()[0][:200]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; it takes an object")
    return content


def _last_step(directory: Path) -> int:
    names = (re.fullmatch(r"model-(\d+)\.pt", path.name) for path in directory.iterdir())
    steps = [int(name[1]) for name in names if name]
    if not steps:
        raise FileNotFoundError(f"directory {directory} has no model-STEP.pt")
    return max(steps)


def _load_model(directory: Path, name: str, settings: dict, task: Task) -> BertForSequenceClassification:
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(f"directory {directory} has no {name}")
    check_inside(directory, path)
    state = load_tensors(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}; a published model holds a dictionary")
    state = {_our_name(str(key)): value for key, value in state.items() if not str(key).endswith("position_ids")}
    for key, value in state.items():
        check_tensor(f"{path}: {key}", value)
    config = _config(path, state, settings)
    _check_claims(
        directory / "config.json", settings,
        {
            "d_model": config.hidden_size, "d_ff": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers, "num_class": task.num_labels,
        },
    )  # fmt: skip
    set_labels(config, task)
    model = BertForSequenceClassification(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is no BERT classifier of {task.num_labels} classes: {reason}") from error
    if order := _CLASSES.get(task.name):
        for parameter in model.classifier.parameters():
            parameter.data = parameter.data[[order.index(label) for label in task.labels]]
    return model


def _our_name(name: str) -> str:
    name = re.sub(r"^encoder\.", "bert.", name)
    return re.sub(r"^linear_layer\.", "classifier.", name)


def _config(path: Path, state: dict[str, Tensor], settings: dict) -> BertConfig:
    """The configuration that the tensors have; heads and dropout are the settings'."""

    def size(name: str, dim: int) -> int:
        if name not in state or state[name].dim() <= dim:
            raise ValueError(f"{path} has no matrix {name}; it takes the state of a published BERT classifier")
        return state[name].shape[dim]

    embeddings, layer = "bert.embeddings", "bert.encoder.layer.0"
    hidden_size = size(f"{embeddings}.word_embeddings.weight", 1)
    layers = {int(found[1]) for found in map(_LAYER.match, state) if found}
    heads = settings.get("num_attention_heads", max(1, hidden_size // 64))  # a teacher's is BERT's: 64 features a head
    dropout = settings.get("dropout", 0.1)
    if type(heads) is not int or heads < 1 or hidden_size % heads:
        raise ValueError(f"{path.parent / 'config.json'}: num_attention_heads is {heads!r}; it takes a divisor of "
                         f"{hidden_size}")  # fmt: skip
    if type(dropout) not in (int, float) or not 0 <= dropout <= 1:
        raise ValueError(f"{path.parent / 'config.json'}: dropout is {dropout!r}; it takes a number from 0 to 1")
    return BertConfig(
        vocab_size=size(f"{embeddings}.word_embeddings.weight", 0),
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        intermediate_size=size(f"{layer}.intermediate.dense.weight", 0),
        max_position_embeddings=size(f"{embeddings}.position_embeddings.weight", 0),
        type_vocab_size=size(f"{embeddings}.token_type_embeddings.weight", 0),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def _check_claims(path: Path, claims: dict, found: dict[str, int]) -> None:
    for name, value in found.items():
        if name in claims and claims[name] != value:
            raise ValueError(f"{path}: {name} is {repr(claims[name])[:100]}; the tensors are of {value}")

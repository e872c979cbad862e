"""Runs a step again whose numbers were not finite, from what a training run left of it, and tells which came first.

The run keeps weights and moments as they were before such a step (:attr:`lad_fast.step.DistillStep.is_held`) and the
state of the generator, so the step here is that step: the same batch, teacher, dropout and arithmetic.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from lad_fast import training
from lad_fast.checkpoint import read_checkpoint
from lad_fast.models import encoder_layers, quiet
from lad_fast.report import format_table
from lad_fast.step import DistillStep, Prepared
from lad_fast.training import DistillConfig, FinetuneConfig, TrainingConfig

__all__ = ["Part", "Replay", "replay"]


class Part(NamedTuple):
    """One tensor, or several, of a step."""

    name: str
    largest: float
    """Magnitude of the largest finite entry."""
    num_bad: int
    """Entries that are not finite."""
    size: int
    """Entries."""


@dataclass(frozen=True)
class Replay:
    """What :func:`replay` found.

    Attributes:
        step: the optimizer step's number in its run.
        examples: ids of its examples.
        weights: which ones it started from: "before the step" or, where the run could not keep those, "after step N".
        expected: what was not finite in the run.
        found: what was not finite now.
        parts: the step's tensors in the order in which they come to be.
        module: the first module of the student whose output was not finite; None where there was none.
        notes: what is not as it was in the run.
    """

    step: int
    examples: list[int]
    weights: str
    expected: list[str]
    found: list[str]
    parts: list[Part]
    module: str | None
    notes: list[str]

    @property
    def first(self) -> Part | None:
        """The first of ``parts`` that is not finite."""
        return next((part for part in self.parts if part.num_bad), None)

    def __str__(self) -> str:
        rows = [(part.name, f"{part.largest:.3g}", f"{part.num_bad:,} of {part.size:,}") for part in self.parts]
        same = "as in the run" if self.found == self.expected else f"in the run: {', '.join(self.expected)}"
        lines = [
            f"step {self.step}, with the weights {self.weights}; ids of its examples: "
            + ", ".join(map(str, self.examples)),
            *self.notes,
            "",
            format_table(("part", "largest", "not finite"), rows),
            "",
            f"not finite: {', '.join(self.found) or 'nothing'} ({same})",
        ]
        if self.first is not None:
            where = f", in {self.module} of the student" if self.module else ""
            lines.append(f"the first: {self.first.name}{where}")
        return "\n".join(lines)


def replay(path: str | Path, device: str = "auto") -> Replay:
    """Run the step again that a training run left in ``path``; nothing in the folder is changed.

    Encoders are not compiled and graphs not captured. On another kind of device dropout draws other numbers.

    Args:
        path: a folder ``not-finite-step-N``.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.

    Raises:
        ValueError: no such folder, a damaged one, or a model that is not Transformers'.
    """
    path = Path(path).expanduser()
    if not re.fullmatch(r"not-finite-step-\d+", path.resolve().name) or not path.is_dir():
        raise ValueError(f"dump is {path}; it takes a folder not-finite-step-N, which a training run left")
    state = read_checkpoint(path).state
    place = training._pick_device(device)
    config, step = _restored(state, place)
    batches = []
    for given in state["inputs"]:
        batch = step.prepare(given["batch"])
        if given["teacher"] is not None:
            logits, states = given["teacher"]
            batch = batch._replace(teacher=(logits.to(place), tuple(h.to(place) for h in states)))
        batches.append(batch)

    before = [*_weights(step), *(part for i, batch in enumerate(batches) for part in _teaching(step, batch, i))]
    same_kind = place.type == torch.device(state["device"]).type
    if same_kind:
        generator = state["before"]["generator"]
        (torch.cuda.set_rng_state(generator, place) if place.type == "cuda" else torch.set_rng_state(generator))
    with _watched(step) as (outputs, gradients), training.matmuls(config.precision):
        losses = step(*batches)
    modules = [name for name, is_state, part in outputs if part.num_bad and not is_state]
    values = training.numbers(losses, step.grad_norms)
    return Replay(
        step=state["step"],
        examples=state["examples"],
        weights=state["weights"],
        expected=state["parts"],
        found=training.not_finite(values),
        parts=[
            *before,
            *(part for _, is_state, part in outputs if is_state),
            *(_part(name, value) for name, value in losses.items()),
            *gradients.values(),
        ],
        module=modules[0] if modules else None,
        notes=list(_notes(state, config, place, same_kind)),
    )


def _restored(state: dict, device: torch.device) -> tuple[TrainingConfig, DistillStep]:
    """The configuration, and a step with the weights, moments and loss scale of the dump."""
    content, sizes = state["config"], state["teacher"]
    kind = DistillConfig if "method" in content else FinetuneConfig
    content = {field.name: content[field.name] for field in fields(kind)} | {"cuda_graphs": False, "compile": False}
    config, task = kind(**content), SimpleNamespace(**state["task"])
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    student = _model(state["student"]).to(device)
    config = training._settle(config, device, student)
    teacher = objective = None
    own = {}
    if sizes is not None:  # its outputs are in the dump
        teacher = nn.Module()
        teacher.config = student.config  # of which batches are prepared
        objective = training._make_objective(config, task, SimpleNamespace(config=SimpleNamespace(**sizes)), student)
        own = {"gate_learning_rate": config.gate_learning_rate, "mask_padding": config.mask_padding}
    step = DistillStep(student, teacher, objective, **own, **state["options"] | {"cuda_graphs": False})
    step.load_state_dict(state["state"])
    return config, step


def _model(described: dict) -> PreTrainedModel:
    settings = dict(described["config"])
    # Any other would be packing's, which is enabled later, or a kernel of the hub, whose code would be run.
    attention = {"attn_implementation": described["attention"]} if described["attention"] in ("eager", "sdpa") else {}
    try:
        with quiet():
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False, **attention)
    except (KeyError, ValueError) as error:
        raise ValueError(f"the student is a {described['class']}, which cannot be made here ({error})") from error
    if type(model).__name__ != described["class"]:
        raise ValueError(f"the student is a {described['class']}; replay takes a model of Transformers")
    return model


def _notes(state: dict, config: TrainingConfig, device: torch.device, same_kind: bool) -> Iterator[str]:
    for name, version in state["versions"].items():
        if training.VERSIONS[name] != version:
            yield f"{name} was {version} and is {training.VERSIONS[name]}"
    if not same_kind:
        yield f"the run was on {state['device']}, this is on {device}: dropout draws other numbers"
    if state["processes"] > 1:
        yield f"the run had {state['processes']} processes, this is one: dropout draws other numbers"
    if config.precision == "float16":
        yield f"gradients are times the loss scale, {state['state']['scaler']['scale']:g}"


def _part(name: str, *tensors: Tensor) -> Part:
    tensors = [tensor.detach() for tensor in tensors]
    finite = [tensor.isfinite() for tensor in tensors]
    largest = max((t.where(f, 0).abs().max().item() for t, f in zip(tensors, finite, strict=True)), default=0.0)
    size = sum(tensor.numel() for tensor in tensors)
    return Part(name, largest, size - sum(int(f.sum()) for f in finite), size)


def _weights(step: DistillStep) -> Iterator[Part]:
    yield _part("weights of student", *step.student_parameters)
    for i in range(0 if step.gates is None else len(step.gates.weight)):
        yield _part(f"weights of gates[{i}]", *(parameter[i] for parameter in step.gates.parameters()))


@torch.no_grad()
def _teaching(step: DistillStep, batch: Prepared, number: int) -> Iterator[Part]:
    """The teacher's outputs, and the aggregates of its layers."""
    where = f"batch {number}: "
    if batch.teacher is None:
        return
    logits, states = batch.teacher
    for i, state in enumerate(states):
        yield _part(f"{where}teacher's hidden_states[{i}]", state)
    yield _part(f"{where}teacher's logits", logits)
    if step.gates is None:
        return
    mask, packing = batch.attention_mask if step.mask_padding else None, batch.inputs.get("packing")
    bounds = None if packing is None else packing.cu_seqlens
    with step.autocast():
        aggregates = step.gates(states, None, mask, bounds, backend=step.objective.backend)
    layers = range(len(aggregates))
    for i in reversed(layers) if step.gates.reverse else layers:  # along the chain
        yield _part(f"{where}aggregates[{i}]", aggregates[i])


@contextmanager
def _watched(step: DistillStep) -> Iterator[tuple[list[tuple[str, bool, Part]], dict[str, Part]]]:
    """Follow a step: outputs of the student's modules as they come (name, whether a layer's), and gradients."""
    outputs, gradients, handles, calls = [], {}, [], count()
    states = {layer: f"student's hidden_states[{i}]" for i, layer in enumerate(_layers(step.student))}
    states[step.student] = "student's logits"
    number = 0

    def begin(*_) -> None:
        nonlocal number
        number = next(calls)

    def follow(name: str, module: nn.Module):
        def hook(_module, _inputs, output) -> None:
            first = output.logits if hasattr(output, "logits") else output
            first = first[0] if isinstance(first, tuple) and first else first
            if isinstance(first, Tensor) and first.is_floating_point():
                part = _part(f"batch {number}: {states.get(module, name)}", first)
                outputs.append((name, module in states, part))

        return module.register_forward_hook(hook)

    def gather(name: str, parameters: list[tuple[str, nn.Parameter]], rows: int = 0):
        def hook(_parameter) -> None:
            found = [parameter.grad for _, parameter in parameters if parameter.grad is not None]
            for i in range(rows):
                gradients[f"{name}[{i}]"] = _part(f"gradient of {name}[{i}]", *(grad[i] for grad in found))
            if not rows:
                gradients[name] = _part(f"gradient of {name}", *found)

        return [parameter.register_post_accumulate_grad_hook(hook) for _, parameter in parameters]

    groups: dict[str, list] = {}
    for name, parameter in reversed(list(step.student.named_parameters())):
        if parameter.requires_grad:
            groups.setdefault(_group(name), []).append((name, parameter))
    try:
        handles.append(step.student.base_model.register_forward_pre_hook(begin))
        handles += [follow(name, module) for name, module in step.student.named_modules()]
        for name, members in groups.items():
            handles += gather(name, members)
        if step.gates is not None:
            handles += gather("gates", list(step.gates.named_parameters()), len(step.gates.weight))
        yield outputs, gradients
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    try:
        return encoder_layers(model)[1]
    except ValueError:  # its layers share weights
        return ()


def _group(name: str) -> str:
    """The layer that a parameter belongs to, or the part of the model outside of layers."""
    found = re.match(r"(.*\blayers?\.\d+)\.", name)
    return found[1] if found else name.rpartition(".")[0]

"""LAD in Hugging Face's Trainer (:class:`LADTrainer`). Needs accelerate, as every Trainer does."""

import inspect
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from lad_fast.gates import GateStack, check_inside
from lad_fast.models import check_unshared, class_names, hidden_states_by_name
from lad_fast.objective import HiddenObjective, LADObjective
from lad_fast.step import clip_each_gate_

__all__ = ["LADTrainer", "LADTrainingArguments"]

_PROJECTIONS = "projections.safetensors"


@dataclass
class LADTrainingArguments(TrainingArguments):
    """Transformers' ``TrainingArguments`` with the gates' own."""

    gate_learning_rate: float = field(
        default=5e-6, metadata={"help": "Peak learning rate of the gates; it follows the student's schedule."}
    )
    gate_max_grad_norm: float = field(
        default=1.0,
        metadata={"help": "Each gate's gradients are scaled down to this norm; 0, or no max_grad_norm: not at all."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gate_learning_rate", "gate_max_grad_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it takes a number of at least 0")


class LADTrainer(Trainer):
    """``Trainer`` whose training loss is LAD's or another objective's: ``model`` learns from a frozen ``teacher``.

    Gates (and projections) are trained by the same optimizer in groups of their own, each gate is clipped on its own,
    and they are saved and loaded with every checkpoint (gates.safetensors). Evaluation is Trainer's: the student alone.
    Batches that accumulate count alike, as in every Trainer; :class:`~lad_fast.step.DistillStep` counts examples.
    Columns that the teacher takes and the student does not, as a DistilBERT no ``token_type_ids``, are the teacher's.

    Args:
        model: the student, a sequence classifier, as it is or under adapters of PEFT's; the teacher likewise.
        args: :class:`LADTrainingArguments`.
        teacher: a fine-tuned sequence classifier of the same classes; put on the training device, in eval mode.
        objective: :class:`~lad_fast.LADObjective` or another of :mod:`lad_fast.strategies` for both models; None makes
            LAD's with its defaults, for examples of up to ``seq_len`` tokens, with gates drawn by ``args.seed``.
            Several processes train what the first one has.
        seq_len: where ``objective`` is None.
        **options: as Trainer takes them, but for another loss. Datasets need "labels" (or "label"): classes, none of
            them -100, or numbers of models with one label.

    Raises:
        TypeError, ValueError: an objective or arguments that do not fit the models, and a ``model_init``,
            ``compute_loss_func`` or ``label_smoothing_factor``, for which this loss has no place.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: LADTrainingArguments,
        *,
        teacher: PreTrainedModel,
        objective: HiddenObjective | None = None,
        seq_len: int = 128,
        **options,
    ) -> None:
        if not isinstance(args, LADTrainingArguments):
            raise TypeError(f"args is a {type(args).__name__}; it takes LADTrainingArguments")
        if model is None or options.get("model_init") is not None:
            raise ValueError("model is None or made by model_init; it takes the student itself, which objective fits")
        if options.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func is set; the loss is that of objective")
        if args.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor is {args.label_smoothing_factor}; objective smooths no labels")
        _check_models(model, teacher)
        super().__init__(model=model, args=args, **options)
        if objective is None:  # after Trainer has set the seed
            size = teacher.config.num_hidden_layers, teacher.config.hidden_size
            objective = LADObjective(
                GateStack(*size, seq_len),
                model.config.num_hidden_layers,
                regression=model.config.num_labels == 1,
                student_hidden_size=model.config.hidden_size,
            )
        self.objective = objective.to(args.device)
        if self.accelerator.num_processes > 1:
            for tensor in (*self.objective.parameters(), *self.objective.buffers()):
                dist.broadcast(tensor.data, src=0)
        self._check_parameters()
        self.teacher = teacher.to(args.device).eval().requires_grad_(False)
        self._teacher_takes, students = _inputs(teacher), _inputs(model)
        # A wrapper that names no inputs hands on what it gets.
        self._teachers_own = self._teacher_takes - students if "input_ids" in students else set()
        # A batch's mean: Trainer divides it by the batches that accumulate, by this name in every version 5.
        self.model_accepts_loss_kwargs = False
        self._zeroed_at: int | None = None  # the step whose gradients the objective holds
        self._sums: dict[str, Tensor | float] = defaultdict(float)

    def _check_parameters(self) -> None:
        """None of the objective's parameters would stay as they were drawn."""
        known = [module for module in (self.objective.gates, self.objective.projections) if module is not None]
        known = {id(p) for module in known for p in module.parameters()}
        for name, parameter in self.objective.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                raise ValueError(f"objective's {name} would not be trained; LADTrainer trains gates and projections")
        if self.optimizer is None:
            return
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, parameter in self.objective.named_parameters():
            if parameter.requires_grad and id(parameter) not in held:
                raise ValueError(
                    f"optimizers holds an optimizer without the objective's {name}; add objective.parameters() to it, "
                    "or leave it out and set the arguments' optim"
                )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += sorted(self._teachers_own)

    def _for_student(self, inputs: dict) -> dict:
        return {name: value for name, value in inputs.items() if name not in self._teachers_own}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """LAD's loss in training; else the model's own."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        if (labels := inputs.pop("labels", None)) is None:
            raise ValueError(f"the batch has no labels, only {', '.join(inputs)}; train_dataset needs labels or label")
        outputs = model(**self._for_student(inputs), **hidden_states_by_name(self.model))
        with self.accelerator.autocast():
            with torch.no_grad():
                known = {name: value for name, value in inputs.items() if name in self._teacher_takes}
                teacher = self.teacher(**known, **hidden_states_by_name(self.teacher))
            losses = self.objective(outputs, teacher, labels=labels, attention_mask=inputs.get("attention_mask"))
        self._sums["batches"] += 1
        for name in ("hidden_loss", "logits_loss"):
            self._sums[name] += getattr(losses, name).detach()
        return (losses.loss, outputs) if return_outputs else losses.loss

    def prediction_step(self, model, inputs, *options, **named):
        """Trainer's, without the columns that are the teacher's alone."""
        return super().prediction_step(model, self._for_student(inputs), *options, **named)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Trainer's; between processes the objective's gradients are averaged here, as it lies outside the model."""
        if self._zeroed_at != self.state.global_step:  # Trainer's own zero_grad reaches the model alone
            self.objective.zero_grad()
            self._zeroed_at = self.state.global_step
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            for parameter in self.objective.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return loss

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Trainer's, with groups for the gates and the projections; an optimizer passed to Trainer has its own."""
        self._zeroed_at = None  # training starts here, maybe after one that was broken off
        self._sums.clear()
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        gates, rate, decay = self.objective.gates, self.args.gate_learning_rate, self.args.weight_decay
        groups = []
        if gates is not None:
            affine = [gates.bias, gates.norm_weight, gates.norm_bias]
            groups += [
                {"params": [gates.weight], "lr": rate, "weight_decay": decay},
                {"params": affine, "lr": rate, "weight_decay": 0.0},
            ]
        if self.objective.projections is not None:
            named = list(self.objective.projections.named_parameters())
            groups += [
                {"params": [p for name, p in named if "bias" not in name], "weight_decay": decay},
                {"params": [p for name, p in named if "bias" in name], "weight_decay": 0.0},
            ]
        for group in groups:
            optimizer.add_param_group(group)
        return optimizer

    def _clip_grad_norm(self, model):
        projections = self.objective.projections
        parameters = [*model.parameters(), *(projections.parameters() if projections is not None else ())]
        norm = self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)  # unscales the gates' as well
        if self.objective.gates is not None and self.args.gate_max_grad_norm > 0:
            clip_each_gate_(self.objective.gates, self.args.gate_max_grad_norm)
        return norm

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            if self.objective.gates is not None:
                self.objective.gates.save_pretrained(folder)
            if self.objective.projections is not None:
                state = {name: value.contiguous() for name, value in self.objective.projections.state_dict().items()}
                save_file(state, folder / _PROJECTIONS)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_objective(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_objective(Path(self.state.best_model_checkpoint))

    def _load_objective(self, folder: Path) -> None:
        if self.objective.gates is not None:
            gates = GateStack.from_pretrained(folder)
            if gates.config != self.objective.gates.config:
                raise ValueError(f"{folder} has gates of {gates.config}; these are of {self.objective.gates.config}")
            self.objective.gates.load_state_dict(gates.state_dict())
        if self.objective.projections is not None:
            check_inside(folder, folder / _PROJECTIONS)
            self.objective.projections.load_state_dict(load_file(folder / _PROJECTIONS))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's; lines with the training loss also get hidden_loss and logits_loss, means since the last one."""
        if "loss" in logs and self._sums["batches"]:
            batches = self._sums.pop("batches")
            for name, value in self._sums.items():
                logs[name] = self.accelerator.gather(value.reshape(1)).mean().item() / batches
            self._sums.clear()
        super().log(logs, start_time)


def _inputs(model: nn.Module) -> set[str]:
    """Names that a model's forward takes; wrappers that hand on what they do not name, torch.compile's and PEFT's, are
    looked behind.
    """
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):  # PEFT's
        model = model.get_base_model()
    return set(inspect.signature(model.forward).parameters)


def _check_models(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises a TypeError for what is no model, a ValueError for a teacher that cannot teach the student."""
    for name, model in (("model", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} is a {type(model).__name__}; it takes a sequence classifier, loaded")
        kind, num_labels = model.config.problem_type, model.config.num_labels
        if kind == "multi_label_classification" or (kind == "regression" and num_labels > 1):
            raise ValueError(f"{name} is for {kind} of {num_labels} labels; objectives take one class or one number")
    if teacher.config.num_labels != student.config.num_labels:
        raise ValueError(f"teacher has {teacher.config.num_labels} labels; the model has {student.config.num_labels}")
    ours, theirs = class_names(student), class_names(teacher)
    if ours != theirs and set(ours) == set(theirs):
        raise ValueError(f"teacher has the labels {list(theirs)}; the model has {list(ours)}: the same in this order")
    check_unshared(student, teacher)

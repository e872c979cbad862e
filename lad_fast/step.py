"""The training step (:class:`DistillStep`).

batch ─┬─ student ────────────────────┐
       │                              ├─ objective ─ one backward ─ clip student, clip each gate ─ AdamW ─ schedule
       └─ teacher, or its kept output ┘
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from lad_fast.cpu import RowGradients, lay_out_
from lad_fast.data import num_tokens
from lad_fast.distributed import ALONE, World
from lad_fast.gates import GateStack
from lad_fast.graphs import StepGraphs
from lad_fast.models import check_unshared, model_inputs, run_model
from lad_fast.objective import HiddenObjective
from lad_fast.optimizers import make_adamw
from lad_fast.teacher_cache import TeacherCache

__all__ = ["HALF", "DistillStep", "Prepared", "autocast", "clip_each_gate_", "prepare_ahead"]

HALF = ("bfloat16", "float16")  # the precisions that run under autocast


class Part(NamedTuple):
    """How much of a batch this process has; the whole of one where it is alone."""

    examples: int
    tokens: int
    """Real ones."""
    all_examples: int
    all_tokens: int


class Prepared(NamedTuple):
    """A batch where training runs, as :meth:`DistillStep.prepare` makes it."""

    inputs: dict
    """Arguments of :func:`~lad_fast.models.run_model`."""
    attention_mask: Tensor | None
    """(B, S), or None where every token is real."""
    labels: Tensor
    """(B,)."""
    teacher: tuple[Tensor, tuple[Tensor, ...]] | None
    """The teacher's logits and hidden states, where a cache holds them."""
    index: Tensor | None
    """(B,) on the CPU: the examples' places in the split."""
    part: Part
    """Of several processes' batch."""


class DistillStep:
    """One optimizer step of a student under a frozen teacher; without a teacher, of a model on its labels.

    Student and gates are trained by one AdamW with a group each for what decays and what does not: student
    parameters but for biases and LayerNorm weights, and of the gates only ``weight``. Both learning rates
    rise linearly for ``warmup_steps``, then fall linearly to 0 at ``total_steps``. Gradients are clipped to
    ``max_grad_norm`` over the whole student, and for each gate on its own. A gate that no student layer's
    target depends on (at the chain's end: reversed, or where K does not divide L) has a gradient of zero
    and is only decayed; where that is every gate, they have none and stay as they are.

    Args:
        student: the model to train; put in training mode.
        teacher: put in eval mode and run without gradients, by the weights that it has when the step is made; None
            trains on labels alone.
        objective: :class:`~lad_fast.LADObjective` or another of :mod:`lad_fast.strategies`; or a function of
            (student_logits, teacher_logits, labels) where hidden states take no part. None, without a teacher:
            cross-entropy, or squared error for float labels.
        learning_rate, gate_learning_rate: peaks for the student (with the objective's projections, and any other
            parameters that it has) and gates.
        total_steps, warmup_steps: optimizer steps.
        weight_decay: AdamW's.
        max_grad_norm: of the student, and of each gate.
        mask_padding: hand the objective the attention mask; False: padding counts, as published.
        precision: "float32", or the autocast dtype "bfloat16" or "float16" (with loss scaling).
        optimizer: "torch" or "apex"; see :func:`lad_fast.optimizers.make_adamw`.
        teacher_cache: keeps the teacher's outputs; batches it holds are not run through the teacher again.
        cuda_graphs: capture forward and backward of each shape of padded batch that comes again, and replay them.
        world: processes that take this step together, each on its part of the batches, as
            :class:`~lad_fast.data.Batches` gives them: gradients meet in DistributedDataParallel. Every mean of a loss
            is over the whole batch, that of a masked hidden loss over the real tokens of all its parts, so that many
            processes do what one does with their batches joined.

    Attributes:
        grad_norms: of the last step before clipping, on the device: "student" () and, with gates, "gates" (L-1,).
        is_held: () float32 on the device, 1 from the first step on whose gradients were not finite: that step and
            all after it leave weights and moments as they were, to be looked at. Always 0 in float16, where the loss
            scaler skips the one step, and with "apex", which takes no such word.

    Raises:
        ValueError: a teacher without an objective or the other way round; one of them on another device than the
            student; a teacher that shares parameters with it; weights to be trained in half precision; graphs without
            a GPU, or with several processes.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        objective: HiddenObjective | Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        *,
        learning_rate: float,
        gate_learning_rate: float = 0.0,
        total_steps: int,
        warmup_steps: int,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
        mask_padding: bool = True,
        precision: str = "float32",
        optimizer: str = "torch",
        teacher_cache: TeacherCache | None = None,
        cuda_graphs: bool = False,
        world: World = ALONE,
    ) -> None:
        if (teacher is None) != (objective is None):
            raise ValueError("teacher and objective go together; pass both or neither")
        if cuda_graphs and world.size > 1:
            raise ValueError("cuda_graphs takes one process; a captured step does not wait for other processes")
        for name, module in (("teacher", teacher), ("objective", objective)):
            for parameter in module.parameters() if isinstance(module, nn.Module) else ():
                if parameter.device != student.device:
                    raise ValueError(f"{name} is on {parameter.device}; student is on {student.device}")
        for name, parameter in student.named_parameters():
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(f"student's {name} is {parameter.dtype}; weights train in float32: student.float()")
        if teacher is not None:
            check_unshared(student, teacher)
        self.student, self.teacher, self.objective = student.train(), teacher, objective
        self.teacher_cache = teacher_cache
        if teacher is not None:
            teacher.eval()
            if precision in HALF or student.device.type == "cpu":
                self.teacher = frozen_twin(teacher, getattr(torch, precision) if precision in HALF else None)
        self.uses_hidden_states = isinstance(objective, HiddenObjective)
        self.gates = objective.gates if self.uses_hidden_states else None
        self.total_steps, self.max_grad_norm, self.mask_padding = total_steps, max_grad_norm, mask_padding
        device = student.device.type
        self.autocast = partial(autocast, device, precision)
        self.scaler = torch.amp.GradScaler(device, enabled=precision == "float16")

        norms = [module for module in student.modules() if type(module).__name__.endswith("Norm")]
        scales = {id(parameter) for norm in norms for parameter in norm.parameters()}

        def is_undecayed(name: str, parameter: nn.Parameter) -> bool:
            return "bias" in name or id(parameter) in scales

        named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        if isinstance(objective, nn.Module):  # projections, and what an objective of one's own has
            gates = set() if self.gates is None else {id(p) for p in self.gates.parameters()}
            named += [(n, p) for n, p in objective.named_parameters() if p.requires_grad and id(p) not in gates]
        self.student_parameters = [parameter for _, parameter in named]
        groups = [
            {"params": [p for name, p in named if not is_undecayed(name, p)], "weight_decay": weight_decay},
            {"params": [p for name, p in named if is_undecayed(name, p)], "weight_decay": 0.0},
        ]
        if self.gates is not None:
            affine = [self.gates.bias, self.gates.norm_weight, self.gates.norm_bias]
            groups += [
                {"params": [self.gates.weight], "weight_decay": weight_decay, "lr": gate_learning_rate},
                {"params": affine, "weight_decay": 0.0, "lr": gate_learning_rate},
            ]
        self.optimizer = make_adamw(groups, learning_rate, optimizer)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, warmup_steps, total_steps)
        self.graphs = StepGraphs(self._run, self._zero_grad, student.device) if cuda_graphs else None
        self.row_gradients = RowGradients(student)
        self.optimizer.zero_grad()  # of a backward before training
        self.grad_norms: dict[str, Tensor] = {}
        self.world = world
        self._forward: DistributedDataParallel | None = None
        self.holds = not self.scaler.is_enabled() and getattr(self.optimizer, "_step_supports_amp_scaling", False)
        self.is_held = torch.zeros((), device=student.device)

    def __call__(self, *batches: dict[str, Tensor] | Prepared) -> dict[str, Tensor]:
        """One optimizer step over one batch, or over several whose gradients accumulate.

        Args:
            *batches: dicts as :class:`~lad_fast.data.Batches` gives them, or what :meth:`prepare` made of them.
                Several count by their examples, so equal halves of a batch do what the batch does (up to a masked
                hidden loss, whose mean over real tokens is taken batch by batch).

        Returns:
            Mean losses by name, detached and on the device: reading them is the caller's wait.
        """
        if not batches:
            raise ValueError("batches is empty; a step takes at least one")
        batches = [batch if isinstance(batch, Prepared) else self.prepare(batch) for batch in batches]
        num_examples = sum(batch.part.all_examples for batch in batches)
        totals: dict[str, Tensor] = {}
        for batch in batches:
            share = batch.part.all_examples / num_examples
            graphed = self.graphs(batch) if self.graphs is not None and share == 1 else None
            losses, teacher = graphed or self._run(batch, share, is_last=batch is batches[-1])
            if self.teacher_cache is not None and batch.teacher is None:
                self.teacher_cache.write(batch.index, *teacher)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value * share
        totals = self._summed(totals)
        self.scaler.unscale_(self.optimizer)
        self.grad_norms = {"student": self.row_gradients.clip_(self.student_parameters, self.max_grad_norm)}
        if self.gates is not None:
            self.grad_norms["gates"] = clip_each_gate_(self.gates, self.max_grad_norm)
        if self.holds:
            is_finite = torch.cat([norms.reshape(-1) for norms in self.grad_norms.values()]).isfinite().all()
            self.is_held = self.is_held.maximum((~is_finite).float())
            self.optimizer.found_inf = self.is_held  # fused AdamW reads it on the device
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self._zero_grad()
        return totals

    def prepare(self, batch: dict[str, Tensor]) -> Prepared:
        """Move a batch to the device, without a wait, and fetch what the cache holds of the teacher's.

        Raises:
            ValueError: a batch without labels; or, with several processes, one that does not say what part of it this
                process has.
        """
        if self.world.size > 1 and "counts" not in batch:
            raise ValueError("batch has no 'counts'; several processes take those of Batches with part and parts")
        if batch.get("labels") is None:
            raise ValueError(f"batch has no labels, only {', '.join(batch)}; training takes labelled ones")
        inputs, mask = model_inputs(self.student, batch, self.teacher)
        cache, index = self.teacher_cache, batch.get("index")
        teacher = None
        if cache is not None and cache.holds(index):
            teacher = cache.read(index, None if "packing" in inputs else inputs["input_ids"].shape[1])
        labels = batch["labels"].to(self.student.device, non_blocking=True)
        own = len(labels), num_tokens(batch)
        counts = batch["counts"].flatten().tolist() if "counts" in batch else (*own, *own)
        return Prepared(inputs, mask, labels, teacher, index, Part(*counts))

    @torch.no_grad()
    def fill_cache(self, batch: dict[str, Tensor]) -> None:
        """Run the teacher alone, for the cache."""
        inputs, _ = model_inputs(self.student, batch, self.teacher)
        with self.autocast():
            self.teacher_cache.write(batch["index"], *self._run_teacher(inputs))

    @torch.no_grad()
    def teach(self, batch: Prepared) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The teacher's logits and hidden states that a step on the batch takes; None without a teacher."""
        if self.teacher is None:
            return None
        with self.autocast():
            return batch.teacher or self._run_teacher(batch.inputs)

    def look_at_gates(self, batch: dict[str, Tensor]) -> dict[str, list]:
        """What a log tells of the gates, on what a step on the batch would take of the teacher.

        Returns:
            "gates", their :meth:`~lad_fast.GateStack.condition`; "contributions", (K, L): of the
            :meth:`~lad_fast.GateStack.contributions`, the aggregates that the student's K layers learn from.
        """
        batch = self.prepare(batch)
        packing = batch.inputs.get("packing")
        where = {
            "hidden_states": self.teach(batch)[1],
            "attention_mask": batch.attention_mask if self.mask_padding else None,
            "cu_seqlens": None if packing is None else packing.cu_seqlens,
        }
        shares = self.gates.contributions(**where)[list(self.objective.layers)]
        return {"gates": self.gates.condition(**where), "contributions": shares.tolist()}

    def state_dict(self) -> dict:
        """All that steps change, in nested dicts and lists: what the next step depends on beside its batch."""
        optimizer = self.optimizer.state_dict()
        return {
            "student": self.student.state_dict(),
            "objective": self.objective.state_dict() if isinstance(self.objective, nn.Module) else {},
            # Its keys are numbers, which JSON does not know as names.
            "optimizer": optimizer | {"state": {str(i): state for i, state in optimizer["state"].items()}},
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.is_held = torch.zeros_like(self.is_held)
        self.student.load_state_dict(state["student"])
        if isinstance(self.objective, nn.Module):
            self.objective.load_state_dict(state["objective"])
        moments = {int(i): moment for i, moment in state["optimizer"]["state"].items()}
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"]:  # empty of a step without loss scaling; then this one's scale stays at its start
            self.scaler.load_state_dict(state["scaler"])

    def losses(self, batch: dict[str, Tensor] | Prepared) -> dict[str, Tensor]:
        """Forward passes and objective: losses by name, of which "loss" carries the gradient.

        Raises:
            ValueError: a model without one hidden state a layer, or inputs the objective refuses.
        """
        return self._losses(batch if isinstance(batch, Prepared) else self.prepare(batch))[0]

    def _run(
        self, batch: Prepared, share: float = 1.0, is_last: bool = True
    ) -> tuple[dict[str, Tensor], tuple | None]:
        """Forward and backward: detached losses, and the teacher's logits and hidden states.

        Of several processes each gets its terms of the losses; gradients meet in the last of a step's backwards.
        """
        if self.world.size == 1:
            with self.row_gradients.recorded():
                losses, teacher = self._losses(batch)
            self.scaler.scale(losses["loss"] * share).backward()
        else:
            if self._forward is None:
                self._forward = self._distributed(batch)
            with nullcontext() if is_last else self._forward.no_sync():
                losses, teacher = self._forward(batch)
                losses = self._own_terms(losses, batch)
                # The processes' gradients are to be summed, and DistributedDataParallel takes their mean.
                self.scaler.scale(losses["loss"] * (share * self.world.size)).backward()
        return {name: value.detach() for name, value in losses.items()}, teacher

    def _distributed(self, batch: Prepared) -> DistributedDataParallel:
        trained = [self.student, *([self.objective] if isinstance(self.objective, nn.Module) else [])]
        # No buffer changes in training; PyTorch 2.13 renames the option that says so.
        names = inspect.signature(DistributedDataParallel).parameters
        buffers = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
        device = self.student.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # It must be told of parameters that take no part in the losses, as gates may; looking for them costs time
            # and a warning in each process, so one batch tells.
            self._losses(batch)[0]["loss"].backward()
            parameters = [p for module in trained for p in module.parameters() if p.requires_grad]
            has_unused = any(parameter.grad is None for parameter in parameters)
            self.optimizer.zero_grad()
            result = DistributedDataParallel(
                _Forward(self._losses, trained),
                process_group=self.world.group, find_unused_parameters=has_unused, **buffers,
            )  # fmt: skip
            # After its first backward it lays gradients out anew, which changes the order of sums among three or more:
            # were that a step, a resumed run would not go on to the bit.
            result(batch)[0]["loss"].backward()
            self.optimizer.zero_grad()
        return result

    def _own_terms(self, losses: dict[str, Tensor], batch: Prepared) -> dict[str, Tensor]:
        """What this process's part adds to the whole batch's means."""
        part, takes_real = batch.part, self.mask_padding or "packing" in batch.inputs
        by_examples = part.examples / part.all_examples
        weights = {name: by_examples for name in losses}
        if self.uses_hidden_states and takes_real:
            weights["hidden_loss"] = weights["hidden_losses"] = part.tokens / part.all_tokens
        own = {name: value * weights[name] for name, value in losses.items()}
        return own | ({"loss": own["hidden_loss"] + own["logits_loss"]} if self.uses_hidden_states else {})

    def _summed(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every process's terms added up; one small message."""
        if self.world.size == 1:
            return terms
        flat = torch.cat([value.reshape(-1) for value in terms.values()])
        dist.all_reduce(flat, group=self.world.group)
        sums = flat.split([value.numel() for value in terms.values()])
        return {name: own.view(value.shape) for own, (name, value) in zip(sums, terms.items(), strict=True)}

    def _losses(self, batch: Prepared) -> tuple[dict[str, Tensor], tuple | None]:
        packing = batch.inputs.get("packing")
        with self.autocast():
            logits, states = run_model(self.student, batch.inputs, self.uses_hidden_states)
            logits = logits.float()
            if self.teacher is None:
                return {"loss": _label_loss(logits, batch.labels)}, None
            teacher = batch.teacher or self._run_teacher(batch.inputs)
            if not self.uses_hidden_states:
                return {"loss": self.objective(logits, teacher[0], batch.labels)}, teacher
            output = self.objective(
                states, teacher[1], logits, teacher[0], batch.labels,
                attention_mask=batch.attention_mask if self.mask_padding else None,
                cu_seqlens=None if packing is None else packing.cu_seqlens,
            )  # fmt: skip
        return output._asdict(), teacher

    @torch.no_grad()
    def _run_teacher(self, inputs: dict) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits, states = run_model(self.teacher, inputs, self.uses_hidden_states)
        if self.teacher_cache is not None:  # what a later epoch will read
            states = [state.to(self.teacher_cache.dtype) for state in states or ()]
        return logits.float(), tuple(states or ())

    def _zero_grad(self) -> None:
        # Graphs write where they wrote when they were captured.
        self.optimizer.zero_grad(set_to_none=self.graphs is None)


class _Forward(nn.Module):
    """All that is trained, with the one forward pass through it: what DistributedDataParallel takes."""

    def __init__(self, forward: Callable, trained: list[nn.Module]) -> None:
        super().__init__()
        self.trained, self.forward = nn.ModuleList(trained), forward


def prepare_ahead(
    batches: Iterable[dict[str, Tensor]], prepare: Callable[[dict[str, Tensor]], Prepared], device: torch.device
) -> Iterator[Prepared]:
    """Batches prepared one ahead: on a GPU each is copied, on a stream of its own, while the one before computes."""
    if device.type != "cuda":
        yield from map(prepare, batches)
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # what the last epoch wrote to a teacher cache
    waiting = None
    for batch in batches:
        with torch.cuda.stream(stream):
            started = prepare(batch), stream.record_event()
        if waiting is not None:
            yield _arrived(*waiting, device)
        waiting = started
    if waiting is not None:
        yield _arrived(*waiting, device)


def _arrived(batch: Prepared, copied: torch.cuda.Event, device: torch.device) -> Prepared:
    stream = torch.cuda.current_stream(device)  # which need not be the current device
    stream.wait_event(copied)
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            leaf.record_stream(stream)  # its memory belongs to the other stream, which must not reuse it too soon
    return batch


def clip_each_gate_(gates: GateStack, max_norm: float) -> Tensor:
    """Scale each gate's gradients, its four tensors together, to a norm of at most ``max_norm``.

    Returns:
        The norms before, (L-1,).
    """
    grads = [parameter.grad for parameter in gates.parameters() if parameter.grad is not None]
    if not grads:
        return gates.bias.new_zeros(len(gates.bias))
    norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)  # (L-1,)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.view(-1, *[1] * (grad.dim() - 1)))
    return norms


def frozen_twin(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A copy of a model for inference alone, which shares its tensors.

    Linear layers are kept in ``dtype``, so that under autocast no weight is cast again at every step (None: as they
    are), and on a CPU as oneDNN's products want them too; what else is in the other half type is kept in float32. The
    numbers are ``model``'s.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}.get(dtype)  # norms refuse it under autocast
    for module in twin.modules():
        is_linear = isinstance(module, nn.Linear)
        for name, parameter in module.named_parameters(recurse=False) if dtype else ():
            if is_linear or parameter.dtype == other:
                kept = parameter.detach().to(dtype if is_linear else torch.float32)
                setattr(module, name, nn.Parameter(kept, requires_grad=False))
        if is_linear:
            lay_out_(module)
    for module, copied in zip(model.modules(), twin.modules(), strict=True):
        if module._compiled_call_impl is not None:  # which a copy leaves behind
            copied.compile(dynamic=True)
    return twin


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Autocast to a half precision; a context that does nothing for the others."""
    # Off, it still wants a dtype that it knows.
    dtype = getattr(torch, precision) if precision in HALF else torch.bfloat16
    return torch.autocast(device_type, dtype, enabled=precision in HALF)


def _label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        return F.mse_loss(logits.flatten(), labels)
    return F.cross_entropy(logits, labels)

"""The objective and its parts on random inputs, as each contestant computes them."""

import functools
import importlib.util
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from baselines import published_aggregate, published_gates, published_logits_loss, published_objective
from measuring import DEVICE, DTYPES, autocast
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from workloads import our_backend

from lad_fast import GateStack, LADObjective, fused_aggregate, fused_distill_loss, fused_hidden_loss, reference

# Norm of the difference of two gradients over the norm of one. float32: another order of sums. bfloat16: both round
# every intermediate along the chain, each to about a fortieth; a wrong gradient is off by its own size.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


@dataclass(frozen=True)
class Shape:
    """T tokens in examples of ``seq_len``, D hidden size, L teacher layers; the student has half as many."""

    tokens: int
    hidden_size: int
    layers: int
    seq_len: int = 128

    @property
    def state_bytes(self) -> int:
        return 4 * self.tokens * self.hidden_size

    def __str__(self) -> str:
        return f"T {self.tokens}, D {self.hidden_size}, L {self.layers}"


class Problem:
    """Random inputs of one shape: leaves with gradients, made alike for every contestant."""

    def __init__(self, shape: Shape, dtype: str) -> None:
        torch.manual_seed(0)
        num_student = shape.layers // 2
        states = DTYPES[dtype] if DEVICE.type == "cuda" else torch.float32
        seq_len, batch_size = shape.seq_len, shape.tokens // shape.seq_len

        def normal(*size: int, dtype=states) -> Tensor:
            return torch.randn(size, device=DEVICE).to(dtype)

        self.dtype, self.shape = dtype, shape
        self.gates = GateStack(shape.layers, shape.hidden_size, seq_len).to(DEVICE)
        self.objective = LADObjective(self.gates, num_student)
        self.highway = published_gates(self.gates)
        size = (batch_size, seq_len, shape.hidden_size)
        self.teacher = [normal(*size) for _ in range(shape.layers)]
        self.student = [normal(*size, dtype=torch.float32).requires_grad_() for _ in range(num_student)]
        self.aggregates = [normal(*size).requires_grad_() for _ in range(num_student)]
        self.upstream = [normal(*size) / size[0] for _ in range(num_student)]
        self.logits = normal(batch_size, 2, dtype=torch.float32).requires_grad_()
        self.teacher_logits = normal(batch_size, 2, dtype=torch.float32)
        self.labels = torch.randint(2, (batch_size,), device=DEVICE)

    @property
    def settings(self) -> tuple[float, float, float]:
        return self.objective.temperature, self.objective.soft_weight, self.objective.hard_weight

    @property
    def known(self) -> list[Tensor]:
        """Inputs and parameters: what the caller holds anyway."""
        states = [*self.teacher, *self.student, *self.aggregates, *self.upstream]
        ends = [self.logits, self.teacher_logits, self.labels]
        return [*states, *ends, *self.gates.parameters(), *self.highway.parameters()]

    def gate_leaves(self, published: bool) -> list[list[Tensor]]:
        """Parameters by kind; the published form has one a gate."""
        if not published:
            return [[parameter] for parameter in self.gates.parameters()]
        return [list(kind) for kind in zip(*(gate.parameters() for gate in self.highway[1:]), strict=True)]


class Operation(NamedTuple):
    """How each contestant computes one thing; every function takes a problem and returns tensors to differentiate."""

    fused: Callable[[Problem, str], tuple[Tensor, ...]]
    reference: Callable
    """What torch.compile is given, with ``arguments(problem)``."""
    arguments: Callable[[Problem], tuple]
    published: Callable[[Problem], tuple[Tensor, ...]]
    leaves: Callable[[Problem, bool], list[list[Tensor]]]


def state_leaves(problem: Problem, published: bool) -> list[list[Tensor]]:
    return [[leaf] for leaf in (*problem.student, *problem.aggregates)]


OPERATIONS = {
    "aggregate": Operation(
        lambda p, backend: fused_aggregate(p.teacher, p.gates, p.objective.layers, backend=backend),
        reference.aggregate,
        lambda p: (p.teacher, p.gates, p.objective.layers),
        lambda p: operator.itemgetter(*p.objective.layers)(published_aggregate(p.teacher, p.highway)),
        lambda p, published: p.gate_leaves(published),
    ),
    "hidden loss": Operation(
        lambda p, backend: (fused_hidden_loss(p.student, p.aggregates, backend=backend),),
        reference.hidden_loss,
        lambda p: (p.student, p.aggregates),
        lambda p: tuple(
            read(1000.0 * F.mse_loss(h, a) / len(p.student)) for h, a in zip(p.student, p.aggregates, strict=True)
        ),
        state_leaves,
    ),
    "logit loss": Operation(
        lambda p, backend: (fused_distill_loss(p.logits, p.teacher_logits, p.labels, *p.settings, backend=backend),),
        reference.distill_loss,
        lambda p: (p.logits, p.teacher_logits, p.labels, *p.settings),
        lambda p: (read(published_logits_loss(p.logits, p.teacher_logits, p.labels, *p.settings)),),
        lambda p, published: [[p.logits]],
    ),
    "objective": Operation(
        lambda p, backend: (
            p.objective(p.student, p.teacher, p.logits, p.teacher_logits, p.labels, backend=backend).loss,
        ),
        reference.lad_loss,
        lambda p: (p.student, p.teacher, p.logits, p.teacher_logits, p.labels, p.gates, p.objective.layers),
        None,  # sends its losses backward itself: see Contestant
        lambda p, published: [*([leaf] for leaf in (*p.student, p.logits)), *p.gate_leaves(published)],
    ),
}


def read(loss: Tensor) -> Tensor:
    """The loss, after the host has waited for it as the published loop does."""
    loss.item()
    return loss


class Contestant:
    """One way of computing an operation on one problem."""

    def __init__(self, name: str, operation: str, problem: Problem) -> None:
        self.name, self.problem, self.operation = name, problem, OPERATIONS[operation]
        self.leaves = self.operation.leaves(problem, name == "published")
        self.upstream = problem.upstream if operation == "aggregate" else None
        self.whole = name == "published" and operation == "objective"
        self.compiled = torch.compile(self.operation.reference, dynamic=False) if name == "compiled" else None

    def forward(self):
        """The outputs, with what autograd keeps for them."""
        problem, dtype = self.problem, DTYPES[self.problem.dtype]
        with autocast(dtype):
            if self.whole:
                return self._published_objective(backward=False)
            if self.name == "published":
                return self.operation.published(problem)
            if self.name == "liger":
                return liger_loss(problem)
            if self.compiled is not None:
                output = self.compiled(*self.operation.arguments(problem))
                return output if isinstance(output, tuple) else (output,)
            return self.operation.fused(problem, self.name)

    def drop_gradients(self) -> None:
        for kind in self.leaves:
            for leaf in kind:
                leaf.grad = None

    def step(self) -> None:
        """Forward and backward; gradients are left in the leaves."""
        self.drop_gradients()
        if self.whole:
            self._published_objective(backward=True)
        elif self.name == "published":  # one backward a loss
            for i, output in enumerate(self.forward()):
                output.backward(None if self.upstream is None else self.upstream[i], retain_graph=True)
        else:
            torch.autograd.backward(self.forward(), self.upstream)

    def gradients(self) -> list[Tensor]:
        """One tensor a leaf of the others; the published gates' are put together."""
        stacked = [[leaf.grad for leaf in kind] for kind in self.leaves]
        is_gate = [len(kind) > 1 for kind in self.leaves]
        return [torch.stack(grads) if gate else grads[0] for grads, gate in zip(stacked, is_gate, strict=True)]

    def _published_objective(self, backward: bool):
        p = self.problem
        return published_objective(
            p.student, p.teacher, p.logits, p.teacher_logits, p.labels, p.highway, p.objective.layers, backward=backward
        )


def liger_loss(problem: Problem) -> tuple[Tensor]:
    """Liger's KL divergence in place of the soft loss; its kernels have no hard loss to go with it."""
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    temperature, soft, hard = problem.settings
    student = F.log_softmax(problem.logits / temperature, dim=-1)
    teacher = F.log_softmax(problem.teacher_logits / temperature, dim=-1)
    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)(student, teacher)
    return (hard * F.cross_entropy(problem.logits, problem.labels) + soft * temperature**2 * divergence,)


def contestants(operation: str, dtype: str) -> list[str]:
    """Who takes part; the reference first, for the others' ratios."""
    names = ["reference", our_backend(DEVICE)] + (["torch"] if DEVICE.type == "cuda" else [])
    if dtype == "float32":  # what the published code runs in
        names.append("published")
    if operation in ("aggregate", "objective"):
        names.append("compiled")
    if operation == "logit loss" and DEVICE.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        names.append("liger")
    return names


class Right(NamedTuple):
    """What the reference does in one case."""

    gradients: list[Tensor]
    work: dict[str, tuple[int, int]]
    """FLOP of matrix products and bytes that forward, and forward with backward, cannot do without. The bytes: inputs
    read once, results and gradients written once; what is written to be read again comes on top, and is in no roof."""


@functools.lru_cache(maxsize=1)
def problem(shape: Shape, dtype: str) -> Problem:
    """The case's inputs, kept while one contestant after another takes them."""
    return Problem(shape, dtype)


@functools.lru_cache(maxsize=1)
def right(operation: str, shape: Shape, dtype: str) -> Right:
    contestant = Contestant("reference", operation, problem(shape, dtype))
    inputs = _tensors(OPERATIONS[operation].arguments(contestant.problem))
    with FlopCounterMode(display=False) as forward:
        outputs = contestant.forward()
    with FlopCounterMode(display=False) as both:
        contestant.step()
    gradients = contestant.gradients()
    moved = sum(tensor.nbytes for tensor in (*inputs, *outputs))
    back = sum(gradient.nbytes for gradient in gradients)
    work = {
        "forward": (forward.get_total_flops(), moved),
        "forward+backward": (both.get_total_flops(), moved + back),
    }
    return Right(gradients, work)


def _tensors(arguments) -> list[Tensor]:
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, nn.Module):
        return list(arguments.parameters())
    return [t for a in arguments for t in _tensors(a)] if isinstance(arguments, list | tuple) else []


def check(contestant: Contestant, expected: list[Tensor]) -> None:
    """The gradients are the reference's: no figure of a wrong result."""
    contestant.step()
    for ours, theirs in zip(contestant.gradients(), expected, strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error <= TOLERANCE[contestant.problem.dtype], f"{contestant.name}: relative error {error:.1e}"

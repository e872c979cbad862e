"""Any calls of the public API in any order, drawn by Hypothesis: each gives what float64 gives or says what is wrong.

`make fuzz` goes on for ten minutes (LAD_FAST_FUZZ_SECONDS) and counts what it tried in benchmarks/results/fuzz.json,
from which docs/reliability.md is written.
"""

import copy
import io
import json
import os
import pickle
import re
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path

import bench_record
import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import BertConfig, BertForSequenceClassification

import lad_fast
from lad_fast import GateStack, LADObjective, functional
from lad_fast.checkpoint import Checkpoints, read_checkpoint
from lad_fast.data import Batches, TokenizedSplit
from lad_fast.functional import chain_loss
from lad_fast.glue import get_task
from lad_fast.kernels import eager, launch
from lad_fast.models import quiet, save_checkpoint
from lad_fast.packed import enable_packing
from lad_fast.step import DistillStep
from lad_fast.strategies import AttentionObjective, LayerMapObjective
from lad_fast.teacher_cache import TeacherCache
from lad_fast.training import evaluate

SECONDS = float(os.environ.get("LAD_FAST_FUZZ_SECONDS", 0))
RESULT = bench_record.RESULTS / "fuzz.json"
COUNTS: dict[str, Counter] = {}

QUICK = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)
NAMES = re.compile(
    r"student_hidden_states|hidden_states|hidden states|aggregates|attention_mask|cu_seqlens|student_logits|"
    r"teacher_logits|labels|gates|layers|backend|memory|reverse|eps|reduction|weight|temperature|regression|"
    r"num_layers|hidden_size|seq_len|norm"
)
"""What a message may name: the arguments of the public functions and constructors."""


def counted(**strategies):
    """A rule that is counted by its name."""

    def wrap(function):
        def counting(self, **drawn):
            COUNTS.setdefault(type(self).__name__, Counter())[function.__name__] += 1
            function(self, **drawn)

        counting.__name__ = function.__name__
        return rule(**strategies)(counting)

    return wrap


@contextmanager
def refusal():
    """The block may work or be refused by an error that names an argument in one line; all else is a failure."""
    try:
        yield
    except (TypeError, ValueError) as error:
        event("refused")
        text = str(error)
        if not NAMES.search(text) or "\n" in text:
            raise AssertionError(f"an error that names no argument: {type(error).__name__}: {text}") from error


# --- inputs -----------------------------------------------------------------------------------------------------------

CALLS = st.fixed_dictionaries({
    "mode": st.sampled_from(("plain", "masked", "packed")),
    "dtype": st.sampled_from((torch.float32, *FLOATS)),
    "batch": st.integers(1, 4),
    "length": st.integers(1, 9),
    "classes": st.integers(1, 4),
    "layout": st.sampled_from(("contiguous", "contiguous", "transposed", "strided", "expanded", "shifted")),
    "values": st.sampled_from(("normal", "normal", "large", "tiny", "zero", "equal", "outliers", "not finite")),
    "learns": st.sampled_from(("student", "all", "teacher", "nothing")),
    "autocast": st.sampled_from((None, None, torch.bfloat16, torch.float16)),
    "context": st.sampled_from(("grad", "grad", "grad", "no_grad", "inference_mode")),
    "inference": st.sampled_from((False, False, False, True)),
    "seed": st.integers(0, 2**16),
})  # fmt: skip


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (but for "expanded") in memory that is not contiguous, or does not begin at a multiple of 16."""
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        wide = values.new_zeros(*values.shape[:-1], 2 * values.shape[-1])
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "expanded":
        return values[:1].expand(values.shape)
    if layout == "shifted":
        flat = values.new_zeros(values.numel() + 1)
        flat[1:] = values.flatten()
        return flat[1:].view(values.shape)
    return values


def make_inputs(objective: LADObjective, call: dict, seq_len: int) -> dict:
    """Arguments of ``objective`` by name; all of one batch."""
    generator = torch.Generator().manual_seed(call["seed"])
    scale = {"large": 30.0, "tiny": 1e-3, "zero": 0.0}.get(call["values"], 1.0)
    gates, num_examples = objective.gates, call["batch"]
    length = min(call["length"], seq_len)
    student_size = objective.projections[0].in_features if objective.projections else gates.hidden_size

    def draw(*shape):
        values = scale * torch.randn(*shape, generator=generator)
        if call["values"] == "equal":
            values = torch.full(shape, 0.5)
        if call["values"] == "outliers":
            values[..., 0] *= 100
        if call["values"] == "not finite":
            values.view(-1)[-1] = (torch.nan, torch.inf)[call["seed"] % 2]
        return laid_out(values.to(call["dtype"]), call["layout"])

    mask = bounds = None
    leading = (num_examples, length)
    lengths = torch.randint(0, length + 1, (num_examples,), generator=generator)
    if call["mode"] == "masked":
        mask = (torch.arange(length) < lengths[:, None]).to((torch.int64, torch.bool, torch.float32)[call["seed"] % 3])
    if call["mode"] == "packed":
        lengths[0] = length
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        leading = (int(lengths.sum()),)
        bounds = (bounds, bounds.int(), bounds.tolist())[call["seed"] % 3]
    num_classes = 1 if objective.regression else call["classes"]
    labels = torch.randint(0, num_classes, (num_examples,), generator=generator)
    return {
        "student_hidden_states": [draw(*leading, student_size) for _ in range(objective.num_student_layers)],
        "teacher_hidden_states": [draw(*leading, gates.hidden_size) for _ in range(gates.num_layers)],
        "student_logits": draw(num_examples, num_classes),
        "teacher_logits": draw(num_examples, num_classes),
        "labels": torch.randn(num_examples, generator=generator) if objective.regression else labels,
        "attention_mask": mask,
        "cu_seqlens": bounds,
    }


def tensors_of(inputs: dict) -> dict[str, torch.Tensor]:
    flat = {}
    for name, value in inputs.items():
        for i, entry in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(entry, torch.Tensor):
                flat[f"{name}[{i}]"] = entry
    return flat


def mapped(inputs: dict, function) -> dict:
    """Every tensor replaced."""

    def change(value):
        if isinstance(value, list):
            return [change(entry) for entry in value]
        return function(value) if isinstance(value, torch.Tensor) else value

    return {name: change(value) for name, value in inputs.items()}


LEARNING = {
    "student": ("student_hidden_states", "student_logits"),
    "teacher": ("teacher_hidden_states",),
    "all": ("student_hidden_states", "teacher_hidden_states", "student_logits"),
    "nothing": (),
}


def learning(inputs: dict, names: tuple[str, ...]) -> dict:
    """The inputs as leaves, of which those named require grad."""
    inputs = mapped(inputs, lambda tensor: tensor.detach())
    for name, tensor in tensors_of(inputs).items():
        if name.partition("[")[0] in names:
            tensor.requires_grad_()
    return inputs


# --- what is right ----------------------------------------------------------------------------------------------------


def outcome(
    objective, inputs: dict, parameters: dict, backend: str | None = None, twice: bool = True
) -> dict[str, torch.Tensor]:
    """The four losses, and the gradient of the first by everything that requires grad, taken ``twice``."""
    out = objective(**inputs, **({} if backend is None else {"backend": backend}))
    results = {name: value.detach() for name, value in out._asdict().items()}
    leaves = {n: t for n, t in (tensors_of(inputs) | parameters).items() if t.requires_grad}
    enabled = torch.is_grad_enabled()
    needed = any("student" in name for name in leaves)  # others may be gates that no target depends on
    assert needed * enabled <= out.loss.requires_grad <= bool(leaves) * enabled
    if out.loss.requires_grad:
        # A backward that changes what it kept would not do the same again.
        grads, *more = (
            torch.autograd.grad(out.loss, list(leaves.values()), retain_graph=again, allow_unused=True)
            for again in ((True, False) if twice else (False,))
        )
        for one, other in zip(grads, more[0] if twice else grads, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one.nan_to_num(), other.nan_to_num()), "a second backward differs"
        results |= {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def exact(objective, inputs: dict, noise: float = 0.0, seed: int = 0) -> dict[str, torch.Tensor]:
    """The outcome in float64, with all gradients; inputs and parameters disturbed by that share of their size."""
    generator = torch.Generator().manual_seed(seed)

    def double(tensor, floor=0.0):
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.detach().double()
        size = tensor.square().mean().sqrt().clamp(min=floor)
        return tensor + noise * size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    twin = copy.deepcopy(objective).double().requires_grad_()
    with torch.no_grad():
        for parameter in twin.parameters():
            # A bias moves by as much as what it is added to is rounded.
            parameter.copy_(double(parameter, floor=1.0))
    labels, mask = inputs["labels"], inputs["attention_mask"]
    inputs = learning(mapped(inputs, double), LEARNING["all"]) | {"labels": labels.double() if noise else labels}
    if labels.is_floating_point():
        inputs["labels"] = labels.double()
    else:
        inputs["labels"] = labels
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        return outcome(twin, inputs | {"attention_mask": mask}, dict(twin.named_parameters()), "reference")


@torch.no_grad()
def exact_aggregates(hidden, gates, where: tuple, reverse, noise: float = 0.0, seed: int = 0) -> tuple:
    """In float64; states and parameters disturbed by that share of their size."""
    generator = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(gates).double()

    def disturbed(tensor, floor=0.0):
        scale = noise * tensor.double().square().mean().sqrt().clamp(min=floor)
        return tensor.double() + scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    for parameter in twin.parameters():
        parameter.copy_(disturbed(parameter, floor=1.0))
    return lad_fast.reference.aggregate([disturbed(h) for h in hidden], twin, *where, reverse=reverse)


def size(tensor: torch.Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def largest(inputs: dict) -> float:
    """Of the numbers among the inputs, at least 1."""
    return max(1.0, *(tensor.double().abs().nan_to_num(0, 0).max().item() for tensor in tensors_of(inputs).values()))


def check(
    actual: dict, expected: dict, epsilon: float, limit: float, most: float, others, objective: LADObjective
) -> None:  # fmt: skip
    """Ours off float64 by no more than plain PyTorch in the same precision is, or than rounding the inputs makes.

    Args:
        actual, expected: outcomes; ours may lack gradients.
        epsilon: of the precision.
        limit: its largest number: what comes near it may have passed it on the way.
        most: the largest number among the inputs.
        others: gives the outcome of plain PyTorch in that precision, and those of disturbed inputs; asked only where
            ours is further off than a few roundings.
        objective: whose weights multiply what cancels where both sides' logits are nearly equal.
    """
    states = [value for name, value in expected.items() if "states[" in name and value is not None]
    # What cancels to zero in a norm's gradient leaves noise of what flows through, times up to eps**-0.5 = 316.
    flow = max((value.nan_to_num(0, 0, 0).abs().max().item() for value in states), default=0.0)
    # A number that is its own mean cancels as a whole, and then what a kernel keeps of it in a half type is rounded so.
    kept = epsilon if objective.gates.hidden_size == 1 else torch.finfo(torch.float32).eps
    noise = 3e3 * kept * flow * most
    soft = objective.temperature * objective.soft_weight
    slopes = 4 * torch.finfo(torch.float32).eps * (soft + objective.hard_weight)
    cancelling = {"grad of student_logits[0]": slopes, "loss": slopes * max(1, objective.temperature)}
    cancelling["logits_loss"] = cancelling["loss"]
    measured = None
    for name, ours in actual.items():
        right = expected[name]
        if ours is None or right is None:
            assert (ours is None or not ours.any()) and (right is None or not right.any()), f"{name} must be zero"
            continue
        if not right.isfinite().all():
            if name == "loss":
                assert not ours.isfinite().all(), "a loss of inputs that are not finite is finite"
            continue
        if right.abs().max() > 1e-2 * min(limit, torch.finfo(ours.dtype).max):
            continue
        bound = 8 * epsilon * size(right) + cancelling.get(name, noise if name.startswith("grad") else 0)
        error = size(ours.double() - right) if ours.isfinite().all() else float("inf")
        if error <= bound:
            continue
        if measured is None:
            measured = others()
        off = [size(other[name].double() - right) for other in measured if other.get(name) is not None]
        if not all(value < float("inf") for value in off):
            continue
        assert error <= bound + 30 * max(off, default=0), f"{name} is off by {error:.2e} of {size(right):.2e}"


# --- the machine ------------------------------------------------------------------------------------------------------


def spoilt(value) -> list:
    """What may be passed in an argument's place: of another type, size, dtype, device or layout."""
    anything = [None, True, 0, -1, 3, 1.5, float("nan"), "x", b"x", (), [], {}, object(), torch.tensor(1.0), [[1], [2]]]
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        first = value[0]
        changed = [[*value[:-1], entry] for entry in spoilt(first)]
        alike = len({entry.shape for entry in value if isinstance(entry, torch.Tensor)}) == 1
        stacked = torch.stack(value) if alike else None
        return [*anything, value[:-1], [*value, first], stacked, tuple(value), iter(value), *changed]
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return [
            *anything, value[:0], value[..., :0], value[None], value[..., None], value.to("meta"), value.long(),
            value.double(), value.half(), value.bool(), value.to(torch.complex64), value.to_sparse(), value.flatten(),
            value.sum(), torch.cat([value, value]), -value.float() - 1, value.to(torch.int8), value.tolist(),
            torch.nn.Parameter(value.float()), value.numpy(force=True) if value.dtype != torch.bfloat16 else None,
        ]  # fmt: skip
    return anything


GATES = {
    "num_layers": st.integers(2, 5),
    "hidden_size": st.sampled_from((1, 2, 3, 7, 8, 16, 17)),
    "seq_len": st.integers(1, 9),
    "norm": st.sampled_from(("sequence", "token")),
    "reverse": st.booleans(),
}
WEIGHTS = st.sampled_from((0.0, 0.5, 1.0, 1000.0))
GRADIENTS_IN_FORWARD_ROWS = (launch.GRADIENTS_IN_FORWARD_ROWS, 0)  # the calls drawn are all of fewer rows


class PublicAPI(RuleBasedStateMachine):
    """One objective with its gates; rules change it and call it."""

    backends = ("torch", "torch", "torch", "reference")

    def __init__(self):
        super().__init__()
        COUNTS.setdefault(type(self).__name__, Counter())["runs"] += 1
        self.compiles = False

    @initialize(
        gates=st.fixed_dictionaries(GATES),
        students=st.integers(1, 5),
        size=st.sampled_from((None, None, 1, 5)),
        weights=st.tuples(WEIGHTS, WEIGHTS, WEIGHTS, st.sampled_from((0.5, 1.0, 10.0))),
        regression=st.booleans(),
        memory=st.sampled_from(("auto", "low", "fast")),
        backend=st.integers(0, 3),
        compiles=st.integers(0, 9),
        rows=st.sampled_from(GRADIENTS_IN_FORWARD_ROWS),
        seed=st.integers(0, 2**16),
    )
    def build(self, gates, students, size, weights, regression, memory, backend, compiles, rows, seed):
        launch.GRADIENTS_IN_FORWARD_ROWS = rows
        torch.manual_seed(seed)
        stack = GateStack(**gates)
        with torch.no_grad():  # not the ones and zeros that they start from
            stack.norm_weight.add_(0.3 * torch.randn_like(stack.norm_weight))
            stack.norm_bias.add_(0.3 * torch.randn_like(stack.norm_bias))
        soft, hard, hidden, temperature = weights
        self.settings = {
            "num_student_layers": min(students, gates["num_layers"]), "temperature": temperature, "soft_weight": soft,
            "hard_weight": hard, "hidden_weight": hidden, "regression": regression, "student_hidden_size": size,
            "memory": memory, "backend": self.backends[backend],
        }  # fmt: skip
        self.objective = LADObjective(stack, **self.settings)
        self.compiles = compiles == 0

    def teardown(self):
        launch.GRADIENTS_IN_FORWARD_ROWS = GRADIENTS_IN_FORWARD_ROWS[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.objective.gates.weight.dtype

    @property
    def seq_len(self) -> int:
        gates = self.objective.gates
        return gates.seq_len if gates.norm == "sequence" else 9

    def fitting(self, call: dict) -> dict:
        """The call with states of a dtype that the gates take."""
        if self.dtype == torch.float64:
            autocast = call["autocast"] if self.objective.backend != "reference" else None
            return call | {"dtype": torch.float64, "autocast": autocast}
        takes = {torch.float32, call["autocast"]}
        if self.objective.backend != "reference" or call["autocast"] is None:
            takes |= {*HALF}
        if self.objective.projections and call["autocast"] is None:
            takes = {torch.float32}
        return call if call["dtype"] in takes else call | {"dtype": torch.float32}

    @contextmanager
    def unchanged(self, inputs: dict):
        """Inputs and parameters are, behind the block, what they were."""
        tensors = tensors_of(inputs) | dict(self.objective.named_parameters())
        before = {name: tensor.detach().clone() for name, tensor in tensors.items() if not tensor.is_meta}
        yield
        for name, was in before.items():
            assert torch.equal(was.nan_to_num(), tensors[name].detach().nan_to_num()), f"{name} was changed"

    def call(self, function, call: dict, twice: bool = True) -> None:
        """Run the objective, or ``function`` in its place, and hold it against float64."""
        objective, context = self.objective, call["context"]
        inputs = make_inputs(objective, call, self.seq_len)
        names = LEARNING[call["learns"]]
        mine = learning(inputs, names)
        autocast = torch.autocast("cpu", call["autocast"] or torch.bfloat16, enabled=call["autocast"] is not None)
        grad = {"grad": nullcontext(), "no_grad": torch.no_grad(), "inference_mode": torch.inference_mode()}[context]
        with self.unchanged(inputs), grad, autocast:
            ours = outcome(function, mine, dict(objective.named_parameters()), twice=twice)
        if objective.backend != "reference":
            right = torch.float64 if call["dtype"] == torch.float64 else torch.float32
            assert {ours[name].dtype for name in lad_fast.LADOutput._fields} == {right}
        precisions = [torch.finfo(dtype) for dtype in (call["dtype"], call["autocast"]) if dtype is not None]
        epsilon, limit = max(p.eps for p in precisions), min(p.max for p in precisions)

        def others():
            disturbed = [exact(objective, inputs, epsilon, seed) for seed in (1, 2)]
            if call["autocast"] and call["dtype"] not in (torch.float32, call["autocast"]):
                return disturbed  # the reference does not take it
            with autocast:
                every = learning(inputs, LEARNING["all"])
                return [outcome(objective, every, dict(objective.named_parameters()), "reference"), *disturbed]

        check(ours, exact(objective, inputs), epsilon, limit, largest(inputs), others, objective)

    # --- running it ---

    @precondition(lambda self: self.dtype not in HALF)
    @counted(call=CALLS)
    def run(self, call):
        self.call(self.objective, self.fitting(call))

    @counted(call=CALLS)
    def run_in_any_dtype(self, call):
        """What does not fit together is refused."""
        with refusal():
            inputs = learning(make_inputs(self.objective, call, self.seq_len), LEARNING[call["learns"]])
            if call["inference"]:
                with torch.inference_mode():
                    inputs |= mapped({name: inputs[name] for name in inputs if "teacher" in name}, torch.clone)
            outcome(self.objective, inputs, dict(self.objective.named_parameters()))

    @precondition(lambda self: self.dtype not in HALF)
    @counted(
        call=CALLS,
        layers=st.lists(st.integers(0, 4), min_size=1, max_size=6),
        reverse=st.sampled_from((None, True, False)),
        memory=st.sampled_from(("auto", "low", "fast")),
        stacked=st.booleans(),
    )
    def aggregate(self, call, layers, reverse, memory, stacked):
        call, gates = self.fitting(call), self.objective.gates
        inputs = make_inputs(self.objective, call, self.seq_len)
        layers = [layer % gates.num_layers for layer in layers]  # any order, and twice
        where = (layers, inputs["attention_mask"], inputs["cu_seqlens"])
        hidden = learning(inputs, LEARNING["all"])["teacher_hidden_states"]
        hidden = torch.stack(hidden) if stacked else hidden
        with self.unchanged(inputs):
            outputs = lad_fast.fused_aggregate(
                hidden, gates, *where, reverse=reverse, memory=memory, backend=self.objective.backend
            )
        epsilon = torch.finfo(call["dtype"]).eps
        right = exact_aggregates(hidden, gates, where, reverse)
        others = None
        for i, (ours, expected) in enumerate(zip(outputs, right, strict=True)):
            assert ours.shape == expected.shape and ours.dtype == call["dtype"]
            if not expected.isfinite().all():
                continue
            error, bound = size(ours.double() - expected), 8 * epsilon * (size(expected) + 1)
            if not error <= bound:  # as plain PyTorch is, or rounding the inputs makes it, where groups hardly vary
                if others is None:
                    others = [exact_aggregates(hidden, gates, where, reverse, epsilon, seed) for seed in (1, 2)]
                    others.append(lad_fast.reference.aggregate(hidden, gates, *where, reverse=reverse))
                off = max(size(other[i].double() - expected) for other in others)
                assert not off < float("inf") or error <= bound + 30 * off, f"{error:.2e} of {size(expected):.2e}"

    @counted(call=CALLS, reduction=st.sampled_from(("sum", "none")), weight=WEIGHTS)
    def hidden_loss(self, call, reduction, weight):
        if call["dtype"] == torch.float64 and "triton" in self.backends:
            call |= {"dtype": torch.float32}
        inputs = learning(make_inputs(self.objective, call, self.seq_len), LEARNING["all"])
        student = inputs["student_hidden_states"]
        targets = [h.detach().flip(0).requires_grad_() for h in student]
        args = (inputs["attention_mask"], weight)
        backend = self.objective.backend
        ours = lad_fast.fused_hidden_loss(student, targets, *args, reduction=reduction, backend=backend)
        right = lad_fast.reference.hidden_loss(
            [h.double() for h in student], [h.double() for h in targets], *args, reduction=reduction
        )
        if right.isfinite().all() and not (backend == "reference" and call["dtype"] == torch.float16):
            tolerance = max(1e-5, 8 * torch.finfo(call["dtype"]).eps)
            torch.testing.assert_close(ours.double(), right, rtol=tolerance, atol=1e-6)
        ours.sum().backward()
        for one, two in zip(student, targets, strict=True):
            assert torch.equal(one.grad.nan_to_num(0, 0, 0), -two.grad.nan_to_num(0, 0, 0))

    # --- changing it ---

    @precondition(lambda self: self.dtype not in HALF)
    @counted(call=CALLS)
    def train(self, call):
        call = self.fitting(call | {"autocast": None}) | {"values": "normal"}
        if self.objective.backend == "reference" and call["dtype"] == torch.float16:
            call["dtype"] = torch.float32  # plain PyTorch's gradient of a norm without variance overflows in float16
        optimizer = torch.optim.AdamW(self.objective.parameters(), lr=1e-2)
        optimizer.zero_grad()  # of an earlier call, whose numbers may have been anything
        loss = self.objective(**make_inputs(self.objective, call, self.seq_len)).loss
        if loss.requires_grad:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(parameter.isfinite().all() for parameter in self.objective.parameters())

    @counted(dtype=st.sampled_from((torch.float32, torch.float32, *FLOATS)))
    def change_dtype(self, dtype):
        # The kernels take no float64.
        self.objective.to(torch.float32 if dtype == torch.float64 and "triton" in self.backends else dtype)

    @counted(name=st.integers(0, 20), requires=st.booleans())
    def require_grad(self, name, requires):
        parameters = list(self.objective.parameters())
        parameters[name % len(parameters)].requires_grad_(requires)

    @counted(training=st.booleans())
    def change_mode(self, training):
        self.objective.train(training)

    @counted(index=st.integers(0, 3))
    def change_backend(self, index):
        self.objective.backend = self.backends[index]

    @counted(how=st.sampled_from(("deepcopy", "pickle", "torch.save", "state_dict", "files")))
    def copy_it(self, how):
        """The rules go on with the copy; what was copied may change without it."""
        before = self.objective
        if how == "deepcopy":
            self.objective = copy.deepcopy(before)
        elif how == "pickle":
            self.objective = pickle.loads(pickle.dumps(before))
        elif how == "torch.save":
            file = io.BytesIO()
            torch.save(before.state_dict(), file)
            file.seek(0)
            self.objective = copy.deepcopy(before)
            self.objective.load_state_dict(torch.load(file, weights_only=True))
        else:
            if how == "state_dict":
                gates = GateStack(**before.gates.config)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    before.gates.save_pretrained(folder)
                    gates = GateStack.from_pretrained(folder)
                assert gates.config == before.gates.config
            self.objective = LADObjective(gates, **self.settings).to(self.dtype)
            self.objective.load_state_dict(before.state_dict())
            self.objective.backend = before.backend
            self.objective.train(before.training)
        old, new = before.state_dict(), self.objective.state_dict()
        assert list(old) == list(new)
        assert all(torch.equal(value, new[name]) and value.dtype == new[name].dtype for name, value in old.items())
        with torch.no_grad():
            before.gates.weight.fill_(torch.nan)

    @counted(gates=st.fixed_dictionaries(GATES))
    def load_from_another(self, gates):
        """PyTorch's own RuntimeError names the parameter, and nothing is loaded of those that do not fit."""
        other = LADObjective(GateStack(**gates), 1).state_dict()
        twin = copy.deepcopy(self.objective)
        theirs, ours = ({name: value.shape for name, value in state.items()} for state in (other, twin.state_dict()))
        if theirs == ours:
            twin.load_state_dict(other)
        else:
            with pytest.raises(RuntimeError, match=r"gates\.|projections"):
                twin.load_state_dict(other)

    # --- other ways to run it ---

    @precondition(lambda self: self.dtype not in HALF)
    @counted(call=CALLS)
    def run_functionally(self, call):
        parameters = dict(self.objective.named_parameters())

        def functional_call(**inputs):
            return torch.func.functional_call(self.objective, parameters, (), inputs)

        self.call(functional_call, self.fitting(call))

    @precondition(lambda self: self.dtype not in HALF)
    @counted(call=CALLS)
    def transform(self, call):
        """torch.func's transforms go with the reference alone."""
        call = self.fitting(call) | {"context": "grad", "learns": "nothing"}
        inputs = make_inputs(self.objective, call, self.seq_len)
        parameters = {name: parameter.detach() for name, parameter in self.objective.named_parameters()}
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=call["autocast"] is not None)

        def loss(parameters):
            return torch.func.functional_call(self.objective, parameters, (), inputs).loss

        with refusal(), autocast:
            grads = torch.func.grad(loss)(parameters)
            assert self.objective.backend == "reference"
            assert all(grad.shape == parameters[name].shape for name, grad in grads.items())
        logits = {name: torch.stack([inputs[name]] * 2) for name in ("student_logits", "teacher_logits", "labels")}
        with refusal():
            both = torch.func.vmap(
                lambda *logits: lad_fast.fused_distill_loss(
                    *logits, regression=self.objective.regression, backend=self.objective.backend
                )
            )(*logits.values())
            assert both.shape == (2,) and self.objective.backend == "reference"

    @precondition(lambda self: self.compiles and self.dtype not in HALF and self.objective.backend == "torch")
    @counted(call=CALLS, backend=st.sampled_from(("eager", "aot_eager")), dynamic=st.sampled_from((None, True)))
    def run_compiled(self, call, backend, dynamic):
        self.compiles = False  # once a run: it costs most
        torch._dynamo.reset()
        call = self.fitting(call) | {"context": "grad"}
        # A compiled backward may write into what it kept, and says so.
        self.call(torch.compile(self.objective, backend=backend, dynamic=dynamic), call, twice=False)
        torch._dynamo.reset()

    @counted(call=CALLS, everything=st.booleans())
    def move(self, call, everything):
        """To a device without numbers: with its inputs it runs there; without them it is refused."""
        there = copy.deepcopy(self.objective).to("meta")
        inputs = make_inputs(self.objective, call, self.seq_len)
        if everything:
            inputs = mapped(inputs, lambda tensor: tensor.to("meta"))
        with refusal():
            out = there(**inputs)
            assert everything and out.loss.device.type == "meta" and out.loss.shape == ()
            assert out.hidden_losses.shape == (there.num_student_layers,)
            if out.loss.requires_grad:
                out.loss.backward()
        with refusal(), tempfile.TemporaryDirectory() as folder:
            there.gates.save_pretrained(folder)

    # --- calling it wrongly ---

    @counted(data=st.data(), call=CALLS)
    def spoil_an_argument(self, data, call):
        inputs = make_inputs(self.objective, self.fitting(call), self.seq_len)
        name = data.draw(st.sampled_from(list(inputs)))
        choices = spoilt(inputs[name])
        inputs[name] = choices[data.draw(st.integers(0, len(choices) - 1), label=name)]
        with refusal():
            out = self.objective(**inputs)
            if out.loss.requires_grad:
                out.loss.backward()

    @counted(data=st.data(), call=CALLS)
    def spoil_a_function(self, data, call):
        call = self.fitting(call)
        inputs, backend = make_inputs(self.objective, call, self.seq_len), self.objective.backend
        hidden, mask, bounds = inputs["teacher_hidden_states"], inputs["attention_mask"], inputs["cu_seqlens"]
        gates = self.objective.gates
        four = [gates.weight, gates.bias, gates.norm_weight, gates.norm_bias]
        where = {"attention_mask": mask}
        function, arguments = data.draw(st.sampled_from([
            (lad_fast.fused_aggregate, where | {
                "hidden_states": hidden, "gates": four, "layers": [0, 1], "cu_seqlens": bounds, "reverse": None,
                "eps": 1e-5, "memory": "auto", "backend": backend,
            }),
            (lad_fast.fused_hidden_loss, where | {
                "student_hidden_states": hidden, "aggregates": hidden[::-1], "weight": 1.0, "reduction": "sum",
                "backend": backend,
            }),
            (lad_fast.fused_distill_loss, {
                **{name: inputs[name] for name in ("student_logits", "teacher_logits", "labels")}, "temperature": 2.0,
                "soft_weight": 0.5, "hard_weight": 0.5, "regression": self.objective.regression, "backend": backend,
            }),
            (chain_loss, where | {
                "student_hidden_states": hidden[:2], "hidden_states": hidden, "gates": gates, "layers": [0, 1],
                "cu_seqlens": bounds, "weight": 1.0, "memory": "auto", "backend": backend,
            }),
            (gates.contributions, where | {"hidden_states": hidden}),
        ]))  # fmt: skip
        name = data.draw(st.sampled_from(list(arguments)))
        choices = spoilt(arguments[name])
        arguments[name] = choices[data.draw(st.integers(0, len(choices) - 1), label=name)]
        with refusal():
            function(**arguments)

    @counted(data=st.data())
    def spoil_a_constructor(self, data):
        function, arguments = data.draw(
            st.sampled_from([
                (GateStack, self.objective.gates.config),
                (LADObjective, {"gates": self.objective.gates, **self.settings}),
            ])
        )
        name = data.draw(st.sampled_from(list(arguments)))
        choices = spoilt(None)
        value = choices[data.draw(st.integers(0, len(choices) - 1), label=name)]
        with refusal():
            function(**arguments | {name: value})


class Interpreted(PublicAPI):
    """The same with the kernels in Triton's interpreter, or on a GPU."""

    backends = ("triton", "triton", "triton", "torch")

    def fitting(self, call):
        return super().fitting(call) | {"batch": min(call["batch"], 2), "length": min(call["length"], 4)}


# --- training steps ---------------------------------------------------------------------------------------------------

RTE, STSB = get_task("rte"), get_task("stsb")
PRECISIONS = ("float32", "bfloat16", "float16")


def bert(task, num_layers: int, hidden_size: int, dropout: float):
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=24, hidden_size=hidden_size, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16, num_hidden_layers=num_layers, num_labels=task.num_labels, initializer_range=0.2,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )
    )  # fmt: skip


def examples(task) -> TokenizedSplit:
    numbers = np.random.default_rng(0)
    lengths = numbers.integers(3, 12, 24)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    labels = numbers.random(24).astype(np.float32) * 5 if task.is_regression else numbers.integers(0, 2, 24)
    ids = numbers.integers(4, 24, offsets[-1]).astype(np.int32)
    return TokenizedSplit(task, "train", ids, None, offsets, labels, np.arange(24))


class Training(RuleBasedStateMachine):
    """A training step, and a twin that was loaded from its state: they stay equal to the bit."""

    def __init__(self):
        super().__init__()
        COUNTS.setdefault(type(self).__name__, Counter())["runs"] += 1

    @initialize(
        task=st.sampled_from((RTE, STSB)),
        method=st.sampled_from(("lad", "lad", "skip", "attention", "logits", "none")),
        layers=st.sampled_from(((2, 1), (2, 2), (3, 1), (3, 2))),
        sizes=st.sampled_from(((8, 8), (8, 4))),
        gates=st.fixed_dictionaries({name: GATES[name] for name in ("norm", "reverse")}),
        dropout=st.sampled_from((0.0, 0.1)),
        precision=st.sampled_from(PRECISIONS),
        caches=st.booleans(),
        mask_padding=st.booleans(),
        rows=st.sampled_from(GRADIENTS_IN_FORWARD_ROWS),
        seed=st.integers(0, 2**16),
    )
    def build(self, task, method, layers, sizes, gates, dropout, precision, caches, mask_padding, rows, seed):
        launch.GRADIENTS_IN_FORWARD_ROWS = rows
        torch.manual_seed(seed)
        self.task, self.method, self.layers, self.sizes = task, method, layers, sizes
        self.gates, self.dropout, self.caches = gates, dropout, caches
        self.options = {"precision": precision, "mask_padding": mask_padding}
        self.split, self.twin = examples(task), None
        self.teacher = bert(task, layers[0], sizes[0], dropout)
        self.before = copy.deepcopy(self.teacher.state_dict())
        self.step = self.make_step()
        self.step(*self.batches(0, 4, "longest"))

    def teardown(self):
        launch.GRADIENTS_IN_FORWARD_ROWS = GRADIENTS_IN_FORWARD_ROWS[0]

    def make_step(self) -> DistillStep:
        """With a student and gates drawn anew."""
        student = bert(self.task, self.layers[1], self.sizes[1], self.dropout)
        teacher, objective, cache = None, None, None
        for model in (student, self.teacher):
            enable_packing(model)
        if self.method != "none":
            teacher = self.teacher
            objective = partial(lad_fast.fused_distill_loss, regression=self.task.is_regression, backend="torch")
            if self.caches:
                cache = TeacherCache(
                    self.split.lengths, 0 if self.method == "logits" else self.layers[0], self.sizes[0],
                    self.task.num_labels, dtype=torch.float32, device="cpu", place="cpu",
                )  # fmt: skip
        options = {"hidden_weight": 10.0, "regression": self.task.is_regression, "backend": "torch"}
        options |= {"student_hidden_size": self.sizes[1]}
        if self.method == "lad":
            gates = GateStack(self.layers[0], self.sizes[0], 16, **self.gates)
            objective = LADObjective(gates, self.layers[1], **options)
        elif self.method in ("skip", "attention"):
            kind = LayerMapObjective if self.method == "skip" else AttentionObjective
            objective = kind(self.layers[0], self.sizes[0], self.layers[1], **options)
        return DistillStep(
            student, teacher, objective, learning_rate=1e-3, gate_learning_rate=1e-3, total_steps=100, warmup_steps=3,
            teacher_cache=cache, **self.options,
        )  # fmt: skip

    def batches(self, number: int, size: int, padding: str) -> list[dict]:
        batches = Batches(
            self.split, size, 0, shuffle=True, seed=number, padding=padding, max_length=12, pad_to_multiple_of=1
        )
        return list(islice(batches, 1 + number % 2))

    @invariant()
    def agrees(self):
        if not hasattr(self, "step"):
            return
        for name, value in self.teacher.state_dict().items():
            assert torch.equal(value, self.before[name]), f"the teacher's {name} was changed"
        assert all(parameter.isfinite().all() for parameter in self.step.student_parameters)
        if self.twin is not None:
            ours, theirs = (step.state_dict() for step in (self.step, self.twin))
            assert list(ours) == list(theirs)
            for part in ("student", "objective"):
                assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items()), part
            assert ours["scheduler"] == theirs["scheduler"] and ours["scaler"] == theirs["scaler"]

    @counted(
        number=st.integers(0, 2**16), size=st.sampled_from((1, 3, 4)), times=st.integers(1, 3),
        padding=st.sampled_from(("longest", "packed", "max_length")),
    )  # fmt: skip
    def train(self, number, size, times, padding):
        padding = padding if self.options["mask_padding"] else "longest"  # packed, there is none that could count
        for _ in range(times):
            results = []
            for step in (self.step, self.twin):
                if step is not None:
                    torch.manual_seed(number)
                    results.append(step(*self.batches(number, size, padding)))
            assert all(value.isfinite().all() for value in results[0].values())
            assert all(torch.equal(value, result[name]) for result in results for name, value in results[0].items())

    @counted(how=st.sampled_from(("state", "files")))
    def load(self, how):
        """The state goes into a step drawn anew, which goes on beside this one."""
        self.twin, state = self.make_step(), copy.deepcopy(self.step.state_dict())
        if how == "files":
            with tempfile.TemporaryDirectory() as folder:
                log = Path(folder) / "log.jsonl"
                log.touch()
                state = read_checkpoint(Checkpoints(Path(folder)).save(1, {"step": state}, log)).state["step"]
        self.twin.load_state_dict(state)
        # Of its own, but equal: what is read differs at padding from what is run.
        self.twin.teacher_cache = copy.deepcopy(self.step.teacher_cache)

    @counted()
    def swap(self):
        if self.twin is not None:
            self.step, self.twin = self.twin, self.step

    @counted(precision=st.sampled_from(PRECISIONS))
    def change_precision(self, precision):
        """A step of another precision takes up the state of this one."""
        self.options["precision"] = precision
        state, cache = copy.deepcopy(self.step.state_dict()), self.step.teacher_cache
        self.step, self.twin = self.make_step(), None
        self.step.load_state_dict(state)
        self.step.teacher_cache = cache

    @counted(
        precision=st.sampled_from(PRECISIONS), size=st.integers(1, 24), padding=st.sampled_from(("longest", "packed")),
    )  # fmt: skip
    def evaluate(self, precision, size, padding):
        batches = Batches(self.split, size, 0, shuffle=False, padding=padding)
        result = evaluate(self.step.student, batches, self.task, precision=precision)
        assert self.step.student.training and np.isfinite(result.logits).all() and len(result.ids) == 24

    @counted()
    def save_the_models(self):
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder) / "best", self.step.student, gates=self.step.gates)
            with quiet():
                student = BertForSequenceClassification.from_pretrained(Path(folder) / "best")
            assert all(torch.equal(v, student.state_dict()[n]) for n, v in self.step.student.state_dict().items())
            if self.step.gates is not None:
                gates = GateStack.from_pretrained(Path(folder) / "best")
                ours, theirs = gates.parameters(), self.step.gates.parameters()
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    @counted()
    def train_on_nothing(self):
        with pytest.raises(ValueError, match="batches is empty"):
            self.step()


# --- running them -----------------------------------------------------------------------------------------------------

SHARES = {PublicAPI: 0.55, Training: 0.25, Interpreted: 0.2}


@pytest.fixture(scope="module", autouse=True)
def record(request):
    """What a long run tried, written where each of its machines ended well."""
    yield
    tried = {name: counts for name, counts in COUNTS.items() if "seconds" in counts}
    if request.session.testsfailed or len(tried) < len(SHARES):
        return
    versions = {"torch": torch.__version__, "hypothesis": hypothesis.__version__}
    head = {"machine": bench_record.machine(), "date": str(date.today()), "versions": versions}
    machines = {
        name: {"seconds": counts.pop("seconds"), "runs": counts.pop("runs"), "calls": counts.total()}
        | {"calls by rule": dict(sorted(counts.items()))}
        for name, counts in tried.items()
    }
    RESULT.write_text(json.dumps(head | {"machines": machines}, indent=1) + "\n", encoding="utf-8")


def fuzz(machine, most_runs: int) -> None:
    """So many runs, the same each time; or, where there are seconds, other ones until the machine's share is over."""
    if not SECONDS:
        run_state_machine_as_test(machine, settings=settings(QUICK, max_examples=most_runs, stateful_step_count=10))
        return
    long = settings(QUICK, derandomize=False, max_examples=20, stateful_step_count=15)
    COUNTS[machine.__name__] = Counter()
    start = time.perf_counter()
    while time.perf_counter() - start < SHARES[machine] * SECONDS:
        run_state_machine_as_test(machine, settings=long)
    COUNTS[machine.__name__]["seconds"] = round(time.perf_counter() - start)


def test_the_public_api():
    fuzz(PublicAPI, 60)


def test_training_steps():
    fuzz(Training, 15)


def test_the_kernels():
    fuzz(Interpreted, 5)


def _wrong_gradient(patch):
    right = eager.distill_loss_forward

    def wrong(*args):
        loss, slope, sums = right(*args)
        return loss, 1.01 * slope, sums

    patch.setattr(eager, "distill_loss_forward", wrong)


def _changed_input(patch):
    right = eager.distill_loss_forward
    patch.setattr(eager, "distill_loss_forward", lambda *args: (right(*args), args[1].add_(1))[0])


def _unchecked_argument(patch):
    patch.setattr(functional, "check_float", lambda *args: None)


def _forgotten_schedule(patch):
    patch.setattr("torch.optim.lr_scheduler.LambdaLR.load_state_dict", lambda *args: None)


PLANTED = {
    "a wrong gradient": (PublicAPI, _wrong_gradient, "is off by"),
    "an input that is changed": (PublicAPI, _changed_input, "was changed"),
    "an unchecked argument": (PublicAPI, _unchecked_argument, None),
    "a schedule that is not loaded": (Training, _forgotten_schedule, None),
}


@pytest.mark.parametrize(("machine", "plant", "message"), PLANTED.values(), ids=PLANTED)
@pytest.mark.skipif(SECONDS > 0, reason="of the machines themselves, which a long run takes as they are")
def test_a_planted_bug_is_found(monkeypatch, machine, plant, message):
    plant(monkeypatch)
    # Enough for any draw: which one it is changes with the machines' source, and the first run that finds ends it.
    found = settings(
        QUICK, max_examples=1000, stateful_step_count=10, phases=[Phase.generate], report_multiple_bugs=False
    )
    with pytest.raises((AssertionError, RuntimeError, AttributeError), match=message):
        run_state_machine_as_test(machine, settings=found)

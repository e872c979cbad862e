"""Who takes part in the benchmarks of whole training steps, all from the same weights, and the gate before timing."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from baselines import PlainStep, PublishedStep
from measuring import DEVICE, DTYPES
from torch import Tensor, nn
from workloads import MAX_LENGTH, Size, Workload, batches, made_up, models

from lad_fast.packed import enable_packing
from lad_fast.step import DistillStep, prepare_ahead
from lad_fast.teacher_cache import TeacherCache
from lad_fast.training import fastest_precision

ON_GPU = DEVICE.type == "cuda"
SETTINGS = {"learning_rate": 1e-4, "gate_learning_rate": 1e-6, "total_steps": 10**6, "warmup_steps": 100}
PUBLISHED = "published, float32"
GRAPHS, CACHED = "CUDA graphs", "cached teacher"
FASTEST = fastest_precision(DEVICE)  # what training takes by itself
CONTESTANTS = (
    PUBLISHED, "plain, float32", "plain, bfloat16", "ours, float32", "ours, bfloat16",
    f"ours, {FASTEST}, {GRAPHS}", f"ours, {FASTEST}, {CACHED}",
)  # fmt: skip


class Runner(NamedTuple):
    """A contestant."""

    run: Callable[[Workload], list]
    """Trains on a workload's batches, one step each; their losses, unread."""
    step: object
    padding: str
    """How its batches come; see :class:`lad_fast.data.Batches`."""


def published(size: Size, workload: Workload) -> Runner:
    student, teacher, objective = models(size, DEVICE)
    step = PublishedStep(student, teacher, objective, **SETTINGS, tokenizer=workload.tokenizer, max_length=MAX_LENGTH)

    def run(workload: Workload) -> list:
        losses = [step(*batch) for batch in workload.text_batches()]
        return [loss.logits_loss + sum(loss.hidden_losses) for loss in losses]

    return Runner(run, step, "max_length")


def plain(size: Size, precision: str, padding: str, mask_padding: bool) -> Runner:
    student, teacher, objective = models(size, DEVICE)
    step = PlainStep(student, teacher, objective, **SETTINGS, dtype=DTYPES[precision], mask_padding=mask_padding)

    def run(workload: Workload) -> list:
        return [step(batch) for batch in batches(workload, padding)]

    return Runner(run, step, padding)


def ours(
    size: Size, precision: str, padding: str, mask_padding: bool, option: str | None = None,
    examples: Workload | None = None, pad_to_multiple_of: int | None = None,
) -> Runner:  # fmt: skip
    """The library's step, fed as its training loop feeds it.

    ``option`` is None, :data:`GRAPHS`, or :data:`CACHED`: the teacher's outputs on ``examples`` are kept from their
    first pass on. ``pad_to_multiple_of`` is the training loop's own if None.
    """
    student, teacher, objective = models(size, DEVICE)
    if padding == "packed":
        for model in (student, teacher):
            enable_packing(model)
    cache = None
    if option == CACHED:
        cache = TeacherCache(
            examples.tokens.lengths, size.teacher_layers, size.hidden_size, 2, dtype=DTYPES[precision], device=DEVICE,
            place="gpu" if ON_GPU else "cpu",
        )  # fmt: skip
    step = DistillStep(
        student, teacher, objective, **SETTINGS, mask_padding=mask_padding, precision=precision, teacher_cache=cache,
        cuda_graphs=option == GRAPHS,
    )  # fmt: skip

    def run(workload: Workload) -> list:
        prepared = prepare_ahead(batches(workload, padding, pad_to_multiple_of), step.prepare, DEVICE)
        return [step(batch)["loss"] for batch in prepared]

    return Runner(run, step, padding)


def make(name: str, size: Size, workload: Workload, padding: str, mask_padding: bool) -> Runner:
    """The contestant of this name; the library's packs what others pad to the longest, where it does so by itself."""
    kind, precision, *option = name.split(", ")
    if kind == "published":
        return published(size, workload)
    if kind == "plain":
        return plain(size, precision, padding, mask_padding)
    option = option[0] if option else None
    packs = padding == "longest" and ON_GPU and precision == "bfloat16" and option != GRAPHS
    return ours(size, precision, "packed" if packs else padding, mask_padding, option, workload)


# Losses, and for each weight the norm of the difference of first moments over the norm of one, with a hundredth of all
# weights' for those that hardly have a gradient: float32 in another order of sums along all layers; bfloat16 with its
# roundings of every activation. A wrong gradient is off by its own size.
TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (1e-2, 0.1)}


class Outcome(NamedTuple):
    """What a contestant made of a few examples without dropout."""

    losses: Tensor
    moments: dict[str, Tensor]
    """AdamW's first moments of the student's weights by name: sums of their clipped gradients."""


def outcome(make_runner: Callable[[Workload], Runner]) -> Outcome:
    """Steps over one small batch: a cache is read from the second on, a graph (on a GPU) replayed from the fourth."""
    few = made_up(4)
    runner = make_runner(few)
    student = runner.step.student
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses = torch.stack([torch.as_tensor(loss).cpu() for _ in range(4 if ON_GPU else 2) for loss in runner.run(few)])
    states = getattr(runner.step, "optimizer", None) or runner.step.optimizers[0]
    return Outcome(losses, {name: states.state[p]["exp_avg"].cpu() for name, p in student.named_parameters()})


@functools.cache
def baseline_outcome(size: Size, padding: str, mask_padding: bool) -> Outcome:
    """What is right: the published loop where padding counts, otherwise the plain loop in float32."""
    name = "plain, float32" if mask_padding else PUBLISHED
    return outcome(lambda few: make(name, size, few, padding, mask_padding))


def check_outcome(
    make_runner: Callable[[Workload], Runner], size: Size, padding: str, mask_padding: bool, precision: str
) -> None:
    """Losses and gradients are the baseline's: no figure of a wrong step."""
    found, right = outcome(make_runner), baseline_outcome(size, padding, mask_padding)
    of_loss, of_gradient = TOLERANCE[precision]
    torch.testing.assert_close(found.losses.float(), right.losses.float(), rtol=of_loss, atol=0)
    least = torch.stack([moment.norm() for moment in right.moments.values()]).norm() / 100
    for name, moment in right.moments.items():
        error = ((found.moments[name] - moment).norm() / (moment.norm() + least)).item()
        assert error <= of_gradient, f"gradient of {name}: relative error {error:.1e}"


@functools.cache  # one gate for all workloads that a contestant is timed on
def check_contestant(name: str, size: Size, padding: str, mask_padding: bool) -> None:
    """:func:`check_outcome` of a contestant by its name; tests/test_baselines.py holds the published loop."""
    if name == PUBLISHED:  # the others are checked against it where padding counts
        return
    precision = name.split(", ")[1]
    try:
        check_outcome(lambda few: make(name, size, few, padding, mask_padding), size, padding, mask_padding, precision)
    except AssertionError as error:  # it ends the race of all
        error.add_note(f"contestant: {name}")
        raise
